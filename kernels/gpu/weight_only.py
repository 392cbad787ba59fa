"""Few inputs times an encoded weight for Hopper: Pallas Mosaic GPU.

A product with few rows of inputs takes as long as its weight takes to be read. Each thread block reads some
rows of the weight and a part of K, one warpgroup by TMA; 1 to 3 others decode 64 rows each in registers
(`fragments`) and multiply them by wgmma with all the inputs. Sums over the parts of K go to memory in
float32; XLA adds them in order, scales, transposes and rounds them in one fusion, the same bits in every run.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from mojax.errors import InputError
from mojax.formats.base import QTensor
from mojax.kernels.gpu.fragments import (
    BYTES,
    COLUMNS,
    FIELDS,
    LINE,
    MEMORY_REGISTERS,
    ROWS,
    STEP,
    WARPGROUPS,
    Block,
    after,
    block,
    depth,
    inputs_spec,
    moved,
    multiply,
    refused,
    specs,
    words,
)

ORDER = "weight_only"
SMS = 132  # multiprocessors of an H100 SXM or H200
SHARED = 225 * 1024  # bytes of shared memory for tiles: 227 KiB less what barriers and alignment need
DTYPES = (jnp.bfloat16, jnp.float16, jnp.float32)
_PER_BLOCK = 128  # rows that share a scale of fp8 per block

# (M, N, K): attention output, MLP up and MLP down of 8B and 70B models, and gpt-oss.
SHAPES = tuple(
    (m, n, k)
    for n, k in ((4096, 4096), (28672, 4096), (4096, 14336), (8192, 8192), (2880, 2880))
    for m in (1, 16, 64, 200)
)


class Tiles(NamedTuple):
    """How a product is cut up.

    Attributes:
      m: rows of the inputs per thread block, a multiple of 8.
      warpgroups: that multiply, with 64 rows of the weight each, 1 to 3.
      splits: parts of K, summed afterwards; the last may be smaller.
      pair: thread blocks (1 or 2) of a cluster, which share their inputs by multicast.
      stages: pipeline steps that are in shared memory at once.
    """

    m: int
    warpgroups: int
    splits: int
    pair: int
    stages: int


def tiles(M: int, N: int, K: int, found: Block, sms: int = SMS) -> Tiles:
    """How to cut inputs `[M, K]` times a weight `[N, K]`, N a multiple of 64 and K of `found.period`."""
    unit = 8 if M <= 32 else 16  # multicast halves m, and half must be a multiple of 8
    m = -(-M // (unit * -(-M // 64))) * unit  # more than 64 do not fit beside the weight: each m decodes it
    steps = K // found.k
    inputs = m * found.k * 2 / (ROWS * BYTES)  # bytes of a step, in those of 64 rows of codes

    def pair(warpgroups: int) -> int:
        """Two where x is as much of what comes from L2 as the weight."""
        return 2 if unit == 16 and not N % (2 * warpgroups * ROWS) else 1

    def time(choice: tuple[int, int]) -> float:
        """In what an SM's share of the memory bandwidth takes for 64 rows of codes of one step."""
        warpgroups, splits = choice
        blocks = N // (warpgroups * ROWS) * splits * -(-M // m)
        busy = min(1, blocks / sms)  # fewer SMs have larger shares
        step = max(
            warpgroups * busy,
            (warpgroups + inputs / pair(warpgroups)) * busy / 1.3,  # L2 gives 1.3 times as much
            warpgroups * 0.95,  # decoding: 3 instructions per weight, at 0.8 per cycle and scheduler
            2.25,  # fewer warpgroups wait for themselves
        )
        sums = splits * N * m * 4 / (ROWS * BYTES * sms)  # written; still in L2 when read again
        return -(-blocks // sms) * (-(-steps // splits) * step + 6) + sums  # about 2 us to begin and end

    splits = sorted({-(-steps // part) for part in range(1, steps + 1)})
    choices = [(w, s) for w in WARPGROUPS if not N % (w * ROWS) for s in splits]
    warpgroups, splits = min(choices, key=time)
    floats = 6 if found.element == "int4" else 4  # bytes at most, of a scale and a zero point
    width = {"": 0, "rows": floats * 4, "tile": COLUMNS * (1 if found.element == "e2m1" else floats)}
    stage = warpgroups * ROWS * (BYTES + width[found.scale]) + m * found.k * 2
    return Tiles(m, warpgroups, splits, pair(warpgroups), max(2, min(8, SHARED // stage)))


def why_not(x: Any, q: QTensor, *, dtype: Any, bias: Any = None, interpret: Any = None) -> str | None:
    """Why `weight_only` cannot take these arguments, in one clause, or None."""
    if x.ndim != 2 or not x.shape[0]:
        return f"inputs have shape {x.shape}, not [M, K]"
    if len(q.codes.shape) != 2:
        return f"the weight has batch axes {q.batch}"
    if bias is not None and bias.shape != (q.codes.shape[0],):
        return f"bias has shape {bias.shape}, not {(q.codes.shape[0],)}"
    return unfit(x, q, dtype)


def unfit(x: Any, q: QTensor, dtype: Any) -> str | None:
    """Why inputs `[rows, K]` and a weight `[..., N, K]` cannot be multiplied in registers, or None."""
    if x.dtype != jnp.bfloat16:
        return f"inputs are {x.dtype}, not bfloat16"
    if jnp.dtype(dtype) not in DTYPES:
        return f"the result is {jnp.dtype(dtype)}, not bfloat16, float16 or float32"
    if q.order not in ("", ORDER):
        return f"the weight's codes are in the order {q.order!r}"
    if (reason := refused(q)) is not None:
        return reason
    if x.shape[1] != depth(q):
        return f"inputs {x.shape} and a weight of K = {depth(q)} do not fit"
    return None


def repack(q: QTensor) -> QTensor:
    """The weight in the order "weight_only", to be done once when it is loaded.

    Codes keep their number of bytes but for zeros at the end of K, which becomes a multiple of what one tile
    of scales covers (256 for nvfp4, 512 for groups of 32). Scales: see `arrays`. numpy stays numpy.

    Args:
      q: matrices `[*batch, N, K]`.
    Returns:
      `q` itself where it needs no other order, has one, or this kernel cannot take it.
    """
    found = block(q.format)
    if q.order or found is None or refused(q) is not None:
        return q
    xp, per = _module(q), 8 // q.format.bits
    K = -(-depth(q) // found.period) * found.period
    if not found.scale and K == depth(q):
        return q
    codes = _padded(xp, q.codes, K // per)
    if found.scale == "tile":
        codes = _as_bytes(xp, _swapped(xp, words(codes), (COLUMNS, found.group // found.per)))
        codes = _bits_in_place(xp, codes) if found.element == "e2m1" else codes
    scales = dict(q.scales)
    for level in ("inner", "zero") if found.scale else ():
        if level in scales:
            scales[level] = _scales_in_order(xp, scales[level], found, K, codes.shape[-2])
    return dataclasses.replace(q, codes=codes, scales=scales, order=ORDER)


def restore(q: QTensor) -> QTensor:
    """The weight as files keep it, byte for byte: the inverse of `repack`. numpy stays numpy."""
    found = block(q.format)
    if q.order != ORDER or found is None:
        return q
    xp, per = _module(q), 8 // q.format.bits
    codes = q.codes
    if found.scale == "tile":
        codes = _bits_restored(xp, codes) if found.element == "e2m1" else codes
        codes = _as_bytes(xp, _swapped(xp, words(codes), (found.group // found.per, COLUMNS)))
    scales = dict(q.scales)
    for level in ("inner", "zero") if found.scale else ():
        if level in scales:
            scales[level] = _scales_restored(xp, scales[level], found, depth(q))
    if "zero" in scales:
        scales["zero"] = scales["zero"].astype(jnp.int8)
    return dataclasses.replace(q, codes=codes[..., : depth(q) // per], scales=scales, order="")


def permuted(x: jax.Array, block: Block, k: int) -> jax.Array:
    """Inputs `[..., K]` in the order in which the fragments have K, padded with zeros to `[..., k]`.

    Args:
      k: a multiple of `block.period`: what `arrays` of the weight have of K.
    """
    x = jnp.pad(x, [(0, 0)] * (x.ndim - 1) + [(0, k - x.shape[-1])])
    if block.scale == "tile":  # column, uint16 within its group, code within that
        parts, order = (COLUMNS, block.group // block.per, block.per), (1, 2, 0)
    else:  # uint16, code within it
        parts, order = (COLUMNS, block.per), (1, 0)
    x = x.reshape(*x.shape[:-1], -1, *parts)
    lead = x.ndim - len(parts)
    return x.transpose(*range(lead), *(lead + i for i in order)).reshape(*x.shape[: lead - 1], k)


def arrays(q: QTensor) -> tuple[jax.Array, ...]:
    """What a kernel reads of a weight in the order "weight_only": the refs that `specs` are for.

    Codes `[*batch, N, bytes]`. Scales and zero points (bfloat16) "tile" `[*batch, N / 8, tiles, 128]`, a
    contiguous tile `[8, 16]` each, "rows" `[*batch, K / group, N]`.
    """
    inside = [q.scales[level] for level in ("inner", "zero") if level in q.scales]
    found = block(q.format)
    return (q.codes, *inside) if found is not None and found.scale else (q.codes,)


def _module(q: QTensor) -> Any:
    return np if isinstance(q.codes, np.ndarray) else jnp


def _padded(xp: Any, a: Any, width: int) -> Any:
    """`a` with zeros at the end of its last axis."""
    more = xp.zeros((*a.shape[:-1], width - a.shape[-1]), a.dtype)
    return xp.concatenate([a, more], -1) if width > a.shape[-1] else a


def _swapped(xp: Any, a: Any, parts: tuple[int, int]) -> Any:
    """The last axis cut into pieces of two parts each, and the parts swapped."""
    return xp.swapaxes(a.reshape(*a.shape[:-1], -1, *parts), -2, -1).reshape(a.shape)


def _as_bytes(xp: Any, found: Any) -> Any:
    """The inverse of `fragments.words`."""
    low, high = (found & 255).astype(np.uint8), (found >> 8).astype(np.uint8)
    return xp.stack([low, high], -1).reshape(*found.shape[:-1], -1)


def _bits_in_place(xp: Any, codes: Any) -> Any:
    """E2M1 codes from file order to `FIELDS`, within every uint16."""
    found = words(codes)
    made = found & 0
    for i, fields in enumerate(FIELDS["e2m1"]):
        code = found >> 4 * i
        pattern = (code & 8) << 12 | (code & 7) << 6
        made = made | moved(pattern, tuple((-left, _shifted(mask, -left)) for left, mask in fields))
    return _as_bytes(xp, made)


def _bits_restored(xp: Any, codes: Any) -> Any:
    found = words(codes)
    made = found & 0
    for i, fields in enumerate(FIELDS["e2m1"]):
        pattern = moved(found, fields)
        made = made | ((pattern >> 12 & 8) | (pattern >> 6 & 7)) << 4 * i
    return _as_bytes(xp, made)


def _shifted(mask: int, left: int) -> int:
    return (mask << left if left >= 0 else mask >> -left) & 0xFFFF


def _scales_in_order(xp: Any, s: Any, found: Block, K: int, N: int) -> Any:
    """Scales or zero points `[*, N, groups]` as `arrays` says."""
    if s.dtype == np.int8:
        s = s.astype(jnp.bfloat16)
    if found.element == "e4m3":
        s = xp.repeat(s, _PER_BLOCK, axis=-2)[..., :N, :]
    s = _padded(xp, s, K // found.group)
    if found.scale == "rows":
        return xp.swapaxes(s, -1, -2)
    s = s.reshape(*s.shape[:-2], N // LINE, LINE, -1, COLUMNS)
    return xp.swapaxes(s, -3, -2).reshape(*s.shape[:-4], N // LINE, -1, LINE * COLUMNS)


def _scales_restored(xp: Any, s: Any, found: Block, K: int) -> Any:
    if found.scale == "rows":
        s = xp.swapaxes(s, -1, -2)
    else:
        s = xp.swapaxes(s.reshape(*s.shape[:-1], LINE, COLUMNS), -3, -2)
        s = s.reshape(*s.shape[:-4], s.shape[-4] * LINE, -1)
    if found.element == "e4m3":
        s = s[..., ::_PER_BLOCK, :]
    return s[..., : -(-K // found.group)]


def weight_only(
    x: jax.Array, q: QTensor, *, dtype: Any, bias: jax.Array | None = None, interpret: Any = None
) -> jax.Array:
    """`y[M, N] = (sum_k x[M, k] * w[N, k]) * after + bias`, summed in float32, rounded once.

    `w` and `after` are `q.format.factored`: exact for nvfp4, mxfp4, int8 and fp8 per tensor or channel. For
    int4 and fp8 per block w is rounded to bfloat16, from a float32 scale as from 16 of its bits. An E4M3
    code of NaN counts as 480.

    Args:
      x: bfloat16 `[M, K]`, any M; tuned for up to 64.
      q: `[N, K]`, N a multiple of 64; from `repack`, else it is repacked on every call.
      dtype: of the result.
      bias: `[N]`, or None.
      interpret: None, or how to interpret the kernel without a GPU.
    Raises:
      InputError: `why_not` has a reason.
    """
    reason = why_not(x, q, dtype=dtype, bias=bias, interpret=interpret)
    if reason is not None:
        raise InputError(f"weight_only: {reason}; use another implementation for these arguments")
    return _weight_only(x, q, bias, jnp.dtype(dtype), interpret)


@partial(jax.jit, static_argnums=(3, 4), inline=True)
def _weight_only(x: jax.Array, q: QTensor, bias: jax.Array | None, dtype: Any, interpret: Any) -> jax.Array:
    found = block(q.format)
    assert found is not None
    scale = after(q, found)[:, None]
    weight = arrays(repack(q))
    M, K = x.shape[0], weight[0].shape[1] * 8 // q.format.bits
    cut = tiles(M, weight[0].shape[0], K, found)
    if interpret is not None:
        cut = cut._replace(pair=1)  # the interpreter has no clusters
    x = permuted(jnp.pad(x, ((0, -M % cut.m), (0, 0))), found, K)
    parts = sums(cut, found, interpret)(x if interpret is None else x.T, *weight)
    y = jnp.sum(parts, axis=0)[:, :M] * scale
    if bias is not None:
        y = y + bias.astype(jnp.float32)[:, None]
    return y.T.astype(dtype)


def sums(cut: Tiles, found: Block, interpret: Any = None) -> Callable[..., jax.Array]:
    """The kernel: `permuted` inputs `[M, K]` and the `arrays` of a weight to sums, float32 `[splits, N, M]`.

    M is a multiple of `cut.m`. Interpreted, inputs are `[K, M]`.
    """

    def run(x: jax.Array, *weight: jax.Array) -> jax.Array:
        K, M = x.shape if interpret is not None else x.shape[::-1]
        N, rows = weight[0].shape[0], cut.warpgroups * ROWS
        every = K // found.k
        most = -(-every // cut.splits)

        def kernel(*refs: Any) -> None:
            *inputs, out, staging = refs
            m, n, split = (lax.axis_index(name) for name in ("m", "n", "split"))
            if cut.pair > 1:
                n = n * cut.pair + lax.axis_index("pair")
            warpgroup = lax.axis_index("warpgroup")
            row = warpgroup * ROWS

            def step(_: Any, x: Any, *rest: Any) -> Any:
                *weight, acc = rest
                multiply(acc, x, weight, found, row, None if staging is None else staging.at[warpgroup])
                return acc

            def context(pipeline: Callable[[Any], Any]) -> None:
                def scope(acc: Any) -> None:
                    pipeline(acc)
                    out[split, pl.ds(n * rows + row, ROWS), pl.ds(m * cut.m, cut.m)] = acc[...]

                pl.run_scoped(scope, plgpu.WGMMAAccumulatorRef((ROWS, cut.m), jnp.float32))

            plgpu.emit_pipeline_warp_specialized(
                step,
                grid=(most if every == most * cut.splits else lax.min(most, every - split * most),),
                memory_registers=MEMORY_REGISTERS,
                in_specs=[
                    inputs_spec(
                        found,
                        cut.m,
                        lambda k: (m, split * most + k),
                        shared=("pair",) if cut.pair > 1 else (),
                        interpret=interpret is not None,
                    ),
                    *specs(found, rows, lambda k: (n, split * most + k)),
                ],
                wg_axis="warpgroup",
                num_compute_wgs=cut.warpgroups,
                max_concurrent_steps=cut.stages,
                compute_context=context,
            )(*inputs)

        return plgpu.kernel(
            kernel,
            out_type=jax.ShapeDtypeStruct((cut.splits, N, M), jnp.float32),
            scratch_types=[
                None if interpret is None else plgpu.SMEM((cut.warpgroups, ROWS, STEP), jnp.bfloat16)
            ],
            grid=(cut.splits, N // rows // cut.pair, M // cut.m),
            grid_names=("split", "n", "m"),  # the last is the fastest: blocks of one weight run together
            cluster=(cut.pair,) if cut.pair > 1 else (),
            cluster_names=("pair",) if cut.pair > 1 else (),
            num_threads=cut.warpgroups + 1,
            thread_name="warpgroup",
            compiler_params=plgpu.CompilerParams(lowering_semantics=plgpu.LoweringSemantics.Lane),
            interpret=False if interpret is None else interpret,
        )(x, *weight)

    return run
