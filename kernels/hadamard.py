"""The Walsh-Hadamard transform of the last axis, whole or in blocks."""

from __future__ import annotations

from functools import partial

import jax
import jax.numpy as jnp
from jax import lax

from mojax.errors import InputError
from mojax.formats.base import Array
from mojax.kernels.base import Implementation, dispatch, pallas
from mojax.kernels.hadamard_matrices import along, factors


def hadamard(
    x: Array, *, block: int | None = None, signs: Array | None = None, implementation: str | None = None
) -> jax.Array:
    """`(x * signs) H / sqrt(block)` of each block of the last axis, summed in float32, in the dtype of x.

    H is symmetric, so without signs the transform is its own inverse. For a power of two it is Sylvester's;
    for 12, 20, 28, 36, ... times a power of two it is Paley's of the smallest such order times Sylvester's,
    in that order (arXiv 2404.00456 rotates so). The reference is differentiable.

    Args:
      x: bfloat16, float16 or float32 `[..., n]`.
      block: how many neighbours are transformed together; a divisor of n. None is all n.
      signs: `[n]` of +1 and -1, which multiply x first.
      implementation: "xla" or "hopper"; None is the first that takes the arguments.
    Raises:
      InputError: `x` is of another dtype, `block` does not divide n, no Hadamard matrix of that order is
        known here, signs are not `[n]`, or `implementation` cannot take the arguments.
    """
    x = jnp.asarray(x)
    if not x.ndim or x.dtype not in (jnp.bfloat16, jnp.float16, jnp.float32):
        raise InputError(
            f"hadamard: x is {x.dtype} {x.shape}; needed: bfloat16, float16 or float32 with a last axis"
        )
    n = x.shape[-1]
    block = n if block is None else block
    if block < 1 or not n or n % block:
        raise InputError(f"hadamard: block is {block}; needed: a divisor of the last axis of x {x.shape}")
    if factors(block) is None:
        raise InputError(
            f"hadamard: no Hadamard matrix of order {block} is known here; powers of two have one, and of "
            f"the multiples of {block >> _twos(block)}: {_known(block)}; pass block= a divisor of {n} with "
            f"one, such as {n & -n}"
        )
    if signs is not None:
        signs = jnp.asarray(signs)
        if signs.shape != (n,):
            raise InputError(f"hadamard: signs have shape {signs.shape}; needed: ({n},) as x {x.shape}")
    return dispatch("hadamard", IMPLEMENTATIONS, x, only=implementation, block=block, signs=signs)


def _twos(order: int) -> int:
    return (order & -order).bit_length() - 1


def _known(order: int) -> str:
    """Multiples of the odd part of an order that a matrix is known of, in words."""
    odd = order >> _twos(order)
    found = [str(odd << k) for k in range(2, 12) if factors(odd << k) is not None][:3]
    return ", ".join([*found, "..."]) if found else "(none)"


@partial(jax.jit, static_argnames="block", inline=True)
def _reference(x: jax.Array, *, block: int, signs: jax.Array | None = None) -> jax.Array:
    matrices = factors(block)
    assert matrices is not None
    y = x if signs is None else x * lax.expand_dims(signs.astype(x.dtype), range(x.ndim - 1))
    sums = along(y.reshape(*x.shape[:-1], -1, block), matrices)
    return (sums * block**-0.5).reshape(x.shape).astype(x.dtype)


IMPLEMENTATIONS = (
    pallas("hopper", (9,), "hadamard", "hadamard"),
    Implementation("xla", (), lambda *_, **__: None, _reference),
)
