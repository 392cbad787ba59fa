"""Rounding weights and inputs where a program uses them, with gradients that pass straight through."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from mojax import flat
from mojax.formats.base import Array, Format, encode_leaf
from mojax.interpret import Place
from mojax.kernels.base import decoded
from mojax.kernels.hadamard import hadamard
from mojax.packed import Inputs


@jax.custom_jvp
def straight(x: jax.Array, y: jax.Array) -> jax.Array:
    """`y`, of the shape and dtype of `x`, with the gradient of `x` (straight-through, arXiv 1308.3432)."""
    return y


@straight.defjvp
def _(primals: tuple, tangents: tuple) -> tuple[jax.Array, jax.Array]:
    return straight(*primals), tangents[0]


def grown(format: Format, x: jax.Array, y: Array) -> jax.Array:
    """`y`, what `x [..., in]` is rounded to, with the gradient of `x`, and for its error with that of the
    largest magnitude of its block, which sets the scale: y = x + e top / [top], where e and [top] are held.
    Blocks of several rows count row by row.
    """
    n = format.block_columns or x.shape[-1]
    edge = [(0, 0)] * (x.ndim - 1) + [(0, -x.shape[-1] % n)]
    parts = jnp.pad(jnp.abs(x), edge).reshape(*x.shape[:-1], -1, n)
    top = jnp.max(parts, axis=None if format.static and not format.block_columns else -1, keepdims=True)
    growth = jnp.broadcast_to(top / jnp.maximum(lax.stop_gradient(top), 1e-30), parts.shape)
    growth = growth.reshape(*x.shape[:-1], -1)[..., : x.shape[-1]]
    return x + lax.stop_gradient(jnp.asarray(y, jnp.float32) - x) * growth


def leading(batch: tuple[int, ...]) -> int:
    """How many of the first axes of a parameter are among `batch`: those that a loop may take rows of."""
    return next((i for i, axis in enumerate(batch) if axis != i), len(batch))


def round_weight(
    format: Format, w: jax.Array, contract: tuple[int, ...], batch: tuple[int, ...], taken: int = 0
) -> jax.Array:
    """A weight encoded and decoded, in its own dtype; the gradient passes.

    Args:
      w: the parameter, without its first `taken` axes where it is a row of a stack.
      contract, batch: axes of the whole parameter, as in `QTensor`.
    """
    inner = tuple(a - taken for a in contract), tuple(a - taken for a in batch[taken:])
    return straight(w, decoded(encode_leaf(format, lax.stop_gradient(w), *inner)))


def rotated(block: int, place: Place) -> Place:
    """The place with its input rotated by Hadamard blocks of this order along the contracted axes.

    Summed in float32 and rounded to the dtype of the input, as compressed-tensors does it; the gradient is
    that of the rotation.
    """
    return passed(lambda rows: hadamard(rows, block=block, implementation="xla"), place)


def flattened(params: Mapping[str, Any], place: Place) -> Place:
    """The place with its input through the learned matrices of its module (`mojax.flat`); itself without."""
    pair = flat.factors(params, place.name.removesuffix(".weight")) if place.op == "dot" else None
    return place if pair is None else passed(lambda rows: flat.turned(rows, *pair), place)


def passed(fn: Callable[[jax.Array], jax.Array], place: Place) -> Place:
    """The place with its input `[..., in]`, along the contracted axes, passed through `fn`."""
    axes = place.axes or (place.x.ndim - 1,)
    order = [*(d for d in range(place.x.ndim) if d not in axes), *axes]
    moved = place.x.transpose(order)
    rows = moved.reshape(*moved.shape[: place.x.ndim - len(axes)], -1)
    turned = fn(rows).reshape(moved.shape).transpose(np.argsort(order))

    def run(x: Any = None, w: Any = None, rounding: Inputs | None = None) -> jax.Array:
        return place.run(turned if x is None else x, w, rounding)

    return place._replace(x=turned, run=run)


def round_input(format: Format, place: Place, amax: Any = None, grows: bool = False) -> jax.Array:
    """The input of a place encoded and decoded, blocks along the contracted axes; the gradient passes.

    Args:
      amax: for a static format, the calibrated maximum: float32 `[]`, or one for every matrix of the
        parameter, `[*batch]`. None: that of the input at hand.
      grows: whether the gradient is that of `grown`, of a float32 input whose last axis is contracted.
    """
    axes = place.axes or (place.x.ndim - 1,)
    if grows and not place.paired and axes == (place.x.ndim - 1,) and place.x.dtype == jnp.float32:
        return grown(format, place.x, round_input(format, place, amax))
    x = lax.stop_gradient(place.x)
    rest = [d for d in range(x.ndim) if d not in (*place.paired, *axes)]
    order = [*place.paired, *rest, *axes]
    moved = x.transpose(order)
    rows = moved.reshape(*moved.shape[: x.ndim - len(axes)], -1)
    rows = format.fake(rows) if amax is None or not format.static else _under(format, rows, amax, place)
    return straight(place.x, rows.reshape(moved.shape).transpose(np.argsort(order)))


def rounded(format: Format, place: Place, amax: Any = None, grows: bool = False) -> jax.Array:
    """The result of a place with its input rounded: a product of codes where the parameter is packed.

    Args:
      amax, grows: as for `round_input`.
    """
    top = None if amax is None or not format.static else _of_row(amax, place)
    if not place.rounds or (top is not None and top.ndim):  # a kernel takes one scale for all matrices
        return place.run(x=round_input(format, place, amax, grows))
    return place.run(rounding=Inputs(format, None if top is None else format.outer(top, place.x.dtype)))


def _of_row(amax: Any, place: Place) -> jax.Array:
    """The maxima, float32, of the row of a stack that is read here."""
    amax = jnp.asarray(amax, jnp.float32)
    return lax.stop_gradient(amax[place.at[: amax.ndim]])


def _under(format: Format, rows: jax.Array, amax: Any, place: Place) -> jax.Array:
    """`rows [*paired, ..., in]` under the maxima of their own matrices."""
    top = _of_row(amax, place)

    def fake(x: jax.Array, top: jax.Array) -> Any:
        return format.fake(x, format.outer(top, x.dtype))

    each: Callable = fake
    if place.groups is not None and top.ndim == 1 and rows.ndim == 2:
        ids = jnp.searchsorted(jnp.cumsum(place.groups), jnp.arange(len(rows)), side="right")
        return jax.vmap(fake)(rows, top[jnp.minimum(ids, len(top) - 1)])
    if top.ndim != len(place.paired):
        return fake(rows, top.max())
    for _ in place.paired:
        each = jax.vmap(each)
    return each(rows, top)
