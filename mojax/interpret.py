"""Runs a function again with a hook at every dot that reads a parameter.

The function is traced to a jaxpr, whose equations are bound again one after the other through public JAX
functions; no jaxpr is ever built here. A parameter travels as a `Leaf`: its value, and a `View` that says how
that value shows the parameter (`w.T`, `w.reshape(heads, dim, width)`, one layer of a scanned stack). An
equation that neither reads a `Leaf` nor holds a `checkpoint_name` is bound as it stands.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.extend import core

from mojax.errors import InputError
from mojax.trace import CALLS, CUSTOM, REMAT, View, body, contraction, follow, loop_inputs, opened, trace

Hook = Callable[[str, Any, tuple[int, ...]], tuple[Any, Any]]
Taps = dict[str, Any]
Path = tuple[int, ...]  # positions of nested equations: the identity of one place in the program


def intercept(fn: Callable, hook: Hook) -> Callable:
    """A function that computes what `fn` does, and returns what `hook` saw.

    `hook(name, x, axes) -> (x_new | None, tap | None)` is called while tracing, at
      - every dot_general with one operand that is (a view of) the parameter `name`: `x` is the other operand
        and `axes` its contracted axes, in the order of the parameter's axes that they meet;
      - every `jax.ad_checkpoint.checkpoint_name(x, name)`, with `axes` empty.
    `x_new`, of the shape and dtype of `x`, replaces `x` at that place only. A tap is any pytree of arrays.

    A hook may be called more than once for one place (JAX traces loop bodies again), so it should be pure.
    Inside `lax.scan` taps are stacked along a new first axis; taps of a branch of `lax.cond` that is not
    taken are zeros. A custom derivative rule of a function that holds such a place gives way to that of its
    body.

    Args:
      fn: `fn(params, *args)`, with `params` a flat dict of arrays; `args` are pytrees of arrays.
      hook: see above.
    Returns:
      `g(params, *args) -> (fn(params, *args), taps)`; the taps of a parameter used several times are under
      `name`, `name#1`, `name#2`, in the order of the program (that of `mojax.trace.sites`).
    Raises (when called):
      InputError: params is not a flat dict of arrays, x_new differs in shape or dtype, or a tap is inside
        `lax.while_loop`, which has no fixed number of taps.
    """

    def g(params: Mapping[str, Any], *args: Any) -> tuple[Any, Taps]:
        jaxpr, out = trace(fn, params, *args)
        inputs = [Leaf(params[name], View.of(name, params[name].shape)) for name in sorted(params)]
        outputs, taps = Walk(hook, RULES, {}).run(jaxpr, [*inputs, *jax.tree.leaves(args)], ())
        return jax.tree.unflatten(jax.tree.structure(out), values(outputs)), taps

    return g


@dataclasses.dataclass(frozen=True)
class Leaf:
    """A parameter on its way through the program: its value here, and how that shows the parameter."""

    value: Any
    view: View


def values(inputs: Sequence) -> list:
    return [x.value if isinstance(x, Leaf) else x for x in inputs]


def wrap(arrays: Sequence, like: Sequence) -> list:
    """`arrays` as leaves where `like` has leaves: into a function that takes arrays only."""
    return [Leaf(a, x.view) if isinstance(x, Leaf) else a for a, x in zip(arrays, like, strict=True)]


@dataclasses.dataclass(frozen=True)
class Walk:
    """One run over a program.

    Attributes:
      hook: called at every place; see `intercept`.
      rules: by primitive name; a primitive without a rule is bound as it stands (`plain`).
      places: by name, the paths at which it was met, in the order of the program.
    """

    hook: Hook
    rules: Mapping[str, Rule]
    places: dict[str, list[Path]]

    def run(self, jaxpr: Any, inputs: Sequence, path: Path) -> tuple[list, Taps]:
        """The outputs of `jaxpr` for inputs that are arrays or leaves, and the taps on the way."""
        jaxpr, consts = opened(jaxpr)
        env = dict(zip([*jaxpr.constvars, *jaxpr.invars], [*consts, *inputs], strict=True))
        taps: Taps = {}
        for i, eqn in enumerate(jaxpr.eqns):
            read = [v.val if isinstance(v, core.Literal) else env[v] for v in eqn.invars]
            with eqn.ctx.manager:
                outputs, new = self.step(eqn, read, (*path, i))
            env.update(zip(eqn.outvars, outputs, strict=True))
            taps.update(new)
        return [v.val if isinstance(v, core.Literal) else env[v] for v in jaxpr.outvars], taps

    def step(self, eqn: Any, inputs: list, path: Path) -> tuple[list, Taps]:
        """One equation by its rule, if a parameter or a named value is in it."""
        touched = (
            any(isinstance(x, Leaf) for x in inputs)
            or eqn.primitive.name == "name"
            or any(holds(j, NAME) for j in core.jaxprs_in_params(eqn.params))
        )
        rule = self.rules.get(eqn.primitive.name, plain) if touched else plain
        return rule(self, eqn, inputs, path)

    def visit(self, name: str, x: Any, axes: tuple[int, ...], path: Path) -> tuple[Any, Taps]:
        """Call the hook: what `x` becomes (None: as it is), and the tap under its key."""
        new, tap = self.hook(name, x, axes)
        if new is not None and (new.shape, new.dtype) != (x.shape, x.dtype):
            raise InputError(
                f"{name}: the hook replaced an input {x.dtype}{list(x.shape)} by "
                f"{new.dtype}{list(new.shape)}; return the same shape and dtype"
            )
        paths = self.places.setdefault(name, [])
        if path not in paths:
            paths.append(path)
        i = paths.index(path)
        return new, {} if tap is None else {f"{name}#{i}" if i else name: tap}


def holds(jaxpr: Any, names: frozenset[str]) -> bool:
    """Whether an equation of `jaxpr`, at any depth, is one of these primitives."""
    eqns = opened(jaxpr)[0].eqns
    return any(
        e.primitive.name in names or any(holds(j, names) for j in core.jaxprs_in_params(e.params))
        for e in eqns
    )


Rule = Callable[[Walk, Any, list, Path], tuple[list, Taps]]
NAME = frozenset({"name"})
PLACES = frozenset({"dot_general", "name"})


def bind(eqn: Any, inputs: list) -> list:
    """The outputs of the equation as it stands, as arrays."""
    out = eqn.primitive.bind(*values(inputs), **eqn.primitive.get_bind_params(eqn.params))
    return list(out) if eqn.primitive.multiple_results else [out]


def plain(walk: Walk, eqn: Any, inputs: list, path: Path) -> tuple[list, Taps]:
    """The rule of every other primitive: bind it as it stands; a view of a parameter stays one if it can."""
    outputs = bind(eqn, inputs)
    if len(inputs) != 1 or not isinstance(inputs[0], Leaf):
        return outputs, {}
    views = follow(eqn, inputs[0].view)
    return [o if v is None else Leaf(o, v) for o, v in zip(outputs, views, strict=True)], {}


def _name(walk: Walk, eqn: Any, inputs: list, path: Path) -> tuple[list, Taps]:
    new, taps = walk.visit(eqn.params["name"], values(inputs)[0], (), path)
    return plain(walk, eqn, inputs if new is None else [new], path)[0], taps


def _dot(walk: Walk, eqn: Any, inputs: list, path: Path) -> tuple[list, Taps]:
    leaves = [i for i in (0, 1) if isinstance(inputs[i], Leaf)]
    if len(leaves) != 1:  # a product of two parameters has no input
        return bind(eqn, inputs), {}
    side = leaves[0]
    view, x = inputs[side].view, inputs[1 - side]
    _, axes = contraction(eqn.params, side, view)
    new, taps = walk.visit(view.root, x, axes, path)
    if new is not None:
        inputs = [new, inputs[1]] if side == 1 else [inputs[0], new]
    return bind(eqn, inputs), taps


def _call(walk: Walk, eqn: Any, inputs: list, path: Path) -> tuple[list, Taps]:
    return walk.run(body(eqn), inputs, path)


def _custom(walk: Walk, eqn: Any, inputs: list, path: Path) -> tuple[list, Taps]:
    # its derivative rule is lost when the body is run, so only where there is something to see
    return (_call if holds(body(eqn), PLACES) else plain)(walk, eqn, inputs, path)


def _remat(walk: Walk, eqn: Any, inputs: list, path: Path) -> tuple[list, Taps]:
    def run(*arrays):
        outputs, taps = walk.run(body(eqn), wrap(arrays, inputs), path)
        return values(outputs), taps

    cse = eqn.params["prevent_cse"]  # a flag, or since JAX 0.11 one per argument
    cse = cse if isinstance(cse, bool) else any(cse)
    return jax.checkpoint(run, policy=eqn.params["policy"], prevent_cse=cse)(*values(inputs))


def _scan(walk: Walk, eqn: Any, inputs: list, path: Path) -> tuple[list, Taps]:
    consts, init, stacks = loop_inputs(eqn, inputs)

    def run(carry, arrays):
        rows = [
            Leaf(a, x.view.row()) if isinstance(x, Leaf) else a for a, x in zip(arrays, stacks, strict=True)
        ]
        outputs, taps = walk.run(body(eqn), [*consts, *carry, *rows], path)
        return values(outputs[: len(init)]), (values(outputs[len(init) :]), taps)

    how = {k: eqn.params[k] for k in ("length", "reverse", "unroll")}
    carry, (ys, taps) = lax.scan(run, values(init), values(stacks), **how)
    return [*carry, *ys], taps


def _cond(walk: Walk, eqn: Any, inputs: list, path: Path) -> tuple[list, Taps]:
    index, *operands = inputs

    def branch(i: int, jaxpr: Any) -> Callable:
        def run(*arrays):
            outputs, taps = walk.run(jaxpr, wrap(arrays, operands), (*path, i))
            return values(outputs), taps

        return run

    branches = [branch(i, jaxpr) for i, jaxpr in enumerate(eqn.params["branches"])]
    arrays = values(operands)
    seen: Taps = {}
    for run in branches:
        seen |= jax.eval_shape(run, *arrays)[1]

    def padded(run: Callable) -> Callable:
        def both(*arrays):
            outputs, taps = run(*arrays)
            return outputs, jax.tree.map(lambda s: jnp.zeros(s.shape, s.dtype), seen) | taps

        return both

    return lax.switch(*values([index]), [padded(run) for run in branches], *arrays)


def _while(walk: Walk, eqn: Any, inputs: list, path: Path) -> tuple[list, Taps]:
    test, consts, init = loop_inputs(eqn, inputs)

    def part(i: int, jaxpr: Any, consts: list) -> Callable:
        def run(carry):
            outputs, taps = walk.run(jaxpr, [*consts, *carry], (*path, i))
            if taps:
                raise InputError(
                    f"{', '.join(taps)}: tapped inside a while_loop, which has no fixed number of steps; "
                    "return no tap for it, or write the loop as a scan"
                )
            return values(outputs)

        return run

    more, step = part(0, eqn.params["cond_jaxpr"], test), part(1, eqn.params["body_jaxpr"], consts)
    return lax.while_loop(lambda carry: more(carry)[0], step, values(init)), {}


RULES: Mapping[str, Rule] = {
    **dict.fromkeys(CALLS, _call),
    **dict.fromkeys(CUSTOM, _custom),
    **dict.fromkeys(REMAT, _remat),
    "dot_general": _dot,
    "name": _name,
    "scan": _scan,
    "cond": _cond,
    "while": _while,
}
