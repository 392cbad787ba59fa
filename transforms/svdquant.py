"""A low-rank branch in 16 bits takes what is hard to round (SVDQuant, arXiv 2411.05007).

  W = B A + R,   y = q(x) q(R)^T + (x A^T) B^T,   A [r, in], B [out, r]

fit "weight": B A is the best approximation of W, and R is what every later step encodes. In further rounds it
is that of W - q(R), in the metric of the inputs, and the best so far stays (LoftQ, arXiv 2310.08659). fit
"error": of W - Q for codes Q that a step before has chosen,

  minimise tr(D H D^T),  D = Q + B A - W:   B A S = the best approximation of (W - Q) S,   H = S S^T

the least error of the outputs, in closed form (QERA, arXiv 2410.06040). R is always the difference to the
product of A and B as they are kept.
"""

from __future__ import annotations

import functools
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from mojax import beside
from mojax.compile import jit
from mojax.errors import InputError, NotFiniteError
from mojax.formats.base import Format, QTensor
from mojax.kernels.hadamard import hadamard
from mojax.matrices import own_outer
from mojax.rounding.objective import damped, product, value
from mojax.threads import each
from mojax.transforms.base import Context, Outcome, Params, Stats, Transform

ELSEWHERE = "has no branch: there is one beside the linears of blocks alone, and none beside experts"


class Branch(NamedTuple):
    """What became of one weight.

    Attributes:
      a, b: the leaves, `[r, in]` and `[out, r]`; of zeros where no branch is better.
      rest: float32 `[out, in]`, W - B A.
      before, after: tr(D H D^T) without and with it.
    """

    a: Any
    b: Any
    rest: jax.Array
    before: float
    after: float


def svdquant(
    *,
    rank: int = 32,
    rounds: int = 2,
    fit: Literal["weight", "error"] = "weight",
    metric: Literal["inputs", "weights"] = "inputs",
    damping: float = 0.01,
) -> Transform:
    """A low-rank branch beside every linear of the blocks; experts, heads and lookups have none.

    Args:
      rank: of the branch; 0 for no step at all.
      rounds: how often, after the first, B A is fitted to what rounding to nearest leaves.
      fit: "weight": before codes are chosen; "error": after a step has chosen them, which stay.
      metric: what an error costs: "inputs": of the outputs, which needs data; "weights": of the weights.
      damping: share of the mean diagonal of H that is added; more where there are few tokens.
    """
    if not 0 <= rank or rounds < 0 or fit not in ("weight", "error") or metric not in ("inputs", "weights"):
        raise InputError(
            f"svdquant: rank is {rank}, rounds {rounds}, fit {fit!r}, metric {metric!r}; needed 0 or more, 0 "
            "or more, 'weight' or 'error', 'inputs' or 'weights'"
        )
    if not 0 < damping <= 10:
        raise InputError(f"svdquant: damping is {damping}, needed a share of the mean diagonal, such as 0.01")
    if not rank:
        return Transform(lambda params, stats, context: {}, phase="encode")
    apply = functools.partial(_apply, rounds, fit, damping)
    needs = ("gram", "count") if metric == "inputs" else ()
    return Transform(apply, needs, encodes=fit == "error", phase="encode", rank=rank)


def _apply(
    rounds: int, fit: str, damping: float, params: Params, stats: Stats, context: Context
) -> dict[str, Any]:
    for module, scheme in context.schemes.items():
        if not scheme.rank:
            context.log(Outcome("svdquant", module + ".weight", 0.0, 0.0, ELSEWHERE))
    modules = [module for module, scheme in context.schemes.items() if scheme.rank]
    found = each(lambda m: _module(m, rounds, fit, damping, params, stats, context), modules)
    for _, said in found:
        context.log(said)
    return {name: leaf for leaves, _ in found for name, leaf in leaves.items()}


def _module(
    module: str, rounds: int, fit: str, damping: float, params: Params, stats: Stats, context: Context
) -> tuple[dict[str, Any], Outcome]:
    """The leaves of one linear: A, B, and what its codes stand for from now on; and what became of it."""
    name, scheme = module + ".weight", context.schemes[module]
    now, target, seen = params[name], context.targets[name], stats.get(name, {})
    if not isinstance(now, QTensor) and fit == "error":
        raise InputError(
            f"steps: svdquant with fit: error corrects codes, and no step before it has chosen those of "
            f"{name}; put it after rtn, mse or gptq, or use fit: weight"
        )
    w = jnp.asarray(target).astype(jnp.float32)
    if not bool(jnp.isfinite(jnp.sum(w))):
        raise NotFiniteError(
            f"{name}: holds NaN or infinity, which has no singular vectors; repair the checkpoint, or add "
            f"--keep={name} --noevaluate to leave this tensor as it is"
        )
    h = None
    if "gram" in seen and np.any(np.diagonal(np.asarray(seen["gram"]))):
        h = damped(jnp.asarray(seen["gram"]), float(np.asarray(seen["count"])), damping)
    kept = beside.dtype_of(target.dtype)
    first = beside.branch(params, module)  # of the same step before
    w = w if first is None else w + _turned(beside.product(*first), scheme.hadamard)
    values = jnp.asarray(now.format.decode(now)) if fit == "error" else None
    rounding = Rounding(scheme.weights, np.dtype(target.dtype), kept, scheme.hadamard)
    made = solve(w, h, rounding, scheme.rank, rounds, values, first)
    unseen = "no calibration token reached it, so errors of its weights count alike"
    note = unseen if h is None and "gram" in seen else ""
    names = beside.leaves(module)
    rest = np.asarray(made.rest.astype(target.dtype))
    leaves = {names[0]: np.asarray(made.a), names[1]: np.asarray(made.b), name: rest}
    return leaves, Outcome("svdquant", name, made.before, made.after, note)


class Rounding(NamedTuple):
    """How a weight and its branch are kept: format and dtype of the weight, dtype of A and B, order of H."""

    format: Format
    dtype: np.dtype
    kept: np.dtype
    hadamard: int = 0

    def near(self, rest: jax.Array) -> jax.Array:
        """`rest` rounded to nearest, under the format's own scales; float32."""
        rest = rest.astype(self.dtype)
        outer = own_outer(self.format, np.float32(jnp.max(jnp.abs(rest))), self.dtype)
        return jnp.asarray(self.format.decode(self.format.encode(rest, outer)))


def solve(
    w: jax.Array,
    h: jax.Array | None,
    rounding: Rounding,
    rank: int,
    rounds: int = 0,
    values: jax.Array | None = None,
    first: beside.Branch | None = None,
) -> Branch:
    """The best branch that was tried; none, or the one that was there, is a candidate.

    Args:
      w: float32 `[out, in]`, rotated if its input is.
      h: damped `[in, in]`; None: the identity.
      values: float32 `[out, in]`, what codes that stay decode to; None: codes are the nearest to W - B A.
      first: A and B at hand.
    """
    metric = jnp.eye(w.shape[1], dtype=jnp.float32) if h is None else h
    root = None if h is None else jnp.linalg.cholesky(h)
    root = root if root is None or bool(jnp.all(jnp.isfinite(root))) else None

    def tried(a: Any, b: Any) -> Branch:
        low = _turned(beside.product(a, b), rounding.hadamard)
        rest = w - low
        error = float(value((rounding.near(rest) if values is None else values) - rest, metric))
        return Branch(a, b, rest, error, error)

    def fitted(e: jax.Array, root: jax.Array | None) -> Branch:
        a, b = low_rank(rank, e, root)
        return tried(_turned(a, rounding.hadamard).astype(rounding.kept), b.astype(rounding.kept))

    zeros = [jnp.zeros(s, rounding.kept) for s in ((rank, w.shape[1]), (w.shape[0], rank))]
    best = tried(*(zeros if first is None else map(jnp.asarray, first)))
    before = best.before
    now = fitted(w, None) if values is None else fitted(w - values, root)
    for i in range(rounds + 1 if values is None else 1):
        if i:
            now = fitted(w - rounding.near(now.rest), root)
        best = now if now.after < best.after else best
    return best._replace(before=before)


def _turned(w: jax.Array, block: int) -> jax.Array:
    return hadamard(w, block=block) if block else w


@jit(static_argnums=(0,))
def low_rank(rank: int, e: jax.Array, root: jax.Array | None) -> tuple[jax.Array, jax.Array]:
    """A `[rank, in]` and B `[out, rank]`, float32, that minimise |(e - B A) root| (Frobenius).

    The leading eigenvectors of the smaller Gram matrix, then a sweep of subspace iteration.

    Args:
      e: float32 `[out, in]`.
      root: lower triangular `[in, in]`; None: the identity.
    """
    m = e if root is None else product(e, root)
    tall = m.shape[0] > m.shape[1]
    m = m.T if tall else m
    _, vectors = jnp.linalg.eigh(product(m, m.T))
    x, _ = jnp.linalg.qr(product(m.T, vectors[:, -rank:]))
    y, _ = jnp.linalg.qr(product(m, x))
    a, b = product(y.T, m), y
    a, b = (b.T, a.T) if tall else (a, b)
    if root is not None:
        a = lax.linalg.triangular_solve(root, a, left_side=False, lower=True)
    of_a, of_b = jnp.linalg.norm(a, axis=1), jnp.linalg.norm(b, axis=0)  # equal ones fit float16 best
    s = jnp.sqrt(jnp.where(of_a * of_b > 0, of_b / jnp.where(of_a > 0, of_a, 1.0), 1.0))
    return a * s[:, None], b / s[None]
