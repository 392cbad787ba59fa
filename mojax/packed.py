"""Operations of a program as calls of kernels: all those on packed parameters, and ragged_dot.

A kernel takes matrices `[*batch, out, in]`. The input is brought into that order and the result out of it;
the codes are never unpacked here. What a kernel cannot take is an error, not an array.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple, NoReturn

import jax
import jax.numpy as jnp
from jax import lax

from mojax.errors import InputError
from mojax.formats.base import Format, QTensor
from mojax.formats.leaf import axes, matrices, rows
from mojax.kernels.conv import conv
from mojax.kernels.grouped_matmul import grouped_matmul
from mojax.kernels.matmul import matmul
from mojax.kernels.take import take
from mojax.leaf import Leaf
from mojax.rules import Dims, Dot
from mojax.structure.graph import meeting
from mojax.view import Atom, View

KNOWN = ("dot_general", "ragged_dot_general", "conv_general_dilated", "gather")  # primitives with kernels


class Inputs(NamedTuple):
    """What the inputs of a product are rounded to; `outer` is the static scale, float32 `[]`, or None."""

    inputs: Format
    outer: Any = None


def rounds(rule: Dot) -> bool:
    """Whether the kernel of an operation can round its inputs; one of the user's own gets them rounded."""
    return rule.kernel is None and rule.op in ("dot", "ragged_dot")


def run(
    name: str,
    rule: Dot,
    params: Mapping[str, Any],
    dims: Dims,
    side: int,
    leaf: Leaf,
    x: jax.Array,
    others: Sequence[Any],
    out: Any,
    rounding: Inputs | None = None,
) -> jax.Array:
    """The operation of a place whose parameter is packed.

    Args:
      name: of the primitive.
      params, out: of the equation, and what it gives (shape and dtype).
      dims, side: which axes meet, and which operand the parameter is.
      others: its operands after the first two.
      rounding: what `x` is rounded to, where the kernel of `rule` `rounds`.
    Raises:
      InputError: no kernel takes this.
    """
    q = leaf.base.value
    if rule.kernel is not None:
        _unmoved(leaf, q)
        y = rule.kernel(x, q, params)
        if (y.shape, y.dtype) != (out.shape, out.dtype):
            raise InputError(
                f"rules: {name}: its kernel gave {y.dtype}{list(y.shape)}, the operation gives "
                f"{out.dtype}{list(out.shape)}"
            )
        return y
    if name not in KNOWN:
        _refuse(leaf, q, f"meets {name}, whose rule has no kernel")
    if rule.op == "gather":
        return _gather(params, leaf, q, x, out)
    if rule.op == "conv":
        _unmoved(leaf, q)
        known = "window_strides padding lhs_dilation rhs_dilation dimension_numbers feature_group_count"
        return conv(x, q, **{k: params[k] for k in known.split()}, dtype=out.dtype)
    q, order = _matrices(leaf, q, dims)
    _, partners = meeting(dims, leaf.view)
    batch = sorted(range(len(dims.batch)), key=lambda i: leaf.view.order(dims.batch[i]))
    paired = [p for i in batch if (p := dims.paired[i]) is not None]
    free = [d for d in range(x.ndim) if d not in (*partners, *paired)]
    lead = [x.shape[d] for d in (*paired, *free)]
    x = x.transpose(*paired, *free, *partners).reshape(*lead, math.prod(x.shape[d] for d in partners))
    how = {} if rounding is None else rounding._asdict()
    run_kernel = matmul if rule.op == "dot" else grouped_matmul
    kernel = run_kernel(x, q, *others, dtype=out.dtype, **how)
    in_root, n = sorted(order, key=_place), len(lead)
    y = kernel.reshape(*lead, *(a.size for a in in_root))
    y = y.transpose(*range(n), *(n + in_root.index(a) for a in order))
    b = len(paired)
    given = [batch.index(i) for i in range(b)]  # as the operation orders them
    width = y.ndim - n
    inputs, outputs = range(b, n), range(n, n + width)
    y = y.transpose(*given, *((*inputs, *outputs) if side else (*outputs, *inputs)))
    return y.reshape(out.shape)


def grouped(dims: Dims, x: jax.Array, w: jax.Array, sizes: jax.Array, dtype: Any) -> jax.Array:
    """A ragged_dot of arrays by the kernel: on a CPU XLA's own multiplies every row with every matrix."""
    (row,) = {0, 1} - set(dims.partners)
    (out,) = {0, 1, 2} - {*dims.batch, *dims.contract}
    w = w.transpose(*dims.batch, out, *dims.contract)
    return grouped_matmul(x.transpose(row, 1 - row), w, sizes, dtype=dtype)


def _place(a: Atom) -> tuple[int, int]:
    return a.axis or 0, -a.stride


def _matrices(leaf: Leaf, q: QTensor, dims: Dims) -> tuple[QTensor, list[Atom]]:
    """The parameter as a kernel takes it, and the atoms of its outputs in the order of the operation."""
    shown = tuple(
        tuple(a._replace(axis=None if a.axis is None else leaf.axis(a.axis)) for a in axis)
        for axis in leaf.view.axes
    )
    view = View(leaf.view.root, shown)
    batch, out, summed = (
        tuple(a for a in part if q.shape[a] > 1) for part in axes(q.shape, q.contract, q.batch)
    )
    free = [d for d in range(len(view.axes)) if d not in (*dims.contract, *dims.batch)]
    groups = sorted(dims.batch, key=view.order)
    if view.atoms(meeting(dims, view)[0]) != _whole(q, summed) or view.atoms(groups) != _whole(q, batch):
        _refuse(leaf, q, "is summed over other axes than it was packed for")
    order = [a for d in free for a in view.axes[d] if a.size > 1]
    joined = View(None, (tuple(sorted(order, key=_place)),)).atoms([0])
    if joined == _whole(q, out):
        return matrices(q), order
    if (
        len(joined) == len(out) == 1
        and joined[0].axis == out[0]
        and joined[0].stride == 1
        and joined[0].offset >= 0
        and not q.batch
    ):
        plain = dataclasses.replace(matrices(q), contract=(), batch=())
        return rows(plain, joined[0].offset, joined[0].size), order
    return _refuse(leaf, q, "is read in parts")


def _whole(q: QTensor, of: Sequence[int]) -> tuple[Atom, ...]:
    return tuple(Atom(a, 1, q.shape[a], 0) for a in of)


def _unmoved(leaf: Leaf, q: QTensor) -> None:
    """The parameter must be as it was given, but for casts."""
    left = [i for i in range(len(leaf.base.shape)) if i not in leaf.gone]
    expected = tuple((Atom(i, 1, n, 0),) for i, n in zip(left, q.shape, strict=True))
    if leaf.view.axes != expected:
        _refuse(leaf, q, "is transposed, reshaped or cut before it is used")


def _gather(params: Mapping[str, Any], leaf: Leaf, q: QTensor, x: jax.Array, out: Any) -> jax.Array:
    """`table[tokens]`; an index out of range gives NaN where the program fills, else the nearest row."""
    _unmoved(leaf, q)
    d = params["dimension_numbers"]
    last = (len(out.shape) - 1,)
    rows_of_table = (d.start_index_map, d.collapsed_slice_dims, d.offset_dims) == ((0,), (0,), last)
    if not rows_of_table or tuple(params["slice_sizes"]) != (1, *q.shape[1:]) or q.contract not in ((), (1,)):
        _refuse(leaf, q, "is looked up in another way than by rows")
    index = lax.squeeze(x, [x.ndim - 1])
    y = take(q, index, dtype=out.dtype)
    if params["fill_value"] is None or "FILL" not in str(params["mode"]):
        return y
    inside = (index >= 0) & (index < q.shape[0])
    return jnp.where(lax.expand_dims(inside, [inside.ndim]), y, jnp.asarray(params["fill_value"], out.dtype))


def _refuse(leaf: Leaf, q: QTensor, how: str) -> NoReturn:
    raise InputError(
        f"{leaf.base.name}: is packed ({q.format.label}) and {how}, for which there is no kernel; keep this "
        "parameter as it is, or call mojax.dequantize(model) first"
    )
