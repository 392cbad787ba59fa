"""A parameter on its way through a program that is run again; see `mojax.interpret`."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax.numpy as jnp
from jax import lax

from mojax.formats.base import QTensor
from mojax.view import Entries, View

Path = tuple[int, ...]  # positions of nested equations: the identity of one place in the program


@dataclasses.dataclass
class Base:
    """The value of a parameter in one body of the program: as given, until it is read.

    Attributes:
      shape: of the whole parameter.
      stacks: how many leading axes of it are still to be taken row by row.
      shards: of each axis, the mesh axes it is cut along, inside a shard_map.
    """

    name: str
    value: Any
    shape: tuple[int, ...]
    stacks: int = 0
    done: bool = False
    shards: tuple = ()

    def __post_init__(self) -> None:
        if isinstance(self.value, QTensor):
            self.stacks = len(self.value.batch)


class Scan(NamedTuple):
    """A loop of which a parameter is a row: its path, and which entries of an axis of how many it reads."""

    path: Path
    over: Entries
    of: int


@dataclasses.dataclass(frozen=True)
class Leaf:
    """A parameter on its way through the program.

    Attributes:
      view: how its value here shows the parameter.
      chain: the functions that make that value of the base's, one after the other.
      scans: the loops of which it is a row, as far as they go over ever later axes.
      rows: the indices at which rows were taken otherwise, and of how many.
      at: the indices of all the rows taken, of a loop or otherwise: of the parameter's first axes, in order.
      gone: the axes of the parameter that a packed value lacks, because a row was taken.
    """

    base: Base
    view: View
    chain: tuple[Callable[[Any], Any], ...] = ()
    scans: tuple[Scan, ...] = ()
    rows: tuple[tuple[Any, int], ...] = ()
    at: tuple[Any, ...] = ()
    gone: tuple[int, ...] = ()

    def again(self, value: Any, done: bool | None = None) -> Leaf:
        """The same leaf in another body, where its base has the value `value`."""
        done = self.base.done if done is None else done
        return dataclasses.replace(self, base=dataclasses.replace(self.base, value=value, done=done))

    def axis(self, axis: int) -> int:
        """Which axis of a packed value an axis of the parameter is."""
        return axis - sum(g < axis for g in self.gone)


def raw(inputs: Sequence) -> list:
    """The values to hand to a body, parameters as they were given."""
    return [x.base.value if isinstance(x, Leaf) else x for x in inputs]


def wrap(values: Sequence, like: Sequence) -> list:
    """`values` in a body as leaves, where `like` has leaves outside."""
    return [x.again(v) if isinstance(x, Leaf) else v for v, x in zip(values, like, strict=True)]


def take_rows(leaf: Leaf, eqn: Any, rest: list, shape: tuple[int, ...]) -> Leaf | None:
    """The leaf where the program takes rows of a stack by index, if that is what `eqn` does."""
    if eqn.primitive.name not in ("slice", "dynamic_slice"):
        return None
    starts = rest if eqn.primitive.name == "dynamic_slice" else eqn.params["start_indices"]
    whole, n = tuple(leaf.base.value.shape), 0
    while n < leaf.base.stacks and shape[n] == 1:
        n += 1
    if n and not leaf.chain and shape[n:] == whole[n:]:
        found: Leaf | None = leaf
        for i in range(n):
            found = found and _first_row(found, starts[i])
        if found is not None:
            view = found.view._replace(axes=((),) * n + found.view.axes)
            return dataclasses.replace(found, view=view, chain=(Unsqueeze(n),))
    sizes = [math.prod(a.size for a in axis) for axis in leaf.view.axes]
    if not isinstance(leaf.base.value, QTensor) or any(
        n not in (1, size) for n, size in zip(shape, sizes, strict=True)
    ):
        return None
    found = leaf
    for d in (d for d, size in enumerate(sizes) if shape[d] != size):
        found = found and packed_row(found, d, starts[d])
    return found if found is not leaf else None


def _first_row(leaf: Leaf, i: Any) -> Leaf | None:
    """Entry `i` of the first axis, which must be the parameter's first that is left."""
    base, a = leaf.base, leaf.view.entries(0)
    if a is None or a.axis != len(leaf.at):
        return None
    if isinstance(base.value, QTensor):
        found = packed_row(leaf, 0, i)
        if found is None:
            return None
        leaf = found
    else:
        row = dataclasses.replace(base, value=base.value[i], stacks=base.stacks - 1)
        leaf = dataclasses.replace(leaf, base=row)
    rows, at = (*leaf.rows, (a.at(i), base.shape[a.axis])), (*leaf.at, a.at(i))
    return dataclasses.replace(leaf, view=leaf.view._replace(axes=leaf.view.axes[1:]), rows=rows, at=at)


def packed_row(leaf: Leaf, dim: int, i: Any) -> Leaf | None:
    """A packed leaf at entry `i` of axis `dim` of its view, if there is a matrix for every entry."""
    q, a = leaf.base.value, leaf.view.entries(dim)
    if a is None or leaf.axis(a.axis) not in q.batch:
        return None
    i = i if isinstance(i, int) else jnp.clip(i, 0, a.size - 1)
    base = dataclasses.replace(leaf.base, value=q.row(a.at(i), leaf.axis(a.axis)))
    axes = (*leaf.view.axes[:dim], (), *leaf.view.axes[dim + 1 :])
    return dataclasses.replace(leaf, base=base, view=leaf.view._replace(axes=axes), gone=(*leaf.gone, a.axis))


class Unsqueeze(NamedTuple):
    """Puts `n` axes of size 1 before the others."""

    n: int

    def __call__(self, value: Any) -> Any:
        return lax.expand_dims(value, range(self.n))


def squeezed(leaf: Leaf, name: str, shape: tuple[int, ...]) -> bool:
    """Whether an operation undoes what the leaf's chain does, so that the row itself is left."""
    undone = len(leaf.chain) == 1 and isinstance(leaf.chain[0], Unsqueeze) and name in ("squeeze", "reshape")
    return undone and shape == tuple(leaf.base.value.shape)
