"""Inputs times an encoded weight."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
from jax import lax

from mojax.errors import InputError
from mojax.formats.base import Array, QTensor
from mojax.kernels.base import decoded, same_dtype, weight_of


def matmul(x: Array, q: QTensor, *, dtype: Any) -> jax.Array:
    """`x [*batch, ..., in]` times `q [*batch, out, in]`, summed in float32, as `dtype [*batch, ..., out]`.

    A leaf of another layout is taken as its matrices: `out` and `in` are their axes in ascending order. The
    weight is decoded to its own dtype.

    Raises:
      InputError: `in` or the batch axes of inputs and weight differ.
    """
    x = jnp.asarray(x)
    w = weight_of("matmul", x, q)
    n = len(w.batch)
    if x.ndim <= n or x.shape[:n] != w.shape[:n]:
        raise InputError(
            f"matmul: inputs {x.shape} do not begin with the batch {w.shape[:n]} of weight {w.shape}"
        )
    lead = tuple(range(n))
    operands = same_dtype(x, decoded(w))
    dimensions = (((x.ndim - 1,), (n + 1,)), (lead, lead))
    return lax.dot_general(*operands, dimensions, preferred_element_type=jnp.float32).astype(dtype)
