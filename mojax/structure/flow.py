"""What the flow of values through a program says: who can absorb a scale, and what decides a top-k."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

from mojax.rules import Dot, Rules
from mojax.structure.graph import Graph, Node, Op, Read, read, whole
from mojax.view import Atom, View, follow

# Where the channels of a group lie in an array on the way to their producer: its part along every axis in
# `Read.batch`, then the part that is the channels. An atom without an axis: the array is the same along it.
Path = tuple[tuple[Atom, ...], ...]
DECIDES = frozenset({"top_k", "approx_top_k", "argmax"})


class Absorber(NamedTuple):
    """A parameter that absorbs a scale: `producer`, `channels` and `also` of `mojax.trace.Site`.

    Attributes:
      depth: how many axes of the batch of the sites it has.
      split: how devices share those axes and the channels, see `Flow.split`.
    """

    leaf: str | None = None
    channels: tuple[tuple[int, bool], ...] = ()
    also: tuple[str, ...] = ()
    depth: int = 0
    split: tuple[Any, ...] = ()


NOBODY = Absorber()


class Flow:
    """Which operation makes each root node, and which use it."""

    def __init__(self, program: Graph, rules: Rules):
        self.rules = rules
        self.maker = {node: op for op in program.ops for node in op.outputs}
        self.users: dict[Node, list[Op]] = {}
        self.readers: dict[str, list[Op]] = {}  # of a parameter, or of a shard of it
        for op in program.ops:
            for node in op.inputs if op.name != "name" else ():  # a named value is a view
                root = node.view.root
                self.users.setdefault(root, []).append(op)
                if root.leaf and op.name != "shard":
                    self.readers.setdefault(root.leaf, []).append(op)
        self.specs = _specs(program.ops)
        self.deciding = self._deciding(program.ops)

    def router(self, site: Read) -> bool:
        """Whether the output of a site decides a top-k, with no other site between them."""
        return id(site.op) in self.deciding

    def _deciding(self, ops: Sequence[Op]) -> set[int]:
        """The contractions from which a value flows into a top-k, through anything else."""
        left = [x.view.root for op in ops if op.name in DECIDES for x in op.inputs]
        seen, found = set(left), set()
        while left:
            op = self.maker.get(left.pop())
            if op and isinstance(self.rules.get(op.name), Dot):
                found.add(id(op))
                continue
            new = {x.view.root for x in (op.inputs if op else ())} - seen
            seen |= new
            left += new
        return found

    def producer(self, group: Sequence[Read]) -> Absorber:
        """The parameter that absorbs a scale of the input of these sites; see `mojax.trace.Site`."""
        root, atoms = group[0].input
        if not whole(root, atoms) or not all(
            r.kind in ("dot", "ragged_dot") and whole(*r.weight) for r in group
        ):
            return NOBODY  # a part of an axis, or no dot
        inside = {id(r.op) for r in group}
        used = [*self.users[root], *(op for r in group for op in self.readers[r.name])]
        if not all(id(op) in inside for op in used):
            return NOBODY
        batches = [self.batch(r) for r in group]
        loops = tuple(loop for loop, _ in batches[0])
        found = _Walk(self, loops).source(root, (*(part for _, part in batches[0]), atoms))
        if found is None or any(b[: found.depth] != batches[0][: found.depth] for b in batches):
            return NOBODY
        splits = [self.split(r.weight[0], r.batch[: found.depth], r.contract) for r in group]
        if any(split != found.split for split in splits) or (found.channels and any(found.split)):
            return NOBODY
        return found

    def batch(self, r: Read) -> list[tuple[Any, tuple[Atom, ...]]]:
        """For every axis in `r.batch`: the loop or the groups of rows that run along it (None: an axis of the
        input does), and the part of the input along it."""
        rule = self.rules.get(r.op.name)
        assert r.dims is not None and isinstance(rule, Dot)
        weight, x = r.op.inputs[r.side].view, r.op.inputs[1 - r.side].view
        found: dict[int, tuple[Any, tuple[Atom, ...]]] = {
            axis: ((loop, weight.root.shape[axis]), ()) for axis, loop in weight.rows
        }
        for dim, partner in zip(r.dims.batch, r.dims.paired, strict=True):
            axes = whole(weight.root, weight.atoms([dim])) or ()
            rows = [d for d in range(len(x.axes)) if d not in r.dims.partners]
            if len(axes) == 1 and partner is not None:
                found[axes[0]] = None, x.atoms([partner])
            elif len(axes) == 1 and len(rows) == 1 and rule.groups is not None:
                found[axes[0]] = r.op.inputs[rule.groups].view, x.atoms(rows)
        return [found.get(axis, (object(), ())) for axis in r.batch]

    def split(self, root: Node, batch: Sequence[int], channels: Sequence[int]) -> tuple[Any, ...]:
        """The axes of the mesh that split a parameter along each axis of `batch`, and along its channels."""
        specs = self.specs.get(root)
        if specs is None:
            return (None,) * (len(batch) + 1)
        inner = any(specs[i] for i in channels[1:])  # not in one piece of the flattened channels
        return (*(specs[i] for i in batch), object() if inner else specs[channels[0]])


def _specs(ops: Sequence[Op]) -> dict[Node, list[Any]]:
    """For every shard of a parameter: over which axes of the mesh each of its axes is split."""
    found = {}
    for op in ops:
        for spec, x in zip(op.params["in_specs"], op.outputs, strict=True) if op.name == "shard" else ():
            if x.view.root.leaf:
                names = dict(zip((a[0].axis for a in x.view.axes), spec, strict=False))
                found[x.view.root] = [names.get(i) for i in range(len(x.shape))]
    return found


class _Walk(NamedTuple):
    """The way back from the input of a group: through what is linear in the channels, and used once.

    Attributes:
      loops: what runs along each axis of the batch, see `Flow.batch`.
    """

    flow: Flow
    loops: tuple[Any, ...]

    def source(self, node: Node, path: Path) -> Absorber | None:
        """The parameter in which `node` is linear along `path`; gains first."""
        op = self.flow.maker.get(node)
        if op is None:
            return None
        match op.name:
            case "mul":
                return self.factor(op, op.inputs, path)
            case "div" | "neg":
                return self.factor(op, op.inputs[:1], path)
            case "add" | "add_any" | "sub":
                return self.biased(op, path)
            case "dot_general":
                return self.product(op, path)
            case "ragged_dot_general":
                return self.ragged(op, path)
        return None

    def factor(self, op: Op, inputs: Sequence[Node], path: Path) -> Absorber | None:
        gains, others = [], []
        for x in inputs:
            if inner := self.elementwise(op, x, path):
                (gains if x.view.root.leaf else others).append((x, inner))
        found = (self.operand(x, inner) for x, inner in gains + others)
        return next(filter(None, found), None)

    def biased(self, op: Op, path: Path) -> Absorber | None:
        """A sum with a parameter, which has to be scaled as well."""
        for x, bias in (op.inputs, op.inputs[::-1]):
            through, beside = self.elementwise(op, x, path), self.elementwise(op, bias, path)
            if not through or not beside or x.view.root.leaf or not bias.view.root.leaf:
                continue
            found, more = self.operand(x, through), self.operand(bias, beside)
            if found and more and found._replace(leaf=None, also=()) == more._replace(leaf=None):
                return found._replace(also=(*found.also, bias.view.root.leaf))
        return None

    def elementwise(self, op: Op, x: Node, path: Path) -> Path | None:
        rank = len(op.outputs[0].shape)
        return _through(path, x.view, {i: i for i in range(rank)}) if len(x.shape) == rank else None

    def product(self, op: Op, path: Path) -> Absorber | None:
        """One operand of a dot, along the axes that it does not contract."""
        contract, batch = op.params["dimension_numbers"]
        free = [
            [d for d in range(len(op.inputs[i].shape)) if d not in (*contract[i], *batch[i])] for i in (0, 1)
        ]
        found = []
        for i in (0, 1):
            before = len(batch[0]) + (len(free[0]) if i else 0)
            dims = dict(enumerate(batch[i])) | {before + n: d for n, d in enumerate(free[i])}
            view = op.inputs[i].view
            inner = _through(path, view, dims)
            source = self.operand(op.inputs[i], inner, view.root_axes(contract[i])) if inner else None
            if source and not view.root.leaf and not source.channels:  # through attention: say so
                source = source._replace(channels=((math.prod(a.size for a in path[-1]), True),))
            found.append(source)
        return next(filter(None, found), None)

    def ragged(self, op: Op, path: Path) -> Absorber | None:
        """The weights of groups of rows, if the path follows the rows of the same groups."""
        site, view = read(op, self.flow.rules), op.inputs[1].view
        if site is None or site.dims is None or len(view.axes) != 3 or len(op.outputs[0].shape) != 2:
            return None
        (group,), (summed,) = site.dims.batch, site.dims.contract
        rows = View.of(op.outputs[0], op.outputs[0].shape).atoms([0])
        same = [
            n == op.inputs[2].view and part == rows for n, part in zip(self.loops, path[:-1], strict=True)
        ]
        inner = _through(path, view, {1: 3 - group - summed})
        if not inner or not any(same):
            return None
        at = same.index(True)
        parts = (*inner[:at], view.atoms([group]), *inner[at + 1 :])
        loops = (*self.loops[:at], None, *self.loops[at + 1 :])
        return self._replace(loops=loops).operand(op.inputs[1], parts, view.root_axes([summed]))

    def operand(self, x: Node, path: Path, contracted: Sequence[int] = ()) -> Absorber | None:
        """The parameter that `x` is, or its source."""
        root = x.view.root
        if root.leaf is None:
            return self.source(root, path) if len(self.flow.users[root]) == 1 else None
        if len(self.flow.readers[root.leaf]) != 1:
            return None
        rest = _long(root, [i for i in range(len(root.shape)) if i not in contracted])
        rows = {(loop, root.shape[axis]): (axis,) for axis, loop in x.view.rows}
        axes = [
            _axes(root, part) if loop is None else rows.get(loop, ())
            for loop, part in zip(self.loops, path, strict=False)
        ]
        channels = _axes(root, path[-1])
        for depth in range(len(axes), -1, -1):
            shown = [*(i for part in axes[:depth] for i in part), *channels]
            if channels and _long(root, shown) == rest and all(len(part) == 1 for part in axes[:depth]):
                split = self.flow.split(root, shown[:depth], channels)
                return Absorber(root.leaf, _factors(path[-1]), (), depth, split)
        return None


def _through(path: Path, view: View, dims: Mapping[int, int]) -> Path | None:
    """The path in what an operand shows; `dims` is the operand's axis of each axis. None if it is lost."""
    out = []
    for part in path:
        inner = [_part(a, view, dims.get(a.axis) if a.axis is not None else None) for a in part]
        if None in inner:
            return None
        out.append(tuple(a for atoms in inner for a in atoms or ()))
    return tuple(out) if any(a.axis is not None for a in out[-1]) else None


def _part(a: Atom, view: View, dim: int | None) -> tuple[Atom, ...] | None:
    size = 1 if dim is None else math.prod(b.size for b in view.axes[dim])
    if dim is None or size == 1:
        return (Atom(None, 0, a.size, 0),)
    if a.offset or size % (a.size * a.stride):
        return None
    shape = (size // (a.size * a.stride), a.size, a.stride)
    (found,) = follow("reshape", {"dimensions": None}, [shape], View(view.root, (view.axes[dim],)))
    return None if found is None else found.axes[1]


def _axes(root: Node, atoms: Sequence[Atom]) -> tuple[int, ...]:
    """The whole axes of `root` that these atoms are; () if they are not."""
    kept = tuple(a for a in atoms if a.axis is not None)
    return whole(root, View(root, (kept,)).atoms([0])) or ()


def _long(root: Node, axes: Sequence[int]) -> list[int]:
    return [i for i in axes if root.shape[i] > 1]


def _factors(atoms: Sequence[Atom]) -> tuple[tuple[int, bool], ...]:
    """`mojax.trace.Site.channels`."""
    out: list[tuple[int, bool]] = []
    for a in atoms:
        n, has = a.size, a.axis is not None
        if out and out[-1][1] == has:
            n *= out.pop()[0]
        out.append((n, has))
    return () if all(has for _, has in out) else tuple(out)
