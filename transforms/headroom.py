"""Static NVFP4 input scales that keep the scales of small blocks normal numbers, and leave room above.

  top = max(16384 p_1, p_99.99)   of the largest magnitudes of all blocks of 16

A block b has the E4M3 scale 448 b / top, which is a normal number for top / 28672 <= b <= top (448 / 2^-6 =
28672). From the maximum alone a rare spike makes the scales of ordinary blocks subnormal; here it saturates.
Where blocks differ less than that, `top` lies above the maximum, at no cost. The rule is that of ModelOpt's
nvfp4_act_headroom.
"""

from __future__ import annotations

import functools
from typing import Any

import numpy as np

from mojax.errors import InputError
from mojax.input_scales import Chosen, Seen, choose
from mojax.transforms.base import Context, Params, Stats, Transform

NORMAL = 28672.0  # from the largest block to the smallest whose scale is a normal number
SILENT = 1e-6  # of the upper anchor: smaller blocks carry nothing


def headroom(*, ratio: float = 16384.0, low: float = 1.0, high: float = 99.99) -> Transform:
    """Headroom for NVFP4 inputs.

    Args:
      ratio: from the small blocks to the magnitude that the scale is for.
      low, high: percentiles of the blocks' largest magnitudes, for small and for large.
    """
    if not 1 <= ratio < NORMAL or not 0 <= low < high <= 100:
        raise InputError(
            f"headroom: ratio is {ratio}, low {low}, high {high}; needed 1 <= ratio < {NORMAL:.0f} and "
            "percentiles low < high"
        )
    apply = functools.partial(_apply, functools.partial(solve, ratio=ratio, low=low, high=high))
    return Transform(apply, ("absmax", "count", "sample"), phase="encode")


def _apply(solve: Any, params: Params, stats: Stats, context: Context) -> Params:
    return choose("headroom", params, stats, context, solve)


def solve(seen: Seen, *, ratio: float, low: float, high: float) -> Chosen:
    """One input; the objective is the share of blocks whose scale is no normal number."""
    if seen.format.name != "nvfp4":
        return Chosen(seen.top, note=f"headroom is for nvfp4 inputs, {seen.format.label} keeps its maximum")
    size = seen.format.block_columns
    samples = (np.asarray(part.stats["sample"], np.float32) for part in seen.parts)
    blocks = np.concatenate([np.abs(x).reshape(-1, size).max(-1) for x in samples])
    large = float(np.percentile(blocks[blocks > 0], high)) if np.any(blocks > 0) else 0.0
    blocks = blocks[blocks > SILENT * large]
    if not blocks.size:
        return Chosen(seen.top)
    top = max(ratio * float(np.percentile(blocks, low)), large)
    return Chosen(top, outside(blocks, seen.top), outside(blocks, top))


def outside(blocks: np.ndarray, top: float) -> float:
    """The share of blocks, by their largest magnitudes, that have no normal E4M3 scale under `top`."""
    return float(np.mean((blocks > top) | (blocks < top / NORMAL)))
