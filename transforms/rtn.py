"""Round to nearest: every weight to its format, scales from the largest magnitudes.

Static input scales are the largest magnitude that calibration saw. Weights that a server fuses share the outer
scale, taken over all of them before anything is encoded.
"""

from __future__ import annotations

import functools
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from mojax.errors import InputError
from mojax.formats.base import Format, QTensor
from mojax.transforms.base import Context, Params, Transform


@functools.partial(jax.jit, static_argnums=1)
def encode(weights: tuple[Any, ...], format: Format) -> tuple[tuple[QTensor, ...], jax.Array]:
    """Encode weights `[out, in]` that share one outer scale (if the format has one).

    Returns:
      the QTensors, and the largest magnitude of each weight, float32 `[len(weights)]`; NaN and infinity show.
    """
    amax = jnp.stack([jnp.max(jnp.abs(w)).astype(jnp.float32) for w in weights])
    outer = format.outer(jnp.max(amax), weights[0].dtype) if len(weights) > 1 else None
    return tuple(format.encode(w, outer) for w in weights), amax


def rtn() -> Transform:
    """Round to nearest."""
    return Transform(_apply)


def _apply(params: Params, stats: Mapping[str, Mapping[str, Any]], context: Context) -> Params:
    shared = [group for group in context.shared if all(n.removesuffix(".weight") in context.schemes for n in group)]
    grouped = {name for group in shared for name in group}
    alone = [(m + ".weight",) for m in context.schemes if m + ".weight" not in grouped]
    changed: dict[str, Any] = {}
    for group in (*shared, *alone):
        scheme = context.schemes[group[0].removesuffix(".weight")]
        encoded, amax = encode(tuple(params[n] for n in group), scheme.weights)
        for name, q, largest in zip(group, encoded, np.asarray(amax), strict=True):
            if not np.isfinite(largest):
                raise InputError(
                    f"{name}: holds NaN or infinity, which no format can hold; repair the checkpoint, or add "
                    f"--keep={name} to leave this tensor as it is"
                )
            changed[name] = q
    for module, scheme in context.schemes.items():
        if scheme.inputs is not None and scheme.inputs.static:
            changed[module + ".input_scale"] = static_maximum(module + ".weight", stats)
    return changed


def static_maximum(name: str, stats: Mapping[str, Mapping[str, Any]]) -> np.float32:
    """The largest input magnitude of a site.

    Raises:
      InputError: calibration did not see this site, or saw values that are not finite.
    """
    if name not in stats:
        raise InputError(f"{name}: its inputs need a static scale, but calibration has not seen them")
    amax = np.float32(np.max(np.asarray(stats[name]["absmax"])))
    if not np.isfinite(amax):
        raise InputError(
            f"{name}: its inputs are not finite during calibration; the model overflows in its own dtype on this "
            "text, check the checkpoint or the text"
        )
    return amax
