"""FP8: E4M3 elements with one scale per tensor, output channel, token or block of 128 x 128.

  w ~ e4m3 * s,  s = amax / 448

"checkpoint" rounds the scale and the quotient to the dtype of the checkpoint (compressed-tensors). "float32"
is ModelOpt's rule: float32, except that a quotient by the scale of a whole tensor has the weight's dtype.
"""

from __future__ import annotations

import dataclasses
from typing import Any, Literal

import jax
import jax.numpy as jnp
import numpy as np

from mojax.formats.base import Array, Format, one_of
from mojax.formats.numerics import amax, blocks, divide, e4m3, linear_scale, narrow

_BLOCK = 128


@dataclasses.dataclass(frozen=True)
class FP8(Format):
    """FP8 E4M3.

    Scales: "outer" float32 `[]` per tensor; "inner" `[..., 1]` per channel or token (one per row), or
    `[..., ceil(out / 128), ceil(in / 128)]` per block. Inputs per block: groups of 128 along the last axis.
    """

    per: Literal["tensor", "channel", "token", "block"] = "tensor"

    name = "fp8"
    bits = 8
    largest = 448.0

    def __post_init__(self) -> None:
        one_of("fp8 per", self.per, ("tensor", "channel", "token", "block"))

    @property
    def block_rows(self) -> int:
        return _BLOCK if self.per == "block" else 1

    @property
    def block_columns(self) -> int:
        return _BLOCK if self.per == "block" else 0

    @property
    def static(self) -> bool:
        return self.per == "tensor"

    def check(self, shape: tuple[int, ...]) -> str | None:
        if self.per == "block" and len(shape) < 2:
            return f"shape {shape} has no blocks of 128 x 128"
        return None

    def fit_outer(self, top: jax.Array, dtype: np.dtype) -> jax.Array:
        if self.per != "tensor":
            return super().fit_outer(top, dtype)
        return self._scale(top, self.rounded_to(dtype))

    def fit(self, w: jax.Array, outer: Array | None = None) -> dict[str, jax.Array]:
        if self.per == "tensor":
            return {"outer": self.own_outer(amax(w, None), w.dtype, outer)}
        top = _block_amax(w) if self.per == "block" else amax(w, keepdims=True)
        return {"inner": self._scale(top, w.dtype).astype(self.working(w.dtype))}

    def round(self, w: jax.Array, scales: dict[str, jax.Array]) -> jax.Array:
        y = divide(w.astype(jnp.float32), self._spread(scales, w.shape))
        return e4m3(narrow(y, w.dtype if self.per == "tensor" else self.working(w.dtype)))

    def value(self, codes: jax.Array, scales: dict[str, jax.Array]) -> jax.Array:
        return codes.astype(jnp.float32) * self._spread(scales, codes.shape)

    def element(self, y: jax.Array, zero: jax.Array | None = None) -> jax.Array:
        return e4m3(y).astype(jnp.float32)

    def factored(
        self, codes: jax.Array, scales: dict[str, jax.Array], dtype: Any
    ) -> tuple[jax.Array, jax.Array | None]:
        if self.per == "block":
            return super().factored(codes, scales, dtype)
        (scale,) = scales.values()
        return codes.astype(jnp.bfloat16), scale.astype(jnp.float32)

    def fake(self, x: Array, outer: Array | None = None) -> Array:
        if self.per != "block":
            return super().fake(x, outer)
        x = jnp.asarray(x)
        rest = -x.shape[-1] % _BLOCK
        groups = blocks(jnp.pad(x, [(0, 0)] * (x.ndim - 1) + [(0, rest)]), _BLOCK)
        y = jnp.asarray(dataclasses.replace(self, per="token").fake(groups))
        return y.reshape(*x.shape[:-1], -1)[..., : x.shape[-1]]

    def _scale(self, top: jax.Array, dtype: np.dtype) -> jax.Array:
        return linear_scale(top, self.largest, self.working(dtype), self.empty(dtype))

    def _spread(self, scales: dict[str, jax.Array], shape: tuple[int, ...]) -> jax.Array:
        """The scales so that they broadcast to the elements, float32."""
        (scale,) = scales.values()
        scale = scale.astype(jnp.float32)
        if self.per != "block":
            return scale
        *lead, rows, columns = scale.shape
        wide = jnp.broadcast_to(scale[..., :, None, :, None], (*lead, rows, _BLOCK, columns, _BLOCK))
        return wide.reshape(*lead, rows * _BLOCK, columns * _BLOCK)[..., : shape[-2], : shape[-1]]


def _block_amax(w: jax.Array) -> jax.Array:
    """The largest magnitude of each block of 128 x 128, float32; the last blocks may be partial."""
    *lead, out, width = w.shape
    edges = [(0, 0)] * len(lead) + [(0, -out % _BLOCK), (0, -width % _BLOCK)]
    tiles = jnp.pad(w, edges)
    tiles = tiles.reshape(*lead, tiles.shape[-2] // _BLOCK, _BLOCK, -1, _BLOCK)
    return amax(tiles, (-3, -1))


FORMAT = FP8
