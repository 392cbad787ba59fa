"""Static scales of inputs: what a step that chooses them sees of an input, and the leaves that it makes.

Weights that read the same input have the same scale; so do the experts of a layer, which a checkpoint keeps
in one leaf. The layers of a scanned stack have scales of their own.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import numpy as np

from mojax.errors import InputError
from mojax.formats.base import Format
from mojax.matrices import entry, leaves
from mojax.transforms.base import Context, Outcome, Params, Stats

LEAF = ".input_scale"
_OCTAVE, _LOWEST = 64, -40  # of a histogram: bins per octave, log2 of its lowest edge (mojax.calibration)


class Part(NamedTuple):
    """Matrices `[out, in]` that read the same rows, and the statistics of these."""

    weights: tuple[Any, ...]
    stats: Mapping[str, Any]


class Seen(NamedTuple):
    """An input that needs one static scale.

    Attributes:
      name: of the first weight that reads it.
      format: of the input; dtype: of the model.
      top: the largest magnitude that the scale is for so far.
      parts: one; of experts one for each.
    """

    name: str
    format: Format
    dtype: np.dtype
    top: float
    parts: tuple[Part, ...]

    @property
    def tokens(self) -> int:
        return sum(int(part.stats.get("count", 0)) for part in self.parts)

    def total(self, statistic: str) -> np.ndarray:
        """A sum over tokens, over all parts."""
        return np.sum([np.asarray(part.stats[statistic]) for part in self.parts], axis=0)


class Chosen(NamedTuple):
    """The magnitude that a scale shall be for, and the step's objective before and after."""

    top: float
    before: float = 0.0
    after: float = 0.0
    note: str = ""


def edges(bins: int) -> np.ndarray:
    """The edges of the statistic "histogram", float64 `[bins + 1]`; its first bin holds zeros too."""
    return 2.0 ** (np.arange(bins + 1) / _OCTAVE + _LOWEST)


def choose(
    step: str, params: Params, stats: Stats, context: Context, solve: Callable[[Seen], Chosen]
) -> dict[str, np.ndarray]:
    """The leaves `<module>.input_scale`, float32, of all weights whose inputs have static scales.

    Args:
      step: its name, for outcomes.
      solve: what the step does; not called for an input of which no token was seen.
    Raises:
      InputError: calibration has not seen such an input.
    """
    static = {
        module + ".weight": scheme.inputs
        for module, scheme in context.schemes.items()
        if scheme.inputs is not None and scheme.inputs.static
    }
    found = leaves({**params, **context.targets}, context.only(static))
    numbers = {site.weight: site.group for site in context.sites}
    together: dict[Any, list[str]] = {}
    for name, format in static.items():
        if "absmax" not in stats.get(name, ()):
            raise InputError(
                f"{name}: {step} needs statistics of its inputs, but calibration has not seen them"
            )
        together.setdefault((numbers.get(name, name), format), []).append(name)
    changed: dict[str, np.ndarray] = {}
    for (_, format), names in together.items():
        first = found[names[0]]
        now = params.get(names[0].removesuffix(".weight") + LEAF)
        parts = []
        for i in range(len(first.matrices)):
            seen = {k: entry(v, first, i) for k, v in stats[names[0]].items()}
            parts.append(Part(tuple(found[n].matrices[i] for n in names), seen))
        experts = "*" in names[0]
        tops = []
        for i, own in enumerate([tuple(parts)] if experts else [(part,) for part in parts]):
            top = max(float(np.max(p.stats["absmax"])) for p in own)
            if now is not None:
                top = float(np.asarray(now).reshape(-1)[i if np.size(now) > 1 else 0])
            x = Seen(names[0], format, np.dtype(first.matrices[0].dtype), top, own)
            chosen = solve(x) if x.tokens else Chosen(top, note="no calibration token reached it")
            context.log(Outcome(step, names[0], chosen.before, chosen.after, chosen.note))
            tops.append(np.float32(chosen.top))
        sizes = () if experts else tuple(first.shape[a] for a in first.batch)
        changed |= {n.removesuffix(".weight") + LEAF: np.asarray(tops).reshape(sizes) for n in names}
    return changed
