"""Learned matrices that an input passes before a packed linear, as a Kronecker product of two small ones.

  x as a matrix X [n1, n2]:  X -> L^T X R,   y = q(x (L kron R)) q(W (L kron R)^-T)^T,   n1 n2 = in

L and R are leaves of 16 bits (`beside.dtype_of`), `<module>.flat_left` and `<module>.flat_right`; linears of
one input have equal ones (FlatQuant, arXiv 2410.09426). No server runs them: they are for this process.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

LEFT, RIGHT = "flat_left", "flat_right"
LEAVES = ("." + LEFT, "." + RIGHT)
LARGEST = 512  # of a side: beyond, the matrices cost more than they bring


def leaves(module: str) -> tuple[str, str]:
    """The names of L and R."""
    return module + LEAVES[0], module + LEAVES[1]


def factors(params: Mapping[str, Any], module: str) -> tuple[Any, Any] | None:
    """L and R of a module, None where it has none."""
    left, right = leaves(module)
    return (params[left], params[right]) if left in params else None


def sides(width: int) -> tuple[int, int]:
    """n1 <= n2, as near to each other as divisors of `width` can be."""
    n1 = next(n for n in range(math.isqrt(width), 0, -1) if width % n == 0)
    return n1, width // n1


def nbytes(width: int) -> int:
    """Of L and R beside a weight of `width` input channels."""
    return sum(2 * n * n for n in sides(width))


def turned(x: jax.Array, left: Any, right: Any) -> jax.Array:
    """`x (L kron R)`, `[..., in]`, summed in float32, in the dtype of `x`."""
    n1, n2 = left.shape[-1], right.shape[-1]
    rows = x.reshape(*x.shape[:-1], n1, n2).astype(jnp.float32)
    rows = _dot("...ij,jb->...ib", rows, right)
    return _dot("...ib,ia->...ab", rows, left).reshape(x.shape).astype(x.dtype)


def absorbed(w: Any, left_inverse: Any, right_inverse: Any) -> jax.Array:
    """`W (L kron R)^-T`, float32 `[..., in]`."""
    n1, n2 = left_inverse.shape[-1], right_inverse.shape[-1]
    rows = jnp.asarray(w).astype(jnp.float32).reshape(*w.shape[:-1], n1, n2)
    rows = _dot("...ij,bj->...ib", rows, right_inverse)
    return _dot("...ib,ai->...ab", rows, left_inverse).reshape(w.shape)


def inverse(matrix: Any) -> np.ndarray:
    """Of L or R as it is kept, float32, found in float64."""
    return np.linalg.inv(np.asarray(matrix).astype(np.float64)).astype(np.float32)


def _dot(what: str, x: jax.Array, m: Any) -> jax.Array:
    m = jnp.asarray(m).astype(jnp.float32)
    return jnp.einsum(what, x, m, precision="highest", preferred_element_type=jnp.float32)
