"""The quadratic error that every rounding algorithm lowers, its damping, and the triangular factors it needs.

  value  tr(G D H D^T),  D = Q - W,  H [in, in] of the inputs, G [out, out] of the output gradients

G is given in diagonal blocks `[out / b, b, b]`, or None for the identity. GPTQ (arXiv 2210.17323) minimises
it for G = I; with both sides it is the error of YAQA (arXiv 2505.22988) and GuidedQuant (arXiv 2505.07004).
`inv(H) = U^T U` with U upper triangular: flip H, take its Cholesky factor, flip back, so that H = A A^T with
A upper; then U = inv(A). Everything is linear in H and in G, so sums over tokens serve as well as means.
"""

from __future__ import annotations

from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import lax

from mojax.compile import jit

_MOST = 4  # attempts: as given, then with 0.1, 1 and 10 times the mean diagonal added


class Factor(NamedTuple):
    """One side of the error, ready for feedback.

    Attributes:
      upper: float32 `[..., n, n]`, U of the reordered matrix: `inv(m[order][:, order]) = U^T U`.
      order: int32 `[..., n]`, which entry comes at which place.
      raised: int32 `[...]`. 0: as given; 1, 2, 3: not positive definite, so that 0.1, 1 or 10 times the mean
        diagonal was added; 4: nothing helped (NaN, infinity), U is the identity and rounding is to nearest.
    """

    upper: jax.Array
    order: jax.Array
    raised: jax.Array


def damped(m: jax.Array, tokens: jax.Array | float | None = None, fraction: float = 0.01) -> jax.Array:
    """`m` with `fraction` of its mean diagonal added to the diagonal, and entries nobody used decoupled.

    Few tokens overfit: with `tokens` given the fraction is multiplied by `max(1, 8 n / tokens)`. Rows and
    columns whose diagonal is 0 become 0 with the mean of the others on the diagonal, so that their weights
    are rounded to nearest and touch nothing.

    Args:
      m: `[n, n]` of inputs, or `[blocks, n, n]` of output gradients (one mean over all blocks).
      tokens: how many tokens the sum is over.
    Returns:
      float32 of the same shape.
    """
    return _damped(m, None if tokens is None else jnp.asarray(tokens, jnp.float32), jnp.float32(fraction))


@jit()
def _damped(m: jax.Array, tokens: jax.Array | None, fraction: jax.Array) -> jax.Array:
    m = m.astype(jnp.float32)
    n = m.shape[-1]
    diagonal = jnp.diagonal(m, axis1=-2, axis2=-1)
    live = diagonal > 0
    mean = jnp.sum(jnp.where(live, diagonal, 0.0)) / jnp.maximum(jnp.sum(live), 1).astype(jnp.float32)
    mean = jnp.where(mean > 0, mean, 1.0)
    if tokens is not None:
        fraction = fraction * jnp.maximum(1.0, 8 * n / jnp.maximum(tokens, 1.0))
    added = jnp.where(live, fraction * mean, mean)
    return jnp.where(live[..., :, None] & live[..., None, :], m, 0.0) + _diagonal(added)


def factor(m: jax.Array, falling: bool = True) -> Factor:
    """The factor of a damped `[..., n, n]`, by falling diagonal ("act-order") or in the order it has."""
    return _factor(falling, m)


@jit(static_argnums=(0,))
def _factor(falling: bool, m: jax.Array) -> Factor:
    m = m.astype(jnp.float32)
    diagonal = jnp.diagonal(m, axis1=-2, axis2=-1)
    if falling:
        order = jnp.argsort(-diagonal, axis=-1).astype(jnp.int32)
        m = reordered(reordered(m, order, -2), order, -1)
    else:
        order = jnp.broadcast_to(jnp.arange(m.shape[-1], dtype=jnp.int32), diagonal.shape)
    mean = jnp.mean(diagonal, axis=-1, keepdims=True)

    def attempt(state: tuple[jax.Array, jax.Array, jax.Array]) -> tuple[jax.Array, jax.Array, jax.Array]:
        tries, upper, raised = state
        added = jnp.where(tries > 0, 0.01 * 10.0 ** tries.astype(jnp.float32), 0.0) * mean
        found = _inverse_upper(m + _diagonal(jnp.broadcast_to(added, diagonal.shape)))
        first = (raised == _MOST) & jnp.all(jnp.isfinite(found), (-2, -1))
        upper = jnp.where(first[..., None, None], found, upper)
        return tries + 1, upper, jnp.where(first, tries, raised)

    identity = jnp.broadcast_to(jnp.eye(m.shape[-1], dtype=jnp.float32), m.shape)
    start = (jnp.int32(0), identity, jnp.full(m.shape[:-2], _MOST, jnp.int32))
    _, upper, raised = lax.while_loop(lambda s: (s[0] < _MOST) & jnp.any(s[2] == _MOST), attempt, start)
    return Factor(upper, order, raised)


def reordered(x: jax.Array, order: jax.Array, axis: int) -> jax.Array:
    """`x` along `axis` (of one matrix) in this order; both may have one leading axis more."""
    if order.ndim == 1:
        return jnp.take(x, order, axis)
    return jax.vmap(lambda x, order: jnp.take(x, order, axis))(x, order)


def _inverse_upper(m: jax.Array) -> jax.Array:
    """U upper triangular with `inv(m) = U^T U`; NaN where `m` is not positive definite."""
    a = jnp.flip(lax.linalg.cholesky(jnp.flip(m, (-2, -1)), symmetrize_input=False), (-2, -1))
    identity = jnp.broadcast_to(jnp.eye(m.shape[-1], dtype=jnp.float32), m.shape)
    return jnp.triu(lax.linalg.triangular_solve(a, identity, left_side=True, lower=False))


def _diagonal(d: jax.Array) -> jax.Array:
    """`[..., n]` to diagonal matrices `[..., n, n]`."""
    return d[..., None] * jnp.broadcast_to(jnp.eye(d.shape[-1], dtype=jnp.float32), (*d.shape, d.shape[-1]))


def product(a: jax.Array, b: jax.Array) -> jax.Array:
    """`a @ b` in full float32."""
    return jnp.matmul(a, b, precision="highest", preferred_element_type=jnp.float32)


def left(g: jax.Array | None, d: jax.Array) -> jax.Array:
    """`G d` for `d [out, n]` and G in diagonal blocks `[out / b, b, b]`, or None."""
    if g is None:
        return d
    return product(g, d.reshape(g.shape[0], g.shape[1], -1)).reshape(d.shape)


@jit()
def value(d: jax.Array, h: jax.Array, g: jax.Array | None = None) -> jax.Array:
    """tr(G D H D^T), float32 `[]`, for `d = q - w` `[out, in]`."""
    return jnp.sum(left(g, d) * product(d, h))
