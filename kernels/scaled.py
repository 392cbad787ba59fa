"""Inputs times a weight, both in 8 bits: FP8 or INT8 under the scales that a server gives them."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
from jax import lax

from mojax.errors import InputError
from mojax.formats.base import QTensor
from mojax.formats.fp8 import FP8
from mojax.formats.int8 import INT8
from mojax.kernels.base import Implementation, dispatch, pallas

_GROUP = 128  # of K under one scale of a weight per block
_CONTRACT_LAST = (((1,), (1,)), ((), ()))


def scaled(
    x: QTensor, q: QTensor, *, dtype: Any, bias: jax.Array | None = None, implementation: str | None = None
) -> jax.Array:
    """`sum_k x w^T` of encoded inputs and weight under their scales, plus a bias, as `dtype [M, N]`.

    Sums are float32 (INT8: int32), then multiplied by the weight's scales, then by those of the inputs. A
    weight per block: every 128 of K are summed, then added under the product of their two scales.

    Args:
      x: FP8 or INT8 `[M, K]` per tensor or token; for a weight per block FP8 per token `[M, K / 128, 128]`,
        K filled up with zeros.
      q: the weight `[N, K]`: FP8 per tensor, channel or block; INT8 per channel or tensor.
      dtype: what the result is rounded to, once; the bias `[N]` is added in float32.
      implementation: "hopper 8-bit" or "xla"; None is the first that takes the arguments on this device.
    Raises:
      InputError: formats or shapes differ from these. There is no implementation of that name.
    """
    return dispatch("scaled", IMPLEMENTATIONS, x, q, dtype=dtype, bias=bias, only=implementation)


def per_block(q: QTensor) -> bool:
    """Whether the weight has scales per block of 128 x 128."""
    return isinstance(q.format, FP8) and q.format.per == "block"


def reference(x: QTensor, q: QTensor, *, dtype: Any, bias: jax.Array | None = None) -> jax.Array:
    """`scaled` by XLA, on any device; products are exact, and so are sums of INT8."""
    reason = why_not(x, q, dtype=dtype, bias=bias)
    if reason is not None:
        raise InputError(f"scaled: {reason}")
    a, w = jnp.asarray(x.codes), jnp.asarray(q.codes)
    (s,), (after,) = x.scales.values(), q.scales.values()
    s, after = jnp.asarray(s, jnp.float32), jnp.asarray(after, jnp.float32)
    if per_block(q):
        y = _by_block(a, s[..., 0], w, after)
    else:
        y = _dot(a, w) * after.reshape(1, -1) * (s if s.ndim else s[None, None])
    if bias is not None:
        y = y + bias.astype(jnp.float32)[None]
    return y.astype(dtype)


def why_not(x: QTensor, q: QTensor, *, dtype: Any, bias: jax.Array | None = None) -> str | None:
    """Why `reference` cannot take these arguments, or None."""
    del dtype
    if type(x.format) is not type(q.format) or not isinstance(q.format, FP8 | INT8):
        return f"inputs are {x.format.label} and the weight {q.format.label}, not both fp8 or both int8"
    if q.codes.ndim != 2 or q.order:
        return f"the weight has codes {q.codes.shape} in order {q.order!r}, not [N, K] as files keep them"
    N, K = q.codes.shape
    found = tuple(x.codes.shape[1:])
    needed = (-(-K // _GROUP), _GROUP) if per_block(q) else (K,)
    if found != needed or per_block(x) or (per_block(q) and "inner" not in x.scales):
        return (
            f"inputs are {x.format.label} {x.codes.shape} and the weight is {q.format.label} {q.codes.shape};"
            f" needed: inputs [M, {', '.join(map(str, needed))}]"
        )
    if bias is not None and bias.shape != (N,):
        return f"bias {bias.shape} is not [{N}]"
    return None


def _dot(a: jax.Array, w: jax.Array) -> jax.Array:
    """Sums of products as float32. FP8 is exact in bfloat16, which every device multiplies fast."""
    if a.dtype == jnp.int8:
        return lax.dot_general(a, w, _CONTRACT_LAST, preferred_element_type=jnp.int32).astype(jnp.float32)
    a, w = a.astype(jnp.bfloat16), w.astype(jnp.bfloat16)
    return lax.dot_general(a, w, _CONTRACT_LAST, preferred_element_type=jnp.float32)


def _by_block(a: jax.Array, s: jax.Array, w: jax.Array, after: jax.Array) -> jax.Array:
    """Inputs `[M, G, 128]` under `s [M, G]`, a weight `[N, K]` under `after [ceil(N / 128), G]`."""
    N, groups = w.shape[0], s.shape[1]
    w = jnp.pad(w.view(jnp.uint8), ((0, 0), (0, groups * _GROUP - w.shape[1]))).view(w.dtype)

    def step(g: Any, y: jax.Array) -> jax.Array:
        part = _dot(a[:, g], lax.dynamic_slice_in_dim(w, g * _GROUP, _GROUP, axis=1))
        columns = jnp.repeat(after[:, g], _GROUP, total_repeat_length=after.shape[0] * _GROUP)[:N]
        return y + part * (s[:, g, None] * columns[None])

    return lax.fori_loop(0, groups, step, jnp.zeros((a.shape[0], N), jnp.float32))


IMPLEMENTATIONS = (
    pallas("hopper 8-bit", (9,), "scaled", "scaled"),
    Implementation("xla", (), why_not, reference),
)
