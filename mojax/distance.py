"""How far decoded weights are from their source: |W - decoded| / |W| (Frobenius), tensor by tensor."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from mojax import trace
from mojax.compile import jit
from mojax.formats.base import QTensor
from mojax.formats.rows import common_rows, cut
from mojax.model import Model
from mojax.threads import each


def weight_errors(out: Model, source: Model) -> dict[str, float]:
    """Relative error of every encoded weight of `out` that `source` has, block by block.

    Scales that `out` folded from activations into weights (SmoothQuant) are undone first, so that only
    rounding is left.
    """
    sites = {block.prefix: out.sites(block) for block in out.blocks}
    found: dict[str, float] = {}
    for prefix in ("", *sites):
        names = [
            m + ".weight"
            for m in out.schemes
            if _prefix(m, sites) == prefix and m + ".weight" in source.params
        ]
        if not names:
            continue
        n = len(prefix)
        encoded = {name[n:]: out.params[name] for name in names}
        weights: dict[str, Any] = {name[n:]: source.params[name] for name in names}
        folded = [s for s in sites.get(prefix, ()) if s.producer]
        gains = {s.producer for s in folded if s.producer and s.producer not in encoded}
        before = {g: np.asarray(source.params[prefix + g], np.float32) for g in gains}
        after = {g: np.asarray(out.params[prefix + g], np.float32) for g in gains}
        if any(not np.array_equal(before[g], after[g], equal_nan=True) for g in gains):
            weights = smoothed(weights, encoded, before, after, folded)
        rows = common_rows([q.shape for q in encoded.values()])
        errors = each(lambda name, e=encoded, w=weights, r=rows: relative_error(e[name], w[name], r), encoded)
        found |= {prefix + name: error for name, error in zip(encoded, errors, strict=True)}
    return found


def _prefix(module: str, prefixes: Mapping[str, Any]) -> str:
    return next((p for p in prefixes if module.startswith(p)), "")


@jit()
def _squares(q: QTensor, w: Any) -> tuple[jax.Array, jax.Array]:
    w = jnp.asarray(w).astype(jnp.float32)
    return jnp.sum(jnp.square(w - q.format.decode(q))), jnp.sum(jnp.square(w))


def relative_error(q: QTensor, w: Any, rows: int) -> float:
    """|W - decoded| / |W| (Frobenius), `rows` at a time; a zero tensor that decodes to zero has error 0."""
    pieces = [_squares(part, w_part) for part, w_part in zip(cut_encoded(q, rows), cut(w, rows), strict=True)]
    error, norm = (math.fsum(map(float, column)) for column in zip(*pieces, strict=True))
    return math.sqrt(error / norm) if norm else (0.0 if not error else math.inf)


def cut_encoded(q: QTensor, rows: int) -> list[QTensor]:
    """A QTensor in pieces of `rows` rows, or whole if `rows` is 0."""
    if not rows or rows == q.shape[0]:
        return [q]
    count = q.shape[0] // rows
    levels = {
        level: [scale] * count if scale.ndim == 0 else np.split(np.asarray(scale), count)
        for level, scale in q.scales.items()
    }
    codes = np.split(np.asarray(q.codes), count)
    shape = (rows, *q.shape[1:])
    return [
        QTensor(codes[i], {k: v[i] for k, v in levels.items()}, q.format, shape, q.dtype)
        for i in range(count)
    ]


def smoothed(
    weights: dict[str, Any],
    encoded: Mapping[str, QTensor],
    before: Mapping[str, Any],
    after: Mapping[str, Any],
    sites: Sequence[trace.Site],
) -> dict[str, Any]:
    """The source's weights with the per-channel scales that the output folded, so that only rounding is left.

    A gain gives its scales as before / after; a linear (`up` before `down`) by least squares over its row.
    """
    out = {n: np.asarray(w, np.float32) for n, w in weights.items()}
    for s in sorted(sites, key=lambda s: s.producer in encoded):
        if s.weight not in out or s.producer is None:
            continue
        if s.producer in encoded:
            mine = np.asarray(encoded[s.producer].format.decode(encoded[s.producer]))
            full = out[s.producer]
            square = np.sum(mine * mine, axis=1)
            scale = np.where(square > 0, np.sum(full * mine, axis=1) / np.where(square > 0, square, 1), 1)
            out[s.producer] = (full / np.where(scale == 0, 1, scale)[:, None]).astype(np.float32)
        else:
            gain = np.asarray(after[s.producer], np.float32)
            scale = np.where(
                gain == 0, 1, np.asarray(before[s.producer], np.float32) / np.where(gain == 0, 1, gain)
            )
        out[s.weight] = (out[s.weight] * scale[None, :]).astype(np.float32)
    return out
