"""What becomes of every parameter of a program: read by a site, kept as it is, or out of reach."""

from __future__ import annotations

from collections.abc import Iterable
from typing import NamedTuple

from mojax.rules import RULES, Dot, Rules
from mojax.structure.graph import Graph, Node, Op, read

VERBS = {
    "mul": "multiplies an activation",
    "div": "meets an activation in a division",
    "add": "is added to an activation",
    "add_any": "is added to an activation",
    "sub": "is added to an activation",
    "gather": "looked up by index",
    "concatenate": "joined to an activation",
    "select_n": "masks an activation",
    "use": "returned, or decides a branch",
}
OPAQUE = (
    "jaxpr",
    "jaxprs",
    "call_jaxpr",
    "call_target_name",
)  # parameters of an operation with a program inside


def coverage(program: Graph, rules: Rules = RULES) -> dict[str, str]:
    """For every parameter, in the order of `program.params`, one line.

    "site": a dot, ragged dot or convolution reads it; "; also ..." follows if something else does too.
    "kept: ...": nothing contracts it: a gain, a bias, a table that is looked up, what is never used.
    "unreachable: ...": it is contracted, but only after arithmetic (W + B A, W / |W|, joined weights), which
    is named with its line. A parameter with one long axis is always kept.
    """
    flow = _Flow(program, rules)
    return {name: flow.describe(name, node) for name, node in program.params.items()}


class _Use(NamedTuple):
    """What an operation does with a value that was made from parameters alone, the most telling first.

    Attributes:
      rank: 0 contracted with an activation, 1 meets an activation otherwise, 2 leaves the program.
    """

    rank: int
    op: Op


class _Flow:
    """Which values depend on the arguments, and where those that depend on parameters alone end."""

    def __init__(self, program: Graph, rules: Rules):
        self.rules = rules
        self.users: dict[Node, list[Op]] = {}
        for op in program.ops:
            for root in {x.view.root: None for x in op.inputs} if op.name != "name" else ():
                self.users.setdefault(root, []).append(op)
        self.live = self._reached(program.args)
        self.ends = self._ends(program)

    def _reached(self, nodes: Iterable[Node]) -> set[Node]:
        """Every value that depends on `nodes`."""
        left = [x.view.root for x in nodes]
        found = set(left)
        while left:
            node = left.pop()
            for op in self.users.get(node, ()):
                new = {root for x in _made(op, node) if (root := x.view.root) not in found and not root.leaf}
                found |= new
                left += new
        return found

    def end(self, op: Op, node: Node) -> int | None:
        """The rank of the use of a value by an operation; None if it makes another such value of it."""
        made = _made(op, node)
        if op.name == "use":
            return 2
        if not any(x.view.root in self.live for x in made):
            return None
        rule = self.rules.get(op.name)
        contracts = isinstance(rule, Dot) and rule.op != "gather" and not _outer(op)
        return 0 if contracts or any(key in op.params for key in OPAQUE) else 1

    def _ends(self, program: Graph) -> dict[Node, _Use]:
        """The most telling end of every value that is made from parameters alone."""
        makers: dict[Node, list[Node]] = {}
        first: list[list[tuple[Node, Op]]] = [[], [], []]
        for node, ops in self.users.items():
            if node in self.live:
                continue
            for op in ops:
                rank = self.end(op, node)
                if rank is not None:
                    first[rank].append((node, op))
                else:
                    for x in _made(op, node):
                        makers.setdefault(x.view.root, []).append(node)
        found: dict[Node, _Use] = {}
        for rank, starts in enumerate(first):
            for start, op in starts:
                left = [start]
                while left:
                    node = left.pop()
                    if node not in found:
                        found[node] = _Use(rank, op)
                        left += [x for x in makers.get(node, ()) if not x.leaf]
        return found

    def describe(self, name: str, node: Node) -> str:
        short = sum(n > 1 for n in node.shape) < 2
        sites, lost, kept = self.uses(node, short)
        if sites:
            others = [said for said in (*lost, *kept) if said]
            return "; also ".join(["site", *others[:1]])
        if lost:
            return f"unreachable: {lost[0]}"
        axes = "one axis only, " if len(node.shape) and short and kept else ""
        return f"kept: {axes}{kept[0] if kept else 'never used'}"

    def uses(self, node: Node, short: bool) -> tuple[list[Op], list[str], list[str]]:
        """The sites that read a parameter, and in words its uses before a contraction, and the others."""
        sites, lost, kept = [], [], []
        for op in self.users.get(node, ()):
            if op.name == "shard":
                inner = [x.view.root for x in _made(op, node) if x.view.root.leaf]
                for part in (self.uses(x, short) for x in inner):
                    sites, lost, kept = sites + part[0], lost + part[1], kept + part[2]
                if inner:
                    continue
            site, rank = read(op, self.rules), self.end(op, node)
            if site and site.kind != "gather":
                sites.append(op)
            elif rank == 0 and not short:
                lost.append(f"inside {_at(op)}")
            elif rank is not None:
                kept.append(self.said(op))
            elif ends := [use for x in _made(op, node) if (use := self.ends.get(x.view.root))]:
                end = min(ends, key=lambda use: use.rank)
                if end.rank == 0 and not short:
                    lost.append(f"{_at(op)} before {_at(end.op)}")
                else:
                    kept.append(f"used through {_at(op)}, {self.said(end.op)}")
        return sites, lost, kept

    def said(self, op: Op) -> str:
        verb = VERBS.get("mul" if _outer(op) else op.name, f"used by {_name(op)}")
        said = f"{verb} at {op.line}" if op.line else verb
        after = (
            [u for x in op.outputs for u in self.users.get(x.view.root, ())] if op.name == "gather" else []
        )
        dots = [u for u in after if isinstance(self.rules.get(u.name), Dot) and u.name != "gather"]
        return f"{said}, then {_at(dots[0])}" if dots else said


def _made(op: Op, node: Node) -> list[Node]:
    """The outputs of an operation that depend on its input `node`."""
    if op.name in ("shard", "unshard"):
        return [y for x, y in zip(op.inputs, op.outputs, strict=True) if x.view.root is node]
    return list(op.outputs)


def _outer(op: Op) -> bool:
    return op.name == "dot_general" and not op.params["dimension_numbers"][0][0]


def _name(op: Op) -> str:
    names = {"join": "a loop or a branch", "dot_general": "dot", "conv_general_dilated": "convolution"}
    return names.get(op.name, op.name)


def _at(op: Op) -> str:
    return f"{_name(op)} at {op.line}" if op.line else _name(op)
