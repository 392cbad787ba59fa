"""A parameter on its way through a program that is run again; see `mojax.interpret`."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from typing import Any

from jax import lax

from mojax.formats.base import QTensor
from mojax.view import View

Path = tuple[int, ...]  # positions of nested equations: the identity of one place in the program


class Base:
    """The value of a parameter in one body of the program: as given, until it is read.

    Attributes:
      stacks: how many leading axes of it are still to be taken row by row.
      shards: of each axis, the mesh axes it is cut along, inside a shard_map.
    """

    def __init__(self, name: str, value: Any, stacks: int = 0, done: bool = False, shards: tuple = ()):
        self.name, self.value, self.done, self.shards = name, value, done, shards
        self.stacks = len(value.batch) if isinstance(value, QTensor) else stacks


@dataclasses.dataclass(frozen=True)
class Leaf:
    """A parameter on its way through the program.

    Attributes:
      view: how its value here shows the parameter.
      chain: the functions that make that value of the base's, one after the other.
      scans: the loops of which it is a row, by their paths.
      rows: the indices at which rows were taken otherwise, and of how many.
      at: the indices of all the rows taken, of a loop or otherwise: of the parameter's first axes, in order.
    """

    base: Base
    view: View
    chain: tuple[Callable[[Any], Any], ...] = ()
    scans: frozenset[Path] = frozenset()
    rows: tuple[tuple[Any, int], ...] = ()
    at: tuple[Any, ...] = ()

    def again(self, value: Any, done: bool | None = None) -> Leaf:
        """The same leaf in another body, where its base has the value `value`."""
        b = self.base
        done = b.done if done is None else done
        return dataclasses.replace(self, base=Base(b.name, value, b.stacks, done, b.shards))


def raw(inputs: Sequence) -> list:
    """The values to hand to a body, parameters as they were given."""
    return [x.base.value if isinstance(x, Leaf) else x for x in inputs]


def wrap(values: Sequence, like: Sequence) -> list:
    """`values` in a body as leaves, where `like` has leaves outside."""
    return [x.again(v) if isinstance(x, Leaf) else v for v, x in zip(values, like, strict=True)]


def take_row(leaf: Leaf, eqn: Any, rest: list, shape: tuple[int, ...]) -> Leaf | None:
    """One row of a stack that the program takes by index, if that is what `eqn` does."""
    base, name = leaf.base, eqn.primitive.name
    if not base.stacks or leaf.chain or name not in ("slice", "dynamic_slice"):
        return None
    if shape != (1, *base.value.shape[1:]) or leaf.view.axes[0] == ():
        return None
    i = rest[0] if name == "dynamic_slice" else eqn.params["start_indices"][0]
    view = View(leaf.view.root, ((), *leaf.view.axes[1:]))
    row = base.value.row(i) if isinstance(base.value, QTensor) else base.value[i]
    inner = Base(base.name, row, base.stacks - 1, base.done, base.shards[1:])
    rows = (*leaf.rows, (i, base.value.shape[0]))
    at = (*leaf.at, i)
    return Leaf(inner, view, (lambda v: lax.expand_dims(v, [0]),), leaf.scans, rows, at)
