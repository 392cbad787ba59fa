"""SmoothQuant: move the outliers of activations into the weights, channel by channel (arXiv 2211.10438).

    s_j = max|X_j|^alpha / max|W_:,j|^(1 - alpha)        gain_j / s_j        W_:,j * s_j

for every group of encoded linears that read the same input and have a norm gain (or an encoded linear) that
can absorb 1 / s, as the trace found them. The function is unchanged before rounding. A static scale of that
input is then max|X / s|.
"""

from __future__ import annotations

import functools
from collections.abc import Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from mojax.compile import jit
from mojax.errors import InputError
from mojax.transforms.base import Context, Params, Transform

SMALLEST = 1e-5  # of a scale, as in the paper's code: keeps dead channels finite


@jit(static_argnums=(2,))
def solve(x: jax.Array, weights: tuple[jax.Array, ...], alpha: float) -> jax.Array:
    """The scales s, float32 `[*batch, in]`, from max|X_j| and the weights `[*batch, out, in]` that read X."""
    w = functools.reduce(jnp.maximum, [jnp.max(jnp.abs(v), axis=-2).astype(jnp.float32) for v in weights])
    s = jnp.maximum(jnp.power(x, alpha) / jnp.power(w, 1 - alpha), SMALLEST)
    return jnp.where((x == 0) | (w == 0), 1.0, s)


@jit()
def _columns(w: jax.Array, s: jax.Array) -> jax.Array:
    return (w.astype(jnp.float32) * jnp.expand_dims(s, -2)).astype(w.dtype)


@jit()
def _rows(w: jax.Array, s: jax.Array) -> jax.Array:
    return (w.astype(jnp.float32) / (s.reshape(w.shape) if w.size == s.size else s[:, None])).astype(w.dtype)


def smoothquant(*, alpha: float = 0.5) -> Transform:
    """SmoothQuant with migration strength `alpha`: 0 leaves activations alone, 1 flattens them."""
    if not 0 <= alpha <= 1:
        raise InputError(f"smoothquant: alpha is {alpha}, must be from 0 to 1")
    return Transform(functools.partial(_apply, alpha), ("absmax",), rewrites)


class Fold(NamedTuple):
    """A producer that is divided by s, the weights that read what it produces, multiplied by s, and the bias
    beside the producer, if any, divided too."""

    producer: str
    readers: tuple[str, ...]
    also: tuple[str, ...] = ()


def folds(context: Context) -> tuple[Fold, ...]:
    """Where scales can move without touching what is kept.

    Every reader is encoded, and the producer too, unless it is a norm gain that no rule keeps. The layers
    of a scanned stack have scales of their own; what is between the linears of experts stays.
    """
    encoded = {module + ".weight" for module in context.schemes}
    # More than one scale a row, or a stack of matrices to divide.
    others = {
        s.group for s in context.sites if s.op != "dot" or s.channels or (s.batch and s.producer in encoded)
    }
    found: dict[tuple[int, str, tuple[str, ...]], list[str]] = {}
    for site in context.sites:
        if site.producer is not None and site.group not in others:
            found.setdefault((site.group, site.producer, site.also), []).append(site.weight)
    fixed = context.kept | {site.weight for site in context.sites if site.weight not in encoded}
    return tuple(
        Fold(producer, tuple(readers), also)
        for (_, producer, also), readers in found.items()
        if fixed.isdisjoint((producer, *also)) and encoded.issuperset(readers)
    )


def rewrites(context: Context) -> frozenset[str]:
    """The norm gains, and the biases beside them, that absorb a scale."""
    moved = {name for f in folds(context) for name in (f.producer, *f.also)}
    return frozenset(moved) - {m + ".weight" for m in context.schemes}


def _apply(alpha: float, params: Params, stats: Mapping[str, Mapping[str, Any]], context: Context) -> Params:
    changed: dict[str, Any] = {}
    for producer, readers, also in folds(context):
        if readers[0] not in stats:
            raise InputError(
                f"{readers[0]}: smoothquant needs the largest magnitude of its inputs, but calibration has "
                "not seen them"
            )
        now = {**params, **changed}
        if not all(jnp.issubdtype(now[n].dtype, jnp.floating) for n in (producer, *also)):
            continue  # they cannot hold what is left of them
        absmax = jnp.asarray(stats[readers[0]]["absmax"])
        s = solve(absmax, tuple(now[w] for w in readers), alpha)
        changed |= {n: _rows(now[n], s) for n in (producer, *also)}
        for w in readers:
            changed[w] = _columns(now[w], s)
            module = w.removesuffix(".weight")
            inputs = context.schemes[module].inputs
            if inputs is not None and inputs.static:
                changed[module + ".input_scale"] = np.asarray(jnp.max(absmax / s, axis=-1), np.float32)
    return changed
