"""Round to nearest: every weight to its format, scales from the largest magnitudes.

Static input scales are the largest magnitude that calibration saw. Weights that a server fuses share the
outer scale, taken over all of them before anything is encoded.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np

from mojax import matrices
from mojax.compile import jit
from mojax.errors import InputError, NotFiniteError
from mojax.formats.base import Format, QTensor
from mojax.formats.rows import common_rows, cut
from mojax.matrices import Leaf, groups, leaves, maxima, own_outer
from mojax.threads import each
from mojax.transforms.base import Context, Params, Stats, Transform


@jit(static_argnums=(0,))
def _encode(format: Format, w: Any, outer: Any) -> QTensor:
    return format.encode(w, outer)


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
    return Transform(_apply, encodes=True, phase="encode", anew="scales")


def _apply(params: Params, stats: Stats, context: Context) -> Params:
    weights = [module + ".weight" for module in context.schemes]
    scaled = [n for n in weights if isinstance(params[n], QTensor)]  # by a step before: its scales stay
    changed: dict[str, Any] = {}
    if scaled:
        near = matrices.encode("rtn", params, stats, context.only(scaled), matrices.unchanged_scales)
        changed |= near
    changed |= _fresh(params, context.only([n for n in weights if n not in scaled]))
    for module, scheme in context.schemes.items():
        if scheme.inputs is not None and scheme.inputs.static:
            seen = static_maximum(module + ".weight", stats)  # of an earlier step, if it changed the inputs
            changed[module + ".input_scale"] = params.get(module + ".input_scale", seen)
    return changed


def _fresh(params: Params, context: Context) -> dict[str, QTensor]:
    """The weights under the scales that their formats give them."""
    found = leaves({**params, **context.targets}, context)
    rows = common_rows([leaf.matrices[0].shape for leaf in found.values()])
    work = [(group, i) for group in groups(context) for i in range(len(found[group[0]].matrices))]
    parts: dict[str, list[QTensor]] = {}
    for done in each(lambda item: _encode_group(found, *item, context, rows), work):
        for name, q in done.items():
            parts.setdefault(name, []).append(q)
    return {name: found[name].whole(qs) for name, qs in parts.items()}


def _encode_group(
    found: Mapping[str, Leaf], group: tuple[str, ...], i: int, context: Context, rows: int
) -> dict[str, QTensor]:
    """Encode matrix `i` of the weights of one group, under one outer scale where the format has one."""
    format = context.schemes[group[0].removesuffix(".weight")].weights
    matrices = {name: found[name].matrices[i] for name in group}
    outer = own_outer(format, maxima(found, group, i), np.dtype(matrices[group[0]].dtype))
    return {name: encode(format, w, outer, rows) for name, w in matrices.items()}


def static_maximum(name: str, stats: Mapping[str, Mapping[str, Any]]) -> np.float32:
    """The largest input magnitude of a site.

    Experts share the largest of those that saw tokens.

    Raises:
      InputError: calibration did not see this site (of experts: none of them), or saw values that are not
        finite.
    """
    if name not in stats or not np.any(stats[name].get("count", 1)):
        raise InputError(f"{name}: its inputs need a static scale, but calibration has not seen them")
    amax = np.float32(np.max(np.asarray(stats[name]["absmax"])))
    if not np.isfinite(amax):
        raise NotFiniteError(
            f"{name}: its inputs are not finite during calibration; the model overflows in its "
            "own dtype on this "
            "text, check the checkpoint or the text"
        )
    return amax
