"""Cutting weights into pieces of one height, so that weights of many heights share one compiled program."""

from __future__ import annotations

import math
from collections.abc import Iterable
from typing import Any

ALIGNED = 128  # no block of any format is higher


def common_rows(shapes: Iterable[tuple[int, ...]]) -> int:
    """The largest height that divides every `[out, in]` and no block crosses; 0: do not cut."""
    rows = math.gcd(*(shape[0] for shape in shapes))
    return rows if rows % ALIGNED == 0 else 0


def cut(w: Any, rows: int) -> list[Any]:
    """`w [out, ...]` in pieces `[rows, ...]`, or whole if `rows` is 0."""
    return [w[i : i + rows] for i in range(0, len(w), rows)] if rows else [w]
