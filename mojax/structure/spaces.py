"""Which axes of parameters an orthogonal matrix may turn together without a change of the function.

    RMSNorm(x Q) = RMSNorm(x) Q        (x Q) (W Q)^T = x W^T        x Q + (y W^T) Q = (x + y (Q^T W)^T) Q

An array is turned along one axis, in blocks of as many entries as Q has. From one that is given, turned
arrays are followed forwards to the products that read them; what is added to one must be turned as well, and
is followed back to the parameters that write it (arXiv 2404.00456).
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import NamedTuple

from mojax.rules import Rules
from mojax.structure.graph import Graph, Node, Op
from mojax.view import Atom


class Space(NamedTuple):
    """Axes of parameters that are turned together by one orthogonal matrix Q `[size, size]`.

    Attributes:
      name: the first parameter that writes into it.
      kind: "residual", or "heads" (values of attention).
      size: an axis that is longer is turned in blocks of so many entries.
      axes: pairs of parameter and axis, counted from the last (-1); every such axis becomes `x Q`.
      gains: norm gains, each with those of `axes` that read what it scales. A gain becomes 1, and what reads
        is multiplied by it along that axis before it is turned.
    """

    name: str
    kind: str
    size: int
    axes: tuple[tuple[str, int], ...]
    gains: tuple[tuple[str, tuple[tuple[str, int], ...]], ...] = ()

    def placed(self, prefix: str) -> Space:
        """The same under full names."""
        axes = tuple((prefix + leaf, axis) for leaf, axis in self.axes)
        gains = tuple((prefix + g, tuple((prefix + w, i) for w, i in readers)) for g, readers in self.gains)
        return self._replace(name=prefix + self.name, axes=axes, gains=gains)


class BrokenError(Exception):
    """An operation that does not let a turned array pass, in words, and the parameter it is about, or ""."""

    def __init__(self, reason: str, leaf: str = ""):
        self.leaf = leaf
        super().__init__(reason)


class Turned(NamedTuple):
    """How a root node is turned.

    Attributes:
      axis: of the node.
      gain: the parameter that it was multiplied by along that axis, if it was.
      squared: entries are squares of a turned array; only their sum is known.
    """

    axis: int
    gain: str | None = None
    squared: bool = False


Axis = tuple[str, int]
Found = tuple[int, dict[Axis, None], dict[str, dict[Axis, None]]]


def followed(program: Graph, rules: Rules, seeds: Sequence[Node], wanted: Sequence[Node]) -> Found:
    """The size of the blocks; pairs of parameter and axis (from the last) that turn when `seeds` do; by norm
    gain, those of them that absorb it.

    Args:
      program: of `mojax.trace.graph`.
      seeds: arrays that are turned along the last axis from outside.
      wanted: arrays that must be turned along their last axis, whoever makes them.
    Raises:
      BrokenError: the function would change.
    """
    unit = next(iter((*seeds, *wanted))).shape[-1]
    while True:
        walk = _Walk(program, rules, unit)
        try:
            return walk.run(seeds, wanted)
        except _Smaller as found:
            unit = found.unit


class _Smaller(Exception):
    """Blocks must be smaller: a reshape parts the axis."""

    def __init__(self, unit: int):
        self.unit = unit


class _Walk:
    """One attempt with blocks of `unit` entries."""

    def __init__(self, program: Graph, rules: Rules, unit: int):
        self.program, self.rules, self.unit = program, rules, unit
        self.maker = {node: op for op in program.ops for node in op.outputs if op.name != "name"}
        self.turned: dict[Node, Turned] = {}
        self.axes: dict[Axis, None] = {}
        self.gains: dict[str, dict[Axis, None]] = {}
        self.reads: dict[Axis, str | None] = {}  # with which gain a parameter reads
        self.known: set[tuple[int, str]] = set()  # operations and parameters that are accounted for
        self.changed = False

    def run(self, seeds: Sequence[Node], wanted: Sequence[Node]) -> Found:
        for node in seeds:
            self.turned[node.view.root] = Turned(len(node.shape) - 1)
        self.forward()
        for node in wanted:
            if not self.held(node):
                self.demand(node, len(node.shape) - 1)
        self.forward()
        self.only_here()
        return self.unit, self.axes, self.gains

    def forward(self) -> None:
        self.changed = True
        while self.changed:  # what is demanded may have been passed by
            self.changed = False
            for op in self.program.ops[:-1]:  # the last gives the outputs
                self.step(op)

    def only_here(self) -> None:
        """What is changed must not be read by anything else."""
        leaves = {leaf for leaf, _ in self.axes} | set(self.gains)
        for op in self.program.ops:
            for x in op.inputs if op.name != "name" else ():
                leaf = x.view.root.leaf
                if leaf in leaves and (id(op), leaf) not in self.known:
                    raise BrokenError(f"is read by {said(op)} too", leaf)

    # Arrays

    def held(self, x: Node) -> tuple[Turned, int] | None:
        """How an operand is turned, and along which of its axes."""
        state = self.turned.get(x.view.root)
        for dim in range(len(x.view.axes)) if state else ():
            last = x.view.atoms([dim])[-1:]
            if state and last and last[0].axis == state.axis and last[0].stride == 1:
                self.whole(last[0])
                return state, dim
        if state is None:
            return None
        raise BrokenError("a part of the axis is read by itself")

    def whole(self, atom: Atom) -> None:
        """Blocks are whole in a part of an axis, or else smaller."""
        if atom.offset < 0 or atom.offset % self.unit:
            raise BrokenError("a part of the axis is read by itself")
        if atom.size % self.unit:
            if self.unit % atom.size or atom.size < 2:
                raise BrokenError("the axis is parted into pieces of different sizes")
            raise _Smaller(atom.size)

    def set(self, node: Node, state: Turned) -> None:
        before = self.turned.get(node)
        if before is None:
            self.turned[node] = state
            self.changed = True
        elif before != state:
            raise BrokenError("an array would be turned along two axes")

    def member(self, op: Op, x: Node, dim: int) -> Axis:
        """A parameter that is turned along the axis that `dim` shows."""
        root = x.view.root
        assert root.leaf is not None
        last = x.view.atoms([dim])[-1:]
        if not last or last[0].axis is None or last[0].stride != 1 or last[0].offset:
            raise BrokenError(f"is read in parts by {said(op)}", root.leaf)
        self.whole(last[0])
        found = root.leaf, last[0].axis - len(root.shape)
        self.axes[found] = None
        self.known.add((id(op), root.leaf))
        return found

    def behind(self, x: Node) -> str:
        """A parameter that an array is made of, for a message; else ""."""
        left, seen = [x.view.root], set()
        while left:
            node = left.pop(0)
            if node.leaf:
                return node.leaf
            op = self.maker.get(node)
            left += [y.view.root for y in (op.inputs if op else ()) if y.view.root not in seen]
            seen |= set(left)
        return ""

    # Forwards

    def step(self, op: Op) -> None:
        states = [self.held(x) for x in op.inputs] if op.name != "name" else []
        if not any(states):
            return
        if (forward := FORWARD.get(op.name)) is None:
            raise BrokenError(f"{said(op)} does not let it pass")
        state, dim = max((s for s in states if s), key=lambda s: bool(s[0].gain))
        if state.squared and op.name != "reduce_sum":
            raise BrokenError(f"its squares are read by {said(op)}")
        if state.gain and op.name not in PASSES_GAIN:
            raise BrokenError(
                f"this gain can only move into linears, and {said(op)} reads it too", state.gain
            )
        forward(self, op, states, state, dim)

    def same(self, op: Op, states: Sequence[tuple[Turned, int] | None], state: Turned, dim: int) -> None:
        """All arrays are turned alike, and so is the result."""
        for x, s in zip(op.inputs, states, strict=True):
            if s is None and not x.shape:
                raise BrokenError(f"{said(op)} adds one number to all of its entries")
            if s is None:
                self.demand(x, dim, op)
            elif s[1] != dim or s[0].gain or s[0].squared:
                raise BrokenError(f"{said(op)} joins arrays that are not turned alike")
        self.set(op.outputs[0], Turned(dim))

    def square(self, op: Op, states: Sequence, state: Turned, dim: int) -> None:
        if op.name == "integer_pow" and op.params["y"] != 2:
            raise BrokenError(f"{said(op)} does not let it pass")
        self.set(op.outputs[0], Turned(dim, None, True))

    def total(self, op: Op, states: Sequence, state: Turned, dim: int) -> None:
        axes = op.params["axes"]
        if dim in axes:
            if not state.squared:
                raise BrokenError(f"its entries are summed by {said(op)}, as the mean of LayerNorm is")
            return
        self.set(op.outputs[0], state._replace(axis=dim - sum(a < dim for a in axes)))

    def scale(self, op: Op, states: Sequence, state: Turned, dim: int) -> None:
        a, b = op.inputs[:2]
        if op.name == "mul" and a.view == b.view:
            return self.square(op, states, state, dim)
        if all(states[:2]):
            raise BrokenError(f"{said(op)} multiplies two turned arrays")
        turned, factor = (a, b) if states[0] else (b, a)
        if constant(factor, dim) and (op.name == "mul" or turned is a):
            return self.set(op.outputs[0], state._replace(axis=dim))
        leaf, others = factor.view.root.leaf, [i for i in range(len(factor.shape)) if i != dim]
        atoms = factor.view.atoms([dim])
        plain = leaf and all(constant(factor, i) for i in others) and factor.view.root.shape == (self.unit,)
        if op.name != "mul" or not plain or state.gain or atoms != (Atom(0, 1, self.unit, 0),):
            reason = f"{said(op)} multiplies its entries by other numbers than a norm's gain"
            raise BrokenError(reason, self.behind(factor))
        assert leaf is not None
        self.gains.setdefault(leaf, {})
        self.known.add((id(op), leaf))
        self.set(op.outputs[0], Turned(dim, leaf))

    def product(self, op: Op, states: Sequence, state: Turned, dim: int) -> None:
        contract, batch = _dims(op)
        side = 0 if states[0] else 1
        if (states[0] and states[1]) or dim in batch[side] or len([s for s in states if s]) > 1:
            raise BrokenError(f"{said(op)} multiplies turned arrays with each other")
        if dim in contract[side]:
            other = op.inputs[1 - side]
            if not other.view.root.leaf:
                raise BrokenError(f"{said(op)} sums over it, and no parameter does")
            reader = self.member(op, other, contract[1 - side][list(contract[side]).index(dim)])
            if self.reads.setdefault(reader, state.gain) != state.gain:
                raise BrokenError("reads it with two gains, and can absorb one", reader[0])
            if state.gain:
                self.gains[state.gain][reader] = None
            return
        if state.gain:
            raise BrokenError(
                f"this gain can only move into linears, and {said(op)} reads it too", state.gain
            )
        self.set(op.outputs[0], Turned(_out(op, side, dim)))

    def lookup(self, op: Op, states: Sequence, state: Turned, dim: int) -> None:
        self.set(op.outputs[0], state._replace(axis=_looked(op, dim)))

    # Backwards

    def demand(self, x: Node, dim: int, by: Op | None = None) -> None:
        """Whoever makes this operand has to turn it along `dim`."""
        root = x.view.root
        if root.leaf:
            assert by is not None
            self.member(by, x, dim)
            return
        last = x.view.atoms([dim])[-1:]
        if not last or last[0].axis is None or last[0].stride != 1:
            raise BrokenError(f"{said(by)} adds to it what is the same for all entries")
        self.whole(last[0])
        axis = last[0].axis
        self.set(root, Turned(axis))
        op = self.maker.get(root)
        if op is None or op.name not in BACKWARD:
            what = said(op) if op else "an input or a constant"
            raise BrokenError(f"{what} is added to it, which is not linear in a weight", self.behind(x))
        BACKWARD[op.name](self, op, axis)

    def every(self, op: Op, dim: int) -> None:
        for x in op.inputs:
            if not self.held(x):
                self.demand(x, dim, op)

    def factor(self, op: Op, dim: int) -> None:
        inputs = op.inputs[:1] if op.name == "div" else op.inputs
        varying = [x for x in inputs if not constant(x, dim)]
        if len(varying) != 1 or (op.name == "div" and not constant(op.inputs[1], dim)):
            names = [x.view.root.leaf for x in varying if x.view.root.leaf]
            reason = f"{said(op)} multiplies what is added to it, as the gain of a norm after a linear does"
            raise BrokenError(reason, *names[:1])
        if not self.held(varying[0]):
            self.demand(varying[0], dim, op)

    def writer(self, op: Op, dim: int) -> None:
        for side in (0, 1):
            for d in range(len(op.inputs[side].shape)):
                if _free(op, side, d) and _out(op, side, d) == dim and not self.held(op.inputs[side]):
                    return self.demand(op.inputs[side], d, op)
        if not any(self.held(x) for x in op.inputs[:2]):
            raise BrokenError(f"{said(op)} pairs it with another array")

    def rows(self, op: Op, dim: int) -> None:
        found = [d for d in range(len(op.inputs[0].shape)) if _looked(op, d, -1) == dim]
        if not found:
            raise BrokenError(f"{said(op)} looks up its entries one by one")
        if not self.held(op.inputs[0]):
            self.demand(op.inputs[0], found[0], op)

    def summed(self, op: Op, dim: int) -> None:
        axes = op.params["axes"]
        kept = [d for d in range(len(op.inputs[0].shape)) if d not in axes]
        if not self.held(op.inputs[0]):
            self.demand(op.inputs[0], kept[dim], op)


def said(op: Op | None) -> str:
    """An operation in words."""
    return "the program" if op is None else f"{op.name} at {op.line}" if op.line else op.name


def constant(x: Node, dim: int) -> bool:
    """Whether an operand is the same all along an axis of the result."""
    return not x.shape or x.shape[dim] == 1 or all(a.axis is None for a in x.view.axes[dim])


def _dims(op: Op) -> tuple[tuple[Sequence[int], ...], tuple[Sequence[int], ...]]:
    """The axes that are summed over, and those that are paired, of both operands."""
    if op.name == "dot_general":
        return op.params["dimension_numbers"]
    return op.params["ragged_dot_dimension_numbers"].dot_dimension_numbers


def _free(op: Op, side: int, dim: int) -> bool:
    contract, batch = _dims(op)
    groups = (
        () if op.name == "dot_general" else op.params["ragged_dot_dimension_numbers"].rhs_group_dimensions
    )
    return dim not in (*contract[side], *batch[side], *(groups if side else ()))


def _out(op: Op, side: int, dim: int) -> int:
    """The axis of a product that a free axis of an operand becomes."""
    batch = _dims(op)[1]
    before = len(batch[0]) + sum(_free(op, side, d) for d in range(dim))
    left = sum(_free(op, 0, d) for d in range(len(op.inputs[0].shape))) if side else 0
    return before + left


def _looked(op: Op, dim: int, otherwise: int | None = None) -> int:
    """The axis of the result of a lookup that an axis of its operand becomes."""
    p, shape = op.params, op.inputs[0].shape
    numbers = p["dimension_numbers"]
    gone = {*numbers.collapsed_slice_dims, *getattr(numbers, "operand_batching_dims", ())}
    if dim in gone or dim in numbers.start_index_map or p["slice_sizes"][dim] != shape[dim]:
        if otherwise is not None:
            return otherwise
        raise BrokenError(f"{said(op)} looks up its entries one by one")
    kept = [d for d in range(len(shape)) if d not in gone]
    return numbers.offset_dims[kept.index(dim)]


FORWARD: Mapping[str, Callable[..., None]] = {
    **dict.fromkeys(("add", "sub", "add_any"), _Walk.same),
    **dict.fromkeys(("square", "integer_pow"), _Walk.square),
    **dict.fromkeys(("mul", "div"), _Walk.scale),
    **dict.fromkeys(("dot_general", "ragged_dot_general"), _Walk.product),
    "neg": lambda walk, op, states, state, dim: walk.set(op.outputs[0], state._replace(axis=dim)),
    "reduce_sum": _Walk.total,
    "gather": _Walk.lookup,
}
BACKWARD: Mapping[str, Callable[[_Walk, Op, int], None]] = {
    **dict.fromkeys(("add", "sub", "add_any", "neg"), _Walk.every),
    **dict.fromkeys(("mul", "div"), _Walk.factor),
    **dict.fromkeys(("dot_general", "ragged_dot_general"), _Walk.writer),
    "gather": _Walk.rows,
    "reduce_sum": _Walk.summed,
}
PASSES_GAIN = ("gather", "dot_general", "ragged_dot_general", "neg", "mul", "div")
