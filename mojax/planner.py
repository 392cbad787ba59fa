"""The plan: one row per tensor of the source, and every problem that headers can show."""

from __future__ import annotations

import dataclasses
import functools
import re
from collections.abc import Mapping
from fnmatch import fnmatchcase
from types import ModuleType

import jax
import jax.numpy as jnp
import numpy as np

from mojax import experts, find, fusing, trace
from mojax.errors import InputError, PlanError, nearest
from mojax.formats.base import Format, Scheme
from mojax.model import Model
from mojax.models.layers import Block
from mojax.recipe import Recipe, choose, load_recipe, menu_rows
from mojax.resolve import decide, resolve_format, resolve_steps
from mojax.transforms.base import Context, Transform, placed

TARGETS = ("vllm", "sglang", "trtllm", "transformers")
SMOOTHED = "absorbs smoothing scales"  # the reason of a row that a step rewrites
ROUTERS = ("*.gate.weight", "*router*")  # kept where no family says what to keep
READS = ("dot", "ragged_dot")  # operations that read a linear's weight
OUTPUTS = ("report.json", "mojax.json", "hf_quant_config.json")


@dataclasses.dataclass(frozen=True)
class Row:
    """One tensor of the source, or one of every expert of a layer, and what becomes of it.

    Attributes:
      name: the checkpoint's name, experts as `*`.
      role: linear, embedding, head, norm, bias or other.
      shape, dtype: in the source; `[experts, out, in]` where the name has a star.
      block: the prefix of its block, "" outside the blocks.
      scheme: the formats of weight and input; None for a tensor that is kept.
      shared: an id for the tensors that share one outer scale, "" for none.
      before, after: bytes on disk, scales included.
      reason: why it is kept, or what is folded into it.
    """

    name: str
    role: str
    shape: tuple[int, ...]
    dtype: np.dtype
    block: str
    scheme: Scheme | None
    shared: str
    before: int
    after: int
    reason: str

    @property
    def names(self) -> tuple[str, ...]:
        """The tensors of the source."""
        return experts.expand(self.name, self.shape[0] if self.shape else 1)

    @property
    def matrix(self) -> tuple[int, ...]:
        """The shape of one of them."""
        return self.shape[1:] if experts.starred(self.name) else self.shape


@dataclasses.dataclass(frozen=True)
class Plan:
    """A recipe resolved for one model, one dialect and one target."""

    rows: tuple[Row, ...]
    recipe: Recipe
    dialect: ModuleType
    target: str
    step: Transform
    sites: Mapping[str, tuple[trace.Site, ...]]  # by kind of block, names without the block's prefix
    cache: Format | None
    source_parameters: int

    @functools.cached_property
    def schemes(self) -> dict[str, Scheme]:
        """By module, what is encoded."""
        return {r.name.removesuffix(".weight"): r.scheme for r in self.rows if r.scheme is not None}

    @functools.cached_property
    def modules(self) -> dict[str, Scheme]:
        """The same by the names in the files, every expert by itself."""
        return experts.spread(self.schemes, {r.name: r.shape for r in self.rows if r.scheme is not None})

    @functools.cached_property
    def needs(self) -> tuple[str, ...]:
        """The statistics that must be calibrated; none means that no data is needed."""
        static = any(s.inputs is not None and s.inputs.static for s in self.schemes.values()) or self.cache
        needs = [*self.step.needs, *(["absmax"] if static else [])]
        counted = needs and any(experts.starred(m) for m in self.schemes)  # which experts saw tokens
        return tuple(dict.fromkeys([*needs, *(["count"] if counted else [])]))

    @property
    def bytes_before(self) -> int:
        return sum(r.before for r in self.rows)

    @property
    def bytes_after(self) -> int:
        return sum(r.after for r in self.rows)

    @property
    def bits_per_weight(self) -> float:
        """8 x bytes of all written tensors / parameters of the source."""
        return 8 * self.bytes_after / self.source_parameters

    @property
    def bits_per_quantized_weight(self) -> float | None:
        """The same over the encoded tensors alone; None if there are none."""
        rows = [r for r in self.rows if r.scheme is not None]
        return 8 * sum(r.after for r in rows) / sum(int(np.prod(r.shape)) for r in rows) if rows else None

    def context(self, block: Block | None) -> Context:
        """What the transforms may know of one block (None: of what is outside), in checkpoint names."""
        p = block.prefix if block else ""
        sites = placed(self.sites.get(block.kind, ()) if block else (), p)
        mine = [r for r in self.rows if r.block == p]
        groups: dict[str, list[str]] = {}
        for r in mine:
            if r.shared:
                groups.setdefault(r.shared, []).append(r.name)
        schemes = {r.name.removesuffix(".weight"): r.scheme for r in mine if r.scheme is not None}
        return Context(
            sites,
            schemes,
            tuple(tuple(g) for g in groups.values()),
            frozenset(r.name for r in mine if choose(self.recipe, r.name).weights == "keep"),
        )

    def observed(self, block: Block) -> dict[str, str]:
        """What calibration must watch: weight or cache name -> the first name that has the same input."""
        first: dict[int, str] = {}
        context = self.context(block)
        out = {}
        for s in context.sites:
            wanted = s.weight.removesuffix(".weight") in context.schemes
            if (s.op in READS and wanted) or (s.op == "cache" and self.cache is not None):
                out[s.weight] = first.setdefault(s.group, s.weight)
        return out

    def memory(self, tokens: int) -> int:
        """Bytes to expect: the largest block three times (experts five), activations of `tokens` twice."""
        size: dict[str, int] = {}
        for r in self.rows:  # experts are stacked and decoded whole
            size[r.block] = size.get(r.block, 0) + r.before * (5 if experts.starred(r.name) else 3)
        hidden = max((r.shape[-1] for r in self.rows if r.role == "embedding"), default=0)
        return max(size.values()) + 2 * tokens * hidden * 4


def plan(
    model: Model, recipe: str | Recipe, *, format: str = "compressed-tensors", target: str = "vllm"
) -> Plan:
    """Resolve a recipe for a model. Reads no weight.

    Args:
      model: from `mojax.load`.
      recipe: a name (`mojax recipes`), a file, or a Recipe.
      format: the checkpoint dialect, a file of `converters/` that can write.
      target: who must be able to load it: vllm, sglang, trtllm or transformers.
    Raises:
      InputError: an unknown name; a source that is quantized already.
      PlanError: every problem found.
    """
    if not isinstance(model, Model):
        raise InputError(
            f"plan: found {type(model).__name__}, needed a Model of mojax.load; a Function goes straight to "
            "mojax.quantize"
        )
    recipe = recipe if isinstance(recipe, Recipe) else load_recipe(recipe)
    dialect = find.find("converters", format)
    if not dialect.WRITES:
        raise InputError(
            f"--format={format}: this dialect is read, not written; write compressed-tensors or modelopt"
        )
    if target not in TARGETS:
        raise InputError(f"--target={target}: unknown target{nearest(target, TARGETS)}")
    if model.schemes:
        raise InputError(
            f"{model.checkpoint.folder if model.checkpoint else 'the model'}: is quantized already "
            f"({next(iter(model.schemes.values())).label}); `mojax convert` writes it in another dialect, "
            "and quantizing needs the source in full precision"
        )
    return _Planner(model, recipe, dialect, target).plan()


class _Planner:
    """The steps of `plan`, sharing what they found."""

    def __init__(self, model: Model, recipe: Recipe, dialect: ModuleType, target: str):
        self.model, self.recipe, self.dialect, self.target = model, recipe, dialect, target
        assert model.checkpoint is not None
        self.files = model.tensors
        self.folder = model.checkpoint.folder
        self.problems: list[str] = []
        self.keep: tuple[str, ...] = getattr(model.family, "KEEP", ()) if model.family else ROUTERS
        self.sites, self.roles = self._trace()
        prefixes = [(b.prefix, s) for b in model.blocks for s in self.sites.get(b.kind, ())]
        self.routers = frozenset(prefix + s.weight for prefix, s in prefixes if s.router)

    def plan(self) -> Plan:
        step = resolve_steps(self.recipe)
        rows = [self._row(name) for name in self.files]
        shared = fusing.share(rows, self.model, self.recipe, self.target, self.problems.append)
        rows = [dataclasses.replace(r, shared=shared.get(r.name, "")) for r in rows]
        cache = self._cache()
        self._unmatched()
        self._data(rows, step, cache)
        if not any(r.scheme for r in rows) and not self.problems:
            self.problems.append(
                "nothing would be quantized: every tensor is kept; see `mojax plan` without --keep"
            )
        for name in OUTPUTS:
            if (self.folder / name).exists():
                self.problems.append(
                    f"{name}: the source has a file of this name, which the output writes; remove it"
                )
        count = sum(int(np.prod(r.shape)) for r in rows)
        made = Plan(tuple(rows), self.recipe, self.dialect, self.target, step, self.sites, cache, count)
        if not self.problems:
            self._config(made)
        if self.problems:
            raise PlanError(list(dict.fromkeys(self.problems)))
        return self._rewritten(made)

    def _config(self, made: Plan) -> None:
        """What the dialect cannot say in one config, before hours of work."""
        try:
            self.dialect.config(made.modules, (), made.cache)
        except InputError as error:
            self.problems.append(str(error))

    def _rewritten(self, made: Plan) -> Plan:
        """The plan with a note on the tensors that are not encoded and change all the same."""
        names = {n for block in self.model.blocks for n in made.step.rewrites(made.context(block))}
        noted = (dataclasses.replace(r, reason=SMOOTHED) if r.name in names else r for r in made.rows)
        return dataclasses.replace(made, rows=tuple(noted))

    def _trace(self) -> tuple[dict[str, tuple[trace.Site, ...]], dict[str, str]]:
        """Sites by kind of block, and the role of every tensor that the trace reaches."""
        model, spec = self.model, self._struct
        if model.family is None:
            return {}, {}
        roles, sites = {}, {}
        shapes = model.family.shapes(model.hyper)
        inside = tuple(b.prefix for b in model.blocks)
        outside = {n: spec(n) for n in shapes if not n.startswith(inside)}
        tokens = jax.ShapeDtypeStruct((1, 8), jnp.int32)
        x = jax.eval_shape(functools.partial(model.family.embed, model.hyper), outside, tokens)
        for s in trace.sites(functools.partial(model.family.head, model.hyper), outside, x):
            roles[s.weight] = "head"
        for s in trace.sites(functools.partial(model.family.embed, model.hyper), outside, tokens):
            roles[s.weight] = "embedding"
        for block in model.blocks:
            sites[block.kind] = model.sites(block)
            roles |= {block.prefix + s.weight: "linear" for s in sites[block.kind] if s.op in READS}
        return sites, roles

    def _struct(self, name: str) -> jax.ShapeDtypeStruct:
        spec = self.files.spec(name)
        return jax.ShapeDtypeStruct(spec.shape, spec.dtype)

    def _role(self, name: str, shape: tuple[int, ...]) -> str:
        if name in self.roles:
            return self.roles[name]
        if name == "lm_head.weight":  # also a copy that a tied model stores and no one reads
            return "head"
        if self.model.family is None and name.endswith(".weight") and len(shape) == 2:
            vocabulary = self.model.config.get("vocab_size")
            if "embed" in name:
                return "embedding"
            return "head" if "lm_head" in name or shape[0] == vocabulary else "linear"
        if name.endswith(".bias"):
            return "bias"
        return "norm" if "norm" in name and len(shape) == 1 else "other"

    def _row(self, name: str) -> Row:
        dtype, shape = self.files.spec(name)
        role = self._role(name, shape)
        before = int(np.prod(shape)) * np.dtype(dtype).itemsize
        prefix = next((b.prefix for b in self.model.blocks if name.startswith(b.prefix)), "")
        scheme, reason = self._scheme(name, role)
        after = before
        if scheme is not None:
            trouble = self._trouble(name, np.dtype(dtype), tuple(shape), scheme)
            if trouble:
                self.problems.append(trouble)
            else:
                count, matrix = _apart(name, shape)
                parts = self.dialect.layout(name.removesuffix(".weight"), matrix, dtype, scheme).values()
                after = count * sum(int(np.prod(p.shape)) * np.dtype(p.dtype).itemsize for p in parts)
        return Row(name, role, tuple(shape), np.dtype(dtype), prefix, scheme, "", before, after, reason)

    def _trouble(self, name: str, dtype: np.dtype, shape: tuple[int, ...], scheme: Scheme) -> str | None:
        """Why this tensor cannot be encoded, written or loaded so, or None."""
        if refusal := self.dialect.check(scheme, self.target, dtype, experts.starred(name)):
            return refusal
        _, matrix = _apart(name, shape)
        if indivisible := scheme.weights.check(matrix):
            keep = name.split("*")[0] + "*" if experts.starred(name) else name
            return (
                f"{name}: {indivisible} ({scheme.weights.label}); add --keep={keep}, or use "
                "a format that divides it"
            )
        if not jnp.issubdtype(dtype, jnp.floating) or dtype.itemsize < 2:
            return f"{name}: is {dtype.name}, only float tensors can be quantized; add --keep={name}"
        known = self.model.family is not None  # else `_data` says it once
        static = scheme.inputs is not None and scheme.inputs.static
        if known and static and self.roles.get(name) != "linear":
            return (
                f"{name}: its inputs need a static scale, and only linears of the blocks are calibrated; "
                "use a format with dynamic inputs, or none"
            )
        try:
            self.dialect.layout(name.removesuffix(".weight"), matrix, dtype, scheme)
        except InputError as error:
            return str(error)
        return None

    def _scheme(self, name: str, role: str) -> tuple[Scheme | None, str]:
        """The formats of a tensor, or why it is kept; trouble becomes a problem."""
        try:
            keep = (*self.keep, name) if name in self.routers else self.keep
            scheme, reason = decide(self.recipe, name, role, keep, self.dialect.ARITHMETIC)
        except InputError as error:
            self.problems.append(str(error))
            return None, "unresolved"
        if scheme is not None and role == "head" and name != "lm_head.weight":
            self.problems.append(
                f"{name}: is the embedding and the tied head at once; remove the rule that names it"
            )
            return None, "tied"
        if scheme is not None and role == "head" and self.model.family and name not in self.roles:
            self.problems.append(
                f"{name}: the head is tied to the embedding, and this copy of it is not read; remove the "
                "rule that names it"
            )
            return None, "tied"
        return scheme, reason

    def _cache(self) -> Format | None:
        """The format of the key/value cache, one for all layers."""
        blocks = [block.prefix for block in self.model.blocks] or [""]
        by_layer = {p: choose(self.recipe, f"{p}self_attn.k_proj.weight").kv_cache or "none" for p in blocks}
        asked = sorted(set(by_layer.values()))
        if asked == ["none"]:
            return None
        if len(asked) > 1:
            odd = next(p for p, a in by_layer.items() if a != asked[0])
            self.problems.append(
                f"kv_cache: {odd}self_attn would have {by_layer[odd]} and others not; servers have one "
                "format for the cache of all layers, so give the rule match: '*'"
            )
            return None
        if asked != ["fp8"]:
            self.problems.append(f"kv_cache: {asked[0]} is not a cache format here; known: fp8, none")
            return None
        return resolve_format({"format": "fp8"}, "kv_cache", self.dialect.ARITHMETIC)

    def _data(self, rows: list[Row], step: Transform, cache: Format | None) -> None:
        static = any(r.scheme and r.scheme.inputs and r.scheme.inputs.static for r in rows)
        if self.model.family is None and (static or step.needs or cache):
            self.problems.append(
                f"{self.recipe.name} needs calibration, and model_type "
                f"{self.model.config.get('model_type')!r} has no "
                f"forward function here; use a recipe that needs no data: {', '.join(data_free())}"
            )

    def _unmatched(self) -> None:
        ends = {re.sub(r"^.*\.\d+\.", "*.", name) for name in self.files}
        for rule in self.recipe.rules:
            if rule.shipped or any(fnmatchcase(n, rule.match) for n in self.files):
                continue
            if said := self._one_expert(rule.match):
                self.problems.append(said)
            elif not rule.optional:
                known = ends if rule.match.startswith("*") else self.files
                self.problems.append(f"{rule.match}: this rule matches no tensor{nearest(rule.match, known)}")

    def _one_expert(self, glob: str) -> str | None:
        """Why a rule for some experts of a layer cannot be followed; None if it does not name experts."""
        stars = ((n, self.files.spec(n).shape[0]) for n in self.files if experts.starred(n))
        found = (n for n, count in stars if any(fnmatchcase(e, glob) for e in experts.expand(n, count)))
        leaf = next(found, None)
        return leaf and (
            f"{glob}: names some experts of a layer, and servers run all of them alike; name all of them, "
            f"{leaf}, with the star for their numbers"
        )


def _apart(name: str, shape: tuple[int, ...]) -> tuple[int, tuple[int, ...]]:
    """How many tensors of the source a name stands for, and the shape of one."""
    return (shape[0], shape[1:]) if experts.starred(name) else (1, shape)


def data_free() -> list[str]:
    """The shipped recipes that need no text."""
    return [row["name"] for row in menu_rows() if not row.get("needs_data", True)]
