"""The Walsh-Hadamard transform for Hopper (sm_90): blocks of up to 128 by wgmma, longer ones with XLA's help.

A thread block keeps one matrix `[width, width]` of +1 and -1 in shared memory, its rows times the signs of
those columns, and takes tiles of 64 rows of x through it. bfloat16 and float16 times +-1 are exact, sums are
float32. Blocks below 64 share a matrix of 64 with zeros between them, so that a NaN or an infinity of one
reaches the others.
"""

from __future__ import annotations

import math
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from mojax.kernels.hadamard_matrices import along, factors, sylvester

_ROWS = 64  # of x in a tile: what a warpgroup multiplies at once
_BLOCKS = 264  # two for each multiprocessor
_STAGES = 3  # tiles in flight; two thread blocks fit a multiprocessor

# rows, n, block: rotations of Llama 3.1 8B (hidden, heads, MLP) and Qwen 2.5 7B at decode and prefill
SHAPES = (
    (1, 4096, 128),
    (16, 4096, 64),
    (2048, 4096, 128),
    (2048, 14336, 32),
    (2048, 4096, 4096),
    (33, 14336, 14336),
)


class Tiles(NamedTuple):
    """How a transform is cut.

    Attributes:
      width: columns that are multiplied at once, 64 or 128.
      order: of the Sylvester matrix in them, at most `width`.
      splits: thread blocks that share the rows of one column of tiles.
      steps: tiles of 64 rows that each goes through.
    """

    width: int
    order: int
    splits: int
    steps: int


def tiles(rows: int, n: int, block: int) -> Tiles:
    """The cut of `[rows, n]` in blocks of `block`, which have a factor of a power of two."""
    order = _order(block)
    width = max(order, 64)
    count = -(-rows // _ROWS)
    splits = min(count, max(1, _BLOCKS // (n // width)))
    return Tiles(width, order, splits, -(-count // splits))


def _order(block: int) -> int:
    """The largest Sylvester factor up to 128 of the Hadamard matrix of order `block`."""
    matrices = factors(block) or ()
    twos = math.prod(len(m) for m in matrices if len(m).bit_count() == 1)
    return min(128, twos)


def why_not(x: jax.Array, *, block: int, signs: jax.Array | None = None) -> str | None:
    """Why the kernel cannot take these arguments of `mojax.kernels.hadamard.hadamard`, or None."""
    if x.dtype not in (jnp.bfloat16, jnp.float16):
        return f"x is {x.dtype}, neither bfloat16 nor float16"
    if x.shape[-1] % max(64, _order(block)):
        return f"the last axis is {x.shape[-1]}, no multiple of {max(64, _order(block))}"
    if not x.size:
        return "x is empty"
    return None


def hadamard(x: jax.Array, *, block: int, signs: jax.Array | None = None, interpret: Any = None) -> jax.Array:
    """`mojax.kernels.hadamard.hadamard`."""
    n = x.shape[-1]
    rows = x.reshape(-1, n)
    cut = tiles(rows.shape[0], n, block)
    h = np.kron(np.eye(cut.width // cut.order), sylvester(cut.order))
    matrix = jnp.asarray(h[None], x.dtype)
    if signs is not None:
        matrix = signs.astype(x.dtype).reshape(-1, cut.width, 1) * matrix
    whole = cut.order == block
    # Copies take 8 rows at a time and leave out what lies beyond the end; the interpreter leaves nothing out.
    edge = 8 if interpret is None else cut.splits * cut.steps * _ROWS
    padded = jnp.pad(rows, ((0, max(_ROWS, -(-rows.shape[0] // edge) * edge) - rows.shape[0]), (0, 0)))
    run = _kernel(cut, padded, matrix, block**-0.5, x.dtype if whole else jnp.dtype(jnp.float32), interpret)
    y = run(padded, matrix)[: rows.shape[0]]
    if not whole:
        outer = block // cut.order
        y = y.reshape(rows.shape[0], n // block, outer, cut.order).swapaxes(2, 3)
        y = along(y, factors(outer) or ()).swapaxes(2, 3).astype(x.dtype)
    return y.reshape(x.shape)


def _kernel(cut: Tiles, x: jax.Array, matrix: jax.Array, scale: float, dtype: Any, interpret: Any) -> Any:
    """What multiplies `x [rows, n]` with `matrix [1 or n / width, width, width]`, as `dtype`."""
    columns = 128 // jnp.dtype(dtype).itemsize
    out_transforms = (plgpu.TilingTransform((8, columns)), plgpu.SwizzleTransform(128))
    transforms = (plgpu.TilingTransform((8, 64)), plgpu.SwizzleTransform(128))
    each = matrix.shape[0] > 1

    def body(x_g: Any, matrix_g: Any, y_g: Any, matrix_s: Any, y_s: Any, ready: Any) -> None:
        split, column = lax.axis_index("split"), lax.axis_index("column")
        plgpu.copy_gmem_to_smem(matrix_g.at[column if each else 0], matrix_s, ready)
        plgpu.barrier_wait(ready)

        def step(at: tuple[Any, ...], x_s: Any) -> None:
            def product(acc: Any) -> jax.Array:
                plgpu.wgmma(acc, x_s, matrix_s)
                return acc[...]

            y = pl.run_scoped(product, plgpu.WGMMAAccumulatorRef((_ROWS, cut.width), jnp.float32))
            out = y_s.at[lax.rem(at[0], 2)]
            plgpu.wait_smem_to_gmem(1, wait_read_only=True)  # what was here two steps ago has left
            out[...] = (y * scale).astype(dtype)
            plgpu.commit_smem()
            rows = pl.ds((split * cut.steps + at[0]) * _ROWS, _ROWS)
            plgpu.copy_smem_to_gmem(out, y_g.at[rows, pl.ds(column * cut.width, cut.width)])

        plgpu.emit_pipeline(
            step,
            grid=(cut.steps,),
            in_specs=[
                plgpu.BlockSpec(
                    (_ROWS, cut.width), lambda i: (split * cut.steps + i, column), transforms=transforms
                )
            ],
            max_concurrent_steps=min(_STAGES, cut.steps),
        )(x_g)
        plgpu.wait_smem_to_gmem(0)

    return plgpu.kernel(
        body,
        out_type=jax.ShapeDtypeStruct(x.shape, dtype),
        grid=(cut.splits, x.shape[1] // cut.width),
        grid_names=("split", "column"),
        scratch_types=[
            plgpu.SMEM((cut.width, cut.width), matrix.dtype, transforms=transforms),
            plgpu.SMEM((2, _ROWS, cut.width), dtype, transforms=out_transforms),
            plgpu.Barrier(),
        ],
        compiler_params=plgpu.CompilerParams(lowering_semantics=plgpu.LoweringSemantics.Warpgroup),
        interpret=interpret,
    )
