"""NVFP4: E2M1 elements in blocks of 16, an E4M3 scale per block and a float32 scale per tensor.

  "float32"     w ~ e2m1 * (s * s2),  s2 = amax / (6 * 448),  s = e4m3(amax_block / (6 * s2)) >= 2^-9
  "checkpoint"  w ~ e2m1 * (s / g),   g = 6 * 448 / amax,     s = e4m3(g * (amax_block / 6))

with `g` and `amax_block / 6` rounded to the dtype of the checkpoint. "outer" is `s2` or `g`. Ties go to the
even code. Linears that a server fuses share "outer", so its maximum is over all of them. NVIDIA's format
(arXiv 2509.25149); the rules are ModelOpt's ("float32") and compressed-tensors' ("checkpoint").
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np

from mojax.formats.base import Array, Format
from mojax.formats.numerics import (
    amax,
    blocks,
    blocks_under,
    divide,
    e2m1,
    e2m1_near,
    e2m1_value,
    e4m3,
    indivisible,
    narrow,
)

_BLOCK = 16
_RANGE = 6 * 448.0  # of an element times that of a block scale
_SMALLEST = 2.0**-9  # of E4M3
_POSITIVE = np.arange(1, 127, dtype=np.uint8).view(ml_dtypes.float8_e4m3fn).astype(np.float32)


class _Rule(NamedTuple):
    """How one arithmetic makes the two scales, and the step that both stand for."""

    outer: Callable[[jax.Array, np.dtype], jax.Array]  # largest magnitude of the tensor, dtype
    inner: Callable[[jax.Array, jax.Array, np.dtype], jax.Array]  # of the block, outer, dtype; before E4M3
    step: Callable[[jax.Array, jax.Array], jax.Array]  # inner, outer


def _multiplier(top: jax.Array, dtype: np.dtype) -> jax.Array:
    s2 = divide(top, _RANGE)
    return jnp.where(s2 == 0, jnp.float32(6 / _RANGE), s2)


def _divisor(top: jax.Array, dtype: np.dtype) -> jax.Array:
    least = jnp.maximum(top, float(jnp.finfo(dtype).tiny))
    g = narrow(narrow(divide(jnp.ones_like(least), least), dtype) * _RANGE, dtype)
    # float16 overflows already at amax = 0.04, where compressed-tensors falls back to 1 and loses the block
    # scales' precision: float32 holds the quotient. 1 remains for a tensor of zeros.
    wide = divide(jnp.full_like(top, _RANGE), top)
    return jnp.where(jnp.isfinite(g), g, jnp.where(jnp.isfinite(wide), wide, jnp.float32(1)))


def _inner_multiplier(top: jax.Array, s2: jax.Array, dtype: np.dtype) -> jax.Array:
    p = divide(top, 6 * s2)
    return jnp.maximum(jnp.where(p == 0, jnp.float32(1), p), _SMALLEST)


def _inner_divisor(top: jax.Array, g: jax.Array, dtype: np.dtype) -> jax.Array:
    s = g * narrow(divide(top, 6.0), dtype)
    return jnp.where(s <= _SMALLEST / 2, jnp.float32(0.125), s)  # what E4M3 rounds to 0


_RULES = {
    "checkpoint": _Rule(_divisor, _inner_divisor, divide),
    "float32": _Rule(_multiplier, _inner_multiplier, lambda s, s2: s * s2),
}


@dataclasses.dataclass(frozen=True)
class NVFP4(Format):
    """NVFP4. Scales: "inner" float8_e4m3fn `[..., in / 16]`, "outer" float32 `[]`."""

    name = "nvfp4"
    bits = 4
    largest = 6.0

    @property
    def static(self) -> bool:
        return True

    @property
    def fused(self) -> bool:
        return True

    @property
    def block_columns(self) -> int:
        return _BLOCK

    def check(self, shape: tuple[int, ...]) -> str | None:
        return indivisible(shape, _BLOCK)

    def fit_outer(self, top: jax.Array, dtype: np.dtype) -> jax.Array:
        return _RULES[self.arithmetic].outer(top, self.rounded_to(dtype))

    def fit(self, w: jax.Array, outer: Array | None = None) -> dict[str, jax.Array]:
        top = amax(blocks(w, _BLOCK))
        scale = self.own_outer(jnp.max(top), w.dtype, outer)
        return {"inner": e4m3(_RULES[self.arithmetic].inner(top, scale, w.dtype)), "outer": scale}

    def round(self, w: jax.Array, scales: dict[str, jax.Array]) -> jax.Array:
        y = divide(blocks(w.astype(jnp.float32), _BLOCK), self.step(scales)[..., None])
        return e2m1(y, y < 0).reshape(w.shape)

    def value(self, codes: jax.Array, scales: dict[str, jax.Array]) -> jax.Array:
        return (e2m1_value(blocks(codes, _BLOCK)) * self.step(scales)[..., None]).reshape(codes.shape)

    def factored(
        self, codes: jax.Array, scales: dict[str, jax.Array], dtype: Any
    ) -> tuple[jax.Array, jax.Array | None]:
        inner = scales["inner"].astype(jnp.float32)
        w = e2m1_value(blocks_under(codes, inner)) * inner[..., None]
        outer = jnp.asarray(scales["outer"], jnp.float32).reshape(())
        after = _RULES[self.arithmetic].step(jnp.ones_like(outer), outer)
        return w.reshape(codes.shape).astype(jnp.bfloat16), after  # 2 by 4 bits of mantissa: exact

    def step(self, scales: dict[str, Any]) -> jax.Array:
        inner = jnp.asarray(scales["inner"]).astype(jnp.float32)
        outer = jnp.asarray(scales["outer"], jnp.float32).reshape(())
        return _RULES[self.arithmetic].step(inner, outer)

    def element(self, y: jax.Array, zero: jax.Array | None = None) -> jax.Array:
        return e2m1_near(y, y < 0)

    def rescaled(self, scales: dict[str, Any], factor: jax.Array) -> jax.Array:
        inner = jnp.asarray(scales["inner"]).astype(jnp.float32) * factor
        return e4m3(jnp.maximum(inner, _SMALLEST))

    def around(self, scales: dict[str, Any], factors: jax.Array) -> jax.Array:
        low, high, count = factors[1], factors[-1], len(factors)
        inner = jnp.asarray(scales["inner"])[..., None]
        now = inner.astype(jnp.float32)
        known = jnp.asarray(_POSITIVE)
        first = jnp.searchsorted(known, low * now, side="left")
        found = jnp.searchsorted(known, high * now, side="right") - first
        most = count - 1
        apart = jnp.maximum(found - 1, most - 1)  # more than fit in `count` are taken evenly
        ranks = jnp.arange(most).reshape((1,) * (now.ndim - 1) + (-1,)) * apart // (most - 1)
        chosen = e4m3(known[jnp.minimum(first + ranks, len(_POSITIVE) - 1)])
        return jnp.concatenate([inner, jnp.where(ranks < found, chosen, inner)], -1)


FORMAT = NVFP4
