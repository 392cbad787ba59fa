"""Static input scales by search: the share of the largest magnitude that costs the outputs least.

  minimise over m   sum over sampled tokens  e A e^T,   e = round(x; m max|X|) - x,   A = sum W^T W

over the weights that read x. A scale for less than the maximum clips outliers and rounds the rest finer.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from mojax.compile import jit
from mojax.errors import InputError
from mojax.formats.base import Format
from mojax.input_scales import Chosen, Seen, choose
from mojax.rounding.inputs import cost, gram_of, rounded
from mojax.transforms.base import Context, Params, Stats, Transform


def clip(*, low: float = 0.08, count: int = 30, rows: int = 2048) -> Transform:
    """Clipping of inputs that have a static scale.

    Args:
      low: the smallest share of the maximum; count: how many shares up to 1.
      rows: how many sampled tokens, at most.
    """
    if not 0 < low < 1 or count < 2 or rows < 1:
        raise InputError(
            f"clip: low is {low}, count {count}, rows {rows}; needed a share below 1, two shares, a row"
        )
    shares = (1.0, *np.linspace(low, 1, count)[:-1].tolist())
    apply = functools.partial(_apply, functools.partial(solve, shares=shares, rows=rows))
    return Transform(apply, ("absmax", "count", "sample"), phase="encode")


def _apply(solve: Any, params: Params, stats: Stats, context: Context) -> Params:
    return choose("clip", params, stats, context, solve)


def solve(seen: Seen, *, shares: Sequence[float], rows: int) -> Chosen:
    """One input; ties to the larger magnitude."""
    tops = jnp.asarray(np.float32(seen.top) * np.asarray(shares, np.float32))
    found = np.zeros(len(shares))
    for part in seen.parts:
        x = np.asarray(part.stats["sample"], np.float32)
        x = x[:: -(-len(x) // rows)]
        found += np.asarray(costs(seen.format, seen.dtype, jnp.asarray(x), part.weights, tops))
    best = int(np.argmin(np.where(np.isfinite(found), found, np.inf)))
    return Chosen(float(tops[best]), float(found[0]), float(found[best]))


@jit(static_argnums=(0, 1))
def costs(
    format: Format, dtype: np.dtype, x: jax.Array, weights: Sequence[Any], tops: jax.Array
) -> jax.Array:
    """The error of the outputs under scales for each of `tops [n]`, float32 `[n]`; `x [tokens, in]`."""
    a = gram_of(weights)

    def under(top: jax.Array) -> jax.Array:
        plain, q = rounded(format, x, top, dtype)
        return cost(q - plain, a)

    return lax.map(under, tops)
