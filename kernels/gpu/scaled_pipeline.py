"""What thread blocks do for a product of two operands in 8 bits on Hopper: fetch, multiply, scale, write.

A persistent grid; in each thread block one warpgroup fetches tiles by TMA, and one or two multiply them with
wgmma, 64 rows of the inputs each. A pair of thread blocks may share the weight's tiles by multicast.

Scales per block of 128 x 128: every 128 of K are summed by wgmma from zero, then added to float32 registers
times their scales (arXiv 2412.19437, section 3.3.2). Other scales: wgmma sums all of K and the scales
multiply the sums; INT8 sums are exact, FP8 sums keep the 14 bits or so that tensor cores have (ibid.).
"""

from __future__ import annotations

import inspect
import math
from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

GROUP = 128  # of K under one scale; as bytes, what one step of the pipeline takes and one swizzle spans
ROWS = 64  # of the inputs, per compute warpgroup: the M of wgmma
LINE = 128  # bytes of one row of an output piece, at most
_BAND = 8  # row tiles of the inputs that thread blocks go through together, for L2
_WHOLE = (None,) if "idx" in inspect.signature(plgpu.load).parameters else ()  # an index, before jax 0.11


class Tiles(NamedTuple):
    """How a product is cut up.

    Attributes:
      m, n: rows of the inputs and of the weight in a tile of the output.
      stages: how many steps of K are in shared memory at once.
      pair: thread blocks (1 or 2) of a cluster; they have the same tile of the weight.
      clusters: of the grid; each goes through several tiles if there are more.
    """

    m: int
    n: int
    stages: int
    pair: int
    clusters: int


class Call(NamedTuple):
    """What is known of a call when it is compiled. `M` and `N` are those of the padded operands."""

    M: int
    N: int
    K: int
    tiles: Tiles
    block: bool
    dtype: Any
    interpret: Any

    @property
    def groups(self) -> int:
        return self.tiles.m // ROWS

    @property
    def steps(self) -> int:
        return self.K // GROUP

    @property
    def grid(self) -> tuple[int, int]:
        """Tiles along M (of all blocks of a cluster) and along N."""
        return math.ceil(self.M / (self.tiles.m * self.tiles.pair)), math.ceil(self.N / self.tiles.n)

    @property
    def piece(self) -> int:
        """Columns that are written at once."""
        return min(self.tiles.n, LINE // jnp.dtype(self.dtype).itemsize)


def run(call: Call, operands: list[jax.Array]) -> jax.Array:
    """`[M, N]` of inputs `[M, K]`, weight `[<= N, K]`, scales of both and perhaps a bias, as `Call` says.

    Scales are float32: `[1]`, or one per row and one per column of all tiles; per block `[K / 128, rows]` and
    `[ceil(N / 128), K / 128]`. The bias is float32, one per column.
    """
    t, dtype = call.tiles, operands[0].dtype
    swizzle = call.piece * call.dtype.itemsize
    piece = (plgpu.TilingTransform((8, call.piece)), plgpu.SwizzleTransform(swizzle))
    tiled = (plgpu.TilingTransform((8, GROUP)), plgpu.SwizzleTransform(GROUP))
    weight = (t.stages, t.n, GROUP) if call.interpret is None else (t.stages, GROUP, t.n)
    scratch: dict[str, Any] = {
        "x_s": plgpu.SMEM((t.stages, t.m, GROUP), dtype, transforms=tiled),
        "w_s": plgpu.SMEM(weight, dtype, transforms=tiled if call.interpret is None else ()),
        "y_s": plgpu.SMEM((call.groups, 2, ROWS, call.piece), call.dtype, transforms=piece),
        "full": plgpu.Barrier(num_arrivals=2 + call.block, num_barriers=t.stages),
        "free": plgpu.Barrier(num_arrivals=call.groups, num_barriers=t.stages),
    }
    if t.pair > 1:
        scratch["free"] = plgpu.ClusterBarrier(
            collective_axes=("pair",), num_arrivals=call.groups, num_barriers=t.stages
        )
    if call.block:
        scratch["scale_s"] = plgpu.SMEM((t.stages, t.m), jnp.float32)
    return plgpu.kernel(
        partial(_body, call),
        out_type=jax.ShapeDtypeStruct((call.M, call.N), call.dtype),
        grid=(t.clusters,),
        grid_names=("sm",),
        cluster=(t.pair,),
        cluster_names=("pair",),
        num_threads=call.groups + 1,
        thread_name="group",
        scratch_types=scratch,
        compiler_params=plgpu.CompilerParams(lowering_semantics=plgpu.LoweringSemantics.Warpgroup),
        interpret=call.interpret,
    )(*operands)


class _Refs(NamedTuple):
    """What the kernel reads and writes: arrays, tiles in shared memory (`_s`) and barriers."""

    x: Any
    w: Any
    x_scale: Any
    w_scale: Any
    bias: Any
    y: Any
    x_s: Any
    w_s: Any
    y_s: Any
    full: Any
    free: Any
    scale_s: Any = None


def _body(call: Call, *refs: Any, **scratch: Any) -> None:
    x, w, x_scale, w_scale, *bias, y = refs
    r = _Refs(x, w, x_scale, w_scale, bias[0] if bias else None, y, **scratch)
    group = lax.axis_index("group")
    # All registers of a multiprocessor: 40 x 128 + 2 x 232 x 128. One warpgroup has enough without asking.
    registers = call.groups > 1

    @pl.when(group == call.groups)
    def _():
        if registers:
            plgpu.set_max_registers(40, action="decrease")
        _walk(call, partial(_fetch, call, r))
        # The other thread block of a pair arrives at these barriers too: they must be there until it has.
        lax.fori_loop(0, call.tiles.stages, lambda slot, _: plgpu.barrier_wait(r.free.at[slot]), None)

    @pl.when(group < call.groups)
    def _():
        if registers:
            plgpu.set_max_registers(232, action="increase")
        lax.fori_loop(0, call.tiles.stages, lambda slot, _: plgpu.barrier_arrive(r.free.at[slot]), None)
        _walk(call, partial(_multiply, call, r))
        plgpu.wait_smem_to_gmem(0)


def _walk(call: Call, visit: Callable[..., None]) -> None:
    """`visit(row, column, step)` for the tiles of this thread block; `step` counts its steps so far."""
    t, (rows, columns) = call.tiles, call.grid
    other = lax.axis_index("pair") if t.pair > 1 else 0

    @plgpu.nd_loop((rows * columns,), collective_axes="sm")
    def _(info: plgpu.NDLoopInfo):
        (i,) = info.index
        first = lax.div(i, _BAND * columns) * _BAND
        width = lax.min(_BAND, rows - first)
        within = i - first * columns
        row, column = first + lax.rem(within, width), lax.div(within, width)
        row = row * t.pair + other
        visit(row * t.m, column * t.n, info.local_index * call.steps)


def _fetch(call: Call, r: _Refs, row: Any, column: Any, start: Any) -> None:
    """Read the tiles of one tile of the output, a step of K at a time, as slots become free."""
    t = call.tiles
    held = min(t.m, call.M)

    def step(k: Any, _: None) -> None:
        slot, depth = lax.rem(start + k, t.stages), pl.ds(k * GROUP, GROUP)
        full = r.full.at[slot]
        plgpu.barrier_wait(r.free.at[slot])
        plgpu.copy_gmem_to_smem(r.x.at[pl.ds(row, held), depth], r.x_s.at[slot, pl.ds(0, held)], full)
        w = r.w.at[pl.ds(column, t.n), depth] if call.interpret is None else r.w.at[depth, pl.ds(column, t.n)]
        axes = "pair" if t.pair > 1 else None
        plgpu.copy_gmem_to_smem(w, r.w_s.at[slot], full, collective_axes=axes)
        if call.block:
            plgpu.copy_gmem_to_smem(r.x_scale.at[k, pl.ds(row, t.m)], r.scale_s.at[slot], full)

    lax.fori_loop(0, call.steps, step, None)


def _multiply(call: Call, r: _Refs, row: Any, column: Any, start: Any) -> None:
    """Compute 64 rows of one tile of the output and write them."""
    sums = (_sums_by_block if call.block else _sums)(call, r, column, start)
    row = row + lax.axis_index("group") * ROWS
    x_scale = 1.0 if call.block else _load(call, r.x_scale, row, ROWS, axis=0)
    held, pieces = min(ROWS, call.M), call.tiles.n // call.piece
    for i in range(pieces):
        y = sums[:, i * call.piece : (i + 1) * call.piece].astype(jnp.float32)
        first = column + i * call.piece
        if not call.block:
            y = y * _spread(_load(call, r.w_scale, first, call.piece, axis=1), y.shape, 1)
            y = y * _spread(x_scale, y.shape, 0)
        if r.bias is not None:
            y = y + _spread(_load(call, r.bias, first, call.piece, axis=1), y.shape, 1)
        piece = r.y_s.at[lax.axis_index("group"), i % 2]
        # The copy out of this half is done: the last but one, or the last where a tile has a single piece.
        plgpu.wait_smem_to_gmem(min(1, pieces - 1), wait_read_only=True)
        piece[...] = y.astype(call.dtype)
        plgpu.commit_smem()
        out = r.y.at[pl.ds(row, held), pl.ds(first, call.piece)]
        plgpu.copy_smem_to_gmem(piece.at[pl.ds(0, held)], out)


def _sums(call: Call, r: _Refs, column: Any, start: Any) -> jax.Array:
    """`[64, n]` summed by wgmma alone, one product behind the one that was issued last."""
    del column
    stages, mine = call.tiles.stages, pl.ds(lax.axis_index("group") * ROWS, ROWS)

    def product(acc: Any) -> jax.Array:
        def step(k: Any, _: None) -> None:
            slot = lax.rem(start + k, stages)
            plgpu.barrier_wait(r.full.at[slot])
            plgpu.wgmma(acc, r.x_s.at[slot, mine], _weight(call, r, slot))
            plgpu.wgmma_wait(1)

            @pl.when(k > 0)
            def _():
                plgpu.barrier_arrive(r.free.at[lax.rem(start + k - 1, stages)])

        lax.fori_loop(0, call.steps, step, None)
        return acc[...]

    sums = pl.run_scoped(product, plgpu.WGMMAAccumulatorRef((ROWS, call.tiles.n), _sum_dtype(r)))
    plgpu.barrier_arrive(r.free.at[lax.rem(start + call.steps - 1, stages)])
    return sums


def _sums_by_block(call: Call, r: _Refs, column: Any, start: Any) -> jax.Array:
    """`[64, n]` summed in float32 registers; wgmma only sums 128 of K, starting from zero."""
    shape, mine = (ROWS, call.tiles.n), pl.ds(lax.axis_index("group") * ROWS, ROWS)
    block = lax.div(column, GROUP)

    def step(k: Any, sums: jax.Array) -> jax.Array:
        slot = lax.rem(start + k, call.tiles.stages)
        w_scale = r.w_scale[block, k]  # before the wait, so that its latency is hidden
        plgpu.barrier_wait(r.full.at[slot])
        # Read before wgmma, which keeps the four warps in step: one of them frees the slot for all.
        scale = r.scale_s[slot, mine]
        if call.interpret is None:
            scale = plgpu.layout_cast(scale, plgpu.Layout.WGMMA.reduce(1))

        def product(acc: Any) -> jax.Array:
            plgpu.wgmma(acc, r.x_s.at[slot, mine], _weight(call, r, slot))
            return acc[...]

        part = pl.run_scoped(product, plgpu.WGMMAAccumulatorRef(shape, jnp.float32))
        plgpu.barrier_arrive(r.free.at[slot])
        return sums + part * _spread(scale * w_scale, shape, 0)

    zero = jnp.zeros(shape, jnp.float32)
    if call.interpret is None:
        zero = plgpu.layout_cast(zero, plgpu.Layout.WGMMA)
    return lax.fori_loop(0, call.steps, step, zero)


def _weight(call: Call, r: _Refs, slot: Any) -> Any:
    """The tile of the weight as wgmma takes it, `[K, n]`."""
    return r.w_s.at[slot].T if call.interpret is None else r.w_s.at[slot]


def _sum_dtype(r: _Refs) -> Any:
    return jnp.int32 if r.x_s.dtype == jnp.int8 else jnp.float32


def _load(call: Call, a: Any, first: Any, size: int, axis: int) -> jax.Array:
    """`a[first : first + size]`, or the one number in `a` as a scalar, ready for rows (0) or columns (1)."""
    if a.shape == (1,):
        return a[0]
    part = a.at[pl.ds(first, size)]
    if call.interpret is not None:
        return part[...]
    return plgpu.load(part, *_WHOLE, layout=plgpu.Layout.WGMMA.reduce(1 - axis), optimized=False)


def _spread(a: Any, shape: tuple[int, ...], axis: int) -> jax.Array:
    return lax.broadcast_in_dim(a, shape, (axis,) if a.ndim else ())
