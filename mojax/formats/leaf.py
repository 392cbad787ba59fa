"""A leaf of any shape as matrices `[*batch, out, in]`: encoding it, and taking parts of what was encoded.

Every entry along the batch axes is encoded exactly as a weight `[out, in]` of its own would be.
"""

from __future__ import annotations

import dataclasses
import math
import operator
from collections.abc import Sequence
from functools import partial
from typing import TYPE_CHECKING, Any

import jax
import jax.numpy as jnp
import numpy as np

from mojax.errors import InputError

if TYPE_CHECKING:
    from mojax.formats.base import Array, Format, QTensor

Axes = tuple[int, ...]
Shape = tuple[int, ...]


def axes(shape: Shape, contract: Axes, batch: Axes) -> tuple[Axes, Axes, Axes]:
    """The axes of `shape` as (batch, out, contract), each ascending; `contract = ()` is the last axis.

    Raises:
      InputError: an axis does not exist, or is named twice.
    """
    ndim = len(shape)
    named = (*batch, *(contract or (-1,)))
    if not all(-ndim <= a < ndim for a in named) or len({a % ndim for a in named}) < len(named):
        raise InputError(
            f"shape {shape}: contract={contract} and batch={batch} must name different axes, each one of "
            f"{ndim}"
        )
    batch, contract = (tuple(sorted(a % ndim for a in part)) for part in (batch, contract or (-1,)))
    return batch, tuple(a for a in range(ndim) if a not in (*batch, *contract)), contract


def canonical_shape(shape: Shape, contract: Axes, batch: Axes) -> Shape:
    """`(*batch, out, in)` of a leaf of this shape."""
    b, out, c = axes(shape, contract, batch)
    return (*(shape[a] for a in b), math.prod(shape[a] for a in out), math.prod(shape[a] for a in c))


def canonical(w: Any, contract: Axes, batch: Axes) -> Any:
    """A leaf as matrices `[*batch, out, in]`: `out` and `in` are their axes flattened in ascending order.

    Raises:
      InputError: an axis does not exist, or is named twice.
    """
    b, out, c = axes(w.shape, contract, batch)
    return w.transpose(*b, *out, *c).reshape(canonical_shape(w.shape, contract, batch))


def restore(matrices: Any, shape: Shape, contract: Axes, batch: Axes) -> Any:
    """The inverse of `canonical`: `[*batch, out, in]` to a leaf of `shape`.

    Raises:
      InputError: an axis does not exist, or is named twice.
    """
    order = sum(axes(shape, contract, batch), ())
    return matrices.reshape([shape[a] for a in order]).transpose(*(order.index(a) for a in range(len(shape))))


def check_leaf(format: Format, shape: Shape, contract: Axes, batch: Axes) -> str | None:
    """Why a leaf of this shape cannot be encoded, in `Format.check`'s words on its `[out, in]`, or None."""
    if not contract and not batch:
        return format.check(shape)
    return format.check(canonical_shape(shape, contract, batch)[-2:])


def encode_leaf(
    format: Format, w: Array, contract: Axes = (), batch: Axes = (), outer: Array | None = None
) -> QTensor:
    """Round a leaf of any shape to nearest.

    Args:
      w: in the checkpoint's dtype.
      contract: axes that are summed over, along which blocks run; `()` is the last.
      batch: axes along which every entry is a matrix with scales of its own.
      outer: float32 `[*batch]`, as `outer_leaf` gives, or None: every matrix has its own.
    Raises:
      InputError: an axis does not exist or is named twice; `outer` has another shape.
    """
    b, _, c = axes(w.shape, contract, batch) if contract or batch else ((), (), ())
    sizes = tuple(w.shape[a] for a in b)
    if b and outer is not None and np.shape(outer) != sizes:
        raise InputError(f"outer has shape {np.shape(outer)}; batch axes {b} of {w.shape} need {sizes}")
    return _encode(format, w, c, b, outer)


def outer_leaf(format: Format, w: Array, contract: Axes = (), batch: Axes = ()) -> Array:
    """The outer scales that the matrices of a leaf have of their own, float32 `[*batch]`.

    Raises:
      InputError: an axis does not exist, or is named twice.
      TypeError: this format has no outer scale.
    """
    return _outer(format, w, axes(w.shape, contract, batch)[0])


@partial(jax.jit, static_argnums=(0, 2, 3), inline=True)
def _encode(format: Format, w: jax.Array, contract: Axes, batch: Axes, outer: Array | None) -> QTensor:
    if not contract and not batch:
        return format.encode(w, outer)
    encode = format.encode
    for _ in batch:
        encode = jax.vmap(encode)
    q = encode(canonical(w, contract, batch), outer)
    return dataclasses.replace(q, shape=tuple(w.shape), contract=contract, batch=batch)


@partial(jax.jit, static_argnums=(0, 2), inline=True)
def _outer(format: Format, w: jax.Array, batch: Axes) -> jax.Array:
    rest = tuple(a for a in range(w.ndim) if a not in batch)
    find = partial(format.own_outer, dtype=np.dtype(w.dtype), outer=None)
    for _ in batch:
        find = jax.vmap(find)
    return find(jnp.max(jnp.abs(w.astype(jnp.float32)), axis=rest))


def decode_leaf(q: QTensor) -> jax.Array:
    """float32 of the leaf's shape, for a QTensor with `contract` or `batch`; what `Format.decode` calls."""
    shape = canonical_shape(q.shape, q.contract, q.batch)[-2:]

    def one(codes: Any, scales: dict[str, Any]) -> Any:
        return q.format.decode(
            dataclasses.replace(q, codes=codes, scales=scales, shape=shape, contract=(), batch=())
        )

    for _ in q.batch:
        one = jax.vmap(one)
    return restore(one(q.codes, q.scales), q.shape, q.contract, q.batch)


def matrices(q: QTensor) -> QTensor:
    """The same codes and scales as a QTensor of shape `(*batch, out, in)`, whatever the leaf's shape is."""
    if not q.contract and not q.batch:
        return q
    n = len(q.batch)
    shape = canonical_shape(q.shape, q.contract, q.batch)
    return dataclasses.replace(q, shape=shape, contract=(n + 1,), batch=tuple(range(n)))


def row(q: QTensor, i: Any, axis: int | None = None) -> QTensor:
    """Entry `i` (an int, or a traced integer scalar) of a batch axis; numpy stays numpy for an int.

    Args:
      axis: one of `q.batch`; None is the first.
    Raises:
      InputError: there is no such batch axis, or no such entry.
    """
    if not q.batch:
        raise InputError(f"a QTensor of shape {q.shape} without batch axes has no rows to take")
    if axis not in (None, *q.batch):
        raise InputError(f"axis {axis} of a QTensor of shape {q.shape} is none of its batch axes {q.batch}")
    first = q.batch[0] if axis is None else axis
    at, others = q.batch.index(first), [a for a in q.batch if a != first]
    if not isinstance(i, jax.Array):
        i = operator.index(i)
        if not -q.shape[first] <= i < q.shape[first]:
            raise InputError(
                f"row {i} of a QTensor of shape {q.shape} with {q.shape[first]} rows (axis {first})"
            )

    def take(a: Any) -> Any:
        if isinstance(i, int):
            return a[(slice(None),) * at + (i, ...)]
        return jax.lax.dynamic_index_in_dim(a, i, at, keepdims=False)

    return dataclasses.replace(
        q,
        codes=take(q.codes),
        scales={level: take(a) for level, a in q.scales.items()},
        shape=(*q.shape[:first], *q.shape[first + 1 :]),
        contract=tuple(a - (a > first) for a in q.contract),
        batch=tuple(a - (a > first) for a in others),
    )


def stack_rows(rows: Sequence[QTensor]) -> QTensor:
    """QTensors that are alike, stacked along a new first batch axis; all numpy gives numpy.

    Raises:
      InputError: there are none, one differs from the first, or they are neither matrices nor leaves.
    """
    if not rows:
        raise InputError("no rows to stack; at least one is needed")
    first = rows[0]
    for i, q in enumerate(rows):
        for what in ("format", "shape", "dtype", "contract", "batch"):
            if getattr(q, what) != getattr(first, what):
                raise InputError(
                    f"row {i} has {what} {getattr(q, what)}, row 0 has {getattr(first, what)}; rows of one "
                    "stack must be alike"
                )
        if jax.tree.structure(q) != jax.tree.structure(first):
            raise InputError(f"row {i} has scales {sorted(q.scales)}, row 0 has {sorted(first.scales)}")
    if len(first.shape) != 2 and not first.contract and not first.batch:
        raise InputError(
            f"rows of shape {first.shape}: matrices [out, in], or leaves with contract, are needed"
        )

    def stack(*arrays: Any) -> Any:
        return np.stack(arrays) if all(isinstance(a, np.ndarray) for a in arrays) else jnp.stack(arrays)

    q = jax.tree.map(stack, *rows)
    return dataclasses.replace(
        q,
        shape=(len(rows), *q.shape),
        contract=tuple(a + 1 for a in q.contract or (len(q.shape) - 1,)),
        batch=(0, *(a + 1 for a in q.batch)),
    )


def rows(q: QTensor, start: int, size: int) -> QTensor:
    """Rows `start` to `start + size` of a QTensor `[out, in]`, under the same outer scale.

    Raises:
      InputError: not a plain `[out, in]`; no such rows; they begin or end inside a block of scales.
    """
    end, height = start + size, q.format.block_rows
    if len(q.shape) != 2 or q.contract or q.batch:
        raise InputError(f"rows of a QTensor [out, in] can be taken, not of shape {q.shape}, batch {q.batch}")
    if not 0 <= start < end <= q.shape[0]:
        raise InputError(f"rows {start} to {end} of a QTensor of shape {q.shape} do not exist")
    if start % height or (end % height and end != q.shape[0]):
        raise InputError(
            f"rows {start} to {end} of shape {q.shape}: {q.format.label} has one scale per {height} rows, so "
            f"parts must begin and end at multiples of {height}; use a format with a scale per row"
        )
    scales = {
        level: a if level == "outer" else a[start // height : -(-end // height)]
        for level, a in q.scales.items()
    }
    return dataclasses.replace(q, codes=q.codes[start:end], scales=scales, shape=(size, q.shape[1]))
