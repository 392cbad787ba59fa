"""DiscQuant: weights slide to the ends of their gaps where that does not hurt the output (arXiv 2501.06417).

  w = low + x (high - low),   x in [0, 1] from w = W
  x <- x - r (clip(rho d, -1, 1) - c),   d = dE / dx in units of its largest rms so far,   c = 2 x_0 - 1

`c` pulls every x to its nearer end and the error E holds those back that matter; at last x is rounded.

Experimental: the paper's E is the KL of the whole model's predictions to the source's, differentiated through
all blocks at once. A model goes by block by block here, so E is the mean squared error of a block's output.
"""

from __future__ import annotations

import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp

from mojax.errors import InputError
from mojax.formats.base import Format
from mojax.rounding.scales import Scales
from mojax.rounding.soft import Pair, neighbours, share
from mojax.transforms.base import Transform
from mojax.tuning import Learner, Weight, grids, nearest, tune


class Slide(NamedTuple):
    """Where a weight is.

    Attributes:
      x: float32 `[*batch, out, in]` in [0, 1].
      unit: float32 `[]`, the largest root mean square of dE / dx so far.
    """

    x: jax.Array
    unit: jax.Array


def discquant(
    *, steps: int = 200, batch: int = 8, rate: float = 0.05, rho: float = 2.0, seed: int = 0
) -> Transform:
    """Sliding of the weights of a block, from those of full precision. Experimental.

    Args:
      steps: of descent; 0 leaves everything as it is.
      batch: sequences in a step.
      rate: of the first step; it falls linearly to 0.
      rho: how strongly the error holds weights back.
      seed: which sequences come when.
    """
    if steps < 0 or batch < 1 or rate <= 0 or rho <= 0:
        raise InputError(
            f"discquant: steps is {steps}, needed 0 or more; batch is {batch}, needed 1 or more; rate is "
            f"{rate} and rho {rho}, both must be above 0"
        )
    learner = Learner(start, used, functools.partial(move, rho), final)
    rates = tuple(rate * (1 - t / steps) for t in range(steps))
    work = functools.partial(tune, "discquant", learner, rates, batch, seed)
    return Transform(functools.partial(nearest, "discquant"), encodes=True, phase="tune", tune=work)


def pair_of(format: Format, weight: Weight) -> Pair:
    """The ends of every gap."""
    return neighbours(format, weight.near, grids(format, weight.scales, weight.near.shape))


def start(format: Format, weight: Weight) -> Slide:
    """Every weight where it is in full precision, or at the nearest place that the given codes allow."""
    return Slide(share(weight.near, pair_of(format, weight)), jnp.float32(0))


def used(format: Format, weight: Weight, slide: Slide) -> jax.Array:
    """The weight between the ends."""
    low, high = pair_of(format, weight)
    return low + slide.x * (high - low)


def final(format: Format, weight: Weight, slide: Slide) -> tuple[jax.Array, Scales]:
    """The nearer ends, under the given scales."""
    low, high = pair_of(format, weight)
    return jnp.where(slide.x >= 0.5, high, low), weight.scales


def move(
    rho: float, format: Format, weight: Weight, slide: Slide, slope: jax.Array, rate: jax.Array
) -> Slide:
    """One step."""
    pair = pair_of(format, weight)
    d = slope * (pair.high - pair.low)
    unit = jnp.maximum(slide.unit, jnp.sqrt(jnp.mean(jnp.square(d))))
    c = 2 * share(weight.near, pair) - 1
    by = jnp.clip(rho * d / jnp.maximum(unit, 1e-30), -1.0, 1.0) - c
    return Slide(jnp.clip(slide.x - rate * by, 0.0, 1.0), unit)
