"""Runs a function again with a hook at every place where a parameter meets an activation.

The function is traced to a jaxpr, whose equations are bound again one after the other through public JAX
functions; no jaxpr is ever built here. A parameter travels as a `Leaf`: its value as it was given (an array
or a QTensor), how the program has viewed it since (`w.T`, `w.reshape(heads, dim, width)`, a layer of a
scanned stack), and how to do that. What is done to a parameter happens where it is used: in the body of the
loop or of the rematerialised function, layer by layer. An equation that neither reads a `Leaf` nor holds a
`checkpoint_name` is bound as it stands.

One mechanism, four uses:

    tap              hook = lambda place: (None, jnp.max(jnp.abs(place.x)))
    fake-quantize    hook = lambda place: (place.run(x=fake(place.x)), None), and read for the parameters
    run packed       parameters that are QTensors reach a kernel at their places, and an error elsewhere
    rewrite          hook = lambda place: (my_function(place.x), None)
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.extend import core

from mojax import loops, packed
from mojax.errors import InputError
from mojax.formats.base import QTensor
from mojax.leaf import Base, Leaf, Path, Scan, squeezed, take_rows
from mojax.rules import RULES, Call, Dot, Move, Rules, dims_of, views_of
from mojax.structure.graph import meeting
from mojax.trace import body, line, opened, trace
from mojax.view import View

Taps = dict[str, Any]


class Place(NamedTuple):
    """One place of a program during a run.

    Attributes:
      name: the parameter; of a "cache", the label of `jax.ad_checkpoint.checkpoint_name`.
      op: "dot", "ragged_dot", "conv", "gather" or "cache"; see `mojax.trace.Site`.
      x: the other operand; of a gather the indices, of a cache the value. In a `shard_map`, whole along the
        contracted axes.
      axes: the axes of `x` that are contracted, in the order of the parameter's axes that they meet.
      paired: the axes of `x` that meet axes of the parameter with a matrix per entry, in the order of those.
      groups: of a ragged_dot, int32 `[groups]`, the rows of `x` in each group; else None.
      at: where the parameter is one of `stacks`, the indices of the row that is read here; else ().
      rounds: the parameter is a QTensor, and the kernel that reads it here can round `x` itself.
      run: `run(x=None, w=None, rounding=None)` is the result of the operation, with another input and with
        another value of the whole parameter (of its row inside a scan) if given. `rounding`, where `rounds`
        is true, is how the kernel rounds `x` first: a `mojax.packed.Inputs`.
    """

    name: str
    op: str
    x: jax.Array
    axes: tuple[int, ...]
    paired: tuple[int, ...]
    groups: jax.Array | None
    at: tuple[Any, ...]
    rounds: bool
    run: Callable[..., jax.Array]


Hook = Callable[[Place], tuple[Any, Any]]


def intercept(
    fn: Callable,
    hook: Hook,
    *,
    read: Callable[[str, Any], Any] | None = None,
    merge: Callable[[Any, Any], Any] | None = None,
    stacks: Mapping[str, int] | None = None,
    rules: Rules = RULES,
) -> Callable:
    """A function that computes what `fn` does, and returns what `hook` saw.

    `hook(place) -> (y | None, tap | None)` is called while tracing, at every dot, convolution and lookup that
    reads a parameter, and at every `jax.ad_checkpoint.checkpoint_name`. `y`, of the shape and dtype of the
    result, replaces it. A tap is any pytree of arrays. A hook may be called more than once for one place (JAX
    traces loop bodies again), so it should be pure.

    Taps of a scan are stacked along a new first axis. With `merge` only those of a parameter are, of which
    each step reads one row (zeros for rows that the scan skips); the others are merged. Taps of a branch that
    is not taken are zeros. A custom derivative rule of a function that holds a place gives way to that of its
    body.

    Args:
      fn: `fn(params, *args)`, with `params` a flat dict of arrays or QTensors; `args` are pytrees of arrays.
      hook: see above.
      read: `read(name, value) -> value`: how a parameter reads wherever it is used; `value` is the parameter,
        or its row where it is one of `stacks`. Called where it is used, inside loops and rematerialised
        functions; outside of a loop that would do the same at every step.
      merge: `merge(a, b)`, how two taps of one place are one, with zeros neutral. Needed for taps inside
        `lax.while_loop` and `jax.shard_map`.
      stacks: parameters of which the program reads one row at a time (of a scan, or by index), and how many
        leading axes that goes for.
      rules: what is known of primitives; see `mojax.rules`.
    Returns:
      `g(params, *args) -> (fn(params, *args), taps)`; the taps of a parameter used several times are under
      `name`, `name#1`, `name#2`, in the order of the program (that of `mojax.trace.sites`).
    Raises (when called):
      InputError: params is not a flat dict of arrays, a result of `hook` differs in shape or dtype, a tap is
        where it would need `merge`, or a QTensor is used where no kernel can take it.
    """

    def g(params: Mapping[str, Any], *args: Any) -> tuple[Any, Taps]:
        jaxpr, out = trace(fn, {n: plain_spec(leaf) for n, leaf in params.items()}, *args)
        depth = dict(stacks or {})
        inputs = [
            Leaf(
                Base(name, params[name], (s := tuple(params[name].shape)), depth.get(name, 0)),
                View.of(name, s),
            )
            for name in sorted(params)
        ]
        walk = Walk(hook, read or (lambda name, value: value), merge, rules, {}, {}, {}, {})
        outputs, taps = walk.run(jaxpr, [*inputs, *jax.tree.leaves(args)], ())
        return jax.tree.unflatten(jax.tree.structure(out), walk.arrays(outputs)), taps

    return g


def plain_spec(leaf: Any) -> Any:
    """A parameter as the function was written for."""
    return jax.ShapeDtypeStruct(leaf.shape, leaf.dtype) if isinstance(leaf, QTensor) else leaf


@dataclasses.dataclass(frozen=True)
class Walk:
    """One run over a program; see `intercept`.

    Attributes:
      places: by name, the paths at which it was met, in the order of the program.
      scans: by key of a tap, the loops that it has a row of.
      varying: by key of a tap, the mesh axes along which devices see other inputs.
      spread: by id, arrays of a shard_map that only count as differing between devices, and what they were.
    """

    hook: Hook
    read: Callable[[str, Any], Any]
    merge: Callable[[Any, Any], Any] | None
    rules: Rules
    places: dict[str, list[Path]]
    scans: dict[str, tuple[Scan, ...]]
    varying: dict[str, frozenset[str]]
    spread: dict[int, tuple[Any, Any]]

    def run(self, jaxpr: Any, inputs: Sequence, path: Path) -> tuple[list, Taps]:
        """The outputs of `jaxpr` for inputs that are arrays or leaves, and the taps on the way."""
        jaxpr, consts = opened(jaxpr)
        env = dict(zip([*jaxpr.constvars, *jaxpr.invars], [*consts, *inputs], strict=True))
        taps: Taps = {}
        for i, eqn in enumerate(jaxpr.eqns):
            values = [v.val if isinstance(v, core.Literal) else env[v] for v in eqn.invars]
            with eqn.ctx.manager:
                outputs, new = self.step(eqn, values, (*path, i))
            env.update(zip(eqn.outvars, outputs, strict=True))
            taps.update(new)
        return [v.val if isinstance(v, core.Literal) else env[v] for v in jaxpr.outvars], taps

    def step(self, eqn: Any, inputs: list, path: Path) -> tuple[list, Taps]:
        """One equation by its rule, if a parameter or a named value is in it."""
        name = eqn.primitive.name
        if not (
            any(isinstance(x, Leaf) for x in inputs)
            or name == "name"
            or any(holds(j, {"name"}) for j in core.jaxprs_in_params(eqn.params))
        ):
            outputs = bind(eqn, inputs)
            if name in loops.SPREAD:
                self.spread.update((id(y), (y, x)) for x, y in zip(inputs, outputs, strict=True))
            return outputs, {}
        if name == "name":
            return self.named(eqn, inputs, path)
        if name in loops.CONTROL:
            return loops.CONTROL[name](self, eqn, inputs, path)
        match self.rules.get(name):
            case Dot() as rule:
                return self.contract(rule, eqn, inputs, path)
            case Call() as rule:
                return self.run(rule.body(eqn.params), inputs, path)
            case Move() as rule:
                return self.move(rule, eqn, inputs), {}
        return bind(eqn, self.arrays(inputs, eqn)), {}

    def custom(self, eqn: Any, inputs: list, path: Path) -> tuple[list, Taps]:
        """A function with a derivative rule, which is lost when the body is run: only if there is need."""
        places = {name for name, rule in self.rules.items() if isinstance(rule, Dot)} | {"name"}
        if holds(body(eqn), places):
            return self.run(body(eqn), inputs, path)
        return bind(eqn, self.arrays(inputs, eqn)), {}

    def arrays(self, inputs: Sequence, eqn: Any = None, how: str = "") -> list:
        return [self.array(x, eqn, how) if isinstance(x, Leaf) else x for x in inputs]

    def array(self, leaf: Leaf, eqn: Any = None, how: str = "") -> Any:
        """The value of a leaf where it is used by `eqn` (None: where it leaves the function)."""
        value = self.value(leaf.base)
        if isinstance(value, QTensor):
            at = f" at {line(eqn)}" if eqn is not None and line(eqn) else ""
            where = f"meets {eqn.primitive.name}{how}{at}" if eqn is not None else "leaves the function"
            raise InputError(
                f"{leaf.base.name}: is packed ({value.format.label}) and {where}, for which there is "
                "no kernel; keep this parameter as it is, or call mojax.dequantize(model) first"
            )
        return functools.reduce(lambda v, link: link(v), leaf.chain, value)

    def value(self, base: Base) -> Any:
        if not base.done:
            base.value, base.done = self.read(base.name, base.value), True
        return base.value

    def move(self, rule: Move, eqn: Any, inputs: list) -> list:
        leaf, *rest = inputs
        if not isinstance(leaf, Leaf) or any(isinstance(x, Leaf) for x in rest):
            return bind(eqn, self.arrays(inputs, eqn))
        if row := take_rows(leaf, eqn, rest, tuple(eqn.outvars[0].aval.shape)):
            return [row]
        shapes = [tuple(v.aval.shape) for v in eqn.outvars]
        views = views_of(eqn.primitive.name, rule, eqn.params, shapes, leaf.view)

        def link(i: int) -> Callable[[Any], Any]:
            return lambda value: bind(eqn, [value, *rest])[i]

        if squeezed(leaf, eqn.primitive.name, shapes[0]):
            return [dataclasses.replace(leaf, view=views[0], chain=())]
        out: list[Any] = [
            v and dataclasses.replace(leaf, view=v, chain=(*leaf.chain, link(i))) for i, v in enumerate(views)
        ]
        if None in out:
            arrays = bind(eqn, self.arrays(inputs, eqn))
            out = [a if o is None else o for o, a in zip(out, arrays, strict=True)]
        return out

    def named(self, eqn: Any, inputs: list, path: Path) -> tuple[list, Taps]:
        label, x = eqn.params["name"], inputs[0]

        value = self.arrays([x], eqn)[0]

        def run(x: Any = value) -> Any:
            return bind(eqn, [fitting(label, x, value)])[0]

        place = Place(label, "cache", value, (), (), None, (), False, run)
        y, taps = self.visit(place, eqn, path)
        if y is not None:
            return [y], taps
        return (self.move(self.rules["name"], eqn, inputs) if isinstance(x, Leaf) else [run()]), taps  # type: ignore[arg-type]

    def contract(self, rule: Dot, eqn: Any, inputs: list, path: Path) -> tuple[list, Taps]:
        sides = [i for i in (0, 1) if isinstance(inputs[i], Leaf)]
        shapes = [tuple(v.aval.shape) for v in eqn.invars]
        name = eqn.primitive.name
        dims = dims_of(name, rule, eqn.params, shapes, sides[0]) if len(sides) == 1 else None
        if dims is None:  # a product of two parameters, or one in a place that is none
            return bind(eqn, self.arrays(inputs, eqn, " with another parameter" * (len(sides) == 2))), {}
        side, leaf, others = sides[0], inputs[sides[0]], self.arrays(inputs[2:], eqn)
        _, axes = meeting(dims, leaf.view)
        full, mine = loops.whole_input(self, dims, leaf, inputs[1 - side])

        def run(x: Any = None, w: Any = None, rounding: packed.Inputs | None = None) -> Any:
            here = inputs[1 - side] if x is None else mine(fitting(leaf.base.name, x, full))
            there = leaf if w is None else leaf.again(w, done=True)
            if isinstance(self.value(there.base), QTensor):
                return packed.run(
                    name, rule, eqn.params, dims, side, there, here, others, eqn.outvars[0].aval, rounding
                )
            pair = [here, self.array(there, eqn)] if side else [self.array(there, eqn), here]
            narrow = eqn.outvars[0].aval.dtype.itemsize <= 4  # the kernel sums in float32
            if name == "ragged_dot_general" and narrow:
                return packed.grouped(dims, pair[0], pair[1], others[0], eqn.outvars[0].aval.dtype)
            return bind(eqn, [*pair, *others])[0]

        groups = None if rule.groups is None else inputs[rule.groups]
        pairs = sorted(zip(dims.batch, dims.paired, strict=True), key=lambda p: leaf.view.order(p[0]))
        paired = tuple(d for _, d in pairs if d is not None)
        rounds = isinstance(self.value(leaf.base), QTensor) and packed.rounds(rule)
        place = Place(leaf.base.name, rule.op, full, axes, paired, groups, leaf.at, rounds, run)
        met = leaf.view.root_axes(dims.batch)  # a tap has these after those of the scans
        ahead = all(a > s.over.axis for a in met for s in leaf.scans)
        y, taps = self.visit(place, eqn, path, leaf if ahead else dataclasses.replace(leaf, scans=()))
        return [run() if y is None else y], taps

    def visit(self, place: Place, eqn: Any, path: Path, leaf: Leaf | None = None) -> tuple[Any, Taps]:
        """Call the hook: what replaces the result (None: nothing), and the tap under its key."""
        said = self.hook(place)
        if not (isinstance(said, tuple) and len(said) == 2):
            raise InputError(
                f"{place.name}: the hook returned {type(said).__name__}, needed a pair: what "
                "replaces the result (or None), and a tap (or None)"
            )
        y, tap = said
        if y is not None:
            fitting(place.name, y, eqn.outvars[0].aval)
        if tap is None:
            return y, {}
        paths = self.places.setdefault(place.name, [])
        if path not in paths:
            paths.append(path)
        i = paths.index(path)
        key = f"{place.name}#{i}" if i else place.name
        self.scans[key] = leaf.scans if leaf else ()
        self.varying[key] = loops.varying(place.x)
        for index, count in reversed(leaf.rows) if leaf else ():
            tap = jax.tree.map(
                lambda t, i=index, n=count: jnp.zeros((n, *t.shape), t.dtype).at[i].set(t), tap
            )
        return y, {key: tap}


def fitting(name: str, new: Any, old: Any) -> Any:
    """What a hook gives, if it has the shape and dtype of what it replaces."""
    if (new.shape, new.dtype) != (old.shape, old.dtype):
        raise InputError(
            f"{name}: the hook replaced {old.dtype}{list(old.shape)} by {new.dtype}{list(new.shape)}; "
            "return the same shape and dtype"
        )
    return new


def holds(jaxpr: Any, names: set[str]) -> bool:
    """Whether an equation of `jaxpr`, at any depth, is one of these primitives."""
    return any(
        e.primitive.name in names or any(holds(j, names) for j in core.jaxprs_in_params(e.params))
        for e in opened(jaxpr)[0].eqns
    )


def bind(eqn: Any, inputs: Sequence) -> list:
    """The outputs of the equation as it stands, for arrays."""
    out = eqn.primitive.bind(*inputs, **eqn.primitive.get_bind_params(eqn.params))
    return list(out) if eqn.primitive.multiple_results else [out]
