"""Block-scaled matmul through `jax.nn.scaled_matmul`, which cuDNN computes on Blackwell; NVFP4 and MXFP8.

Lowered, never run on a GPU. Elsewhere than on Blackwell XLA decodes both operands and multiplies those.
"""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp

from mojax.errors import InputError
from mojax.formats.base import QTensor
from mojax.formats.mxfp8 import MXFP8
from mojax.formats.nvfp4 import NVFP4
from mojax.kernels.gpu.scaled_operands import after, elements, matrix, typed, unfit


def why_not(x: Any, q: QTensor, *, dtype: Any, bias: Any = None) -> str | None:
    """Why `scaled_matmul` cannot take these arguments, or None."""
    if type(q.format) not in (NVFP4, MXFP8):
        return f"cuDNN multiplies nvfp4 and mxfp8, not {q.format.name}"
    reason = unfit(x, q)
    if reason:
        return reason
    if x.order or q.order:
        return f"the scales are in the order {x.order or q.order!r}"
    if not jnp.issubdtype(dtype, jnp.floating):
        return f"the result is {jnp.dtype(dtype).name}"
    N, _ = matrix(q)
    if bias is not None and bias.shape != (N,):
        return f"the bias has shape {bias.shape}, not ({N},)"
    return None


def scaled_matmul(x: QTensor, q: QTensor, *, dtype: Any, bias: jax.Array | None = None) -> jax.Array:
    """Inputs times weight, both quantized to one format: `dtype [M, N]`.

    Args:
      x: inputs `[M, K]` in NVFP4 or MXFP8.
      q: the weight `[N, K]` in the same format, as files keep it.
      dtype: a floating dtype; sums are float32 and rounded to it once.
      bias: `[N]`, added in float32.
    Raises:
      InputError: what `why_not` says.
    """
    reason = why_not(x, q, dtype=dtype, bias=bias)
    if reason:
        raise InputError(f"scaled_matmul: {reason}")
    scales = [typed(t, jnp.asarray(t.scales["inner"])) for t in (x, q)]
    operands = [a[None] for a in (elements(x), elements(q), *scales)]
    y = jax.nn.scaled_matmul(*operands, preferred_element_type=jnp.float32)[0] * after(x, q)
    if bias is not None:
        y = y + jnp.asarray(bias).astype(jnp.float32)[None]
    return y.astype(dtype)
