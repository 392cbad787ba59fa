"""Arrays that hold positions along an axis (an iota, the choice of a top-k), while only lookups use them.

The chosen experts of a token index the axis of experts: when an expert is cut, the choice is made among the
others and the lookup still finds the right one. A position that meets any other arithmetic (the angle of a
rotary embedding) freezes its axis.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

from mojax.structure.dims import Dim, find, freeze, unify
from mojax.structure.graph import Node, Op

PASS = frozenset(
    "transpose squeeze reshape broadcast_in_dim slice dynamic_slice split convert_element_type copy copy_p "
    "device_put name stop_gradient reduce_precision sharding_constraint pcast pvary row tile".split()
)
LOOKUPS = ("gather", "scatter", "scatter-add", "scatter-mul", "scatter-min", "scatter-max")
ORDER = ("lt", "le", "gt", "ge")


class Index(NamedTuple):
    """Positions along an axis. `exact` is False once something was added, as for negative ones."""

    dim: Dim
    exact: bool = True


class Positions:
    """Which arrays hold positions, one Index for all entries or one for each column of the last axis."""

    def __init__(self, dims: Callable[[Node], list[Dim]]):
        self.dims = dims
        self.held: dict[Node, tuple[Index | None, ...]] = {}

    def columns(self, node: Node, count: int) -> list[Dim | None]:
        """The axis that each of `count` columns of indices looks up; None where it is not known."""
        held = self.held.get(node, ())
        if len(held) != count:
            return [None] * count
        return [i.dim if i and i.exact else None for i in held]

    def step(self, op: Op, reason: str) -> None:
        """Follow the positions that `op` reads, or freeze their axes."""
        self.make(op)
        held = [self.held.get(x, ()) for x in op.inputs]
        if any(held) and not self.follow(op, held, reason):
            self.lose(held, reason)

    def lose(self, held: list[tuple[Index | None, ...]], reason: str) -> None:
        for index in (i for columns in held for i in columns if i):
            freeze(index.dim, f"position used by {reason}")

    def make(self, op: Op) -> None:
        p = op.params
        if op.name == "iota":
            axis, node, out = p["dimension"], op.outputs[0], op.outputs[0]
        elif op.name in ("argmax", "argmin"):
            axis, node, out = p["axes"][0], op.inputs[0], op.outputs[0]
        elif op.name == "top_k":
            axis, node, out = p.get("axis", -1), op.inputs[0], op.outputs[1]
        else:
            return
        self.held[out] = (Index(self.dims(node)[axis]),)

    def follow(self, op: Op, held: list[tuple[Index | None, ...]], reason: str) -> bool:
        """Whether the positions that `op` reads are still followed."""
        out = op.outputs[0] if op.outputs else None
        if out is None:
            return False
        if op.name in LOOKUPS:
            return self.lookup(op, held)
        if op.name == "concatenate":
            return self.concatenate(op, held)
        if any(len(h) > 1 for h in held):
            return False
        one = [h[0] if h else None for h in held]
        first = next(i for i in one if i)
        if op.name in PASS and any(one[1:]):  # where a dynamic slice starts
            return False
        if op.name in PASS or (op.name in ("join", "stack") and len(op.inputs) == 1):
            self.held.update((y, (first,)) for y in op.outputs)
            return True
        if op.name == "sort":
            self.held.update((y, (i,)) for y, i in zip(op.outputs, one, strict=True) if i)
            return True
        others = [i for x, i in zip(op.inputs, one, strict=True) if x.shape or i]
        if len(others) == 1:
            return self.scalar(op, first, out)
        if op.name == "select_n":
            return self.select(one, out)
        return self.compare(op, one, reason)

    def lookup(self, op: Op, held: list[tuple[Index | None, ...]]) -> bool:
        """The indices are used up; positions that are looked up remain positions."""
        if op.name != "gather":
            return not held[0] and not any(held[2:])
        if len(held[0]) > 1:
            return False
        if held[0]:
            self.held[op.outputs[0]] = held[0]
        return True

    def concatenate(self, op: Op, held: list[tuple[Index | None, ...]]) -> bool:
        axis, out = op.params["dimension"], op.outputs[0]
        if axis == len(out.shape) - 1 and all(x.shape[-1] == 1 for x in op.inputs):
            self.held[out] = tuple(i for columns in held for i in (columns or (None,)))
            return True
        return False

    def scalar(self, op: Op, index: Index, out: Node) -> bool:
        """Arithmetic with scalars, as for positions below 0 and for those that are clipped."""
        if op.name in ("add", "sub", *ORDER):
            self.held[out] = (index._replace(exact=False),)
        elif op.name in ("max", "min", "clamp"):
            self.held[out] = (index,)
        return op.name in ("add", "sub", "max", "min", "clamp", *ORDER)

    def select(self, one: list[Index | None], out: Node) -> bool:
        """`where(i < 0, i + n, i)` is a position again; so is any choice among positions."""
        test, *cases = one
        given = [i for i in (test, *cases) if i]
        if None in cases or len({find(i.dim) for i in given}) > 1 or (test and test.exact):
            return False
        exact = [i for i in cases if i and i.exact]
        if not exact or (test is None and len(exact) < len(cases)):
            return False
        self.held[out] = (exact[0],)
        return True

    def compare(self, op: Op, one: list[Index | None], reason: str) -> bool:
        """Two positions along the same axis are equal, or in order, whatever else is cut."""
        left, right = one[:2]
        if op.name not in ("eq", "ne", *ORDER) or not (left and right and left.exact and right.exact):
            return False
        if left.dim.size != right.dim.size:
            return False
        unify(left.dim, right.dim, reason)
        return True
