"""SmoothQuant: move the outliers of activations into the weights, channel by channel (arXiv 2211.10438).

    s_j = max|X_j|^alpha / max|W_:,j|^(1 - alpha)        gain_j / s_j        W_:,j * s_j

for every group of encoded linears that read the same input and have a norm gain (or an encoded linear) that
can absorb 1 / s, as the trace found them. The function is unchanged before rounding. A static scale of that
input is then max|X / s|.
"""

from __future__ import annotations

import functools
from typing import Any, get_args

import jax
import jax.numpy as jnp

from mojax.compile import jit
from mojax.errors import InputError
from mojax.formats.base import one_of
from mojax.transforms.base import Context, Params, Sites, Stats, Transform, folds, movable, move, rewrites

SMALLEST = 1e-5  # of a scale, as in the paper's code: keeps dead channels finite


@jit()
def columns(w: jax.Array) -> jax.Array:
    """max|W_:,j|, float32 `[*batch, in]` of a weight `[*batch, out, in]`."""
    return jnp.max(jnp.abs(w), axis=-2).astype(jnp.float32)


@jit(static_argnums=(2,))
def solve(x: jax.Array, w: jax.Array, alpha: float) -> jax.Array:
    """The scales s, float32 `[*batch, in]`, from max|X_j| and max|W_:,j| over all weights that read X."""
    s = jnp.maximum(jnp.power(x, alpha) / jnp.power(w, 1 - alpha), SMALLEST)
    return jnp.where((x == 0) | (w == 0), 1.0, s)


def smoothquant(*, alpha: float = 0.5, sites: Sites = "mlp") -> Transform:
    """SmoothQuant.

    Args:
      alpha: migration strength: 0 leaves activations alone, 1 flattens them.
      sites: "norms": inputs that a norm produces; "mlp": also those of down projections; "all": also those of
        attention's output projection.
    """
    if not 0 <= alpha <= 1:
        raise InputError(f"smoothquant: alpha is {alpha}, must be from 0 to 1")
    one_of("smoothquant: sites", sites, get_args(Sites))
    return Transform(
        functools.partial(_apply, alpha, sites), ("absmax",), functools.partial(rewrites, sites=sites)
    )


def _apply(alpha: float, sites: Sites, params: Params, stats: Stats, context: Context) -> Params:
    changed: dict[str, Any] = {}
    for fold in folds(context, sites):
        if fold.readers[0] not in stats:
            raise InputError(
                f"{fold.readers[0]}: smoothquant needs the largest magnitude of its inputs, but calibration "
                "has not seen them"
            )
        now = {**params, **changed}
        if not movable(fold, now):
            continue
        absmax = jnp.asarray(stats[fold.readers[0]]["absmax"])
        w = jnp.max(jnp.stack([columns(now[name]) for name in fold.readers]), axis=0)
        s = solve(fold.tied(absmax, jnp.max), fold.tied(w, jnp.max), alpha)
        changed |= move(fold, now, s, context, absmax)
    return changed
