"""AWQ's clipping: each block of a row gets the share of its largest magnitude that costs the outputs least.

  minimise over m in {1, .95, ..., .5}   sum over tokens (x_b e)^2 = e^T H_b e,   e = round(w_b; m s) - w_b

H_b = sum x_b x_b^T over the block's inputs (arXiv 2306.00978; the search of the paper's code).
"""

from __future__ import annotations

import functools
from typing import Any

import jax.numpy as jnp

from mojax.errors import InputError
from mojax.matrices import Matrix, Solved, encode, unchanged
from mojax.rounding.scales import cost, local, search
from mojax.transforms.base import Context, Params, Stats, Transform


def awq_clip(*, low: float = 0.5, step: float = 0.05) -> Transform:
    """Clipped scales; codes to nearest.

    Args:
      low: the smallest share of the scales of the step before, or of the format's own.
      step: between shares. NVFP4 has about as many E4M3 numbers there, and takes all; MX formats take an
        exponent less or more.
    """
    if not 0 < low < 1 or not 0 < step <= (1 - low) / 2:
        raise InputError(f"awq_clip: low is {low}, step {step}; needed a share below 1 and two steps up to 1")
    bound = functools.partial(solve, low=low, count=round((1 - low) / step) + 2)
    return Transform(
        functools.partial(_apply, bound), ("gram", "count"), encodes=True, phase="encode", anew="codes"
    )


def _apply(solve: Any, params: Params, stats: Stats, context: Context) -> Params:
    return encode("awq_clip", params, stats, context, solve)


def solve(m: Matrix, *, low: float, count: int) -> Solved:
    """One matrix; as it was where no token was seen."""
    if "inner" not in m.scales or m.format.block_rows > 1:
        return unchanged(m)
    if not m.seen:
        return unchanged(m, "no calibration token reached it, so nothing is clipped")
    w, blocks = jnp.asarray(m.w), m.format.step(m.scales).shape[-1]
    h = local(jnp.asarray(m.stats["gram"], jnp.float32), blocks)
    scales = search(m.format, w, m.scales, m.format.candidates(m.scales, low, 1.0, count), h)
    return Solved(scales, None, cost(m.format, w, m.scales, h), cost(m.format, w, scales, h))
