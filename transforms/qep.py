"""Quantization error propagation: what a weight stands for makes up for its inputs (arXiv 2504.09629).

  W <- W + strength * W S (H + damping)^-1,   S = sum (x - x~) x~^T,  H = sum x~ x~^T

x are the inputs of the source, x~ those that earlier encoded weights and rounded inputs make of them; with
strength 1 the new W minimises sum |W x - W' x~|^2. Too strong a correction fits the calibration text.
"""

from __future__ import annotations

import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from mojax.compile import jit
from mojax.errors import InputError
from mojax.rounding.objective import damped, product
from mojax.transforms.base import Context, Params, Stats, Transform


def solve(w: jax.Array, drift: jax.Array, h: jax.Array, strength: Any) -> jax.Array:
    """The corrected weight, float32 `[out, in]`; `h` is damped."""
    return _corrected(w, drift, _cholesky(h), strength)


@jit()
def _cholesky(h: jax.Array) -> jax.Array:
    return jax.scipy.linalg.cho_factor(h, lower=True)[0]


@jit()
def _corrected(w: jax.Array, drift: jax.Array, lower: jax.Array, strength: Any) -> jax.Array:
    w = w.astype(jnp.float32)
    return w + strength * jax.scipy.linalg.cho_solve((lower, True), product(w, drift).T).T


def qep(*, strength: float = 0.5, damping: float = 0.01) -> Transform:
    """Correction of targets before scales and codes are chosen.

    Args:
      strength: from 0, nothing, to 1, the least squares on the calibration text.
      damping: share of the mean diagonal of H that is added; more where there are few tokens.
    """
    if not 0 < strength <= 1:
        raise InputError(f"qep: strength is {strength}, must be above 0 and at most 1")
    apply = functools.partial(_apply, strength, damping)
    return Transform(apply, ("drift", "seen_gram", "count"), phase="encode")


def _apply(strength: float, damping: float, params: Params, stats: Stats, context: Context) -> Params:
    changed = {}
    lower: dict[int, jax.Array] = {}  # weights of one input have one gram
    for name in (module + ".weight" for module in context.schemes):
        seen, w = stats.get(name, {}), context.targets[name]
        if "drift" not in seen or len(w.shape) != 2:
            continue  # experts: the two streams may route a token to different ones
        if (of := id(seen["seen_gram"])) not in lower:
            h = damped(jnp.asarray(seen["seen_gram"]), float(np.asarray(seen["count"])), damping)
            lower = {of: _cholesky(h)}
        new = _corrected(jnp.asarray(w), jnp.asarray(seen["drift"]), lower[of], jnp.float32(strength))
        if bool(jnp.all(jnp.isfinite(new))):
            changed[name] = np.asarray(new.astype(w.dtype))
    return changed
