"""INT4: 4-bit integers in groups along the input axis, with a scale and, if asymmetric, a zero point.

  symmetric   w ~ q * s,        s = amax / 7.5 ("checkpoint") or amax / 7 ("float32"),  q = round(w / s)
  asymmetric  w ~ (q - z) * s,  s = (max - min) / 15,  z = round(-8 - min / s),  q = round(w / s + z)

`q` and `z` lie in [-8, 7]; max and min include 0. "checkpoint" rounds every intermediate to the dtype of the
checkpoint (compressed-tensors); "float32" is ModelOpt's rule.
"""

from __future__ import annotations

import dataclasses

import jax
import jax.numpy as jnp

from mojax.errors import InputError
from mojax.formats.base import Array, Format
from mojax.formats.numerics import amax, blocks, blocks_under, divide, indivisible, linear_scale, narrow, rne

_LEVELS = {"checkpoint": 7.5, "float32": 7.0}


@dataclasses.dataclass(frozen=True)
class INT4(Format):
    """INT4. Scales: "inner" `[..., in / group]`, asymmetric also "zero" int8 of that shape.

    Codes are two's complement nibbles.
    """

    group: int = 128
    symmetric: bool = True

    name = "int4"
    bits = 4
    largest = 7.0

    def __post_init__(self) -> None:
        if not isinstance(self.group, int) or self.group < 2 or self.group % 2:
            raise InputError(f"int4 group: {self.group!r} is not a positive even number; 128 is usual")
        if not isinstance(self.symmetric, bool):
            raise InputError(f"int4 symmetric: {self.symmetric!r} is neither true nor false")

    @property
    def block_columns(self) -> int:
        return self.group

    def check(self, shape: tuple[int, ...]) -> str | None:
        return indivisible(shape, self.group)

    def fit(self, w: jax.Array, outer: Array | None = None) -> dict[str, jax.Array]:
        working = self.working(w.dtype)
        x = blocks(w, self.group)
        if self.symmetric:
            s = linear_scale(amax(x), _LEVELS[self.arithmetic], working, self.empty(w.dtype))
            return {"inner": s.astype(working)}
        x = x.astype(jnp.float32)
        low, high = jnp.minimum(jnp.min(x, -1), 0), jnp.maximum(jnp.max(x, -1), 0)
        s = narrow(divide(narrow(high - low, working), 15.0), working)
        z = rne(jnp.clip(narrow(-8 - narrow(divide(low, s), working), working), -8, 7))
        s = jnp.where(s == 0, jnp.float32(self.empty(w.dtype)), s)
        zero = jnp.where(jnp.isnan(z), jnp.float32(0), z)  # a group of zeros: 0 / 0
        return {"inner": s.astype(working), "zero": zero.astype(jnp.int8)}

    def round(self, w: jax.Array, scales: dict[str, jax.Array]) -> jax.Array:
        working = self.working(w.dtype)
        y = narrow(divide(blocks(w.astype(jnp.float32), self.group), _column(scales["inner"])), working)
        if not self.symmetric:
            y = narrow(y + _column(scales["zero"]), working)
        code = rne(jnp.clip(y, -8, 7)).astype(jnp.int8)
        return (code & 15).astype(jnp.uint8).reshape(w.shape)

    def value(self, codes: jax.Array, scales: dict[str, jax.Array]) -> jax.Array:
        q = (blocks_under(codes, scales["inner"]) ^ 8).astype(jnp.float32) - 8
        if not self.symmetric:
            q = q - _column(scales["zero"])
        return (q * _column(scales["inner"])).reshape(codes.shape)

    def element(self, y: jax.Array, zero: jax.Array | None = None) -> jax.Array:
        if zero is None:
            return rne(jnp.clip(y, -8, 7))
        return rne(jnp.clip(y + zero, -8, 7)) - zero


def _column(scale: jax.Array) -> jax.Array:
    return jnp.asarray(scale, jnp.float32)[..., None]


FORMAT = INT4
