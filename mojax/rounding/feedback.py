"""Error feedback: columns (and rows) are rounded one after another, and each absorbs the errors before it.

  W - Q = V^T E U      inv(H) = U^T U,  inv(G) = V^T V,  both upper triangular
  t_ij  = w_ij - sum_(a <= i, b <= j, not both equal) V_ai E_ab U_bj
  q_ij  = the value of the grid nearest to t_ij,      E_ij = (t_ij - q_ij) / (V_ii U_jj)
  tr(G (W - Q) H (W - Q)^T) = sum E^2

With G = I this is GPTQ (arXiv 2210.17323) under static scales, which is Babai's nearest plane
(arXiv 2507.18553); with both sides it is the same on the Kronecker product. Entries of a tile (a panel of
rows by a batch of columns) on one antidiagonal i + j = t depend only on smaller t, so they are rounded
together; what tiles owe each other are two matrix products. Blocks of G do not depend on each other at all.
"""

from __future__ import annotations

from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import lax

from mojax.compile import jit
from mojax.errors import InputError
from mojax.formats.base import Format
from mojax.rounding.objective import Factor, factor, product, reordered
from mojax.rounding.scales import Grid, Scales, grid, nearest

_COLUMNS = 128  # of a tile
_ROWS = 32


class Solution(NamedTuple):
    """What feedback found.

    Attributes:
      q: float32 `[out, in]`, on the grid.
      errors: float32 `[out / b, b, in]`, E above, in the orders of the factors.
    """

    q: jax.Array
    errors: jax.Array


def solve(
    format: Format,
    w: jax.Array,
    scales: Scales,
    h: jax.Array,
    g: jax.Array | None = None,
    act_order: bool = True,
) -> jax.Array:
    """Values on the grid of `scales` that make tr(G D H D^T) small; float32 `[out, in]`.

    Args:
      w: `[out, in]`, the target.
      scales: of `format.fit` or a search; they do not change.
      h: float32 `[in, in]`, damped (`objective.damped`).
      g: float32 `[out / b, b, b]`, damped diagonal blocks, or None for the identity.
      act_order: round entries of large diagonals first, on both sides.
    Raises:
      InputError: the shapes do not fit each other.
    """
    return solve_factored(
        format, w, scales, factor(h, act_order), None if g is None else factor(g, act_order)
    ).q


def solve_factored(
    format: Format,
    w: jax.Array,
    scales: Scales,
    columns: Factor,
    rows: Factor | None = None,
    lazy: int = _COLUMNS,
    panel: int = _ROWS,
) -> Solution:
    """`solve` with factors of H and G that several weights may share; `Factor.raised` says how they went.

    Args:
      lazy: columns of a tile; panel: rows of a tile. The result does not depend on them.
    """
    out, width = w.shape
    if columns.upper.shape != (width, width):
        raise InputError(f"feedback: H is {columns.upper.shape}; a weight {w.shape} needs {(width, width)}")
    if rows is not None and rows.upper.shape[0] * rows.upper.shape[1] != out:
        raise InputError(
            f"feedback: G is {rows.upper.shape}; its blocks must cover the {out} rows of {w.shape}"
        )
    return _solve(format, lazy, panel, w, scales, columns, rows)


@jit(static_argnums=(0, 1, 2))
def _solve(
    format: Format, lazy: int, panel: int, w: jax.Array, scales: Scales, columns: Factor, rows: Factor | None
) -> Solution:
    size = 1 if rows is None else rows.upper.shape[-1]
    shape = (w.shape[0] // size, size, w.shape[1])

    def ordered(x: jax.Array) -> jax.Array:
        x = jnp.take(x.reshape(shape), columns.order, axis=2)
        return x if rows is None else reordered(x, rows.order, -2)

    at = grid(format, scales, w.shape)
    at = Grid(ordered(at.step), None if at.zero is None else ordered(at.zero))
    target = ordered(w.astype(jnp.float32))
    upper = jnp.ones((1, 1, 1), jnp.float32) if rows is None else rows.upper
    q, e = _tiles(format, min(lazy, shape[2]), min(panel, size), target, at, columns.upper, upper)
    q = jnp.take(q, jnp.argsort(columns.order), axis=2)
    if rows is not None:
        q = reordered(q, jnp.argsort(rows.order, axis=-1), -2)
    return Solution(q.reshape(w.shape), e)


def _tiles(
    format: Format, wide: int, tall: int, w: jax.Array, at: Grid, u: jax.Array, v: jax.Array
) -> tuple[jax.Array, jax.Array]:
    """Q and E `[B, b, in]`, tile by tile: columns outside, panels of rows inside."""
    B, b, width = w.shape
    more_rows, more_columns = -b % tall, -width % wide
    edge = ((0, 0), (0, more_rows), (0, more_columns))
    w = jnp.pad(w, edge)
    at = Grid(jnp.pad(at.step, edge, constant_values=1), None if at.zero is None else jnp.pad(at.zero, edge))
    u, v = _bordered(u, more_columns), _bordered(v, more_rows)
    panels = w.shape[1] // tall

    def tile(r: jax.Array, k: jax.Array, state: tuple) -> tuple:
        q, e, x = state  # x: E U of this batch of columns; final in the panels above r
        row, column = r * tall, k * wide

        def part(a: jax.Array) -> jax.Array:
            return lax.dynamic_slice(a, (0, row, column), (B, tall, wide))

        t = part(w)
        if panels > 1:
            above = jnp.where(jnp.arange(w.shape[1])[:, None] < row, _columns(v, row, tall), 0.0)
            t = t - product(jnp.swapaxes(above, 1, 2), x)
        ut = lax.dynamic_slice(u, (column, column), (wide, wide))
        vt = lax.dynamic_slice(v, (0, row, row), (v.shape[0], tall, tall))
        xt = lax.dynamic_slice(x, (0, row, 0), (B, tall, wide))
        local = Grid(part(at.step), None if at.zero is None else part(at.zero))
        qt, et, xt = _antidiagonals(format, t, local, xt, ut, vt)
        place = (0, row, column)
        return (
            lax.dynamic_update_slice(q, qt, place),
            lax.dynamic_update_slice(e, et, place),
            lax.dynamic_update_slice(x, xt, (0, row, 0)),
        )

    def batch(k: jax.Array, state: tuple[jax.Array, jax.Array]) -> tuple[jax.Array, jax.Array]:
        q, e = state
        x = product(e, lax.dynamic_slice(u, (0, k * wide), (u.shape[0], wide)))
        q, e, _ = lax.fori_loop(0, panels, lambda r, s: tile(r, k, s), (q, e, x))
        return q, e

    start = (jnp.zeros_like(w), jnp.zeros_like(w))
    q, e = lax.fori_loop(0, w.shape[2] // wide, batch, start)
    return q[:, :b, :width], e[:, :b, :width]


def _columns(v: jax.Array, start: jax.Array, count: int) -> jax.Array:
    return lax.dynamic_slice(v, (0, 0, start), (v.shape[0], v.shape[1], count))


def _bordered(m: jax.Array, more: int) -> jax.Array:
    """`[..., n, n]` with `more` rows and columns of the identity."""
    if not more:
        return m
    n = m.shape[-1]
    whole = jnp.pad(m, [(0, 0)] * (m.ndim - 2) + [(0, more), (0, more)])
    late = (jnp.arange(n + more) >= n).astype(jnp.float32)
    return whole + jnp.broadcast_to(jnp.diag(late), whole.shape)


def _antidiagonals(
    format: Format, w: jax.Array, at: Grid, x: jax.Array, u: jax.Array, v: jax.Array
) -> tuple[jax.Array, jax.Array, jax.Array]:
    """One tile: Q, E and E U, `[B, P, C]`; `x` is E U of the columns before, `v` and `u` the tile's own."""
    B, P, C = w.shape
    steps = P + C - 1
    edge = P - 1
    # Row i of the tile is at column t - i: slices of a padded, reversed copy read that without a gather.
    u_back = jnp.flip(jnp.pad(u, ((edge, edge), (edge, edge))), 0)
    v_back = jnp.flip(v, 2)
    unit = jnp.diagonal(v, axis1=1, axis2=2)[:, :, None] * jnp.diagonal(u)[None, None, :]
    slanted = (
        _slant(w, 0.0),
        _slant(jnp.broadcast_to(unit, w.shape), 1.0),
        Grid(_slant(at.step, 1.0), None if at.zero is None else _slant(at.zero, 0.0)),
    )

    def step(x: jax.Array, now: tuple) -> tuple[jax.Array, tuple[jax.Array, jax.Array]]:
        t, (w, unit, at) = now
        before = lax.dynamic_slice(x, (0, 0, t), (B, P, P))  # [:, a, P - 1 - i] is x[a, t - i]
        target = w - jnp.flip(jnp.sum(v_back * before, 1), 1)
        q = nearest(format, target, at)
        e = (target - q) / unit
        rows = lax.dynamic_slice(u_back, (C + P - 2 - t, 0), (P, C + 2 * edge))  # [a] is u[t - a]
        return x + e[:, :, None] * rows[None], (q, e)

    x = jnp.pad(x, ((0, 0), (0, 0), (edge, edge)))
    x, (q, e) = lax.scan(step, x, (jnp.arange(steps), slanted))
    return _upright(q, C), _upright(e, C), x[:, :, edge : edge + C]


def _slant(x: jax.Array, fill: float) -> jax.Array:
    """`[B, P, C]` to `[P + C - 1, B, P]`, whose entry `[t, :, i]` is `x[:, i, t - i]`."""
    B, P, C = x.shape
    wide = jnp.pad(x, ((0, 0), (0, 0), (0, P)), constant_values=fill).reshape(B, P * (C + P))
    return jnp.transpose(wide[:, : P * (C + P - 1)].reshape(B, P, C + P - 1), (2, 0, 1))


def _upright(x: jax.Array, columns: int) -> jax.Array:
    """The inverse of `_slant`."""
    steps, B, P = x.shape
    flat = jnp.pad(jnp.transpose(x, (1, 2, 0)).reshape(B, P * steps), ((0, 0), (0, P)))
    return flat.reshape(B, P, steps + 1)[:, :, :columns]
