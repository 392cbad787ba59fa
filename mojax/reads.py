"""Which tensors the functions of a family read that are outside its blocks."""

from __future__ import annotations

import functools
from collections.abc import Iterator, Mapping
from types import ModuleType
from typing import Any, Literal

import jax
import jax.numpy as jnp


class Reader(Mapping[str, Any]):
    """A mapping that remembers which of its values were asked for."""

    def __init__(self, params: Mapping[str, Any]):
        self.params = params
        self.asked: dict[str, None] = {}

    def __getitem__(self, name: str) -> Any:
        self.asked[name] = None
        return self.params[name]

    def __iter__(self) -> Iterator[str]:
        return iter(self.params)

    def __len__(self) -> int:
        return len(self.params)


@functools.lru_cache
def reads(family: ModuleType, config: Any, part: Literal["embed", "head"]) -> tuple[str, ...]:
    """The names of the tensors that `embed` or `head` of a family reads."""
    asked: list[str] = []

    def run(params: Mapping[str, Any], *args: Any) -> Any:
        reader = Reader(params)
        out = getattr(family, part)(config, reader, *args)
        asked.extend(reader.asked)
        return out

    bf16 = jnp.dtype(jnp.bfloat16)  # names alone are wanted, any dtype does
    params = {name: jax.ShapeDtypeStruct(shape, bf16) for name, shape in family.shapes(config).items()}
    tokens = jax.ShapeDtypeStruct((1, 8), jnp.int32)
    x = tokens if part == "embed" else jax.eval_shape(functools.partial(family.embed, config), params, tokens)
    jax.eval_shape(run, params, x)
    return tuple(asked)
