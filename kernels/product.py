"""Products with encoded numbers as they are served: codes times inner scales, the rest after the sum.

    y = (sum over in of x * w) * after,  value = w * after

`w` is exact in bfloat16 for most formats (`Format.factored`), so that bfloat16 inputs meet it in a fast dot
whose products are exact and whose sums are float32. The two nibbles of a byte are two dots over every second
input: nothing is interleaved.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax

from mojax.formats.base import Format, QTensor
from mojax.formats.fp8 import FP8

FEWEST = 8  # rows that XLA multiplies on a CPU as fast as one


class Factors(NamedTuple):
    """A weight `[*batch, out, in]` as what a product needs.

    Attributes:
      parts: the numbers that meet every n-th input, n = len(parts): `[*batch, out, in / n]`.
      after: float32 that broadcasts to `[*batch, out, 1]`, or None.
    """

    parts: tuple[jax.Array, ...]
    after: jax.Array | None


def factors(q: QTensor) -> Factors:
    """Those of matrices `[*batch, out, in]` in the order of files."""

    def one(codes: Any, scales: dict[str, Any]) -> Factors:
        nibbles = (codes & 15, codes >> 4) if q.format.bits == 4 else (codes,)
        found = [q.format.factored(c, scales, q.dtype) for c in nibbles]
        after = found[0][1]
        return Factors(tuple(w for w, _ in found), None if after is None else after.reshape(-1, 1))

    for _ in q.batch:
        one = jax.vmap(one)
    return one(jnp.asarray(q.codes), q.scales)


def multiply(x: jax.Array, f: Factors) -> jax.Array:
    """`x [*batch, ..., in]` times the weight, float32 `[*batch, ..., out]`."""
    n, lead = f.parts[0].ndim - 2, tuple(range(f.parts[0].ndim - 2))
    rows = x.reshape(*x.shape[:n], -1, x.shape[-1])
    count = rows.shape[n]
    if 0 < count < FEWEST and jax.default_backend() == "cpu":
        rows = jnp.pad(rows, [*([(0, 0)] * n), (0, FEWEST - count), (0, 0)])
    dims, step = (((n + 1,), (n + 1,)), (lead, lead)), len(f.parts)
    products = [_dot(rows[..., i::step], w, dims) for i, w in enumerate(f.parts)]
    y = sum(products[1:], start=products[0])
    if f.after is not None:
        y = y * jnp.swapaxes(f.after, -1, -2)
    return lax.slice_in_dim(y, 0, count, axis=n).reshape(*x.shape[:-1], y.shape[-1])


def _dot(x: jax.Array, w: jax.Array, dims: Any) -> jax.Array:
    """A dot in the smallest dtype that holds both operands; sums are float32, of integers int32."""
    if x.dtype == w.dtype == jnp.int8:
        return lax.dot_general(x, w, dims, preferred_element_type=jnp.int32).astype(jnp.float32)
    narrow = {jnp.dtype(d) for d in (jnp.bfloat16, jnp.int8)}
    dtype = jnp.bfloat16 if {x.dtype, w.dtype} <= narrow else jnp.float32
    return lax.dot_general(x.astype(dtype), w.astype(dtype), dims, preferred_element_type=jnp.float32)


class Rounded(NamedTuple):
    """Inputs in a number format: `value = x * after`; `after` is float32 `[]` or `[..., 1]`, or None."""

    x: jax.Array
    after: jax.Array | None


def rounded(x: jax.Array, format: Format, outer: Any = None) -> Rounded:
    """Inputs `[..., in]` rounded to a format as a server does at run time.

    Args:
      outer: the static scale, float32 `[]`; None is that of `x`.
    """
    if isinstance(format, FP8) and format.per == "block":
        return Rounded(jnp.asarray(format.fake(x, outer)), None)
    scales = format.fit(x, outer)
    return Rounded(*format.factored(format.round(x, scales), scales, x.dtype))
