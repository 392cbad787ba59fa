"""Packed codes of a weight, from a file's bytes to the bfloat16 operand of a Hopper wgmma in registers.

A weight `[N, K]` is the operand A of wgmma, in registers; the inputs `x [M, K]` are B, in shared memory. A
sum over K does not care about its order, so no code moves between threads: where a thread has 32 bits, two
neighbouring uint16 of a row, their codes number i (4 or 2 in each) are two neighbouring columns of a
fragment `[64, 16]`, and `permuted` brings K of x into the order that this makes.

One step of a kernel's pipeline takes 128 bytes of codes of every row. Scales:

  "tile"  nvfp4, mxfp4, int4 in groups of 32. The 16 columns of every fragment are 16 groups, and one tile of
          scales `[64, 16]` multiplies them all; `weight_only.repack` reorders the codes for that.
  "rows"  int4 in groups of 64, 128 or 256, fp8 per block: one scale per row and group.
  ""      fp8 per tensor or channel, int8: `after` multiplies the sums.

A kernel needs `refused`, `depth`, `block`, `after`, `specs`, `inputs_spec`, `multiply`, and of `weight_only`
`permuted` and `arrays`.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from functools import partial, reduce
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.mosaic import gpu as mgpu
from jax.experimental.pallas import mosaic_gpu as plgpu
from jaxlib.mlir import ir
from jaxlib.mlir.dialects import arith, llvm, vector

from mojax.formats.base import Format, QTensor
from mojax.formats.fp8 import FP8
from mojax.formats.int4 import INT4
from mojax.formats.int8 import INT8
from mojax.formats.mxfp4 import MXFP4
from mojax.formats.numerics import e2m1_value, power, unpack
from mojax.formats.nvfp4 import NVFP4

ROWS = 64  # of a weight, per wgmma
STEP = 64  # of K, per wgmma call: one swizzle of 128 bytes of x
BYTES = 128  # of codes per row and pipeline step: one swizzle
COLUMNS = 16  # of K per fragment: of its scales in a tile
LINE = 8  # rows whose scales of a tile lie together in memory
SWIZZLE = plgpu.SwizzleTransform(128)

# Pallas gives warpgroups that multiply what the one that fetches leaves of 512 registers. Four would wait for
# theirs forever: five warpgroups start with 96 each, which are 480 together.
WARPGROUPS = (3, 2, 1)  # that multiply
MEMORY_REGISTERS = 56  # per thread of the warpgroup that fetches: with 40 its first copies spill

# Per code of a uint16, which bits of it make the code's pattern and how far left they move (negative: right).
# E2M1 and E4M3 become the sign, exponent and mantissa of a bfloat16 that is too small by 2^126 or 2^120. E2M1
# codes are stored so that few shifts do it; the others are as files have them.
Fields = tuple[tuple[int, int], ...]  # (shift left, mask afterwards)
FIELDS: dict[str, tuple[Fields, ...]] = {
    "e2m1": (
        ((0, 0x81C0),),
        ((3, 0x81C0),),
        ((6, 0x81C0),),
        ((1, 0x8000), (-5, 0x0100), (-4, 0x00C0)),
    ),
    "int4": tuple(((-4 * i, 0x000F),) for i in range(4)),
    "e4m3": (((8, 0x8000), (4, 0x07F0)), ((0, 0x8000), (-4, 0x07F0))),
    "int8": (((0, 0x00FF),), ((-8, 0x00FF),)),
}


class Block(NamedTuple):
    """How the codes of a format are cut up and decoded.

    Attributes:
      element: "e2m1", "int4", "e4m3" or "int8".
      scale: "tile", "rows" or "", as in the module's docstring.
      group: of K, under one scale of "tile" or "rows".
      zero: there are zero points, scaled like the codes.
      exponent: what the kernel multiplies the weight by: 2 to this; `after` undoes it.
    """

    element: str
    scale: str = ""
    group: int = 0
    zero: bool = False
    exponent: int = 0

    @property
    def per(self) -> int:
        """Codes in 16 bits."""
        return len(FIELDS[self.element])

    @property
    def k(self) -> int:
        """Of K, per step of the pipeline."""
        return BYTES // 2 * self.per

    @property
    def period(self) -> int:
        """What K must be a multiple of: what one tile of scales covers, or one step."""
        return COLUMNS * self.group if self.scale == "tile" else self.k


def block(format: Format) -> Block | None:
    """How a format's codes are decoded; None where these kernels cannot."""
    match format:
        case NVFP4():
            return Block("e2m1", "tile", 16, exponent=-7)  # E4M3 scales times 2^119 still fit bfloat16
        case MXFP4():
            return Block("e2m1", "tile", 32)
        case INT4(group=32):
            return Block("int4", "tile", 32, not format.symmetric)
        case INT4(group=64 | 128 | 256):
            return Block("int4", "rows", format.group, not format.symmetric)
        case FP8(per="block"):
            return Block("e4m3", "rows", 128)
        case FP8(per="tensor" | "channel"):
            return Block("e4m3")
        case INT8(per="tensor" | "channel"):
            return Block("int8")
    return None


def refused(q: QTensor) -> str | None:
    """Why a weight, or one of several, cannot be decoded here; None where it can."""
    found = block(q.format)
    if found is None:
        return f"{q.format.label} is not decoded in registers"
    N = q.codes.shape[-2]
    if N % ROWS:
        return f"N = {N} is no multiple of {ROWS}"
    if (found.element == "int4" or found.scale == "rows") and q.dtype != jnp.bfloat16:
        return f"{q.format.label} rounds to the weight's dtype {q.dtype}, which is not bfloat16"
    return None


def depth(q: QTensor) -> int:
    """K of the leaf's matrices."""
    return math.prod(q.shape[a] for a in q.contract) if q.contract else q.shape[-1]


def after(q: QTensor, block: Block) -> jax.Array:
    """What multiplies the sums, float32 `[*batch, 1]` or `[*batch, N]`; `q` in any order."""
    lead = q.codes.shape[:-2]
    if block.scale and "outer" not in q.scales:
        return jnp.full((*lead, 1), 2.0**-block.exponent, jnp.float32)
    # Of the codes' values nothing is used, so some of any order do.
    codes = unpack(q.codes[..., :8]) if q.format.bits == 4 else q.codes[..., :1]
    scales = dict(q.scales)
    if block.scale:
        scales["inner"] = jnp.ones((*codes.shape[:-1], 1), scales["inner"].dtype)

    def one(codes: jax.Array, scales: dict[str, Any]) -> jax.Array:
        return jnp.asarray(q.format.factored(codes, scales, q.dtype)[1], jnp.float32).reshape(-1)

    for _ in lead:
        one = jax.vmap(one)
    return one(codes, scales) * 2.0**-block.exponent


def specs(
    block: Block, rows: int, at: Callable[..., tuple[Any, ...]], lead: int = 0
) -> tuple[plgpu.BlockSpec, ...]:
    """The blocks of `arrays` that one step of a pipeline takes.

    Args:
      rows: of the weight per step, a multiple of 64.
      at: the pipeline's indices to `(*lead, n, k)`: which entry of each of the `lead` batch axes, which
        `rows` and which `block.k` of K.
    """
    first = (None,) * lead
    codes = plgpu.BlockSpec(
        (*first, rows, BYTES), at, transforms=(plgpu.TilingTransform((8, BYTES)), SWIZZLE)
    )
    if not block.scale:
        return (codes,)

    def scale_at(*indices: Any) -> tuple[Any, ...]:
        *entry, n, k = at(*indices)
        if block.scale == "tile":
            return (*entry, n, k if block.period == block.k else lax.div(k, block.period // block.k), 0)
        return (*entry, k if block.group <= block.k else lax.div(k, block.group // block.k), n)

    shape = (
        (rows // LINE, None, LINE * COLUMNS) if block.scale == "tile" else (-(-block.k // block.group), rows)
    )
    scales = plgpu.BlockSpec((*first, *shape), scale_at)
    return (codes, scales, scales) if block.zero else (codes, scales)


def inputs_spec(
    block: Block, m: int, at: Callable[..., Any], *, shared: tuple[str, ...] = (), interpret: bool = False
) -> plgpu.BlockSpec:
    """The block of `permuted` inputs `[M, K]` that one step takes; interpreted it is of `[K, M]`.

    Args:
      m: rows of the inputs, a multiple of 8 up to 256.
      at: the pipeline's indices to `(m, k)`: which `m` rows and which `block.k` of K.
      shared: axis of a cluster whose thread blocks take the same block, by multicast.
    """
    if interpret:
        return plgpu.BlockSpec((block.k, m), lambda *i: at(*i)[::-1])
    transforms = (plgpu.TilingTransform((8, STEP)), SWIZZLE)
    return plgpu.BlockSpec((m, block.k), at, transforms=transforms, collective_axes=shared)


def multiply(acc: Any, x: Any, weight: Sequence[Any], block: Block, row: Any, staging: Any = None) -> None:
    """Adds one pipeline step of 64 rows of the weight times the inputs to `acc`, and waits for the sums.

    Args:
      acc: wgmma accumulator `[64, M]`, float32.
      x: shared memory of `inputs_spec`, bfloat16.
      weight: shared memory of `specs`.
      row: the first of the 64 rows, a multiple of 64.
      staging: None; interpreted, where wgmma takes no registers: bfloat16 `[64, 64]` in shared memory.
    """
    codes, *scales = weight
    tile = factors(block, scales, row, 0, staging is not None) if block.scale == "tile" else []
    packed = codes[pl.ds(row, ROWS)]
    if staging is None:
        packed = plgpu.layout_cast(packed, plgpu.Layout.WGMMA_8BIT)
    width = BYTES * STEP // block.k
    for t in range(block.k // STEP):
        if block.scale == "rows" and (t * STEP) % block.group == 0:
            tile = factors(block, scales, row, t * STEP // block.group, staging is not None)
        part = packed[:, t * width : (t + 1) * width]
        here = slice(t * STEP, (t + 1) * STEP)
        if staging is None:
            plgpu.wgmma(acc, decoded(block, part, tile), x.at[:, here].T)
            plgpu.wgmma_wait(1)  # more in flight need more registers than there are
        else:
            staging[...] = interpreted(block, part, tile)
            plgpu.commit_smem()
            plgpu.wgmma(acc, staging, x.at[here])
    plgpu.wgmma_wait(0)


def factors(block: Block, scales: Sequence[Any], row: Any, group: int, interpret: bool) -> list[jax.Array]:
    """What multiplies every fragment, `[64, 16]` bfloat16: the offset of int4, the scale, its lower half.

    Interpreted it is the zero point (0 without) and the scale, float32 `[64, 16]`.

    Args:
      scales: shared memory of the specs that follow the codes'.
      group: of "rows", which.
    """
    found = []
    for ref in scales:
        if block.scale == "tile":
            ref = ref.at[pl.ds(row // LINE, ROWS // LINE)]
            if interpret:  # it has refs of one shape only
                found.append(ref[...].reshape(ROWS, COLUMNS))
            else:
                found.append(plgpu.layout_cast(ref.reshape(ROWS, COLUMNS)[...], plgpu.Layout.WGMMA))
        else:
            value = ref[group, pl.ds(row, ROWS)]
            if not interpret:
                value = plgpu.layout_cast(value, plgpu.Layout.WGMMA.reduce(1))
            found.append(lax.broadcast_in_dim(value, (ROWS, COLUMNS), (0,)))
    scale, *zero = found
    if interpret:
        scale = power(scale) if scale.dtype == jnp.uint8 else scale.astype(jnp.float32)
        return [zero[0].astype(jnp.float32) if zero else jnp.zeros_like(scale), scale * 2.0**block.exponent]
    if scale.dtype == jnp.uint8:
        return [lax.bitcast_convert_type(scale.astype(jnp.uint16) << 7, jnp.bfloat16)]
    if scale.dtype == jnp.float8_e4m3fn:
        return [scale.astype(jnp.float32).astype(jnp.bfloat16) * jnp.bfloat16(2.0 ** (126 + block.exponent))]
    offset = [zero[0] + jnp.bfloat16(136)] if zero else []
    if scale.dtype == jnp.bfloat16:
        return [*offset, scale]
    wide = scale.astype(jnp.float32)
    high = wide.astype(jnp.bfloat16)
    return [*offset, high, (wide - high.astype(jnp.float32)).astype(jnp.bfloat16)]


def interpreted(block: Block, packed: jax.Array, factors: Sequence[jax.Array]) -> jax.Array:
    """`decoded`, in float32 arithmetic that is exact but for the last rounding."""
    found = words(lax.bitcast_convert_type(packed, jnp.uint8))
    pattern = jnp.stack([moved(found, fields) for fields in FIELDS[block.element]], -1)
    pattern = pattern.reshape(ROWS, -1, COLUMNS, block.per).transpose(0, 1, 3, 2).reshape(ROWS, STEP)
    match block.element:
        case "e2m1":
            w = e2m1_value((pattern >> 12 & 8) | (pattern >> 6 & 7))
        case "int4":
            w = (pattern ^ 8).astype(jnp.float32) - 8
        case "e4m3":
            byte = (pattern >> 8 & 0x80) | (pattern >> 4 & 0x7F)
            w = lax.bitcast_convert_type(byte.astype(jnp.uint8), jnp.float8_e4m3fn).astype(jnp.float32)
        case _:
            w = lax.bitcast_convert_type(pattern.astype(jnp.uint8), jnp.int8).astype(jnp.float32)
    if factors:
        zero, scale = (jnp.tile(f, (1, STEP // COLUMNS)) for f in factors)
        w = (w - zero) * scale
    return w.astype(jnp.bfloat16)


def words(codes: Any) -> Any:
    """Bytes `[..., 2 n]` to uint16 `[..., n]`, the first byte low; numpy stays numpy."""
    wide = codes.astype(np.uint16)
    return wide[..., 0::2] | (wide[..., 1::2] << 8)


def moved(found: Any, fields: Fields) -> Any:
    """The pattern that `fields` make of uint16; numpy stays numpy."""
    pattern = found & 0
    for left, mask in fields:
        pattern = pattern | ((found << left if left >= 0 else found >> -left) & mask)
    return pattern


def decoded(block: Block, packed: jax.Array, factors: Sequence[jax.Array]) -> jax.Array:
    """Packed codes `[64, 32 or 64]` in the 8-bit wgmma layout to scaled bfloat16 `[64, 64]`, the operand A.

    Two weights per 32-bit register all the way.
    """
    layout = plgpu.Layout.WGMMA
    emit = plgpu.inline_mgpu(
        arg_types=(plgpu.Layout.WGMMA_8BIT, *(layout for _ in factors)),
        return_type=plgpu.ShapeDtypeStruct((ROWS, STEP), jnp.bfloat16, layout=layout),
    )
    return emit(partial(_emit, block))(packed, *factors)


def _emit(block: Block, _: Any, packed: mgpu.FragmentedArray, *factors: mgpu.FragmentedArray) -> Any:
    """Registers of `packed`, 2 uint16 of a row each, to those of the fragments, 2 bfloat16 of a row each."""
    found = packed.registers
    made = np.empty((1, STEP // 8, *found.shape[2:]), dtype=object)
    for (_, column, *rest), register in np.ndenumerate(found):
        part, half = divmod(column, COLUMNS // 8)
        bits = vector.bitcast(ir.VectorType.get((1,), ir.IntegerType.get_signless(32)), register)
        here = [f.registers[(0, half, *rest)] for f in factors]
        for i in range(block.per):
            made[(0, 2 * (block.per * part + i) + half, *rest)] = _scaled(block, bits, i, here)
    return mgpu.FragmentedArray(_registers=made, _layout=mgpu.WGMMA_LAYOUT, _is_signed=None)


def _scaled(block: Block, bits: ir.Value, i: int, factors: Sequence[ir.Value]) -> ir.Value:
    """Codes number `i` of 2 uint16, times their scales, as 2 bfloat16."""
    word = _moved(bits, FIELDS[block.element][i])
    match block.element:
        case "e2m1":
            w = _bfloat16(word)
            if not block.exponent:
                w = arith.mulf(w, _pair(2.0**126))
        case "e4m3":
            w = arith.mulf(_bfloat16(word), _pair(2.0**120))
        case "int4":
            w = _bfloat16(arith.xori(word, _word(0x4308)))  # 128 + (n + 8)
            offset, *factors = factors if block.zero else (_pair(136.0), *factors)
            w = arith.subf(w, offset)
        case _:
            low, sign = (arith.ori(arith.andi(word, _word(m)), _word(0x4300)) for m in (0x007F, 0x0080))
            w = arith.subf(_bfloat16(low), _bfloat16(sign))  # 128 + (n & 127), 128 + 128 where negative
    if len(factors) == 2:
        high, rest = factors
        return _fused(w, high, arith.mulf(w, rest))
    return arith.mulf(w, *factors) if factors else w


def _moved(bits: ir.Value, fields: Fields) -> ir.Value:
    """`moved`, of 2 uint16 at once: what crosses from one to the other is masked."""
    parts = []
    for left, mask in fields:
        shift = arith.shli if left > 0 else arith.shrui
        part = shift(bits, _constant(bits.type, abs(left))) if left else bits
        parts.append(arith.andi(part, _word(mask)))
    return reduce(arith.ori, parts)


def _fused(a: ir.Value, b: ir.Value, c: ir.Value) -> ir.Value:
    """`a * b + c` of 2 bfloat16 each, rounded once. The dialects' own fma becomes four of float32."""
    i32 = ir.IntegerType.get_signless(32)
    single = ir.VectorType.get((1,), i32)
    zero = arith.constant(i32, ir.IntegerAttr.get(i32, 0))
    words = [llvm.extractelement(vector.bitcast(single, v), zero) for v in (a, b, c)]
    found: Any = llvm.inline_asm(i32, words, "fma.rn.bf16x2 $0, $1, $2, $3;", "=r,r,r,r")
    return _bfloat16(vector.from_elements(single, [found]))


def _word(pattern: int) -> ir.Value:
    """A constant: `pattern` in both uint16."""
    return _constant(ir.VectorType.get((1,), ir.IntegerType.get_signless(32)), pattern << 16 | pattern)


def _constant(kind: ir.Type, value: int) -> ir.Value:
    word = ir.IntegerAttr.get(ir.IntegerType.get_signless(32), value - (value >> 31 << 32))
    return arith.constant(kind, ir.DenseElementsAttr.get_splat(kind, word))


def _pair(value: float) -> ir.Value:
    """A constant: 2 bfloat16."""
    kind, number = ir.VectorType.get((2,), ir.BF16Type.get()), ir.FloatAttr.get(ir.BF16Type.get(), value)
    return arith.constant(kind, ir.DenseElementsAttr.get_splat(kind, number))


def _bfloat16(word: ir.Value) -> ir.Value:
    return vector.bitcast(ir.VectorType.get((2,), ir.BF16Type.get()), word)
