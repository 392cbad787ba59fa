"""Rows of an encoded table, such as an embedding; only those that are looked up are decoded."""

from __future__ import annotations

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp

from mojax.errors import InputError
from mojax.formats.base import Array, QTensor
from mojax.formats.leaf import matrices
from mojax.kernels.base import decoded


def take(q: QTensor, indices: Array, *, dtype: Any) -> jax.Array:
    """Rows `indices [...]` of `q [rows, in]`, as `dtype [..., in]`.

    Each row is decoded as a matrix of one row, in the weight's own dtype. An index out of range reads the
    nearest row.

    Raises:
      InputError: the weight is no matrix or has batch axes; the indices are not integers.
    """
    table, indices = matrices(q), jnp.asarray(indices)
    if table.batch or len(table.shape) != 2:
        raise InputError(
            f"take: the weight has shape {q.shape} with batch axes {q.batch}; needed: [rows, in]"
        )
    if not jnp.issubdtype(indices.dtype, jnp.integer):
        raise InputError(f"take: indices are {indices.dtype} {indices.shape}; integers are needed")
    flat, height = indices.reshape(-1), q.format.block_rows

    def scale(level: str, array: Any) -> jax.Array:
        if level == "outer":
            return jnp.broadcast_to(jnp.asarray(array), flat.shape)
        return jnp.take(array, flat // height, axis=0, mode="clip")[:, None]

    found = dataclasses.replace(
        table,
        codes=jnp.take(table.codes, flat, axis=0, mode="clip")[:, None],
        scales={level: scale(level, array) for level, array in table.scales.items()},
        shape=(len(flat), 1, table.shape[1]),
        contract=(2,),
        batch=(0,),
    )
    return decoded(found).reshape(*indices.shape, table.shape[1]).astype(dtype)
