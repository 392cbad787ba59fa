"""Descent on the error of a whole block's output, for steps of the "tune" phase.

  minimise mean |block_q(x~) - block(x)|^2,   x~ as earlier blocks pass it on

Steps take a few sequences at a time. The best iterate is the one with the least error on a fixed part of the
sequences, as it would be written; what was given takes part, so that nothing gets worse there.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator, Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from mojax.compile import jit
from mojax.formats.base import Format, QTensor
from mojax.matrices import encode, unchanged
from mojax.rounding.scales import Grid, Scales, encoded, grid
from mojax.rounding.soft import inside
from mojax.transforms.base import Context, Outcome, Params, Passage, Stats

JUDGED = 16  # sequences that choose the best iterate
EVERY = 10  # steps between two judgements

Formats = tuple[tuple[str, Format], ...]


class Weight(NamedTuple):
    """One encoded weight before it is tuned.

    Attributes:
      near: float32 `[*batch, out, in]`, the weight where it is rounded to the given codes; else the number
        nearest to it that is.
      scales: the given ones.
    """

    near: jax.Array
    scales: Scales


class Learner(NamedTuple):
    """What is learned of a weight, and how; pure functions, each of `(format, weight, ...)`.

    Attributes:
      start: `(format, weight) -> state`, any pytree: the given codes.
      used: `(format, weight, state) -> w`, float32 `[*batch, out, in]`: where the slope is taken.
      move: `(format, weight, state, slope, rate) -> state`: one step; slope is that of the error at `used`.
      final: `(format, weight, state) -> (q, scales)`: what would be written, float32 on their grid.
    """

    start: Callable[[Format, Weight], Any]
    used: Callable[[Format, Weight, Any], jax.Array]
    move: Callable[[Format, Weight, Any, jax.Array, jax.Array], Any]
    final: Callable[[Format, Weight, Any], tuple[jax.Array, Scales]]


class Problem(NamedTuple):
    """One block to tune.

    Attributes:
      run: as in `Passage`; formats: by weight, in short names.
      weights: by short name; rest: the other leaves of the block.
      xs, ys: `[sequences, length, hidden]`, inputs and what should come of them.
    """

    run: Callable[[Params, jax.Array], jax.Array]
    formats: Formats
    weights: Mapping[str, Weight]
    rest: Params
    xs: Any
    ys: Any


class Found(NamedTuple):
    """The best states by weight, and the judged error without and with them."""

    states: dict[str, Any]
    before: float
    after: float


def tune(
    step: str,
    learner: Learner,
    rates: tuple[float, ...],
    batch: int,
    seed: int,
    params: Params,
    passage: Passage,
    context: Context,
) -> Params:
    """A block tuned by `learner`: the QTensors that it changes; none where nothing is better.

    Args:
      step: its name, for the outcome.
      rates: one for each step.
      batch: sequences in a step; seed: which come when.
    """
    names = [m + ".weight" for m in context.schemes]
    names = [n for n in names if isinstance(params[n], QTensor) and _matrices(params[n])]
    if not names or not rates:
        return {}
    short = {n: n.removeprefix(passage.prefix) for n in params}
    problem = Problem(
        passage.run,
        tuple((short[n], params[n].format) for n in names),
        {short[n]: given(params[n], context.targets[n]) for n in names},
        {short[n]: wide(leaf) for n, leaf in params.items() if n not in names},
        *(np.concatenate([np.asarray(x) for x in xs]) for xs in (passage.inputs, passage.outputs)),
    )
    found = descend(learner, problem, rates, batch, seed)
    note = "mean squared error of the block's output"
    context.log(Outcome(step, names[0], found.before, found.after, note))
    if not found.after < found.before:
        return {}
    return {
        n: _finished(learner, params[n], problem.weights[short[n]], found.states[short[n]]) for n in names
    }


def _matrices(q: QTensor) -> bool:
    """Whether it is `[out, in]` or `[experts, out, in]`."""
    return (
        q.batch in ((), (0,)) and q.contract in ((), (len(q.shape) - 1,)) and len(q.shape) - len(q.batch) == 2
    )


def nearest(step: str, params: Params, stats: Stats, context: Context) -> Params:
    """What no step before has encoded, rounded to nearest: the `apply` of a step that tunes."""
    plain = [m + ".weight" for m in context.schemes if not isinstance(params[m + ".weight"], QTensor)]
    quiet = context.only(plain)._replace(log=lambda outcome: None)
    return encode(step, params, stats, quiet, unchanged) if plain else {}


def descend(learner: Learner, problem: Problem, rates: tuple[float, ...], batch: int, seed: int) -> Found:
    """The best iterate of one block."""
    fixed, weights, rest = (learner, problem.run, problem.formats), problem.weights, problem.rest
    count = len(problem.xs)
    parts = judges(count, batch)

    def judged(states: Mapping[str, Any]) -> float:
        return mean_error(lambda i: error(*fixed, states, weights, rest, problem.xs[i], problem.ys[i]), parts)

    states = {n: learner.start(format, weights[n]) for n, format in problem.formats}
    before = judged(states)
    best, least = states, before
    order = draws(count, min(batch, count), seed)
    for t, (rate, i) in enumerate(zip(rates, order, strict=False), 1):
        states = move(*fixed, states, weights, rest, problem.xs[i], problem.ys[i], jnp.float32(rate))
        if t % EVERY == 0 or t == len(rates):
            now = judged(states)
            best, least = (states, now) if now < least else (best, least)
    return Found(best, before, least)


def judges(count: int, batch: int) -> list[np.ndarray]:
    """The sequences, of `count`, that choose the best iterate, in parts of at most `batch`."""
    chosen = np.arange(min(count, JUDGED)) * count // min(count, JUDGED)
    return np.array_split(chosen, -(-len(chosen) // batch))


def mean_error(error: Callable[[np.ndarray], Any], parts: list[np.ndarray]) -> float:
    """The mean over sequences of `error(indices)`, a mean over those of a part."""
    return sum(float(error(i)) * len(i) for i in parts) / sum(map(len, parts))


def draws(count: int, size: int, seed: int) -> Iterator[np.ndarray]:
    """Which sequences come next: all of them in some order, then again."""
    rng = np.random.default_rng(seed)
    for _ in itertools.count():
        order = rng.permutation(count)
        yield from (order[i : i + size] for i in range(0, count - size + 1, size))


def squared_error(run: Any, leaves: Params, x: jax.Array, y: jax.Array) -> jax.Array:
    """The mean squared error of a block's output `[sequences, length, hidden]`, float32 `[]`."""
    return jnp.mean(jnp.square(run(leaves, x.astype(jnp.float32)) - y.astype(jnp.float32)))


@jit(static_argnums=(0, 1, 2))
def error(
    learner: Learner,
    run: Callable[[Params, jax.Array], jax.Array],
    formats: Formats,
    states: Mapping[str, Any],
    weights: Mapping[str, Weight],
    rest: Params,
    x: Any,
    y: Any,
) -> jax.Array:
    """The mean squared error of the block's output as it would be written, float32 `[]`."""
    found = {n: learner.final(format, weights[n], states[n])[0] for n, format in formats}
    return squared_error(run, {**rest, **found}, x, y)


@jit(static_argnums=(0, 1, 2))
def move(
    learner: Learner,
    run: Callable[[Params, jax.Array], jax.Array],
    formats: Formats,
    states: Mapping[str, Any],
    weights: Mapping[str, Weight],
    rest: Params,
    x: Any,
    y: Any,
    rate: jax.Array,
) -> dict[str, Any]:
    """The states after one step."""
    used = {n: learner.used(format, weights[n], states[n]) for n, format in formats}
    slopes = jax.grad(lambda used: squared_error(run, {**rest, **used}, x, y))(used)
    return {n: learner.move(f, weights[n], states[n], slopes[n], rate) for n, f in formats}


def given(q: QTensor, target: Any) -> Weight:
    """The weight that `q` stands for, before it is tuned."""
    scales = {level: jnp.asarray(s) for level, s in q.scales.items()}
    return Weight(_inside(q.format, jnp.asarray(target), jnp.asarray(q.format.decode(q)), scales), scales)


@jit(static_argnums=(0,))
def _inside(format: Format, w: jax.Array, q: jax.Array, scales: Scales) -> jax.Array:
    return inside(format, w, q, grids(format, scales, w.shape))


def grids(format: Format, scales: Scales, shape: tuple[int, ...]) -> Grid:
    """`mojax.rounding.scales.grid`, of a stack of matrices too."""
    if len(shape) == 2:
        return grid(format, scales, (shape[0], shape[1]))
    return jax.vmap(lambda s: grids(format, s, shape[1:]))(scales)


def wide(leaf: Any) -> Any:
    """A leaf of floats as float32; any other as it is."""
    if isinstance(leaf, QTensor) or not jnp.issubdtype(leaf.dtype, jnp.floating):
        return leaf
    return jnp.asarray(leaf).astype(jnp.float32)


def _finished(learner: Learner, q: QTensor, weight: Weight, state: Any) -> QTensor:
    """The QTensor of a state."""
    found, scales = learner.final(q.format, weight, state)
    if not q.batch:
        return jax.tree.map(np.asarray, encoded(q.format, found, scales, q.dtype))
    rows = [{level: s[i] for level, s in scales.items()} for i in range(len(found))]
    made = [encoded(q.format, w, s, q.dtype) for w, s in zip(found, rows, strict=True)]
    codes = np.stack([np.asarray(m.codes) for m in made])
    stacked = {level: np.asarray(s) for level, s in scales.items()}
    return QTensor(codes, stacked, q.format, q.shape, q.dtype, q.contract, q.batch)
