"""Independent pieces of work side by side: XLA compiles, and on a CPU often runs, on one core each."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable
from concurrent.futures import ThreadPoolExecutor
from typing import TypeVar

MOST = 8  # every piece has working memory of its own; XLA spreads large ones over the cores by itself
A = TypeVar("A")
B = TypeVar("B")


def each(work: Callable[[A], B], items: Iterable[A]) -> list[B]:
    """`[work(item) for item in items]`, as many at a time as this process may use cores, at most `MOST`."""
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    with ThreadPoolExecutor(max_workers=min(cores, MOST)) as pool:
        return list(pool.map(work, items))
