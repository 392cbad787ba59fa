"""Attention of a few tokens to a cache of codes, for Hopper (sm_90): flash decoding.

The slots of a sequence are split over thread blocks, each with a softmax of its own, and XLA combines what
they find (arXiv 2205.14135, section 3.1, says how two softmaxes become one). Codes are read once and become
float16, which holds E4M3 and the product of E2M1 and E4M3 exactly; queries are divided by a power of two that
brings them into the range of float16. A cache of bfloat16 or float16 is multiplied as it is. Splits that no
query of their sequence can see are not read. Slots that are no multiple of 8 cost a copy of the cache.
"""

from __future__ import annotations

import math
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from mojax.formats.base import QTensor
from mojax.formats.fp8 import FP8
from mojax.formats.numerics import unpack
from mojax.formats.nvfp4 import NVFP4
from mojax.kernels.gpu.cache_codes import KEYS, SHRUNK, order
from mojax.kernels.gpu.flash_decoding import COLUMNS, LINE, Cache, Tiles, kernel

_ROWS = 64  # of queries, at most
_LENGTH = 16
_SHARED = 72 * 1024  # bytes of keys and values in a block, so that two or three share a multiprocessor
_DEPTH = 256  # slots in a block, at most: their scores stay in registers
_BLOCKS = 132  # one for each multiprocessor
_TARGET = 2.0**14  # where the largest query of a row goes; float16 ends at 2^16

# batch, length, heads, kv_heads, head_dim, slots: Llama 3.1 8B and 70B, Qwen 3, Qwen 2.5 0.5B and 7B
SHAPES = (
    (1, 1, 32, 8, 128, 4096),
    (32, 1, 32, 8, 128, 4096),
    (4, 1, 64, 8, 128, 16384),
    (8, 4, 32, 8, 128, 2048),
    (16, 1, 32, 4, 128, 4096),
    (3, 1, 14, 2, 64, 1000),
    (2, 2, 28, 4, 128, 777),
)


def tiles(batch: int, rows: int, kv_heads: int, slots: int, width: int) -> Tiles:
    """The cut for `rows` queries per key head and `width` bytes of key and value per slot and head."""
    rows = -(-rows // 8) * 8
    most = min(_DEPTH, _DEPTH * 16 // rows // KEYS * KEYS, _SHARED // width)
    depth = KEYS
    while 2 * depth <= most and batch * kv_heads * -(-slots // (2 * depth)) >= _BLOCKS:
        depth *= 2
    return Tiles(depth, -(-slots // depth), rows)


def why_not(
    q: jax.Array,
    k: jax.Array | QTensor,
    v: jax.Array | QTensor,
    positions: jax.Array,
    key_positions: jax.Array,
    *,
    window: int | None = None,
) -> str | None:
    """Why the kernel cannot take these arguments of `mojax.kernels.attention.attend`, or None."""
    _, length, heads, size = q.shape
    rows = length * heads // k.shape[2]
    if 0 in (*q.shape, k.shape[1]):
        return f"q is {q.shape} and there are {k.shape[1]} slots: nothing to compute"
    if length > _LENGTH:
        return f"length is {length}, above {_LENGTH}"
    if rows > _ROWS:
        return f"{rows} query rows share a key head, above {_ROWS}"
    if size not in (64, 128, 256):
        return f"head_dim is {size}, none of 64, 128 and 256"
    if q.dtype not in (jnp.bfloat16, jnp.float16):
        return f"q is {q.dtype}, neither bfloat16 nor float16"
    return _odd("k", k, q.dtype) or _odd("v", v, q.dtype)


def _odd(name: str, a: jax.Array | QTensor, dtype: Any) -> str | None:
    """Why keys or values cannot be taken, or None."""
    if not isinstance(a, QTensor):
        return None if a.dtype == dtype else f"{name} is {a.dtype}, q is {dtype}"
    if isinstance(a.format, FP8) and a.format.per != "tensor":
        return f"{name} is {a.format.label}, not FP8 per tensor"
    if not isinstance(a.format, (FP8, NVFP4)):
        return f"{name} is {a.format.label}, neither FP8 nor NVFP4"
    if a.contract or a.batch or a.order:
        return f"{name} is not in the order of a cache"
    return None


def _cache(a: jax.Array | QTensor) -> Cache:
    if not isinstance(a, QTensor):
        return Cache(a, None, jnp.ones((), jnp.float32))
    codes, scales = jnp.asarray(a.codes), {level: jnp.asarray(s) for level, s in a.scales.items()}
    one = {level: s[:1, :1, :1] if s.ndim else s for level, s in scales.items()}
    first = codes[:1, :1, :1]  # what is factored here is thrown away: only `after` is wanted
    after = a.format.factored(unpack(first) if a.format.bits == 4 else first, one, a.dtype)[1]
    after = jnp.asarray(after).reshape(())
    if a.format.bits == 8:
        return Cache(codes, None, after)
    inner = scales["inner"].reshape(*a.shape[:2], -1)
    inner = jnp.pad(inner, ((0, 0), (0, 0), (0, -inner.shape[-1] % COLUMNS)))
    return Cache(codes, inner, after * SHRUNK)


def attend(
    q: jax.Array,
    k: jax.Array | QTensor,
    v: jax.Array | QTensor,
    positions: jax.Array,
    key_positions: jax.Array,
    *,
    window: int | None = None,
    interpret: Any = None,
) -> jax.Array:
    """`mojax.kernels.attention.attend`, with scores and the softmax in float32."""
    batch, length, heads, size = q.shape
    kv_heads, slots = k.shape[2:0:-1]
    keys, values = _cache(k), _cache(v)
    group = heads // kv_heads
    cut = tiles(batch, length * group, kv_heads, slots, keys.width + values.width)
    x = q.reshape(batch, length, kv_heads, group, size).transpose(0, 2, 1, 3, 4)
    x = x.reshape(batch, kv_heads, length * group, size)
    x = jnp.pad(x, ((0, 0), (0, 0), (0, cut.rows - length * group), (0, 0)))
    x, factor = _queries(x, keys)
    if keys.decoded and interpret is None:
        x = x[..., order(size, keys.packed)]
    line = -cut.rows % LINE
    factor = jnp.pad(factor, ((0, 0), (0, 0), (0, line)))
    rest = cut.splits * cut.depth - slots
    kp = jnp.pad(key_positions, ((0, 0), (0, rest)), constant_values=-1)
    qp = jnp.repeat(positions, group, axis=1, total_repeat_length=length * group)
    qp = jnp.pad(qp, ((0, 0), (0, cut.rows + line - length * group)), constant_values=-1)
    live = _live(positions, kp, window, cut)
    # What a copy takes beyond the end is zeros, but it takes 8 slots at a time; the interpreter takes all.
    rest = rest if interpret is not None or slots < KEYS else -slots % 8
    keys, values = (_padded(c, rest) for c in (keys, values))
    run = kernel(cut, (batch, kv_heads, size), keys, values, window, interpret)
    operands = (keys.codes, values.codes, *(c.scales for c in (keys, values) if c.scales is not None))
    o, m, s = run(x, factor, qp, kp, live.astype(jnp.int32), *operands)
    y = _combined(o[:, :, :, : length * group], m, s, live) * values.after
    if values.decoded and interpret is None:
        y = y[..., np.argsort(order(size, values.packed))]
    y = y.reshape(batch, kv_heads, length, group, size).transpose(0, 2, 1, 3, 4)
    return y.reshape(batch, length, heads * size).astype(q.dtype)


def _padded(c: Cache, rest: int) -> Cache:
    """With `rest` more slots of zeros."""
    if not rest:
        return c
    codes, scales = (
        None if a is None else jnp.pad(a, [(0, 0), (0, rest), *[(0, 0)] * (a.ndim - 2)])
        for a in (c.codes, c.scales)
    )
    return c._replace(codes=codes, scales=scales)


def _queries(x: jax.Array, keys: Cache) -> tuple[jax.Array, jax.Array]:
    """`x [batch, kv_heads, rows, head_dim]` in the dtype of the keys' numbers, and what makes scores of sums.

    The second is float32 `[batch, kv_heads, rows]`; the softmax of its scores is in powers of two.
    """
    size = x.shape[-1]
    unit = jnp.ones(x.shape[:-1], jnp.float32)
    if keys.decoded:
        top = jnp.max(jnp.abs(x.astype(jnp.float32)), axis=-1)
        bits = lax.bitcast_convert_type(top, jnp.int32) & 0x7F800000
        power = lax.bitcast_convert_type(bits, jnp.float32) / _TARGET
        unit = jnp.where(power > 0, power, 1.0)
        x = (x.astype(jnp.float32) / unit[..., None]).astype(keys.dtype)
    factor = unit * (keys.after * (size**-0.5 * math.log2(math.e)))
    return x, factor


def _live(positions: jax.Array, kp: jax.Array, window: int | None, cut: Tiles) -> jax.Array:
    """Which splits some query of the sequence may see, bool `[batch, splits]`."""
    seen = (kp >= 0) & (kp <= jnp.max(positions, axis=1, keepdims=True))
    if window is not None:
        seen = seen & (kp > jnp.min(positions, axis=1, keepdims=True) - window)
    return jnp.any(seen.reshape(kp.shape[0], cut.splits, cut.depth), axis=2)


def _combined(o: jax.Array, m: jax.Array, s: jax.Array, live: jax.Array) -> jax.Array:
    """Outs `[batch, kv_heads, splits, rows, head_dim]` as those of one softmax, but for what is not live."""
    rows, live = o.shape[3], live[:, None, :, None]
    m, s = (jnp.where(live, a[..., :rows], z) for a, z in ((m, -jnp.inf), (s, 0.0)))
    top = jnp.max(m, axis=2, keepdims=True)
    share = jnp.exp2(m - jnp.where(top == -jnp.inf, 0.0, top))
    total = jnp.sum(share * s, axis=2)
    y = jnp.sum(jnp.where(live[..., None], o, 0.0) * share[..., None], axis=2)
    return y / jnp.where(total == 0, 1.0, total)[..., None]
