"""Scales of one matrix: its grid of values, the search among legal scales, and codes from values.

  search  for each block of a row the candidate s with the least
            sum e^2,  sum_j importance_j e_j^2,  or  e^T H_b e,   e = element(w / s) s - w

The last is the local Hessian: H_b is the diagonal block of sum x x^T at the block's columns. Four over six
(arXiv 2512.02010) chooses between a block's largest magnitude as 6 and as 4. The given scale is always a
candidate, so that no block gets worse. Integers also take negative scales: add `-candidates` to the last
axis.
"""

from __future__ import annotations

import dataclasses
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from mojax.compile import jit
from mojax.errors import InputError
from mojax.formats.base import Format, QTensor
from mojax.formats.numerics import divide
from mojax.rounding.objective import product

_PART = 2**20  # entries that are searched at a time
ROOM = 448 / 256  # of the largest magnitude, in an outer scale for `four_over_six`

Scales = dict[str, Any]


class Grid(NamedTuple):
    """What values an entry can have: `element * step`; both float32 `[..., out, in]`, `zero` None without."""

    step: jax.Array
    zero: jax.Array | None


def grid(format: Format, scales: Scales, shape: tuple[int, ...]) -> Grid:
    """The grid of every entry of a matrix of this shape under `scales` (float32, whatever they rest in)."""
    zero = scales.get("zero")
    return Grid(
        _spread(format, format.step(scales), shape),
        None if zero is None else _spread(format, jnp.asarray(zero).astype(jnp.float32), shape),
    )


def _spread(format: Format, scale: jax.Array, shape: tuple[int, ...]) -> jax.Array:
    """`[rows, blocks]` to every entry of `[out, in]`."""
    if format.block_rows > 1:
        scale = jnp.repeat(scale, format.block_rows, axis=0)[: shape[0]]
    if format.block_columns and scale.shape[1] > 1:
        scale = jnp.repeat(scale, format.block_columns, axis=1)[:, : shape[1]]
    return jnp.broadcast_to(scale, shape)


def nearest(format: Format, w: jax.Array, at: Grid) -> jax.Array:
    """The values of the grid nearest to `w`, float32; what `format.round` gives where `w` is float32."""
    y = divide(w, jnp.where(at.step == 0, 1.0, at.step))
    return format.element(y, at.zero) * at.step


def encoded(format: Format, q: jax.Array, scales: Scales, dtype: Any) -> QTensor:
    """The QTensor that decodes to `q [out, in]`, on the grid of `scales`; `dtype` is the checkpoint's."""
    return dataclasses.replace(format.encode_as(q.astype(jnp.float32), scales), dtype=np.dtype(dtype))


def candidates(
    format: Format, scales: Scales, low: float, high: float, count: int, signed: bool = False
) -> jax.Array:
    """`format.candidates`, and the same negative where `signed` and the format's values are not symmetric."""
    found = format.candidates(scales, low, high, count)
    if signed and getattr(format, "symmetric", False):  # integers, of which the lowest has no opposite
        return jnp.concatenate([found, -found], axis=-1)
    return found


def search(
    format: Format,
    w: jax.Array,
    scales: Scales,
    candidates: jax.Array,
    importance: jax.Array | None = None,
    rows: int | None = None,
) -> Scales:
    """The scales with the best of `candidates` for each block of each row; ties to the given ones.

    Args:
      w: `[out, in]`.
      scales: of `format.fit`, under the outer scale that will be used. Formats without inner scales, or whose
        inner scales serve several rows, get them back.
      candidates: inner scales `[out, blocks, n]`, as `format.candidates` makes them.
      importance: None; or float32 `[in]`, of each column; or float32 `[blocks, B, B]`, the local Hessians.
      rows: how many at a time; the result does not depend on it.
    Raises:
      InputError: the shapes do not fit each other.
    """
    if "inner" not in scales or format.block_rows > 1:
        return scales
    out, width = w.shape
    blocks = candidates.shape[1]
    known = [(width,), (blocks, width // blocks, width // blocks)]
    if importance is not None and importance.shape not in known:
        raise InputError(
            f"scales: importance {importance.shape}; needed for {w.shape} is {known[0]} or {known[1]}"
        )
    parts = -(-out // min(out, rows or max(1, _PART // width)))
    return {**scales, "inner": _search(format, -(-out // parts), w, scales, candidates, importance)}


@jit(static_argnums=(0, 1))
def _search(
    format: Format,
    rows: int,
    w: jax.Array,
    scales: Scales,
    candidates: jax.Array,
    importance: jax.Array | None,
) -> jax.Array:
    shared = {level: s for level, s in scales.items() if level == "outer"}
    by_row = {level: jnp.asarray(s) for level, s in scales.items() if level != "outer"}
    out = w.shape[0]
    parts = -(-out // rows)

    def cut(x: jax.Array) -> jax.Array:
        edge = [(0, parts * rows - out)] + [(0, 0)] * (x.ndim - 1)
        return jnp.pad(x, edge, mode="edge").reshape(parts, rows, *x.shape[1:])

    def best(part: tuple[jax.Array, Scales, jax.Array]) -> jax.Array:
        w, own, choice = part
        x = w.astype(jnp.float32).reshape(rows, choice.shape[1], -1)
        zero = own["zero"].astype(jnp.float32)[..., None] if "zero" in own else None
        every = jnp.concatenate([own["inner"][None], jnp.moveaxis(choice, -1, 0)])
        # Once for all entries of a block: fused, each of them would decode the scale again.
        steps = jax.vmap(lambda inner: format.step({**shared, **own, "inner": inner}))(every)
        steps = lax.optimization_barrier(steps)

        def closer(m: jax.Array, state: tuple[jax.Array, jax.Array]) -> tuple[jax.Array, jax.Array]:
            least, best = state
            now = _error(nearest(format, x, Grid(steps[m][..., None], zero)) - x, importance)
            return jnp.minimum(least, now), jnp.where(now < least, m, best)

        start = jnp.full(every.shape[1:], jnp.inf, jnp.float32), jnp.zeros(every.shape[1:], jnp.int32)
        best = lax.fori_loop(0, len(every), closer, start)[1]
        return jnp.take_along_axis(every, best[None], 0)[0]

    found = lax.map(best, (cut(w), jax.tree.map(cut, by_row), cut(candidates)))
    return found.reshape(parts * rows, -1)[:out]


def _error(e: jax.Array, importance: jax.Array | None) -> jax.Array:
    """`e [rows, blocks, B]` to what each block costs."""
    if importance is None:
        weighted = e
    elif importance.ndim == 1:
        weighted = e * importance.reshape(1, *e.shape[1:])
    else:
        weighted = jnp.swapaxes(product(jnp.swapaxes(e, 0, 1), importance), 0, 1)
    return jnp.sum(e * weighted, -1)


def cost(format: Format, w: jax.Array, scales: Scales, importance: jax.Array | None = None) -> float:
    """What `search` lowers, over all of `w`, with the nearest values under `scales`."""
    return float(_cost(format, w, scales, importance))


@jit(static_argnums=(0,))
def _cost(format: Format, w: jax.Array, scales: Scales, importance: jax.Array | None) -> jax.Array:
    x = w.astype(jnp.float32)
    e = nearest(format, x, grid(format, scales, (x.shape[0], x.shape[1]))) - x
    blocks = importance.shape[0] if importance is not None and importance.ndim == 3 else 1
    return jnp.sum(_error(e.reshape(x.shape[0], blocks, -1), importance))


def local(h: jax.Array, blocks: int) -> jax.Array:
    """The diagonal blocks `[blocks, B, B]` of `h [in, in]`: the local Hessians."""
    return _local(blocks, h)


@jit(static_argnums=(0,))
def _local(blocks: int, h: jax.Array) -> jax.Array:
    size = h.shape[0] // blocks
    return jnp.moveaxis(jnp.diagonal(h.reshape(blocks, size, blocks, size), axis1=0, axis2=2), -1, 0)


def four_over_six(
    format: Format, w: jax.Array, scales: Scales, importance: jax.Array | None = None
) -> Scales:
    """For each block the better of its largest magnitude as 6 and as 4 (NVFP4; arXiv 2512.02010).

    Args:
      scales: `format.fit(w, format.outer(ROOM * amax, dtype))`: that leaves room for E4M3 scales of 1.5
        times the usual, which would saturate under the ordinary outer scale.
    Raises:
      InputError: the format is not NVFP4.
    """
    if format.name != "nvfp4":
        raise InputError(f"four over six: {format.label} has no E4M3 scales to choose from; use nvfp4")
    step = format.step(scales)
    top = jnp.max(jnp.abs(w.astype(jnp.float32)).reshape(*step.shape, -1), -1)
    other = format.rescaled(scales, jnp.where(top > 0, top / (4 * step), 1.0))
    return search(format, w, scales, jnp.stack([jnp.asarray(scales["inner"]), other], -1), importance)
