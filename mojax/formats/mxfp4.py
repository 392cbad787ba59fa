"""MXFP4: E2M1 elements in blocks of 32 with a power of two (E8M0) per block.

  w ~ e2m1 * 2^(e - 127)
  "checkpoint"  e - 127 = floor(log2 amax) - 2, one more from mantissa 1.75 on; ties to the even code
  "float32"     e - 127 = ceil(log2(amax / 6));  ties toward zero; zeros carry a sign bit

OCP Microscaling Formats 1.0, section 6; the rules are compressed-tensors' ("checkpoint") and ModelOpt's
("float32").
"""

from __future__ import annotations

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp

from mojax.formats.base import Array, Format
from mojax.formats.mxfp8 import fit_exponents, moved_exponents, near_exponents
from mojax.formats.numerics import (
    EVEN,
    blocks,
    blocks_under,
    e2m1,
    e2m1_near,
    e2m1_value,
    indivisible,
    inverse_power,
    power,
)

_BLOCK = 32
_TIES_UP = {"checkpoint": EVEN, "float32": ()}
_NEGATIVE = {"checkpoint": lambda y: y < 0, "float32": lambda y: ~(y > 0)}


@dataclasses.dataclass(frozen=True)
class MXFP4(Format):
    """MXFP4. Scales: "inner" uint8 `[..., in / 32]`, the exponent + 127."""

    name = "mxfp4"
    bits = 4
    largest = 6.0

    @property
    def block_columns(self) -> int:
        return _BLOCK

    def check(self, shape: tuple[int, ...]) -> str | None:
        return indivisible(shape, _BLOCK)

    def fit(self, w: jax.Array, outer: Array | None = None) -> dict[str, jax.Array]:
        return {"inner": fit_exponents(w, self)}

    def round(self, w: jax.Array, scales: dict[str, jax.Array]) -> jax.Array:
        y = blocks(w.astype(jnp.float32), _BLOCK) * inverse_power(scales["inner"])[..., None]
        return e2m1(y, _NEGATIVE[self.arithmetic](y), _TIES_UP[self.arithmetic]).reshape(w.shape)

    def value(self, codes: jax.Array, scales: dict[str, jax.Array]) -> jax.Array:
        scale = power(scales["inner"])
        return (e2m1_value(blocks_under(codes, scale)) * scale[..., None]).reshape(codes.shape)

    def step(self, scales: dict[str, Any]) -> jax.Array:
        return power(jnp.asarray(scales["inner"]))

    def element(self, y: jax.Array, zero: jax.Array | None = None) -> jax.Array:
        negative, ties = _NEGATIVE[self.arithmetic](y), _TIES_UP[self.arithmetic]
        return e2m1_near(y, negative) if ties == EVEN else e2m1_value(e2m1(y, negative, ties))

    def rescaled(self, scales: dict[str, Any], factor: jax.Array) -> jax.Array:
        return moved_exponents(scales["inner"], factor)

    def around(self, scales: dict[str, Any], factors: jax.Array) -> jax.Array:
        return near_exponents(scales["inner"])

    def factored(
        self, codes: jax.Array, scales: dict[str, jax.Array], dtype: Any
    ) -> tuple[jax.Array, jax.Array | None]:
        return self.value(codes, scales).astype(jnp.bfloat16), None


FORMAT = MXFP4
