"""GPTQ: columns are rounded one after another, and each absorbs the errors before it (arXiv 2210.17323).

  minimise tr(G D H D^T),  D = Q - W,   H = sum x x^T of the inputs as the layer will see them

under static scales, those of the step before or the format's own, largest diagonals first. G is the identity;
with gradients in the calibration it is that of the outputs and H weighs tokens by theirs (arXiv 2505.22988),
and rows absorb errors too. `mojax/rounding/feedback.py` is the mathematics.
"""

from __future__ import annotations

import functools
from typing import Any

import jax.numpy as jnp

from mojax.errors import InputError
from mojax.matrices import Matrix, Solved, encode, error, unchanged
from mojax.rounding.feedback import solve_factored
from mojax.rounding.objective import factor
from mojax.transforms.base import Context, Params, Stats, Transform

HOPELESS = 4  # `Factor.raised` where no damping helped


def gptq(*, damping: float = 0.01, act_order: bool = True) -> Transform:
    """Rounding with error feedback.

    Args:
      damping: share of the mean diagonal of H and G that is added; more where there are few tokens.
      act_order: round what has the largest diagonal first; scales stay where they are.
    """
    if not 0 < damping <= 10:
        raise InputError(f"gptq: damping is {damping}, needed a share of the mean diagonal, such as 0.01")
    apply = functools.partial(_apply, functools.partial(solve, damping=damping, act_order=act_order))
    return Transform(apply, ("gram", "count"), encodes=True, phase="encode", anew="codes", chooses=True)


def _apply(solve: Any, params: Params, stats: Stats, context: Context) -> Params:
    return encode("gptq", params, stats, context, solve)


def solve(m: Matrix, *, damping: float, act_order: bool) -> Solved:
    """One matrix; as it was where error feedback does not lower the objective, or cannot know it."""
    width = m.w.shape[1]
    if not m.seen:
        return unchanged(m, "no calibration token reached it, so it is rounded to nearest")
    if 0 < m.tokens < width // 2:
        return unchanged(m, f"{m.tokens} tokens are too few for {width} inputs, so it is rounded to nearest")
    note = f"{m.tokens} tokens for {width} inputs: more damping" if 0 < m.tokens < 8 * width else ""
    h, g = m.objective(damping)
    columns, rows = m.columns(damping, act_order), None if g is None else factor(g, act_order)
    if int(columns.raised) == HOPELESS:
        return unchanged(m, "the sums of its inputs have no Cholesky factor, so it is rounded to nearest")
    w = jnp.asarray(m.w).astype(jnp.float32)
    before = error(m, m.values, h, g)
    values = solve_factored(m.format, w, m.scales, columns, rows).q
    after = error(m, values, h, g)
    if not after < before:
        return Solved(m.scales, m.values, before, before, note)
    return Solved(m.scales, values, before, after, note)
