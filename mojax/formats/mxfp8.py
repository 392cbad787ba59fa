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
from mojax.formats.numerics import amax, blocks, divide, e4m3, exponent, indivisible, inverse_power, power

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


@dataclasses.dataclass(frozen=True)
class MXFP8(Format):
    """MXFP8. Scales: "inner" uint8 `[..., in / 32]`, the exponent + 127."""

    name = "mxfp8"
    bits = 8
    largest = 448.0

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

    def factored(
        self, codes: jax.Array, scales: dict[str, jax.Array], dtype: Any
    ) -> tuple[jax.Array, jax.Array | None]:
        return self.value(codes, scales).astype(jnp.bfloat16), None


FORMAT = MXFP8
