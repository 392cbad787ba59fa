"""What runs beside a packed linear: a low-rank branch, which reads the input as it comes.

  y = q(x H) q(R)^T + (x A^T) B^T,   A [r, in], B [out, r],   W = R H + B A

A and B are leaves of 16 bits, `<module>.lora_a` and `<module>.lora_b`; x is neither rotated nor rounded for
them, as in a server that runs them as a LoRA adapter (SVDQuant, arXiv 2411.05007).
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np

from mojax.compile import jit
from mojax.kernels.hadamard import hadamard

LEAVES = (".lora_a", ".lora_b")
Branch = tuple[Any, Any]


def leaves(module: str) -> tuple[str, str]:
    """The names of A and B."""
    return module + LEAVES[0], module + LEAVES[1]


def branch(params: Mapping[str, Any], module: str) -> Branch | None:
    """A and B of a module, None where it has none."""
    a, b = leaves(module)
    return (params[a], params[b]) if a in params else None


def dtype_of(dtype: Any) -> np.dtype:
    """In which A and B are kept beside a weight of `dtype`."""
    return np.dtype(dtype) if np.dtype(dtype).itemsize == 2 else np.dtype(ml_dtypes.bfloat16)


def added(y: jax.Array, x: jax.Array, a: Any, b: Any) -> jax.Array:
    """`y + (x A^T) B^T`, `[..., out]`; sums are float32, the result has the dtype of `y`."""
    low = jnp.einsum("...i,ri->...r", x, a.astype(x.dtype), preferred_element_type=jnp.float32)
    more = jnp.einsum("...r,or->...o", low, b.astype(jnp.float32), precision="highest")
    return (y.astype(jnp.float32) + more).astype(y.dtype)


@jit()
def product(a: Any, b: Any) -> jax.Array:
    """`B A`, float32 `[out, in]`."""
    return jnp.matmul(b.astype(jnp.float32), a.astype(jnp.float32), precision="highest")


def residual(w: Any, a: Any, b: Any, block: int) -> jax.Array:
    """`W - B A`, float32 `[out, in]`, of a weight rotated by Hadamard blocks of this order (0: not)."""
    low = product(a, b)
    return jnp.asarray(w).astype(jnp.float32) - (hadamard(low, block=block) if block else low)
