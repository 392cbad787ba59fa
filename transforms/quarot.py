"""QuaRot: random Hadamard matrices turn the residual stream and the values of attention (arXiv 2404.00456).

    Q = diag(s) H / sqrt(n), s random signs     E <- E Q     W_in <- W_in diag(gain) Q     W_out <- Q^T W_out

A channel with outliers is spread over all of them, and the function stays as it is: RMSNorm(x Q) =
RMSNorm(x) Q. The values of every head are turned by one matrix of a layer, so that the query heads of a group
share it.
"""

from __future__ import annotations

import functools

from mojax.errors import InputError
from mojax.kernels.hadamard_matrices import signs
from mojax.transforms.base import Context, Params, Stats, Transform


def quarot(*, residual: bool = True, heads: bool = True, seed: int = 0) -> Transform:
    """Random Hadamard rotations, merged into the weights.

    Args:
      residual: turn the residual stream. A head that is tied to the embedding gets a tensor of its own.
      heads: turn the values of attention, each head in itself.
      seed: of the signs.
    Raises:
      InputError: neither is asked for, or a seed below 0.
    """
    turns = ("residual",) * bool(residual) + ("heads",) * bool(heads)
    if not turns:
        raise InputError("quarot: residual and heads are both false; remove the step")
    if isinstance(seed, bool) or not isinstance(seed, int) or seed < 0:
        raise InputError(f"quarot: seed is {seed!r}, needed a whole number, 0 or more")
    return Transform(functools.partial(_apply, seed), phase="model", turns=turns)


def _apply(seed: int, params: Params, stats: Stats, context: Context) -> Params:
    return {space.name: signs(seed, space.name, space.size) for space in context.spaces}
