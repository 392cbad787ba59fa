"""Loops, branches, rematerialised and sharded functions, run again with a hook inside."""

from __future__ import annotations

import dataclasses
import functools
import math
from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.sharding import PartitionSpec

from mojax.errors import InputError
from mojax.formats.base import QTensor
from mojax.leaf import Base, Leaf, Path, Scan, packed_row, raw, wrap
from mojax.rules import Dims
from mojax.trace import CUSTOM, REMAT, body, loop_inputs
from mojax.view import Atom, View

if TYPE_CHECKING:
    from mojax.interpret import Taps, Walk

Result = tuple[list, "Taps"]


def hoist(walk: Walk, inputs: Sequence) -> list:
    """Parameters that every step of a loop reads alike are read before it; stacks wait for their rows."""
    for x in inputs:
        if isinstance(x, Leaf) and not x.base.stacks:
            walk.value(x.base)
    return list(inputs)


def fresh(inputs: Sequence) -> list:
    """The same in the body of a loop, which must not keep what it makes for those outside."""
    return wrap(raw(inputs), inputs)


def remat(walk: Walk, eqn: Any, inputs: list, path: Path) -> Result:
    def run(*values: Any) -> Any:
        outputs, taps = walk.run(body(eqn), wrap(values, inputs), path)
        return walk.arrays(outputs), taps

    cse = eqn.params["prevent_cse"]  # a flag, or since JAX 0.11 one per argument
    cse = cse if isinstance(cse, bool) else any(cse)
    return jax.checkpoint(run, policy=eqn.params["policy"], prevent_cse=cse)(*raw(inputs))


def scan(walk: Walk, eqn: Any, inputs: list, path: Path) -> Result:
    consts, init, stacks = loop_inputs(eqn, inputs)
    consts, n = hoist(walk, consts), len(init)
    rows = [_rows(walk, eqn, x, path) for x in stacks]

    def run(carry: Sequence, xs: Sequence) -> tuple[list, list, Taps]:
        here = [make(x) for (make, _), x in zip(rows, xs, strict=True)]
        outputs, taps = walk.run(body(eqn), [*fresh(consts), *carry, *here], path)
        return walk.arrays(outputs[:n]), walk.arrays(outputs[n:]), taps

    def step(state: tuple, xs: Sequence) -> tuple[tuple, tuple]:
        carry, ys, taps = run(state[0], xs)
        merged = {k: walk.merge(state[1][k], taps.pop(k)) for k in state[1]}  # type: ignore[misc]
        return (carry, merged), (ys, taps)

    first, xs = walk.arrays(init, eqn), [x for _, x in rows]
    start: Taps = {}
    if walk.merge is not None:
        one = jax.tree.map(lambda a: jax.ShapeDtypeStruct(a.shape[1:], a.dtype), xs)
        start = {
            k: t
            for k, t in jax.eval_shape(run, first, one)[2].items()
            if all(s.path != path for s in walk.scans[k])
        }
    how = {k: eqn.params[k] for k in ("length", "reverse", "unroll")}
    (carry, merged), (ys, taps) = lax.scan(step, (first, _zeros(start)), xs, **how)
    if walk.merge is not None:
        taps = {k: _among(t, next(s for s in walk.scans[k] if s.path == path)) for k, t in taps.items()}
    return [*carry, *ys], merged | taps


def _among(tap: Any, scan: Scan) -> Any:
    """Taps of the rows that a scan goes over, among zeros for the rows of the parameter that it skips."""
    at = scan.over.at(np.arange(scan.over.size))
    if len(at) == scan.of:
        return tap
    return jax.tree.map(lambda t: jnp.zeros((scan.of, *t.shape[1:]), t.dtype).at[at].set(t), tap)


def _rows(walk: Walk, eqn: Any, x: Any, path: Path) -> tuple[Callable[[Any], Any], Any]:
    """What a scan runs over for one of its stacks, and how a step's piece of that becomes its row."""
    if not isinstance(x, Leaf):
        return lambda row: row, x
    base, over = x.base, x.view.entries(0)
    scans, steps = x.scans, jnp.arange(eqn.params["length"])
    if (
        over
        and not x.rows
        and all(s.over.axis < over.axis for s in scans)
        and not dict(base.shards).get(over.axis)
    ):
        scans = (*scans, Scan(path, over, base.shape[over.axis]))
    first = bool(base.stacks) and over is not None and over.axis == len(x.at)

    def row(leaf: Leaf, base: Base, i: Any) -> Leaf:
        at = (*x.at, over.at(i)) if over and first else x.at
        return dataclasses.replace(leaf, base=base, view=x.view.row(), chain=(), scans=scans, at=at)

    if isinstance(walk.value(base) if x.chain else base.value, QTensor):

        def packed(i: Any) -> Leaf:  # its shape is static, so its rows are taken by index
            found = packed_row(x, 0, i)
            return row(found, found.base, i) if found else walk.array(x, eqn)

        return packed, steps
    kept = bool(base.stacks) and not x.chain
    rows = base.value if kept else walk.array(x, eqn)
    stacks, done = base.stacks - 1 if first else 0, base.done if kept else True

    def array(step: tuple) -> Leaf:
        i, value = step
        return row(x, dataclasses.replace(base, value=value, stacks=stacks, done=done), i)

    return array, (steps, rows)


def _zeros(shapes: Any) -> Any:
    return jax.tree.map(lambda s: jnp.zeros(s.shape, s.dtype), shapes)


def cond(walk: Walk, eqn: Any, inputs: list, path: Path) -> Result:
    index, *operands = inputs

    def branch(i: int, jaxpr: Any) -> Callable:
        def run(*values: Any) -> Any:
            outputs, taps = walk.run(jaxpr, wrap(values, operands), (*path, i))
            return walk.arrays(outputs), taps

        return run

    branches = [branch(i, jaxpr) for i, jaxpr in enumerate(eqn.params["branches"])]
    values = raw(operands)
    seen: Taps = {}
    for run in branches:
        seen |= jax.eval_shape(run, *values)[1]

    def padded(run: Callable) -> Callable:
        def both(*values: Any) -> Any:
            outputs, taps = run(*values)
            return outputs, _zeros(seen) | taps

        return both

    return lax.switch(*walk.arrays([index]), [padded(run) for run in branches], *values)


def while_loop(walk: Walk, eqn: Any, inputs: list, path: Path) -> Result:
    test, consts, init = loop_inputs(eqn, inputs)
    test, consts = hoist(walk, test), hoist(walk, consts)

    def part(i: int, jaxpr: Any, consts: list, carry: Sequence) -> Any:
        outputs, taps = walk.run(jaxpr, [*fresh(consts), *carry], (*path, i))
        if taps and (walk.merge is None or i == 0):
            raise InputError(
                f"{', '.join(taps)}: tapped inside a while_loop, which has no fixed number of steps; return "
                "no tap for it, say how two taps merge (and not in its condition), or write it as a scan"
            )
        return walk.arrays(outputs), taps

    def step(state: tuple) -> tuple:
        carry, taps = part(1, eqn.params["body_jaxpr"], consts, state[0])
        return carry, {k: walk.merge(state[1][k], t) for k, t in taps.items()}  # type: ignore[misc]

    first = walk.arrays(init)
    start = jax.eval_shape(functools.partial(part, 1, eqn.params["body_jaxpr"], consts), first)[1]

    def more(state: tuple) -> Any:
        return part(0, eqn.params["cond_jaxpr"], test, state[0])[0][0]

    return lax.while_loop(more, step, (first, _zeros(start)))


def shard_map(walk: Walk, eqn: Any, inputs: list, path: Path) -> Result:
    """Taps are merged over the devices that saw other values: all of them, where JAX does not check."""
    p = eqn.params
    manual = tuple(a for a in p["mesh"].axis_names if a in p["newly_manual_axes"])

    def run(*local: Any) -> Any:
        shards = [_shard(a, x, spec) for a, x, spec in zip(local, inputs, p["in_specs"], strict=True)]
        outputs, taps = walk.run(body(eqn), shards, path)
        over = {k: tuple(a for a in manual if a in walk.varying[k] or not p["check_vma"]) for k in taps}
        return walk.arrays(outputs), {k: _merged(walk, k, t, over[k]) for k, t in taps.items()}

    specs = {"mesh": p["mesh"], "check_vma": p["check_vma"], "axis_names": set(manual)}
    out = (list(p["out_specs"]), PartitionSpec())
    return jax.shard_map(run, in_specs=tuple(p["in_specs"]), out_specs=out, **specs)(
        *walk.arrays(inputs, eqn)
    )


def _shard(local: Any, x: Any, spec: PartitionSpec) -> Any:
    """A parameter on one device: its view with local sizes, and along which mesh axes each axis is cut."""
    if not isinstance(x, Leaf) or any(len(a) != 1 or a[0].axis is None for a in x.view.axes):
        return local
    axes = [a[0].axis for a in x.view.axes]
    view = View(x.view.root, tuple((Atom(i, 1, n, 0),) for i, n in zip(axes, local.shape, strict=True)))
    names = [(s,) if isinstance(s, str) else tuple(s or ()) for s in spec]
    names += [()] * (len(axes) - len(names))
    shards = tuple(zip(axes, names, strict=True))
    base = dataclasses.replace(x.base, value=local, stacks=0, done=True, shards=shards)
    return Leaf(base, view, (), x.scans, x.rows)


def _merged(walk: Walk, key: str, tap: Any, over: tuple[str, ...]) -> Any:
    """One tap for all devices, merged along the mesh axes `over`."""
    if walk.merge is None:
        raise InputError(f"{key}: tapped inside a shard_map; say how the taps of two devices merge")
    if not over:
        return tap
    count = math.prod(lax.axis_size(a) for a in over)
    all_taps = jax.tree.map(lambda t: everywhere(t[None], over, 0), tap)
    each = [jax.tree.map(lambda t, i=i: t[i], all_taps) for i in range(count)]
    return functools.reduce(walk.merge, each)


def everywhere(x: jax.Array, over: tuple[str, ...], axis: int) -> jax.Array:
    """The shards of `x` one after the other along `axis`, the same on every device.

    By a sum, not an all-gather, so that JAX knows that it is the same.
    """
    count, size = math.prod(lax.axis_size(a) for a in over), x.shape[axis]
    shape = (*x.shape[:axis], count * size, *x.shape[axis + 1 :])
    start = lax.axis_index(over) * size
    return lax.psum(lax.dynamic_update_slice_in_dim(jnp.zeros(shape, x.dtype), x, start, axis), over)


def cut(dims: Dims, leaf: Leaf) -> list[tuple[int, tuple[str, ...]]]:
    """The axes of the other operand that are cut, because the parameter's axes that they meet are."""
    shards = dict(leaf.base.shards)
    found = []
    for d, partner in zip(dims.contract, dims.partners, strict=True):
        names = tuple(n for a in leaf.view.root_axes([d]) for n in shards.get(a, ()))
        if names and partner is not None:
            found.append((partner, names))
    return found


def whole_input(
    walk: Walk, dims: Dims, leaf: Leaf, x: jax.Array
) -> tuple[jax.Array, Callable[[jax.Array], jax.Array]]:
    """`x` with its contracted axes whole, and the way back to this device's part."""
    parts, full = cut(dims, leaf), x
    while id(full) in walk.spread:
        full = walk.spread[id(full)][1]
    for axis, names in parts:
        full = everywhere(full, names, axis)

    def mine(y: jax.Array) -> jax.Array:
        for axis, names in parts:
            y = lax.dynamic_slice_in_dim(y, lax.axis_index(names) * x.shape[axis], x.shape[axis], axis)
        missing = varying(x) - varying(y)
        return lax.pcast(y, tuple(sorted(missing)), to="varying") if missing else y

    return full, mine


def varying(x: jax.Array) -> frozenset[str]:
    """The mesh axes along which devices may hold other values of `x`; empty where JAX does not check."""
    return frozenset(getattr(getattr(jax.typeof(x), "manual_axis_type", None), "varying", ()))


def custom(walk: Walk, eqn: Any, inputs: list, path: Path) -> Result:
    return walk.custom(eqn, inputs, path)


SPREAD = ("pvary", "pcast")  # arrays that are the same on all devices, from here on counted as differing
CONTROL: Mapping[str, Callable[[Any, Any, list, Path], Result]] = {
    **dict.fromkeys(CUSTOM, custom),
    **dict.fromkeys(REMAT, remat),
    "scan": scan,
    "cond": cond,
    "while": while_loop,
    "shard_map": shard_map,
}
