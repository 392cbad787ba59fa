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
    """The scales s, float32 `[in]`, from max|X_j| `[in]` and the weights `[out, in]` that read X."""
    w = functools.reduce(jnp.maximum, [jnp.max(jnp.abs(v), axis=0).astype(jnp.float32) for v in weights])
    s = jnp.maximum(jnp.power(x, alpha) / jnp.power(w, 1 - alpha), SMALLEST)
    return jnp.where((x == 0) | (w == 0), 1.0, s)


@jit()
def _columns(w: jax.Array, s: jax.Array) -> jax.Array:
    return (w.astype(jnp.float32) * s[None, :]).astype(w.dtype)


@jit()
def _rows(w: jax.Array, s: jax.Array) -> jax.Array:
    return (w.astype(jnp.float32) / (s.reshape(w.shape) if w.size == s.size else s[:, None])).astype(w.dtype)


def smoothquant(*, alpha: float = 0.5) -> Transform:
    """SmoothQuant with migration strength `alpha`: 0 leaves activations alone, 1 flattens them."""
    if not 0 <= alpha <= 1:
        raise InputError(f"smoothquant: alpha is {alpha}, must be from 0 to 1")
    return Transform(functools.partial(_apply, alpha), ("absmax",), rewrites)


class Fold(NamedTuple):
    """A producer that is divided by s, and the weights that read what it produces, multiplied by s."""

    producer: str
    readers: tuple[str, ...]


def folds(context: Context) -> tuple[Fold, ...]:
    """Where scales can move without touching what is kept.

    Every reader is encoded, and the producer too, unless it is a norm gain that no rule keeps.
    """
    found: dict[tuple[int, str], list[str]] = {}
    # More than one scale a row, or more to scale than the rows of one weight.
    others = {s.group for s in context.sites if s.op != "dot" or s.channels or s.also or s.batch}
    for site in context.sites:
        if site.producer is not None and site.group not in others:
            found.setdefault((site.group, site.producer), []).append(site.weight)
    encoded = {module + ".weight" for module in context.schemes}
    fixed = context.kept | {site.weight for site in context.sites if site.weight not in encoded}
    return tuple(
        Fold(producer, tuple(readers))
        for (_, producer), readers in found.items()
        if producer not in fixed and encoded.issuperset(readers)
    )


def rewrites(context: Context) -> frozenset[str]:
    """The norm gains that absorb a scale."""
    return frozenset(f.producer for f in folds(context)) - {m + ".weight" for m in context.schemes}


def _apply(alpha: float, params: Params, stats: Mapping[str, Mapping[str, Any]], context: Context) -> Params:
    changed: dict[str, Any] = {}
    for producer, readers in folds(context):
        if readers[0] not in stats:
            raise InputError(
                f"{readers[0]}: smoothquant needs the largest magnitude of its inputs, but calibration has "
                "not seen them"
            )
        now = {**params, **changed}
        if not jnp.issubdtype(now[producer].dtype, jnp.floating):
            continue  # it cannot hold what is left of it
        absmax = jnp.asarray(stats[readers[0]]["absmax"])
        s = solve(absmax, tuple(now[w] for w in readers), alpha)
        changed[producer] = _rows(now[producer], s)
        for w in readers:
            changed[w] = _columns(now[w], s)
            module = w.removesuffix(".weight")
            inputs = context.schemes[module].inputs
            if inputs is not None and inputs.static:
                changed[module + ".input_scale"] = np.float32(jnp.max(absmax / s))
    return changed
