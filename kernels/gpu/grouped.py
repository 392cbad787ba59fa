"""Rows in groups, each group times an encoded weight of its own, for Hopper: Pallas Mosaic GPU.

The rows are cut into tiles of one height, each within one group; `schedule` finds them on the device, so that
group sizes are data. A thread block takes one tile and some rows of its group's weight, which one warpgroup
fetches by TMA; 1 to 3 others decode 64 rows each in registers (`fragments`), multiply them by wgmma with the
tile, and go on to the next 64. There are thread blocks for as many tiles as any sizes need; those without one
return at once.

TMA finds tiles of shared memory only at multiples of 8 rows, so XLA moves every group's inputs to one. A tile
may end in rows of the next group, in vain: results are written tile after tile, and XLA gathers the rows.
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

from mojax.errors import InputError
from mojax.formats.base import QTensor
from mojax.kernels.gpu.fragments import (
    BYTES,
    COLUMNS,
    MEMORY_REGISTERS,
    ROWS,
    STEP,
    SWIZZLE,
    WARPGROUPS,
    Block,
    after,
    block,
    inputs_spec,
    multiply,
    specs,
)
from mojax.kernels.gpu.weight_only import SHARED, SMS, arrays, permuted, repack, unfit

_INDEXED = "idx" in inspect.signature(plgpu.load).parameters  # before jax 0.11
LINE = 8  # rows of the inputs that lie together in shared memory
HEIGHTS = (8, 16, 32, 64, 128)  # of tiles

# (rows, E, N, K): Qwen3-30B-A3B, 8 experts per token, and Mixtral 8x7B, 2, at 1, 32 and 2048 tokens.
SHAPES = tuple(
    (tokens * each, e, n, k)
    for each, e, matrices in (
        (8, 128, ((768, 2048), (2048, 768))),
        (2, 8, ((14336, 4096), (4096, 14336))),
    )
    for n, k in matrices
    for tokens in (1, 32, 2048)
)


class Tiles(NamedTuple):
    """How a grouped product is cut up.

    Attributes:
      height: rows of the inputs per tile, a multiple of 8.
      warpgroups: that multiply, with 64 rows of the weight each, 1 to 3.
      turns: how often they do so, a thread block.
      stages: pipeline steps that are in shared memory at once.
    """

    height: int
    warpgroups: int
    turns: int
    stages: int


class Schedule(NamedTuple):
    """Tiles of rows, each of one group, in order; int32 `[bound(rows, groups, height)]` but for two.

    Attributes:
      group: which weight.
      first: the tile's first row among those that `source` says, a multiple of 8.
      valid: how many rows are of the group; 0 where there is no such tile.
      source: which row of the inputs comes next, every group's first at a multiple of 8; `[any number]`.
      place: where a row lies among those of all tiles, beyond them if it has no group; `[rows]`.
    """

    group: jax.Array
    first: jax.Array
    valid: jax.Array
    source: jax.Array
    place: jax.Array


def bound(rows: int, groups: int, height: int) -> int:
    """How many tiles of `height` rows there are at most: every group that has rows may waste height - 1."""
    return (rows + min(groups, rows) * (height - 1)) // height


def schedule(sizes: jax.Array, rows: int, height: int) -> Schedule:
    """Cuts the rows of every group into tiles, on the device.

    Args:
      sizes: int32 `[groups]`; what they have beyond `rows` in sum is ignored.
      height: a multiple of 8.
    """
    groups, most = sizes.shape[0], bound(rows, sizes.shape[0], height)
    ends = jnp.minimum(jnp.cumsum(jnp.maximum(sizes, 0), dtype=jnp.int32), rows)
    sizes = jnp.diff(ends, prepend=jnp.zeros(1, jnp.int32))

    def pieces(size: int, n: int) -> tuple[jax.Array, jax.Array, jax.Array]:
        """Groups cut into pieces: each group's first, the group of the first `n`, which number in it."""
        counts = (sizes + (size - 1)) // size
        ends = jnp.cumsum(counts, dtype=jnp.int32)
        piece = lax.iota(jnp.int32, n)
        group = jnp.sum(piece[:, None] >= ends[None], axis=1, dtype=jnp.int32)
        return ends - counts, group, piece - (ends - counts)[jnp.minimum(group, groups - 1)]

    starts, of, nth = pieces(1, rows)
    lines, line_of, line = pieces(LINE, bound(rows, groups, LINE) + height // LINE - 1)
    tiles, tile_of, tile = pieces(height, most)

    real = tile_of < groups
    group = jnp.where(real, tile_of, 0)
    first = jnp.where(real, lines[group] * LINE + tile * height, 0)
    valid = jnp.where(real, jnp.minimum(sizes[group] - tile * height, height), 0)
    row = starts[jnp.minimum(line_of, groups - 1)] + line * LINE
    source = jnp.clip(row[:, None] + lax.iota(jnp.int32, LINE)[None], 0, rows - 1).reshape(-1)
    place = jnp.where(of < groups, tiles[jnp.minimum(of, groups - 1)] * height + nth, most * height)
    return Schedule(group, first, valid, source, place)


def tiles(rows: int, E: int, N: int, K: int, found: Block, itemsize: int = 2, sms: int = SMS) -> Tiles:
    """How to cut `[rows, K]` in E groups times weights `[N, K]`; N a multiple of 64, K of `found.period`.

    Args:
      itemsize: bytes of a number of the result.
    """
    groups, steps = min(E, rows), K // found.k
    scales = {"tile": COLUMNS, "rows": -(-found.k // (found.group or found.k)), "": 0}[found.scale]
    width = scales * (4 + 2 * found.zero)  # bytes at most, per row and step

    def stages(height: int, warpgroups: int) -> int:
        stage = warpgroups * ROWS * (BYTES + width) + height * found.k * 2
        return (SHARED - warpgroups * ROWS * height * itemsize) // stage

    def time(choice: tuple[int, int, int]) -> float:
        """In what an SM's share of the memory bandwidth takes for 64 rows of codes of one step."""
        height, warpgroups, turns = choice
        count = groups * max(1, rows / groups / height + 0.5)  # tiles, as groups differ
        blocks = count * (N // (warpgroups * ROWS * turns))
        busy = min(1, blocks / sms)  # fewer SMs have larger shares
        inputs = height * found.k * 2 / (ROWS * BYTES)
        step = max(
            warpgroups * busy * groups / count,  # the other tiles of a group find its weight in L2,
            (warpgroups + inputs) * busy / 1.3,  # which gives 1.3 times as much
            warpgroups * 0.75,  # decoding
            warpgroups * height * found.k / 15000,  # the tensor core
            2.25,  # fewer warpgroups wait for themselves
        )
        return math.ceil(blocks / sms) * (turns * (steps * step + 1) + 5)  # about 2 us to begin and end

    choices = [
        (height, w, turns)
        for height in HEIGHTS
        for w in WARPGROUPS
        if not N % (w * ROWS) and stages(height, w) > 1
        for turns in range(1, N // (w * ROWS) + 1)
        if not N // (w * ROWS) % turns
    ]
    height, warpgroups, turns = min(choices, key=time)
    return Tiles(height, warpgroups, turns, min(8, stages(height, warpgroups)))


def why_not(x: Any, q: QTensor, sizes: Any, *, dtype: Any, interpret: Any = None) -> str | None:
    """Why `grouped` cannot take these arguments, in one clause, or None."""
    if x.ndim != 2:
        return f"inputs have shape {x.shape}, not [rows, K]"
    if len(q.codes.shape) != 3:
        return f"the weight has batch axes {q.batch}, not one"
    if sizes.shape != q.codes.shape[:1] or sizes.dtype != jnp.int32:
        return f"sizes are {sizes.dtype} {sizes.shape}, not int32 {q.codes.shape[:1]}"
    return unfit(x, q, dtype)


def grouped(
    x: jax.Array,
    q: QTensor,
    sizes: jax.Array,
    *,
    dtype: Any,
    interpret: Any = None,
    cut: Tiles | None = None,
) -> jax.Array:
    """`y[r, N] = (sum_k x[r, k] * w[group(r), N, k]) * after`, summed in float32, rounded once.

    `w` and `after` are `q.format.factored`, as in `weight_only`. Group sizes are data: nothing is compiled or
    waited for when they change, and groups without rows are not read.

    Args:
      x: bfloat16 `[rows, K]`, sorted by group.
      q: `[E, N, K]`, N a multiple of 64; from `weight_only.repack`, else it is repacked on every call.
      sizes: int32 `[E]`, how many rows each group has; rows beyond their sum give zeros.
      dtype: of the result.
      interpret: None, or how to interpret the kernel without a GPU.
      cut: None is that of `tiles`.
    Raises:
      InputError: `why_not` has a reason.
    """
    reason = why_not(x, q, sizes, dtype=dtype, interpret=interpret)
    if reason is not None:
        raise InputError(f"grouped: {reason}; use another implementation for these arguments")
    return _grouped(x, q, sizes, jnp.dtype(dtype), interpret, cut)


@partial(jax.jit, static_argnums=(3, 4, 5), inline=True)
def _grouped(
    x: jax.Array, q: QTensor, sizes: jax.Array, dtype: Any, interpret: Any, cut: Tiles | None
) -> jax.Array:
    found = block(q.format)
    assert found is not None
    rows, (E, N, _) = x.shape[0], q.codes.shape
    if not rows:
        return jnp.zeros((0, N), dtype)
    weight = arrays(repack(q))
    K = weight[0].shape[2] * 8 // q.format.bits
    cut = cut or tiles(rows, E, N, K, found, dtype.itemsize)
    plan = schedule(sizes, rows, cut.height)
    x = permuted(x.at[plan.source].get(mode="promise_in_bounds"), found, K)
    product = _product(cut, found, dtype, interpret)
    y = product(*plan[:3], after(q, found), x if interpret is None else x.T, *weight)
    return y.at[plan.place].get(mode="fill", fill_value=0)


def _product(cut: Tiles, found: Block, dtype: Any, interpret: Any) -> Callable[..., jax.Array]:
    """The kernel, a function of `group`, `first`, `valid`, after, `permuted` inputs and `arrays` of a weight.

    Returns:
      What gives `[tiles * height, N]`.
    """
    simulated = interpret is not None

    def product(*operands: jax.Array) -> jax.Array:
        K, N = operands[4].shape[0 if simulated else 1], operands[5].shape[1]
        parts, steps = N // (cut.warpgroups * ROWS * cut.turns), K // found.k
        made = (cut.warpgroups, cut.height, ROWS)
        order = () if simulated else (plgpu.TilingTransform((8, 128 // dtype.itemsize)), SWIZZLE)
        return plgpu.kernel(
            _block(cut, found, parts, steps, simulated),
            out_type=jax.ShapeDtypeStruct((operands[0].shape[0] * cut.height, N), dtype),
            scratch_types=[
                plgpu.SMEM(made, dtype, transforms=order),
                plgpu.SMEM((cut.warpgroups, ROWS, STEP), jnp.bfloat16) if simulated else None,
            ],
            grid=(operands[0].shape[0] * parts,),
            grid_names=("block",),
            num_threads=cut.warpgroups + 1,
            thread_name="warpgroup",
            compiler_params=plgpu.CompilerParams(lowering_semantics=plgpu.LoweringSemantics.Lane),
            interpret=interpret if simulated else False,
        )(*operands)

    return product


def _block(cut: Tiles, found: Block, parts: int, steps: int, simulated: bool) -> Callable[..., None]:
    """What one thread block does, where N is cut into `parts` of `turns` turns, and K into `steps`."""
    height, wide = cut.height, cut.warpgroups * ROWS

    def kernel(*refs: Any) -> None:
        groups, firsts, valids, scales, x, *weight, out, made, staging = refs
        index = lax.axis_index("block")
        tile, part = lax.div(index, parts), lax.rem(index, parts)  # neighbours share a tile's rows
        group, here = groups[tile], pl.ds(firsts[tile], height)
        warpgroup = lax.axis_index("warpgroup")
        row = warpgroup * ROWS

        def step(indices: Any, x: Any, *rest: Any) -> Any:
            *weight, total = rest
            turn, k = indices

            def add(acc: Any) -> Any:
                multiply(acc, x, weight, found, row, staging.at[warpgroup] if simulated else None)
                return acc[...] if simulated else None

            total = jnp.where(k == 0, 0, total)
            if simulated:  # which begins sums at 0 only
                total += pl.run_scoped(add, plgpu.WGMMAAccumulatorRef((ROWS, height), jnp.float32))
            else:
                total = pl.run_state(add)(plgpu.WGMMAAccumulatorRef.init(total))

            @pl.when(k == steps - 1)
            def _() -> None:
                columns = pl.ds((part * cut.turns + turn) * wide + row, ROWS)
                y = total * _factor(scales, group, columns, height, simulated)
                _write(y, made.at[warpgroup], out.at[pl.ds(tile * height, height), columns], simulated)

            return total

        def context(pipeline: Callable[[Any], Any]) -> None:
            total = jnp.zeros((ROWS, height), jnp.float32)
            pipeline(total if simulated else plgpu.layout_cast(total, plgpu.Layout.WGMMA))
            plgpu.wait_smem_to_gmem(0, wait_read_only=True)

        @pl.when(valids[tile] > 0)
        def _() -> None:
            plgpu.emit_pipeline_warp_specialized(
                step,
                grid=(cut.turns, steps),
                memory_registers=MEMORY_REGISTERS,
                in_specs=[
                    inputs_spec(found, height, lambda _, k: (0, k), interpret=simulated),
                    *specs(found, wide, lambda turn, k: (group, part * cut.turns + turn, k), lead=1),
                ],
                wg_axis="warpgroup",
                num_compute_wgs=cut.warpgroups,
                max_concurrent_steps=cut.stages,
                compute_context=context,
            )(x.at[:, here] if simulated else x.at[here], *weight)

    return kernel


def _factor(scales: Any, group: Any, columns: Any, height: int, simulated: bool) -> Any:
    """What multiplies the sums `[64, height]`: a number, or one per row."""
    if scales.shape[1] == 1:
        return scales[group, 0]
    if simulated:
        factor = scales[group, columns]
    else:
        load: Any = partial(plgpu.load, layout=plgpu.Layout.WGMMA.reduce(1), optimized=False)
        factor = load(scales, (group, columns)) if _INDEXED else load(scales.at[group, columns])
    return lax.broadcast_in_dim(factor, (ROWS, height), (0,))


def _write(y: jax.Array, made: Any, out: Any, simulated: bool) -> None:
    """`y [64, height]` to memory `[height, 64]`, through shared memory that its last copy may still read."""
    plgpu.wait_smem_to_gmem(0, wait_read_only=True)
    y = y.astype(made.dtype)
    if simulated:
        made[...] = y.T
    else:
        made.T[...] = plgpu.layout_cast(y, plgpu.Layout.WGMMA_TRANSPOSED)
    plgpu.commit_smem()
    plgpu.copy_smem_to_gmem(made, out)
