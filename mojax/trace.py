"""Where a function reads its parameters: sites, found in its jaxpr without running it."""

from __future__ import annotations

import sys
import sysconfig
import traceback
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import jax
from jax.extend import core

from mojax.errors import InputError
from mojax.rules import RULES, Call, Move, Rules, views_of
from mojax.structure.flow import Flow
from mojax.structure.graph import Graph, Node, Op, Read, read
from mojax.view import Shape, View


class Site(NamedTuple):
    """One place where a parameter meets an activation.

    Attributes:
      weight: the parameter; for "cache", the label given to `jax.ad_checkpoint.checkpoint_name`.
      op: "dot", "ragged_dot" (a matrix per group of rows), "conv", "gather" (`w[tokens]`) or "cache" (a named
        value).
      contract: the axes of the parameter that are summed over (of a lookup: that are indexed), ascending.
      group: sites that contract the same axes of the same input have the same number.
      producer: the parameter that absorbs a scale of every input channel, or None. The function stays the
        same when the producer (and every parameter in `also`) is divided by s and every weight of the group
        is multiplied by s along `contract`. The producer is a norm's gain, or the weight of a previous dot;
        its axes that are not contracted are the channels, one for every entry of the contracted axes,
        flattened. Where it has the first axes of `batch` too (layers of the same scan, the same experts),
        they come first, and so s has the shape [*batch, channels]; if not, s is the same for all of them.
        Between it and the group are only products with other values, biases, sums over keys (values of
        attention), casts and reshapes; named values ("cache") there are scaled too. None if the input, a
        factor or one of the weights is used outside the group too, or where a part of an axis is read.
      batch: the axes of the parameter along which every entry is a matrix of its own: experts that have their
        own rows, layers of a scan; ascending.
      router: its output decides a top-k.
      channels: how input channels meet the producer's, as factors (size, whether the producer has it) of the
        flattened channels, outermost first; () is one to one, with nothing but products and casts between.
        Values of attention reach the output projection as ((heads * head_dim, True),), those of grouped
        attention as ((kv_heads, True), (heads / kv_heads, False), (head_dim, True)).
      line: where the user wrote it, `model.py:12`, or "".
      also: what has to be divided by s beside the producer: the bias that is added to what it makes.
    """

    weight: str
    op: str
    contract: tuple[int, ...]
    group: int
    producer: str | None
    batch: tuple[int, ...] = ()
    router: bool = False
    channels: tuple[tuple[int, bool], ...] = ()
    line: str = ""
    also: tuple[str, ...] = ()


def sites(fn: Callable, params: Mapping[str, Any], *args: Any, rules: Rules = RULES) -> tuple[Site, ...]:
    """Every site of `fn(params, *args)` in the order of the program, loop bodies and branches once.

    A parameter is followed through transposes, reshapes, slices and casts. One that meets arithmetic before
    its dot (`x @ (a * w)`, a product of two parameters) has no site there.
    `params` is a flat dict and `args` are pytrees, of arrays or `jax.ShapeDtypeStruct`s.

    Args:
      rules: what is known of primitives; see `mojax.rules`.
    Raises:
      InputError: params is not a flat dict of arrays, or fn cannot be traced or has side effects.
    """
    return graph_sites(graph(fn, params, *args, rules=rules), rules)


def graph_sites(program: Graph, rules: Rules = RULES) -> tuple[Site, ...]:
    """The sites of a program that is traced already."""
    reads = [r for op in program.ops if (r := read(op, rules))]
    groups: dict[Any, list[Read]] = {}
    for r in reads:
        groups.setdefault(r.input, []).append(r)
    flow = Flow(program, rules)
    absorbers = [flow.producer(group) for group in groups.values()]
    ids = {key: i for i, key in enumerate(groups)}
    found = []
    for r in reads:
        by = absorbers[ids[r.input]]
        found.append(
            Site(
                r.name,
                r.kind,
                r.contract,
                ids[r.input],
                by.leaf,
                r.batch,
                flow.router(r),
                by.channels,
                r.op.line,
                by.also,
            )
        )
    return tuple(found)


def graph(
    fn: Callable, params: Mapping[str, Any], *args: Any, rules: Rules = RULES, views: bool = True
) -> Graph:
    """The program of `fn(params, *args)`; see `mojax.structure.graph`.

    Args:
      views: False leaves transposes, reshapes and slices in the list as operations, and every node its own
        root.
    Raises:
      InputError: as `sites`.
    """
    jaxpr, _ = trace(fn, params, *args)
    names = [*sorted(params), *[None] * len(jax.tree.leaves(args))]
    inputs = [Node(shape(v), name) for v, name in zip(opened(jaxpr)[0].invars, names, strict=True)]
    walk = _Flatten(rules, views, [])
    outputs = walk.run(jaxpr, inputs)
    walk.ops.append(Op("use", {}, tuple(outputs), ()))
    leaves = {node.leaf: node for node in inputs if node.leaf is not None}
    return Graph(tuple(walk.ops), leaves, tuple(inputs[len(leaves) :]), tuple(outputs))


class _Flatten(NamedTuple):
    """From a jaxpr to operations on nodes."""

    rules: Rules
    views: bool
    ops: list[Op]

    def run(self, jaxpr: Any, inputs: Sequence[Node]) -> list[Node]:
        """Append the operations of `jaxpr`; its outputs."""
        jaxpr = opened(jaxpr)[0]
        nodes = dict(zip(jaxpr.invars, inputs, strict=True)) | {v: Node(shape(v)) for v in jaxpr.constvars}

        def node(v: Any) -> Node:
            return Node(shape(v)) if isinstance(v, core.Literal) else nodes[v]

        for eqn in jaxpr.eqns:
            outputs = self.step(eqn, [node(v) for v in eqn.invars])
            nodes.update(zip(eqn.outvars, outputs, strict=True))
        return [node(v) for v in jaxpr.outvars]

    def step(self, eqn: Any, inputs: list[Node]) -> list[Node]:
        name = eqn.primitive.name
        rule = self.rules.get(name)
        if isinstance(rule, Call):
            return self.run(rule.body(eqn.params), inputs)
        if name in CONTROL:
            return CONTROL[name](self, eqn, inputs)
        shapes, views = [shape(v) for v in eqn.outvars], [None] * len(eqn.outvars)
        if self.views and isinstance(rule, Move):
            views = views_of(name, rule, eqn.params, shapes, inputs[0].view)
        outputs = [Node(s, view=v) for s, v in zip(shapes, views, strict=True)]
        if None in views or name == "name":
            self.ops.append(Op(name, eqn.params, tuple(inputs), tuple(outputs), line(eqn)))
        return outputs

    def add(self, name: str, inputs: Sequence[Node], outputs: Sequence[Node], **params: Any) -> None:
        self.ops.append(Op(name, params, tuple(inputs), tuple(outputs)))

    def join(self, values: Sequence[Node]) -> Node:
        """A node that is each of `values` at one time or another."""
        out = Node(values[0].shape)
        self.add("join", values, [out])
        return out

    def sealed(self, eqn: Any, inputs: list[Node]) -> list[Node]:
        outputs = self.run(body(eqn), inputs)  # a parameter that comes out is a value like any other
        return [self.join([x]) if x.view.root.leaf else x for x in outputs]

    def scan(self, eqn: Any, inputs: list[Node]) -> list[Node]:
        consts, init, stacks = loop_inputs(eqn, inputs)
        carry = [Node(x.shape) for x in init]
        loop = object()
        outputs = self.run(body(eqn), [*consts, *carry, *(self.row(x, loop) for x in stacks)])
        length = eqn.params["length"]
        return [
            *self.carried(init, carry, outputs),
            *(self.stack(y, length, loop) for y in outputs[len(init) :]),
        ]

    def carried(self, init: list[Node], carry: list[Node], new: list[Node]) -> list[Node]:
        """What a loop carries out, the same as what it carries in and around."""
        out = [Node(x.shape) for x in init]
        for values in zip(init, carry, new, out, strict=False):
            self.add("join", (values[0], values[2]), (values[1], values[3]))
        return out

    def row(self, stack: Node, loop: object) -> Node:
        if self.views:
            return Node(stack.shape[1:], view=stack.view.row(loop))
        out = Node(stack.shape[1:])
        self.add("row", [stack], [out], loop=loop)
        return out

    def stack(self, row: Node, length: int, loop: object) -> Node:
        out = Node((length, *row.shape))
        self.add("stack", [row], [out], loop=loop)
        return out

    def cond(self, eqn: Any, inputs: list[Node]) -> list[Node]:
        branches = [self.run(branch, inputs[1:]) for branch in eqn.params["branches"]]
        self.add("use", inputs[:1], ())
        return [self.join(values) for values in zip(*branches, strict=True)]

    def while_loop(self, eqn: Any, inputs: list[Node]) -> list[Node]:
        test, consts, init = loop_inputs(eqn, inputs)
        carry = [Node(x.shape) for x in init]
        self.add("use", self.run(eqn.params["cond_jaxpr"], [*test, *carry]), ())
        return self.carried(init, carry, self.run(eqn.params["body_jaxpr"], [*consts, *carry]))

    def shard_map(self, eqn: Any, inputs: list[Node]) -> list[Node]:
        inner = opened(body(eqn))[0]
        mesh = {k: eqn.params[k] for k in ("mesh", "in_specs", "out_specs")}
        local = [self.shard(x, shape(v)) for x, v in zip(inputs, inner.invars, strict=True)]
        self.add("shard", inputs, local, **mesh)
        outputs = self.run(body(eqn), local)
        out = [Node(shape(v)) for v in eqn.outvars]
        self.add("unshard", outputs, out, **mesh)
        return out

    def shard(self, x: Node, local: Shape) -> Node:
        """A shard of a parameter is a parameter, as long as it is whole but for the order of its axes."""
        axes = [a[0].axis for a in x.view.axes if len(a) == 1 and a[0].axis is not None]
        root = x.view.root
        if (
            not root.leaf
            or sorted(axes) != list(range(len(root.shape)))
            or sorted(x.shape) != sorted(root.shape)
        ):
            return Node(local)
        sizes = dict(zip(axes, local, strict=True))
        view = View.of(
            Node(tuple(sizes[i] for i in range(len(sizes))), root.leaf),
            tuple(sizes[i] for i in range(len(sizes))),
        )
        return Node(local, view=View(view.root, tuple(view.axes[i] for i in axes)))


CUSTOM, REMAT = ("custom_jvp_call", "custom_vjp_call"), ("remat2", "checkpoint", "remat")
CONTROL: Mapping[str, Callable[[_Flatten, Any, list[Node]], list[Node]]] = {
    **dict.fromkeys((*CUSTOM, *REMAT), _Flatten.sealed),
    "scan": _Flatten.scan,
    "cond": _Flatten.cond,
    "while": _Flatten.while_loop,
    "shard_map": _Flatten.shard_map,
}


# Jaxprs: the same in every supported JAX


def trace(fn: Callable, params: Mapping[str, Any], *args: Any) -> tuple[Any, Any]:
    """The jaxpr of `fn(params, *args)`, its inputs the parameters sorted by name, and fn's output shapes.

    Raises:
      InputError: as `sites`.
    """
    for name, leaf in params.items():
        if not (isinstance(name, str) and hasattr(leaf, "shape") and hasattr(leaf, "dtype")):
            raise InputError(
                f"params[{name!r}] is {type(leaf).__name__}; params is a flat dict of name: array"
            )
    try:
        jaxpr, out = jax.make_jaxpr(fn, return_shape=True)(dict(params), *args)
    except (jax.errors.JAXTypeError, jax.errors.JAXIndexError) as error:
        raise InputError(
            f"{_blamed(error) or 'the function'}: cannot be traced, because it needs the value of an array "
            f"to decide what to do; write it with jax.lax.cond, jnp.where or a loop of jax.lax, or make that "
            f"value a Python constant ({str(error).splitlines()[0]})"
        ) from error
    for eqn in _equations(jaxpr, effects=True):
        said = [e for e in eqn.effects if type(e).__name__ != "NamedAxisEffect"]
        if said and not any(True for _ in core.jaxprs_in_params(eqn.params)):
            raise InputError(
                f"{line(eqn) or 'the function'}: {eqn.primitive.name} has a side effect "
                f"({type(said[0]).__name__}), which would happen at every run of a transformed function; "
                "remove it (a print, a callback, an assignment) from the function"
            )
    return jaxpr, out


def primitives(fn: Callable, params: Mapping[str, Any], *args: Any) -> frozenset[str]:
    """The names of all operations of `fn(params, *args)`, at any depth."""
    return frozenset(eqn.primitive.name for eqn in _equations(trace(fn, params, *args)[0]))


def _equations(jaxpr: Any, effects: bool = False) -> Iterator[Any]:
    """All of any depth, or those with effects: what a kernel does to its own buffers stays in it."""
    for eqn in (e for e in opened(jaxpr)[0].eqns if e.effects or not effects):
        yield eqn
        for inner in core.jaxprs_in_params(eqn.params):
            yield from _equations(inner, effects)


HERE = str(Path(__file__).parent)
LIBRARIES = (sysconfig.get_path("purelib"), sysconfig.get_path("platlib"), sysconfig.get_path("stdlib"), HERE)


def line(eqn: Any) -> str:
    """Where the user wrote an equation: the innermost frame that is not of a library, `file.py:12`."""
    found = eqn.source_info.traceback
    frames = ((f.file_name, f.line_num) for f in (found.frames if found else ()))
    return next((f"{_called(name)}:{number}" for name, number in frames if users(name)), "")


def _called(file: str) -> str:
    """A file's name; a cell of a notebook is `In[3]`, as in its tracebacks."""
    shell = getattr(sys.modules.get("IPython"), "get_ipython", lambda: None)()
    cell = shell.compile.format_code_name(file) if shell else None
    return cell[1] if cell else Path(file).name


def users(file: str) -> bool:
    """Whether a file is the user's own: no library's, nor made up (`<string>`)."""
    return not file.startswith(("<", *LIBRARIES))


def _blamed(error: BaseException) -> str:
    """The user's line that an error came through."""
    steps = traceback.extract_tb(error.__traceback__)
    return next((f"{_called(s.filename)}:{s.lineno}" for s in reversed(steps) if users(s.filename)), "")


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
