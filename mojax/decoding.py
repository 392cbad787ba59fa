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

from mojax import attention
from mojax.cache import LARGEST, Cache
from mojax.compile import jit
from mojax.formats.base import QTensor
from mojax.program import Program, cache_scales, embed, simulated


class Layer(NamedTuple):
    """The cache of one layer: keys and values `[batch, slots, kv_heads, head_dim]`, arrays or QTensors."""

    k: Any
    v: Any


class Programs(NamedTuple):
    """The static part of a model that generates.

    Attributes:
      embed, head: outside the blocks.
      blocks: of every layer, and how its cache is kept.
      stop: token ids that end a sequence.
    """

    embed: Program
    blocks: tuple[Program, ...]
    head: Program
    stop: tuple[int, ...]


class Weights(NamedTuple):
    """Its parameters: outside the blocks, and of every block, by names without its prefix."""

    embed: Mapping[str, Any]
    blocks: tuple[Mapping[str, Any], ...]
    head: Mapping[str, Any]


class Sampling(NamedTuple):
    """How a token is drawn.

    Attributes:
      temperature: float32 `[]`, above 0.
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
      tokens: int32 `[batch, slots]`, those chosen so far; made: int32 `[]`, how many.
    """

    layers: tuple[Layer, ...]
    start: jax.Array
    slot: jax.Array
    token: jax.Array
    done: jax.Array
    finite: jax.Array
    tokens: jax.Array
    made: jax.Array


def empty(cache: Cache | None, shape: tuple[int, ...], dtype: Any, scales: tuple[Any, Any]) -> Layer:
    """A cache of zeros.

    Args:
      shape: `[batch, slots, kv_heads, head_dim]`.
      scales: the largest magnitudes of keys and values that calibration saw, float32 `[]`; None is the one
        of an FP8 scale of 1, as servers take it.
    Returns:
      codes where `cache.packed`, else an array, of values that were rounded before.
    """

    def zeros(side: str, amax: Any) -> Any:
        format = cache.format(side) if cache is not None and cache.packed(side) else None
        if format is None:
            return jnp.zeros(shape, dtype)
        top = jnp.float32(LARGEST) if amax is None else amax
        outer = jnp.asarray(format.outer(top, jnp.dtype(dtype)))
        q = jax.eval_shape(format.encode, jax.ShapeDtypeStruct(shape, dtype), outer)
        found = jax.tree.map(lambda a: jnp.zeros(a.shape, a.dtype), q)
        return dataclasses.replace(found, scales=found.scales | {"outer": outer})

    return Layer(zeros("k", scales[0]), zeros("v", scales[1]))


def write(cache: Any, new: jax.Array, slot: jax.Array) -> Any:
    """The cache with `new [batch, length, kv_heads, head_dim]` in the slots from `slot` on."""

    def update(a: jax.Array, b: jax.Array) -> jax.Array:
        return lax.dynamic_update_slice_in_dim(a, b, slot, 1)

    if not isinstance(cache, QTensor):
        return update(cache, new)
    q = cache.format.encode(new, cache.scales.get("outer"))
    inner = {k: update(a, q.scales[k]) for k, a in cache.scales.items() if k != "outer"}
    return dataclasses.replace(cache, codes=update(cache.codes, q.codes), scales=cache.scales | inner)


def _block(
    program: Program, params: Mapping[str, Any], x: jax.Array, layer: Layer, start: jax.Array, slot: jax.Array
) -> tuple[jax.Array, Layer]:
    """One block on `x [batch, length, hidden]` that goes into the slots from `slot` on."""
    # Without this, XLA decodes the weights of all blocks once, ahead of the loop over tokens.
    params, x = lax.optimization_barrier((params, x))
    positions = slot + lax.iota(jnp.int32, x.shape[1])[None] - start[:, None]
    slots = lax.iota(jnp.int32, layer.k.shape[1])[None] - start[:, None]

    cache = program.cache

    def run(
        config: Any, params: Any, x: Any, layer: Layer, positions: Any, slots: Any, slot: Any, scales: Any
    ):
        kept: list[Layer] = []

        def cached(q: Any, k: Any, v: Any, positions: Any, window: int | None) -> jax.Array:
            q, k = attention.turned(cache, q), attention.turned(cache, k)
            if not isinstance(layer.k, QTensor):
                k = attention.kept(cache, "k", k, scales)
            if not isinstance(layer.v, QTensor):
                v = attention.kept(cache, "v", v, scales)
            kept.append(Layer(write(layer.k, k, slot), write(layer.v, v, slot)))
            return attention.over_slots(cache, q, *kept[0], positions, slots, window)

        y = program.family.block(config, program.kind, params, x, positions, attend=cached)
        return y, kept[0]

    return simulated(program, run)(params, x, layer, positions, slots, slot, cache_scales(params))


_block_alone = jit(static_argnums=(0,), donate_argnums=(3,))(_block)
_block_inside = functools.partial(jax.jit, static_argnums=0)(_block)  # blocks of one kind are traced once


def _head(program: Program, params: Mapping[str, Any], x: jax.Array) -> jax.Array:
    """Logits float32 `[batch, vocabulary]` after the last of `x [batch, length, hidden]`."""
    params, x = lax.optimization_barrier((params, x))
    return simulated(program, program.family.head)(params, x[:, -1:])[:, 0]


def choose(logits: jax.Array, sampling: Sampling | None, step: jax.Array) -> jax.Array:
    """The next token of every row of float32 logits `[batch, vocabulary]`; without `sampling` the likeliest.

    A nucleus (arXiv 1904.09751) holds all tokens that are as likely as its last one.
    """
    if sampling is None:
        return jnp.argmax(logits, -1).astype(jnp.int32)
    # Those of the likeliest are 0, so that no temperature makes them overflow.
    logs = (logits - jnp.max(logits, -1, keepdims=True)) / sampling.temperature

    def nucleus() -> jax.Array:
        ranked = -jnp.sort(-logs, axis=-1)
        shares = jax.nn.softmax(ranked, axis=-1)
        inside = jnp.cumsum(shares, axis=-1) - shares < sampling.top_p
        return jnp.where(logs >= jnp.min(ranked, -1, keepdims=True, where=inside, initial=0), logs, -jnp.inf)

    key = jax.random.fold_in(sampling.key, step)
    keys = jax.vmap(lambda row: jax.random.fold_in(key, row))(jnp.arange(len(logits)))
    kept = lax.cond(sampling.top_p < 1, nucleus, lambda: logs)
    return jax.vmap(jax.random.categorical)(keys, kept).astype(jnp.int32)


def _next(stop: tuple[int, ...], logits: jax.Array, sampling: Sampling | None, state: State) -> State:
    token = choose(logits, sampling, state.made)
    return state._replace(
        token=token,
        done=state.done | jnp.isin(token, jnp.array(stop, jnp.int32)),
        finite=state.finite & jnp.isfinite(logits).all(),
        tokens=lax.dynamic_update_slice(state.tokens, token[:, None], (jnp.int32(0), state.made)),
        made=state.made + 1,
    )


def prefill(
    programs: Programs,
    weights: Weights,
    layers: tuple[Layer, ...],
    tokens: Any,
    sampling: Sampling | None,
    start: Any,
) -> State:
    """Run the prompts, block by block, and choose the first token. `layers` are used up.

    Args:
      layers: of `empty`, with more slots than `length`.
      tokens: int32 `[batch, length]`, padded on the left.
      start: int32 `[batch]`, how many tokens of padding each has.
    """
    start, new = jnp.asarray(start, jnp.int32), []
    x = embed(programs.embed.family, programs.embed.config, weights.embed, tokens)
    for program, params, layer in zip(programs.blocks, weights.blocks, layers, strict=True):
        x, layer = _block_alone(program, params, x, layer, start, jnp.int32(0))
        new.append(layer)
    return _first(programs, weights.head, x, sampling, tuple(new), start)


@jit(static_argnums=(0,), donate_argnums=(4,))
def _first(
    programs: Programs,
    head: Mapping[str, Any],
    x: jax.Array,
    sampling: Sampling | None,
    layers: tuple[Layer, ...],
    start: jax.Array,
) -> State:
    batch, length = x.shape[:2]
    state = State(
        layers,
        start,
        jnp.int32(length),
        jnp.zeros(batch, jnp.int32),
        jnp.zeros(batch, bool),
        jnp.bool_(True),
        jnp.zeros((batch, layers[0].k.shape[1]), jnp.int32),
        jnp.int32(0),
    )
    return _next(programs.stop, _head(programs.head, head, x), sampling, state)


def forward(programs: Programs, weights: Weights, state: State) -> tuple[jax.Array, State]:
    """Logits float32 `[batch, vocabulary]` after `state.token`, which goes into the cache."""
    x = simulated(programs.embed, programs.embed.family.embed)(weights.embed, state.token[:, None])
    new = []
    for program, params, layer in zip(programs.blocks, weights.blocks, state.layers, strict=True):
        x, layer = _block_inside(program, params, x, layer, state.start, state.slot)
        new.append(layer)
    return _head(programs.head, weights.head, x), state._replace(layers=tuple(new), slot=state.slot + 1)


@jit(static_argnums=(0,), donate_argnums=(2,), sequential=True)
def advance(
    programs: Programs, weights: Weights, state: State, sampling: Sampling | None, until: Any
) -> State:
    """Choose tokens until there are `until` of them, int32 `[]`, or every sequence is done."""

    def step(state: State) -> State:
        logits, state = forward(programs, weights, state)
        return _next(programs.stop, logits, sampling, state)

    def more(state: State) -> jax.Array:
        return (state.made < until) & ~state.done.all()

    return lax.while_loop(more, step, state)
