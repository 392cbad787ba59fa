"""Independent pieces of work side by side: XLA compiles, and on a CPU often runs, on one core each."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable
from concurrent.futures import ThreadPoolExecutor
from typing import TypeVar

A = TypeVar("A")
B = TypeVar("B")


def each(work: Callable[[A], B], items: Iterable[A]) -> list[B]:
    """`[work(item) for item in items]`, as many at a time as there are cores; the order is kept."""
    with ThreadPoolExecutor(max_workers=os.cpu_count() or 1) as pool:
        return list(pool.map(work, items))
