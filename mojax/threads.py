"""Independent pieces of work side by side: XLA compiles, and on a CPU often runs, on one core each."""

from __future__ import annotations

import collections
import os
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import TypeVar

MOST = 8  # every piece has working memory of its own; XLA spreads large ones over the cores by itself
A = TypeVar("A")
B = TypeVar("B")


def cores() -> int:
    """How many pieces run side by side."""
    most = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    return min(most, MOST)


def each(work: Callable[[A], B], items: Iterable[A]) -> list[B]:
    """`[work(item) for item in items]`, as many at a time as this process may use cores, at most `MOST`."""
    with ThreadPoolExecutor(max_workers=cores()) as pool:
        return list(pool.map(work, items))


def flow(work: Callable[[A], B], items: Iterable[A]) -> Iterator[B]:
    """The same, one result after the other; one more than run side by side may wait."""
    with ThreadPoolExecutor(max_workers=cores()) as pool:
        begun: collections.deque = collections.deque()
        for item in items:
            begun.append(pool.submit(work, item))
            if len(begun) > cores():
                yield begun.popleft().result()
        while begun:
            yield begun.popleft().result()
