"""Decoding in one pass over the codes: a thread reads the codes of 16 neighbouring values and their scale."""

from __future__ import annotations

import math
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from mojax.formats import leaf
from mojax.formats.base import Format, QTensor
from mojax.kernels.gpu.lanes import THREADS, InterpretedLanes, Lanes, real
from mojax.kernels.gpu.rounding import from_e4m3

_RUN = 16  # values of a thread
_FORMATS = ("nvfp4", "mxfp4", "mxfp8", "fp8", "int8", "int4")
SHAPES = ((8192, 8192), (4096, 14336), (28672, 4096))


class Layout(NamedTuple):
    """Where the scales of run `g` of 16 values lie.

    Attributes:
      runs: runs in a row of the matrix.
      matrix: runs in a matrix.
      share: runs that share an inner scale; 0: blocks of 128 x 128.
      columns: inner scales in a row of blocks.
    """

    runs: int
    matrix: int
    share: int
    columns: int


def layout(q: QTensor) -> Layout | None:
    """Where the scales of a QTensor lie; None where 16 neighbouring values need more than one."""
    plain = not q.batch and not q.contract
    *lead, width = q.shape if plain else leaf.canonical_shape(q.shape, q.contract, q.batch)
    matrix = (math.prod(q.shape) if plain else lead[-1] * width) // _RUN
    runs, inner = width // _RUN, q.scales.get("inner")
    if width % _RUN:
        return None
    if inner is None:
        return Layout(runs, matrix, runs, 1)
    columns = inner.shape[-1]
    if q.format.block_rows > 1:
        return Layout(runs, matrix, 0, columns) if len(lead) == 1 else None
    return None if runs % columns else Layout(runs, matrix, runs // columns, columns)


def why_not(q: QTensor, *, dtype: Any = None) -> str | None:
    """Why `dequantize` cannot take these arguments, or None."""
    dtype = np.dtype(dtype or q.dtype)
    if q.order:
        return f"the codes are in the order {q.order!r} of a kernel"
    if q.format.name not in _FORMATS:
        return f"there is no kernel for {q.format.label}"
    if dtype not in (jnp.bfloat16, jnp.float32):
        return f"dtype {dtype} is neither bfloat16 nor float32"
    if math.prod(q.shape) < THREADS * _RUN:
        return f"{math.prod(q.shape)} values are less than {THREADS * _RUN}"
    if "inner" in q.scales and q.scales["inner"].dtype == jnp.float16:
        return "scales are float16"
    if layout(q) is None:
        return f"shape {q.shape} in {q.format.label} has scales for less than {_RUN} neighbouring values"
    return None


def dequantize(q: QTensor, *, dtype: Any = None, interpret: Any = None) -> jax.Array:
    """The values of `q`, rounded once to `dtype` (None: `q.dtype`); see `mojax.kernels.dequantize`.

    `interpret`: InterpretGPUParams, to run without a GPU.
    """
    dtype, size, place = np.dtype(dtype or q.dtype), math.prod(q.shape), layout(q)
    assert place is not None
    rows, levels = size // _RUN, tuple(sorted(q.scales))
    tiles = 2 if rows >= 2 * THREADS else 1
    lanes = Lanes() if interpret is None else InterpretedLanes()

    def body(codes_g: Any, *rest: Any) -> None:
        *scales, out_g = rest
        start = jnp.minimum(lax.axis_index("tile") * (THREADS * tiles), rows - THREADS * tiles)
        slices = [pl.ds(start + i * THREADS, THREADS) for i in range(tiles)]
        words = [lanes.read_words(codes_g.at[s]) for s in slices]
        for i, s in enumerate(slices):
            index = lanes.index() + (start + i * THREADS)
            step, zero = _step(lanes, q.format, place, index, dict(zip(levels, scales, strict=True)))
            values = _values(lanes, q.format, words[i])
            if zero is not None:
                values = [v - zero for v in values]
            lanes.write_values(out_g.at[s], [v * step for v in values])

    launch = plgpu.kernel(
        body,
        out_type=jax.ShapeDtypeStruct((rows, _RUN), dtype),
        grid=(pl.cdiv(rows, THREADS * tiles),),
        grid_names=("tile",),
        compiler_params=plgpu.CompilerParams(lowering_semantics=plgpu.LoweringSemantics.Lane),
        interpret=interpret,
    )
    scales = [jnp.asarray(q.scales[level]).reshape(-1) for level in levels]
    flat = launch(jnp.asarray(q.codes).reshape(rows, -1), *scales)
    if not q.batch and not q.contract:
        return flat.reshape(q.shape)
    shape = leaf.canonical_shape(q.shape, q.contract, q.batch)
    return leaf.restore(flat.reshape(shape), q.shape, q.contract, q.batch)


def _step(
    lanes: Lanes, format: Format, place: Layout, run: jax.Array, scales: dict[str, Any]
) -> tuple[Any, Any]:
    """What the codes of run number `run` are multiplied with, and the zero point, if there is one."""
    inner: Any = None
    outer: Any = None
    zero: Any = None
    if "outer" in scales:
        outer = real(lanes.gather(scales["outer"], lax.div(run, jnp.full_like(run, place.matrix))))
    if "inner" in scales:
        index = lax.div(run, jnp.full_like(run, max(place.share, 1)))
        if not place.share:
            row = lax.div(run, jnp.full_like(run, place.runs))
            column = lax.div(run - row * place.runs, jnp.full_like(run, 128 // _RUN))
            index = lax.div(row, jnp.full_like(run, 128)) * place.columns + column
        inner = _scale(scales["inner"].dtype, lanes.gather(scales["inner"], index))
        if "zero" in scales:
            (zero,) = _integers([lanes.gather(scales["zero"], index)], 8)
    if format.name != "nvfp4":
        return (outer if inner is None else inner), zero
    return (lanes.divide if format.arithmetic == "checkpoint" else lanes.multiply)(inner, outer), None


def _scale(dtype: Any, stored: jax.Array) -> jax.Array:
    """float32 of a scale from the bits it rests in: E4M3, E8M0, bfloat16, float16 or float32."""
    if dtype == jnp.float8_e4m3fn:
        return from_e4m3(stored)
    if dtype == jnp.uint8:
        return real(stored << 23)
    return real(stored << 16) if dtype == jnp.bfloat16 else real(stored)


def _values(lanes: Lanes, format: Format, words: list[jax.Array]) -> list[jax.Array]:
    """float32 of the codes in words."""
    if format.name in ("fp8", "mxfp8"):
        return [v for word in words for v in lanes.from_e4m3(word)]
    size = format.bits
    mask = jnp.uint32(2**size - 1)
    codes = [(word >> (size * i)) & mask for word in words for i in range(32 // size)]
    return _integers(codes, size) if format.name in ("int4", "int8") else [_from_e2m1(c) for c in codes]


def _integers(codes: list[jax.Array], size: int) -> list[jax.Array]:
    """float32 of two's complement codes: in the last bits of 2^23, where they weigh 1."""
    half = 2 ** (size - 1)
    one = jnp.uint32(0x4B000000)
    return [real((c ^ jnp.uint32(half)) | one) - jnp.float32(2.0**23 + half) for c in codes]


def _from_e2m1(code: jax.Array) -> jax.Array:
    index = code & jnp.uint32(7)
    whole = (index << 22) + jnp.uint32(126 << 23)
    small = jnp.where(index == jnp.uint32(0), jnp.uint32(0), jnp.uint32(126 << 23))
    magnitude = jnp.where(index < jnp.uint32(2), small, whole)
    return real(magnitude | ((code & jnp.uint32(8)) << 28))
