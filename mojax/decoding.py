"""Decoding with a static key/value cache: one program for a prompt, one for the tokens that follow it.

Sequences are padded on the left to one length. Slot `j` of the cache holds position `j - start` of its
sequence, so that positions below 0 are padding and slots not yet written lie ahead of every query.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax

from mojax.compile import jit
from mojax.formats.base import Format, QTensor
from mojax.kernels.attention import attend
from mojax.program import Program, simulated


class Layer(NamedTuple):
    """The cache of one layer: keys and values `[batch, slots, kv_heads, head_dim]`, arrays or QTensors."""

    k: Any
    v: Any


class Programs(NamedTuple):
    """The static part of a model that generates.

    Attributes:
      embed, head: outside the blocks.
      blocks: of every layer, without the rounding of its cache.
      cache: the format of the key/value cache, or None.
      stop: token ids that end a sequence.
    """

    embed: Program
    blocks: tuple[Program, ...]
    head: Program
    cache: Format | None
    stop: tuple[int, ...]


class Weights(NamedTuple):
    """Its parameters: outside the blocks, and of every block, by names without its prefix."""

    embed: Mapping[str, Any]
    blocks: tuple[Mapping[str, Any], ...]
    head: Mapping[str, Any]


class Sampling(NamedTuple):
    """How a token is chosen.

    Attributes:
      temperature: float32 `[]`; 0 is the likeliest token.
      top_p: float32 `[]`; of the likeliest tokens, as many as together have this probability.
      key: of `jax.random`; the tokens of a sequence depend on it, its row and its step.
    """

    temperature: jax.Array
    top_p: jax.Array
    key: jax.Array


class State(NamedTuple):
    """Where generation stands.

    Attributes:
      layers: the caches.
      start: int32 `[batch]`, how many slots of padding a sequence begins with.
      slot: int32 `[]`, where the next token goes.
      token: int32 `[batch]`, the last one, not yet in the cache.
      done: bool `[batch]`.
      finite: bool `[]`, all logits so far were.
      tokens: int32 `[batch, max_tokens]`, those chosen so far; made: int32 `[]`, how many.
    """

    layers: tuple[Layer, ...]
    start: jax.Array
    slot: jax.Array
    token: jax.Array
    done: jax.Array
    finite: jax.Array
    tokens: jax.Array
    made: jax.Array


def empty(format: Format | None, shape: tuple[int, ...], dtype: Any, scales: tuple[Any, Any]) -> Layer:
    """A cache of zeros.

    Args:
      shape: `[batch, slots, kv_heads, head_dim]`.
      scales: the largest magnitudes of keys and values that calibration saw, float32 `[]`; None is a scale
        of 1, as servers take it.
    """
    if format is None:
        return Layer(jnp.zeros(shape, dtype), jnp.zeros(shape, dtype))

    def zeros(amax: Any) -> QTensor:
        outer = jnp.float32(1) if amax is None else jnp.asarray(format.outer(amax, jnp.dtype(dtype)))
        q = jax.eval_shape(format.encode, jax.ShapeDtypeStruct(shape, dtype), outer)
        found = jax.tree.map(lambda a: jnp.zeros(a.shape, a.dtype), q)
        return dataclasses.replace(found, scales=found.scales | {"outer": outer})

    return Layer(*(zeros(amax) for amax in scales))


def write(cache: Any, new: jax.Array, slot: jax.Array) -> Any:
    """The cache with `new [batch, length, kv_heads, head_dim]` in the slots from `slot` on."""

    def update(a: jax.Array, b: jax.Array) -> jax.Array:
        return lax.dynamic_update_slice_in_dim(a, b, slot, 1)

    if not isinstance(cache, QTensor):
        return update(cache, new)
    q = cache.format.encode(new, cache.scales["outer"])
    inner = {k: update(a, q.scales[k]) for k, a in cache.scales.items() if k != "outer"}
    return dataclasses.replace(cache, codes=update(cache.codes, q.codes), scales=cache.scales | inner)


@functools.partial(jax.jit, static_argnums=0)
def _block(
    program: Program, params: Mapping[str, Any], x: jax.Array, layer: Layer, start: jax.Array, slot: jax.Array
) -> tuple[jax.Array, Layer]:
    """One block on `x [batch, length, hidden]` that goes into the slots from `slot` on."""
    params, x = lax.optimization_barrier((params, x))
    positions = slot + lax.iota(jnp.int32, x.shape[1])[None] - start[:, None]
    slots = lax.iota(jnp.int32, layer.k.shape[1])[None] - start[:, None]

    def run(config: Any, params: Any, x: jax.Array, layer: Layer, positions: Any, slots: Any, slot: Any):
        kept: list[Layer] = []

        def cached(q: Any, k: Any, v: Any, positions: Any, window: int | None) -> jax.Array:
            kept.append(Layer(write(layer.k, k, slot), write(layer.v, v, slot)))
            return attend(q, kept[0].k, kept[0].v, positions, slots, window=window)

        y = program.family.block(config, program.kind, params, x, positions, attend=cached)
        return y, kept[0]

    return simulated(program, run)(params, x, layer, positions, slots, slot)


def forward(
    programs: Programs, weights: Weights, layers: tuple[Layer, ...], tokens: Any, start: Any, slot: Any
) -> tuple[jax.Array, tuple[Layer, ...]]:
    """Logits float32 `[batch, vocabulary]` after the last of `tokens` int32 `[batch, length]`; the caches."""
    x = simulated(programs.embed, programs.embed.family.embed)(weights.embed, tokens)
    new = []
    for program, params, layer in zip(programs.blocks, weights.blocks, layers, strict=True):
        x, layer = _block(program, params, x, layer, start, slot)
        new.append(layer)
    logits = simulated(programs.head, programs.head.family.head)(weights.head, x[:, -1:])
    return logits[:, 0], tuple(new)


def choose(logits: jax.Array, sampling: Sampling, step: jax.Array) -> jax.Array:
    """The next token of every row of float32 logits `[batch, vocabulary]` (nucleus: arXiv 1904.09751)."""

    def sample() -> jax.Array:
        scaled = logits / sampling.temperature
        ranked = -jnp.sort(-scaled, axis=-1)
        shares = jax.nn.softmax(ranked, axis=-1)
        before = jnp.cumsum(shares, axis=-1) - shares
        least = jnp.min(jnp.where(before < sampling.top_p, ranked, jnp.inf), axis=-1, keepdims=True)
        nucleus = jnp.where(scaled >= jnp.maximum(least, ranked[:, -1:]), scaled, -jnp.inf)
        key = jax.random.fold_in(sampling.key, step)
        keys = jax.vmap(lambda row: jax.random.fold_in(key, row))(jnp.arange(len(logits)))
        return jax.vmap(jax.random.categorical)(keys, nucleus).astype(jnp.int32)

    return lax.cond(sampling.temperature > 0, sample, lambda: jnp.argmax(logits, -1).astype(jnp.int32))


def _next(programs: Programs, logits: jax.Array, sampling: Sampling, state: State) -> State:
    token = choose(logits, sampling, state.made)
    stop = jnp.isin(token, jnp.array(programs.stop, jnp.int32))
    return state._replace(
        token=token,
        done=state.done | stop,
        finite=state.finite & jnp.isfinite(logits).all(),
        tokens=lax.dynamic_update_slice(state.tokens, token[:, None], (jnp.int32(0), state.made)),
        made=state.made + 1,
    )


@jit(static_argnums=(0, 5))
def prefill(
    programs: Programs,
    weights: Weights,
    layers: tuple[Layer, ...],
    tokens: Any,
    sampling: Sampling,
    max_tokens: int,
    start: Any,
) -> State:
    """Run the prompts and choose the first token.

    Args:
      layers: of `empty`, with at least `length + max_tokens` slots.
      tokens: int32 `[batch, length]`, padded on the left.
      start: int32 `[batch]`, how many tokens of padding each has.
    """
    batch, length = tokens.shape
    logits, layers = forward(programs, weights, layers, tokens, start, jnp.int32(0))
    state = State(
        layers,
        jnp.asarray(start, jnp.int32),
        jnp.int32(length),
        jnp.zeros(batch, jnp.int32),
        jnp.zeros(batch, bool),
        jnp.bool_(True),
        jnp.zeros((batch, max_tokens), jnp.int32),
        jnp.int32(0),
    )
    return _next(programs, logits, sampling, state)


@jit(static_argnums=(0,), donate_argnums=(2,))
def advance(programs: Programs, weights: Weights, state: State, sampling: Sampling, until: Any) -> State:
    """Choose tokens until there are `until` of them, int32 `[]`, or every sequence is done."""

    def step(state: State) -> State:
        logits, layers = forward(
            programs, weights, state.layers, state.token[:, None], state.start, state.slot
        )
        return _next(programs, logits, sampling, state._replace(layers=layers, slot=state.slot + 1))

    def more(state: State) -> jax.Array:
        return (state.made < until) & ~state.done.all()

    return lax.while_loop(more, step, state)
