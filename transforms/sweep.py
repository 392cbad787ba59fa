"""Weight scales by exhaustive search: of all codes that a block's scale may have, the one of least error.

  minimise over legal s   sum_j (round(w_j / s) s - w_j)^2

NVFP4: the E4M3 numbers from 0.8 to 1.75 times the block's own, about ten; the best of all 126 lies there. MX
formats: an exponent less, the same, one more.
"""

from __future__ import annotations

import jax.numpy as jnp

from mojax.matrices import Matrix, Solved, encode, unchanged
from mojax.rounding.scales import cost, search
from mojax.transforms.base import Context, Params, Stats, Transform

LOW, HIGH, MOST = 0.8, 1.75, 24  # the window, and more candidates than it holds


def sweep() -> Transform:
    """The best code of every block's scale; formats whose scales are no codes keep theirs (see mse)."""
    return Transform(_apply, encodes=True, phase="encode", anew="codes")


def _apply(params: Params, stats: Stats, context: Context) -> Params:
    return encode("sweep", params, stats, context, solve)


def solve(m: Matrix) -> Solved:
    """One matrix."""
    if "inner" not in m.scales or m.scales["inner"].dtype.itemsize > 1:
        return unchanged(m, f"{m.format.label} has no codes for scales to sweep: mse searches those it has")
    w = jnp.asarray(m.w)
    scales = search(m.format, w, m.scales, m.format.candidates(m.scales, LOW, HIGH, MOST))
    return Solved(scales, None, cost(m.format, w, m.scales), cost(m.format, w, scales))
