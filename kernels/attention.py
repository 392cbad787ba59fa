"""Attention of a few new tokens to a key/value cache, which may be quantized."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
from jax import lax

from mojax.errors import InputError
from mojax.formats.base import Array, QTensor
from mojax.formats.numerics import narrow
from mojax.kernels.base import Implementation, dispatch, pallas


def attend(
    q: Array,
    k: Array | QTensor,
    v: Array | QTensor,
    positions: Array,
    key_positions: Array,
    *,
    window: int | None = None,
    implementation: str | None = None,
) -> jax.Array:
    """Causal attention with grouped heads: `softmax(q k^T / sqrt(head_dim) + mask) v`.

    A query sees the slots whose position is not negative and not above its own. One that sees none gives
    zeros. What rests in slots that nobody sees must be finite.

    Args:
      q: `[batch, length, heads, head_dim]`, after rotation; heads is a multiple of kv_heads.
      k, v: `[batch, slots, kv_heads, head_dim]`, each an array or a QTensor; their formats may differ.
      positions: int32 `[batch, length]`, of the queries.
      key_positions: int32 `[batch, slots]`, the position that a slot holds; negative: padding.
      window: a query sees only this many positions, its own included; None is all.
      implementation: "xla" or "hopper"; None is the first that takes the arguments.
    Returns:
      `[batch, length, heads * head_dim]` in the dtype of q.
    Raises:
      InputError: the shapes do not fit each other, positions are not integers, `window` is below 1, or
        `implementation` cannot take the arguments.
    """
    q, positions, key_positions = jnp.asarray(q), jnp.asarray(positions), jnp.asarray(key_positions)
    k, v = (a if isinstance(a, QTensor) else jnp.asarray(a) for a in (k, v))
    _check(q, k, v, positions, key_positions, window)
    arguments = (q, k, v, positions.astype(jnp.int32), key_positions.astype(jnp.int32))
    return dispatch("attend", IMPLEMENTATIONS, *arguments, only=implementation, window=window)


def _check(
    q: Any, k: Any, v: Any, positions: jax.Array, key_positions: jax.Array, window: int | None
) -> None:
    if q.ndim != 4 or len(k.shape) != 4 or tuple(k.shape) != tuple(v.shape):
        raise InputError(
            f"attend: q {q.shape}, k {tuple(k.shape)} and v {tuple(v.shape)}; needed: q [batch, length, "
            "heads, head_dim], k and v [batch, slots, kv_heads, head_dim]"
        )
    if k.shape[0] != q.shape[0] or k.shape[3] != q.shape[3] or not k.shape[2] or q.shape[2] % k.shape[2]:
        raise InputError(
            f"attend: q {q.shape} and k {tuple(k.shape)} need the same batch and head_dim, and heads that "
            "are a multiple of kv_heads"
        )
    if not jnp.issubdtype(q.dtype, jnp.floating):
        raise InputError(f"attend: q is {q.dtype}; floating-point numbers are needed")
    for name, found, needed in (
        ("positions", positions, q.shape[:2]),
        ("key_positions", key_positions, k.shape[:2]),
    ):
        if found.shape != needed or not jnp.issubdtype(found.dtype, jnp.integer):
            raise InputError(f"attend: {name} are {found.dtype} {found.shape}; needed: int32 {tuple(needed)}")
    if window is not None and window < 1:
        raise InputError(f"attend: window is {window}; needed: at least 1, a query's own position")


def _reference(
    q: jax.Array,
    k: jax.Array | QTensor,
    v: jax.Array | QTensor,
    positions: jax.Array,
    key_positions: jax.Array,
    *,
    window: int | None = None,
) -> jax.Array:
    """The arithmetic of `mojax.models.layers.attend`, on values rounded to the dtype of q."""
    batch, length, heads, size = q.shape
    kv_heads, f32 = k.shape[2], jnp.float32
    k, v = _values(k, q.dtype), _values(v, q.dtype)
    q = q.reshape(batch, length, kv_heads, heads // kv_heads, size)
    scores = lax.dot_general(q, k, (((4,), (3,)), ((0, 2), (0, 2))), preferred_element_type=f32)
    scores = scores.astype(q.dtype).astype(f32) * size**-0.5  # [batch, kv_heads, length, group, slots]
    scores = scores.astype(q.dtype).astype(f32)
    distance = positions[:, :, None] - key_positions[:, None, :]
    seen = (key_positions >= 0)[:, None, :] & (distance >= 0)
    if window is not None:
        seen = seen & (distance < window)
    seen = seen[:, None, :, None, :]
    weights = jax.nn.softmax(jnp.where(seen, scores, -jnp.inf), axis=-1)
    weights = jnp.where(seen, weights, 0.0).astype(q.dtype)  # also where no slot is seen: NaN
    y = lax.dot_general(weights, v, (((4,), (1,)), ((0, 1), (0, 2))), preferred_element_type=f32)
    return y.astype(q.dtype).transpose(0, 2, 1, 3, 4).reshape(batch, length, heads * size)


def _values(a: jax.Array | QTensor, dtype: Any) -> jax.Array:
    if isinstance(a, QTensor):
        return narrow(jnp.asarray(a.format.decode(a)), dtype).astype(dtype)
    return a.astype(dtype)


IMPLEMENTATIONS = (
    pallas("hopper", (9,), "attention", "attend"),
    Implementation("xla", (), lambda *_, **__: None, _reference),
)
