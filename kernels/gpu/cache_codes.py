"""Codes of a cache `[64 slots, head_dim]`, from shared memory to float16 operands of a Hopper wgmma.

A thread reads up to 16 neighbouring bytes of a row at a time and what it makes of them stays with it, so
columns come out in another order than they lie in memory: column `c` of the fragments is column `order[c]` of
the head. Sums over a head's columns do not care where queries are in the same order; outs are put back
afterwards.

float16 holds E4M3 and the product of E2M1 and E4M3 exactly. E2M1 is moved to the bits of an E4M3, which makes
it 2^6 times smaller, and converted as one.
"""

from __future__ import annotations

from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental.mosaic import gpu as mgpu
from jax.experimental.pallas import mosaic_gpu as plgpu
from jaxlib.mlir import ir
from jaxlib.mlir.dialects import arith, llvm, vector

from mojax.formats.numerics import e2m1_value, unpack

KEYS = 64  # rows of a fragment
SHRUNK = 2.0**6  # what E2M1 in the bits of E4M3 is divided by
_BLOCK = 16  # E2M1 under one scale
_CHUNK = 16  # bytes that a thread reads at once, at most
_QUAD = 4  # threads that share a row of a fragment

# 32 bits to pairs of float16: which of its numbers each pair is of.
_E4M3_PAIRS = ((0, 1), (2, 3))
_E2M1_PAIRS = ((0, 2), (4, 6), (1, 3), (5, 7))
_E4M3 = """{
.reg .b16 low, high;
mov.b32 {low, high}, $2;
cvt.rn.f16x2.e4m3x2 $0, low;
cvt.rn.f16x2.e4m3x2 $1, high;
}"""
# (left & 0x80808080) | (right & 0x1c1c1c1c): sign and magnitude of every other E2M1 in the bits of an E4M3.
_E2M1 = """{
.reg .b32 left, right, even, odd;
.reg .b16 a, b, c, d;
shl.b32 left, $4, 4;
shl.b32 right, $4, 2;
and.b32 left, left, 0x80808080;
lop3.b32 even, right, 0x1c1c1c1c, left, 0xea;
shr.u32 right, $4, 2;
and.b32 left, $4, 0x80808080;
lop3.b32 odd, right, 0x1c1c1c1c, left, 0xea;
mov.b32 {a, b}, even;
mov.b32 {c, d}, odd;
cvt.rn.f16x2.e4m3x2 $0, a;
cvt.rn.f16x2.e4m3x2 $1, b;
cvt.rn.f16x2.e4m3x2 $2, c;
cvt.rn.f16x2.e4m3x2 $3, d;
mul.rn.f16x2 $0, $0, $5;
mul.rn.f16x2 $1, $1, $5;
mul.rn.f16x2 $2, $2, $5;
mul.rn.f16x2 $3, $3, $5;
}"""


def order(size: int, packed: bool) -> np.ndarray:
    """Which column of the head each column of the fragments is, int `[size]`; `packed`: E2M1, else E4M3."""
    pairs, numbers = (_E2M1_PAIRS, 8) if packed else (_E4M3_PAIRS, 4)
    words = _chunk(size, packed) // 4
    chunks = size // (_QUAD * words * numbers)
    columns = [
        numbers * (words * (_QUAD * chunk + thread) + word) + number
        for chunk in range(chunks)
        for word in range(words)
        for pair in pairs
        for thread in range(_QUAD)
        for number in pair
    ]
    return np.array(columns)


def _chunk(size: int, packed: bool) -> int:
    """Bytes that a thread reads at once."""
    return min(_CHUNK, size // (2 if packed else 1) // _QUAD)


def _layout(width: int, each: int) -> Any:
    """A row's `width` columns over its four threads, `each` neighbouring ones at a time; rows as in wgmma."""
    columns = _QUAD * each
    tiling = plgpu.Tiling(((KEYS, columns), (16, columns), (8, columns), (each,)))
    return plgpu.Layout.TILED(tiling, warp_dims=(-7,), lane_dims=(-3, -2), vector_dim=-1)


def decoded(codes: jax.Array, scales: jax.Array | None, size: int) -> jax.Array:
    """float16 `[64, size]` in the layout of wgmma and the order `order(size, ...)`.

    Args:
      codes: E4M3 `[64, size]`, or with scales uint8 `[64, size / 2]`: E2M1, which come out divided by 2^6.
      scales: E4M3 `[64, size / 16]`.
    """
    packed, each = scales is not None, _chunk(size, scales is not None)
    arrays, layouts = [codes], [_layout(codes.shape[1], each)]
    if scales is not None:
        arrays.append(scales)
        layouts.append(_layout(scales.shape[1], 2 * each // _BLOCK))
    arrays = [plgpu.layout_cast(a, layout) for a, layout in zip(arrays, layouts, strict=True)]
    result = plgpu.ShapeDtypeStruct((KEYS, size), jnp.float16, layout=plgpu.Layout.WGMMA)
    emit = plgpu.inline_mgpu(arg_types=tuple(layouts), return_type=result)
    return emit(partial(_emit, size, packed))(*arrays)


def interpreted(codes: jax.Array, scales: jax.Array | None, size: int) -> jax.Array:
    """`decoded` in plain arithmetic, in the head's own order."""
    if scales is None:
        return codes.astype(jnp.float16)
    w = e2m1_value(unpack(codes)).reshape(KEYS, -1, _BLOCK) * scales.astype(jnp.float32)[..., None]
    return (w / SHRUNK).astype(jnp.float16).reshape(KEYS, size)


def _emit(size: int, packed: bool, _: Any, codes: Any, scales: Any = None) -> Any:
    """Registers of codes, neighbouring bytes of a row, to those of fragments, 2 float16 of a row each."""
    made = np.empty(mgpu.WGMMA_LAYOUT.registers_shape((KEYS, size)), dtype=object)
    pairs = _E2M1_PAIRS if packed else _E4M3_PAIRS
    for (row, chunk, *rest), register in np.ndenumerate(codes.registers):
        words = _words(register)
        for i, word in enumerate(words):
            if packed:
                group = _scale(scales.registers[(row, chunk, *rest)], i * 8 // _BLOCK)
                found = _assembled(_E2M1, len(pairs), word, group)
            else:
                found = _assembled(_E4M3, len(pairs), word)
            for j, pair in enumerate(found):
                made[(row, (chunk * len(words) + i) * len(pairs) + j, *rest)] = pair
    return mgpu.FragmentedArray(_registers=made, _layout=mgpu.WGMMA_LAYOUT, _is_signed=None)


def _words(register: Any) -> list[Any]:
    """A vector of bytes as 32-bit integers."""
    i32 = ir.IntegerType.get_signless(32)
    bits = 8 * ir.VectorType(register.type).shape[0]
    wide = vector.bitcast(ir.VectorType.get((bits // 32,), i32), register)
    return [vector.extract(wide, [], [i]) for i in range(bits // 32)]


def _scale(register: Any, i: int) -> Any:
    """Number `i` of a vector of E4M3 as a pair of equal float16, in 32 bits."""
    count = ir.VectorType(register.type).shape[0]
    wide = ir.IntegerType.get_signless(8 * count)
    bits = vector.extract(vector.bitcast(ir.VectorType.get((1,), wide), register), [], [0])
    bits = arith.extui(ir.IntegerType.get_signless(32), bits) if count < 4 else bits
    text = f"""{{
.reg .b32 twice;
.reg .b16 low, high;
prmt.b32 twice, $1, $1, 0x{str(i) * 4};
mov.b32 {{low, high}}, twice;
cvt.rn.f16x2.e4m3x2 $0, low;
}}"""
    return llvm.inline_asm(ir.IntegerType.get_signless(32), [bits], text, "=r,r", asm_dialect=0)


def _assembled(text: str, count: int, *operands: Any) -> list[Any]:
    """The results of PTX that gives `count` words, as pairs of float16."""
    i32 = ir.IntegerType.get_signless(32)
    constraints = ",".join(["=&r"] * count + ["r"] * len(operands))
    struct = llvm.StructType.get_literal([i32] * count)
    made: Any = llvm.inline_asm(struct, list(operands), text, constraints, asm_dialect=0)
    pair = ir.VectorType.get((2,), ir.F16Type.get())
    single = ir.VectorType.get((1,), i32)
    words = [llvm.extractvalue(i32, made, [i]) for i in range(count)]
    return [vector.bitcast(pair, vector.broadcast(single, word)) for word in words]
