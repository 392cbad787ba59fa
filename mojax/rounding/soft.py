"""Weights between two neighbours of a grid, for rounding that is learned.

  w = low + h (high - low),   low <= w <= high neighbours on the grid,   h in [0, 1]

`h` is learned: by AdaRound (arXiv 2004.10568) and DiscQuant (arXiv 2501.06417) itself, by SignRound
(arXiv 2309.05516) as an offset V that moves the place where low becomes high. Neighbours of E2M1 elements are
not equally far apart, so offsets count in units of the gap at hand.
"""

from __future__ import annotations

import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np

from mojax.formats.base import Format
from mojax.formats.numerics import divide
from mojax.rounding.scales import Grid

_EDGE = 1e-3  # of half a gap, that `inside` keeps from the middle
_E4M3 = np.arange(256, dtype=np.uint8).view(ml_dtypes.float8_e4m3fn).astype(np.float32)
_PROBES = np.union1d(_E4M3[np.isfinite(_E4M3)], np.arange(-128, 128, dtype=np.float32))


class Pair(NamedTuple):
    """Two neighbours on a grid, float32 `[..., out, in]`; the same number where the grid ends before."""

    low: jax.Array
    high: jax.Array


@functools.cache
def levels(format: Format) -> np.ndarray:
    """The elements of a format in rising order, float32; codes where it has zero points."""
    with jax.ensure_compile_time_eval():
        zero = jnp.zeros((), jnp.float32) if not getattr(format, "symmetric", True) else None
        return np.unique(np.asarray(format.element(jnp.asarray(_PROBES), zero)))


def _elements(w: jax.Array, at: Grid) -> jax.Array:
    """`w` in units of the grid; zero points included."""
    y = divide(w.astype(jnp.float32), jnp.where(at.step == 0, 1.0, at.step))
    return y if at.zero is None else y + at.zero


def _place(known: jax.Array, y: jax.Array, side: str) -> jax.Array:
    few = len(known) <= 32  # then comparing with all is several times faster
    return jnp.searchsorted(known, y, side=side, method="compare_all" if few else "scan")


def _values(y: jax.Array, at: Grid) -> jax.Array:
    return (y if at.zero is None else y - at.zero) * at.step


def neighbours(format: Format, w: jax.Array, at: Grid) -> Pair:
    """The numbers of the grid next to `w [..., out, in]`: the largest up to it, and the next one."""
    known = jnp.asarray(levels(format))
    above = _place(known, _elements(w, at), "right")
    low, high = (known[jnp.clip(i, 0, len(known) - 1)] for i in (above - 1, above))
    return Pair(_values(low, at), _values(high, at))


def share(w: jax.Array, pair: Pair) -> jax.Array:
    """`h` of `w`: 0 at low, 1 at high; 0 where both are the same."""
    gap = pair.high - pair.low
    return jnp.where(gap > 0, jnp.clip((w - pair.low) / jnp.where(gap > 0, gap, 1.0), 0.0, 1.0), 0.0)


def inside(format: Format, w: jax.Array, q: jax.Array, at: Grid) -> jax.Array:
    """The numbers nearest to `w` that are rounded to `q`, float32; `w` itself where q is nearest to it.

    Args:
      q: float32, on the grid.
    """
    known = levels(format)
    middle = jnp.asarray((known[1:] + known[:-1]) / 2)
    i = _place(middle, _elements(q, at), "left")
    own = jnp.asarray(known)[i]
    low = jnp.where(i > 0, middle[jnp.maximum(i - 1, 0)], -jnp.inf)
    high = jnp.where(i < len(middle), middle[jnp.minimum(i, len(middle) - 1)], jnp.inf)
    y = _elements(w, at)
    kept = jnp.clip(y, own + (1 - _EDGE) * (low - own), own + (1 - _EDGE) * (high - own))
    same = (kept == y) | (at.step == 0)
    return jnp.where(same, w.astype(jnp.float32), _values(kept, at))


def moved(format: Format, w: jax.Array, offset: jax.Array, at: Grid) -> jax.Array:
    """The neighbour of `w` on the grid that is nearest after `offset` gaps, each in [-0.5, 0.5]."""
    pair = neighbours(format, w, at)
    return jnp.where(share(w, pair) + offset >= 0.5, pair.high, pair.low)
