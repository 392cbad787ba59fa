"""What products, convolutions and lookups make of axes: which ones meet, which cannot be cut."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence

from mojax.structure.couplings import Array, Step, fresh, lost, meet_window, pieces, unknown
from mojax.structure.dims import Dim, factor, freeze, unify
from mojax.structure.positions import LOOKUPS


def dot(s: Step) -> list[Array]:
    return [_product(s, *s.op.params["dimension_numbers"])]


def _product(s: Step, contract: Sequence, batch: Sequence, groups: Sequence[int] = ()) -> Array:
    left, right = s.inputs[:2]
    for i, j in (*zip(*contract, strict=True), *zip(*batch, strict=True)):
        unify(left[i], right[j], s.reason)
    free = [d for i, d in enumerate(left) if i not in (*contract[0], *batch[0])]
    free += [d for j, d in enumerate(right) if j not in (*contract[1], *batch[1], *groups)]
    return [*(left[i] for i in batch[0]), *free]


def ragged_dot(s: Step) -> list[Array]:
    """Rows in groups, a matrix per group; other forms are those of gradients."""
    numbers = s.op.params["ragged_dot_dimension_numbers"]
    contract, batch = numbers.dot_dimension_numbers
    groups, rows = numbers.rhs_group_dimensions, numbers.lhs_ragged_dimensions
    if len(groups) != 1 or rows[0] in (*contract[0], *batch[0]):
        return unknown(s)
    freeze(s.inputs[0][rows[0]], s.reason)
    unify(s.inputs[1][groups[0]], s.inputs[2][-1], s.reason)
    return [_product(s, contract, batch, groups)]


def conv(s: Step) -> list[Array]:
    """Channels meet as in a product, in groups of them if there are any; windows cannot be cut."""
    p, (image, kernel) = s.op.params, s.inputs
    (n, c, *space), (o, i, *window), (out_n, out_c, *out_space) = p["dimension_numbers"]
    groups = p["feature_group_count"]
    if p["batch_group_count"] != 1:
        return unknown(s)
    channels = image[c]
    if groups > 1:
        group, channels = pieces(image[c], (groups, image[c].size // groups), s.reason, factor)
        unify(group, pieces(kernel[o], (groups, kernel[o].size // groups), s.reason, factor)[0], s.reason)
    unify(channels, kernel[i], s.reason)
    out = fresh(s.op.outputs[0].shape, s.reason)
    out[out_n], out[out_c] = image[n], kernel[o]
    for at, (d, w) in enumerate(zip(space, window, strict=True)):
        plain = p["window_strides"][at] == p["lhs_dilation"][at] == 1 and tuple(p["padding"][at]) == (0, 0)
        if kernel[w].size == 1 and plain:
            out[out_space[at]] = image[d]
        else:
            freeze(image[d], s.reason)
            freeze(kernel[w], s.reason)
    return [out]


def window(s: Step) -> list[Array]:
    """A reduction of windows: axes with a window of 1 stay."""
    (dims, *more), shape, sizes = s.inputs, s.op.outputs[0].shape, s.op.params["window_dimensions"]
    if any(more):
        return unknown(s)
    axes = zip(dims, shape, sizes, strict=True)
    return [[d if w == 1 and d.size == n else lost(d, n, s.reason) for d, n, w in axes]]


# Lookups


def gather(s: Step) -> list[Array]:
    """Axes that are taken whole stay; one that is indexed is frozen, unless its own positions index it."""
    table, places = s.inputs
    numbers, sizes = s.op.params["dimension_numbers"], s.op.params["slice_sizes"]
    looked_up = _look_up(s, table, numbers.start_index_map)
    _pair(s, table, numbers.operand_batching_dims, numbers.start_indices_batching_dims)
    gone = (*numbers.collapsed_slice_dims, *numbers.operand_batching_dims)
    rows, taken = iter(places[:-1]), iter(i for i in range(len(table)) if i not in gone)
    out = []
    for at, n in enumerate(s.op.outputs[0].shape):
        if at not in numbers.offset_dims:
            out.append(next(rows))
            continue
        axis = next(taken)
        whole = sizes[axis] == table[axis].size
        out.append(table[axis] if whole else Dim(n) if axis in looked_up else lost(table[axis], n, s.reason))
    return [out]


def scatter(s: Step) -> list[Array]:
    table, places, new = s.inputs
    numbers = s.op.params["dimension_numbers"]
    looked_up = _look_up(s, table, numbers.scatter_dims_to_operand_dims)
    _pair(s, table, numbers.operand_batching_dims, numbers.scatter_indices_batching_dims)
    gone = (*numbers.inserted_window_dims, *numbers.operand_batching_dims)
    rows, kept = iter(places[:-1]), iter(i for i in range(len(table)) if i not in gone)
    for at, d in enumerate(new):
        if at not in numbers.update_window_dims:
            unify(d, next(rows), s.reason)
            continue
        axis = next(kept)
        if axis not in looked_up or d.size != 1:
            meet_window(table[axis], d, s.reason)
    return [table]


def _look_up(s: Step, table: Array, axes: Sequence[int]) -> set[int]:
    """Those of the axes that positions of their own index; the others are frozen."""
    found = set()
    for axis, d in zip(axes, s.positions.columns(s.op.inputs[1], len(axes)), strict=True):
        if d is not None and d.size == table[axis].size:
            unify(table[axis], d, s.reason)
            found.add(axis)
            continue
        freeze(table[axis], f"indexed by {s.reason}")
        if d is not None:
            freeze(d, f"position used by {s.reason}")
    return found


def _pair(s: Step, table: Array, axes: Sequence[int], rows: Sequence[int]) -> None:
    for axis, at in zip(axes, rows, strict=True):
        unify(table[axis], s.inputs[1][at], s.reason)


PRODUCTS: Mapping[str, Callable[[Step], list[Array]]] = {
    **dict.fromkeys((f"reduce_window_{n}" for n in ("sum", "max", "min")), window),
    **dict.fromkeys((n for n in LOOKUPS if n != "gather"), scatter),
    "conv_general_dilated": conv,
    "dot_general": dot,
    "gather": gather,
    "ragged_dot_general": ragged_dot,
    "reduce_window": window,
}
