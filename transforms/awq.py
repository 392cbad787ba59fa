"""AWQ: scale the channels of an input so that rounding costs the outputs least (arXiv 2306.00978).

  s = x^a,  x^a / w^a  or  x^a / w^(1 - a),   a in 0 .. 1,   and 1,   of geometric mean 1

x = mean|X_j|, w = rms(W_:,j) over the weights that read X, which are multiplied by s; what produces X is
divided by it. Of these the s with the least error of the outputs is taken:

  inputs   sum over sampled tokens  e A e^T,   e = (round(x / s) - x / s) s,   A = sum W^T W
  weights  tr(D H D^T),   D = round(W s) / s - W,   H = sum x x^T

each per token, rounded as the formats of the scheme do. No scales is the first candidate. Where weights are
large, a part of the rows and of the tokens chooses the few that are judged on all of them.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence
from typing import Any, Literal, NamedTuple, get_args

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from mojax.compile import jit
from mojax.errors import InputError
from mojax.formats.base import Format, Scheme, one_of
from mojax.rounding.inputs import cost, gram_of, rounded
from mojax.rounding.objective import product
from mojax.transforms.base import (
    Context,
    Fold,
    Outcome,
    Params,
    Sites,
    Stats,
    Transform,
    folds,
    movable,
    move,
    rewrites,
)

Objective = Literal["auto", "inputs", "weights", "both"]
NEEDS = ("absmax", "abssum", "count", "sample", "gram")
FARTHEST = 1e4  # from 1, of a scale: keeps it finite in any dtype
LARGE = 2**28  # sum of out in^2 of the readers: above it there is a first look
ROWS = 256  # of a weight, and of the sampled inputs, about: for a first look
FINALISTS = 4  # of it, beside no scales


class Reader(NamedTuple):
    """A weight that reads the input, as the objective sees it. Hashable.

    Attributes:
      scheme: its formats.
      group: equal for weights that share their outer scale.
      inputs, weights: which errors count.
    """

    scheme: Scheme
    group: int
    inputs: bool
    weights: bool


def candidates(x: jax.Array, w: jax.Array, grid: int) -> jax.Array:
    """Scales to try, float32 `[3 grid - 2, in]` (one less for an odd grid), all ones first.

    Args:
      x: mean|X_j|, float32 `[in]`; w: the size of the columns, float32 `[in]`. Where one is 0, so that the
        channel does not matter, the scale is 1.
    """
    live = (x > 0) & (w > 0)
    log_x, log_w = (jnp.log(jnp.where(live, v, 1.0)) for v in (x, w))
    exponents = dict.fromkeys((a, b) for a in np.linspace(0, 1, grid).tolist() for b in (0.0, a, 1 - a))
    logs = jnp.stack([a * log_x - b * log_w for a, b in exponents])
    mean = jnp.sum(jnp.where(live[None], logs, 0.0), 1) / jnp.maximum(jnp.sum(live), 1).astype(jnp.float32)
    far = float(np.log(FARTHEST))
    return jnp.exp(jnp.where(live[None], jnp.clip(logs - mean[:, None], -far, far), 0.0))


@jit(static_argnums=(0, 1))
def errors(
    readers: tuple[Reader, ...],
    roughly: bool,
    weights: Sequence[jax.Array],
    scales: jax.Array,
    x: jax.Array,
    absmax: jax.Array,
    gram: jax.Array,
) -> jax.Array:
    """The objective of each of `scales [n, in]`, float32 `[n]`.

    Args:
      roughly: by a part of the rows of weights and of inputs.
      weights: `[out, in]`, in the order of `readers`.
      x: some inputs, float32 `[tokens, in]`; absmax: float32 `[in]`, over all of them; gram: float32
        `[in, in]`, the mean of x x^T.
    """
    felt: dict[Format, list[jax.Array]] = {}
    for reader, w in zip(readers, weights, strict=True):
        if reader.inputs and reader.scheme.inputs is not None:
            felt.setdefault(reader.scheme.inputs, []).append(w)
    grams = {format: gram_of(ws) for format, ws in felt.items()}
    x = x[:: _every(len(x), roughly)]

    def error(s: jax.Array) -> jax.Array:
        total = jnp.float32(0)
        for format, a in grams.items():
            plain, q = rounded(format, x / s[None], jnp.max(absmax / s), weights[0].dtype)
            total = total + cost((q - plain) * s[None], a) / len(x)
        for reader, w, top in zip(readers, weights, _tops(readers, weights, s), strict=True):
            if reader.weights:
                format = reader.scheme.weights
                part = w[:: _every(len(w), roughly and format.block_rows == 1)]
                d = _nearest(format, part, s, top) / s[None] - part.astype(jnp.float32)
                total = total + jnp.sum(product(d, gram) * d) * (len(w) / len(part))
        return total

    return lax.map(error, scales)


def _every(rows: int, roughly: bool) -> int:
    return max(1, rows // ROWS) if roughly else 1


def _moved(w: jax.Array, s: jax.Array) -> jax.Array:
    return (w.astype(jnp.float32) * s).astype(w.dtype)


def _tops(readers: Sequence[Reader], weights: Sequence[jax.Array], s: jax.Array) -> list[jax.Array]:
    """The largest magnitude in W s, of all weights that share their outer scale, float32 `[]`."""
    # casts keep the order, so that the largest of a column is enough
    own = [jnp.max(_moved(jnp.max(jnp.abs(w), axis=0), s)).astype(jnp.float32) for w in weights]
    groups = [reader.group for reader in readers]
    return [jnp.max(jnp.stack([t for t, g in zip(own, groups, strict=True) if g == mine])) for mine in groups]


def _nearest(format: Format, w: jax.Array, s: jax.Array, top: jax.Array) -> jax.Array:
    """W s rounded to nearest, float32."""
    moved = _moved(w, s[None])
    outer = format.outer(top, np.dtype(w.dtype)) if format.static else None
    return jnp.asarray(format.decode(format.encode(moved, outer)))


def awq(
    *, objective: Objective = "auto", grid: int = 11, rows: int = 1024, sites: Sites = "all"
) -> Transform:
    """Activation-aware scales.

    Args:
      objective: whose rounding is in it: "inputs", "weights", "both"; "auto": inputs, if they are rounded,
        and weights where they have fewer bits than the inputs or the inputs are not rounded.
      grid: how many exponents from 0 to 1.
      rows: how many sampled tokens, at most.
      sites: "norms": inputs that a norm produces; "mlp": also those of down projections; "all": also those of
        attention's output projection, query heads that share values together.
    """
    one_of("awq: objective", objective, get_args(Objective))
    one_of("awq: sites", sites, get_args(Sites))
    if grid < 2 or rows < 1:
        raise InputError(f"awq: grid is {grid} and rows {rows}, needed at least 2 exponents and 1 row")
    apply = functools.partial(_apply, objective, grid, rows, sites)
    return Transform(apply, NEEDS, functools.partial(rewrites, sites=sites))


def _apply(
    objective: Objective, grid: int, rows: int, sites: Sites, params: Params, stats: Stats, context: Context
) -> Params:
    changed: dict[str, Any] = {}
    for fold in folds(context, sites):
        now, first = {**params, **changed}, fold.readers[0]
        if first not in stats:
            raise InputError(
                f"{first}: awq needs statistics of its inputs, but calibration has not seen them"
            )
        if not movable(fold, now):
            continue
        readers = _readers(fold, context, objective)
        absmax = jnp.asarray(stats[first]["absmax"])
        depth = absmax.shape[:-1]
        made = []
        for index in np.ndindex(depth):
            seen = {need: np.asarray(stats[first][need])[index] for need in NEEDS}
            weights = tuple(jnp.asarray(now[name][index]) for name in fold.readers)
            s, before, after = solve(fold, readers, weights, seen, grid, rows)
            made.append(s)
            context.log(Outcome("awq", first, before, after))
        s = jnp.stack(made).reshape(*depth, -1)
        changed |= move(fold, now, s, context, absmax)
    return changed


def solve(
    fold: Fold,
    readers: tuple[Reader, ...],
    weights: tuple[jax.Array, ...],
    stats: Any,
    grid: int,
    rows: int,
) -> tuple[jax.Array, float, float]:
    """The best scales of the producer's channels, float32; the objective without and with them.

    Args:
      stats: of one matrix's inputs. Where no token was seen there are no scales.
    """
    tokens = int(stats["count"])
    if not tokens or not any(r.inputs or r.weights for r in readers):
        return fold.tied(jnp.ones(stats["absmax"].shape, jnp.float32), jnp.max), 0.0, 0.0
    x = fold.tied(jnp.asarray(stats["abssum"], jnp.float32) / tokens, jnp.mean)
    square = sum(jnp.mean(jnp.square(w.astype(jnp.float32)), axis=0) for w in weights) / len(weights)
    tried = candidates(x, jnp.sqrt(fold.tied(jnp.asarray(square), jnp.mean)), grid)
    sample = np.asarray(stats["sample"], np.float32)
    sample = sample[:: -(-len(sample) // rows)]
    gram = jnp.asarray(stats["gram"], jnp.float32) / tokens

    def judged(roughly: bool, tried: jax.Array) -> np.ndarray:
        spread, top = jax.vmap(fold.spread)(tried), jnp.asarray(stats["absmax"])
        found = np.asarray(errors(readers, roughly, weights, spread, jnp.asarray(sample), top, gram))
        return np.where(np.isfinite(found), found, np.inf)

    if len(tried) > 1 + FINALISTS and sum(w.size * w.shape[1] for w in weights) > LARGE:
        likely = np.argsort(judged(True, tried)[1:], kind="stable")[:FINALISTS] + 1
        tried = tried[np.array([0, *sorted(likely)])]
    found = judged(False, tried)
    best = int(np.argmin(found))
    return tried[best], float(found[0]), float(found[best])


def _readers(fold: Fold, context: Context, objective: Objective) -> tuple[Reader, ...]:
    found = []
    for i, name in enumerate(fold.readers):
        scheme = context.schemes[name.removesuffix(".weight")]
        group = next((k for k, g in enumerate(context.shared) if name in g), len(context.shared) + i)
        coarse = scheme.inputs is None or scheme.weights.bits < scheme.inputs.bits
        found.append(
            Reader(
                scheme,
                group,
                scheme.inputs is not None and objective != "weights",
                objective in ("weights", "both") or (objective == "auto" and coarse),
            )
        )
    return tuple(found)
