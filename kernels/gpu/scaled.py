"""Inputs times a weight, both in 8 bits (FP8 or INT8), for Hopper: the calls it takes, and their tiles."""

from __future__ import annotations

import math
from typing import Any

import jax
import jax.numpy as jnp

from mojax.errors import InputError
from mojax.formats.base import QTensor
from mojax.formats.fp8 import FP8
from mojax.formats.int8 import INT8
from mojax.kernels.gpu.scaled_pipeline import GROUP, LINE, ROWS, Call, Tiles, run
from mojax.kernels.scaled import per_block

_SMS = 132  # multiprocessors of an H100 SXM or H200
_SHARED = 225 * 1024  # bytes of shared memory for tiles: 227 KiB less what barriers and alignment need
_DTYPES = (jnp.bfloat16, jnp.float16, jnp.float32)

# (M, N, K): attention output, MLP up and MLP down of 8B and 70B models, and a DeepSeek-V3 MLP.
SHAPES = tuple(
    (m, n, k)
    for n, k in ((4096, 4096), (14336, 4096), (4096, 14336), (8192, 8192), (7168, 18432))
    for m in (16, 128, 1024, 4096)
)


def tiles(M: int, N: int, K: int, *, block: bool = False) -> Tiles:
    """The tiles for inputs `[M, K]` and a weight `[N, K]`; `block`: with scales per block of 128 x 128."""
    m = ROWS if M <= ROWS else 2 * ROWS
    rows = math.ceil(M / m)
    # Two thread blocks read a tile of the weight once; an odd row of tiles would leave one of them idle.
    pair = 2 if rows > 1 and (rows % 2 == 0 or rows >= 9) else 1

    def clusters(n: int) -> int:
        return math.ceil(rows / pair) * math.ceil(N / n)

    def read(n: int) -> int:
        """Rows that the busiest multiprocessor reads: what bounds a product in 8 bits, from L2 or memory."""
        return math.ceil(clusters(n) / _resident(m, pair)) * (min(m, M) + n)

    # What registers hold: 64 x 256 sums of a warpgroup, half of that where the products of a block lie beside
    # them, half again where two thread blocks share a multiprocessor.
    most = 256 // (1 + block) // (1 + (m == ROWS))
    n = min((n for n in (256, 128, 64, 32) if n <= most), key=read)
    stage = (m + n) * GROUP + (4 * m if block else 0)
    # Few rows: the weight is read once, and two thread blocks on a multiprocessor hide more latency.
    shared = _SHARED // 2 if m == ROWS else _SHARED
    stages = min(8, (shared - 2 * m * LINE) // stage, K // GROUP)
    return Tiles(m, n, stages, pair, min(clusters(n), _resident(m, pair)))


def _resident(m: int, pair: int) -> int:
    """Clusters that run at once; two thread blocks fit a multiprocessor where tiles have 64 rows."""
    return 2 * _SMS if m == ROWS else _SMS // pair


def why_not(
    x: QTensor,
    q: QTensor,
    *,
    dtype: Any,
    bias: jax.Array | None = None,
    interpret: Any = None,
) -> str | None:
    """Why `scaled` cannot take these arguments ("K = 96 is no multiple of 128"), or None."""
    del interpret
    if not any(isinstance(x.format, f) and isinstance(q.format, f) for f in (FP8, INT8)):
        return f"inputs are {x.format.label} and the weight {q.format.label}, not both fp8 or both int8"
    if q.codes.ndim != 2 or q.order:
        return f"the weight has codes {q.codes.shape} in order {q.order!r}, not [N, K] as files keep them"
    N, K = q.codes.shape
    block = per_block(q)
    if block != (x.codes.ndim == 3) or per_block(x) or (block and "inner" not in x.scales):
        return (
            f"inputs are {x.format.label} {x.codes.shape} and the weight {q.format.label}: a weight per block"
            " takes inputs per token [M, K / 128, 128], another one inputs per token or tensor [M, K]"
        )
    M, *rest = x.codes.shape
    if rest != ([K // GROUP, GROUP] if block else [K]) or K % GROUP:
        return f"inputs are {x.codes.shape} and K = {K}: K must be the same, a multiple of {GROUP}"
    if 0 in (M, N, K):
        return f"M, N, K = {M}, {N}, {K}: nothing to compute"
    if jnp.dtype(dtype) not in map(jnp.dtype, _DTYPES):
        return f"dtype {jnp.dtype(dtype)} is not bfloat16, float16 or float32"
    if bias is not None and bias.shape != (N,):
        return f"bias {bias.shape} is not [{N}]"
    return None


def scaled(
    x: QTensor,
    q: QTensor,
    *,
    dtype: Any,
    bias: jax.Array | None = None,
    interpret: Any = None,
    cut: Tiles | None = None,
) -> jax.Array:
    """`sum_k x w^T` of encoded inputs and weight under their scales, plus a bias, as `dtype [M, N]`.

    Args:
      x: FP8 or INT8 `[M, K]` per tensor or token; for a weight per block FP8 per token `[M, K / 128, 128]`.
      q: the weight `[N, K]`: FP8 per tensor, channel or block; INT8 per channel or tensor.
      dtype: bfloat16, float16 or float32: what sums times scales, plus the bias `[N]`, are rounded to once.
      interpret: an InterpretGPUParams to run without a GPU.
      cut: the tiles; None is `tiles(M, N, K)`.
    Raises:
      InputError: `why_not` has a reason.
    """
    reason = why_not(x, q, dtype=dtype, bias=bias)
    if reason is not None:
        raise InputError(f"scaled for Hopper: {reason}")
    M, (N, K) = x.codes.shape[0], q.codes.shape
    block = per_block(q)
    t = cut or tiles(M, N, K, block=block)
    if interpret is not None:
        t = t._replace(pair=1)  # the interpreter has no cluster barriers
    # TMA clips what it reads and writes, but at whole swizzled pieces of 8 rows; the interpreter does not.
    call = Call(M, N, K, t, block, jnp.dtype(dtype), interpret)
    m_edge, n_edge = (8, call.piece) if interpret is None else (t.m, t.n)
    call = call._replace(M=_up(M, m_edge), N=max(_up(N, n_edge), t.n))
    rows, columns = call.grid[0] * t.m * t.pair, call.grid[1] * t.n
    codes = _padded(x.codes.reshape(M, K), call.M)
    weight = _padded(q.codes, max(_up(N, 8 if interpret is None else t.n), t.n))
    if interpret is not None:
        weight = weight.T  # the interpreter of jax 0.10 has no transposed operands
    operands = [codes, weight, *_scales(x, q, block, rows, columns)]
    if bias is not None:
        operands.append(_padded(bias.astype(jnp.float32), columns))
    return run(call, operands)[:M, :N]


def _scales(x: QTensor, q: QTensor, block: bool, rows: int, columns: int) -> tuple[jax.Array, jax.Array]:
    """float32 scales as `run` reads them."""
    (s,), (w,) = x.scales.values(), q.scales.values()
    s, w = jnp.asarray(s, jnp.float32), jnp.asarray(w, jnp.float32)
    if block:
        return _padded(s[..., 0], rows).T, w
    return _vector(s, rows), _vector(w, columns)


def _vector(a: jax.Array, size: int) -> jax.Array:
    return _padded(a[:, 0], size) if a.ndim else a.reshape(1)


def _up(size: int, unit: int) -> int:
    return math.ceil(size / unit) * unit


def _padded(a: Any, rows: int) -> jax.Array:
    """The first axis filled up with zeros."""
    a = jnp.asarray(a)
    if a.shape[0] == rows:
        return a
    return jnp.concatenate([a, jnp.zeros((rows - a.shape[0], *a.shape[1:]), a.dtype)])
