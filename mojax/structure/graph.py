"""A program as a flat list of operations on nodes, and which of them read a parameter.

Calls are inlined; the bodies of loops and branches are there once. A transpose, a reshape, a slice or a cast
is no operation but a `View` of a root node, so that two dots that contract the same axes of the same root
are seen to read the same input.

Besides primitives there are: "join" (all its inputs and outputs are one value at one time or another: what a
loop carries, what branches return), "row" and "stack" (one entry of the first axis, of what a scan reads and
writes; `loop` tells scans apart, and JAX has a primitive "stack" without it), "shard" and "unshard" (what a
shard_map hands to each device, and back), and "use" (values that decide something or leave the program).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

from mojax.rules import Dims, Dot, Rules, dims_of
from mojax.view import Atom, Shape, View


class Node:
    """An array of the program; `view` leads to its root, which may be itself.

    Attributes:
      leaf: the parameter that this is, if it is one.
    """

    def __init__(self, shape: Shape, leaf: str | None = None, view: View | None = None):
        self.shape, self.leaf = shape, leaf
        self.view = View.of(self, shape) if view is None else view


class Op(NamedTuple):
    """One operation. `line` is where the user wrote it, `file.py:12`, or ""."""

    name: str
    params: Mapping[str, Any]
    inputs: tuple[Node, ...]
    outputs: tuple[Node, ...]
    line: str = ""


class Graph(NamedTuple):
    """A whole program: operations in its order, its parameters by name, its other inputs, its outputs."""

    ops: tuple[Op, ...]
    params: Mapping[str, Node]
    args: tuple[Node, ...]
    outputs: tuple[Node, ...]


Part = tuple[Node, tuple[Atom, ...]]


class Read(NamedTuple):
    """An operation that reads a parameter: a site before its group has a number.

    Attributes:
      name: the parameter; for "cache", the label.
      kind: dot, ragged_dot, conv, gather or cache.
      contract, batch: axes of the parameter, see `mojax.trace.Site`.
      weight: the parameter and the part of it that is contracted.
      input: the root of the other operand and its part, in the same order.
      side: which operand is the parameter.
      dims: the axes of the operands that meet; None for "cache".
    """

    name: str
    kind: str
    contract: tuple[int, ...]
    batch: tuple[int, ...]
    weight: Part
    input: Part
    op: Op
    side: int = 0
    dims: Dims | None = None


def read(op: Op, rules: Rules) -> Read | None:
    """The site that an operation is, if it is one."""
    if op.name == "name":
        root = op.inputs[0].view.root
        return Read(op.params["name"], "cache", (), (), (root, ()), (root, ()), op)
    rule = rules.get(op.name)
    if not isinstance(rule, Dot):
        return None
    sides = [i for i in (0, 1) if op.inputs[i].view.root.leaf]
    if len(sides) != 1:
        return None
    side = sides[0]
    dims = dims_of(op.name, rule, op.params, [x.shape for x in op.inputs], side)
    if dims is None:
        return None
    weight, x = op.inputs[side].view, op.inputs[1 - side].view
    if rule.op == "gather":
        axes = weight.root_axes(dims.contract)
        return Read(weight.root.leaf, rule.op, axes, (), (weight.root, ()), (x.root, ()), op, side, dims)
    summed, partners = meeting(dims, weight)
    shown = weight.root_axes(range(len(weight.axes)))
    rows = [i for i, n in enumerate(weight.root.shape) if i not in shown and n > 1]
    return Read(
        weight.root.leaf,
        rule.op,
        weight.root_axes(dims.contract),
        tuple(sorted({*rows, *weight.root_axes(dims.batch)})),
        (weight.root, weight.atoms(summed)),
        (x.root, x.atoms(partners)),
        op,
        side,
        dims,
    )


def meeting(dims: Dims, view: View) -> tuple[tuple[int, ...], tuple[int, ...]]:
    """The contracted axes of a parameter's operand in the order of its root's axes, and their partners."""
    pairs = sorted(zip(dims.contract, dims.partners, strict=True), key=lambda p: view.order(p[0]))
    return tuple(p[0] for p in pairs), tuple(p[1] for p in pairs if p[1] is not None)


def whole(root: Node, atoms: Sequence[Atom]) -> tuple[int, ...] | None:
    """The axes of the root that `atoms` are, if each is a whole axis."""
    axes = [a.axis for a in atoms if a.axis is not None and a == Atom(a.axis, 1, root.shape[a.axis], 0)]
    return tuple(axes) if len(axes) == len(atoms) else None
