"""How an array shows another one: through transposes, reshapes, slices, casts and rows of a stack."""

from __future__ import annotations

import itertools
import math
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

Shape = tuple[int, ...]


UNKNOWN = -(1 << 62)  # an offset that the program decides while it runs


class Atom(NamedTuple):
    """Entries `offset, offset + stride, ...` of one axis of the root; axis None: one entry, repeated.

    An offset below 0 is not known. Atoms of one axis, of a view, share out its offset among them.
    """

    axis: int | None
    stride: int
    size: int
    offset: int


class Entries(NamedTuple):
    """Entries of one axis of the root whose places are known: `offset + i * stride`, i below `size`."""

    axis: int
    stride: int
    size: int
    offset: int

    def at(self, i: Any) -> Any:
        """The place of entry `i`, an integer or an array of integers."""
        return self.offset + self.stride * i


Axes = tuple[tuple[Atom, ...], ...]


class View(NamedTuple):
    """How an array shows a root array: each of its axes is a row-major product of atoms.

    Attributes:
      root: a node of a program, or a name.
      rows: axes of the root of which this is the entry that a loop is at, each with its loop.
    """

    root: Any
    axes: Axes
    rows: tuple[tuple[int, Any], ...] = ()

    @classmethod
    def of(cls, root: Any, shape: Shape) -> View:
        return cls(root, tuple((Atom(i, 1, n, 0),) for i, n in enumerate(shape)))

    @property
    def shape(self) -> Shape:
        return tuple(math.prod(a.size for a in axis) for axis in self.axes)

    def row(self, loop: Any = None) -> View:
        """What one step of a scan sees: the entry of the first axis that the loop is at."""
        axis = [a.axis for a in self.axes[0] if a.axis is not None and (a.stride, a.offset) == (1, 0)]
        known = ((axis[0], loop),) if loop is not None and len(axis) == len(self.axes[0]) == 1 else ()
        return View(self.root, self.axes[1:], self.rows + known)

    def root_axes(self, dims: Sequence[int]) -> tuple[int, ...]:
        """The axes of the root that the axes `dims` show, ascending."""
        return tuple(sorted({a.axis for d in dims for a in self.axes[d] if a.axis is not None}))

    def atoms(self, dims: Sequence[int]) -> tuple[Atom, ...]:
        """The product of the axes `dims`, with neighbours that continue each other joined."""
        out: list[Atom] = []
        for b in (a for d in dims for a in self.axes[d] if a.size > 1):
            a = out[-1] if out else None
            if a and a.axis == b.axis and a.stride == b.stride * b.size:
                out[-1] = Atom(a.axis, b.stride, a.size * b.size, a.offset + b.offset)
            else:
                out.append(b)
        return tuple(out)

    def entries(self, dim: int) -> Entries | None:
        """The entries of one axis of the root that the axis `dim` shows, if it shows nothing else."""
        for a in self.axes[dim] if len(self.axes[dim]) == 1 else ():
            if a.axis is not None and a.offset >= 0:
                return Entries(a.axis, a.stride, a.size, a.offset)
        return None

    def order(self, dim: int) -> tuple[int, int]:
        """Sorts axes of the view as the root's axes are sorted; of one root axis, the outer part first."""
        a = self.axes[dim][0] if self.axes[dim] else Atom(0, 0, 1, 0)
        return a.axis or 0, -a.stride


CASTS = "convert_element_type copy copy_p device_put name pcast pvary reduce_precision sharding_constraint"
SAME = (*CASTS.split(), "stop_gradient", "optimization_barrier")


def follow(name: str, params: Mapping[str, Any], shapes: Sequence[Shape], view: View) -> list[View | None]:
    """The views that the outputs of an operation give of what its first input shows; None where it is lost.

    Args:
      name, params: of the primitive.
      shapes: of its outputs.
    """
    axes, p = view.axes, params
    out: list[Axes | None] = [None] * len(shapes)
    match name:
        case "transpose":
            out = [tuple(axes[i] for i in p["permutation"])]
        case "squeeze":
            out = [tuple(a for i, a in enumerate(axes) if i not in p["dimensions"])]
        case "reshape":
            order = range(len(axes)) if p["dimensions"] is None else p["dimensions"]
            out = [_reshape(tuple(axes[i] for i in order), shapes[0])]
        case "broadcast_in_dim":
            out = [_broadcast(axes, p["broadcast_dimensions"], shapes[0])]
        case "slice":
            out = [_slice(axes, p["start_indices"], shapes[0], p["strides"])]
        case "dynamic_slice":
            out = [_entries(axes, shapes[0])]
        case "split":
            starts = itertools.accumulate(p["sizes"], initial=0)
            corners = [[n * (i == p["axis"]) for i in range(len(axes))] for n in starts]
            out = [_slice(axes, *part) for part in zip(corners, shapes, strict=False)]
        case _ if name in SAME and len(shapes) == 1:
            out = [axes]
    return [None if a is None else view._replace(axes=a) for a in out]


def _reshape(axes: Axes, shape: Shape) -> Axes | None:
    if 0 in shape:
        return None
    rest = [a for axis in axes for a in axis if a.size > 1]
    out = []
    for n in shape:
        axis = []
        while n > 1:
            a = rest.pop(0)
            part = math.gcd(n, a.size)
            if part not in (n, a.size):
                return None
            inner = a.size // part
            axis.append(Atom(a.axis, a.stride * inner, part, a.offset))
            if inner > 1:
                rest.insert(0, Atom(a.axis, a.stride, inner, 0))
            n //= part
        out.append(tuple(axis))
    return tuple(out)


def _broadcast(axes: Axes, dims: Sequence[int], shape: Shape) -> Axes:
    out: list[tuple[Atom, ...]] = [(Atom(None, 0, n, 0),) for n in shape]
    for axis, d in zip(axes, dims, strict=True):
        if math.prod(a.size for a in axis) == shape[d]:
            out[d] = axis
    return tuple(out)


def _slice(axes: Axes, starts: Sequence[int], shape: Shape, steps: Shape | None = None) -> Axes | None:
    out, entries = [], []
    for axis, start, n, step in zip(axes, starts, shape, steps or (1,) * len(axes), strict=True):
        if math.prod(a.size for a in axis) == n:
            out.append(axis)
        elif len(axis) == 1:
            a = axis[0]._replace(offset=axis[0].offset + axis[0].stride * start)
            out.append(() if n == 1 else (a._replace(stride=a.stride * step, size=n),))
            entries += [a] * (n == 1)
        else:
            return None
    return _at(out, entries)


def _entries(axes: Axes, shape: Shape) -> Axes | None:
    """Single entries of some axes, anywhere; the other axes whole."""
    sizes = [math.prod(a.size for a in axis) for axis in axes]
    if any(n not in (1, size) for n, size in zip(shape, sizes, strict=True)):
        return None
    gone = [axis for axis, n, size in zip(axes, shape, sizes, strict=True) if n != size]
    out = [axis if n == size else () for axis, n, size in zip(axes, shape, sizes, strict=True)]
    return _at(out, [a._replace(offset=UNKNOWN) for axis in gone for a in axis])


def _at(axes: Sequence[tuple[Atom, ...]], entries: Sequence[Atom]) -> Axes:
    """`axes` where single entries were taken of the atoms `entries`: what is left of an axis begins there."""
    moved = {a.axis: 0 for a in entries if a.axis is not None}
    for a in entries:
        if a.axis is not None:
            moved[a.axis] += a.offset
    return tuple(
        tuple(
            a._replace(offset=a.offset + moved.pop(a.axis)) if a.size > 1 and a.axis in moved else a
            for a in axis
        )
        for axis in axes
    )
