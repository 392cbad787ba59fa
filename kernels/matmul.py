"""Inputs times an encoded weight."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp

from mojax.errors import InputError
from mojax.formats.base import Array, Format, QTensor
from mojax.kernels.base import weight_of
from mojax.kernels.product import factors, multiply, rounded


def matmul(
    x: Array,
    q: QTensor,
    *,
    dtype: Any,
    bias: Array | None = None,
    inputs: Format | None = None,
    outer: Array | None = None,
) -> jax.Array:
    """`x [*batch, ..., in]` times `q [*batch, out, in]`, summed in float32, as `dtype [*batch, ..., out]`.

    A leaf of another layout is taken as its matrices: `out` and `in` are their axes in ascending order.

    Args:
      bias: `[out]`, added before rounding to `dtype`.
      inputs: a format that `x` is rounded to first; the product is then of the codes, as a server's is.
      outer: the static scale of `inputs`, float32 `[]`; None is that of `x` at hand.
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
    after = None
    if inputs is not None:
        x, after = rounded(x, inputs, outer)
    y = multiply(x, factors(w))
    y = y if after is None else y * after
    if bias is not None:
        y = y + jnp.asarray(bias, jnp.float32).reshape((1,) * (y.ndim - 1) + (-1,))
    return y.astype(dtype)
