"""How a model keeps its keys and values between tokens, and what its attention multiplies.

  k~ = q((k - m_k) / s_k) s_k + m_k    of keys after the rotary embedding, of values alike
  k H  and  q H                        instead of k and q, if rotated: q k^T = (q H) (k H)^T

q rounds to FP8 (one scale s per tensor or per head) or NVFP4 (one per block of 16 along head_dim and one per
tensor), s is from the largest magnitude that calibration saw, and m, if affine, is the mean of every channel.
H is a Hadamard matrix over head_dim / sqrt(head_dim) (arXiv 2404.00456).
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any, Literal, get_args

import numpy as np

from mojax.errors import InputError, NotFiniteError
from mojax.formats import fp8, nvfp4
from mojax.formats.base import Arithmetic, Format

Per = Literal["tensor", "head"]
FORMATS: dict[str, type[Format]] = {"fp8": fp8.FORMAT, "nvfp4": nvfp4.FORMAT}
LARGEST = 448.0  # the maximum that a cache without calibration is for: that of FP8 with a scale of 1
STATISTICS = ("high", "low", "sum")  # of a cache, float32 `[2, kv_heads, head_dim]`: as it is, and rotated


@dataclasses.dataclass(frozen=True)
class Cache:
    """How the key/value cache is kept.

    Attributes:
      k, v: formats of keys and values, FP8 or NVFP4; None: as they are.
      per: what has a scale of its own; "head" is for FP8.
      cast: the maxima are `LARGEST`, so that scales of FP8 are 1 and nothing is calibrated.
      affine: the mean of every channel of every head is taken off before rounding, and added again.
      rotate: keys are rotated before rounding, and queries as well.
      skip_first, skip_last: how many layers at the two ends keep theirs as it is.
      attention: queries and the weights of the softmax are rounded to FP8 too, as are keys and values that
        are not FP8 already.
    Raises:
      InputError: options that cannot go together.
    """

    k: Format | None
    v: Format | None
    per: Per = "tensor"
    cast: bool = False
    affine: bool = False
    rotate: bool = False
    skip_first: int = 0
    skip_last: int = 0
    attention: bool = False

    def __post_init__(self) -> None:
        for format in (self.k, self.v):
            if format is not None and type(format) not in FORMATS.values():
                raise InputError(f"kv_cache: {format.name} is not a cache format here; {_known()}")
        if self.per not in get_args(Per):
            raise InputError(f"kv_cache: per is {self.per!r}, needed tensor or head")
        if self.per == "head" and any(f is not None and f.name != "fp8" for f in (self.k, self.v)):
            raise InputError("kv_cache: per: head is for fp8; nvfp4 has a scale per block in any case")
        if self.cast and (self.per == "head" or self.affine):
            raise InputError("kv_cache: cast calibrates nothing, and per: head or affine need calibration")
        if self.rotate and self.k is None:
            raise InputError("kv_cache: rotate is for keys that are rounded; give k a format")
        if (
            self.k is None
            and self.v is None
            and (self.per, self.cast, self.affine) != ("tensor", False, False)
        ):
            raise InputError("kv_cache: neither k nor v has a format, so there is nothing to scale")

    @property
    def label(self) -> str:
        """`fp8`, `nvfp4 rotate`, `k fp8, v nvfp4`, `fp8 per head, attention fp8`."""
        k, v = self.kinds
        options = ["per head"] * (self.per == "head")
        options += [name for name in ("cast", "affine", "rotate") if getattr(self, name)]
        options += [f"{n} {getattr(self, n)}" for n in ("skip_first", "skip_last") if getattr(self, n)]
        words = " ".join([k if k == v else f"k {k}, v {v}", *options])
        return words + ", attention fp8" * self.attention

    @property
    def calibrated(self) -> bool:
        """Whether its scales are from data."""
        return not self.cast and (self.k is not None or self.v is not None)

    @property
    def kinds(self) -> tuple[str, str]:
        """The formats of keys and values by name."""
        k, v = (f.name if f is not None else "none" for f in (self.k, self.v))
        return k, v

    @property
    def as_read(self) -> bool:
        """Whether its scales came from a file."""
        return any(f is not None and f.as_read for f in (self.k, self.v))

    def format(self, side: str) -> Format | None:
        """That of "k" or "v"."""
        return {"k": self.k, "v": self.v}[side]

    def packed(self, side: str) -> bool:
        """Whether keys ("k") or values ("v") rest as codes that an attention kernel reads."""
        return self.format(side) is not None and self.per == "tensor" and not self.affine

    def layer(self, i: int, count: int) -> Cache | None:
        """That of layer `i` of `count`; None: nothing is rounded there."""
        return self if self.skip_first <= i < count - self.skip_last else None

    def check(self, layers: int, kv_heads: int, head_dim: int, rotatable: bool) -> str | None:
        """Why a model of this shape cannot have it, or None."""
        if self.skip_first + self.skip_last >= layers:
            return (
                f"kv_cache: skip_first {self.skip_first} and skip_last {self.skip_last} leave none of "
                f"{layers} layers; lower them"
            )
        shape = (1, 1, kv_heads, head_dim)
        for side in "kv":
            format = self.format(side)
            if format is not None and (said := format.check(shape)):
                return f"kv_cache: {side} in {format.name}: {said} (head_dim); use fp8"
        if self.rotate and not rotatable:
            return (
                f"kv_cache: rotate: no Hadamard matrix of order {head_dim} (head_dim) is known; leave it out"
            )
        return None

    def leaves(self, name: str, stats: Mapping[str, Mapping[str, Any]]) -> dict[str, np.ndarray]:
        """What calibration says of `<attention>.k_cache` or `.v_cache`.

        Returns:
          `<name>.input_scale`, the largest magnitude to be rounded, float32 `[]` or per head `[kv_heads]`;
          if affine `<name>.mean`, float32 `[kv_heads, head_dim]`. Nothing for a side without a format.
        Raises:
          InputError: calibration has not seen it. NotFiniteError: it saw values that are not finite.
        """
        side = name.removesuffix("_cache")[-1]
        if self.format(side) is None:
            return {}
        if name not in stats:
            raise InputError(
                f"{name}: needs a static scale, but calibration has not seen it; calibrate again"
            )
        turned = int(self.rotate and side == "k")
        high, low, total = (np.asarray(stats[name][s], np.float32)[turned] for s in STATISTICS)
        mean = total / np.float32(np.max(stats[name]["count"])) if self.affine else np.zeros_like(high)
        top = np.maximum(high - mean, low + mean)
        if not np.isfinite(top).all():
            raise NotFiniteError(
                f"{name}: is not finite during calibration; the model overflows in its own dtype on this "
                "text, check the checkpoint or the text"
            )
        amax = top.max(-1) if self.per == "head" else top.max()
        found = {f"{name}.input_scale": np.asarray(amax, np.float32)}
        return found | ({f"{name}.mean": mean.astype(np.float32)} if self.affine else {})


def of_rule(
    said: str | Mapping[str, Any] | None, attention: str | None, arithmetic: Arithmetic
) -> Cache | None:
    """The cache that a recipe asks for; None: nothing is rounded.

    Args:
      said: `kv_cache` of a rule, as `mojax.document` checked it; attention: its `attention`.
      arithmetic: of the dialect.
    Raises:
      InputError: a format that is not one of a cache, or options that cannot go together.
    """
    eight = attention not in (None, "none")
    said = {"format": "none"} if said is None else {"format": said} if isinstance(said, str) else said
    both = said.get("format", "none")
    formats = {}
    for side in "kv":
        name = said.get(side, both)
        if name not in ("none", *FORMATS):
            raise InputError(f"kv_cache: {name} is not a cache format here; {_known()}")
        formats[side] = FORMATS[name](arithmetic=arithmetic) if name != "none" else None
    options = {key: value for key, value in said.items() if key not in ("format", "k", "v")}
    made = Cache(**formats, **options, attention=eight)
    return made if eight or made.k is not None or made.v is not None else None


def _known() -> str:
    return f"known: {', '.join(FORMATS)}, none"
