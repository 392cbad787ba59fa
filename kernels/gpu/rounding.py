"""Scales and codes of each number format as threads compute them: bit for bit those of `Format.encode`."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax

from mojax.formats.base import Format
from mojax.kernels.gpu.lanes import Lanes, bits, real
from mojax.kernels.quantize import BELOW, CODES, TRIED

_NAN = 0x7FC00000  # the one that XLA makes; larger patterns would overflow the arithmetic on exponents


class Fit(NamedTuple):
    """The scale of a thread's values.

    Attributes:
      stored: its bits as it rests in memory, uint32 `[128]`; None where nothing rests.
      step: what values are divided by, or multiplied with, float32 `[128]`.
    """

    stored: Any
    step: jax.Array


class Rule(NamedTuple):
    """How one format rounds.

    Attributes:
      block: entries that share a scale; 0: a row; None: all.
      scale: dtype of the scales as they rest; None where there are none.
      fit: `(lanes, top, outer, values)` to the scale, for the largest magnitude `top`; what a format does not
        need may be None.
      words: `(lanes, values, step)` to the packed codes, uint32.
    """

    block: int | None
    scale: Any
    fit: Callable[[Lanes, Any, Any, Any], Fit]
    words: Callable[[Lanes, Sequence[jax.Array], jax.Array], list[jax.Array]]


TOPS = Rule(
    16, jnp.float32, lambda lanes, top, outer, values: Fit(bits(top), top), lambda lanes, xs, step: []
)


def rule(format: Format, dtype: Any, sweep: bool = False) -> Rule | None:
    """How `format` rounds values of `dtype`; None where no kernel can."""
    working = format.working(dtype)
    name, per = format.name, getattr(format, "per", None)
    if name == "nvfp4":
        inner, step = partial(_INNER[format.arithmetic], dtype=dtype), _STEP[format.arithmetic]
        fit = partial(_fit_swept if sweep else _fit_nvfp4, inner=inner, step=step)
        return Rule(16, jnp.float8_e4m3fn, fit, _nvfp4_words)
    if name in ("mxfp4", "mxfp8"):
        fit = partial(_fit_exponent, near=format.arithmetic == "checkpoint", largest=format.largest)
        words = _mxfp8_words
        if name == "mxfp4":
            words = partial(_mxfp4_words, down=format.arithmetic == "float32", coarse=dtype == jnp.bfloat16)
        return Rule(32, jnp.uint8, fit, words)
    if per == "tensor" and name == "fp8":
        return Rule(None, None, _fit_given, partial(_fp8_words, dtype=dtype))
    linear = {
        ("fp8", "token"): (0, 448.0, 448.0, _fp8_words),
        ("fp8", "channel"): (0, 448.0, 448.0, _fp8_words),
        ("int8", "token"): (0, 127.5, 127.0, _int8_words),
        ("int8", "channel"): (0, 127.5, 127.0, _int8_words),
        ("int4", None): (getattr(format, "group", 0), 7.5, 7.0, _int4_words),
    }.get((name, per))
    if linear is None or not getattr(format, "symmetric", True) or linear[0] > 512:
        return None
    block, checkpoint, float32, words = linear
    levels = checkpoint if format.arithmetic == "checkpoint" else float32
    fit = partial(_fit_linear, levels=levels, dtype=working, empty=format.empty(dtype))
    return Rule(block, working, fit, partial(words, dtype=working))


def among(lanes: Lanes, x: jax.Array, share: int) -> jax.Array:
    """The maximum over each `share` neighbouring threads of a warp, a power of two, in each of them."""
    distance = 1
    while distance < share:
        x = jnp.maximum(x, lanes.partner(x, distance))
        distance *= 2
    return x


def rotate(lanes: Lanes, run: Sequence[jax.Array], size: int, dtype: Any) -> list[jax.Array]:
    """Neighbouring values times the orthonormal Hadamard matrix of `size`, rounded to `dtype`.

    Sums and differences at growing distances: in a thread's 16 values, then between threads.
    """
    xs = list(run)
    for half in (1, 2, 4, 8):
        for i in (i for i in range(16) if not i & half):
            xs[i], xs[i + half] = lanes.add(xs[i], xs[i + half]), lanes.add(xs[i], -xs[i + half])
    for distance in (1, 2, 4)[: (size // 16).bit_length() - 1]:
        upper = (lanes.index() & jnp.int32(distance)) != jnp.int32(0)
        sign = jnp.where(upper, jnp.float32(-1), jnp.float32(1))
        xs = [lanes.add(lanes.multiply(x, sign), lanes.partner(x, distance)) for x in xs]
    return lanes.narrow([lanes.multiply(x, lanes.full(size**-0.5)) for x in xs], dtype)


def e4m3(lanes: Lanes, a: jax.Array) -> tuple[jax.Array, jax.Array]:
    """E4M3 code (uint32) and value of `a >= 0`, half to even, saturating; NaN stays.

    Adding a power of two whose last bit weighs as much as the code's leaves the code in the last bits.
    """
    nan = a != a
    a = jnp.minimum(a, jnp.float32(448))
    power = jnp.maximum(real(bits(a) & jnp.uint32(0x7F800000)), jnp.float32(2.0**-6)) * jnp.float32(2.0**20)
    total = lanes.add(a, power)
    code = (bits(total) & jnp.uint32(31)) + (bits(total) >> 20) - jnp.uint32((127 - 6 + 20) << 3)
    return jnp.where(nan, jnp.uint32(127), code), jnp.where(nan, a, lanes.add(total, -power))


def from_e4m3(code: jax.Array) -> jax.Array:
    """float32 of E4M3 codes (uint32) from 0 to 127."""
    small = code.astype(jnp.float32) * jnp.float32(2.0**-9)
    value = jnp.where(code < jnp.uint32(8), small, real((code << 20) + jnp.uint32(120 << 23)))
    return jnp.where(code == jnp.uint32(127), jnp.float32(math.nan), value)


def e2m1(a: jax.Array, negative: jax.Array) -> tuple[jax.Array, jax.Array]:
    """E2M1 code in the last 4 bits (uint32), and value, of `a` from 0 to 6.5, half to even.

    As in `e4m3`; what is added to the power of two, 2 for each exponent and 8 for a sign, lands in the code.
    0.65 p - 0.5 rounds to log2 p for p = 1, 2, 4.
    """
    power = jnp.maximum(real(bits(a) & jnp.uint32(0x7F800000)), jnp.float32(1))
    base = jnp.where(negative, jnp.float32(2.0**22 + 3.5), jnp.float32(2.0**22 - 0.5))
    shift = power * (power * jnp.float32(0.65) + base)
    total = shift + a
    return bits(total), total - shift


def packed(codes: Sequence[jax.Array], size: int) -> list[jax.Array]:
    """The last `size` bits of uint32 codes in words, the first in the lowest bits.

    4-bit codes have zeros in bits 4 to 22, so nothing else of them remains beyond the third.
    """
    mask, words = jnp.uint32(2**size - 1), []
    for start in range(0, len(codes), 32 // size):
        word = codes[start] & mask
        for i, code in enumerate(codes[start + 1 : start + 32 // size], 1):
            word = word + ((code if size == 4 and i > 2 else code & mask) << (size * i))
        words.append(word)
    return words


def _inner_float32(lanes: Lanes, top: jax.Array, outer: jax.Array, dtype: Any) -> jax.Array:
    p = lanes.divide(top, outer * jnp.float32(6))
    return jnp.maximum(jnp.where(p == jnp.float32(0), jnp.float32(1), p), jnp.float32(2.0**-9))


def _inner_checkpoint(lanes: Lanes, top: jax.Array, outer: jax.Array, dtype: Any) -> jax.Array:
    (sixth,) = lanes.narrow([lanes.divide(top, lanes.full(6))], dtype)
    s = lanes.multiply(outer, sixth)
    return jnp.where(s <= jnp.float32(2.0**-10), jnp.float32(0.125), s)


_INNER = {"float32": _inner_float32, "checkpoint": _inner_checkpoint}
_STEP = {
    "float32": lambda lanes, s, outer: lanes.multiply(s, outer),
    "checkpoint": lambda lanes, s, outer: lanes.divide(s, outer),
}


def _fit_nvfp4(lanes: Lanes, top: jax.Array, outer: jax.Array, values: Any, inner: Any, step: Any) -> Fit:
    code, value = e4m3(lanes, inner(lanes, top, outer))
    return Fit(code, step(lanes, value, outer))


def _fit_swept(
    lanes: Lanes, top: jax.Array, outer: jax.Array, values: Sequence[jax.Array], inner: Any, step: Any
) -> Fit:
    """The scale code with the least squared error of those around the plain one."""
    plain = e4m3(lanes, inner(lanes, top, outer))[0].astype(jnp.int32)
    sixth = lanes.divide(top, step(lanes, lanes.full(1), outer) * jnp.float32(6))
    first = jnp.maximum(e4m3(lanes, sixth)[0].astype(jnp.int32) - jnp.int32(BELOW), jnp.int32(1))
    unit = jnp.where(top == jnp.float32(0), jnp.float32(1), top)
    inverse = lanes.divide(lanes.full(1), unit)

    def error(code: jax.Array) -> jax.Array:
        s = step(lanes, from_e4m3(code.astype(jnp.uint32)), outer)
        squares = []
        for q, x in zip(lanes.quotients(values, s)[0], values, strict=True):
            value = lanes.multiply(e2m1(lanes.at_most(q, 6.5), q < jnp.float32(0))[1], s)
            e = lanes.multiply(lanes.add(value, -jnp.abs(x)), inverse)
            squares.append(lanes.multiply(e, e))
        while len(squares) > 1:
            half = len(squares) // 2
            squares = [lanes.add(a, b) for a, b in zip(squares[:half], squares[half:], strict=True)]
        return squares[0]

    def consider(i: Any, best: tuple[jax.Array, jax.Array]) -> tuple[jax.Array, jax.Array]:
        least, found = best
        code = jnp.minimum(first + i, jnp.int32(CODES))
        e = error(code)
        return jnp.where(e < least, e, least), jnp.where(e < least, code, found)

    _, found = lax.fori_loop(0, TRIED, consider, (error(plain), plain))
    code = found.astype(jnp.uint32)
    return Fit(code, step(lanes, from_e4m3(code), outer))


def _nvfp4_words(lanes: Lanes, xs: Sequence[jax.Array], step: jax.Array) -> list[jax.Array]:
    pairs = zip(*lanes.quotients(xs, step), strict=True)
    codes = [e2m1(lanes.at_most(q, 6.5), y < jnp.float32(0))[0] for q, y in pairs]
    finite = step < jnp.float32(math.inf)  # else every code is 0
    return [jnp.where(finite, word, jnp.uint32(0)) for word in packed(codes, 4)]


def _fit_exponent(lanes: Lanes, top: jax.Array, outer: None, values: Any, near: bool, largest: float) -> Fit:
    if near:
        e = (_whole(top) + jnp.int32(1 << 21)) >> 23  # one more from mantissa 1.75 on
        e = jnp.maximum(e - jnp.int32(math.floor(math.log2(largest))), jnp.int32(0))
    else:
        top = lanes.divide(top, lanes.full(largest))
        e = (_whole(top) + jnp.int32((1 << 23) - 1)) >> 23
    step = lax.bitcast_convert_type((jnp.int32(254) - e) << 23, jnp.float32)
    return Fit(e.astype(jnp.uint32), step)


def _whole(top: jax.Array) -> jax.Array:
    return jnp.minimum(lax.bitcast_convert_type(top, jnp.int32), jnp.int32(_NAN))


def _mxfp4_words(
    lanes: Lanes, xs: Sequence[jax.Array], step: jax.Array, down: bool, coarse: bool
) -> list[jax.Array]:
    """`down`: ties go toward zero; `coarse`: of bfloat16, so that a part in 2^20 less breaks ties only."""
    codes = []
    for x in xs:
        y = lanes.multiply(x, step)
        a = jnp.where(y != y, jnp.float32(0), lanes.at_most(y, 6.5))
        negative = ~(y > jnp.float32(0)) if down else y < jnp.float32(0)
        if down and coarse:
            a = lanes.multiply(a, lanes.full(1 - 2.0**-20))
        code, value = e2m1(a, negative)
        if down and not coarse:
            power = jnp.maximum(real(bits(a) & jnp.uint32(0x7F800000)), jnp.float32(1))
            tied = lanes.add(value, -a) == power * jnp.float32(0.25)
            code = code - jnp.where(tied, jnp.uint32(1), jnp.uint32(0))
        codes.append(code)
    return packed(codes, 4)


def _mxfp8_words(lanes: Lanes, xs: Sequence[jax.Array], step: jax.Array) -> list[jax.Array]:
    return _e4m3_words(lanes, [lanes.multiply(x, step) for x in xs])


def _e4m3_words(lanes: Lanes, ys: Sequence[jax.Array]) -> list[jax.Array]:
    return [lanes.e4m3(ys[i : i + 4]) for i in range(0, len(ys), 4)]


def _fit_given(lanes: Lanes, top: Any, outer: jax.Array, values: Any) -> Fit:
    return Fit(None, outer)


def _fit_linear(
    lanes: Lanes, top: jax.Array, outer: None, values: Any, levels: float, dtype: Any, empty: float
) -> Fit:
    (s,) = lanes.narrow([lanes.divide(top, lanes.full(levels))], dtype)
    s = jnp.where(s == jnp.float32(0), jnp.float32(empty), s)
    return Fit(bits(s) >> 16 if dtype == jnp.bfloat16 else bits(s), s)


def _quotients(lanes: Lanes, xs: Sequence[jax.Array], step: jax.Array, dtype: Any) -> list[jax.Array]:
    """`x / step` rounded to `dtype`; the sign of 0 is kept."""
    ys = []
    for q, y in zip(*lanes.quotients(xs, step), strict=True):
        q = jnp.where(jnp.abs(y) < jnp.float32(math.inf), q, y)
        sign = jnp.uint32(1 << 31)
        ys.append(real((bits(y) & sign) | (bits(q) & ~sign)))
    return lanes.narrow(ys, dtype)


def _fp8_words(lanes: Lanes, xs: Sequence[jax.Array], step: jax.Array, dtype: Any) -> list[jax.Array]:
    return _e4m3_words(lanes, _quotients(lanes, xs, step, dtype))


def _int8_words(lanes: Lanes, xs: Sequence[jax.Array], step: jax.Array, dtype: Any) -> list[jax.Array]:
    return packed([lanes.integer(y).astype(jnp.uint32) for y in _quotients(lanes, xs, step, dtype)], 8)


def _int4_words(lanes: Lanes, xs: Sequence[jax.Array], step: jax.Array, dtype: Any) -> list[jax.Array]:
    codes = [lanes.integer(y) for y in _quotients(lanes, xs, step, dtype)]
    codes = [jnp.maximum(jnp.minimum(c, jnp.int32(7)), jnp.int32(-8)) for c in codes]
    return packed([c.astype(jnp.uint32) & jnp.uint32(15) for c in codes], 4)
