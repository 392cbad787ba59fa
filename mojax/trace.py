"""Where a function reads its parameters: sites, found in its jaxpr without running it.

A program is flattened into operations on nodes: calls inlined, loop bodies and branches once. Reshapes,
slices and casts are no operations but a `View` of a root node, so two dots that contract the same axes of the
same root read the same input.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import jax
from jax.extend import core

from mojax.errors import InputError

Shape = tuple[int, ...]


class Site(NamedTuple):
    """One place where a parameter meets an activation.

    Attributes:
      weight: the parameter; for "cache", the label given to `jax.ad_checkpoint.checkpoint_name`.
      op: "dot" (dot_general), "gather" (`w[tokens]`) or "cache" (a named value).
      contract: the axes of the parameter that are summed over (looked up, none), ascending.
      group: dots that contract the same axes of the same input have the same number.
      producer: the parameter that absorbs a scale of every input channel, or None. The function stays the
        same when the producer is divided by s and every weight of the group is multiplied by s along
        `contract`; s has one entry per channel, the contracted axes flattened. The producer is a norm's gain
        [n], or the weight of a previous dot, whose axes that are not contracted ([out]) are the channels;
        between it and the group are only products with other values, casts and reshapes. None if the input,
        a factor or one of the weights is used outside the group too, or where a part of an axis is read.
    """

    weight: str
    op: str
    contract: tuple[int, ...]
    group: int
    producer: str | None


def sites(fn: Callable, params: Mapping[str, Any], *args: Any) -> tuple[Site, ...]:
    """Every site of `fn(params, *args)` in the order of the program, loop bodies and branches once.

    A parameter is followed through transposes, reshapes, slices and casts. One that meets arithmetic before
    its dot (`x @ (a * w)`, a product of two parameters) has no site there.
    `params` is a flat dict and `args` are pytrees, of arrays or `jax.ShapeDtypeStruct`s; else InputError.
    """
    jaxpr, _ = trace(fn, params, *args)
    names = [*sorted(params), *[None] * len(jax.tree.leaves(args))]
    inputs = [Node(shape(v), name) for v, name in zip(opened(jaxpr)[0].invars, names, strict=True)]
    ops: list[Op] = []
    ops.append(Op("return", {}, tuple(flatten(jaxpr, inputs, ops)), ()))
    reads = [r for op in ops if (r := read(op))]
    groups: dict[Any, list[Read]] = {}
    for r in reads:
        groups.setdefault(r.input, []).append(r)
    flow = Flow(ops)
    ids = {key: (i, flow.producer(group)) for i, (key, group) in enumerate(groups.items())}
    return tuple(Site(r.name, r.kind, r.contract, *ids[r.input]) for r in reads)


class Read(NamedTuple):
    """A site before its group has a number."""

    name: str
    kind: str
    contract: tuple[int, ...]
    weight: tuple[Node, tuple[Atom, ...]]  # the parameter and the part of it that is contracted
    input: tuple[Node, tuple[Atom, ...]]  # the root of the other operand and its part, in the same order
    op: Op


def read(op: Op) -> Read | None:
    """The site that an operation is, if it is one."""
    views = [x.view for x in op.inputs]
    if op.name == "name":
        return Read(op.params["name"], "cache", (), (views[0].root, ()), (views[0].root, ()), op)
    if op.name == "gather" and (name := views[0].root.leaf):
        axes = views[0].root_axes(op.params["dimension_numbers"].start_index_map)
        return Read(name, "gather", axes, (views[0].root, ()), (views[1].root, ()), op)
    if (side := weight_side(op)) is None:
        return None
    weight, x = views[side], views[1 - side]
    dims, partners = contraction(op.params, side, weight)
    parts = (weight.root, weight.atoms(dims)), (x.root, x.atoms(partners))
    return Read(weight.root.leaf, "dot", weight.root_axes(dims), *parts, op)


def weight_side(op: Op) -> int | None:
    """Which operand of a dot is a parameter: None if neither or both."""
    sides = [i for i in (0, 1) if op.name == "dot_general" and op.inputs[i].view.root.leaf]
    return sides[0] if len(sides) == 1 else None


class Flow:
    """Which operation makes each root node, and which use it."""

    def __init__(self, ops: Sequence[Op]):
        self.maker = {node: op for op in ops for node in op.outputs}
        self.users: dict[Node, list[Op]] = {}
        for op in ops:
            for node in op.inputs if op.name != "name" else ():  # a named value is a view
                self.users.setdefault(node.view.root, []).append(op)

    def producer(self, group: Sequence[Read]) -> str | None:
        """The parameter that absorbs a scale of the input of these sites; see `Site`."""
        root, dims = group[0].input[0], whole(*group[0].input)
        if not dims or not all(whole(*r.weight) for r in group):  # a part of an axis, or no dot
            return None
        inside = {id(r.op) for r in group}
        touched = [root, *(r.weight[0] for r in group)]
        alone = all(id(op) in inside for node in touched for op in self.users[node])
        return self.source(root, dims) if alone else None

    def source(self, node: Node, dims: tuple[int, ...]) -> str | None:
        """The parameter in which `node` is linear, channel by channel of its axes `dims`; gains first."""
        op = self.maker.get(node)
        if op is None or op.name not in ("dot_general", "mul", "div"):
            return None
        if op.name == "dot_general":
            return self.rows(op, dims)
        parts = []
        for x in op.inputs[: 2 if op.name == "mul" else 1]:
            root = x.view.root
            full = len(x.shape) == len(node.shape) and all(x.shape[d] == node.shape[d] for d in dims)
            if full and len(self.users[root]) == 1 and (inner := whole(root, x.view.atoms(dims))):
                parts.append((root, inner))  # one use: x * x is not linear in x
        gains = [x.leaf for x, _ in parts if len(x.shape) == 1]
        return next(filter(None, [*gains, *(self.source(x, d) for x, d in parts)]), None)

    def rows(self, op: Op, dims: tuple[int, ...]) -> str | None:
        """The weight of a dot, if the axes `dims` of its output are all the axes it does not contract."""
        if (side := weight_side(op)) is None:
            return None
        view = op.inputs[side].view
        contracted, batch = (d[side] for d in op.params["dimension_numbers"])
        free = [d for d in range(len(view.axes)) if d not in (*contracted, *batch)]
        first = len(op.outputs[0].shape) - len(free) if side == 1 else len(batch)
        if len(self.users[view.root]) != 1 or not set(dims) <= set(range(first, first + len(free))):
            return None
        rest = tuple(i for i in range(len(view.root.shape)) if i not in view.root_axes(contracted))
        found = whole(view.root, view.atoms([free[d - first] for d in dims]))
        return view.root.leaf if found == rest else None


def whole(root: Node, atoms: Sequence[Atom]) -> tuple[int, ...] | None:
    """The axes of the root that `atoms` are, if each is a whole axis."""
    axes = [a.axis for a in atoms if a.axis is not None and a == Atom(a.axis, 1, root.shape[a.axis], 0)]
    return tuple(axes) if len(axes) == len(atoms) else None


# Programs as a flat list


class Node:
    """An array of the program; `view` leads to its root, which may be itself."""

    def __init__(self, shape: Shape, leaf: str | None = None, view: View | None = None):
        self.shape, self.leaf = shape, leaf
        self.view = View.of(self, shape) if view is None else view


class Op(NamedTuple):
    """One operation; a loop or branch is the operations of its body, then one that uses what it carries."""

    name: str
    params: Mapping[str, Any]
    inputs: tuple[Node, ...]
    outputs: tuple[Node, ...]


def flatten(jaxpr: Any, inputs: Sequence[Node], ops: list[Op]) -> list[Node]:
    """Append the operations of `jaxpr` to `ops`; its outputs."""
    jaxpr = opened(jaxpr)[0]
    nodes = dict(zip(jaxpr.invars, inputs, strict=True)) | {v: Node(shape(v)) for v in jaxpr.constvars}

    def node(v: Any) -> Node:
        return Node(shape(v)) if isinstance(v, core.Literal) else nodes[v]

    for eqn in jaxpr.eqns:
        rule = INLINE.get(eqn.primitive.name, _op)
        nodes.update(zip(eqn.outvars, rule(eqn, [node(v) for v in eqn.invars], ops), strict=True))
    return [node(v) for v in jaxpr.outvars]


def _op(eqn: Any, inputs: Sequence[Node], ops: list[Op]) -> list[Node]:
    views = follow(eqn, inputs[0].view) if len(inputs) == 1 else [None] * len(eqn.outvars)
    outputs = [Node(shape(v), view=view) for v, view in zip(eqn.outvars, views, strict=True)]
    if None in views or eqn.primitive.name == "name":
        ops.append(Op(eqn.primitive.name, eqn.params, tuple(inputs), tuple(outputs)))
    return outputs


def _sealed(eqn: Any, inputs: Sequence[Node], ops: list[Op]) -> list[Node]:
    outputs = flatten(body(eqn), inputs, ops)  # a parameter that comes out of these is a value like any other
    leaves = [x for x in outputs if x.view.root.leaf]
    ops.append(Op(eqn.primitive.name, {}, tuple(leaves), ()))
    return [Node(x.shape) if x in leaves else x for x in outputs]


def _leave(eqn: Any, used: Sequence[Node], ops: list[Op]) -> list[Node]:
    outputs = [Node(shape(v)) for v in eqn.outvars]
    ops.append(Op(eqn.primitive.name, {}, tuple(used), tuple(outputs)))
    return outputs


def _scan(eqn: Any, inputs: Sequence[Node], ops: list[Op]) -> list[Node]:
    consts, init, stacks = loop_inputs(eqn, inputs)
    inner = [*(Node(x.shape) for x in init), *(Node(x.shape[1:], view=x.view.row()) for x in stacks)]
    return _leave(eqn, [*init, *flatten(body(eqn), [*consts, *inner], ops)], ops)


def _cond(eqn: Any, inputs: Sequence[Node], ops: list[Op]) -> list[Node]:
    outputs = [flatten(branch, inputs[1:], ops) for branch in eqn.params["branches"]]
    return _leave(eqn, [inputs[0], *itertools.chain(*outputs)], ops)


def _while(eqn: Any, inputs: Sequence[Node], ops: list[Op]) -> list[Node]:
    test, consts, init = loop_inputs(eqn, inputs)
    carry = [Node(x.shape) for x in init]
    more = flatten(eqn.params["cond_jaxpr"], [*test, *carry], ops)
    return _leave(eqn, [*init, *more, *flatten(eqn.params["body_jaxpr"], [*consts, *carry], ops)], ops)


CALLS = ("jit", "pjit", "closed_call", "core_call", "eval_jaxpr")
CUSTOM, REMAT = ("custom_jvp_call", "custom_vjp_call"), ("remat2", "checkpoint", "remat")
INLINE: Mapping[str, Callable[[Any, Sequence[Node], list[Op]], list[Node]]] = {
    **dict.fromkeys(CALLS, lambda eqn, inputs, ops: flatten(body(eqn), inputs, ops)),
    **dict.fromkeys((*CUSTOM, *REMAT), _sealed),
    "scan": _scan,
    "cond": _cond,
    "while": _while,
}


# Views


class Atom(NamedTuple):
    """Entries `offset, offset + stride, ...` of one axis of the root; axis None: one entry, repeated."""

    axis: int | None
    stride: int
    size: int
    offset: int


Axes = tuple[tuple[Atom, ...], ...]


class View(NamedTuple):
    """How an array shows a root array: each of its axes is a row-major product of atoms."""

    root: Any  # a Node, or a name
    axes: Axes

    @classmethod
    def of(cls, root: Any, shape: Shape) -> View:
        return cls(root, tuple((Atom(i, 1, n, 0),) for i, n in enumerate(shape)))

    def row(self) -> View:
        """What one step of a scan sees: any one entry of the first axis."""
        return View(self.root, self.axes[1:])

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


CASTS = "convert_element_type copy copy_p device_put name pcast pvary reduce_precision sharding_constraint"
SAME = (*CASTS.split(), "stop_gradient")


def follow(eqn: Any, view: View) -> list[View | None]:
    """The views that the outputs of `eqn` give of what its one input shows; None where the view is lost."""
    axes, p, shapes = view.axes, eqn.params, [shape(v) for v in eqn.outvars]
    out: list[Axes | None] = [None] * len(shapes)
    match eqn.primitive.name:
        case "transpose":
            out = [tuple(axes[i] for i in p["permutation"])]
        case "squeeze":
            out = [tuple(a for i, a in enumerate(axes) if i not in p["dimensions"])]
        case "reshape" if p["dimensions"] is None:
            out = [_reshape(axes, shapes[0])]
        case "broadcast_in_dim":
            out = [_broadcast(axes, p["broadcast_dimensions"], shapes[0])]
        case "slice":
            out = [_slice(axes, p["start_indices"], shapes[0], p["strides"])]
        case "split":
            starts = itertools.accumulate(p["sizes"], initial=0)
            corners = [[n * (i == p["axis"]) for i in range(len(axes))] for n in starts]
            out = [_slice(axes, *part) for part in zip(corners, shapes, strict=False)]
        case name if name in SAME:
            out = [axes]
    return [None if a is None else View(view.root, a) for a in out]


def _reshape(axes: Axes, shape: Shape) -> Axes | None:
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
    out = []
    for axis, start, n, step in zip(axes, starts, shape, steps or (1,) * len(axes), strict=True):
        if math.prod(a.size for a in axis) == n:
            out.append(axis)
        elif len(axis) == 1:
            a = axis[0]
            out.append((Atom(a.axis, a.stride * step, n, a.offset + a.stride * start),))
        else:
            return None
    return tuple(out)


# Jaxprs: the same in every supported JAX


def trace(fn: Callable, params: Mapping[str, Any], *args: Any) -> tuple[Any, Any]:
    """The jaxpr of `fn(params, *args)`, its inputs the parameters sorted by name, and fn's output shapes."""
    for name, leaf in params.items():
        if not (isinstance(name, str) and hasattr(leaf, "shape") and hasattr(leaf, "dtype")):
            raise InputError(
                f"params[{name!r}] is {type(leaf).__name__}; params is a flat dict of name: array"
            )
    return jax.make_jaxpr(fn, return_shape=True)(dict(params), *args)


def shape(v: Any) -> Shape:
    return tuple(getattr(v.aval, "shape", ()))


def opened(jaxpr: Any) -> tuple[Any, list]:
    """A jaxpr and its constants; JAX 0.11 merged Jaxpr and ClosedJaxpr."""
    return getattr(jaxpr, "jaxpr", jaxpr), list(getattr(jaxpr, "consts", ()))


def body(eqn: Any) -> Any:
    """The jaxpr of an equation that calls one."""
    return eqn.params["jaxpr"] if "jaxpr" in eqn.params else eqn.params["call_jaxpr"]


def loop_inputs(eqn: Any, inputs: Sequence) -> tuple[list, list, list]:
    """The inputs of a scan (constants, first carry, stacks) or while (of test and body, first carry)."""
    p = eqn.params
    if "cond_nconsts" in p:
        n, m = p["cond_nconsts"], p["body_nconsts"]
    elif "num_consts" in p:
        n, m = p["num_consts"], p["num_carry"]
    else:  # a scan since JAX 0.11
        n, m = (len(t) for t in p["ft_in"].unpack()[:2])
    return list(inputs[:n]), list(inputs[n : n + m]), list(inputs[n + m :])


def contraction(params: Mapping, side: int, view: View) -> tuple[tuple[int, ...], tuple[int, ...]]:
    """The contracted axes of operand `side` of a dot in the order of its root's axes, and their partners."""
    contracted = params["dimension_numbers"][0]
    order = [(a.axis or 0, -a.stride) for axis in view.axes for a in axis[:1] or (Atom(0, 0, 1, 0),)]
    pairs = sorted(zip(contracted[side], contracted[1 - side], strict=True), key=lambda p: order[p[0]])
    return tuple(p[0] for p in pairs), tuple(p[1] for p in pairs)
