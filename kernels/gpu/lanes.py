"""128 threads, each with its own run of neighbouring values: how they read, write, exchange and divide them.

`Lanes` is for Mosaic GPU, `InterpretedLanes` does the same in jnp for the interpreter. Arrays are `[128]`,
one entry per thread, so a list of them is a run per thread, and what is done to it needs no shuffles.

Mosaic computes `x / y` approximately, fuses a product and a sum into one rounding, and keeps a uint32
unsigned in a bitcast to int32: hence the exact operations here.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, cast

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.experimental.mosaic import gpu as mgpu
from jax.experimental.mosaic.gpu.utils import memref_ptr, shfl_bfly
from jax.experimental.pallas import mosaic_gpu as plgpu
from jaxlib.mlir import ir
from jaxlib.mlir.dialects import arith, llvm, vector

from mojax.formats import numerics

THREADS = 128
_LAYOUT = plgpu.Layout.WG_STRIDED((THREADS,), 1)
_DYNAMIC = -(2**31)  # LLVM's mark of an index that is no constant


def bits(x: jax.Array) -> jax.Array:
    """float32 as uint32."""
    return lax.bitcast_convert_type(x, jnp.uint32)


def real(x: jax.Array) -> jax.Array:
    """uint32 as float32."""
    return lax.bitcast_convert_type(x, jnp.float32)


class Lanes:
    """Threads of a Mosaic GPU warpgroup (lane-level lowering semantics)."""

    def values(self, words: Sequence[jax.Array], dtype: Any) -> list[jax.Array]:
        """float32 of what `read_words` gives of a bfloat16 or float32 ref."""
        if dtype == jnp.float32:
            return [real(w) for w in words]
        return [real(half) for w in words for half in (w << 16, w & jnp.uint32(0xFFFF0000))]

    def magnitude(self, words: Sequence[jax.Array], dtype: Any) -> jax.Array:
        """The largest magnitude of `values(words, dtype)`, NaN if one is; two at a time for bfloat16."""
        if dtype == jnp.float32:
            return greatest(self.values(words, dtype))
        top = words[0]
        for word in (words[0], *words[1:]):
            top = _asm(_PAIR_MAXIMUM, "=r,r,r", jnp.uint32, word, top)
        return greatest(self.values([top], dtype))

    def read_words(self, ref: Any) -> list[jax.Array]:
        """The uint32 words of each thread's row of a ref `[128, n]`, in as few loads as there can be."""
        count = ref.shape[1] * np.dtype(ref.dtype).itemsize // 4

        def load(memory: ir.Value) -> list[ir.Value]:
            i32 = ir.IntegerType.get_signless(32)
            words = llvm.load(
                ir.VectorType.get((count,), i32), _row(memory, count), alignment=_aligned(count)
            )
            return [vector.extract(words, [], [i]) for i in range(count)]

        return _inlined(load, ref, [], [jnp.uint32] * count)

    def write_words(self, ref: Any, words: Sequence[jax.Array]) -> None:
        """uint32 `words` to each thread's row of a ref `[128, n]` of any dtype."""

        def store(memory: ir.Value, *values: ir.Value) -> list[ir.Value]:
            i32 = ir.IntegerType.get_signless(32)
            row = llvm.mlir_undef(ir.VectorType.get((len(values),), i32))
            for i, value in enumerate(values):
                row = vector.insert(value, row, [], [i])
            llvm.store(row, _row(memory, len(values)), alignment=_aligned(len(values)))
            return []

        _inlined(store, ref, words, [])

    def write_values(self, ref: Any, values: Sequence[jax.Array]) -> None:
        """float32 `values` rounded to a bfloat16 or float32 ref `[128, n]`."""
        if ref.dtype == jnp.float32:
            self.write_words(ref, [bits(v) for v in values])
        else:
            pairs = zip(values[::2], values[1::2], strict=True)
            self.write_words(ref, [_asm(_PAIR, "=r,f,f", jnp.uint32, *pair) for pair in pairs])

    def write_scale(self, ref: Any, value: jax.Array, share: int) -> None:
        """The low bits of a uint32 per thread to a ref `[128 / share]`, equal among `share` threads."""

        def store(memory: ir.Value, value: ir.Value) -> list[ir.Value]:
            i32 = ir.IntegerType.get_signless(32)
            size = ir.IntegerType.get_signless(8 * np.dtype(ref.dtype).itemsize)
            narrow = value if size == i32 else arith.trunci(size, value)
            llvm.store(narrow, _entry(memory, arith.divui(_thread(), mgpu.c(share, i32)), size))
            return []

        _inlined(store, ref, [value], [])

    def gather(self, ref: Any, index: jax.Array) -> jax.Array:
        """Entries of a flat ref as uint32 of their bits; `index` is int32."""

        def load(memory: ir.Value, index: ir.Value) -> list[ir.Value]:
            i32 = ir.IntegerType.get_signless(32)
            size = ir.IntegerType.get_signless(8 * np.dtype(ref.dtype).itemsize)
            value = llvm.load(size, _entry(memory, index, size))
            return [value if size == i32 else arith.extui(i32, value)]

        return _inlined(load, ref, [index], [jnp.uint32])[0]

    def index(self) -> jax.Array:
        """The number of each thread, int32."""
        return _inlined(lambda: [_thread()], None, [], [jnp.int32])[0]

    def full(self, value: Any) -> jax.Array:
        """A number in every thread, float32."""
        return plgpu.layout_cast(jnp.full((THREADS,), value, jnp.float32), _LAYOUT)

    def partner(self, x: jax.Array, distance: int) -> jax.Array:
        """What the thread whose number differs in the bit `distance` (below 32) has."""
        return _inlined(lambda v: [shfl_bfly(v, distance)], None, [x], [x.dtype])[0]

    def largest(self, x: jax.Array) -> jax.Array:
        """The maximum over all threads, in each of them."""
        return self.full(jnp.max(x))

    def divide(self, x: jax.Array, s: jax.Array) -> jax.Array:
        """`x / s` rounded once; `/` itself is only approximate in a Mosaic kernel."""
        return _asm("div.rn.f32 $0, $1, $2;", "=f,f,f", jnp.float32, x, s)

    def add(self, x: jax.Array, y: jax.Array) -> jax.Array:
        """`x + y` rounded once, never fused with a product."""
        return _asm("add.rn.f32 $0, $1, $2;", "=f,f,f", jnp.float32, x, y)

    def multiply(self, x: jax.Array, y: jax.Array) -> jax.Array:
        """`x * y` rounded once, never fused with a sum."""
        return _asm("mul.rn.f32 $0, $1, $2;", "=f,f,f", jnp.float32, x, y)

    def narrow(self, xs: Sequence[jax.Array], dtype: Any) -> list[jax.Array]:
        """Values rounded to bfloat16 or float32, as float32."""
        if dtype == jnp.float32:
            return list(xs)
        if len(xs) == 1:
            return [xs[0].astype(dtype).astype(jnp.float32)]
        pairs = zip(xs[::2], xs[1::2], strict=True)
        return self.values([_asm(_PAIR, "=r,f,f", jnp.uint32, *pair) for pair in pairs], dtype)

    def at_most(self, x: jax.Array, bound: float) -> jax.Array:
        """The smaller of `|x|` and `bound`; NaN gives `bound`."""
        return _asm(
            "{.reg .f32 a; abs.f32 a, $1; min.f32 $0, a, $2;}", "=f,f,f", jnp.float32, x, self.full(bound)
        )

    def quotients(self, xs: Sequence[jax.Array], s: jax.Array) -> tuple[list[jax.Array], list[jax.Array]]:
        """`x / s` for `s >= 0`, twice.

        First rounded once where it is finite and not 0; then less exactly, but right in its sign, where it is
        0, infinite or NaN. A reciprocal, its product and two corrections (Markstein 1990) cost half of a
        division each; powers of two keep them all normal numbers.
        """
        tiny, huge = s < jnp.float32(2.0**-60), s > jnp.float32(2.0**100)
        factor = jnp.where(tiny, jnp.float32(2.0**64), jnp.where(huge, jnp.float32(2.0**-64), jnp.float32(1)))
        infinite = s == jnp.float32(np.inf)
        s = self.multiply(jnp.maximum(s, jnp.float32(2.0**-149)), factor)
        inverse = jnp.where(infinite, jnp.float32(0), _asm("rcp.rn.f32 $0, $1;", "=f,f", jnp.float32, s))
        s = jnp.where(infinite, jnp.float32(0), s)
        exact, near = [], []
        for x in xs:
            x = self.multiply(x, factor)
            q = self.multiply(x, inverse)
            near.append(q)
            exact.append(_asm(_CORRECTED, "=f,f,f,f,f", jnp.float32, q, x, s, inverse))
        return exact, near

    def integer(self, x: jax.Array) -> jax.Array:
        """The nearest integer from -128 to 127, half to even, int32; NaN is 0."""
        return _asm("cvt.rni.sat.s8.f32 $0, $1;", "=r,f", jnp.int32, x)

    def e4m3(self, four: Sequence[jax.Array]) -> jax.Array:
        """A word of four E4M3 codes: half to even, saturating, NaN as 127."""
        return _asm(_E4M3, "=r,f,f,f,f", jnp.uint32, *four)

    def from_e4m3(self, word: jax.Array) -> list[jax.Array]:
        """float32 of the four E4M3 codes in a word."""
        halves = (word, word >> 16)
        return [_asm(_FROM_E4M3 % e, "=f,r", jnp.float32, half) for half in halves for e in "ab"]


_FROM_E4M3 = """{
.reg .b16 half, a, b;
.reg .b32 pair;
cvt.u16.u32 half, $1;
cvt.rn.f16x2.e4m3x2 pair, half;
mov.b32 {a, b}, pair;
cvt.f32.f16 $0, %s;
}"""

_CORRECTED = """{
.reg .f32 q, r;
neg.f32 r, $1;
fma.rn.f32 r, r, $3, $2;
fma.rn.f32 q, r, $4, $1;
neg.f32 r, q;
fma.rn.f32 r, r, $3, $2;
fma.rn.f32 $0, r, $4, q;
}"""

_PAIR = "cvt.rn.bf16x2.f32 $0, $2, $1;"

_PAIR_MAXIMUM = "{.reg .b32 a; abs.bf16x2 a, $1; max.NaN.bf16x2 $0, a, $2;}"

_E4M3 = """{
.reg .b16 low, high;
cvt.rn.satfinite.e4m3x2.f32 low, $2, $1;
cvt.rn.satfinite.e4m3x2.f32 high, $4, $3;
mov.b32 $0, {low, high};
}"""


def greatest(run: Sequence[jax.Array]) -> jax.Array:
    """The largest magnitude of each thread's values; NaN if one is."""
    top = jnp.abs(run[0])
    for x in run[1:]:
        top = jnp.maximum(top, jnp.abs(x))
    return top


class InterpretedLanes(Lanes):
    """The same in jnp, for the interpreter."""

    def magnitude(self, words: Sequence[jax.Array], dtype: Any) -> jax.Array:
        return greatest(self.values(words, dtype))

    def read_words(self, ref: Any) -> list[jax.Array]:
        x = ref[...]
        four = lax.bitcast_convert_type(x, jnp.uint8).reshape(THREADS, -1, 4)
        words = lax.bitcast_convert_type(four, jnp.uint32)
        return [words[:, i] for i in range(words.shape[1])]

    def write_words(self, ref: Any, words: Sequence[jax.Array]) -> None:
        four = lax.bitcast_convert_type(jnp.stack(list(words), axis=1), jnp.uint8)
        ref[...] = lax.bitcast_convert_type(four.reshape(THREADS, -1), ref.dtype)

    def write_values(self, ref: Any, values: Sequence[jax.Array]) -> None:
        x = jnp.stack(list(values), axis=1)
        ref[...] = numerics.narrow(x, ref.dtype).astype(ref.dtype)

    def write_scale(self, ref: Any, value: jax.Array, share: int) -> None:
        size = np.dtype(ref.dtype).itemsize
        low = value[::share].astype({1: jnp.uint8, 2: jnp.uint16, 4: jnp.uint32}[size])
        ref[...] = lax.bitcast_convert_type(low, ref.dtype)

    def gather(self, ref: Any, index: jax.Array) -> jax.Array:
        size = np.dtype(ref.dtype).itemsize
        unsigned = {1: jnp.uint8, 2: jnp.uint16, 4: jnp.uint32}[size]
        return lax.bitcast_convert_type(ref[...], unsigned)[index].astype(jnp.uint32)

    def index(self) -> jax.Array:
        return jnp.arange(THREADS, dtype=jnp.int32)

    def full(self, value: Any) -> jax.Array:
        return jnp.full((THREADS,), value, jnp.float32)

    def partner(self, x: jax.Array, distance: int) -> jax.Array:
        return x.reshape(-1, 2, distance)[:, ::-1].reshape(THREADS)

    def divide(self, x: jax.Array, s: jax.Array) -> jax.Array:
        return numerics.divide(x, s)

    def add(self, x: jax.Array, y: jax.Array) -> jax.Array:
        return x + y

    def multiply(self, x: jax.Array, y: jax.Array) -> jax.Array:
        return x * y

    def narrow(self, xs: Sequence[jax.Array], dtype: Any) -> list[jax.Array]:
        return [numerics.narrow(x, dtype) for x in xs]

    def at_most(self, x: jax.Array, bound: float) -> jax.Array:
        x = jnp.abs(x)
        return jnp.where(x < bound, x, jnp.float32(bound))

    def quotients(self, xs: Sequence[jax.Array], s: jax.Array) -> tuple[list[jax.Array], list[jax.Array]]:
        exact = [numerics.divide(x, s) for x in xs]
        return exact, exact

    def integer(self, x: jax.Array) -> jax.Array:
        whole = jnp.where(jnp.isnan(x), jnp.float32(0), jnp.clip(numerics.rne(x), -128, 127))
        return whole.astype(jnp.int32)

    def e4m3(self, four: Sequence[jax.Array]) -> jax.Array:
        codes = [lax.bitcast_convert_type(numerics.e4m3(x), jnp.uint8).astype(jnp.uint32) for x in four]
        return codes[0] | (codes[1] << 8) | (codes[2] << 16) | (codes[3] << 24)

    def from_e4m3(self, word: jax.Array) -> list[jax.Array]:
        codes = [((word >> shift) & 255).astype(jnp.uint8) for shift in (0, 8, 16, 24)]
        return [lax.bitcast_convert_type(c, jnp.float8_e4m3fn).astype(jnp.float32) for c in codes]


def _inlined(
    body: Callable[..., list[ir.Value]], ref: Any, arrays: Sequence[jax.Array], dtypes: Sequence[Any]
) -> list[jax.Array]:
    """Mosaic operations on one thread's entries; `body` is given the ref, if there is one, and them."""

    def run(context: Any, *operands: Any) -> list[mgpu.FragmentedArray]:
        memory = [] if ref is None else [operands[0]]
        entries = [vector.extract(a.registers.item(), [], [0]) for a in operands[len(memory) :]]
        return [_array(v, d) for v, d in zip(body(*memory, *entries), dtypes, strict=True)]

    refs = [] if ref is None else [ref]
    types = (*(plgpu.RefType() for _ in refs), *(_LAYOUT for _ in arrays))
    results = [plgpu.ShapeDtypeStruct((THREADS,), d, _LAYOUT) for d in dtypes]
    return plgpu.inline_mgpu(arg_types=types, return_type=results)(run)(*refs, *arrays)


def _array(value: ir.Value, dtype: Any) -> mgpu.FragmentedArray:
    """A thread's entry as an array `[128]`."""
    register = vector.broadcast(ir.VectorType.get((1,), value.type), value)
    signed = jnp.issubdtype(dtype, jnp.signedinteger) if jnp.issubdtype(dtype, jnp.integer) else None
    return mgpu.FragmentedArray(
        _registers=np.array([register], dtype=object),
        _layout=mgpu.WGStridedFragLayout((THREADS,), 1),
        _is_signed=signed,
    )


def _asm(ptx: str, constraints: str, dtype: Any, *arrays: jax.Array) -> jax.Array:
    """One piece of PTX per thread; `$0` is its result."""

    def body(*entries: ir.Value) -> list[ir.Value]:
        kind = ir.F32Type.get() if dtype == jnp.float32 else ir.IntegerType.get_signless(32)
        return [cast(ir.Value, llvm.inline_asm(kind, list(entries), ptx, constraints))]

    return _inlined(body, None, arrays, [dtype])[0]


def _thread() -> ir.Value:
    return arith.remui(mgpu.thread_idx(), mgpu.c(THREADS, ir.IntegerType.get_signless(32)))


def _row(memory: ir.Value, words: int) -> ir.Value:
    """The address of this thread's row of `words` words."""
    i32 = ir.IntegerType.get_signless(32)
    return _entry(memory, arith.muli(_thread(), mgpu.c(words, i32)), i32)


def _entry(memory: ir.Value, index: ir.Value, kind: ir.Type) -> ir.Value:
    """The address of entry `index` of a global memory region, counted in entries of `kind`."""
    start = llvm.addrspacecast(ir.Type.parse("!llvm.ptr<1>"), memref_ptr(memory))
    return llvm.getelementptr(start.type, start, [index], [_DYNAMIC], kind, llvm.GEPNoWrapFlags.none)


def _aligned(words: int) -> int:
    """Bytes that a row of `words` words is aligned to, as far as one access is wide."""
    return min(16, 4 * (words & -words))
