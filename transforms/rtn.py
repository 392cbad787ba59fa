"""Round to nearest: every weight to its format, scales from the largest magnitudes.

Static input scales are the largest magnitude that calibration saw. Weights that a server fuses share the
outer scale, taken over all of them before anything is encoded.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from mojax.compile import jit
from mojax.errors import InputError, NotFiniteError
from mojax.formats.base import Format, QTensor
from mojax.formats.rows import common_rows, cut
from mojax.threads import each
from mojax.transforms.base import Context, Params, Transform


@jit(static_argnums=(0,))
def _encode(format: Format, w: Any, outer: Any) -> QTensor:
    return format.encode(w, outer)


@jit()
def _largest(w: Any) -> jax.Array:
    return jnp.max(jnp.abs(w)).astype(jnp.float32)


def largest(w: Any, rows: int) -> np.float32:
    """The largest magnitude of a weight, `rows` at a time; NaN and infinity show."""
    return np.max([np.float32(_largest(part)) for part in cut(w, rows)])


def encode(format: Format, w: Any, outer: Any, rows: int) -> QTensor:
    """One weight `[out, in]` under the outer scale `outer` (None: the format has none), `rows` at a time."""
    parts = [_encode(format, part, outer) for part in cut(w, rows)]
    if len(parts) == 1:
        return parts[0]
    scales = {
        level: parts[0].scales[level]
        if level == "outer"
        else np.concatenate([p.scales[level] for p in parts])
        for level in parts[0].scales
    }
    return QTensor(np.concatenate([p.codes for p in parts]), scales, format, tuple(w.shape), parts[0].dtype)


def rtn() -> Transform:
    """Round to nearest."""
    return Transform(_apply, encodes=True)


def _apply(params: Params, stats: Mapping[str, Mapping[str, Any]], context: Context) -> Params:
    shared = [
        group for group in context.shared if all(n.removesuffix(".weight") in context.schemes for n in group)
    ]
    grouped = {name for group in shared for name in group}
    alone = [(m + ".weight",) for m in context.schemes if m + ".weight" not in grouped]
    changed: dict[str, Any] = {}
    rows = common_rows([params[m + ".weight"].shape for m in context.schemes])
    for done in each(lambda group: _encode_group(params, group, context, rows), (*shared, *alone)):
        changed |= done
    for module, scheme in context.schemes.items():
        if scheme.inputs is not None and scheme.inputs.static:
            changed[module + ".input_scale"] = static_maximum(module + ".weight", stats)
    return changed


def _encode_group(params: Params, group: tuple[str, ...], context: Context, rows: int) -> dict[str, QTensor]:
    """Encode the weights of one group, under one outer scale where the format has one."""
    format = context.schemes[group[0].removesuffix(".weight")].weights
    amax = {name: largest(params[name], rows) for name in group}
    for name, value in amax.items():
        if not np.isfinite(value):
            raise NotFiniteError(
                f"{name}: holds NaN or infinity, which no format can hold; repair the checkpoint, or add "
                f"--keep={name} --noevaluate to leave this tensor as it is"
            )
    outer = None
    if format.static:
        outer = format.outer(np.asarray(max(amax.values())), np.dtype(params[group[0]].dtype))
    return {name: encode(format, params[name], outer, rows) for name in group}


def static_maximum(name: str, stats: Mapping[str, Mapping[str, Any]]) -> np.float32:
    """The largest input magnitude of a site.

    Raises:
      InputError: calibration did not see this site, or saw values that are not finite.
    """
    if name not in stats:
        raise InputError(f"{name}: its inputs need a static scale, but calibration has not seen them")
    amax = np.float32(np.max(np.asarray(stats[name]["absmax"])))
    if not np.isfinite(amax):
        raise NotFiniteError(
            f"{name}: its inputs are not finite during calibration; the model overflows in its "
            "own dtype on this "
            "text, check the checkpoint or the text"
        )
    return amax
