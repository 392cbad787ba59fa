"""Four over six: the largest magnitude of an NVFP4 block becomes 6, or 4, as is better (arXiv 2512.02010).

  s = max|w| / 6  or  max|w| / 4,   under the outer scale of 256 instead of 448 as the largest block scale

E2M1 has nothing between 4 and 6: a block with entries at 5/6 of its maximum is better off with that as 4.
"""

from __future__ import annotations

from typing import Any

import jax.numpy as jnp
import numpy as np

from mojax.formats.base import Format
from mojax.matrices import Matrix, Solved, encode, own_outer, unchanged
from mojax.rounding.scales import ROOM, cost
from mojax.rounding.scales import four_over_six as choose
from mojax.transforms.base import Context, Params, Stats, Transform


def four_over_six() -> Transform:
    """Scales of NVFP4 weights, set anew; other formats keep theirs."""
    return Transform(_apply, encodes=True, phase="encode", anew="codes")


def _apply(params: Params, stats: Stats, context: Context) -> Params:
    return encode("four_over_six", params, stats, context, solve, outer)


def outer(format: Format, amax: np.float32, dtype: np.dtype) -> Any:
    """The outer scale with room for block scales of 1.5 times the usual."""
    return own_outer(format, np.float32(ROOM * amax) if format.name == "nvfp4" else amax, dtype)


def solve(m: Matrix) -> Solved:
    """One matrix; ties to six."""
    if m.format.name != "nvfp4":
        return unchanged(m, f"four over six is for nvfp4 weights, {m.format.label} is as it was")
    w = jnp.asarray(m.w)
    scales = choose(m.format, w, m.scales)
    return Solved(scales, None, cost(m.format, w, m.scales), cost(m.format, w, scales))
