"""Static input scales from a percentile of the magnitudes, for inputs whose rare spikes may be clipped.

  P(|x| > top) <= 1 - percent / 100

from the histogram over log2 |x|: `top` is the upper edge of a bin (1.1 % wide), never above the maximum.
"""

from __future__ import annotations

import functools
from typing import Any

import numpy as np

from mojax.errors import InputError
from mojax.input_scales import Chosen, Seen, choose, edges
from mojax.transforms.base import Context, Params, Stats, Transform


def percentile(*, percent: float = 99.99) -> Transform:
    """The magnitude that `percent` of all entries do not exceed; 100 is the maximum."""
    if not 50 <= percent <= 100:
        raise InputError(f"percentile: percent is {percent}, needed a number from 50 to 100, such as 99.99")
    apply = functools.partial(_apply, functools.partial(solve, percent=percent))
    return Transform(apply, ("absmax", "count", "histogram"), phase="encode")


def _apply(solve: Any, params: Params, stats: Stats, context: Context) -> Params:
    return choose("percentile", params, stats, context, solve)


def solve(seen: Seen, *, percent: float) -> Chosen:
    """One input."""
    width = np.shape(seen.parts[0].stats["absmax"])[-1]
    top = min(seen.top, at(seen.total("histogram"), seen.tokens * width, percent))
    return Chosen(top, note=f"{top / seen.top:.3g} of the maximum" if top < seen.top else "")


def at(histogram: np.ndarray, entries: int, percent: float) -> float:
    """The upper edge of the bin in which the percentile lies.

    Args:
      histogram: counts by log2 of the magnitude.
      entries: how many there are, zeros included, which the histogram may not hold or hold too many of.
    """
    above = np.cumsum(histogram[::-1])[::-1]  # entries in this bin or a larger one
    allowed = np.floor(entries * (1 - percent / 100) + 1e-6)
    last = int(np.flatnonzero(above > allowed)[-1]) if above[0] > allowed else 0
    return float(edges(len(histogram))[last + 1])
