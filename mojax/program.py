"""The compiled parts of a language model, with packed weights and rounded inputs: embedding, blocks, head."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from types import ModuleType
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from mojax import experts, interpret, simulate
from mojax.compile import jit
from mojax.formats.base import Format, QTensor

INPUT = ".input_scale"  # leaf beside `.weight`: the largest input magnitude that calibration saw


class Program(NamedTuple):
    """What must be compiled once: a kind of layer and how its linears run. Hashable; a static argument."""

    family: ModuleType
    config: Any
    kind: str
    inputs: tuple[tuple[str, Format], ...] = ()  # (module or cache, format) whose values are simulated


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

    def block(config: Any, params: Mapping[str, Any], x: Any) -> jax.Array:
        return program.family.block(config, program.kind, params, x, jnp.arange(x.shape[1]))

    return simulated(program, block)(params, x)


def simulated(program: Program, fn: Callable[..., Any]) -> Callable[..., Any]:
    """`fn(config, params, *args)` as `g(params, *args)` with packed weights and rounded inputs.

    `params` of `g` also holds the static scales, `<module>.input_scale`.
    """
    inputs = dict(program.inputs)

    def call(params: Mapping[str, Any], *args: Any) -> Any:
        def quantize(place: interpret.Place) -> tuple[Any, None]:
            module = place.name.removesuffix(".weight")
            if module not in inputs or place.op == "gather":
                return None, None
            amax = params.get(module + INPUT)
            if place.op == "cache" and amax is None and inputs[module].static:
                return inputs[module].fake(place.x, jnp.float32(1)), None  # as servers take a missing scale
            return simulate.rounded(inputs[module], place, amax), None

        def plain(weights: Mapping[str, Any], *args: Any) -> Any:
            return fn(program.config, weights, *args)

        weights = {name: leaf for name, leaf in params.items() if not name.endswith(INPUT)}
        if (
            inputs
            or any(isinstance(leaf, QTensor) for leaf in weights.values())
            or any(map(experts.starred, weights))  # the interpreter's product of groups is faster
        ):
            return interpret.intercept(plain, quantize)(weights, *args)[0]
        return plain(weights, *args)

    return call
