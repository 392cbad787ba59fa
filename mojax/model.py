"""A Model is a config, a flat dictionary of parameters, and the pure functions of its family."""

from __future__ import annotations

import dataclasses
import functools
import re
from collections.abc import Callable, Collection, Iterator, Mapping
from pathlib import Path
from types import ModuleType
from typing import Any, Literal

import jax
import jax.numpy as jnp
import numpy as np

from mojax import beside, checkpoint, experts, find, trace
from mojax.cache import Cache
from mojax.compile import jit
from mojax.errors import InputError, PlanError, nearest
from mojax.formats.base import Format, QTensor, Scheme
from mojax.header import Entry
from mojax.kernels.base import decoded
from mojax.models.layers import Block
from mojax.program import INPUT, Program, embed, head, run_block
from mojax.reads import reads

MATRIX = "_input.weight"  # ends the name of the matrix of a rotation, `<module>.<rotation>_input.weight`


def turns(name: str, modules: Collection[str]) -> bool:
    """Whether a tensor of a file is the matrix that rotates the input of one of `modules`."""
    return name.endswith(MATRIX) and name.rpartition(".")[0].rpartition(".")[0] in modules


class Lazy(Mapping[str, Any]):
    """A mapping whose values are made when asked for and not kept, so that a model never sits in memory."""

    def __init__(self, make: Mapping[str, Callable[[], Any]]):
        self._make = dict(make)

    def __getitem__(self, name: str) -> Any:
        return self._make[name]()

    def __iter__(self) -> Iterator[str]:
        return iter(self._make)

    def __len__(self) -> int:
        return len(self._make)


class Decoded(Lazy):
    """The parameters of a model whose weights are decoded."""


@dataclasses.dataclass(frozen=True)
class Model:
    """A language model as data and pure functions.

    Attributes:
      config: config.json.
      params: tensors by checkpoint name, Hugging Face `[out, in]` layout, experts of a layer as one leaf
        (`mojax.experts`); encoded weights are `QTensor`, and `<module>.input_scale` is the float32 maximum of
        a statically quantized input. A branch beside a weight is two more leaves (`mojax.beside`).
      family: the module `mojax.models.<model_type>`; None when only the tensors are known (`generic`).
      checkpoint: the files it was read from, if any.
      schemes: how each encoded linear runs, by module name; empty for a model in full precision.
      cache: how the key/value cache is kept; None: as it is.
    """

    config: Mapping[str, Any]
    params: Mapping[str, Any]
    family: ModuleType | None
    checkpoint: checkpoint.Checkpoint | None = None
    schemes: Mapping[str, Scheme] = dataclasses.field(default_factory=dict)
    cache: Cache | None = None

    @functools.cached_property
    def hyper(self) -> Any:
        """The family's view of the config; hashable."""
        return self._family.configure(dict(self.config))

    @functools.cached_property
    def shapes(self) -> dict[str, tuple[int, ...]]:
        """What config.json implies of `params`; empty without a family."""
        return dict(self.family.shapes(self.hyper)) if self.family is not None else {}

    @functools.cached_property
    def tensors(self) -> checkpoint.Checkpoint | experts.Stacked:
        """The tensors of the files by the names of `params`."""
        assert self.checkpoint is not None
        return experts.stacked(self.checkpoint, self.shapes)

    @functools.cached_property
    def blocks(self) -> tuple[Block, ...]:
        """The layers in order; without a family, what has a number in its name (weights pass in pieces)."""
        if self.family is not None:
            return self.family.blocks(self.hyper)
        found = {m[1]: int(m[2]) for name in self.params if (m := re.match(r"(.*?\.(\d+)\.)", name))}
        return tuple(
            Block(prefix, "") for prefix in sorted(found, key=lambda p: (p.split(".")[:-2], found[p]))
        )

    @property
    def _family(self) -> ModuleType:
        if self.family is None:
            raise InputError(
                f"model_type {self.config.get('model_type')!r} has no forward function here "
                "(it was loaded with generic); only its tensors are known"
            )
        return self.family

    @functools.cached_property
    def dtype(self) -> np.dtype:
        """The dtype of decoded weights and activations, from the tensors: config files are often wrong."""
        found = [e for e in self.checkpoint.entries.values() if wide(e)] if self.checkpoint else []
        if found:
            return max(found, key=lambda e: e.stop - e.start).dtype
        said = self.config.get("dtype") or self.config.get("torch_dtype") or "bfloat16"
        name = str(said).removeprefix("torch.")
        if name not in ("bfloat16", "float16", "float32"):
            raise InputError(f"config.json: dtype is {name!r}, needed bfloat16, float16 or float32")
        return jnp.dtype(name)

    def local(self, block: Block) -> dict[str, Any]:
        """The parameters of one block, by names without the block's prefix."""
        n = len(block.prefix)
        return {name[n:]: self.params[name] for name in self.params if name.startswith(block.prefix)}

    def outside(self, part: Literal["embed", "head"]) -> dict[str, jax.Array]:
        """The parameters that the family's `embed` or `head` reads, on the device."""
        return jax.device_put({n: self.params[n] for n in reads(self._family, self.hyper, part)})

    def head_program(self) -> Program:
        """The static part of `head`."""
        inputs = [
            (m, s.inputs)
            for m, s in self.schemes.items()
            if m + ".weight" in self._outside_names and s.inputs
        ]
        turned = ((m, s.hadamard) for m, s in self.schemes.items() if s.hadamard)
        own = tuple((m, block) for m, block in turned if m + ".weight" in self._outside_names)
        return Program(self._family, self.hyper, "head", tuple(inputs), rotated=own)

    def prefix(self, name: str) -> str:
        """The prefix of the block that a tensor or module lies in, "" outside the blocks."""
        dots = (i + 1 for i, letter in enumerate(name) if letter == ".")
        return next((name[:i] for i in dots if name[:i] in self._prefixes), "")

    @functools.cached_property
    def _prefixes(self) -> frozenset[str]:
        return frozenset(block.prefix for block in self.blocks)

    @functools.cached_property
    def _outside_names(self) -> frozenset[str]:
        inside = tuple(b.prefix for b in self.blocks)
        return frozenset(n for n in self.shapes if not n.startswith(inside))

    def program(self, block: Block) -> Program:
        """The static part of `run_block` for this block."""
        n = len(block.prefix)
        mine = sorted((m[n:], s) for m, s in self.schemes.items() if m.startswith(block.prefix))
        inputs: list[tuple[str, Format]] = [(m, s.inputs) for m, s in mine if s.inputs is not None]
        turned = tuple((m, s.hadamard) for m, s in mine if s.hadamard)
        cache = self.cache and self.cache.layer(self.blocks.index(block), len(self.blocks))
        return Program(self._family, self.hyper, block.kind, tuple(inputs), cache, turned)

    def sites(self, block: Block) -> tuple[trace.Site, ...]:
        """Where weights meet activations in this block, from its trace; names without the block's prefix."""
        return block_sites(self._family, self.hyper, block, self.dtype) if self.family else ()

    def apply(self, params: Mapping[str, Any], tokens: Any) -> jax.Array:
        """Logits, float32 `[batch, length, vocabulary]`, of `tokens`, int32 `[batch, length]`.

        Encoded weights run packed, with inputs rounded as their schemes say.
        """
        model = dataclasses.replace(self, params=params)
        x = embed(self._family, self.hyper, model.outside("embed"), tokens)
        for block in self.blocks:
            x = run_block(model.program(block), model.local(block), x)
        return head(self.head_program(), model.outside("head"), x)

    def __call__(self, tokens: Any) -> jax.Array:
        return self.apply(self.params, tokens)


def dequantized(model: Model) -> Model:
    """The model with decoded weights, each decoded when it is used; see `mojax.dequantize`."""

    def read(name: str) -> Any:
        leaf = model.params[name]
        return decode(leaf) if isinstance(leaf, QTensor) else leaf

    return dataclasses.replace(model, params=Decoded({n: functools.partial(read, n) for n in model.params}))


@jit()
def decode(q: QTensor) -> jax.Array:
    """`decoded`, one expert at a time: float32 of a whole stack would be twice the layer."""

    def whole(q: QTensor) -> jax.Array:
        if not q.batch:
            return decoded(q)
        stack = jax.lax.map(lambda i: whole(q.row(i)), jnp.arange(q.shape[q.batch[0]]))
        return jnp.moveaxis(stack, 0, q.batch[0])

    return whole(q)


def wide(entry: Entry) -> bool:
    """Whether a tensor of a file is a weight in full precision."""
    return (
        entry.name.endswith(".weight")
        and entry.dtype.itemsize >= 2
        and jnp.issubdtype(entry.dtype, jnp.floating)
    )


@functools.lru_cache
def _kind_sites(
    family: ModuleType, config: Any, kind: str, local: tuple[tuple[str, tuple[int, ...]], ...], dtype: str
):
    params = {name: jax.ShapeDtypeStruct(shape, jnp.dtype(dtype)) for name, shape in local}
    whole = {n: jax.ShapeDtypeStruct(s, jnp.dtype(dtype)) for n, s in family.shapes(config).items()}
    x = jax.eval_shape(
        functools.partial(family.embed, config), whole, jax.ShapeDtypeStruct((1, 8), jnp.int32)
    )
    block = functools.partial(family.block, config, kind)
    return trace.sites(block, params, x, jax.ShapeDtypeStruct((8,), jnp.int32))


def block_sites(family: ModuleType, config: Any, block: Block, dtype: np.dtype) -> tuple[trace.Site, ...]:
    """Sites of a block; layers of one kind are traced once."""
    n = len(block.prefix)
    shapes = family.shapes(config)
    local = tuple((name[n:], shape) for name, shape in shapes.items() if name.startswith(block.prefix))
    return _kind_sites(family, config, block.kind, local, dtype.name)


def load(
    source: str | Path, *, revision: str | None = None, generic: bool = False, headers_only: bool = False
) -> Model:
    """Open a checkpoint: headers only, no weight is read until it is used.

    Args:
      source: a folder, a hub id, or "tiny", the built-in model. Our own output and the peers' dialects too.
      revision: of a hub id.
      generic: accept a model_type without a family; then only data-free transforms of its tensors work.
      headers_only: do not fetch the weights of a hub id.
    Raises:
      InputError: no such source, an unknown model_type, a broken file.
      PlanError: tensors that are missing or contradict config.json, all of them.
    """
    files = checkpoint.locate(source, revision=revision, headers_only=headers_only)
    config = files.config
    kind = str(config.get("model_type", ""))
    family = None
    if kind.replace("-", "_") in find.names("models"):
        family = find.find("models", kind)
    elif not generic:
        raise InputError(
            f"{source}: model_type {kind!r} has no family "
            f"here{nearest(kind, find.names('models'))}; data-free "
            "recipes can quantize its two-dimensional weights all the same: add --generic"
        )
    from mojax.converters import base as dialects  # reading a quantized checkpoint needs a converter

    dialect = dialects.dialect(config, file_names(files))
    model = Model(config, files, family, files)
    if dialect is None:
        check_shapes(model)
        return dataclasses.replace(model, params=model.tensors)
    if hasattr(dialect, "parted"):
        files = dialect.parted(files, linears(model, files))
    if hasattr(dialect, "joined"):
        files = dialect.joined(files)
    return _encoded(Model(config, files, family, files), dialect)


def file_names(files: checkpoint.Checkpoint) -> list[str]:
    """The names of the checkpoint's own files, as far as they are on this machine."""
    return [p.name for p in files.folder.iterdir()] if files.folder.is_dir() else []


def check_shapes(model: Model) -> None:
    """Raises PlanError where the tensors of the files are not those that config.json implies."""
    assert model.checkpoint is not None
    files = model.checkpoint
    problems = []
    for name, shape in model.shapes.items():
        if experts.starred(name):
            continue
        if name not in files:
            problems.append(f"{name}: config.json implies this tensor {list(shape)}, the files lack it")
        elif (found := tuple(files.spec(name).shape)) != tuple(shape):
            problems.append(
                f"{name}: the file holds {list(found)}, config.json implies {list(shape)}; "
                "one of the two belongs to another model"
            )
    problems += experts.problems(files, model.shapes)
    if problems:
        raise PlanError(problems)


def linears(model: Model, names: Mapping[str, Any]) -> list[str]:
    """The modules that may be encoded: weights `[out, in]` of the blocks, experts too, and an untied head."""
    if model.family is None:
        axes = {".weight": 2, ".weight_packed": 2, ".weight_blocks": 3}
        ends = ((n, *n.rpartition(".")) for n in names if "embed" not in n)
        found = {m for n, m, dot, end in ends if axes.get(dot + end) == len(_shape(names, n))}
        return sorted(m for m in found if not turns(m + ".weight", found))
    inside = tuple(b.prefix for b in model.blocks)
    return [
        n.removesuffix(".weight")
        for n, shape in model.shapes.items()
        if n.endswith(".weight")
        and len(shape) == 2 + experts.starred(n)
        and (n.startswith(inside) or n == "lm_head.weight")
    ]


def _shape(names: Mapping[str, Any], name: str) -> tuple[int, ...]:
    return names.spec(name).shape if isinstance(names, checkpoint.Checkpoint) else names[name].shape


def _encoded(model: Model, dialect: ModuleType) -> Model:
    files = model.checkpoint
    assert files is not None
    adapter = getattr(dialect, "ADAPTER", None)
    modules = [m for m in linears(model, files) if not (adapter and m.startswith(adapter.PREFIX))]
    count = {m: model.shapes[m + ".weight"][0] if experts.starred(m) else 1 for m in modules}
    if problems := experts.modules_missing(files, {m: (count[m],) for m in modules if experts.starred(m)}):
        raise PlanError(problems)
    said = dialect.parse(
        dict(model.config), extra(files.folder), [n for m in modules for n in experts.expand(m, count[m])]
    )
    each = {m: experts.one_scheme(m, count[m], said.schemes) for m in modules}
    schemes = {m: branched(dialect, m, scheme, files) for m, scheme in each.items() if scheme is not None}
    encoded = experts.spread(schemes, model.shapes)
    low_rank = branches(dialect, schemes)
    leaves: dict[str, Callable[[], Any]] = {
        n: functools.partial(model.tensors.__getitem__, n)
        for n in model.tensors
        if not turns(n, encoded) and n not in low_rank
    }
    for module, scheme in schemes.items():
        for name in experts.expand(module, count[module]):
            for suffix in dialect.SUFFIXES:
                leaves.pop(name + suffix, None)

        def one(name: str, s: Scheme = scheme) -> tuple[QTensor, np.float32 | None]:
            return dialect.read(name, files.__getitem__, s, model.dtype)

        if scheme.rank:
            for leaf, name in zip(beside.leaves(module), dialect.branch(module), strict=True):
                leaves[leaf] = functools.partial(files.__getitem__, name)
        leaves[module + ".weight"] = functools.partial(experts.read, module, count[module], one)
        if scheme.inputs is not None and scheme.inputs.static:
            leaves[module + INPUT] = functools.partial(experts.maximum, module, count[module], one)
    if said.cache is not None:
        key = dialect.cache_names("")[0]
        for attention in [n.removesuffix(key) for n in files if n.endswith(key)]:
            names = dialect.cache_names(attention)
            for i, kv in enumerate("kv"):
                leaves.pop(names[i], None)
                leaves[f"{attention}.{kv}_cache{INPUT}"] = lambda a=attention, i=i: dialect.read_cache(
                    a, files.__getitem__
                )[i]
    return dataclasses.replace(model, params=Lazy(leaves), schemes=schemes, cache=said.cache)


def branched(dialect: ModuleType, module: str, scheme: Scheme, files: checkpoint.Checkpoint) -> Scheme:
    """The scheme with the rank of the branch that the files hold beside a module."""
    if not hasattr(dialect, "branch") or (name := dialect.branch(module)[0]) not in files:
        return scheme
    return scheme._replace(rank=files.spec(name).shape[0])


def branches(dialect: ModuleType, schemes: Mapping[str, Scheme]) -> frozenset[str]:
    """The names, in the files, of the tensors of all branches."""
    return frozenset(n for m, scheme in schemes.items() if scheme.rank for n in dialect.branch(m))


def extra(folder: Path) -> dict[str, Any] | None:
    """hf_quant_config.json, where a checkpoint has one."""
    path = folder / "hf_quant_config.json"
    return checkpoint.read_json(path) if path.exists() else None
