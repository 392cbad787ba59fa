"""A QTensor back in floating point."""

from __future__ import annotations

import dataclasses
from typing import Any

import jax
import numpy as np

from mojax.formats.base import QTensor
from mojax.kernels.base import Implementation, decoded, dispatch, pallas


def _reference(q: QTensor, *, dtype: Any = None) -> jax.Array:
    return decoded(q if dtype is None else dataclasses.replace(q, dtype=np.dtype(dtype)))


def _why_not(q: QTensor, *, dtype: Any = None) -> str | None:
    return f"the codes are in the order {q.order!r} of a kernel" if q.order else None


IMPLEMENTATIONS = (
    pallas("mosaic", (9, 10), "dequantize", "dequantize"),
    Implementation("xla", (), _why_not, _reference),
)


def dequantize(q: QTensor, *, dtype: Any = None, implementation: str | None = None) -> jax.Array:
    """`q.format.decode(q)`, rounded once to `dtype`.

    Args:
      q: of any shape and format.
      dtype: of the result; None: `q.dtype`.
      implementation: "mosaic" or "xla"; None: the first that takes the arguments on the default device.
    Returns:
      An array of shape `q.shape`.
    Raises:
      InputError: the codes are in the order of a kernel; `implementation` cannot take them.
    """
    return dispatch("dequantize", IMPLEMENTATIONS, q, dtype=dtype, only=implementation)
