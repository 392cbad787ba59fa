"""The plan: one row per tensor of the source, and every problem that headers can show."""

from __future__ import annotations

import dataclasses
import functools
import re
from collections.abc import Sequence
from fnmatch import fnmatchcase
from types import ModuleType

import jax
import jax.numpy as jnp
import numpy as np

from mojax import experts, find, flat, fusing, trace
from mojax.attention import rotatable
from mojax.cache import Cache, of_rule
from mojax.checkpoint import Decoded
from mojax.errors import InputError, PlanError, nearest
from mojax.formats.base import Scheme
from mojax.kernels.hadamard_matrices import factors
from mojax.model import Model
from mojax.plans import READS, Plan, Row
from mojax.recipe import Recipe, choose, load_recipe, menu_rows
from mojax.resolve import decide, made_steps
from mojax.rewrite import SAVED, outlined, reasons
from mojax.sources import as_source
from mojax.transforms.base import Transform

TARGETS = ("vllm", "sglang", "trtllm", "transformers")
HERE = "mojax"  # a target that is this process: nothing is refused for the sake of a file or a server
SMOOTHED = "absorbs smoothing scales"  # the reason of a row that a step rewrites
ROUTERS = ("*.gate.weight", "*router*")  # kept where no family says what to keep
OUTPUTS = ("report.json", "mojax.json", "hf_quant_config.json", SAVED)


def plan(
    model: Model, recipe: str | Recipe, *, format: str = "compressed-tensors", target: str = "vllm"
) -> Plan:
    """Resolve a recipe for a model. Reads no weight. A quantized source is planned as what it decodes to.

    Args:
      model: from `mojax.load`.
      recipe: a name (`mojax recipes`), a file, or a Recipe.
      format: the checkpoint dialect, a file of `converters/` that can write.
      target: who must be able to load it: vllm, sglang, trtllm or transformers. Or "mojax": this process
        alone, for `mojax.apply`, `evaluate` and `run`; such a plan cannot be written.
    Raises:
      InputError: an unknown name; a model whose weights were quantized in memory.
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
    if target not in (*TARGETS, HERE):
        raise InputError(f"--target={target}: unknown target{nearest(target, TARGETS)}")
    source = as_source(model)
    if source.cache is not None:
        raise InputError(
            f"the source's key/value cache is quantized already ({source.cache.label}); start from the "
            "checkpoint that it was made from"
        )
    return _Planner(source, recipe, dialect, target).plan()


class _Planner:
    """The steps of `plan`, sharing what they found."""

    def __init__(self, source: Model, recipe: Recipe, dialect: ModuleType, target: str):
        self.steps = made_steps(recipe)
        model = outlined(
            source, self.steps
        )  # what is to be encoded: the source as whole-model steps leave it
        self.model, self.recipe, self.dialect, self.target = model, recipe, dialect, target
        self.source, self.turned = source, reasons(source, recipe, self.steps)
        assert model.checkpoint is not None
        self.files = model.tensors
        self.folder = model.checkpoint.folder
        self.problems: list[str] = []
        self.keep: tuple[str, ...] = getattr(model.family, "KEEP", ()) if model.family else ROUTERS
        self.sites, self.roles = self._trace()
        prefixes = [(b.prefix, s) for b in model.blocks for s in self.sites.get(b.kind, ())]
        self.routers = frozenset(prefix + s.weight for prefix, s in prefixes if s.router)

    def plan(self) -> Plan:
        steps = self.steps
        rows = [self._row(name) for name in self.files]
        shared = fusing.share(rows, self.model, self.recipe, self.target, self.problems.append)
        rows = [dataclasses.replace(r, shared=shared.get(r.name, "")) for r in rows]
        cache = self._cache()
        self._unmatched()
        self._data(rows, steps, cache)
        if cache is not None:
            self._loads(cache, any(r.scheme for r in rows))
        elif not any(r.scheme for r in rows) and not self.problems:
            self.problems.append(
                "nothing would be quantized: every tensor is kept; see `mojax plan` without --keep"
            )
        for name in OUTPUTS:
            if (self.folder / name).exists() and not isinstance(self.model.checkpoint, Decoded):
                self.problems.append(
                    f"{name}: the source has a file of this name, which the output writes; remove it"
                )
        count = sum(int(np.prod(r.shape)) for r in rows if r.name in self.source.tensors)
        made = Plan(tuple(rows), self.recipe, self.dialect, self.target, steps, self.sites, cache, count)
        if not self.problems:
            self._config(made)
        if self.problems:
            raise PlanError(list(dict.fromkeys(self.problems)))
        return self._rewritten(made)

    def _config(self, made: Plan) -> None:
        """What the dialect cannot say in one config, before hours of work."""
        if self.target == HERE:
            return
        try:
            self.dialect.config(made.modules, (), made.cache)
        except InputError as error:
            self.problems.append(str(error))

    def _rewritten(self, made: Plan) -> Plan:
        """The plan with a note on the tensors that are not encoded and change all the same."""
        names = {n for block in self.model.blocks for n in made.migration.rewrites(made.context(block))}
        noted = {r.name: self.turned[r.name] for r in made.rows if r.scheme is None and r.name in self.turned}
        noted |= {n: f"{noted[n]}, {SMOOTHED}" if n in noted else SMOOTHED for n in names}
        rows = (dataclasses.replace(r, reason=noted.get(r.name, r.reason)) for r in made.rows)
        return dataclasses.replace(made, rows=tuple(rows))

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
        size = int(np.prod(shape)) * np.dtype(dtype).itemsize
        before = size if name in self.source.tensors else 0
        prefix = next((b.prefix for b in self.model.blocks if name.startswith(b.prefix)), "")
        scheme, reason = self._scheme(name, role)
        after = size
        if scheme is not None:
            trouble = self._trouble(name, np.dtype(dtype), tuple(shape), scheme)
            if trouble:
                self.problems.append(trouble)
            else:
                count, matrix = _apart(name, shape)
                parts = self.dialect.layout(name.removesuffix(".weight"), matrix, dtype, scheme).values()
                after = count * sum(int(np.prod(p.shape)) * np.dtype(p.dtype).itemsize for p in parts)
                after += flat.nbytes(matrix[-1]) if scheme.flat else 0
        return Row(name, role, tuple(shape), np.dtype(dtype), prefix, scheme, "", before, after, reason)

    def _trouble(self, name: str, dtype: np.dtype, shape: tuple[int, ...], scheme: Scheme) -> str | None:
        """Why this tensor cannot be encoded, written or loaded so, or None."""
        here = self.target == HERE
        if scheme.flat and (said := self._flat(name, scheme, shape[-1])):
            return said
        if not here and (said := self.dialect.check(scheme, self.target, dtype, experts.starred(name))):
            return said
        _, matrix = _apart(name, shape)
        if scheme.hadamard and (said := self._rotation(name, scheme.hadamard, matrix[-1])):
            return said
        if scheme.rank >= min(matrix):
            return (
                f"{name}: is {list(matrix)}, and a branch of rank {scheme.rank} would be the whole of it; "
                f"use a smaller rank, or add --keep={name}"
            )
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

    def _flat(self, name: str, scheme: Scheme, width: int) -> str | None:
        """Why learned matrices cannot turn the inputs of a linear, of `width` channels, or None."""
        step = next(s.name for s in self.steps if s.flattens)
        if self.target != HERE:
            return (
                f"steps: {step} multiplies inputs by matrices that {self.target} does not know of; leave it "
                f"out, or evaluate it in Python alone: mojax.plan(..., target={HERE!r}), mojax.apply"
            )
        if scheme.hadamard:
            return f"{name}: {step} and hadamard: {scheme.hadamard} both turn its input; leave out one"
        if max(flat.sides(width)) > flat.LARGEST:
            return (
                f"{name}: has {width} input channels, which is no product of two numbers up to "
                f"{flat.LARGEST} that {step} could use; add --keep={name}"
            )
        return None

    def _rotation(self, name: str, block: int, width: int) -> str | None:
        """Why the inputs of a linear, of `width` channels, cannot be rotated by Hadamard blocks, or None."""
        if width % block or factors(block) is None:
            found = f"{name}: has {width} input channels, which Hadamard blocks of {block} do not divide"
            if not width % block:
                found = f"{name}: no Hadamard matrix of order {block} is known here"
            return f"{found}; use hadamard: {width & -width} or a smaller power of two, or none"
        if self.target == "vllm" and name == "lm_head.weight":
            return f"{name}: vllm does not rotate the input of the head; give it hadamard: none"
        if self.target == "vllm" and name.removesuffix("weight") + "bias" in self.files:
            return f"{name}: has a bias, and vllm runs rotated linears without; give it hadamard: none"
        return None

    def _scheme(self, name: str, role: str) -> tuple[Scheme | None, str]:
        """The formats of a tensor, or why it is kept; trouble becomes a problem."""
        try:
            keep = (*self.keep, name) if name in self.routers else self.keep
            scheme, reason = decide(self.recipe, name, role, keep, self.dialect.ARITHMETIC)
        except InputError as error:
            self.problems.append(str(error))
            return None, "unresolved"
        if scheme is not None and role == "linear" and not experts.starred(name):
            flattens = any(step.flattens for step in self.steps)
            scheme = scheme._replace(rank=max(step.rank for step in self.steps), flat=flattens)
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

    def _cache(self) -> Cache | None:
        """How the key/value cache is kept, and what attention multiplies: the same for all layers."""
        blocks = [block.prefix for block in self.model.blocks] or [""]
        rules = {p: choose(self.recipe, f"{p}self_attn.k_proj.weight") for p in blocks}
        asked = {p: (rule.kv_cache or "none", rule.attention or "none") for p, rule in rules.items()}
        first = asked[blocks[0]]
        if odd := next((p for p, said in asked.items() if said != first), None):
            self.problems.append(
                f"kv_cache: {odd}self_attn would have another than {blocks[0]}self_attn; servers have one "
                "format for the cache of all layers, so give the rule match: '*' (skip_first and skip_last "
                "leave out layers at the ends)"
            )
            return None
        try:
            cache = of_rule(*first, self.dialect.ARITHMETIC)
        except InputError as error:
            self.problems.append(str(error))
            return None
        if cache is not None and self.model.family is not None:
            c = self.model.hyper
            shape = len(blocks), c.num_key_value_heads, c.head_dim, rotatable(c.head_dim)
            self.problems += [said] if (said := cache.check(*shape)) else []
        return cache

    def _loads(self, cache: Cache, encodes: bool) -> None:
        """Whether the target can load the cache."""
        if self.target != HERE and (said := self.dialect.check_cache(cache, self.target, encodes)):
            self.problems.append(f"{said}; target {HERE!r} evaluates it in this process, without a file")

    def _data(self, rows: list[Row], steps: Sequence[Transform], cache: Cache | None) -> None:
        static = any(r.scheme and r.scheme.inputs and r.scheme.inputs.static for r in rows)
        needs = static or cache or any(s.needs or s.tune or s.learn for s in steps)
        if self.model.family is None and needs:
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
