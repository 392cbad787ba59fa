"""AdaRound: whether each weight goes up or down is learned, all at once (arXiv 2004.10568).

  w~ = low + h (high - low),   h = clip(1.2 sigmoid(v) - 0.1, 0, 1)
  minimise  tr(G D H D^T) / unit + strength * sum (1 - |2 h - 1|^b),   D = w~ - W

by Adam over v, from w~ = W. The second term is off for the first fifth; then b falls from 20 to 2, so that
every h ends at 0 or 1. `unit` is the error per weight of what is given, so that strength means the same for
every layer. low and high are the neighbours of W under the scales of the step before, or the format's own.
Where a step before has chosen codes, one of the two is its choice, h begins closer to it, and the second term
is on from the start.
"""

from __future__ import annotations

import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax

from mojax.compile import jit
from mojax.errors import InputError
from mojax.matrices import Matrix, Solved, encode, error, unchanged
from mojax.rounding.objective import left, product
from mojax.rounding.scales import grid
from mojax.rounding.soft import Pair, inside, neighbours, share
from mojax.transforms.base import Context, Params, Stats, Transform

STRETCH = 0.1  # beyond 0 and 1, so that a sigmoid reaches both
WARM = 0.2  # of the steps without the second term
TRUST = 0.7  # how far from W to given codes h begins


def adaround(
    *, steps: int = 500, rate: float = 0.05, strength: float = 10.0, damping: float = 0.01
) -> Transform:
    """Learned rounding of each matrix; never worse than what is given on tr(G D H D^T).

    Args:
      steps: of Adam; each is a product of the matrix with H.
      rate: of Adam.
      strength: of what drives h to 0 or 1.
      damping: as in gptq.
    """
    if steps < 1 or rate <= 0 or strength <= 0:
        raise InputError(
            f"adaround: steps is {steps}, rate {rate} and strength {strength}, all must be above 0"
        )
    work = functools.partial(solve, steps=steps, rate=rate, strength=strength, damping=damping)
    return Transform(
        functools.partial(_apply, work), ("gram", "count"), encodes=True, phase="encode", chooses=True
    )


def _apply(solve: Any, params: Params, stats: Stats, context: Context) -> Params:
    return encode("adaround", params, stats, context, solve)


def solve(m: Matrix, *, steps: int, rate: float, strength: float, damping: float) -> Solved:
    """One matrix."""
    if not m.seen:
        return unchanged(m, "no calibration token reached it, so it is rounded to nearest")
    h, g = m.objective(damping)
    w, values = jnp.asarray(m.w).astype(jnp.float32), m.values
    before = error(m, values, h, g)
    at = grid(m.format, m.scales, (w.shape[0], w.shape[1]))
    near = inside(m.format, w, values, at)
    pair = neighbours(m.format, near, at)
    start = share(near, pair)
    if m.q is not None:
        start = start + TRUST * ((start >= 0.5).astype(jnp.float32) - start)
    schedule = Schedule(steps, rate, strength, WARM if m.q is None else 0.0)
    up = learned(w, start, pair, h, g, before / w.size, schedule)
    found = jnp.where(up > 0.5, pair.high, pair.low)
    after = error(m, found, h, g)
    if not after < before:
        return Solved(m.scales, values, before, before)
    return Solved(m.scales, found, before, after)


class Schedule(NamedTuple):
    """How `learned` goes: the options of `adaround`, and the share of the steps without the second term."""

    steps: int
    rate: float
    strength: float
    warm: float


def learned(
    w: jax.Array,
    start: jax.Array,
    pair: Pair,
    h: jax.Array,
    g: jax.Array | None,
    unit: float,
    schedule: Schedule,
) -> jax.Array:
    """`h` of every weight, float32 `[out, in]` in [0, 1].

    Args:
      w: float32 `[out, in]`, the target; start: of the same shape, h at the beginning.
      h, g: damped, as in `mojax.rounding.objective`.
      unit: what the error is measured in.
    """
    return _learned(schedule, w, start, pair, h, g, jnp.float32(max(unit, 1e-30)))


@jit(static_argnums=(0,))
def _learned(
    schedule: Schedule,
    w: jax.Array,
    start: jax.Array,
    pair: Pair,
    h: jax.Array,
    g: jax.Array | None,
    unit: jax.Array,
) -> jax.Array:
    steps, rate, strength, warm = schedule
    gap = pair.high - pair.low

    def step(t: jax.Array, state: tuple) -> tuple:
        v, mean, square = state
        done = t.astype(jnp.float32) / steps
        up, slope = jax.vjp(soft, v)
        pull = 2 * left(g, product(pair.low + up * gap - w, h)) * gap / unit
        (d,) = slope(pull + strength * jnp.where(done >= warm, _vertex(up, (done - warm) / (1 - warm)), 0.0))
        mean, square = 0.9 * mean + 0.1 * d, 0.999 * square + 0.001 * jnp.square(d)
        k = t.astype(jnp.float32) + 1
        by = (mean / (1 - 0.9**k)) / (jnp.sqrt(square / (1 - 0.999**k)) + 1e-8)
        return v - rate * by, mean, square

    v = hard(start)
    return soft(lax.fori_loop(0, steps, step, (v, jnp.zeros_like(v), jnp.zeros_like(v)))[0])


def soft(v: jax.Array) -> jax.Array:
    """h of v."""
    return jnp.clip(jax.nn.sigmoid(v) * (1 + 2 * STRETCH) - STRETCH, 0.0, 1.0)


def hard(h: jax.Array) -> jax.Array:
    """v of h in [0, 1]."""
    p = (h + STRETCH) / (1 + 2 * STRETCH)
    return jnp.log(p) - jnp.log1p(-p)


def _vertex(h: jax.Array, done: jax.Array) -> jax.Array:
    """The slope of 1 - |2 h - 1|^b when `done` of its steps are."""
    b = 2 + 18 * 0.5 * (1 + jnp.cos(jnp.pi * jnp.clip(done, 0.0, 1.0)))
    x = 2 * h - 1
    return -2 * b * jnp.sign(x) * jnp.abs(x) ** (b - 1)
