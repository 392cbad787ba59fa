"""What a transform is: a pure function from the parameters of a block to new ones, and `chain`."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from typing import Any, NamedTuple

from mojax.formats.base import Scheme
from mojax.trace import Site

Params = Mapping[str, Any]


class Context(NamedTuple):
    """What a transform may look at. Names are checkpoint names.

    Attributes:
      sites: the places of this block where a weight meets an activation.
      schemes: by module, how each linear that must be encoded will run.
      shared: weights that a server fuses and that must share their outer scale, as tuples of names.
      kept: tensors that a rule of the recipe keeps; nothing may be folded into them.
    """

    sites: tuple[Site, ...]
    schemes: Mapping[str, Scheme]
    shared: tuple[tuple[str, ...], ...] = ()
    kept: frozenset[str] = frozenset()


Apply = Callable[[Params, Mapping[str, Mapping[str, Any]], Context], Params]


class Transform(NamedTuple):
    """One step of a recipe.

    Attributes:
      apply: `(params, stats, context) -> params`, one block per call; returns only the leaves it changes
        or adds. `stats[weight][statistic]` is what calibration saw of that weight's input.
      needs: the statistics it reads (`mojax.calibration.STATISTICS`); none means no data is needed.
      rewrites: which leaves that are not encoded it changes (norm gains that absorb a scale).
      encodes: whether its leaves are `QTensor`s; the last step of a recipe does, and no other.
    """

    apply: Apply
    needs: tuple[str, ...] = ()
    rewrites: Callable[[Context], frozenset[str]] = lambda context: frozenset()
    encodes: bool = False


def placed(sites: Iterable[Site], prefix: str) -> tuple[Site, ...]:
    """The sites of a block under their checkpoint names."""
    return tuple(
        s._replace(
            weight=prefix + s.weight,
            producer=s.producer and prefix + s.producer,
            also=tuple(prefix + name for name in s.also),
        )
        for s in sites
    )


def chain(*transforms: Transform) -> Transform:
    """The transforms one after another, as one."""

    def apply(params: Params, stats: Mapping[str, Mapping[str, Any]], context: Context) -> Params:
        changed: dict[str, Any] = {}
        for t in transforms:
            changed |= t.apply({**params, **changed}, stats, context)
        return changed

    return Transform(
        apply,
        tuple(dict.fromkeys(need for t in transforms for need in t.needs)),
        lambda context: frozenset().union(*(t.rewrites(context) for t in transforms)),
        any(t.encodes for t in transforms),
    )
