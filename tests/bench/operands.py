"""Random arrays and encoded tensors, made on the device: no weight is encoded to be timed."""

from __future__ import annotations

import math
from collections.abc import Callable
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from timing import copies

from mojax.errors import InputError
from mojax.formats.base import Format, QTensor
from mojax.kernels.base import compute_capability

BF16 = jnp.bfloat16


def normal(shape: tuple[int, ...], seed: int, dtype: Any = BF16, by: float = 1.0) -> jax.Array:
    return (jax.random.normal(jax.random.key(seed), shape, BF16) * BF16(by)).astype(dtype)


@partial(jax.jit, static_argnums=(0, 1, 3))
def encoded(format: Format, shape: tuple[int, ...], seed: Any, batch: int = 0) -> QTensor:
    """Random codes and scales of a tensor of this shape, whose first `batch` axes are batch axes."""
    contract = (len(shape) - 1,) if batch else ()
    like = format.spec(shape, np.dtype(BF16), contract, tuple(range(batch)))

    def fill(path: Any, a: jax.ShapeDtypeStruct) -> jax.Array:
        name = jax.tree_util.keystr(path)
        key = jax.random.fold_in(jax.random.key(seed), sum(map(ord, name)))
        if "codes" in name and jnp.issubdtype(a.dtype, jnp.integer):
            return jax.random.bits(key, a.shape, jnp.uint8).astype(a.dtype)
        if "codes" in name:  # E4M3 without its NaN
            return (jax.random.normal(key, a.shape) * 64).clip(-448, 448).astype(a.dtype)
        if a.dtype == jnp.uint8:  # exponents
            return jax.random.randint(key, a.shape, 116, 122).astype(jnp.uint8)
        span = (0.5, 2.0) if a.dtype.itemsize == 1 else (0.004, 0.008)
        return jax.random.uniform(key, a.shape, minval=span[0], maxval=span[1]).astype(a.dtype)

    return jax.tree_util.tree_map_with_path(fill, like)


def several(make: Callable[[int], Any], nbytes: float) -> list[Any]:
    return [make(i) for i in range(copies(nbytes))]


def loaded(q: QTensor) -> QTensor:
    """A weight as it rests on the device once it is loaded: in the order of the kernel that will read it."""
    if compute_capability() != 9:
        return q
    from mojax.kernels.gpu.weight_only import repack

    try:
        return jax.jit(repack)(q)
    except InputError:  # no kernel takes it: as files keep it
        return q


def weights(format: Format, shape: tuple[int, ...], batch: int = 0) -> list[QTensor]:
    size = format.spec(shape, np.dtype(BF16), (len(shape) - 1,) if batch else (), tuple(range(batch))).nbytes
    return several(lambda i: encoded(format, shape, i, batch), size)


def caches(format: Format | None, shape: tuple[int, ...]) -> list[tuple[Any, Any]]:
    if format is None:
        return several(lambda i: (normal(shape, i), normal(shape, i + 50)), 4 * math.prod(shape))
    nbytes = 2 * format.spec(shape, np.dtype(BF16)).nbytes
    return several(lambda i: (encoded(format, shape, i), encoded(format, shape, i + 50)), nbytes)
