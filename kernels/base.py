"""What kernels share: the decoded weight, and how its matrices meet the inputs."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp

from mojax.errors import InputError
from mojax.formats.base import QTensor
from mojax.formats.leaf import matrices
from mojax.formats.numerics import narrow


def decoded(q: QTensor) -> jax.Array:
    """A QTensor in the weight's own dtype `q.dtype`, of the leaf's shape."""
    # Rounded in float32 first, so that no compiler can drop the rounding by cancelling a pair of casts.
    return narrow(jnp.asarray(q.format.decode(q)), q.dtype).astype(q.dtype)


def weight_of(kernel: str, x: Any, q: QTensor, batch: int | None = None) -> QTensor:
    """The weight as matrices `[*batch, out, in]`, if inputs `x [..., in]` fit it.

    Raises:
      InputError: `in` differs, or there are not `batch` batch axes (None: any number).
    """
    w = matrices(q)
    if batch is not None and len(w.batch) != batch:
        raise InputError(
            f"{kernel}: the weight has shape {q.shape} with batch axes {q.batch}; needed: {batch}"
        )
    if not x.ndim or x.shape[-1] != w.shape[-1]:
        raise InputError(
            f"{kernel}: inputs {x.shape} and weight {w.shape} differ in their last axis, which is summed over"
        )
    return w


def same_dtype(x: jax.Array, w: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Both operands in the dtype they have in common, else in float32."""
    dtype = x.dtype if x.dtype == w.dtype else jnp.float32
    return x.astype(dtype), w.astype(dtype)
