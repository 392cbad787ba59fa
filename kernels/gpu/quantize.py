"""Quantization in one pass over the values: scales, codes and, before them, a Hadamard rotation in registers.

A thread holds runs of 16 neighbouring values (of a row: down to 4). A scale is shared by 1 to 32 threads of a
warp, or by all 128 where it is a row's.
"""

from __future__ import annotations

import dataclasses
import math
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from mojax.errors import InputError
from mojax.formats.base import Array, Format, QTensor
from mojax.kernels.gpu.lanes import THREADS, InterpretedLanes, Lanes, greatest
from mojax.kernels.gpu.rounding import TOPS, Rule, among, rotate, rule
from mojax.kernels.quantize import HADAMARD

_RUN = 16  # values of a thread that share a scale
_WARP = 32
_ROW = 256  # values of a row that a thread holds at most
SHAPES = ((8192, 8192), (4096, 14336), (28672, 4096), (1, 4096), (16, 5120))


class Tiles(NamedTuple):
    """What a warpgroup does.

    Attributes:
      width: neighbouring values of a thread.
      runs: how many times `128 * width` values a warpgroup takes.
      share: threads that share a scale; 128: a row is all that a warpgroup takes.
    """

    width: int
    runs: int
    share: int


def tiles(size: int, width: int, block: int | None) -> Tiles | None:
    """How `size` values in rows of `width` are cut, for scales per `block` (0: a row; None: none).

    None: they cannot be.
    """
    block = width if block == 0 else block or _RUN
    share = block // _RUN
    if block % _RUN == 0 and share <= _WARP and share & (share - 1) == 0:
        rows = size // (THREADS * _RUN)
        return Tiles(_RUN, 2 if rows >= 2 else 1, share) if rows else None
    for run in (16, 8, 4):
        if width == block and width % (THREADS * run) == 0 and width <= THREADS * _ROW:
            return Tiles(run, width // (THREADS * run), THREADS)
    return None


def why_not(
    x: Array, format: Format, *, outer: Array | None = None, hadamard: int | None = None, sweep: bool = False
) -> str | None:
    """Why `quantize` cannot take these arguments, or None."""
    if x.dtype not in (jnp.bfloat16, jnp.float32):
        return f"x is {x.dtype}, neither bfloat16 nor float32"
    found = rule(format, x.dtype, sweep)
    if found is None:
        return f"there is no kernel for {format.label}"
    if hadamard not in (None, *HADAMARD):
        return f"hadamard is {hadamard}, not one of {HADAMARD}"
    size, width = math.prod(x.shape), x.shape[-1]
    cut = tiles(size, width, found.block)
    if cut is None and size < THREADS * _RUN:
        return f"{size} values are less than {THREADS * _RUN}"
    if cut is None:
        return f"K = {width} is neither 16, 32, ... 512 nor a multiple of 512 up to {THREADS * _ROW}"
    if width % _RUN:
        return f"K = {width} is no multiple of {_RUN}"
    if hadamard and (width % hadamard or cut.width != _RUN):
        return f"K = {width} has no whole runs of 16 in blocks of {hadamard} for a warpgroup"
    return None


def quantize(
    x: jax.Array,
    format: Format,
    *,
    outer: Array | None = None,
    hadamard: int | None = None,
    sweep: bool = False,
    interpret: Any = None,
) -> QTensor:
    """`x [..., K]`, bfloat16 or float32, rounded to `format`; see `mojax.kernels.quantize`.

    `interpret`: InterpretGPUParams, to run without a GPU.
    """
    x = jnp.asarray(x)
    found = rule(format, x.dtype, sweep)
    if found is None:
        raise InputError(f"quantize: there is no kernel for {format.label}")
    if format.static and outer is None:
        top = jnp.max(jnp.abs(x)).astype(jnp.float32)
        if hadamard:
            top = jnp.max(_run(x, TOPS, None, None, hadamard, interpret)[0])
        outer = format.own_outer(top, x.dtype, None)
    if format.static:
        outer = jnp.asarray(outer, jnp.float32).reshape(())
    spec = format.spec(x.shape, x.dtype)
    results = _run(x, found, spec.codes, outer, hadamard, interpret)
    codes, scales = (*results, None) if found.scale is None else results
    levels: dict[str, Any] = {} if scales is None else {"inner": scales.reshape(spec.scales["inner"].shape)}
    if outer is not None and format.static:
        levels["outer"] = outer
    return dataclasses.replace(spec, codes=codes.reshape(spec.codes.shape), scales=levels)


def _run(
    x: jax.Array, rule: Rule, codes: Any, outer: Any, hadamard: int | None, interpret: Any
) -> list[jax.Array]:
    """Codes, where `codes` is their ShapeDtypeStruct, and scales, where there are some, both in rows."""
    cut = tiles(x.size, x.shape[-1], rule.block)
    assert cut is not None
    rows = x.size // cut.width
    shapes = []
    if codes is not None:
        shapes.append(jax.ShapeDtypeStruct((rows, math.prod(codes.shape) // rows), codes.dtype))
    if rule.scale is not None:
        count = rows // (cut.share * (cut.runs if cut.share == THREADS else 1))
        shapes.append(jax.ShapeDtypeStruct((count,), rule.scale))
    ins = (x.reshape(rows, cut.width), *([] if outer is None else [outer.reshape(1)]))

    def body(*refs: Any) -> None:
        x_g, *rest = refs
        outer_g = rest.pop(0) if outer is not None else None
        codes_g = rest.pop(0) if codes is not None else None
        compute = _row if cut.share == THREADS else _blocks
        compute(_Work(rule, cut, rows, hadamard, lanes), x_g, outer_g, codes_g, rest[0] if rest else None)

    lanes = Lanes() if interpret is None else InterpretedLanes()
    launch = plgpu.kernel(
        body,
        out_type=shapes,
        grid=(pl.cdiv(rows, THREADS * cut.runs),),
        grid_names=("tile",),
        compiler_params=plgpu.CompilerParams(lowering_semantics=plgpu.LoweringSemantics.Lane),
        interpret=interpret,
    )
    return list(launch(*ins))


class _Work(NamedTuple):
    rule: Rule
    cut: Tiles
    rows: int
    hadamard: int | None
    lanes: Lanes

    def values(self, words: list[jax.Array], dtype: Any) -> list[jax.Array]:
        """A thread's values, float32."""
        values = self.lanes.values(words, dtype)
        return rotate(self.lanes, values, self.hadamard, dtype) if self.hadamard else values

    def top(self, words: list[jax.Array], dtype: Any) -> jax.Array:
        """The largest magnitude of a thread's values."""
        if self.hadamard:
            return greatest(self.values(words, dtype))
        return self.lanes.magnitude(words, dtype)


def _blocks(work: _Work, x_g: Any, outer_g: Any, codes_g: Any, scales_g: Any) -> None:
    """Runs of which no scale is shared by more than a warp; the last tile begins early enough to be whole."""
    rule, cut, rows, _, lanes = work
    start = lax.axis_index("tile") * (THREADS * cut.runs)
    start = jnp.minimum(start, rows - THREADS * cut.runs)
    slices = [pl.ds(start + i * THREADS, THREADS) for i in range(cut.runs)]
    words = [lanes.read_words(x_g.at[s]) for s in slices]
    outer = None if outer_g is None else lanes.full(outer_g[0])
    for i, s in enumerate(slices):
        values = work.values(words[i], x_g.dtype)
        top = greatest(values) if work.hadamard else lanes.magnitude(words[i], x_g.dtype)
        fit = rule.fit(lanes, among(lanes, top, cut.share), outer, values)
        if codes_g is not None:
            lanes.write_words(codes_g.at[s], rule.words(lanes, values, fit.step))
        if scales_g is not None:
            first = lax.div(start, cut.share) + i * (THREADS // cut.share)
            lanes.write_scale(scales_g.at[pl.ds(first, THREADS // cut.share)], fit.stored, cut.share)


def _row(work: _Work, x_g: Any, outer_g: Any, codes_g: Any, scales_g: Any) -> None:
    """A row with one scale: read for the maximum, then again, from the first cache, for the codes."""
    rule, cut, _, _, lanes = work
    row = lax.axis_index("tile")
    slices = [pl.ds((row * cut.runs + i) * THREADS, THREADS) for i in range(cut.runs)]
    tops = [work.top(lanes.read_words(x_g.at[s]), x_g.dtype) for s in slices]
    fit = rule.fit(lanes, lanes.largest(greatest(tops)), None, None)
    lanes.write_scale(scales_g.at[pl.ds(row, 1)], fit.stored, THREADS)

    def encode(i: Any, _: None) -> None:
        run = pl.ds((row * cut.runs + i) * THREADS, THREADS)
        values = work.values(lanes.read_words(x_g.at[run]), x_g.dtype)
        lanes.write_words(codes_g.at[run], rule.words(lanes, values, fit.step))

    lax.fori_loop(0, cut.runs, encode, None)
