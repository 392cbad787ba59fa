"""The compiled parts of a language model, with packed weights and rounded inputs: embedding, blocks, head."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from types import ModuleType
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from mojax import attention, beside, experts, flat, interpret, simulate
from mojax.cache import Cache
from mojax.compile import jit
from mojax.formats.base import Format, QTensor

MEAN = "_cache.mean"  # leaf of an affine cache: the mean of every channel
INPUT = ".input_scale"  # leaf beside `.weight`: the largest input magnitude that calibration saw


class Program(NamedTuple):
    """What must be compiled once: a kind of layer and how its linears run. Hashable; a static argument."""

    family: ModuleType
    config: Any
    kind: str
    inputs: tuple[tuple[str, Format], ...] = ()  # (module, format) whose values are simulated
    cache: Cache | None = None  # of this layer
    rotated: tuple[tuple[str, int], ...] = ()  # (module, order of the Hadamard blocks that rotate its input)
    grows: bool = False  # whether gradients know that scales of inputs follow them: `simulate.grown`


@jit(static_argnums=(0, 1))
def embed(family: ModuleType, config: Any, params: Mapping[str, Any], tokens: Any) -> jax.Array:
    """`[batch, length, hidden]` of int32 `[batch, length]`."""
    return simulated(Program(family, config, "embed"), family.embed)(params, tokens)


@jit(static_argnums=(0,))
def head(program: Program, params: Mapping[str, Any], x: Any) -> jax.Array:
    """float32 logits `[batch, length, vocabulary]` of `[batch, length, hidden]`."""
    return simulated(program, program.family.head)(params, x)


@jit(static_argnums=(0,))
def run_block(program: Program, params: Mapping[str, Any], x: Any) -> jax.Array:
    """One block on `x [batch, length, hidden]`; quantized inputs are rounded as a server rounds them."""

    return simulated(program, block_of(program))(params, x, cache_scales(params))


def block_of(program: Program) -> Callable[..., jax.Array]:
    """`fn(config, params, x, scales)`: the block with its cache rounded, for `simulated` and `watched`.

    `scales` are the `cache_scales` of its params.
    """
    cache = program.cache

    def block(config: Any, params: Mapping[str, Any], x: Any, scales: attention.Scales) -> jax.Array:
        own = {"attend": attention.over_text(cache, scales)} if cache is not None else {}
        return program.family.block(config, program.kind, params, x, jnp.arange(x.shape[1]), **own)

    return block


def cache_scales(params: Mapping[str, Any]) -> dict[str, Any]:
    """What calibration found for the cache, of the leaves of one block: see `mojax.cache.Cache.leaves`."""
    names = {
        f"self_attn.{kv}{end}": kv + key
        for kv in "kv"
        for end, key in (("_cache" + INPUT, ""), (MEAN, "_mean"))
    }
    return {key: params[name] for name, key in names.items() if name in params}


def simulated(program: Program, fn: Callable[..., Any]) -> Callable[..., Any]:
    """`fn(config, params, *args)` as `g(params, *args)` with packed weights and rounded inputs.

    `params` of `g` also holds the static scales, `<module>.input_scale`.
    """
    run = watched(program, fn, None)
    return lambda params, *args: run(params, *args)[0]


Look = Callable[[interpret.Place, Callable[[], Any]], Any]


def watched(
    program: Program, fn: Callable[..., Any], look: Look | None, known: Mapping[str, jax.Array] | None = None
) -> Callable[..., Any]:
    """`simulated`, but `g(params, *args) -> (y, taps)`; `look(place, rounded)` gives the tap of a place.

    `rounded()` is the input of the place as its operation gets it.

    Args:
      known: inputs of weights that are known already, as `Place.x`; nothing before them is computed.
    """
    inputs, turns = dict(program.inputs), dict(program.rotated)

    def call(params: Mapping[str, Any], *args: Any) -> Any:
        def quantize(place: interpret.Place) -> tuple[Any, Any]:
            module = place.name.removesuffix(".weight")
            x, branch = place.x, beside.branch(params, module) if place.op == "dot" else None
            turned = module in turns and place.op != "gather"
            place = simulate.rotated(turns[module], place) if turned else place
            flattened = simulate.flattened(params, place)
            turned, place = turned or flattened is not place, flattened
            if module not in inputs or place.op == "gather":
                tap = look(place, lambda: place.x) if look else None
                y = place.run() if turned or branch else None
            else:
                amax = params.get(module + INPUT)
                tap = look(place, lambda: simulate.round_input(inputs[module], place, amax)) if look else None
                y = simulate.rounded(inputs[module], place, amax, program.grows)
            return beside.added(y, x, *branch) if branch and y is not None else y, tap

        def resumed(place: interpret.Place) -> tuple[Any, Any]:
            x = known.get(place.name) if known and place.op == "dot" else None
            if x is None or x.shape != place.x.shape or x.dtype != place.x.dtype:
                return quantize(place)
            own = place.run

            held = x

            def run(x: Any = None, w: Any = None, rounding: Any = None) -> jax.Array:
                return own(held if x is None else x, w, rounding)

            y, tap = quantize(place._replace(x=held, run=run))
            return run() if y is None else y, tap

        def plain(weights: Mapping[str, Any], *args: Any) -> Any:
            return fn(program.config, weights, *args)

        added = (*beside.LEAVES, *flat.LEAVES)
        others = (INPUT, MEAN, *added)
        weights = {name: leaf for name, leaf in params.items() if not name.endswith(others)}
        if (
            look
            or known
            or inputs
            or turns
            or any(isinstance(leaf, QTensor) for leaf in weights.values())
            or any(name.endswith(added) for name in params)
            or any(map(experts.starred, weights))  # the interpreter's product of groups is faster
        ):
            return interpret.intercept(plain, resumed)(weights, *args)
        return plain(weights, *args), {}

    return call
