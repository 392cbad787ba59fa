"""What a plan takes of memory: blocks, activations, and the statistics that its steps need."""

from __future__ import annotations

import math
from collections.abc import Mapping

from mojax import experts
from mojax.gradients import block_rows
from mojax.inputs import bytes_held
from mojax.plans import READS, Plan, Row
from mojax.threads import cores

SQUARE = ("gram", "seen_gram", "drift")  # statistics [in, in]
DESCENT = 4  # a weight, what is learned of it, rounded, and its slope
SOLVING = 5  # matrices as large as H beside it: damped, in order, factored, inverted, and one on the way


def expected(plan: Plan, tokens: int) -> int:
    """Bytes to expect: the largest block three times (experts five), activations of `tokens` in both streams,
    `statistics`, and what descent on a block's output needs."""
    size: dict[str, int] = {}
    for r in plan.rows:  # experts are stacked and decoded whole
        size[r.block] = size.get(r.block, 0) + r.before * (5 if experts.starred(r.name) else 3)
    both = 2 * tokens * _hidden(plan) * 4
    descent = _descent(plan) + both if plan.tuning or plan.learns else 0
    return max(size.values()) + both + statistics(plan, tokens) + descent


def _descent(plan: Plan) -> int:
    """The weights of a block in float32, `DESCENT` times."""
    size: dict[str, int] = {}
    for r in plan.rows:
        if r.scheme is not None and r.block:
            size[r.block] = size.get(r.block, 0) + 4 * math.prod(r.shape)
    return DESCENT * max(size.values(), default=0)


def statistics(plan: Plan, tokens: int) -> int:
    """Bytes of what calibration sums up, of the block where that is most.

    Sums [in, in] of the widest input, once and once for every batch that runs beside the others, and what
    solving makes of them; for migrations, of all inputs of a block. Inputs of linears that are kept until
    the block is done. With gradients, G of all weights and the inputs of all blocks.
    """
    encoding, moving = (
        sum(n in needs for n in SQUARE) for needs in (plan.encoding.needs, plan.migration.needs)
    )
    found = [0]
    for widths in _inputs(plan):
        squares = [4 * many * width**2 for width, many in widths]
        sums = max(squares, default=0) * encoding * (1 + cores()) if encoding else 0
        solving = SOLVING * 4 * max((width for width, _ in widths), default=0) ** 2 if encoding else 0
        whole = sum(squares) * moving * (1 + cores())
        streams = max(1, plan.sourced + plan.sequential)
        kept = streams * sum(bytes_held(tokens, width) for width, many in widths[1:] if many == 1)
        kept = kept if encoding else 0
        found.append(max(sums + solving + kept, whole))
    return max(found) + (_gradients(plan, tokens) if "gram" in plan.encoding.needs else 0)


def _gradients(plan: Plan, tokens: int) -> int:
    draws = plan.recipe.calibration.gradients
    if not draws:
        return 0
    whole: dict[str, int] = {}
    for r in plan.rows:
        if r.scheme is not None and r.block:
            out = r.shape[-2]
            whole[r.block] = whole.get(r.block, 0) + 4 * math.prod(r.shape[:-1]) * block_rows(out)
    if not whole:
        return 0
    beside = max(whole.values()) * draws * cores()
    return sum(whole.values()) + beside + tokens * _hidden(plan) * 4 * (len(whole) + 2 * draws)


def _hidden(plan: Plan) -> int:
    return max((r.shape[-1] for r in plan.rows if r.role == "embedding"), default=0)


def _inputs(plan: Plan) -> list[list[tuple[int, int]]]:
    """For each kind of block its inputs in the order of the program: how wide, and of how many experts."""
    rows: Mapping[str, Row] = {r.name.removeprefix(r.block): r for r in plan.rows if r.scheme is not None}
    found = []
    for sites in plan.sites.values():
        seen: dict[int, tuple[int, int]] = {}
        for site in sites:
            if site.op in READS and site.weight in rows:
                shape = rows[site.weight].shape
                seen.setdefault(site.group, (shape[-1], math.prod(shape[:-2])))
        found.append(list(seen.values()))
    return found
