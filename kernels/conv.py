"""A convolution with an encoded kernel."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax

from mojax.errors import InputError
from mojax.formats.base import Array, QTensor
from mojax.kernels.base import decoded, same_dtype


def conv(
    x: Array,
    q: QTensor,
    *,
    window_strides: Sequence[int],
    padding: str | Sequence[tuple[int, int]],
    lhs_dilation: Sequence[int] | None = None,
    rhs_dilation: Sequence[int] | None = None,
    dimension_numbers: Any = None,
    feature_group_count: int = 1,
    batch_group_count: int = 1,
    dtype: Any,
) -> jax.Array:
    """`lax.conv_general_dilated` of `x` with the leaf `q`, summed in float32, as `dtype`.

    The arguments mean what they mean there. The kernel is decoded to its own dtype and to the leaf's shape.

    Raises:
      InputError: inputs and kernel differ in their number of axes or in their input features.
    """
    x = jnp.asarray(x)
    if x.ndim != len(q.shape):
        raise InputError(f"conv: inputs {x.shape} and kernel {q.shape} have {x.ndim} and {len(q.shape)} axes")
    numbers = lax.conv_dimension_numbers(x.shape, q.shape, dimension_numbers)
    needed = q.shape[numbers.rhs_spec[1]] * feature_group_count
    if x.shape[numbers.lhs_spec[1]] != needed:
        raise InputError(
            f"conv: inputs {x.shape} have {x.shape[numbers.lhs_spec[1]]} features; kernel {q.shape} with "
            f"{feature_group_count} feature groups needs {needed}"
        )
    y = lax.conv_general_dilated(
        *same_dtype(x, decoded(q)),
        window_strides,
        padding,
        lhs_dilation,
        rhs_dilation,
        numbers,
        feature_group_count,
        batch_group_count,
        preferred_element_type=jnp.dtype(jnp.float32),
    )
    return y.astype(dtype)
