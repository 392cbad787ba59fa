"""`jit` as this project wants it: rounding where the program rounds, and quick to compile."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any, TypeVar

import jax

F = TypeVar("F", bound=Callable[..., Any])


def jit(static_argnums: tuple[int, ...] = (), donate_argnums: tuple[int, ...] = ()) -> Callable[[F], F]:
    """`jax.jit` with two compiler options, as a decorator.

    XLA may keep bfloat16 intermediates in float32. A quantized input that is one unit away flips codes, so a
    simulation would drift from what a server computes: that freedom is taken away. On a CPU, LLVM's first
    level gives the same speed here as its third and compiles in two thirds of the time.
    """

    def decorate(fn: F) -> F:
        @functools.cache
        def compiled() -> Callable[..., Any]:  # at the first call: the backend is not asked for by an import
            options: dict[str, Any] = {"xla_allow_excess_precision": False}
            if jax.default_backend() == "cpu":
                options["xla_backend_optimization_level"] = 1
            return jax.jit(
                fn,
                static_argnums=static_argnums,
                donate_argnums=donate_argnums,
                compiler_options=options,
            )

        @functools.wraps(fn)
        def call(*args: Any) -> Any:
            return compiled()(*args)

        return call  # type: ignore[return-value]

    return decorate
