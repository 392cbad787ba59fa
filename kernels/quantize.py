"""Values to a QTensor: rounded to nearest, after a rotation and with searched block scales where asked.

The search (arXiv 2606.07618) finds the E4M3 scale of a block of 16 with the least squared error of all 126.
With `top` the largest magnitude, steps from `top / 3` on have a subset of the values that half the step has
below it, so they are no better; under steps below `0.27 top / 6` cutting `top` off costs more than all 16
roundings under `top / 6` do. So 16 codes below that of `top / 6` and 9 above it hold the best.
"""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
from jax import lax

from mojax.errors import InputError
from mojax.formats.base import Array, Format, QTensor
from mojax.formats.numerics import amax, blocks, divide, e4m3, narrow
from mojax.kernels.base import Implementation, dispatch, pallas

HADAMARD = (16, 32, 64, 128)
CODES = 126  # positive E4M3 codes
BELOW, TRIED = 16, 26  # codes below that of a sixth of the maximum, and all, that a sweep tries


def rotate(x: Array, size: int) -> jax.Array:
    """`x [..., K]` times the orthonormal Hadamard matrix (Sylvester's) in blocks of `size`, in its dtype.

    Sums in float32, by sums and differences at distances 1, 2, 4, ...; rounded to the dtype of `x` once.
    """
    x = jnp.asarray(x)
    y = x.astype(jnp.float32)
    half = 1
    while half < size:
        pairs = y.reshape(*x.shape[:-1], -1, 2, half)
        a, b = pairs[..., 0, :], pairs[..., 1, :]
        y = jnp.stack([a + b, a - b], axis=-2)
        half *= 2
    y = y.reshape(x.shape) * jnp.float32(size**-0.5)
    return narrow(y, x.dtype).astype(x.dtype)


def swept(x: Array, format: Format, outer: Array | None = None) -> QTensor:
    """`x [..., K]` in NVFP4 under the block scales of least squared error; plain ones where they have it."""
    x = jnp.asarray(x)
    plain = format.fit(x, outer)
    first = jnp.maximum(_sixth(x, format, plain["outer"]) - BELOW, 1)

    def consider(i: Any, best: tuple[jax.Array, jax.Array]) -> tuple[jax.Array, jax.Array]:
        least, found = best
        code = jnp.minimum(first + i, CODES)
        error = block_errors(x, format, {**plain, "inner": _from_code(code)})
        return jnp.where(error < least, error, least), jnp.where(error < least, code, found)

    start = (block_errors(x, format, plain), _code(plain["inner"]))
    _, found = lax.fori_loop(0, TRIED, consider, start)
    return format.encode_as(x, {**plain, "inner": _from_code(found)})


def _sixth(x: jax.Array, format: Format, outer: jax.Array) -> jax.Array:
    """The E4M3 code, int32 `[..., K / 16]`, of the scale that maps the largest magnitude of a block to 6."""
    ones = {"inner": jnp.ones((1,), jnp.float8_e4m3fn), "outer": outer}
    step = format.value(jnp.full((16,), 2, jnp.uint8), ones)[0]  # code 2 is 1
    return _code(e4m3(divide(amax(blocks(x, 16)), 6 * step)))


def block_errors(x: jax.Array, format: Format, scales: dict[str, Any]) -> jax.Array:
    """The squared errors of blocks of 16, in units of their largest magnitude, float32 `[..., K / 16]`."""
    value = format.decode(format.encode_as(x, scales))
    wide = blocks(x.astype(jnp.float32), 16)
    top = amax(wide, keepdims=True)
    unit = jnp.where(top == 0, jnp.float32(1), top)
    e = (jnp.asarray(value).reshape(wide.shape) - wide) * divide(jnp.ones_like(unit), unit)
    e = e * e
    while e.shape[-1] > 1:
        e = e[..., : e.shape[-1] // 2] + e[..., e.shape[-1] // 2 :]
    return e[..., 0]


def _code(scale: jax.Array) -> jax.Array:
    return lax.bitcast_convert_type(scale, jnp.uint8).astype(jnp.int32)


def _from_code(code: jax.Array) -> jax.Array:
    return lax.bitcast_convert_type(code.astype(jnp.uint8), jnp.float8_e4m3fn)


def _reference(
    x: Array, format: Format, *, outer: Array | None = None, hadamard: int | None = None, sweep: bool = False
) -> QTensor:
    x = jnp.asarray(x)
    if hadamard:
        x = rotate(x, hadamard)
    return swept(x, format, outer) if sweep else format.encode(x, outer)


IMPLEMENTATIONS = (
    pallas("mosaic", (9, 10), "quantize", "quantize"),
    Implementation("xla", (), lambda *_, **__: None, _reference),
)


def quantize(
    x: Array,
    format: Format,
    *,
    outer: Array | None = None,
    hadamard: int | None = None,
    sweep: bool = False,
    implementation: str | None = None,
) -> QTensor:
    """`format.encode(x, outer)`, bit for bit, after a rotation and with searched block scales where asked.

    On a GPU XLA divides less exactly than IEEE arithmetic says: there only "mosaic" gives the bytes of a CPU,
    and it only where `outer` is given.

    Args:
      x: `[..., K]`, bfloat16, float16 or float32. FP8 in groups: `per="token"` of `[..., K / 128, 128]`.
      outer: float32 `[]`, the outer scale of NVFP4 and of formats per tensor; None: found from `x`, in a pass
        of its own.
      hadamard: 16, 32, 64 or 128: the width of blocks along K that are multiplied by the orthonormal Hadamard
        matrix first, and rounded to the dtype of `x`.
      sweep: of NVFP4: the block scales with the least squared error.
      implementation: "mosaic" or "xla"; None: the first that takes the arguments on the default device.
    Raises:
      InputError: the format cannot encode this shape; `hadamard` has no such value, or K is not a multiple;
        `sweep` of another format; x is empty; `implementation` cannot take it.
    """
    x = jnp.asarray(x)
    if not isinstance(format, Format):
        raise InputError(f"quantize: format is {format!r}; needed: one such as mojax.formats.nvfp4.FORMAT()")
    if x.dtype not in (jnp.bfloat16, jnp.float16, jnp.float32):
        raise InputError(f"quantize: x is {x.dtype}; needed: bfloat16, float16 or float32")
    reason = format.check(x.shape) if x.ndim else "a scalar has no axis to run along"
    if reason:
        raise InputError(f"quantize to {format.label}: {reason}; x has shape {x.shape}")
    if hadamard not in (None, *HADAMARD):
        raise InputError(f"quantize: hadamard is {hadamard}; needed: None, {', '.join(map(str, HADAMARD))}")
    if hadamard and x.shape[-1] % hadamard:
        raise InputError(f"quantize: K = {x.shape[-1]} is no multiple of hadamard = {hadamard}")
    if sweep and format.name != "nvfp4":
        raise InputError(f"quantize: sweep is for nvfp4, not {format.label}; leave it out")
    if not x.size:
        raise InputError(f"quantize to {format.label}: x {x.shape} has no values; leave out what is empty")
    options = {"outer": outer, "hadamard": hadamard, "sweep": sweep}
    return dispatch("quantize", IMPLEMENTATIONS, x, format, only=implementation, **options)
