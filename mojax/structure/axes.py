"""Which axes of which parameters must be cut together, and which cannot be cut: for structured pruning."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Sequence
from typing import NamedTuple

import numpy as np

from mojax.structure.contractions import PRODUCTS
from mojax.structure.couplings import MOVES, Step, fresh, unknown
from mojax.structure.dims import Dim, Part, freeze, places, unify
from mojax.structure.graph import Graph, Node, Op
from mojax.structure.positions import Positions

RULES = {**MOVES, **PRODUCTS}


class Member(NamedTuple):
    """An axis of a parameter of which every unit of a group owns some entries; see `indices`."""

    leaf: str
    axis: int
    parts: tuple[Part, ...]

    def indices(self, units: int | Sequence[int] | np.ndarray) -> np.ndarray:
        """The entries of the axis that go when `units` go, ascending, for `np.delete(leaf, ., axis)`.

        A parameter with two members in one group (a square weight of the residual stream) loses entries of
        both.
        """
        found = []
        for offset, stride, repeats in self.parts:
            at = offset + stride * np.atleast_1d(np.asarray(units, np.int64))
            for count, step in repeats:
                at = np.add.outer(at, step * np.arange(count)).ravel()
            found.append(at)
        return np.unique(np.concatenate(found))


@dataclasses.dataclass(frozen=True)
class Group:
    """Axes that are cut together: unit i of all members, or none. Iterates over pairs of leaf and axis.

    Attributes:
      size: number of units.
      members: the axes, parameters in order of their names.
      frozen: why no unit can be cut: "output", "input", "constant", "position used by mul at rope.py:3".
      least: how many units must remain: as many as a top-k chooses.
    """

    size: int
    members: tuple[Member, ...]
    frozen: tuple[str, ...] = ()
    least: int = 1

    @property
    def prunable(self) -> bool:
        return not self.frozen and self.size > self.least

    @property
    def axes(self) -> tuple[tuple[str, int], ...]:
        """The members as pairs of parameter and axis."""
        return tuple((m.leaf, m.axis) for m in self.members)

    def __iter__(self) -> Iterator[tuple[str, int]]:
        return iter(self.axes)

    def __len__(self) -> int:
        return len(self.members)


def coupled(graph: Graph) -> tuple[Group, ...]:
    """Every group of a program, also those that cannot be cut, in the order of their first member.

    When a unit is cut the program is traced anew, so it must take its sizes from the shapes of its parameters
    and arguments. Single entries of an axis (a class token) are in no group. Whatever is not understood is
    frozen, with the reason.

    Args:
      graph: of `mojax.trace.graph(..., views=False)`.
    """
    walk = _Walk(graph)
    for op in graph.ops:
        walk.step(op)
    for d in (d for node in graph.outputs for d in walk.of(node)):
        freeze(d, "output")
    found: dict[Dim, dict[tuple[str, int], list[Part]]] = {}
    for name, node in graph.params.items():
        for axis, d in enumerate(walk.of(node)):
            for unit, part in places(d):
                if unit.size > 1:
                    found.setdefault(unit, {}).setdefault((name, axis), []).append(part)
    return tuple(
        Group(d.size, tuple(Member(*at, tuple(p)) for at, p in parts.items()), tuple(d.frozen), d.least)
        for d, parts in found.items()
    )


class _Walk:
    """The axes of every array of a program."""

    def __init__(self, graph: Graph):
        self.dims: dict[Node, list[Dim]] = {n: fresh(n.shape) for n in graph.params.values()}
        self.dims |= {n: fresh(n.shape, "input") for n in graph.args}
        self.made = {y for op in graph.ops for y in op.outputs}
        self.positions = Positions(self.of)
        self.loops: dict[object, Dim] = {}

    def of(self, node: Node) -> list[Dim]:
        """A loop is read before what it carries is known; what nothing makes is a constant."""
        if node not in self.dims:
            self.dims[node] = fresh(node.shape, *(() if node in self.made else ("constant",)))
        return self.dims[node]

    def step(self, op: Op) -> None:
        reason = f"{op.name} at {op.line}" if op.line else op.name
        step = Step(op, [self.of(x) for x in op.inputs], reason, self.positions, self.loops)
        outputs = RULES.get(op.name, unknown)(step)
        for node, dims in zip(op.outputs, outputs, strict=True):
            for a, b in zip(self.dims.get(node, ()), dims, strict=node in self.dims):
                unify(a, b, reason)
            self.dims.setdefault(node, dims)
        self.positions.step(op, reason)
