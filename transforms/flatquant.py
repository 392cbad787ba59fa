"""FlatQuant: a learned matrix in front of every input makes it and its weights flat (arXiv 2410.09426).

  y = q(x P) q(W P^-T)^T,   P = L kron R,   L, R = U diag(e^t) V^T,   U, V orthogonal, so that P^-1 is exact
  minimise mean |block_q(x) - block(x)|^2   over U, V (Cayley's form) and t, by Adam

These weights are rounded to nearest meanwhile; the gradient passes straight through, and through the scales.
Linears of one input share a P. Steps before (smoothquant, awq) scale channels, and steps after (mse, gptq,
headroom) choose scales and codes; the paper learns those along. Experimental: only this process runs it.
"""

from __future__ import annotations

import functools
import importlib.util
from collections.abc import Mapping
from typing import Any, Literal, NamedTuple, get_args

import jax
import jax.numpy as jnp
import numpy as np

from mojax import beside, flat
from mojax.compile import jit
from mojax.errors import InputError
from mojax.formats.base import Format, one_of
from mojax.kernels.hadamard_matrices import dividing, matrix, signs
from mojax.simulate import grown
from mojax.transforms.base import Context, Outcome, Params, Passage, Stats, Transform
from mojax.tuning import EVERY, draws, judges, mean_error, squared_error, wide

Start = Literal["best", "identity", "hadamard"]
UNTURNED = np.zeros((0, 0), np.float32)
NONE = "left alone: no matrix made the block's output better"
UNLEARNED = (
    "{}: its matrices must be learned from data first; give apply the statistics of mojax.calibrate with the "
    "same plan"
)


class Side(NamedTuple):
    """What is learned of L or R, `[n, n]`: P = U diag(e^t) V^T, U = cayley(a) start, V = cayley(b)."""

    a: jax.Array
    t: jax.Array
    b: jax.Array


class Group(NamedTuple):
    """Linears that read one input: the weights with their formats, by names in the block. Hashable."""

    members: tuple[tuple[str, Format], ...]
    width: int


class Problem(NamedTuple):
    """One block.

    Attributes:
      run: as in `Passage`; groups: the linears whose inputs are turned.
      leaves: all of the block, float32, by names in it.
      xs, ys: `[sequences, length, hidden]`, inputs and what should come of them.
    """

    run: Any
    groups: tuple[Group, ...]
    leaves: Mapping[str, Any]
    xs: np.ndarray
    ys: np.ndarray


def flatquant(
    *, steps: int = 100, batch: int = 4, rate: float = 0.01, start: Start = "best", seed: int = 0
) -> Transform:
    """Learned matrices in front of the linears of blocks; experts, heads and lookups have none. Experimental.

    Args:
      steps: of descent; 0 for the matrices it begins with.
      batch: sequences in a step.
      rate: of the first step; it falls to 0 along a cosine.
      start: "identity", "hadamard" (random Hadamard matrices as far as their orders are known), or the better
        of the two.
      seed: of the random signs, and which sequences come when.
    Raises:
      InputError: a number out of range, or optax is missing.
    """
    if steps < 0 or batch < 1 or not rate > 0 or seed < 0:
        raise InputError(
            f"flatquant: steps is {steps}, batch {batch}, rate {rate}, seed {seed}; needed 0 or more, 1 or "
            "more, above 0, 0 or more"
        )
    one_of("flatquant: start", start, get_args(Start))
    if importlib.util.find_spec("optax") is None:
        raise InputError("flatquant needs optax: pip install 'mojax[train]'")
    learn = functools.partial(_learn, steps, batch, rate, start, seed)
    return Transform(_apply, learn=learn, flattens=True)


def cayley(a: jax.Array) -> jax.Array:
    """(I + S)^-1 (I - S) with S = a - a^T, orthogonal `[n, n]`; I for zeros."""
    s = (a - a.T) / 2
    eye = jnp.eye(len(a), dtype=a.dtype)
    return jnp.linalg.solve(eye + s, eye - s)


def both(side: Side, start: jax.Array) -> tuple[jax.Array, jax.Array]:
    """P and its inverse, float32 `[n, n]`."""
    u, v = _dot(cayley(side.a), start), cayley(side.b)
    size = jnp.exp(side.t)[None]
    return _dot(u * size, v.T), _dot(v / size, u.T)


def first(kind: str, seed: int, name: str, n: int) -> jax.Array:
    """The orthogonal matrix to begin with: I, or Hadamard blocks of the largest known order, random signs."""
    eye = np.eye(n, dtype=np.float32)
    if kind == "identity":
        return jnp.asarray(eye)
    order = dividing(n)
    h = np.kron(np.eye(n // order), np.asarray(matrix(order)) / np.sqrt(order))
    return jnp.asarray(signs(seed, name, n)[:, None] * h, jnp.float32)


def _dot(a: jax.Array, b: jax.Array) -> jax.Array:
    return jnp.matmul(a, b, precision="highest", preferred_element_type=jnp.float32)


# Learning


def _learn(
    steps: int,
    batch: int,
    rate: float,
    start: Start,
    seed: int,
    params: Params,
    passage: Passage,
    context: Context,
) -> Stats:
    """L and R by weight; none where the block is better without."""
    problem = posed(params, passage, context)
    if not problem.groups:
        return {}
    kinds = ("identity", "hadamard") if start == "best" else (start,)
    starts = [tuple(_starts(kind, seed, g) for g in problem.groups) for kind in kinds]
    parts = judges(len(problem.xs), batch)
    fixed = problem.run, problem.groups
    xs, ys, leaves = problem.xs, problem.ys, problem.leaves

    def judged(pairs: Any) -> float:
        return mean_error(lambda i: error(*fixed, pairs, leaves, xs[i], ys[i]), parts)

    before = judged(None)
    found = [(judged(kept := stored(_zeros(s), s)), kept, s) for s in starts]
    least, best, begin = min(found, key=lambda f: f[0])
    states, memory = _zeros(begin), None
    for t, i in zip(range(1, steps + 1), draws(len(xs), min(batch, len(xs)), seed), strict=False):
        speed = np.float32(rate * (1 + np.cos(np.pi * (t - 1) / steps)) / 2)
        states, memory = move(*fixed, states, memory, speed, begin, leaves, xs[i], ys[i])
        if t % EVERY == 0 or t == steps:
            kept = stored(states, begin)
            now = judged(kept) if all(np.isfinite(m).all() for pair in kept for m in pair) else np.inf
            least, best = (now, kept) if now < least else (least, best)
    helps = least < before
    name = passage.prefix + problem.groups[0].members[0][0]
    note = "mean squared error of the block's output" if helps else NONE
    context.log(Outcome("flatquant", name, before, least if helps else before, note))
    pairs = best if helps else [(UNTURNED, UNTURNED)] * len(best)
    return {
        passage.prefix + w: {flat.LEFT: left, flat.RIGHT: right}
        for group, (left, right) in zip(problem.groups, pairs, strict=True)
        for w, _ in group.members
    }


def posed(params: Params, passage: Passage, context: Context) -> Problem:
    """The block as a problem."""
    found: dict[int, list[str]] = {}
    for site in context.sites:
        scheme = context.schemes.get(site.weight.removesuffix(".weight"))
        if scheme is not None and scheme.flat and site.op == "dot" and site.weight in params:
            found.setdefault(site.group, []).append(site.weight)
    cut = len(passage.prefix)
    groups = tuple(
        Group(
            tuple((w[cut:], context.schemes[w.removesuffix(".weight")].weights) for w in names),
            params[names[0]].shape[-1],
        )
        for names in found.values()
    )
    leaves = {n[cut:]: w for n, w in params.items() if not n.endswith(".input_scale")}  # of other inputs
    xs, ys = (np.concatenate([np.asarray(x) for x in part]) for part in (passage.inputs, passage.outputs))
    return Problem(passage.run, groups, {n: wide(w) for n, w in leaves.items()}, xs, ys)


def _starts(kind: str, seed: int, group: Group) -> tuple[jax.Array, ...]:
    name = group.members[0][0]
    sides = zip((flat.LEFT, flat.RIGHT), flat.sides(group.width), strict=True)
    return tuple(first(kind, seed, f"{name} {end}", n) for end, n in sides)


def _zeros(starts: Any) -> Any:
    def zeros(n: int) -> Side:
        return Side(*(jnp.zeros(shape, jnp.float32) for shape in ((n, n), (n,), (n, n))))

    return tuple(tuple(zeros(len(q)) for q in pair) for pair in starts)


def stored(states: Any, starts: Any) -> Any:
    """L and R of every group as they are kept, numpy `[n, n]` of 16 bits."""
    return jax.tree.map(np.asarray, _stored(states, starts))


@jit()
def _stored(states: Any, starts: Any) -> Any:
    kept = beside.dtype_of(np.float32)
    return tuple(
        tuple(both(side, begin)[0].astype(kept) for side, begin in zip(*pairs, strict=True))
        for pairs in zip(states, starts, strict=True)
    )


@jit(static_argnums=(0, 1))
def error(run: Any, groups: tuple[Group, ...], pairs: Any, leaves: Params, x: Any, y: Any) -> jax.Array:
    """The mean squared error of the block's output with these L and R, as kept (None: without any)."""
    if pairs is not None:
        pairs = tuple(tuple((m, jnp.linalg.inv(m.astype(jnp.float32))) for m in pair) for pair in pairs)
    return _error(run, groups, pairs, leaves, x, y)


def _error(run: Any, groups: tuple[Group, ...], pairs: Any, leaves: Params, x: Any, y: Any) -> jax.Array:
    changed: dict[str, Any] = {}
    for i, group in enumerate(groups):
        for name, format in group.members:
            w = leaves[name]
            if pairs is not None:
                (left, left_inverse), (right, right_inverse) = pairs[i]
                names = flat.leaves(name.removesuffix(".weight"))
                changed |= dict(zip(names, (left, right), strict=True))
                w = flat.absorbed(w, left_inverse, right_inverse)
            changed[name] = grown(format, w, format.fake(w))
    return squared_error(run, {**leaves, **changed}, x, y)


@jit(static_argnums=(0, 1))
def move(
    run: Any,
    groups: tuple[Group, ...],
    states: Any,
    memory: Any,
    rate: Any,
    starts: Any,
    leaves: Params,
    x: Any,
    y: Any,
) -> tuple[Any, Any]:
    """States and what the optimizer keeps of them (None: nothing yet), after one step."""
    import optax

    descent = optax.scale_by_adam()

    def value(states: Any) -> jax.Array:
        pairs = tuple(
            tuple(both(side, begin) for side, begin in zip(*pair, strict=True))
            for pair in zip(states, starts, strict=True)
        )
        return _error(run, groups, pairs, leaves, x, y)

    slopes = jax.grad(value)(states)
    with jax.numpy_dtype_promotion("standard"):  # as optax does
        updates, memory = descent.update(slopes, descent.init(states) if memory is None else memory)
    return jax.tree.map(lambda s, u: s - rate * u, states, updates), memory


# Applying


def _apply(params: Params, stats: Stats, context: Context) -> Params:
    changed: dict[str, Any] = {}
    for module in (m for m, scheme in context.schemes.items() if scheme.flat):
        name = module + ".weight"
        if flat.LEFT not in (seen := stats.get(name, {})):
            raise InputError(UNLEARNED.format(name))
        if not np.asarray(seen[flat.LEFT]).size:
            continue
        kept = beside.dtype_of(params[name].dtype)
        pair = [np.asarray(seen[end]).astype(kept) for end in (flat.LEFT, flat.RIGHT)]
        w = flat.absorbed(params[name], *(flat.inverse(m) for m in pair))
        changed[name] = np.asarray(w.astype(params[name].dtype))
        changed |= dict(zip(flat.leaves(module), pair, strict=True))
    return changed
