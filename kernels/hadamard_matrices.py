"""Hadamard matrices: symmetric, of +1 and -1, `H H = order * I`, as Kronecker factors that multiply fast.

Powers of two are Sylvester's, `H[i, j] = (-1)^(number of bits that i and j share)`. Others are Kronecker
products `P x H` with `P` by one of Paley's constructions (R. E. A. C. Paley, "On orthogonal matrices", 1933):
of order q + 1 for a prime power q = 3 mod 4, or 2 q + 2 for q = 1 mod 4. Rows are ordered so that `P` is
symmetric.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Sequence
from functools import lru_cache, reduce

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

_FACTOR = 128  # the largest power of two that is multiplied at once
_LARGEST = 1024  # the largest matrix of Paley's


def factors(order: int) -> tuple[np.ndarray, ...] | None:
    """Matrices int8 whose Kronecker product is the Hadamard matrix of this order; None: none is known."""
    if order < 1:
        return None
    twos = (order & -order).bit_length() - 1
    odd = order >> twos
    if odd == 1:
        return _sylvester_factors(twos)
    for k in range(2, twos + 1):
        matrix = paley(odd << k) if odd << k <= _LARGEST else None
        if matrix is not None:
            return (matrix, *(_sylvester_factors(twos - k) if twos > k else ()))
    return None


def dividing(size: int) -> int:
    """The largest order of a known Hadamard matrix that divides `size`."""
    return next(n for n in range(size, 0, -1) if size % n == 0 and factors(n) is not None)


def signs(seed: int, name: str, size: int) -> np.ndarray:
    """+1 and -1, int8 `[size]`, from the bits of SHAKE-256: the same with every version of everything."""
    bits = hashlib.shake_256(f"{seed} {name}".encode()).digest(-(-size // 8))
    return (1 - 2 * np.unpackbits(np.frombuffer(bits, np.uint8), count=size)).astype(np.int8)


def matrix(order: int) -> np.ndarray | None:
    """The Hadamard matrix int8 `[order, order]`; None if none is known here."""
    found = factors(order)
    return None if found is None else reduce(np.kron, found)


def along(x: jax.Array, matrices: Sequence[np.ndarray]) -> jax.Array:
    """Sums float32 of `x [..., n]` times the Kronecker product `[n, n]` of symmetric matrices of +1 and -1.

    A bfloat16 or float16 `x` is multiplied as it is.
    """
    lead, n = x.shape[:-1], x.shape[-1]
    for m in matrices:
        # The axis that is summed over is the first of those left; its results become the last.
        y = x.reshape(math.prod(lead), len(m), n // len(m))
        h = jnp.asarray(m, y.dtype)
        dims = (((1,), (0,)), ((), ()))
        x = lax.dot_general(y, h, dims, lax.Precision.HIGHEST, preferred_element_type=jnp.float32)
    return x.reshape(*lead, n)


def sylvester(order: int) -> np.ndarray:
    """Sylvester's matrix int8, for a power of two."""
    shared = np.arange(order)[:, None] & np.arange(order)[None, :]
    return np.where(np.bitwise_count(shared) % 2, -1, 1).astype(np.int8)


def _sylvester_factors(twos: int) -> tuple[np.ndarray, ...]:
    count = max(1, -(-twos // int(math.log2(_FACTOR))))
    return tuple(sylvester(1 << (twos // count + (i < twos % count))) for i in range(count))


@lru_cache(maxsize=16)
def paley(order: int) -> np.ndarray | None:
    """A symmetric matrix int8 of one of Paley's constructions; None where both fail."""
    if order % 4:
        return None
    q = order - 1
    digits = _field(q)
    if digits is not None:  # q = 3 mod 4: rows of the first construction, negated, in the order of -a
        sums = _characters(q, digits[:, None] + digits[None, :])
        h = np.ones((order, order), np.int8)
        h[1:, 1:] = np.where(sums == 0, -1, sums)
        return h
    q = order // 2 - 1
    digits = _field(q) if q % 4 == 1 else None
    if digits is None:
        return None
    s = np.zeros((q + 1, q + 1), np.int8)
    s[0, 1:] = s[1:, 0] = 1
    s[1:, 1:] = _characters(q, digits[:, None] - digits[None, :])
    signs, diagonal = np.array([[1, 1], [1, -1]], np.int8), np.array([[1, -1], [-1, -1]], np.int8)
    return np.kron(s, signs) + np.kron(np.eye(q + 1, dtype=np.int8), diagonal)


def _root(q: int) -> tuple[int, int] | None:
    """(p, k) where q = p^k for an odd prime p and k at most 3."""
    p = next((p for p in range(3, q + 1, 2) if q % p == 0), 0)
    return next(((p, k) for k in (1, 2, 3) if p and p**k == q), None)


def _field(q: int) -> np.ndarray | None:
    """Elements of GF(q), coefficients of 1, w, w^2 with w^k = n in GF(p), int64 `[q, k]`; None: no such q."""
    found = _root(q) if q % 2 else None
    if found is None or (found[1] == 3 and found[0] % 3 != 1):
        return None
    p, k = found
    return np.arange(q)[:, None] // p ** np.arange(k) % p


def _characters(q: int, elements: np.ndarray) -> np.ndarray:
    """1 for squares of GF(q), -1 for others, 0 for 0, int8; `elements [..., k]`, coefficients.

    An element is a square if and only if its norm is one in GF(p).
    """
    p, k = _root(q) or (q, 1)
    powers = {i**k % p for i in range(p)}
    n = next((n for n in range(2, p) if n not in powers), 1)  # w^k - n has no root: with k = 2, 3 no factor
    e = np.moveaxis(elements % p, -1, 0)
    if k == 1:
        norm = e[0]
    elif k == 2:
        norm = e[0] ** 2 - n * e[1] ** 2
    else:
        norm = e[0] ** 3 + n * e[1] ** 3 + n * n * e[2] ** 3 - 3 * n * e[0] * e[1] * e[2]
    squares = np.full(p, -1, np.int8)
    squares[np.arange(p) ** 2 % p] = 1
    squares[0] = 0
    return squares[norm % p]
