"""Weight scales by the local Hessian: the least error of the outputs that a block alone causes.

  minimise over s   e^T H_b e,   e = round(w_b / s) s - w_b,   H_b = sum x_b x_b^T over the block's inputs

H_b are the diagonal blocks of what GPTQ has as H, damped. A maximum that no input meets may be clipped, so
the window is wider than that of plain squares. ModelOpt's name for it.
"""

from __future__ import annotations

import functools
from typing import Any

import jax.numpy as jnp

from mojax.errors import InputError
from mojax.matrices import Matrix, Solved, encode, unchanged
from mojax.rounding.scales import candidates, cost, local, search
from mojax.transforms.base import Context, Params, Stats, Transform


def local_hessian(
    *, low: float = 0.5, high: float = 1.75, count: int = 32, damping: float = 0.01, signed: bool = False
) -> Transform:
    """Scales of least local error; codes to nearest.

    Args:
      low, high: the window, times the scales of the step before or the format's own, which are a candidate.
      count: how many candidates at most. All E4M3 numbers of the window if they are not more; MX formats have
        three: an exponent less, the same, one more.
      damping: share of the mean diagonal that is added to H; more where there are few tokens.
      signed: negative scales too, where the values of the format are not symmetric (INT4 has -8 and no 8).
    """
    if not 0 < low < high or count < 3 or not 0 < damping <= 10:
        raise InputError(
            f"local_hessian: low is {low}, high {high}, count {count}, damping {damping}; needed "
            "0 < low < high, 3 or more, and a share of the mean diagonal, such as 0.01"
        )
    bound = functools.partial(solve, low=low, high=high, count=count, damping=damping, signed=signed)
    return Transform(
        functools.partial(_apply, bound), ("gram", "count"), encodes=True, phase="encode", anew="codes"
    )


def _apply(solve: Any, params: Params, stats: Stats, context: Context) -> Params:
    return encode("local_hessian", params, stats, context, solve)


def solve(m: Matrix, *, low: float, high: float, count: int, damping: float, signed: bool = False) -> Solved:
    """One matrix; by plain squares where no token was seen."""
    if "inner" not in m.scales or m.format.block_rows > 1:
        return unchanged(m)
    w, blocks = jnp.asarray(m.w), m.format.step(m.scales).shape[-1]
    importance = local(m.objective(damping)[0], blocks) if m.seen else None
    tried = candidates(m.format, m.scales, low, high, count, signed)
    scales = search(m.format, w, m.scales, tried, importance)
    before, after = (cost(m.format, w, s, importance) for s in (m.scales, scales))
    note = "" if m.seen else "no calibration token reached it, so its scales are those of least squares"
    return Solved(scales, None, before, after, note)
