"""Coordinate descent on codes, and on scales and codes together, from whatever the step before left.

  entry   the value that is best while all others stay (arXiv 2309.01885)
  block   for every legal scale the codes of the block that error feedback finds; the best, if it is better

Never upwards on tr(G D H D^T); `mojax/rounding/descent.py` is the mathematics.
"""

from __future__ import annotations

import functools
from typing import Any

import jax.numpy as jnp

from mojax.errors import InputError
from mojax.matrices import Matrix, Solved, encode, error, unchanged
from mojax.rounding import descent
from mojax.transforms.base import Context, Params, Stats, Transform


def refine(
    *, rounds: int = 3, sweeps: int = 4, scales: bool = True, damping: float = 0.01, signed: bool = False
) -> Transform:
    """Descent from given codes.

    Args:
      rounds: of block moves followed by sweeps over single entries.
      sweeps: in a round.
      scales: move blocks with their scales too; False leaves the scales alone.
      damping: as in gptq.
      signed: negative scales too, as in local_hessian.
    """
    if rounds < 1 or sweeps < 1:
        raise InputError(f"refine: rounds is {rounds} and sweeps is {sweeps}, both must be 1 or more")
    work = functools.partial(
        solve, rounds=rounds, sweeps=sweeps, scales=scales, damping=damping, signed=signed
    )
    return Transform(
        functools.partial(_apply, work), ("gram", "count"), encodes=True, phase="encode", chooses=True
    )


def _apply(solve: Any, params: Params, stats: Stats, context: Context) -> Params:
    return encode("refine", params, stats, context, solve)


def solve(m: Matrix, *, rounds: int, sweeps: int, scales: bool, damping: float, signed: bool) -> Solved:
    """One matrix."""
    if not m.seen:
        return unchanged(m)
    h, g = m.objective(damping)
    w = jnp.asarray(m.w).astype(jnp.float32)
    values = m.values
    before = error(m, values, h, g)
    if scales:
        q, new = descent.refine(m.format, w, values, m.scales, h, g, rounds, sweeps, signed=signed)
    else:
        q, new = descent.sweep(m.format, w, values, m.scales, h, g, rounds * sweeps), m.scales
    after = error(m, q, h, g)
    if not after < before:
        return Solved(m.scales, values, before, before)
    return Solved(new, q, before, after)
