"""Attention in a model whose key/value cache is quantized, over a whole text or over what a cache holds.

What a server would keep as codes is rounded here, and read back, before the two products: see `mojax.cache`.
With `attention: fp8` the products are of FP8 numbers,

  y = (p~ / 448) v~,   p~ = e4m3(448 softmax(q~ k~^T / sqrt(head_dim))),   q~ = e4m3(q)

with float32 sums: the softmax's weights have a static scale of 1 / 448, queries one of 1, and so have keys
and values that are not FP8 already.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax

from mojax.cache import LARGEST, Cache
from mojax.formats import fp8
from mojax.formats.base import Format, QTensor
from mojax.kernels import attention as kernel
from mojax.kernels.hadamard import hadamard
from mojax.kernels.hadamard_matrices import factors
from mojax.models import layers
from mojax.simulate import straight

Scales = Mapping[str, jax.Array]  # "k", "v": largest magnitudes, `[]` or `[kv_heads]`; "k_mean", "v_mean"

FP8 = fp8.FORMAT()


def statistics(x: jax.Array) -> dict[str, jax.Array]:
    """What calibration keeps of keys or values `[batch, length, kv_heads, head_dim]`.

    Returns:
      `high`, the largest value, `low`, the largest times -1, and `sum`, each float32 `[2, kv_heads,
      head_dim]`: of the values as they are, and rotated (of a head_dim without a Hadamard matrix, as they
      are); and `count`, how many tokens there were, int32 `[]`. A NaN counts as infinite.
    """
    x = x.astype(jnp.float32)
    both = jnp.stack([x, hadamard(x) if rotatable(x.shape[-1]) else x])
    high, low = (jnp.max(jnp.where(jnp.isnan(both), jnp.inf, s * both), axis=(1, 2)) for s in (1, -1))
    tokens = jnp.full((), x.shape[0] * x.shape[1], jnp.int32)
    return {"high": high, "low": low, "sum": jnp.sum(both, axis=(1, 2)), "count": tokens}


def rotatable(head_dim: int) -> bool:
    """Whether keys of this size can be rotated."""
    return factors(head_dim) is not None


def turned(cache: Cache | None, x: jax.Array) -> jax.Array:
    """Queries or keys `[..., head_dim]`, rotated if the cache says so."""
    return hadamard(x) if cache is not None and cache.rotate else x


def kept(cache: Cache | None, side: str, x: jax.Array, scales: Scales) -> jax.Array:
    """Keys ("k") or values ("v") `[batch, length, kv_heads, head_dim]` as the cache gives them back.

    In the dtype of `x`; the gradient passes straight through.
    """
    format = cache.format(side) if cache is not None else None
    if format is None:
        return x
    mean = scales.get(f"{side}_mean")
    amax = lax.stop_gradient(jnp.asarray(scales.get(side, LARGEST), jnp.float32))
    y = lax.stop_gradient(x)
    if mean is not None:
        mean = mean.astype(x.dtype)[None, None]
        y = y - mean
    y = _rounded(format, y, amax)
    return straight(x, y if mean is None else y + mean)


def _rounded(format: Format, x: jax.Array, amax: jax.Array) -> jax.Array:
    def fake(x: jax.Array, top: jax.Array) -> Any:
        return format.fake(x, format.outer(top, x.dtype))

    return jax.vmap(fake, in_axes=(2, 0), out_axes=2)(x, amax) if amax.ndim else fake(x, amax)


def over_text(cache: Cache, scales: Scales) -> layers.Attend:
    """What takes the place of `mojax.models.layers.attend` where all keys and values are at hand."""

    def attend(q: jax.Array, k: jax.Array, v: jax.Array, positions: jax.Array, window: int | None):
        q, k = turned(cache, q), turned(cache, k)
        k, v = kept(cache, "k", k, scales), kept(cache, "v", v, scales)
        if not cache.attention:
            return layers.attend(q, k, v, positions, window)
        rows = jnp.broadcast_to(positions, q.shape[:2])
        return _products(cache, q, k, v, rows, rows, window)

    return attend


def over_slots(
    cache: Cache | None,
    q: jax.Array,
    k: jax.Array | QTensor,
    v: jax.Array | QTensor,
    positions: jax.Array,
    key_positions: jax.Array,
    window: int | None,
) -> jax.Array:
    """`mojax.kernels.attention.attend` with the products that the cache says; `q` and `k` are rotated."""
    if cache is None or not cache.attention:
        return kernel.attend(q, k, v, positions, key_positions, window=window)
    keys, values = (jnp.asarray(a.format.decode(a)) if isinstance(a, QTensor) else a for a in (k, v))
    keys, values = keys.astype(q.dtype), values.astype(q.dtype)
    return _products(cache, q, keys, values, positions, key_positions, window)


def _products(
    cache: Cache,
    q: jax.Array,
    k: Any,
    v: Any,
    positions: jax.Array,
    key_positions: jax.Array,
    window: int | None,
) -> jax.Array:
    """Attention with FP8 operands; shapes as in `mojax.kernels.attention.attend`."""
    batch, length, heads, size = q.shape
    kv_heads, f32 = k.shape[2], jnp.float32
    q, k, v = _eight(q, None), _eight(k, cache.k), _eight(v, cache.v)
    q = q.reshape(batch, length, kv_heads, heads // kv_heads, size)
    scores = lax.dot_general(q, k, (((4,), (3,)), ((0, 2), (0, 2))), preferred_element_type=f32)
    distance = positions[:, :, None] - key_positions[:, None, :]
    seen = (key_positions >= 0)[:, None, :] & (distance >= 0)
    if window is not None:
        seen = seen & (distance < window)
    seen = seen[:, None, :, None, :]  # scores are [batch, kv_heads, length, group, keys]
    weights = jax.nn.softmax(jnp.where(seen, scores * size**-0.5, -jnp.inf), axis=-1)
    weights = jnp.where(seen, weights, 0.0)  # also where nothing is seen: NaN
    p = straight(weights, jnp.asarray(FP8.fake(lax.stop_gradient(weights), jnp.float32(1 / LARGEST))))
    y = lax.dot_general(p, v.astype(f32), (((4,), (1,)), ((0, 1), (0, 2))), preferred_element_type=f32)
    return y.astype(q.dtype).transpose(0, 2, 1, 3, 4).reshape(batch, length, heads * size)


def _eight(x: jax.Array, format: Format | None) -> jax.Array:
    """`x` in FP8 with a scale of 1, unless its format is FP8 already."""
    if format is not None and format.name == "fp8":
        return x
    return straight(x, jnp.asarray(FP8.fake(lax.stop_gradient(x), jnp.float32(1))))
