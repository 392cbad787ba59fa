"""INT8: symmetric 8-bit integers with one scale per output channel, token or tensor.

  w ~ q * s,  q = clip(round(w / s), -128, 127),  s = amax / 127.5 ("checkpoint") or amax / 127 ("float32")

"checkpoint" rounds the scale and the quotient to the dtype of the checkpoint (compressed-tensors);
"float32" is ModelOpt's rule.
"""

from __future__ import annotations

import dataclasses
from typing import Any, Literal

import jax
import jax.numpy as jnp
import numpy as np

from mojax.formats.base import Array, Format, one_of
from mojax.formats.numerics import amax, divide, linear_scale, narrow, rne

_LEVELS = {"checkpoint": 127.5, "float32": 127.0}


@dataclasses.dataclass(frozen=True)
class INT8(Format):
    """INT8. Scales: "inner" `[..., 1]` per channel or token (a row), "outer" float32 `[]` per tensor."""

    per: Literal["channel", "token", "tensor"] = "channel"

    name = "int8"
    bits = 8
    largest = 127.0

    def __post_init__(self) -> None:
        one_of("int8 per", self.per, ("channel", "token", "tensor"))

    @property
    def static(self) -> bool:
        return self.per == "tensor"

    def fit_outer(self, top: jax.Array, dtype: np.dtype) -> jax.Array:
        if self.per != "tensor":
            return super().fit_outer(top, dtype)
        return self._scale(top, self.rounded_to(dtype))

    def fit(self, w: jax.Array, outer: Array | None = None) -> dict[str, jax.Array]:
        if self.per == "tensor":
            return {"outer": self.own_outer(amax(w, None), w.dtype, outer)}
        return {"inner": self._scale(amax(w, keepdims=True), w.dtype).astype(self.working(w.dtype))}

    def round(self, w: jax.Array, scales: dict[str, jax.Array]) -> jax.Array:
        y = narrow(divide(w.astype(jnp.float32), _only(scales)), self.working(w.dtype))
        return jnp.clip(rne(y), -128, 127).astype(jnp.int8)

    def value(self, codes: jax.Array, scales: dict[str, jax.Array]) -> jax.Array:
        return codes.astype(jnp.float32) * _only(scales)

    def element(self, y: jax.Array, zero: jax.Array | None = None) -> jax.Array:
        return jnp.clip(rne(y), -128, 127)

    def factored(
        self, codes: jax.Array, scales: dict[str, jax.Array], dtype: Any
    ) -> tuple[jax.Array, jax.Array | None]:
        return codes, _only(scales)

    def _scale(self, top: jax.Array, dtype: np.dtype) -> jax.Array:
        return linear_scale(top, _LEVELS[self.arithmetic], self.working(dtype), self.empty(dtype))


def _only(scales: dict[str, jax.Array]) -> jax.Array:
    (scale,) = scales.values()
    return scale.astype(jnp.float32)


FORMAT = INT8
