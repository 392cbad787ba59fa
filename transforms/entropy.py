"""Static input scales by entropy: the threshold under which the distribution of magnitudes survives best.

  minimise over t   KL(P_t || Q_t)

P_t is the histogram of |x| up to t, with everything above in the last bin; Q_t the same without that, its
entries averaged within each level that the format has under t. TensorRT calibrates INT8 like this (Migacz,
GTC 2017), from 2048 bins of equal width.
"""

from __future__ import annotations

import functools
from typing import Any

import jax.numpy as jnp
import numpy as np

from mojax.errors import InputError
from mojax.formats.base import Format
from mojax.input_scales import Chosen, Seen, choose, edges
from mojax.transforms.base import Context, Params, Stats, Transform

LINEAR, FIRST = 2048, 128  # bins of equal width, and how many a threshold has at least


def entropy(*, stride: int = 8) -> Transform:
    """Thresholds by entropy.

    Args:
      stride: every how many of 2048 bins there is a threshold to try.
    """
    if not 1 <= stride <= LINEAR - FIRST:
        raise InputError(f"entropy: stride is {stride}, needed 1 to {LINEAR - FIRST}")
    apply = functools.partial(_apply, functools.partial(solve, stride=stride))
    return Transform(apply, ("absmax", "count", "histogram"), phase="encode")


def _apply(solve: Any, params: Params, stats: Stats, context: Context) -> Params:
    return choose("entropy", params, stats, context, solve)


def solve(seen: Seen, *, stride: int) -> Chosen:
    """One input; formats whose levels are not those of one scale keep their maximum."""
    if seen.format.block_columns or not seen.top:
        return Chosen(
            seen.top, note=f"{seen.format.label} has a scale for every block too: left at the maximum"
        )
    counts = linear(seen.total("histogram"), seen.top)
    ends = np.arange(LINEAR, FIRST - 1, -stride)  # ties to the larger
    found = [divergence(seen.format, counts, int(end)) for end in ends]
    best = int(np.argmin(found))
    return Chosen(float(seen.top * ends[best] / LINEAR), found[0], found[best])


def linear(histogram: np.ndarray, top: float) -> np.ndarray:
    """Counts by log2 of the magnitude as counts in `LINEAR` bins from 0 to `top`, evenly within each bin."""
    below = np.concatenate([[0], np.cumsum(histogram[1:])])  # the first bin holds zeros, which survive anyway
    ends = np.minimum(edges(len(histogram))[1:], top)  # nothing lies above
    return np.diff(np.interp(np.linspace(0, top, LINEAR + 1), ends, below))


def divergence(format: Format, counts: np.ndarray, end: int) -> float:
    """KL(P || Q) for a threshold after `end` bins; infinite where Q lacks what P has."""
    kept = counts[:end]
    p = kept.copy()
    p[-1] += counts[end:].sum()
    middle = jnp.asarray((np.arange(LINEAR) + 0.5) / end * format.largest, jnp.float32)  # one shape for all
    _, level = np.unique(np.asarray(format.element(middle))[:end], return_inverse=True)
    live = kept > 0
    share = np.bincount(level, kept) / np.maximum(np.bincount(level, live), 1)
    q = np.where(live, share[level], 0)
    if not p.sum() or not q.sum() or np.any((p > 0) & (q == 0)):
        return float("inf")
    p, q = p / p.sum(), q / q.sum()
    return float(np.sum(p[p > 0] * np.log(p[p > 0] / q[p > 0])))
