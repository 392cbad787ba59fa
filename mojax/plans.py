"""What a plan is: one row per tensor of the source, and the steps that change them."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Iterable, Mapping
from types import ModuleType
from typing import Any

import numpy as np

from mojax import experts, trace
from mojax.cache import Cache
from mojax.calibration import SEQUENTIAL
from mojax.formats.base import Scheme
from mojax.models.layers import Block
from mojax.recipe import Recipe, choose
from mojax.transforms.base import Context, Transform, chain, placed

READS = ("dot", "ragged_dot")  # operations that read a linear's weight


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


def through_cache(sites: Iterable[trace.Site], cache: Cache | None) -> frozenset[str]:
    """What must not absorb scales of the output of attention: values whose cache has calibrated scales."""
    if cache is None or not cache.calibrated:
        return frozenset()
    return frozenset(s.producer for s in sites if s.channels and s.producer is not None)


@dataclasses.dataclass(frozen=True)
class Plan:
    """A recipe resolved for one model, one dialect and one target."""

    rows: tuple[Row, ...]
    recipe: Recipe
    dialect: ModuleType
    target: str
    steps: tuple[Transform, ...]
    sites: Mapping[str, tuple[trace.Site, ...]]  # by kind of block, names without the block's prefix
    cache: Cache | None
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
    def migration(self) -> Transform:
        """The steps that leave the function of a block as it is, as one."""
        return chain(*(t for t in self.steps if t.phase == "block"))

    @property
    def learns(self) -> bool:
        """Whether a migration learns from the block's output."""
        return any(t.learn is not None for t in self.steps)

    @functools.cached_property
    def encoding(self) -> Transform:
        """The steps that choose scales and codes, as one."""
        return chain(*(t for t in self.steps if t.phase in ("encode", "tune")))

    @property
    def tuning(self) -> tuple[Transform, ...]:
        """The steps that tune a whole block once it is encoded."""
        return tuple(t for t in self.steps if t.tune is not None)

    @functools.cached_property
    def watched(self) -> tuple[str, ...]:
        """The statistics of a block's inputs before any step: for migrations and static input scales."""
        static = any(s.inputs is not None and s.inputs.static for s in self.schemes.values())
        static = static or (self.cache is not None and self.cache.calibrated)
        needs = [*self.migration.needs, *(["absmax"] if static else [])]
        counted = (needs or self.encoding.needs) and any(experts.starred(m) for m in self.schemes)
        return tuple(dict.fromkeys([*needs, *(["count"] if counted else [])]))  # which experts saw tokens

    @property
    def needs(self) -> tuple[str, ...]:
        """Every statistic that must be calibrated, and "activations" where steps learn from those of a block;
        none means that no data is needed."""
        tuned = ["activations"] if self.tuning or self.learns else []
        learned = (need for t in self.steps if t.phase == "model" for need in t.needs)
        return tuple(dict.fromkeys([*learned, *self.watched, *self.encoding.needs, *tuned]))

    @property
    def sequential(self) -> bool:
        """Whether steps look at inputs as what was encoded before makes them."""
        gradients = self.recipe.calibration.gradients
        later = (need in SEQUENTIAL and not (need == "gram" and gradients) for need in self.encoding.needs)
        return bool(self.tuning) or any(later)

    @property
    def sourced(self) -> bool:
        """Whether anything looks at activations of the source while blocks are encoded."""
        seen = ("gram", "seen_gram", "count")
        gradients = "gram" in self.encoding.needs and self.recipe.calibration.gradients
        needs = self.watched or [need for need in self.encoding.needs if need not in seen]
        return bool(needs or self.tuning or self.learns or gradients) or not self.sequential

    def stages(self, block: Block | None) -> tuple[tuple[str, ...], ...]:
        """The weights to encode, as groups that the encoding steps are called with, one after the other.

        Weights that read the same input or share an outer scale go together, in the order of the program;
        all of a block at once where no step needs data.
        """
        context = self.context(block)
        names = [module + ".weight" for module in context.schemes]
        if not self.encoding.needs:
            return (tuple(names),) if names else ()
        first: dict[Any, str] = {}
        group = {s.weight: first.setdefault(s.group, s.weight) for s in context.sites if s.op in READS}
        for together in context.shared:
            joined = {group.get(n, n) for n in together}
            group |= {n: group.get(together[0], together[0]) for n in names if group.get(n, n) in joined}
        order = [s.weight for s in context.sites]
        found: dict[str, list[str]] = {}
        for n in sorted(names, key=lambda n: order.index(n) if n in order else -1):
            found.setdefault(group.get(n, n), []).append(n)
        return tuple(tuple(g) for g in found.values())

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
            frozenset(r.name for r in mine if choose(self.recipe, r.name).weights == "keep")
            | through_cache(sites, self.cache),
        )

    def observed(self, block: Block) -> dict[str, str]:
        """What calibration must watch: weight or cache name -> the first name that has the same input."""
        first: dict[int, str] = {}
        context = self.context(block)
        calibrated = self.cache is not None and self.cache.calibrated
        out = {}
        for s in context.sites:
            wanted = s.weight.removesuffix(".weight") in context.schemes
            if (s.op in READS and wanted) or (s.op == "cache" and calibrated):
                out[s.weight] = first.setdefault(s.group, s.weight)
        return out
