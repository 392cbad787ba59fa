"""What the predictions feel: sums over tokens of the gradients at the outputs of every linear.

    G = sum_t g_t g_t^T        w_t = mean_i g_ti^2        g_t = d(-log p(y_t)) / d(output of the linear)

with labels `y` drawn from the model's own predictions, so that G is the Fisher information of the output
side (K-FAC, arXiv 1503.05671). A rounding error D of a weight then costs tr(G D H D^T) with H of its inputs:
the two-sided objective of arXiv 2505.22988. One pass back over the blocks; the inputs of all blocks are held
on the host meanwhile, in the dtype of the model, and the arithmetic is float32.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from mojax import calibration, interpret, simulate
from mojax.compile import jit
from mojax.model import Model
from mojax.models.layers import Block
from mojax.plans import READS
from mojax.program import Program, run_block
from mojax.threads import each, flow

WHOLE = 1024  # G is one block up to so many output rows
ROWS = 128  # and in diagonal blocks of so many above


class Gradients(NamedTuple):
    """By weight (checkpoint names).

    Attributes:
      output_gram: G, float32 `[out / b, b, b]`; `[experts, out / b, b, b]` for experts.
      tokens: w, a float32 `[tokens]` for every batch of `calibration.batches`; for experts in the order in
        which float32 arithmetic sorts the rows, so that another run of the block cannot be weighed with it.
    """

    output_gram: dict[str, np.ndarray]
    tokens: dict[str, list[np.ndarray]]


def block_rows(out: int) -> int:
    """Rows of a diagonal block of G for `out` output rows."""
    return out if out <= WHOLE else next(b for b in range(ROWS, 0, -1) if out % b == 0)


def gradients(
    model: Model, tokens: np.ndarray, *, draws: int, seed: int, weights: Mapping[str, Sequence[str]]
) -> Gradients:
    """Sums of output gradients.

    Args:
      tokens: int32 `[sequences, length]`.
      draws: how many times labels are drawn.
      weights: which weights, by the prefix of their block; full names.
    """
    inputs: list[list[Any]] = [list(calibration.start(model, tokens))]
    for block in model.blocks:
        params = jax.device_put(model.local(block))
        run = functools.partial(run_block, model.program(block), params)
        inputs.append([run(inputs[-1][0]), *each(run, inputs[-1][1:])])
        inputs[-2] = [np.asarray(x) for x in inputs[-2]]
    found = Gradients({}, {})
    last = inputs.pop()
    outside = _wide(model.outside("head"))
    key, program = jax.random.key(seed), model.head_program()

    def slope(i: int, draw: int) -> jax.Array:
        return _head(program, outside, last[i], jax.random.fold_in(key, draw * len(last) + i))

    slopes = [[slope(i, d) for d in range(draws)] for i in range(len(last))]
    for block, xs in zip(reversed(model.blocks), reversed(inputs), strict=True):
        slopes = _back(model, block, xs, slopes, tuple(weights.get(block.prefix, ())), found)
    return found


def _back(
    model: Model,
    block: Block,
    xs: Sequence[Any],
    slopes: Sequence[Sequence[Any]],
    weights: tuple[str, ...],
    found: Gradients,
) -> list[list[Any]]:
    """The gradients at a block's input from those at its output, `[batch][draw]`; what it felt: `found`."""
    n = len(block.prefix)
    params = _wide(jax.device_put(model.local(block)))
    program, names = model.program(block), tuple(sorted(w[n:] for w in weights))

    def run(pair: tuple[Any, Sequence[Any]]) -> tuple[list[Any], dict[str, Any], dict[str, Any]]:
        x, gs = pair
        results = [pull(program, names, params, x, g) for g in gs]
        grams = {w: sum(np.asarray(r[1][w], np.float32) for r in results) for w in names}
        felt = {w: sum(np.asarray(r[2][w]) for r in results) / len(gs) for w in names}
        return [r[0] for r in results], grams, felt

    pairs, slopes_before = list(zip(xs, slopes, strict=True)), []
    for part in (pairs[:1], pairs[1:]):  # the first alone, so that it is compiled once
        for before, grams, felt in flow(run, part):
            slopes_before.append(before)
            for w in names:
                found.tokens.setdefault(block.prefix + w, []).append(felt[w])
                if block.prefix + w in found.output_gram:
                    found.output_gram[block.prefix + w] += grams[w]
                else:
                    found.output_gram[block.prefix + w] = np.array(grams[w])
    return slopes_before


def _wide(params: Mapping[str, Any]) -> dict[str, Any]:
    return {n: w.astype(jnp.float32) for n, w in params.items()}


@jit(static_argnums=(0,))
def _head(program: Program, params: Mapping[str, Any], x: Any, key: jax.Array) -> jax.Array:
    """The gradient at the head's input of the summed loss, with labels drawn from the predictions."""

    def logits(x: jax.Array) -> jax.Array:
        return program.family.head(program.config, params, x)

    y, pull = jax.vjp(logits, x.astype(jnp.float32))
    labels = jax.random.categorical(key, y, axis=-1)
    return pull(jax.nn.softmax(y, axis=-1) - jax.nn.one_hot(labels, y.shape[-1]))[0]


@jit(static_argnums=(0, 1))
def pull(
    program: Program, names: tuple[str, ...], params: Mapping[str, Any], x: Any, slope: jax.Array
) -> tuple[jax.Array, dict[str, jax.Array], dict[str, jax.Array]]:
    """One block backwards, in float32.

    Args:
      names: the weights whose outputs are watched, without the block's prefix.
      x: the block's input `[batch, length, hidden]`; slope: the gradient at its output.
    Returns:
      the gradient at the input; by weight G and w of these tokens.
    """
    sizes: dict[str, jax.Array | None] = {}

    def run(x: jax.Array, shifts: Mapping[str, jax.Array] | None) -> tuple[jax.Array, dict[str, Any]]:
        def hook(place: interpret.Place) -> tuple[Any, Any]:
            turned = simulate.flattened(params, place)
            if place.name not in names or place.op not in READS:
                return None if turned is place else turned.run(), None
            y = turned.run()
            return (y if shifts is None else y + shifts[place.name]), (y, place.groups)

        def block(params: Mapping[str, Any], x: jax.Array) -> jax.Array:
            return program.family.block(program.config, program.kind, params, x, jnp.arange(x.shape[1]))

        return interpret.intercept(block, hook)(params, x)

    x = x.astype(jnp.float32)
    shapes = jax.eval_shape(lambda x: {w: tap[0] for w, tap in run(x, None)[1].items()}, x)
    zeros = {w: jnp.zeros(s.shape, s.dtype) for w, s in shapes.items()}

    def forward(x: jax.Array, shifts: Mapping[str, jax.Array]) -> tuple[jax.Array, dict[str, Any]]:
        y, taps = run(x, shifts)
        return y, {w: groups for w, (_, groups) in taps.items() if groups is not None}

    _, back, sizes = jax.vjp(forward, x, zeros, has_aux=True)
    before, felt = back(slope)
    grams, weights = {}, {}
    for w, g in felt.items():
        rows = g.reshape(-1, g.shape[-1])
        grams[w] = _gram(rows, sizes.get(w))
        weights[w] = jnp.mean(jnp.square(rows), axis=-1)
    return before, grams, weights


def _gram(g: jax.Array, sizes: jax.Array | None) -> jax.Array:
    """G of gradients `[rows, out]`; of every group of rows where there are groups."""
    b = block_rows(g.shape[-1])

    def blocks(g: jax.Array) -> jax.Array:
        parts = g.reshape(len(g), -1, b)
        dims = (((0,), (0,)), ((1,), (1,)))
        return lax.dot_general(parts, parts, dims, precision="highest", preferred_element_type=jnp.float32)

    if sizes is None:
        return blocks(g)
    ids = jnp.searchsorted(jnp.cumsum(sizes), jnp.arange(len(g)), side="right")
    masked: Callable = lambda e: blocks(jnp.where((ids == e)[:, None], g, 0.0))  # noqa: E731
    return lax.map(masked, jnp.arange(len(sizes)))
