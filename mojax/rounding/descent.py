"""Descent from a rounded matrix: one entry, or one block with its scale, at a time; never upwards.

  R = G (Q - W) H
  entry  q_ij <- the value nearest to q_ij - R_ij / (G_ii H_jj)
  block  for every legal scale s the values that Babai's nearest plane finds against the block's own linear
         term, q - R_b inv(H_bb) / G_ii; the best (s, values), if they lower the error by the exact difference
           G_ii d^T H_bb d + 2 R_b d,  d the change
  refit  codes kept, s multiplied by 1 - <R_b, q> / (G_ii q^T H_bb q), rounded to a legal scale

Coordinate descent after error feedback is QuantEase's (arXiv 2309.01885). Rows that share a block of G see
each other: within a column the entry that gains most moves first and the others' linear terms follow, so
every accepted change has its exact gain. Blocks of a panel of rows make their proposals together and are
accepted in the same way. The error is tr(G D H D^T) of objective.py; `h` and `g` are the damped ones.
"""

from __future__ import annotations

from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import lax

from mojax.compile import jit
from mojax.formats.base import Format
from mojax.formats.numerics import divide
from mojax.rounding.objective import factor, product, value
from mojax.rounding.scales import Grid, Scales, candidates, grid, local, nearest

_COLUMNS = 128  # that are swept between two matrix products
_WIDEST = 256  # columns of a block that `move_blocks` takes
_LANES = 2**18  # floats of the candidates of a panel
_TALLEST = 32  # rows of a panel whose proposals are made together where rows see each other
_NOISE = 1e-5  # of a change's own square: what must be gained at least


def sweep(
    format: Format,
    w: jax.Array,
    q: jax.Array,
    scales: Scales,
    h: jax.Array,
    g: jax.Array | None = None,
    sweeps: int = 4,
) -> jax.Array:
    """Coordinate descent over the values under fixed scales: `q [out, in]`, float32, on the same grid.

    Args:
      w: `[out, in]`, the target.
      q: float32, values on the grid of `scales`.
      h: float32 `[in, in]`, damped.
      g: float32 `[out / b, b, b]`, damped diagonal blocks, or None for the identity.
      sweeps: over all columns.
    """
    return _sweep(format, sweeps, w, q, scales, h, g)


@jit(static_argnums=(0, 1))
def _sweep(
    format: Format,
    sweeps: int,
    w: jax.Array,
    q: jax.Array,
    scales: Scales,
    h: jax.Array,
    g: jax.Array | None,
) -> jax.Array:
    (out, width), size = w.shape, 1 if g is None else g.shape[-1]
    wide = min(_COLUMNS, width)
    more = -width % wide
    at = grid(format, scales, (out, width))

    def shaped(x: jax.Array, fill: float) -> jax.Array:
        return jnp.pad(x, ((0, 0), (0, more)), constant_values=fill).reshape(out // size, size, width + more)

    at = Grid(shaped(at.step, 1.0), None if at.zero is None else shaped(at.zero, 0.0))
    q, w = shaped(q, 0.0), shaped(w.astype(jnp.float32), 0.0)
    late = jnp.diag((jnp.arange(width + more) >= width).astype(jnp.float32))
    h = jnp.pad(h, ((0, more), (0, more))) + late

    def batch(k: jax.Array, q: jax.Array) -> jax.Array:
        start = k * wide

        def columns(x: jax.Array) -> jax.Array:  # [C, B, b]
            return jnp.moveaxis(lax.dynamic_slice_in_dim(x, start, wide, 2), 2, 0)

        rows = lax.dynamic_slice_in_dim(h, start, wide, 0)
        linear = product(q - w, rows.T)
        linear = jnp.moveaxis(linear if g is None else product(g, linear), 2, 0)
        near = Grid(columns(at.step), None if at.zero is None else columns(at.zero))
        square = lax.dynamic_slice_in_dim(rows, start, wide, 1)

        def column(linear: jax.Array, now: tuple) -> tuple[jax.Array, jax.Array]:
            i, q, at, row = now
            new, moved = _column(format, q, linear[i], at, row[i], g)
            return linear + row[:, None, None] * moved[None], new

        _, new = lax.scan(column, linear, (jnp.arange(wide), columns(q), near, square))
        return lax.dynamic_update_slice_in_dim(q, jnp.moveaxis(new, 0, 2), start, 2)

    batches = (width + more) // wide
    q = lax.fori_loop(0, sweeps * batches, lambda i, q: batch(i % batches, q), q)
    return q[:, :, :width].reshape(out, width)


def _column(
    format: Format, q: jax.Array, linear: jax.Array, at: Grid, h: jax.Array, g: jax.Array | None
) -> tuple[jax.Array, jax.Array]:
    """New values `[B, b]` of one column, and G times their change; `h` is the column's own H_jj."""
    if g is None:
        new = nearest(format, q - linear / h, at)
        return new, new - q
    own = jnp.diagonal(g, axis1=1, axis2=2) * h
    place = jnp.arange(q.shape[1])[None]

    def proposal(q: jax.Array, moved: jax.Array) -> tuple[jax.Array, jax.Array]:
        slope = linear + h * moved
        new = nearest(format, q - slope / own, at)
        d = new - q
        return new, d * (2 * slope + (1 + _NOISE) * own * d)

    def move(state: tuple) -> tuple:
        tries, q, moved, new, gain = state
        best = jnp.argmin(gain, axis=1)[:, None]
        chosen = (place == best) & (gain < 0)
        by = jnp.sum(jnp.where(chosen, new - q, 0.0), axis=1, keepdims=True)
        q = jnp.where(chosen, new, q)
        moved = moved + by * jnp.take_along_axis(g, best[:, :, None], 1)[:, 0]
        return (tries + 1, q, moved, *proposal(q, moved))

    def unfinished(state: tuple) -> jax.Array:
        return (state[0] < 2 * q.shape[1]) & jnp.any(state[4] < 0)

    nothing = jnp.zeros_like(q)
    start = (jnp.int32(0), q, nothing, *proposal(q, nothing))
    _, q, moved, _, _ = lax.while_loop(unfinished, move, start)
    return q, moved


def move_blocks(
    format: Format,
    w: jax.Array,
    q: jax.Array,
    scales: Scales,
    candidates: jax.Array,
    h: jax.Array,
    g: jax.Array | None = None,
) -> tuple[jax.Array, Scales]:
    """Scales and values together, block by block, where the error falls: new `(q, scales)`.

    Formats without inner scales, with scales that serve several rows, or with blocks of more than 256 columns
    get their own back.

    Args:
      candidates: inner scales `[out, blocks, n]`, as `format.candidates` makes them.
      w, q, h, g: as in `sweep`.
    """
    if _fixed(format, scales) or w.shape[1] // candidates.shape[1] > _WIDEST:
        return q, scales
    upper = factor(local(h, candidates.shape[1]), False).upper
    return _moved(format, w, q, scales, candidates, h, upper, g)


def refit(
    format: Format, w: jax.Array, q: jax.Array, scales: Scales, h: jax.Array, g: jax.Array | None = None
) -> tuple[jax.Array, Scales]:
    """The legal scale nearest to the best one for fixed codes, block by block, where the error falls."""
    if _fixed(format, scales):
        return q, scales
    inner = jnp.asarray(scales["inner"])[..., None]
    return _moved(format, w, q, scales, inner, h, None, g)


def _fixed(format: Format, scales: Scales) -> bool:
    return "inner" not in scales or format.block_rows > 1


@jit(static_argnums=(0,))
def _moved(
    format: Format,
    w: jax.Array,
    q: jax.Array,
    scales: Scales,
    candidates: jax.Array,
    h: jax.Array,
    upper: jax.Array | None,
    g: jax.Array | None,
) -> tuple[jax.Array, Scales]:
    (out, width), (_, blocks, count) = w.shape, candidates.shape
    wide, size = width // blocks, out if g is None else g.shape[-1]
    groups = out // size
    tall = min(size, max(4, _LANES // (groups * count * wide)), size if g is None else _TALLEST)
    more = -size % tall

    def shaped(x: jax.Array) -> jax.Array:
        x = x.reshape(groups, size, *x.shape[1:])
        return jnp.pad(x, [(0, 0), (0, more)] + [(0, 0)] * (x.ndim - 2), mode="edge")

    d, q = shaped(q - w.astype(jnp.float32)), shaped(q)
    rows = {level: shaped(jnp.asarray(s)) for level, s in scales.items() if level != "outer"}
    choice = shaped(candidates)
    if g is not None:
        g = jnp.pad(g, ((0, 0), (0, more), (0, more)))
        g = g + jnp.diag((jnp.arange(size + more) >= size).astype(jnp.float32))[None]

    def block(k: jax.Array, state: tuple) -> tuple:
        d, q, inner = state
        across = lax.dynamic_slice_in_dim(h, k * wide, wide, 0)
        square = lax.dynamic_slice_in_dim(across, k * wide, wide, 1)
        linear = product(d, across.T)
        linear = linear if g is None else product(g, linear)
        old = lax.dynamic_slice_in_dim(q, k * wide, wide, 2)
        fixed = {level: s[:, :, k] for level, s in rows.items() if level == "zero"}
        fixed |= {level: s for level, s in scales.items() if level == "outer"}
        here = _Block(choice[:, :, k], fixed, square, None if upper is None else upper[k], g)

        def panel(r: jax.Array, rows: _Rows) -> _Rows:
            return _panel(format, tall, here, r * tall, rows)

        start = _Rows(old, inner[:, :, k], linear)
        new, chosen, _ = lax.fori_loop(0, (size + more) // tall, panel, start)
        d = lax.dynamic_update_slice_in_dim(
            d, lax.dynamic_slice_in_dim(d, k * wide, wide, 2) + new - old, k * wide, 2
        )
        q = lax.dynamic_update_slice_in_dim(q, new, k * wide, 2)
        return d, q, lax.dynamic_update_slice_in_dim(inner, chosen[:, :, None], k, 2)

    _, q, inner = lax.fori_loop(0, blocks, block, (d, q, rows["inner"]))
    return q[:, :size].reshape(out, width), {**scales, "inner": inner[:, :size].reshape(out, blocks)}


class _Block(NamedTuple):
    """One block of columns: candidates `[B, b, n]`, other scales, H_bb, U of H_bb (None: refit), and G."""

    choice: jax.Array
    fixed: Scales
    square: jax.Array
    upper: jax.Array | None
    g: jax.Array | None

    def at(self, format: Format, inner: jax.Array) -> Grid:
        """The grid of every row under inner scales `[B, p, n]`; `fixed` has the same rows."""
        zero = self.fixed["zero"].astype(jnp.float32)[..., None] if "zero" in self.fixed else None
        return Grid(format.step({**self.fixed, "inner": inner}), zero)


class _Rows(NamedTuple):
    """What changes: values `[B, b, S]`, inner scales `[B, b]` and the linear term R `[B, b, S]`."""

    q: jax.Array
    inner: jax.Array
    linear: jax.Array


def _panel(format: Format, tall: int, block: _Block, start: jax.Array, rows: _Rows) -> _Rows:
    """Rows `start` to `start + tall` of every block of G move; the linear terms of all rows follow."""

    def part(x: jax.Array) -> jax.Array:
        return lax.dynamic_slice_in_dim(x, start, tall, 1)

    def put(x: jax.Array, new: jax.Array) -> jax.Array:
        return lax.dynamic_update_slice_in_dim(x, new, start, 1)

    g = block.g
    own = None if g is None else lax.dynamic_slice(g, (0, start, start), (g.shape[0], tall, tall))
    now = _Rows(*(part(x) for x in rows))
    weight = jnp.ones_like(now.q[..., 0]) if own is None else jnp.diagonal(own, axis1=1, axis2=2)
    fixed = {level: part(s) if level == "zero" else s for level, s in block.fixed.items()}
    here = block._replace(choice=part(block.choice), fixed=fixed)
    if block.upper is None:
        d, new = _rescaled(format, here, now, weight)
    else:
        d, new = _babai(format, here, block.upper, now, weight)
    pushed = product(d, block.square)
    quadratic = weight * jnp.sum(d * pushed, -1)
    gain, least = quadratic + 2 * jnp.sum(d * now.linear, -1), -_NOISE * quadratic
    if own is None:
        accepted = gain < least
    else:
        accepted = _accepted(gain, least, own * product(d, jnp.swapaxes(pushed, 1, 2)))
    inner = jnp.where(accepted, new, now.inner)
    target = now.q + jnp.where(accepted[..., None], d, 0.0)
    q = nearest(format, target, here.at(format, inner[..., None]))  # the sum may be a unit off the grid
    linear = rows.linear
    if g is not None:
        change = jnp.where(accepted[..., None], pushed, 0.0)
        linear = linear + product(lax.dynamic_slice_in_dim(g, start, tall, 2), change)
    return _Rows(put(rows.q, q), put(rows.inner, inner), linear)


def _accepted(gain: jax.Array, least: jax.Array, cross: jax.Array) -> jax.Array:
    """Which changes `[B, p]` to make: the best first, while the others' gains follow; `cross [B, p, p]`."""
    place = jnp.arange(gain.shape[1])[None]

    def accept(state: tuple[jax.Array, jax.Array]) -> tuple[jax.Array, jax.Array]:
        gain, done = state
        best = jnp.argmin(jnp.where(done | (gain >= least), jnp.inf, gain), axis=1)[:, None]
        chosen = (place == best) & ~done & (gain < least)
        return gain + 2 * jnp.sum(jnp.where(chosen[:, :, None], cross, 0.0), 1), done | chosen

    def unfinished(state: tuple[jax.Array, jax.Array]) -> jax.Array:
        return jnp.any(~state[1] & (state[0] < least))

    return lax.while_loop(unfinished, accept, (gain, jnp.zeros(gain.shape, bool)))[1]


def _babai(
    format: Format, block: _Block, upper: jax.Array, now: _Rows, weight: jax.Array
) -> tuple[jax.Array, jax.Array]:
    """The best change `[B, p, S]` of each row's block over all candidates, and its scale."""
    at = block.at(format, block.choice)
    inverse = product(upper.T, upper)
    centre = jnp.moveaxis(now.q - product(now.linear, inverse) / weight[..., None], 2, 0)

    def column(owed: jax.Array, now: tuple) -> tuple[jax.Array, jax.Array]:
        i, centre, row = now
        t = centre[..., None] - owed[i]
        found = nearest(format, t, at)
        return owed + row[:, None, None, None] * ((t - found) / row[i])[None], found

    start = jnp.zeros((centre.shape[0], *at.step.shape), jnp.float32)
    _, values = lax.scan(column, start, (jnp.arange(centre.shape[0]), centre, upper))
    d = values - jnp.moveaxis(now.q, 2, 0)[..., None]  # [S, B, p, n]
    pushed = product(block.square, d.reshape(d.shape[0], -1)).reshape(d.shape)
    cost = weight[..., None] * jnp.sum(d * pushed, 0)
    cost = cost + 2 * jnp.sum(d * jnp.moveaxis(now.linear, 2, 0)[..., None], 0)
    best = jnp.argmin(cost, -1)[..., None]
    found = jnp.take_along_axis(d, best[None], -1)[..., 0]
    return jnp.moveaxis(found, 0, 2), jnp.take_along_axis(block.choice, best, -1)[..., 0]


def _rescaled(format: Format, block: _Block, now: _Rows, weight: jax.Array) -> tuple[jax.Array, jax.Array]:
    """The change `[B, p, S]` of each row's block when only its scale moves, and that scale."""
    quadratic = weight * jnp.sum(now.q * product(now.q, block.square), -1)
    live = quadratic > 0
    factors = 1 - jnp.sum(now.q * now.linear, -1) / jnp.where(live, quadratic, 1.0)
    factors = jnp.where(live, jnp.clip(factors, 0.25, 4.0), 1.0)
    new = format.rescaled({**block.fixed, "inner": now.inner}, factors)
    before, after = (block.at(format, s[..., None]) for s in (now.inner, new))
    code = format.element(divide(now.q, jnp.where(before.step == 0, 1.0, before.step)), before.zero)
    return code * after.step - now.q, new


def refine(
    format: Format,
    w: jax.Array,
    q: jax.Array,
    scales: Scales,
    h: jax.Array,
    g: jax.Array | None = None,
    rounds: int = 3,
    sweeps: int = 4,
    window: tuple[float, float, int] = (0.6, 1.6, 20),
    signed: bool = False,
) -> tuple[jax.Array, Scales]:
    """`rounds` times `move_blocks`, then `sweep`: new `(q, scales)`, never worse than those given.

    Args:
      window: low, high and count of `candidates`, around the scales of each round; signed: as there.
    """
    least = value(q - w, h, g)
    for _ in range(rounds):
        tried = candidates(format, scales, *window, signed)
        new, moved = move_blocks(format, w, q, scales, tried, h, g)
        new = sweep(format, w, new, moved, h, g, sweeps)
        now = value(new - w, h, g)
        if not now < least:
            break
        q, scales, least = new, moved, now
    return q, scales
