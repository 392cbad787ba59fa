"""SpinQuant: rotations that are learned, from random Hadamard matrices on (arXiv 2405.16406).

    minimise over orthogonal R   mean over linears of  |q(X R) q(W R)^T - X W^T|^2 / |X W^T|^2
    A = G R^T - R G^T        R <- (I + t/2 A)^-1 (I - t/2 A) R                    (Cayley, arXiv 2002.01113)

G is the gradient with momentum. It passes straight through q, but for its error, which grows with the largest
magnitude of its block: q(x) = x + e top / [top], where e and [top] are held. The objective is of each linear
alone, with the inputs of the source; the paper's is the loss of the whole network, which does not stream.
"""

from __future__ import annotations

import functools
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from mojax.compile import jit
from mojax.errors import InputError
from mojax.formats.base import Format, Scheme
from mojax.kernels.hadamard import hadamard
from mojax.kernels.hadamard_matrices import dividing, signs
from mojax.simulate import grown
from mojax.transforms.base import Context, Outcome, Params, Stats, Transform

MOMENTUM = 0.9
CHECKS = 10  # how often the whole objective is taken
TERMS = 32  # linears of one step, at most
EXPERTS = 8  # of a layer, at most
Matrices = tuple[jax.Array, ...]


def spinquant(
    *,
    residual: bool = True,
    heads: bool = True,
    seed: int = 0,
    steps: int = 100,
    rate: float = 0.03,
    rows: int = 256,
) -> Transform:
    """Learned rotations, merged into the weights. Never worse than where they begin, on their own objective.

    Args:
      residual, heads, seed: as in quarot, from which they begin.
      steps: of descent, all linears each (of larger models 32 in turn).
      rate: how far one step turns, as the norm of t A over the root of the size; falls to 0.
      rows: of sampled tokens per linear.
    Raises:
      InputError: neither is asked for, or a number out of range.
    """
    turns = ("residual",) * bool(residual) + ("heads",) * bool(heads)
    if not turns:
        raise InputError("spinquant: residual and heads are both false; remove the step")
    if min(steps, rows) < 1 or not rate > 0 or seed < 0:
        raise InputError(
            f"spinquant: steps is {steps}, rows {rows}, rate {rate}, seed {seed}; seed must be at least 0, "
            "the others above"
        )
    work = functools.partial(_apply, seed=seed, steps=steps, rate=rate, rows=rows)
    return Transform(work, ("sample",), phase="model", turns=turns)


class Role(NamedTuple):
    """What is static about a linear: how it runs, and which matrices turn its inputs and its outputs."""

    scheme: Scheme
    reads: int | None
    writes: int | None


class Term(NamedTuple):
    """A linear `w [*experts, out, in]` and sampled inputs `x [*experts, rows, in]`, float32."""

    role: Role
    x: np.ndarray
    w: Any


def rounded(format: Format | None, x: jax.Array) -> jax.Array:
    """`x [rows, n]` encoded and decoded; the error has the gradient of the largest magnitude of its block."""
    return x if format is None else grown(format, x, jnp.asarray(format.fake(x)))


def turned(x: jax.Array, r: jax.Array | None) -> jax.Array:
    """`x R` in blocks of the last axis."""
    if r is None:
        return x
    return _dot(x.reshape(-1, len(r)), r).reshape(x.shape)


def _dot(a: jax.Array, b: jax.Array) -> jax.Array:
    return jnp.matmul(a, b, precision="highest", preferred_element_type=jnp.float32)


def loss(role: Role, matrices: Matrices, x: Any, w: Any) -> jax.Array:
    """The error of one linear's outputs, relative to their squares; the mean over experts."""
    if w.ndim > 2:
        return jnp.mean(jax.vmap(functools.partial(loss, role, matrices))(x, w))
    read = None if role.reads is None else matrices[role.reads]
    write = None if role.writes is None else matrices[role.writes]
    x, w = turned(x, read), turned(turned(w, read).T, write).T
    y = _dot(x, w.T)
    got = _dot(rounded(role.scheme.inputs, x), rounded(role.scheme.weights, w).T)
    square = lax.stop_gradient(jnp.sum(jnp.square(y)))
    return jnp.sum(jnp.square(got - y)) / jnp.where(square > 0, square, 1.0)


_loss = jit(static_argnums=(0,))(loss)
_slopes = jit(static_argnums=(0,))(jax.value_and_grad(loss, argnums=1))


@jit()
def cayley(r: jax.Array, g: jax.Array, rate: jax.Array) -> jax.Array:
    """One step along the gradient `g`, of the length `rate`; float32 `[n, n]`, orthogonal as `r` is."""
    a = _dot(g, r.T) - _dot(r, g.T)
    size = jnp.sqrt(jnp.sum(jnp.square(a)))
    a = a * jnp.where(size > 0, rate * jnp.sqrt(float(len(r))) / jnp.where(size > 0, size, 1.0), 0.0) / 2
    eye = jnp.eye(len(r), dtype=jnp.float32)
    r = jnp.linalg.solve(eye + a, _dot(eye - a, r))
    return 1.5 * r - 0.5 * _dot(r, _dot(r.T, r))  # what rounding has added


def solve(terms: Sequence[Term], start: Matrices, steps: int, rate: float) -> tuple[Matrices, float, float]:
    """The best matrices that were seen, and the objective before and after."""

    def whole(matrices: Matrices) -> float:
        return sum(float(_loss(t.role, matrices, t.x, _wide(t.w))) for t in terms) / len(terms)

    before = best = whole(start)
    now, kept = start, start
    speed = tuple(jnp.zeros_like(r) for r in start)
    for i in range(steps):
        some = [terms[(i * TERMS + j) % len(terms)] for j in range(min(TERMS, len(terms)))]
        slopes = [_slopes(t.role, now, t.x, _wide(t.w))[1] for t in some]
        speed = tuple(MOMENTUM * v + sum(g[k] for g in slopes) for k, v in enumerate(speed))
        step = jnp.float32(rate * (1 - i / steps))
        now = tuple(cayley(r, v, step) for r, v in zip(now, speed, strict=True))
        if (i + 1) % max(1, steps // CHECKS) == 0 or i + 1 == steps:
            value = whole(now)
            if value < best:
                best, kept = value, now
    return kept, before, best


def _wide(w: Any) -> np.ndarray:
    return np.asarray(w() if callable(w) else w, np.float32)


def start(seed: int, name: str, size: int) -> jax.Array:
    """The random Hadamard matrix that quarot would take."""
    eye, flips = np.eye(size, dtype=np.float32), signs(seed, name, size).astype(np.float32)
    return hadamard(eye, block=dividing(size), signs=flips)


def _apply(
    params: Params, stats: Stats, context: Context, *, seed: int, steps: int, rate: float, rows: int
) -> Params:
    places: dict[tuple[str, int], int] = {}
    for i, space in enumerate(context.spaces):
        places |= dict.fromkeys(space.axes, i)
    terms = []
    for module, scheme in context.schemes.items():
        name = module + ".weight"
        reads, writes = places.get((name, -1)), places.get((name, -2))
        if name in stats and (reads is not None or writes is not None):
            x = np.asarray(stats[name]["sample"], np.float32)
            some = slice(None) if x.ndim == 2 else slice(None, None, -(-len(x) // EXPERTS))
            x = x[..., :: -(-x.shape[-2] // rows), :] if x.ndim == 2 else x[some, :: -(-x.shape[-2] // rows)]
            read = functools.partial(_read, params, name, some)
            terms.append(Term(Role(scheme, reads, writes), x, read))
    begin = tuple(start(seed, s.name, s.size) for s in context.spaces)
    if not terms:
        return {s.name: np.asarray(r) for s, r in zip(context.spaces, begin, strict=True)}
    found, before, after = solve(terms, begin, steps, rate)
    context.log(Outcome("spinquant", context.spaces[0].name, before, after))
    return {s.name: np.asarray(r, np.float32) for s, r in zip(context.spaces, found, strict=True)}


def _read(params: Mapping[str, Any], name: str, some: slice) -> np.ndarray:
    w = np.asarray(params[name])
    return w[some] if w.ndim > 2 else w
