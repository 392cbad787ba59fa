"""Weight scales by least squares: the best of a grid of multiples of the format's own, block by block.

minimise over s   sum_j h_j (round(w_j / s) s - w_j)^2,    h_j = 1, or the mean of x_j^2
"""

from __future__ import annotations

import functools
from typing import Any

import jax.numpy as jnp
import numpy as np

from mojax.errors import InputError
from mojax.matrices import Matrix, Solved, encode, unchanged
from mojax.rounding.scales import cost, search
from mojax.transforms.base import Context, Params, Stats, Transform


def mse(*, low: float = 0.5, high: float = 1.25, count: int = 32, weighted: bool = False) -> Transform:
    """Scales of least squared error; codes to nearest.

    Args:
      low, high: the window, times the scales of the step before or the format's own, which are a candidate.
      count: how many candidates. MX formats have three: an exponent less, the same, one more.
      weighted: by the mean squares of the inputs, which needs calibration.
    """
    if not 0 < low < high or count < 3:
        raise InputError(
            f"mse: low is {low}, high {high}, count {count}; needed 0 < low < high and 3 or more"
        )
    apply = functools.partial(
        _apply, functools.partial(solve, low=low, high=high, count=count, weighted=weighted)
    )
    return Transform(
        apply, ("sumsq", "count") if weighted else (), encodes=True, phase="encode", anew="codes"
    )


def _apply(solve: Any, params: Params, stats: Stats, context: Context) -> Params:
    return encode("mse", params, stats, context, solve)


def solve(m: Matrix, *, low: float, high: float, count: int, weighted: bool) -> Solved:
    """One matrix; unweighted where no token was seen."""
    if "inner" not in m.scales:
        return unchanged(m)
    seen = weighted and m.tokens > 0
    importance = jnp.asarray(m.stats["sumsq"], jnp.float32) / np.float32(m.tokens) if seen else None
    w = jnp.asarray(m.w)
    scales = search(m.format, w, m.scales, m.format.candidates(m.scales, low, high, count), importance)
    before, after = (cost(m.format, w, s, importance) for s in (m.scales, scales))
    note = "no calibration token reached it, so columns count alike" if weighted and not seen else ""
    return Solved(scales, None, before, after, note)
