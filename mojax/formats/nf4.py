"""NF4: sixteen numbers at quantiles of a normal distribution, times the largest magnitude of a block of 64.

  w ~ book[code] * a,  a = amax_block,  code = the nearest number of the book to w / a (ties to the lower one)

With `double`, the scales `a` of a row are 8-bit numbers themselves, in blocks of 256:

  a ~ max(second * (map[inner] + shift), 0),  shift = mean / second,  second = max |a - mean|

QLoRA (arXiv 2305.14314), section 3 and appendix E; the map is the dynamic one of arXiv 2110.02861. Blocks of
scales end with their row and the mean is the row's (bitsandbytes' run across rows, and its mean is the
tensor's), so that a part of a weight has the bytes that it has in the whole. Codes are rounded under the
scales as stored.
"""

from __future__ import annotations

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from mojax.errors import InputError
from mojax.formats.base import Array, Format
from mojax.formats.numerics import amax, blocks, blocks_under, divide, indivisible

BOOK = np.array(
    [
        *(-1.0, -0.6961928009986877, -0.5250730514526367, -0.39491748809814453),
        *(-0.28444138169288635, -0.18477343022823334, -0.09105003625154495, 0.0),
        *(0.07958029955625534, 0.16093020141124725, 0.24611230194568634, 0.33791524171829224),
        *(0.44070982933044434, 0.5626170039176941, 0.7229568362236023, 1.0),
    ],
    np.float32,
)
_TOGETHER = 256  # scales under one scale


def _dynamic_map() -> np.ndarray:
    """256 numbers in [-1, 1], ascending: in each of seven decades twice as many as in the one below."""
    edges = [np.linspace(0.1, 1, 2**i + 1) for i in range(7)]
    positive = np.concatenate([10.0 ** (i - 6) * (e[:-1] + e[1:]) / 2 for i, e in enumerate(edges)])
    return np.sort(np.concatenate([-positive, [0.0], positive, [1.0]])).astype(np.float32)


_MAP = _dynamic_map()


def _between(values: np.ndarray) -> np.ndarray:
    """The midpoints of neighbours, float32."""
    return ((values[:-1].astype(np.float64) + values[1:]) / 2).astype(np.float32)


_TIES, _MAP_TIES = _between(BOOK), _between(_MAP)


@dataclasses.dataclass(frozen=True)
class NF4(Format):
    """NF4. Scales: "inner" float32 `[..., in / group]`.

    With `double`: "inner" uint8 of that shape, "second" and "shift" float32 `[..., ceil(in / group / 256)]`.
    """

    group: int = 64
    double: bool = False

    name = "nf4"
    bits = 4
    largest = 1.0

    def __post_init__(self) -> None:
        if not isinstance(self.group, int) or self.group < 2 or self.group % 2:
            raise InputError(f"nf4 group: {self.group!r} is not a positive even number; 64 is usual")
        if not isinstance(self.double, bool):
            raise InputError(f"nf4 double: {self.double!r} is neither true nor false")

    @property
    def block_columns(self) -> int:
        return self.group

    def check(self, shape: tuple[int, ...]) -> str | None:
        return indivisible(shape, self.group)

    def fit(self, w: jax.Array, outer: Array | None = None) -> dict[str, jax.Array]:
        a = amax(blocks(w, self.group))
        if not self.double:
            return {"inner": a}
        mean = divide(_total(a), float(a.shape[-1]))[..., None]
        apart = jnp.abs(a - mean)
        edge = [(0, 0)] * (a.ndim - 1) + [(0, -a.shape[-1] % _TOGETHER)]
        second = jnp.max(blocks(jnp.pad(apart, edge), _TOGETHER), -1)
        second = jnp.where(second == 0, mean, second)  # scales that are all alike
        second = jnp.where(second == 0, jnp.float32(1), second)
        scales = {"second": second, "shift": divide(jnp.broadcast_to(mean, second.shape), second)}
        return {"inner": _nearest(a, scales), **scales}

    def round(self, w: jax.Array, scales: dict[str, jax.Array]) -> jax.Array:
        a = self.step(scales)[..., None]
        y = divide(blocks(w.astype(jnp.float32), self.group), jnp.where(a == 0, jnp.float32(1), a))
        return _code(y).reshape(w.shape)

    def value(self, codes: jax.Array, scales: dict[str, jax.Array]) -> jax.Array:
        a = self.step(scales)
        return (_number(blocks_under(codes, a)) * a[..., None]).reshape(codes.shape)

    def step(self, scales: dict[str, Any]) -> jax.Array:
        inner = jnp.asarray(scales["inner"])
        if not self.double:
            return inner.astype(jnp.float32)
        second, shift = _spread(scales, inner)
        number = jnp.take(jnp.asarray(_MAP), inner.astype(jnp.int32), mode="clip")
        return jnp.maximum(second * (number + shift), 0)

    def element(self, y: jax.Array, zero: jax.Array | None = None) -> jax.Array:
        return _number(_code(y))

    def rescaled(self, scales: dict[str, Any], factor: jax.Array) -> jax.Array:
        if not self.double:
            return super().rescaled(scales, factor)
        moved = _nearest(self.step(scales) * factor, scales)
        return jnp.where(factor == 1, jnp.broadcast_to(jnp.asarray(scales["inner"]), moved.shape), moved)


def _code(y: jax.Array) -> jax.Array:
    """The nearest number of the book, uint8 0..15; ties to the lower one; NaN gives 0."""
    code = jnp.zeros(y.shape, jnp.uint8)
    for tie in _TIES:
        code = code + (y > tie).astype(jnp.uint8)
    return code


def _number(code: jax.Array) -> jax.Array:
    return jnp.take(jnp.asarray(BOOK), code.astype(jnp.int32), mode="clip")


def _total(x: jax.Array) -> jax.Array:
    """The sum over the last axis, in the same order however the program is compiled."""
    while x.shape[-1] > 1:
        x = jnp.pad(x, [(0, 0)] * (x.ndim - 1) + [(0, x.shape[-1] % 2)])
        half = x.shape[-1] // 2
        x = x[..., :half] + x[..., half:]
    return x[..., 0]


def _spread(scales: dict[str, Any], inner: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Second scale and shift of every scale; `inner` may have an axis of candidates more."""
    more = inner.ndim - jnp.ndim(scales["second"])
    count = inner.shape[inner.ndim - 1 - more]

    def spread(scale: Any) -> jax.Array:
        every = jnp.repeat(jnp.asarray(scale), _TOGETHER, -1)[..., :count]
        return every.reshape(*every.shape, *(1,) * more)

    return spread(scales["second"]), spread(scales["shift"])


def _nearest(a: jax.Array, scales: dict[str, Any]) -> jax.Array:
    """The 8-bit scales nearest to `a`, uint8; `a` may have an axis of candidates more."""
    second, shift = _spread(scales, a)
    y = divide(a, second) - shift
    return jnp.searchsorted(jnp.asarray(_MAP_TIES), y, side="left").astype(jnp.uint8)


FORMAT = NF4
