"""Block-scaled matmul for Blackwell (sm_100a): inputs and weight both in NVFP4, MXFP4 or MXFP8.

Lowered, and assembled for sm_100a, but never run: no such device was at hand. Checked without one are the
arrays that the kernel is given, and its pipeline with another product in place of the scaled one.

    y[m, n] = (sum over k of x[m, k] * w[n, k]) * after + bias[n]

A block computes a tile of 128 x 128. Each step of its loop takes codes and scales of `depth` numbers that TMA
brought, copies the scales on to tensor memory, and issues `tcgen05.mma` with block scales: kind mxf4nvf4 with
E4M3 scales per 16, mxf4 with E8M0 per 32, or mxf8f6f4 with E8M0 per 32 (PTX ISA 8.7, "tcgen05.mma"). Sums
stay in tensor memory, float32, until they are multiplied by the outer scales and rounded once.
"""

from __future__ import annotations

import inspect
import math
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from mojax.errors import InputError
from mojax.formats.base import QTensor
from mojax.kernels.gpu.scaled_operands import Kind, after, arranged, elements, kind, matrix, scale_rows, unfit
from mojax.kernels.gpu.scaled_operands import repack as repack
from mojax.kernels.gpu.scaled_operands import restore as restore
from mojax.kernels.gpu.scaled_operands import scale_layout as scale_layout

_TILE = 128  # rows of x and of the weight in a tile: what one instruction multiplies
_COLUMNS = 64  # of a tile that leave at a time
_GROUP = 8  # tiles of x that meet a tile of the weight before the next one is taken
_SHARED = 112 * 1024  # bytes: half of what a multiprocessor has, so that two blocks overlap

# M, N, K of linears in Llama 3 8B and 70B and Qwen 3 32B, at decode and prefill
SHAPES = (
    (16, 6144, 4096),
    (64, 4096, 14336),
    (512, 28672, 4096),
    (4096, 8192, 8192),
    (1000, 25600, 5120),
)


class Plan(NamedTuple):
    """How a product is cut.

    Attributes:
      grid: tiles along M and N.
      steps: of the loop over K.
      depth: numbers of K in a step.
      stages: steps that are in flight.
      rows: of the result that a tile writes, at most 128.
      kind: how codes and scales are read.
    """

    grid: tuple[int, int]
    steps: int
    depth: int
    stages: int
    rows: int
    kind: Kind

    @property
    def width(self) -> int:
        """Bytes of codes of one row in a step; also the swizzle."""
        return self.depth * self.kind.bits // 8

    @property
    def columns(self) -> int:
        """Scales of one row in a step."""
        return self.depth // self.kind.block


def plan(M: int, N: int, K: int, kind: Kind) -> Plan:
    """The cut of `[M, K]` by `[N, K]`; N and K are multiples of 128."""
    longest = 128 * 8 // kind.bits  # 128 bytes, the widest swizzle
    depth = longest if K % longest == 0 else 128
    rows = min(_TILE, -(-M // 8) * 8)
    p = Plan((-(-M // _TILE), N // _TILE), K // depth, depth, 1, rows, kind)
    return p._replace(stages=min(p.steps, _SHARED // (2 * _TILE * (p.width + p.columns))))


def why_not(x: Any, q: QTensor, *, dtype: Any, bias: Any = None) -> str | None:
    """Why `block_scaled` cannot take these arguments, or None."""
    reason = unfit(x, q)
    if reason:
        return reason
    N, K = matrix(q)
    for name, found in (("K", K), ("N", N)):
        if found % 128 or not found:
            return f"{name} = {found} is no multiple of 128"
    if jnp.dtype(dtype) not in (jnp.bfloat16, jnp.float16, jnp.float32):
        return f"the result is {jnp.dtype(dtype).name}"
    if bias is not None and bias.shape != (N,):
        return f"the bias has shape {bias.shape}, not ({N},)"
    return None


def block_scaled(
    x: QTensor, q: QTensor, *, dtype: Any, bias: jax.Array | None = None, interpret: Any = None
) -> jax.Array:
    """Inputs times weight, both quantized to one format: `dtype [M, N]`. For compute capability 10.0.

    Args:
      x: inputs `[M, K]` in NVFP4, MXFP4 or MXFP8.
      q: the weight `[N, K]` in the same format, as files keep it or from `repack`, which saves arranging its
        scales at each call. N and K are multiples of 128.
      dtype: bfloat16, float16 or float32; the only rounding.
      bias: `[N]`, added in float32.
      interpret: InterpretGPUParams of jax 0.11 or later, to run on a CPU: codes are then decoded and meet in
        an instruction without scales.
    Raises:
      InputError: what `why_not` says.
    """
    reason = why_not(x, q, dtype=dtype, bias=bias)
    if reason:
        raise InputError(f"block_scaled: {reason}")
    (M, K), (N, _) = matrix(x), matrix(q)
    p = plan(M, N, K, kind(q))
    return _kernel(p, jnp.dtype(dtype), interpret)(*operands(x, q, bias))[:M]


def operands(x: QTensor, q: QTensor, bias: jax.Array | None = None) -> list[jax.Array]:
    """What the kernel is given: codes and scales of x, those of the weight, `after`, and the bias, if any.

    Codes are `[M, K]` and `[N, K]`, of float4_e2m1fn or float8_e4m3fn, M filled up to a multiple of 128 by
    zeros; scales are in `scale_layout`; the rest is float32 `[1]` and `[N]`.
    """
    found = [elements(x, _TILE), arranged(x), elements(q), arranged(q), after(x, q).reshape(1)]
    return found if bias is None else [*found, jnp.asarray(bias).astype(jnp.float32)]


def _load(ref: Any, layout: Any) -> jax.Array:
    """A row as registers of this layout hold it; jax 0.10 wants an index, later ones take none."""
    load: Callable[..., jax.Array] = plgpu.load
    index = ((),) if "idx" in inspect.signature(load).parameters else ()
    return load(ref, *index, layout=layout, optimized=False)


def _tiled(shape: tuple[int, ...], dtype: Any, swizzle: int = 128) -> Any:
    """Shared memory in the swizzled tiles that TMA writes and the tensor core reads."""
    bits = 4 if dtype == jnp.float4_e2m1fn else 8 * jnp.dtype(dtype).itemsize
    tiling = plgpu.TilingTransform((8, swizzle * 8 // bits))
    return plgpu.SMEM(shape, dtype, transforms=(tiling, plgpu.SwizzleTransform(swizzle)))


def _scratch(p: Plan, dtype: Any, interpret: bool) -> dict[str, Any]:
    """The memory of a block."""
    codes = _tiled((p.stages, _TILE, p.depth), p.kind.codes, p.width)
    scales = plgpu.SMEM((p.stages, 1, p.columns // 4, 32, 16), p.kind.scales)
    # The result takes the place of the codes of x when all have been read.
    result = _tiled((_TILE // _COLUMNS, _TILE, _COLUMNS), dtype)
    found = {
        "views": plgpu.RefUnion(codes, result),
        "w_codes": codes,
        "x_tiles": scales,
        "w_tiles": scales,
        "sums": plgpu.TMEM((_TILE, _TILE), jnp.float32),
        "filled": plgpu.Barrier(num_arrivals=4, num_barriers=p.stages),
        "used": plgpu.Barrier(num_barriers=p.stages, orders_tensor_core=True),
    }
    if interpret:
        values = plgpu.SMEM((p.stages, _TILE, p.depth), jnp.float32)
        return found | {"x_values": values, "w_values": values}
    layout = plgpu.TMEMLayout.SCALES_LAYOUT
    tensor = plgpu.TMEM((_TILE, p.stages * p.columns), p.kind.scales, layout=layout)
    return found | {"x_tensor": tensor, "w_tensor": tensor}


def _kernel(p: Plan, dtype: Any, interpret: Any) -> Callable[..., jax.Array]:
    """The kernel of a plan, a function of `operands`."""
    multiply = _multiply if interpret is None else _decode_and_multiply

    def body(
        x: Any, x_scales: Any, w: Any, w_scales: Any, after: Any, *rest: Any, views: Any, **memory: Any
    ) -> None:
        memory["x_codes"], memory["result"] = views
        m, n = plgpu.planar_snake(lax.axis_index("block"), p.grid, 0, _GROUP)
        filled, used = memory["filled"], memory["used"]

        def fetch(step: Any) -> None:
            slot = lax.rem(step, p.stages)
            k, tiles = pl.ds(step * p.depth, p.depth), pl.ds(step * (p.columns // 4), p.columns // 4)
            for source, target in (
                (x.at[pl.ds(m * _TILE, _TILE), k], memory["x_codes"]),
                (w.at[pl.ds(n * _TILE, _TILE), k], memory["w_codes"]),
                (x_scales.at[pl.ds(m, 1), tiles], memory["x_tiles"]),
                (w_scales.at[pl.ds(n, 1), tiles], memory["w_tiles"]),
            ):
                plgpu.copy_gmem_to_smem(source, target.at[slot], filled.at[slot])

        def advance(step: Any, _: None) -> None:
            slot = lax.rem(step, p.stages)
            plgpu.barrier_wait(filled.at[slot])
            multiply(p, memory, step, slot)

            # While this product runs, the memory of the one before it is filled again.
            @pl.when((step > 0) & (step - 1 + p.stages < p.steps))
            def _() -> None:
                plgpu.barrier_wait(used.at[lax.rem(step - 1, p.stages)])
                fetch(step - 1 + p.stages)

        for step in range(p.stages):
            fetch(jnp.int32(step))
        lax.fori_loop(0, p.steps, advance, None)
        plgpu.barrier_wait(used.at[(p.steps - 1) % p.stages])  # products end in order: this is the last
        _finish(p, memory, dtype, after, rest, (m, n))

    return plgpu.kernel(
        body,
        out_type=jax.ShapeDtypeStruct((p.grid[0] * p.rows, p.grid[1] * _TILE), dtype),
        grid=(math.prod(p.grid),),
        grid_names=("block",),
        scratch_types=_scratch(p, dtype, interpret is not None),
        compiler_params=plgpu.CompilerParams(lowering_semantics=plgpu.LoweringSemantics.Lane),
        interpret=interpret,
    )


def _multiply(p: Plan, memory: dict[str, Any], step: Any, slot: Any) -> None:
    """Add the product of one step. The tensor core takes a product after the copies that its thread began."""
    columns = pl.ds(slot * p.columns, p.columns)
    x_scales, w_scales = (memory[name].at[:, columns] for name in ("x_tensor", "w_tensor"))
    plgpu.async_copy_scales_to_tmem(memory["x_tiles"].at[slot], x_scales)
    plgpu.async_copy_scales_to_tmem(memory["w_tiles"].at[slot], w_scales)
    plgpu.tcgen05_mma(
        memory["sums"],
        memory["x_codes"].at[slot],
        memory["w_codes"].at[slot].transpose((1, 0)),
        memory["used"].at[slot],
        a_scale=x_scales,
        b_scale=w_scales,
        accumulate=step > 0,
    )


def _decode_and_multiply(p: Plan, memory: dict[str, Any], step: Any, slot: Any) -> None:
    """`_multiply` where there is no tensor core with scales."""
    for name in ("x", "w"):
        scales = scale_rows(memory[f"{name}_tiles"][slot]).astype(jnp.float32)
        values = memory[f"{name}_codes"][slot].astype(jnp.float32)
        memory[f"{name}_values"][slot] = values * jnp.repeat(scales, p.kind.block, axis=1)
    plgpu.commit_smem()
    x, w = memory["x_values"].at[slot], memory["w_values"].at[slot].transpose((1, 0))
    plgpu.tcgen05_mma(memory["sums"], x, w, memory["used"].at[slot], accumulate=step > 0)


def _finish(p: Plan, memory: dict[str, Any], dtype: Any, after: Any, rest: Any, at: tuple[Any, Any]) -> None:
    """Sums times `after` plus the bias to tile `at` of the result; `rest` is the bias, if any, and result."""
    *bias, out = rest
    result = memory["result"]
    m, n = at
    scale = after[0]
    for i in range(_TILE // _COLUMNS):
        y = plgpu.async_load_tmem(memory["sums"].at[:, pl.ds(i * _COLUMNS, _COLUMNS)]) * scale
        if bias:
            row = bias[0].at[pl.ds(n * _TILE + i * _COLUMNS, _COLUMNS)]
            added = lax.broadcast_in_dim(_load(row, plgpu.Layout.TCGEN05.reduce(0)), y.shape, (1,))
            y = y + plgpu.layout_cast(added, plgpu.Layout.TCGEN05)
        result[i] = y.astype(dtype)
    plgpu.commit_smem()
    for i in range(_TILE // _COLUMNS):
        columns = pl.ds(n * _TILE + i * _COLUMNS, _COLUMNS)
        plgpu.copy_smem_to_gmem(result.at[i, pl.ds(0, p.rows)], out.at[pl.ds(m * p.rows, p.rows), columns])
    plgpu.wait_smem_to_gmem(0)
