"""Rows in groups, each group times a weight of its own, encoded or not: the experts of a mixture.

hopper grouped  codes become bfloat16 in registers, wgmma: kernels/gpu/grouped.py
cpu tiles       tiles of rows, each of one group; only groups that have rows are read or decoded
xla             `lax.ragged_dot`, which on a CPU multiplies every row with every weight; decodes all groups
"""

from __future__ import annotations

from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from mojax.errors import InputError
from mojax.formats.base import Array, Format, QTensor
from mojax.kernels.base import (
    Implementation,
    decoded,
    dispatch,
    in_file_order,
    pallas,
    same_dtype,
    weight_of,
)
from mojax.kernels.product import Factors, factors, multiply, rounded

TILE = 64  # rows at least; smaller wastes the multiplier, larger wastes rows of small groups


def grouped_matmul(
    x: Array,
    w: Array | QTensor,
    sizes: Array,
    *,
    dtype: Any,
    inputs: Format | None = None,
    outer: Array | None = None,
    implementation: str | None = None,
) -> jax.Array:
    """`x [rows, in]` times `w [groups, out, in]`, summed in float32, as `dtype [rows, out]`.

    Differentiable in `x`, and in `w` where it is an array; the gradient passes straight through the rounding
    of `x`.

    Args:
      sizes: int32 `[groups]`. The first `sizes[0]` rows meet matrix 0, the next `sizes[1]` matrix 1, and so
        on; rows beyond their sum give zeros.
      inputs, outer: a format that `x` is rounded to first, and its static scale, as in `matmul`.
      implementation: the name of one (above); None is the first that takes the arguments on this device.
    Raises:
      InputError: `x` is not `[rows, in]`, the weight has not one batch axis, `in` differs, `sizes` is not
        one integer per group, or no implementation takes these; the message has the reason of each.
    """
    x, sizes = jnp.asarray(x), jnp.asarray(sizes)
    if x.ndim != 2:
        raise InputError(f"grouped_matmul: inputs have shape {x.shape}; [rows, in] is needed")
    if isinstance(w, QTensor):
        w = weight_of("grouped_matmul", x, w, batch=1)
    elif w.ndim != 3 or w.shape[-1] != x.shape[-1]:
        raise InputError(f"grouped_matmul: inputs {x.shape} need a weight [groups, out, in], not {w.shape}")
    if sizes.shape != w.shape[:1] or not jnp.issubdtype(sizes.dtype, jnp.integer):
        raise InputError(
            f"grouped_matmul: sizes are {sizes.dtype} {sizes.shape}; weight {w.shape} needs int32 "
            f"{w.shape[:1]}"
        )
    sizes = sizes.astype(jnp.int32)
    inputs = inputs if x.size else None  # a maximum of nothing does not exist
    return _grouped(x, w, sizes, outer, np.dtype(dtype), inputs, implementation)


@partial(jax.custom_vjp, nondiff_argnums=(4, 5, 6))
def _grouped(
    x: jax.Array, w: Any, sizes: jax.Array, outer: Any, dtype: np.dtype, inputs: Any, only: str | None
) -> jax.Array:
    run = partial(dispatch, "grouped_matmul", IMPLEMENTATIONS, only=only)
    if inputs is None:
        return run(x, w, sizes, dtype=dtype)
    x, after = rounded(x, inputs, outer)
    y = run(x, w, sizes, dtype=np.dtype(np.float32))
    return (y if after is None else y * after).astype(dtype)


def _forward(
    x: jax.Array, w: Any, sizes: jax.Array, outer: Any, *how: Any
) -> tuple[jax.Array, tuple[Any, ...]]:
    return _grouped(x, w, sizes, outer, *how), (x, w, sizes, outer)


def _backward(dtype: np.dtype, inputs: Format | None, only: str | None, kept: Any, dy: jax.Array) -> tuple:
    x, w, sizes, outer = kept
    x = x if inputs is None else jnp.asarray(inputs.fake(x, outer))
    if isinstance(w, QTensor):  # codes have no gradient
        dx = jax.vjp(lambda x: _ragged(x, w, sizes, dtype=dtype), x)[1](dy)[0]
        return dx, jax.tree.map(_no_gradient, w), None, None
    return *jax.vjp(lambda x, w: _ragged(x, w, sizes, dtype=dtype), x, w)[1](dy), None, None


def _no_gradient(a: Any) -> Any:
    inexact = jnp.issubdtype(a.dtype, jnp.inexact)
    return jnp.zeros(a.shape, a.dtype) if inexact else np.zeros(a.shape, jax.dtypes.float0)


_grouped.defvjp(_forward, _backward)


def _ragged(x: jax.Array, w: Any, sizes: jax.Array, *, dtype: np.dtype) -> jax.Array:
    x, w = same_dtype(x, decoded(in_file_order(w)) if isinstance(w, QTensor) else w)
    numbers = lax.RaggedDotDimensionNumbers((((1,), (2,)), ((), ())), [0], [0])
    y = lax.ragged_dot_general(x, w, sizes, numbers, preferred_element_type=jnp.dtype(jnp.float32))
    return y.astype(dtype)


def _tiles(x: jax.Array, w: Any, sizes: jax.Array, *, dtype: np.dtype) -> jax.Array:
    """Tile after tile; rows of a tile that are the next group's are written again by that group's own."""
    tile = max(1, min(max(TILE, x.shape[0] // (8 * w.shape[0])), x.shape[0]))
    ends = jnp.cumsum(sizes)
    padded = jnp.pad(x, ((0, tile), (0, 0)))
    rows = lax.iota(jnp.int32, tile)

    def group(y: jax.Array, e: jax.Array) -> tuple[jax.Array, None]:
        end, start = ends[e], ends[e] - sizes[e]

        def some(y: jax.Array) -> jax.Array:
            packed = isinstance(w, QTensor)
            one = (
                factors(w.row(e))
                if packed
                else Factors((lax.dynamic_index_in_dim(w, e, keepdims=False),), None)
            )

            def step(state: tuple) -> tuple:
                at, y = state
                new = multiply(lax.dynamic_slice_in_dim(padded, at, tile), one).astype(dtype)
                new = jnp.where((at + rows < end)[:, None], new, jnp.zeros((), dtype))
                return at + tile, lax.dynamic_update_slice_in_dim(y, new, at, 0)

            return lax.while_loop(lambda s: s[0] < end, step, (start, y))[1]

        return lax.cond(sizes[e] > 0, some, lambda y: y, y), None

    out = jnp.zeros((x.shape[0] + tile, w.shape[1]), dtype)
    return lax.scan(group, out, lax.iota(jnp.int32, w.shape[0]))[0][: x.shape[0]]


def _not_here(*_: Any, **__: Any) -> str | None:
    return None if jax.default_backend() == "cpu" else "is for a CPU"


def _hopper() -> Implementation:
    made = pallas("hopper grouped", (9,), "grouped", "grouped")

    def why_not(x: Any, w: Any, sizes: Any, **rest: Any) -> str | None:
        return made.why_not(x, w, sizes, **rest) if isinstance(w, QTensor) else "the weight is not packed"

    return made._replace(why_not=why_not)


IMPLEMENTATIONS = (
    _hopper(),
    Implementation("cpu tiles", (), _not_here, _tiles),
    Implementation("xla", (), lambda *_, **__: None, _ragged),
)
