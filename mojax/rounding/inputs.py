"""What rounding an input costs in the outputs of the weights that read it.

cost = sum over tokens e A e^T,   e = round(x) - x,   A = sum over the weights W^T W
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from mojax.formats.base import Format
from mojax.formats.numerics import narrow
from mojax.rounding.objective import product


def gram_of(weights: Sequence[Any]) -> jax.Array:
    """A = sum W^T W, float32 `[in, in]`, of weights `[out, in]` that read one input."""
    total = jnp.zeros((weights[0].shape[-1],) * 2, jnp.float32)
    for w in weights:
        w = w.astype(jnp.float32)
        total = total + product(w.T, w)
    return total


def rounded(format: Format, x: jax.Array, top: jax.Array, dtype: np.dtype) -> tuple[jax.Array, jax.Array]:
    """`x [tokens, in]` in `dtype` as a server has it, and as it rounds it; both float32.

    Args:
      top: float32 `[]`, the largest magnitude that a static scale is for.
    """
    x = narrow(x, dtype)  # a cast there and back may be left out by XLA on a CPU, inside a product
    q = format.fake(x.astype(dtype), format.outer(top, dtype) if format.static else None)
    return x, narrow(jnp.asarray(q).astype(jnp.float32), dtype)


def cost(e: jax.Array, a: jax.Array) -> jax.Array:
    """sum over tokens of e A e^T, float32 `[]`, for `e [tokens, in]`."""
    return jnp.sum(product(e, a) * e)
