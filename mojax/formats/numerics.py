"""Roundings that formats share, written so that XLA computes what IEEE arithmetic says, jitted or not.

XLA rewrites `x / broadcast(s)` to `x * (1 / s)`, keeps bfloat16 intermediates in float32, and flushes
subnormals. `divide` and `narrow` are what to write instead. E2M1, E4M3 and E8M0 are defined in the OCP
Microscaling Formats specification 1.0, section 5.
"""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

EVEN = (0.75, 1.75, 3.5)  # E2M1 ties that go up when ties go to the even code
_E2M1_TIES = (0.25, 0.75, 1.25, 1.75, 2.5, 3.5, 5.0)
_E4M3_MAX = 448.0
_E4M3_TINY = 2.0**-6  # smallest normal number
_E4M3_STEP = 2.0**-9  # smallest number


def divide(x: jax.Array, s: Any) -> jax.Array:
    """`x / s` rounded once, in float32; `s` broadcasts to `x`.

    The divisor is a select on `x`, so XLA sees no broadcast that it could replace by a reciprocal; it still
    fuses, which an optimization barrier would prevent.
    """
    return x / jnp.where(jnp.isnan(x), x, jnp.asarray(s, jnp.float32))


def rne(x: jax.Array) -> jax.Array:
    """Round to the nearest integer, half to even."""
    return lax.round(x, lax.RoundingMethod.TO_NEAREST_EVEN)


def narrow(x: jax.Array, dtype: np.dtype) -> jax.Array:
    """float32 `x` rounded to the values of bfloat16, float16 or float32, still as float32."""
    info = jnp.finfo(dtype)
    if info.bits >= 32:
        return x
    y = lax.reduce_precision(x, info.nexp, info.nmant)
    if info.nexp == 8:
        return y
    step = float(info.smallest_subnormal)  # reduce_precision flushes subnormals
    return jnp.where(jnp.abs(x) < float(info.tiny), rne(x * (1 / step)) * step, y)


def e4m3(x: jax.Array) -> jax.Array:
    """float32 to float8_e4m3fn, half to even, saturating at 448; the sign of zero is kept.

    Rounded in float32 first, so that no compiler can drop a rounding by cancelling a pair of casts.
    """
    x = jnp.clip(x, -_E4M3_MAX, _E4M3_MAX)
    small = rne(x * (1 / _E4M3_STEP)) * _E4M3_STEP
    y = jnp.where(jnp.abs(x) < _E4M3_TINY, small, lax.reduce_precision(x, 8, 3))
    return y.astype(jnp.float8_e4m3fn)


def e2m1(x: jax.Array, negative: jax.Array, up: tuple[float, ...] = EVEN) -> jax.Array:
    """E2M1 codes (uint8, `sign << 3 | index`) of float32 `x`, saturating at 6; NaN gives index 0.

    Args:
      negative: where to set the sign bit.
      up: the ties that go away from zero; the others go toward zero.
    """
    a = jnp.abs(x)
    code = jnp.where(negative, jnp.uint8(8), jnp.uint8(0))
    for tie in _E2M1_TIES:
        code = code + ((a >= tie) if tie in up else (a > tie)).astype(jnp.uint8)
    return code


def e2m1_near(x: jax.Array, negative: jax.Array) -> jax.Array:
    """`e2m1_value(e2m1(x, negative))` of the even ties, without the codes."""
    a = jnp.abs(x)
    up = jnp.where(a < 2, 2.0, jnp.where(a < 4, 1.0, 0.5))
    y = jnp.minimum(rne(a * up) / up, 6.0)
    y = jnp.where(jnp.isnan(x), 0.0, y)
    return jnp.where(negative, -y, y)


def e2m1_value(code: jax.Array) -> jax.Array:
    """float32 of E2M1 codes: 0, 0.5, and from index 2 on the exponent and mantissa of a float."""
    index = (code & 7).astype(jnp.int32)
    normal = lax.bitcast_convert_type((index << 22) + (126 << 23), jnp.float32)
    value = jnp.where(index < 2, index.astype(jnp.float32) * 0.5, normal)
    return jnp.where(code >= 8, -value, value)


def pack(code: jax.Array) -> jax.Array:
    """uint8 `[..., n]` of 4-bit codes to uint8 `[..., n / 2]`, low nibble first."""
    return code[..., 0::2] | (code[..., 1::2] << 4)


def unpack(byte: jax.Array) -> jax.Array:
    """uint8 `[..., n / 2]` to 4-bit codes, uint8 `[..., n]`."""
    return jnp.stack([byte & 15, byte >> 4], axis=-1).reshape(*byte.shape[:-1], -1)


def blocks(x: jax.Array, size: int) -> jax.Array:
    """`[..., n]` to `[..., n / size, size]`."""
    return x.reshape(*x.shape[:-1], -1, size)


def blocks_under(codes: jax.Array, scale: jax.Array) -> jax.Array:
    """`[..., n]` to `[..., n / size, size]`, with as many blocks as the last axis of `scale` is long."""
    return codes.reshape(*codes.shape[:-1], scale.shape[-1], -1)


def amax(x: jax.Array, axis: int | tuple[int, ...] | None = -1, keepdims: bool = False) -> jax.Array:
    """The largest magnitude, float32."""
    return jnp.max(jnp.abs(x.astype(jnp.float32)), axis=axis, keepdims=keepdims)


def linear_scale(top: jax.Array, levels: float, working: np.dtype, empty: float) -> jax.Array:
    """`top / levels` rounded to the `working` dtype, float32; `empty` where that is 0."""
    s = narrow(divide(top, levels), working)
    return jnp.where(s == 0, jnp.float32(empty), s)


def exponent(x: jax.Array, threshold: float) -> jax.Array:
    """`floor(log2 x) + 127`, one more from mantissa `threshold` on (in (1, 2]; 1 + 2^-23 is ceil), int32.

    0 gives 0. From the bits, because log2 is not exact next to powers of two.
    """
    bits = lax.bitcast_convert_type(x, jnp.int32)
    return (bits + round((2 - threshold) * 2**23)) >> 23


def power(e8m0: jax.Array) -> jax.Array:
    """`2^(e - 127)`, float32; `e = 0` gives 0, since float32 here has no subnormals."""
    return lax.bitcast_convert_type(e8m0.astype(jnp.int32) << 23, jnp.float32)


def inverse_power(e8m0: jax.Array) -> jax.Array:
    """`2^(127 - e)`, float32, for `e` up to 253."""
    return lax.bitcast_convert_type((254 - e8m0.astype(jnp.int32)) << 23, jnp.float32)


def indivisible(shape: tuple[int, ...], size: int) -> str | None:
    """Why the last axis of `shape` cannot be cut into pieces of `size`, or None."""
    if not shape or shape[-1] % size or not shape[-1]:
        return f"last axis {shape[-1] if shape else 'missing'} is not divisible by {size}"
    return None
