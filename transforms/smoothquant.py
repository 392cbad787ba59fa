"""SmoothQuant: move the outliers of activations into the weights, channel by channel (arXiv 2211.10438).

    s_j = max|X_j|^alpha / max|W_:,j|^(1 - alpha)        gain_j / s_j        W_:,j * s_j

for every group of linears that read the same input and have a norm gain (or a linear) that can absorb 1 / s,
as the trace found them. The function is unchanged before rounding.
"""

from __future__ import annotations

import functools
from collections.abc import Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp

from mojax.compile import jit
from mojax.errors import InputError
from mojax.trace import Site
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
    return (w.astype(jnp.float32) / (s if w.ndim == 1 else s[:, None])).astype(w.dtype)


def smoothquant(*, alpha: float = 0.5) -> Transform:
    """SmoothQuant with migration strength `alpha`: 0 leaves activations alone, 1 flattens them."""
    if not 0 <= alpha <= 1:
        raise InputError(f"smoothquant: alpha is {alpha}, must be from 0 to 1")
    return Transform(functools.partial(_apply, alpha), ("absmax",), rewrites)


def groups(sites: Sequence[Site]) -> list[tuple[str, list[str]]]:
    """(producer, the weights that read what it produces), where every reader can be scaled."""
    found: dict[tuple[int, str], list[str]] = {}
    for site in sites:
        if site.op == "dot" and site.producer is not None:
            found.setdefault((site.group, site.producer), []).append(site.weight)
    return [(producer, weights) for (_, producer), weights in found.items()]


def rewrites(sites: Sequence[Site]) -> frozenset[str]:
    """The producers: norm gains, or linears that are encoded afterwards."""
    return frozenset(producer for producer, _ in groups(sites))


def _apply(alpha: float, params: Params, stats: Mapping[str, Mapping[str, Any]], context: Context) -> Params:
    changed: dict[str, Any] = {}
    for producer, weights in groups(context.sites):
        if not all(w.removesuffix(".weight") in context.schemes for w in weights) or weights[0] not in stats:
            continue  # a reader in high precision would be scaled for nothing
        now = {**params, **changed}
        s = solve(jnp.asarray(stats[weights[0]]["absmax"]), tuple(now[w] for w in weights), alpha)
        changed[producer] = _rows(now[producer], s)
        bias = producer.removesuffix(".weight") + ".bias"
        if bias in now:
            changed[bias] = _rows(now[bias], s)
        for w in weights:
            changed[w] = _columns(now[w], s)
    return changed
