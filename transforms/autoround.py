"""AutoRound: codes and scales, tuned by signed steps for the output of a whole block.

  q(w) = e s,   s = m times the given scale, to the nearest legal one,   e the element next to w / s that is
                nearest after an offset of V gaps between elements, |V| <= 1/2
  minimise mean |block_q(x~) - block(x)|^2,   x~ as earlier blocks pass it on
  V -= r sign(dV),   m -= r sign(dm),   r falls linearly to 0 and sums to 1/2

SignRound (arXiv 2309.05516). Gradients pass rounding straight through: dV has the sign of the gradient at the
weight, and dm is that of learned step sizes, sum (e - w / s) dq, with e alone beyond the largest element
(arXiv 1902.08153). `mojax/tuning.py` runs the block and keeps the best iterate.
"""

from __future__ import annotations

import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp

from mojax.errors import InputError
from mojax.formats.base import Format
from mojax.rounding.scales import Scales
from mojax.rounding.soft import moved, neighbours
from mojax.transforms.base import Transform
from mojax.tuning import Learner, Weight, grids, nearest, tune


class Knobs(NamedTuple):
    """What is learned of one weight.

    Attributes:
      offset: V, float32 `[*batch, out, in]`.
      factor: m, float32 of the shape of the inner scales; None where scales stay.
    """

    offset: jax.Array
    factor: jax.Array | None


def autoround(*, steps: int = 200, batch: int = 8, scales: bool = True, seed: int = 0) -> Transform:
    """Signed steps on the error of every block's output, from the codes of the steps before, or from nearest.

    Args:
      steps: of descent; 0 leaves everything as it is.
      batch: sequences in a step.
      scales: tune inner scales too.
      seed: which sequences come when.
    """
    if steps < 0 or batch < 1:
        raise InputError(f"autoround: steps is {steps}, needed 0 or more; batch is {batch}, needed 1 or more")
    learner = Learner(functools.partial(start, scales), used, move, final)
    work = functools.partial(tune, "autoround", learner, rates(steps), batch, seed)
    return Transform(functools.partial(nearest, "autoround"), encodes=True, phase="tune", tune=work)


def rates(steps: int) -> tuple[float, ...]:
    """What a step adds to or takes from V and m; falling to 0, 1/2 together."""
    return tuple((1 - (t + 0.5) / steps) / steps for t in range(steps))


def start(scales: bool, format: Format, weight: Weight) -> Knobs:
    """Knobs that change nothing."""
    fixed = not scales or "inner" not in weight.scales or format.block_rows > 1
    factor = None if fixed else jnp.ones(weight.scales["inner"].shape, jnp.float32)
    return Knobs(jnp.zeros_like(weight.near), factor)


def rescaled(format: Format, weight: Weight, knobs: Knobs) -> Scales:
    """The legal scales nearest to the learned ones."""
    if knobs.factor is None:
        return weight.scales
    return {**weight.scales, "inner": format.rescaled(weight.scales, knobs.factor)}


def used(format: Format, weight: Weight, knobs: Knobs) -> jax.Array:
    """The rounded weight."""
    return final(format, weight, knobs)[0]


def final(format: Format, weight: Weight, knobs: Knobs) -> tuple[jax.Array, Scales]:
    """The rounded weight and its scales."""
    scales = rescaled(format, weight, knobs)
    at = grids(format, scales, weight.near.shape)
    return moved(format, weight.near, knobs.offset, at), scales


def move(format: Format, weight: Weight, knobs: Knobs, slope: jax.Array, rate: jax.Array) -> Knobs:
    """One signed step."""
    offset = knobs.offset - rate * jnp.sign(slope)
    if knobs.factor is None:
        return Knobs(offset, None)
    q, scales = final(format, weight, knobs)
    at = grids(format, scales, q.shape)
    low, high = neighbours(format, weight.near, at)
    beyond = (low == high) & (jnp.abs(weight.near - q) > 0.5 * at.step)
    felt = slope * jnp.where(beyond, q, q - weight.near)
    felt = jnp.sum(felt.reshape(*knobs.factor.shape, -1), -1)
    return Knobs(offset, knobs.factor - rate * jnp.sign(felt))
