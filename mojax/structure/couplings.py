"""What operations other than products make of axes: which are the same, which are parts of others."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import NamedTuple

from mojax.structure.dims import Dim, cut, factor, find, freeze, keep, product, sequence, unify
from mojax.structure.graph import Op
from mojax.structure.positions import Positions

Array = list[Dim]  # the axes of an array


class Step(NamedTuple):
    """One operation, the axes of its inputs, and what is frozen because of it.

    Attributes:
      positions: what is known of indices.
      loops: the axis of steps of every scan.
    """

    op: Op
    inputs: list[Array]
    reason: str
    positions: Positions
    loops: dict[object, Dim]


def fresh(shape: Iterable[int], *frozen: str) -> Array:
    return [Dim(n, frozen) for n in shape]


def same(axes: Sequence[Dim], reason: str) -> Dim:
    """The one axis that these are; those of size 1 are repeated."""
    wide = [d for d in axes if d.size != 1] or axes[:1]
    for d in wide[1:]:
        unify(wide[0], d, reason)
    return wide[0]


def each(arrays: Sequence[Array], reason: str) -> Array:
    """The axes of arrays that are the same, axis by axis."""
    return [same(axes, reason) for axes in zip(*arrays, strict=True)]


def resized(d: Dim, n: int, reason: str) -> Dim:
    """An axis that stays the same if its size does; else it is frozen, and so is the new one."""
    return d if d.size == n else lost(d, n, reason)


def lost(d: Dim, n: int, reason: str) -> Dim:
    freeze(d, reason)
    return Dim(n, (reason,))


def pieces(d: Dim, sizes: Sequence[int], reason: str, take: Callable = cut) -> Array:
    """`d` in segments (`take` is `factor`: in factors) of these sizes, or frozen where it is none of that."""
    out, rest = [], d
    for n in sizes[:-1]:
        found = take(rest, n, reason)
        if found is None:
            freeze(d, reason)
            return fresh(sizes, *find(d).frozen)
        out.append(found[0])
        rest = found[1]
    return [*out, rest]


def unknown(s: Step) -> list[Array]:
    for d in (d for dims in s.inputs for d in dims):
        freeze(d, s.reason)
    return [fresh(y.shape, s.reason) for y in s.op.outputs]


# Axis by axis


def elementwise(s: Step) -> list[Array]:
    arrays = [dims for dims in s.inputs if dims]
    return [each(arrays, s.reason) for _ in s.op.outputs]


def unchanged(s: Step) -> list[Array]:
    return s.inputs


def used(s: Step) -> list[Array]:
    return []


def iota(s: Step) -> list[Array]:
    return [fresh(s.op.outputs[0].shape)]


def ordered(s: Step) -> list[Array]:
    """Along some axes the order matters: sorts, sums of all before, reversals, Fourier transforms."""
    p, rank = s.op.params, len(s.inputs[0])
    axes = [p[key] for key in ("axis", "dimension") if key in p] or list(p.get("dimensions", ()))
    axes += range(rank - len(p.get("fft_lengths", ())), rank)
    for d in (dims[i] for dims in s.inputs for i in axes):
        freeze(d, s.reason)
    whole = each(s.inputs, s.reason)
    return [[resized(d, n, s.reason) for d, n in zip(whole, y.shape, strict=True)] for y in s.op.outputs]


def reduced(s: Step) -> list[Array]:
    p = s.op.params
    axes = p["axes"] if "axes" in p else p["dimensions"]
    arrays = s.inputs[: len(s.op.outputs)]  # a reduction of any kind has its first values behind them
    out = each([[d for i, d in enumerate(dims) if i not in axes] for dims in arrays], s.reason)
    return [out for _ in s.op.outputs]


def top_k(s: Step) -> list[Array]:
    out = list(s.inputs[0])
    axis, k = s.op.params.get("axis", -1), s.op.params["k"]
    keep(out[axis], k, s.reason)
    out[axis] = Dim(k, (s.reason,))
    return [out, out]


# Moves


def transpose(s: Step) -> list[Array]:
    return [[s.inputs[0][i] for i in s.op.params["permutation"]]]


def squeeze(s: Step) -> list[Array]:
    return [[d for i, d in enumerate(s.inputs[0]) if i not in s.op.params["dimensions"]]]


def broadcast(s: Step) -> list[Array]:
    out = fresh(s.op.outputs[0].shape)
    for d, i in zip(s.inputs[0], s.op.params["broadcast_dimensions"], strict=True):
        out[i] = d if d.size == out[i].size else out[i]
    return [out]


def tile(s: Step) -> list[Array]:
    return [[product([Dim(n), d]) for n, d in zip(s.op.params["reps"], s.inputs[0], strict=True)]]


def reshape(s: Step) -> list[Array]:
    shape = s.op.outputs[0].shape
    if s.op.params["dimensions"] is not None or 0 in shape:
        return unknown(s)
    rest, wanted = [d for d in s.inputs[0] if d.size != 1], [n for n in shape if n != 1]
    out = []
    while wanted:  # the shortest runs of axes, before and after, with as many entries
        before, after = [rest.pop(0)], [wanted.pop(0)]
        while missing := math.prod(after) - math.prod(d.size for d in before):
            if missing > 0:
                before.append(rest.pop(0))
            else:
                after.append(wanted.pop(0))
        out += pieces(product(before), after, s.reason, factor)
    return [[out.pop(0) if n != 1 else Dim(1) for n in shape]]


def sliced(s: Step) -> list[Array]:
    p, shape = s.op.params, s.op.outputs[0].shape
    axes = zip(s.inputs[0], p["start_indices"], shape, p["strides"] or (1,) * len(shape), strict=True)
    return [[_every(*axis, s.reason) for axis in axes]]


def _every(d: Dim, start: int, n: int, step: int, reason: str) -> Dim:
    """`d[start::step][:n]`: a segment, or one entry of each block of `step`."""
    if step == 1 or n == 1:
        return pieces(d, (start, n, d.size - start - n), reason)[1]
    if n * step != d.size:
        return resized(d, n, reason)
    out, block = pieces(d, (n, step), reason, factor)
    freeze(block, reason)
    return out


def split(s: Step) -> list[Array]:
    axis, dims = s.op.params["axis"], s.inputs[0]
    parts = pieces(dims[axis], [int(n) for n in s.op.params["sizes"]], s.reason)
    return [[*dims[:axis], part, *dims[axis + 1 :]] for part in parts]


def concatenate(s: Step) -> list[Array]:
    axis = s.op.params["dimension"]
    out = each([[*dims[:axis], Dim(1), *dims[axis + 1 :]] for dims in s.inputs], s.reason)
    out[axis] = sequence([dims[axis] for dims in s.inputs])
    return [out]


def padded(s: Step) -> list[Array]:
    padding = s.op.params["padding_config"]
    axes = zip(s.inputs[0], padding, s.op.outputs[0].shape, strict=True)
    return [
        [
            _pad(d, low, high, s.reason) if not between else lost(d, n, s.reason)
            for d, (low, high, between), n in axes
        ]
    ]


def _pad(d: Dim, low: int, high: int, reason: str) -> Dim:
    """Constants before and after; where their number is negative, entries are dropped."""
    before, after = max(-low, 0), max(-high, 0)
    d = pieces(d, (before, d.size - before - after, after), reason)[1]
    return sequence([Dim(max(low, 0), (reason,)), d, Dim(max(high, 0), (reason,))])


def dynamic_slice(s: Step) -> list[Array]:
    return [[resized(d, n, s.reason) for d, n in zip(s.inputs[0], s.op.outputs[0].shape, strict=True)]]


def dynamic_update(s: Step) -> list[Array]:
    for d, new in zip(*s.inputs[:2], strict=True):
        meet_window(d, new, s.reason)
    return [s.inputs[0]]


def meet_window(d: Dim, part: Dim, reason: str) -> None:
    """The same axis, or a window of it, which freezes both."""
    if d.size == part.size:
        unify(d, part, reason)
    else:
        freeze(d, reason)
        freeze(part, reason)


def row(s: Step) -> list[Array]:
    steps, *rest = s.inputs[0]
    unify(steps, s.loops.setdefault(s.op.params["loop"], steps), s.reason)
    return [rest]


def stack(s: Step) -> list[Array]:
    """Of a scan; or of arrays, along a new axis."""
    n = s.op.outputs[0].shape
    if "loop" in s.op.params:
        return [[s.loops.setdefault(s.op.params["loop"], Dim(n[0])), *s.inputs[0]]]
    out = each(s.inputs, s.reason)
    out.insert(s.op.params["axis"], Dim(len(s.inputs), (s.reason,)))
    return [out]


def unstack(s: Step) -> list[Array]:
    out = list(s.inputs[0])
    freeze(out.pop(s.op.params["axis"]), s.reason)
    return [out for _ in s.op.outputs]


def sharded(s: Step) -> list[Array]:
    arrays = zip(s.inputs, s.op.outputs, strict=True)
    return [[resized(d, n, s.reason) for d, n in zip(dims, y.shape, strict=True)] for dims, y in arrays]


ELEMENTWISE = """
abs acos acosh add add_any and asin asinh atan atan2 atanh bessel_i0e bessel_i1e cbrt ceil clamp clz
complex conj convert_element_type copy copy_p cos cosh device_put digamma div eq erf erf_inv erfc exp
exp2 expm1 floor ge gt igamma igammac imag integer_pow is_finite join le lgamma log log1p logistic lt max
min mul mulhi name ne neg nextafter not or pcast polygamma population_count pow pvary real
reduce_precision regularized_incomplete_beta rem round rsqrt select_n sharding_constraint shift_left
shift_right_arithmetic shift_right_logical sign sin sinh sqrt square stop_gradient sub tan tanh xor zeta
"""
REDUCED = "sum max min prod and or xor".split()
ORDERED = "cumsum cumprod cummax cummin cumlogsumexp rev sort fft"

MOVES: Mapping[str, Callable[[Step], list[Array]]] = {
    **dict.fromkeys(ELEMENTWISE.split(), elementwise),
    **dict.fromkeys((f"reduce_{n}" for n in REDUCED), reduced),
    **dict.fromkeys(("reduce", "argmax", "argmin"), reduced),
    **dict.fromkeys(ORDERED.split(), ordered),
    "broadcast_in_dim": broadcast,
    "concatenate": concatenate,
    "dynamic_slice": dynamic_slice,
    "dynamic_update_slice": dynamic_update,
    "iota": iota,
    "optimization_barrier": unchanged,
    "pad": padded,
    "reshape": reshape,
    "row": row,
    "shard": sharded,
    "slice": sliced,
    "split": split,
    "squeeze": squeeze,
    "stack": stack,
    "tile": tile,
    "top_k": top_k,
    "transpose": transpose,
    "unshard": sharded,
    "unstack": unstack,
    "use": used,
}
