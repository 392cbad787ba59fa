"""MXFP8: E4M3 elements in blocks of 32 with a power of two (E8M0) per block.

  w ~ e4m3 * 2^(e - 127)
  "checkpoint"  e - 127 = floor(log2 amax) - 8, one more from mantissa 1.75 on
  "float32"     e - 127 = ceil(log2(amax / 448))

OCP Microscaling Formats 1.0, section 6; the rules are compressed-tensors' ("checkpoint") and ModelOpt's
("float32"). Dividing by a power of two is exact, so neither rounds the quotient.
"""

from __future__ import annotations

import dataclasses
import math
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from mojax.formats.base import Array, Format
from mojax.formats.numerics import (
    amax,
    blocks,
    divide,
    e4m3,
    exponent,
    indivisible,
    inverse_power,
    power,
    rne,
)

_BLOCK = 32


def _round_near(top: jax.Array, largest: float, dtype: np.dtype) -> jax.Array:
    e = jnp.maximum(exponent(top, 1.75) - math.floor(math.log2(largest)), 0)
    # 2^-127 does not exist in float16: compressed-tensors then stores the exponent of 1 for zeros.
    return jnp.where((top == 0) & (dtype == np.float16), 127, e)


def _round_up(top: jax.Array, largest: float, dtype: np.dtype) -> jax.Array:
    return exponent(divide(top, largest), 1 + 2.0**-23)


_EXPONENT = {"checkpoint": _round_near, "float32": _round_up}


def fit_exponents(w: jax.Array, format: Format) -> jax.Array:
    """E8M0 exponents, uint8 `[..., in / 32]`, of blocks of 32 for elements up to `format.largest`."""
    return _EXPONENT[format.arithmetic](amax(blocks(w, _BLOCK)), format.largest, w.dtype).astype(jnp.uint8)


def near_exponents(inner: Any) -> jax.Array:
    """E8M0 exponents, one less and one more, uint8 `[..., 3]`; what lies beyond the numbers stays."""
    e = jnp.asarray(inner).astype(jnp.int32)[..., None]
    near = jnp.concatenate([e, e - 1, e + 1], -1)
    return jnp.where((e > 0) & (near > 0) & (near < 254), near, e).astype(jnp.uint8)


def moved_exponents(inner: Any, factor: jax.Array) -> jax.Array:
    """The E8M0 exponents nearest to those given times `factor`, on a logarithmic scale."""
    e = jnp.asarray(inner).astype(jnp.int32)
    moved = jnp.clip(e + rne(jnp.log2(factor)).astype(jnp.int32), 1, 253)
    return jnp.where(e > 0, moved, e).astype(jnp.uint8)


@dataclasses.dataclass(frozen=True)
class MXFP8(Format):
    """MXFP8. Scales: "inner" uint8 `[..., in / 32]`, the exponent + 127."""

    name = "mxfp8"
    bits = 8
    largest = 448.0

    @property
    def block_columns(self) -> int:
        return _BLOCK

    def check(self, shape: tuple[int, ...]) -> str | None:
        return indivisible(shape, _BLOCK)

    def fit(self, w: jax.Array, outer: Array | None = None) -> dict[str, jax.Array]:
        return {"inner": fit_exponents(w, self)}

    def round(self, w: jax.Array, scales: dict[str, jax.Array]) -> jax.Array:
        y = blocks(w.astype(jnp.float32), _BLOCK) * inverse_power(scales["inner"])[..., None]
        return e4m3(y).reshape(w.shape)

    def value(self, codes: jax.Array, scales: dict[str, jax.Array]) -> jax.Array:
        x = blocks(codes, _BLOCK).astype(jnp.float32)
        return (x * power(scales["inner"])[..., None]).reshape(codes.shape)

    def step(self, scales: dict[str, Any]) -> jax.Array:
        return power(jnp.asarray(scales["inner"]))

    def element(self, y: jax.Array, zero: jax.Array | None = None) -> jax.Array:
        return e4m3(y).astype(jnp.float32)

    def rescaled(self, scales: dict[str, Any], factor: jax.Array) -> jax.Array:
        return moved_exponents(scales["inner"], factor)

    def around(self, scales: dict[str, Any], factors: jax.Array) -> jax.Array:
        return near_exponents(scales["inner"])

    def factored(
        self, codes: jax.Array, scales: dict[str, jax.Array], dtype: Any
    ) -> tuple[jax.Array, jax.Array | None]:
        return self.value(codes, scales).astype(jnp.bfloat16), None


FORMAT = MXFP8
