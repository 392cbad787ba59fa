"""How far decoded weights are from their source: |W - decoded| / |W| (Frobenius), tensor by tensor."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from mojax.checkpoint import read_json
from mojax.compile import jit
from mojax.experts import expand, rows, starred
from mojax.formats.base import QTensor
from mojax.formats.rows import common_rows, cut
from mojax.model import Model
from mojax.recipe import Recipe, choose, restored
from mojax.threads import each
from mojax.transforms.base import Context, placed
from mojax.transforms.smoothquant import Fold, folds, rewrites


def weight_errors(out: Model, source: Model) -> dict[str, float]:
    """Relative error of every encoded weight of `out` that `source` has, block by block, experts one by one.

    Scales that `out` folded from activations into weights (SmoothQuant) are undone first, so that only
    rounding is left.
    """
    moved = folded(out, source)
    found: dict[str, float] = {}
    groups: dict[str, list[str]] = {}
    for name in (module + ".weight" for module in out.schemes):
        if name not in source.params:
            continue
        if starred(name):
            found |= _expert_errors(name, out.params[name], source.params[name])
        else:
            groups.setdefault(out.prefix(name), []).append(name)
    for prefix, names in groups.items():
        encoded = {name: out.params[name] for name in names}
        weights: dict[str, Any] = {name: source.params[name] for name in names}
        if prefix in moved:
            weights = smoothed(weights, encoded, source.params, out.params, moved[prefix])
        height = common_rows([q.shape for q in encoded.values()])
        errors = each(
            lambda name, e=encoded, w=weights, r=height: relative_error(e[name], w[name], r), encoded
        )
        found |= dict(zip(encoded, errors, strict=True))
    return found


def _expert_errors(name: str, q: QTensor, w: Any) -> dict[str, float]:
    """The errors of the experts of one layer, by the names in the files."""
    height = common_rows([q.shape[1:]])
    pairs = zip(expand(name, len(w)), rows(q), w, strict=True)
    errors = each(lambda pair: (pair[0], relative_error(pair[1], pair[2], height)), pairs)
    return dict(errors)


def folded(out: Model, source: Model) -> dict[str, tuple[Fold, ...]]:
    """By prefix of a block, the scales that `out` folded (SmoothQuant).

    An output of ours names its steps in mojax.json. In any other they may be wherever they can be, in the
    blocks whose norm gains differ from the source's.
    """
    recipe = _recorded(out)
    if recipe is not None and "smoothquant" not in {name for name, _ in recipe.steps}:
        return {}
    found: dict[str, tuple[Fold, ...]] = {}
    for block in out.blocks:
        sites = placed(out.sites(block), block.prefix)
        modules = [s.weight.removesuffix(".weight") for s in sites]
        producers = {s.producer for s in sites if s.producer}
        context = Context(
            sites,
            {m: out.schemes[m] for m in modules if m in out.schemes},
            kept=frozenset(p for p in producers if recipe and choose(recipe, p).weights == "keep"),
        )
        both = [g for g in rewrites(context) if g in source.params and g in out.params]
        gains = [(source.params[g], out.params[g]) for g in both]
        if recipe or any(not np.array_equal(np.asarray(a), np.asarray(b)) for a, b in gains):
            found[block.prefix] = folds(context)
    return found


def _recorded(out: Model) -> Recipe | None:
    """The recipe of an output of ours; None where the steps are not known."""
    path = out.checkpoint.folder / "mojax.json" if out.checkpoint else None
    said = read_json(path).get("recipe") if path and path.exists() else None
    return restored(said) if said and said["steps"] else None


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
    weights: Mapping[str, Any],
    encoded: Mapping[str, QTensor],
    before: Mapping[str, Any],
    after: Mapping[str, Any],
    folds: Sequence[Fold],
) -> dict[str, Any]:
    """The source's weights with the per-channel scales that the output folded, so that only rounding is left.

    A gain gives its scales as before / after; a linear (`up` before `down`) by least squares over its row.
    """
    out = {n: np.asarray(w, np.float32) for n, w in weights.items()}
    for producer, readers, _ in sorted(folds, key=lambda fold: fold.producer in encoded):
        if producer in encoded:
            mine = np.asarray(encoded[producer].format.decode(encoded[producer]))
            full = out[producer]
            square = np.sum(mine * mine, axis=1)
            scale = np.where(square > 0, np.sum(full * mine, axis=1) / np.where(square > 0, square, 1), 1)
            out[producer] = (full / np.where(scale == 0, 1, scale)[:, None]).astype(np.float32)
        else:
            gain = np.asarray(after[producer], np.float32)
            full = np.asarray(before[producer], np.float32)
            scale = np.where(gain == 0, 1, full / np.where(gain == 0, 1, gain))
        for name in readers:
            out[name] = (out[name] * scale[None, :]).astype(np.float32)
    return out
