"""How long functions of arrays take on the device that is there, and which implementation ran.

A program is one function called on several items (weights) in a row, more of them than a cache holds, so that
every call reads memory. XLA can neither merge the calls, as items differ, nor join them into a larger one,
as each waits for the one before. Programs are queued many times before the host waits once.
"""

from __future__ import annotations

import math
import re
import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import jax
from jax import lax

CACHE = 150e6  # bytes that items fill together: more than the L2 of an H200 (60 MB) or a B200 (126 MB)
CALLS = 16  # in a program, at most: each is compiled
_SCOPE = re.compile(r"\b\w+\[([^\[\]\"]+)\]/")  # as `mojax.kernels.base.dispatch` names what it runs


class Case(NamedTuple):
    """`fn(shared, item)`, to be called on one item after the other; all are pytrees of arrays."""

    fn: Callable[[Any, Any], Any]
    shared: Any
    items: Sequence[Any]


class Timing(NamedTuple):
    """What one call takes.

    Attributes:
      seconds: between calls in a full queue: the median of several rounds on a GPU, the least on a CPU, which
        others use too.
      spread: (slowest - fastest round) / seconds.
      kernels: seconds that the GPU spends in kernels, by CUPTI; None where that is not to be had.
      ran: implementations that `dispatch` chose; "" where it was not asked.
    """

    seconds: float
    spread: float
    kernels: float | None
    ran: str


def on_gpu() -> bool:
    return jax.default_backend() == "gpu"


def copies(nbytes: float) -> int:
    """How many items of so many bytes a program is to take turns with."""
    fewest, most = (4, CALLS) if on_gpu() else (2, 4)
    return min(max(math.ceil(CACHE / max(nbytes, 1)), fewest), most)


def sharing(fn: Callable[[Any, Any], Any]) -> Callable[[Any, Sequence[Any]], list[Any]]:
    """The program of a case: every result, each call after the one before."""
    once = jax.jit(fn)  # traced and lowered once for all items

    def program(shared: Any, items: Sequence[Any]) -> list[Any]:
        results = []
        for item in items:
            shared, y = lax.optimization_barrier((shared, once(shared, item)))
            results.append(y)
        return results

    return program


def race(cases: Mapping[str, Case], quick: bool = False, cupti: bool = True) -> dict[str, Timing | str]:
    """Times of cases that take turns; for one that cannot run, why: the first line of its error."""
    found: dict[str, Timing | str] = {}
    programs, ran = {}, {}
    for name, case in cases.items():
        try:
            lowered = jax.jit(sharing(case.fn)).lower(case.shared, case.items)
            ran[name] = implementations(lowered)
            programs[name] = lowered.compile()
            jax.block_until_ready(programs[name](case.shared, case.items))
        except Exception as error:  # whatever it is: the other cases go on
            programs.pop(name, None)
            found[name] = first_line(error)
    goal = (0.04 if on_gpu() else 0.2) / (4 if quick else 1)  # seconds of one round
    queued = {n: max(1, min(1000, round(goal / seconds(p, cases[n], 1)))) for n, p in programs.items()}
    rounds: dict[str, list[float]] = {name: [] for name in programs}
    for _ in range(5):
        for name, program in programs.items():
            rounds[name].append(seconds(program, cases[name], queued[name]) / len(cases[name].items))
    for name, times in rounds.items():
        best = (statistics.median if on_gpu() else min)(times)
        kernels = in_kernels(programs[name], cases[name]) if cupti and on_gpu() else None
        found[name] = Timing(best, (max(times) - min(times)) / best, kernels, ran[name])
    return {name: found[name] for name in cases}


def seconds(program: Callable[..., Any], case: Case, times: int) -> float:
    """Seconds of one run of a program, of several that are queued."""
    start, results = time.perf_counter(), None
    for _ in range(times):
        results = program(case.shared, case.items)
    jax.block_until_ready(results)
    return (time.perf_counter() - start) / times


def in_kernels(program: Any, case: Case) -> float | None:
    """Seconds in kernels per call, by CUPTI; None where this jax cannot say."""
    try:
        from jax.experimental.mosaic.gpu import profiler

        _, found = profiler.measure(program)(case.shared, case.items)
        each = found if isinstance(found, list) else [found]
        return sum(float(t[1] if isinstance(t, tuple) else t) for t in each) / 1e3 / len(case.items)
    except Exception:  # another signature, no CUPTI, no permission
        return None


def implementations(lowered: Any) -> str:
    """The names that `dispatch` gave to what it ran, from the program itself."""
    names = dict.fromkeys(_SCOPE.findall(lowered.as_text(debug_info=True)))
    return ", ".join(names)


def first_line(error: Exception) -> str:
    """An error in one line of a table."""
    lines = str(error).strip().splitlines() or [""]
    return f"{type(error).__name__}: {lines[0]}".replace("|", "/")[:300]
