"""How far decoded weights are from their source: |W - decoded| / |W| (Frobenius), tensor by tensor."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from types import MappingProxyType
from typing import Any, get_args

import jax
import jax.numpy as jnp
import numpy as np

from mojax import beside
from mojax.checkpoint import read_json
from mojax.compile import jit
from mojax.experts import expand, rows, starred
from mojax.formats.base import QTensor
from mojax.formats.rows import common_rows, cut
from mojax.kernels.hadamard import hadamard
from mojax.model import Model
from mojax.plans import through_cache
from mojax.recipe import Recipe, choose, restored
from mojax.threads import each
from mojax.transforms.base import Context, Fold, Sites, folds, placed, rewrites

OWN = "steps"  # in mojax.json, where they are not the recipe's
UNNAMED = "a step without a name"
USUAL: dict[str, Sites] = {"smoothquant": "mlp", "awq": "all"}  # where a step folds if nothing is said


def weight_errors(out: Model, source: Model) -> dict[str, float]:
    """Relative error of every encoded weight of `out` that `source` has, block by block, experts one by one.

    Scales that `out` folded from activations into weights (SmoothQuant, AWQ) are undone first, so that only
    rounding is left.
    """
    moved = folded(out, source)
    found: dict[str, float] = {}
    groups: dict[str, list[str]] = {}
    for name in (module + ".weight" for module in out.schemes):
        if name not in source.params:
            continue
        if starred(name):
            w = turned(source.params[name], out.schemes[name.removesuffix(".weight")].hadamard)
            found |= _expert_errors(name, out.params[name], w)
        else:
            groups.setdefault(out.prefix(name), []).append(name)
    for prefix, names in groups.items():
        encoded = {name: out.params[name] for name in names}
        weights: dict[str, Any] = {name: source.params[name] for name in names}
        turns = {name: out.schemes[name.removesuffix(".weight")].hadamard for name in names}
        low = {name: branch for name in names if (branch := _branch(out, name)) is not None}
        if prefix in moved:
            weights = smoothed(weights, encoded, source.params, out.params, moved[prefix], turns, low)
        weights = {name: turned(w, turns[name]) for name, w in weights.items()}
        low = {name: turned(branch, turns[name]) for name, branch in low.items()}
        height = common_rows([q.shape for q in encoded.values()])
        errors = each(
            lambda name, e=encoded, w=weights, b=low, r=height: beside_error(
                e[name], w[name], b.get(name), r
            ),
            encoded,
        )
        found |= dict(zip(encoded, errors, strict=True))
    return found


def _branch(out: Model, name: str) -> np.ndarray | None:
    """B A of the branch beside a weight, float32 `[out, in]`; None where there is none."""
    found = beside.branch(out.params, name.removesuffix(".weight"))
    return None if found is None else np.asarray(beside.product(*found))


def beside_error(q: QTensor, w: Any, branch: Any, rows: int) -> float:
    """`relative_error` of a weight that is the sum of `q` and a branch, float32 `[out, in]`, or `q` alone."""
    if branch is None:
        return relative_error(q, w, rows)
    wide = np.asarray(w).astype(np.float32)
    rest = wide - branch
    norms = [float(np.linalg.norm(x)) for x in (rest, wide)]
    return relative_error(q, rest, rows) * (norms[0] / norms[1]) if norms[0] and norms[1] else 0.0


def turned(w: Any, block: int) -> Any:
    """A weight as it is encoded: rotated by Hadamard blocks of this order, 0 for not at all."""
    return np.asarray(hadamard(w, block=block)) if block else w


def _expert_errors(name: str, q: QTensor, w: Any) -> dict[str, float]:
    """The errors of the experts of one layer, by the names in the files."""
    height = common_rows([q.shape[1:]])
    pairs = zip(expand(name, len(w)), rows(q), w, strict=True)
    errors = each(lambda pair: (pair[0], relative_error(pair[1], pair[2], height)), pairs)
    return dict(errors)


def exact_blocks(out: Model, source: Model) -> tuple[int, int]:
    """How many blocks of the encoded weights decode to exactly the numbers of `source`, and of how many."""
    exact = total = 0
    for module in out.schemes:
        name = module + ".weight"
        if name in source.params:
            w = source.params[name]
            w = turned(w, out.schemes[module].hadamard)
            for q, matrix in zip(rows(out.params[name]), w if starred(name) else [w], strict=True):
                same = np.asarray(_equal(q, matrix))
                exact, total = exact + int(same.sum()), total + same.size
    return exact, total


@jit()
def _equal(q: QTensor, w: Any) -> jax.Array:
    same = q.format.decode(q) == jnp.asarray(w).astype(jnp.float32)
    width = q.format.block_columns or same.shape[-1]
    return jnp.all(same.reshape(*same.shape[:-1], -1, width), -1)


def folded(out: Model, source: Model) -> dict[str, tuple[Fold, ...]]:
    """By prefix of a block, the scales that `out` folded (SmoothQuant, AWQ).

    An output of ours names its steps in mojax.json. In any other they may be wherever they can be, in the
    blocks whose norm gains differ from the source's.
    """
    recipe = recorded(out)
    own = OWN in _record(out)  # which may scale channels wherever that can be done
    steps = dict(recipe.steps) if recipe is not None else {"smoothquant": {}}
    where = [steps[name].get("sites", usual) for name, usual in USUAL.items() if name in steps]
    where += [get_args(Sites)[-1]] * own
    if not where:
        return {}
    widest = max(where, key=get_args(Sites).index)
    found: dict[str, tuple[Fold, ...]] = {}
    for block in out.blocks:
        sites = placed(out.sites(block), block.prefix)
        modules = [s.weight.removesuffix(".weight") for s in sites]
        producers = {s.producer for s in sites if s.producer}
        context = Context(
            sites,
            {m: out.schemes[m] for m in modules if m in out.schemes},
            kept=frozenset(p for p in producers if recipe and choose(recipe, p).weights == "keep")
            | through_cache(sites, out.cache),
        )
        both = [g for g in rewrites(context, widest) if g in source.params and g in out.params]
        gains = [(source.params[g], out.params[g]) for g in both]
        if recipe or any(not np.array_equal(np.asarray(a), np.asarray(b)) for a, b in gains):
            found[block.prefix] = folds(context, widest)
    return found


def recorded(out: Model) -> Recipe | None:
    """The recipe of an output of ours; None where the steps are not known."""
    said = _record(out).get("recipe")
    return restored(said) if said and said["steps"] else None


def _record(out: Model) -> dict[str, Any]:
    path = out.checkpoint.folder / "mojax.json" if out.checkpoint else None
    return read_json(path) if path and path.exists() else {}


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
    turns: Mapping[str, int] = MappingProxyType({}),
    low: Mapping[str, Any] = MappingProxyType({}),
) -> dict[str, Any]:
    """The source's weights with the per-channel scales that the output folded, so that only rounding is left.

    A gain gives its scales as before / after; a linear (`up` before `down`) by least squares over its row.
    `turns`: the orders of the blocks by which encoded weights were rotated after the folding; `low`: the
    branches B A beside weights.
    """
    out = {n: np.asarray(w, np.float32) for n, w in weights.items()}
    for fold in sorted(folds, key=lambda fold: fold.producer in encoded):
        producer = fold.producer
        if producer in encoded:
            mine = turned(encoded[producer].format.decode(encoded[producer]), turns.get(producer, 0))
            mine = np.asarray(mine) + low.get(producer, np.float32(0))  # turned back: H H = 1
            full = out[producer]
            square = np.sum(mine * mine, axis=1)
            scale = np.where(square > 0, np.sum(full * mine, axis=1) / np.where(square > 0, square, 1), 1)
            out[producer] = (full / np.where(scale == 0, 1, scale)[:, None]).astype(np.float32)
        else:
            gain = np.asarray(after[producer], np.float32)
            full = np.asarray(before[producer], np.float32)
            scale = np.where(gain == 0, 1, full / np.where(gain == 0, 1, gain))
        columns = np.asarray(fold.spread(jnp.asarray(scale, jnp.float32)))
        for name in fold.readers:
            out[name] = (out[name] * columns[None, :]).astype(np.float32)
    return out
