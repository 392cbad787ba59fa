"""`jit` as this project wants it: rounding where the program rounds, and quick to compile."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any, TypeVar

import jax

F = TypeVar("F", bound=Callable[..., Any])


def jit(
    static_argnums: tuple[int, ...] = (), donate_argnums: tuple[int, ...] = (), sequential: bool = False
) -> Callable[[F], F]:
    """`jax.jit` with compiler options, as a decorator; of its methods there is `lower`.

    XLA may keep bfloat16 intermediates in float32. A quantized input that is one unit away flips codes, so a
    simulation would drift from what a server computes: that freedom is taken away. On a CPU, LLVM's first
    level gives the same speed here as its third and compiles in two thirds of the time.

    Args:
      sequential: on a CPU, operations run in the order that takes the least memory, not side by side.
    """

    def decorate(fn: F) -> F:
        @functools.cache
        def compiled() -> Callable[..., Any]:  # at the first call: the backend is not asked for by an import
            options: dict[str, Any] = {"xla_allow_excess_precision": False}
            if jax.default_backend() == "cpu":
                options["xla_backend_optimization_level"] = 1
                if sequential:
                    options["xla_cpu_scheduler_type"] = "CPU_SCHEDULER_TYPE_MEMORY_OPTIMIZED"
            return jax.jit(
                fn,
                static_argnums=static_argnums,
                donate_argnums=donate_argnums,
                compiler_options=options,
            )

        @functools.wraps(fn)
        def call(*args: Any) -> Any:
            return compiled()(*args)

        call.lower = lambda *args: compiled().lower(*args)  # type: ignore[attr-defined]
        return call  # type: ignore[return-value]

    return decorate
