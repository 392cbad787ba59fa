"""The kernel of flash decoding for Hopper (sm_90); `mojax.kernels.gpu.attention` prepares its inputs.

A block takes `depth` slots of one key head and every query row that shares it. It asks for all of its keys
and values at once (TMA), then

    scores^T [64 keys, rows] = keys [64, head_dim] (registers) x q^T (shared memory), per tile of 64 keys
    p^T = exp2(scores^T - maximum over its slots)
    out^T [head_dim, rows]  += values^T (shared memory) x p^T (shared memory), per tile

and writes its maximum, sum and out.
"""

from __future__ import annotations

import inspect
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from mojax.kernels.gpu.cache_codes import KEYS, decoded, interpreted

LINE = 32  # float32 numbers in the 128 bytes that a copy comes in
COLUMNS = 16  # of block scales: the least that a copy takes of a row
_BLOCK = 16  # numbers under one scale
_INDEXED = "idx" in inspect.signature(plgpu.load).parameters  # before jax 0.11
_BY_KEY, _BY_ROW = plgpu.Layout.WGMMA.reduce(1), plgpu.Layout.WGMMA.reduce(0)


class Tiles(NamedTuple):
    """How an attention is cut.

    Attributes:
      depth: slots of a block, a multiple of 64.
      splits: blocks that the slots of one sequence and head are cut into.
      rows: of queries that share a key head, with padding to 8.
    """

    depth: int
    splits: int
    rows: int


class Cache(NamedTuple):
    """Keys or values as the kernel reads them.

    Attributes:
      codes: `[batch, slots, kv_heads, width]`: numbers, E4M3, or uint8 with two E2M1.
      scales: E4M3 `[batch, slots, columns]`, those of all heads, filled up to a multiple of 16; or None.
      after: float32 `[]`, what a number is multiplied by.
    """

    codes: jax.Array
    scales: jax.Array | None
    after: jax.Array

    @property
    def dtype(self) -> Any:
        """What its numbers are multiplied as."""
        return self.codes.dtype if self.codes.dtype.itemsize == 2 else jnp.dtype(jnp.float16)

    @property
    def decoded(self) -> bool:
        """Whether its numbers are made in registers, of codes."""
        return self.codes.dtype.itemsize == 1

    @property
    def packed(self) -> bool:
        """Whether two numbers share a byte."""
        return self.scales is not None

    @property
    def width(self) -> int:
        """Bytes of codes of one slot and head."""
        return self.codes.shape[-1] * self.codes.dtype.itemsize


def kernel(
    cut: Tiles, sizes: tuple[int, int, int], keys: Cache, values: Cache, window: int | None, interpret: Any
) -> Any:
    """The kernel, a function of q, factor, qp, kp, live, codes of keys and of values, then their scales.

    Args:
      sizes: batch, kv_heads, head_dim.
    Returns:
      What gives outs float32 `[batch, kv_heads, splits, rows, head_dim]`, maxima and sums float32 `[batch,
      kv_heads, splits, line]`; splits that are not live are not written.
    """
    batch, kv_heads, size = sizes
    block = _Block(cut, size, keys, values, window, interpret)
    outs = (batch, kv_heads, cut.splits)
    shared = block.shared()

    def body(*refs: Any) -> None:
        inputs = dict(zip(block.inputs(), refs, strict=False))
        o, m, s = refs[len(inputs) : len(inputs) + 3]
        scratch = dict(zip(shared, refs[len(inputs) + 3 :], strict=True))
        place = tuple(lax.axis_index(name) for name in ("sequence", "head", "split"))

        @pl.when(inputs["live"][place[0], place[2]] != 0)
        def _() -> None:
            block.load(inputs, scratch, place)
            block.write(scratch, block.compute(scratch, place[1]), [a.at[place] for a in (o, m, s)])

    line = _lines(cut.rows)
    return plgpu.kernel(
        body,
        out_type=tuple(
            jax.ShapeDtypeStruct((*outs, *shape), jnp.float32)
            for shape in ((cut.rows, size), (line,), (line,))
        ),
        grid=outs[::-1],
        grid_names=("split", "head", "sequence"),
        scratch_types=list(shared.values()),
        compiler_params=plgpu.CompilerParams(lowering_semantics=plgpu.LoweringSemantics.Warpgroup),
        interpret=interpret,
    )


class _Block(NamedTuple):
    """What one block does."""

    cut: Tiles
    size: int
    keys: Cache
    values: Cache
    window: int | None
    interpret: Any

    @property
    def tiles(self) -> range:
        return range(self.cut.depth // KEYS)

    def inputs(self) -> list[str]:
        """Names of what the kernel is given."""
        scales = [f"{name}_scales" for name, c in (("k", self.keys), ("v", self.values)) if c.packed]
        return ["q", "factor", "qp", "kp", "live", "k", "v", *scales]

    def shared(self) -> dict[str, Any]:
        """Shared memory and barriers."""
        n, rows, line, f32 = len(self.tiles), self.cut.rows, _lines(self.cut.rows), jnp.float32
        keys, values = self.keys, self.values
        found = {
            "q": _tiled((rows, self.size), keys.dtype),
            "factor": plgpu.SMEM((line,), f32),
            "qp": plgpu.SMEM((line,), jnp.int32),
            "kp": plgpu.SMEM((self.cut.depth,), jnp.int32),
            "k": _codes(n, keys),
            "v": _codes(n, values),
            "p": _tiled((rows, KEYS), values.dtype),
            "o": _tiled((rows, self.size), f32),
            "m": plgpu.SMEM((line,), f32),
            "s": plgpu.SMEM((line,), f32),
            "ready": plgpu.Barrier(num_arrivals=4),
            "k_ready": plgpu.Barrier(num_arrivals=1 + keys.packed, num_barriers=n),
            "v_ready": plgpu.Barrier(num_arrivals=1 + values.packed, num_barriers=n),
        }
        for name, c in (("k", keys), ("v", values)):
            if c.scales is not None:
                found[f"{name}_scales"] = plgpu.SMEM((n, KEYS, COLUMNS), c.scales.dtype)
        if values.decoded:
            found["w"] = _tiled((KEYS, self.size), values.dtype)
        return found

    def load(self, inputs: dict[str, Any], shared: dict[str, Any], place: tuple) -> None:
        """Ask for everything the block needs."""
        sequence, head, split = place
        start = split * self.cut.depth
        for name, at in (
            ("q", (sequence, head)),
            ("factor", (sequence, head)),
            ("qp", (sequence,)),
            ("kp", (sequence, pl.ds(start, self.cut.depth))),
        ):
            plgpu.copy_gmem_to_smem(inputs[name].at[at], shared[name], shared["ready"])
        for name, c in (("k", self.keys), ("v", self.values)):
            for i in self.tiles:
                slots, ready = pl.ds(start + i * KEYS, KEYS), shared[f"{name}_ready"].at[i]
                plgpu.copy_gmem_to_smem(inputs[name].at[sequence, slots, head], shared[name].at[i], ready)
                if c.packed:
                    columns = pl.ds(self._first(head) // COLUMNS * COLUMNS, COLUMNS)
                    scales = inputs[f"{name}_scales"].at[sequence, slots, columns]
                    plgpu.copy_gmem_to_smem(scales, shared[f"{name}_scales"].at[i], ready)

    def _first(self, head: Any) -> Any:
        """The first column of a head's block scales."""
        return head * (self.size // _BLOCK)

    def compute(self, shared: dict[str, Any], head: Any) -> tuple[jax.Array, jax.Array, jax.Array]:
        """out `[head_dim, rows]`, maximum and sum `[rows]` of the block."""
        plgpu.barrier_wait(shared["ready"])
        scores = [self._scores(shared, head, i) for i in self.tiles]
        top = scores[0]
        for s in scores[1:]:
            top = jnp.maximum(top, s)
        top = jnp.max(top, axis=0)
        # Rows that see none of the block's keys: exp2(-inf - 0) is 0.
        base = self._spread(jnp.where(top == -jnp.inf, 0.0, top), 1)
        weights = [jnp.exp2(s - base) for s in scores]
        total = weights[0]
        for p in weights[1:]:
            total = total + p
        if self.interpret is None:
            acc = plgpu.WGMMAAccumulatorRef((self.size, self.cut.rows), jnp.float32)
            out = pl.run_scoped(lambda acc: self._accumulate(acc, shared, head, weights), acc)
        else:
            out = jnp.zeros((self.size, self.cut.rows), jnp.float32)
            for i, p in zip(self.tiles, weights, strict=True):
                plgpu.barrier_wait(shared["v_ready"].at[i])
                v = self._decoded(shared, "v", head, i)
                out = out + _dot(v, p.astype(v.dtype), 0, 0)
        return out, top, jnp.sum(total, axis=0)

    def _scores(self, shared: dict[str, Any], head: Any, i: int) -> jax.Array:
        """Scores of the queries on tile `i` of the keys, in powers of two, `[64, rows]`."""
        rows = self.cut.rows
        plgpu.barrier_wait(shared["k_ready"].at[i])
        if self.interpret is None:
            k = self._decoded(shared, "k", head, i) if self.keys.decoded else shared["k"].at[i]

            def product(acc: Any) -> jax.Array:
                plgpu.wgmma(acc, k, _transposed(shared["q"]))
                return acc[...]

            s = pl.run_scoped(product, plgpu.WGMMAAccumulatorRef((KEYS, rows), jnp.float32))
        else:
            s = _dot(self._decoded(shared, "k", head, i), shared["q"][...], 1, 1)
        factor, qp = (
            self._spread(self._read(shared[x], pl.ds(0, rows), _BY_ROW), 1) for x in ("factor", "qp")
        )
        kp = self._spread(self._read(shared["kp"], pl.ds(i * KEYS, KEYS), _BY_KEY), 0)
        seen = (kp >= 0) & (kp <= qp)
        if self.window is not None:
            seen = seen & (kp > qp - self.window)
        return jnp.where(seen, s * factor, -jnp.inf)

    def _accumulate(self, acc: Any, shared: dict[str, Any], head: Any, weights: list[jax.Array]) -> jax.Array:
        """The sum over keys of values times weights, `[head_dim, rows]`."""
        for i, p in zip(self.tiles, weights, strict=True):
            plgpu.barrier_wait(shared["v_ready"].at[i])
            if self.values.decoded:
                shared["w"][...] = self._decoded(shared, "v", head, i)
            p = plgpu.layout_cast(p.astype(self.values.dtype), plgpu.Layout.WGMMA_TRANSPOSED)
            _transposed(shared["p"])[...] = p
            plgpu.commit_smem()
            v = shared["w"] if self.values.decoded else shared["v"].at[i]
            plgpu.wgmma(acc, _transposed(v), _transposed(shared["p"]))
            plgpu.wgmma_wait(0)
        return acc[...]

    def _decoded(self, shared: dict[str, Any], name: str, head: Any, i: int) -> jax.Array:
        """A tile of keys or values in registers, `[64, head_dim]`, its columns in their order."""
        c = {"k": self.keys, "v": self.values}[name]
        codes, scales = shared[name][i], None
        if c.packed:
            columns = pl.ds(lax.rem(self._first(head), COLUMNS), self.size // _BLOCK)
            scales = shared[f"{name}_scales"][i, :, columns]
        if self.interpret is None:
            return decoded(codes, scales, self.size)
        return interpreted(codes, scales, self.size) if c.decoded else codes

    def write(self, shared: dict[str, Any], found: tuple, outputs: list[Any]) -> None:
        """Copy a block's out, maximum and sum to memory."""
        out, top, total = found
        if self.interpret is None:
            out = plgpu.layout_cast(out, plgpu.Layout.WGMMA_TRANSPOSED)
            _transposed(shared["o"])[...] = out
        else:
            shared["o"][...] = out.T
        shared["m"][pl.ds(0, self.cut.rows)] = top
        shared["s"][pl.ds(0, self.cut.rows)] = total
        plgpu.commit_smem()
        for name, ref in zip("oms", outputs, strict=True):
            plgpu.copy_smem_to_gmem(shared[name], ref)
        plgpu.wait_smem_to_gmem(0)

    def _read(self, ref: Any, at: Any, layout: Any) -> jax.Array:
        if self.interpret is not None:
            return ref[at]
        load: Any = plgpu.load
        return load(ref, at, layout=layout) if _INDEXED else load(ref.at[at], layout=layout)

    def _spread(self, a: jax.Array, axis: int) -> jax.Array:
        """A vector along an axis of `[64, rows]`."""
        return lax.broadcast_in_dim(a, (KEYS, self.cut.rows), (axis,))


def _dot(a: jax.Array, b: jax.Array, i: int, j: int) -> jax.Array:
    """The product over axis `i` of `a` and `j` of `b`, as wgmma sums it; for the interpreter."""
    return lax.dot_general(a, b, (((i,), (j,)), ((), ())), preferred_element_type=jnp.float32)


def _lines(rows: int) -> int:
    return rows + -rows % LINE


def _transposed(ref: Any) -> Any:
    return plgpu.transpose_ref(ref, (1, 0)) if _INDEXED else ref.T


def _codes(n: int, c: Cache) -> Any:
    """Shared memory for `n` tiles of a cache."""
    shape = (n, KEYS, c.codes.shape[-1])
    return plgpu.SMEM(shape, c.codes.dtype) if c.decoded else _tiled(shape, c.codes.dtype)


def _tiled(shape: tuple[int, ...], dtype: Any) -> Any:
    """Shared memory for a matrix that wgmma reads or that is written from its registers."""
    columns = 128 // jnp.dtype(dtype).itemsize
    tiling = plgpu.TilingTransform((8, columns))
    return plgpu.SMEM(shape, dtype, transforms=(tiling, plgpu.SwizzleTransform(128)))
