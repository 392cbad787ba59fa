"""What a number format is: a value that can encode, decode and count bits.

A format is a frozen dataclass, one per file, exported there as `FORMAT`. Its own fields are the options a
recipe may set (`{format: int4, group: 128}`); the two fields below are set by converters:

  arithmetic  whose rounding makes a scale. "checkpoint": every intermediate is rounded to the dtype of the
              checkpoint, as compressed-tensors does. "float32": intermediates are float32, as ModelOpt does.
  as_read     True when scales came from a file: they are already rounded, and `outer` leaves them alone.
"""

from __future__ import annotations

import dataclasses
from typing import Any, ClassVar, Literal, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

Arithmetic = Literal["checkpoint", "float32"]
Array = jax.Array | np.ndarray


@dataclasses.dataclass(frozen=True)
class QTensor:
    """A tensor in a number format, packed as it rests on disk.

    Attributes:
      codes: uint8 `[out, in / 2]` for 4-bit elements (low nibble first), else one element per entry.
      scales: by level: "inner" (per block, channel or group), "outer" (per tensor), "zero" (zero points).
      format: the number format; static.
      shape: the logical shape `(out, in)`; static.
      dtype: of the tensor before encoding; `decode` returns float32 all the same; static.
    """

    codes: Any
    scales: dict[str, Any]
    format: Format
    shape: tuple[int, ...]
    dtype: np.dtype

    @property
    def nbytes(self) -> int:
        return sum(int(np.prod(a.shape)) * np.dtype(a.dtype).itemsize for a in (self.codes, *self.scales.values()))


jax.tree_util.register_dataclass(
    QTensor, data_fields=["codes", "scales"], meta_fields=["format", "shape", "dtype"]
)


@dataclasses.dataclass(frozen=True)
class Format:
    """A number format. Subclasses set the class attributes and the methods below `check`."""

    arithmetic: Arithmetic = dataclasses.field(default="float32", kw_only=True)
    as_read: bool = dataclasses.field(default=False, kw_only=True)

    name: ClassVar[str]
    bits: ClassVar[int]  # of one element
    largest: ClassVar[float]  # the largest magnitude of an element

    @property
    def label(self) -> str:
        """The name with the options that differ from the defaults: `int4 group=32`."""
        options = [
            f"{f.name}={getattr(self, f.name)}"
            for f in dataclasses.fields(self)
            if not f.kw_only and getattr(self, f.name) != f.default
        ]
        return " ".join([self.name, *options])

    @property
    def static(self) -> bool:
        """As an input format: needs a maximum from calibration (`outer`)."""
        return False

    @property
    def fused(self) -> bool:
        """As a weight format: linears that a server fuses must share the outer scale."""
        return False

    def check(self, shape: tuple[int, ...]) -> str | None:
        """Why a weight of this shape cannot be encoded ("last axis 1408 is not divisible by ..."), or None."""
        return None

    def outer(self, amax: Array, dtype: np.dtype) -> Array:
        """The outermost scale, float32 `[]`, for a largest magnitude `amax` (of a weight group or an input).

        Args:
          amax: float32 `[]`.
          dtype: of the checkpoint; what "checkpoint" arithmetic rounds to.
        Raises:
          TypeError: this format has no outer scale.
        """
        raise TypeError(f"{self.name} has no outer scale")

    def encode(self, w: Array, outer: Array | None = None) -> QTensor:
        """Round to nearest. `w` is `[..., in]` in the checkpoint's dtype; `outer` from `self.outer`, or own."""
        raise TypeError(f"{self.name} cannot encode")

    def decode(self, q: QTensor) -> Array:
        """float32 of the logical shape, exactly what a server computes from the codes and scales."""
        raise TypeError(f"{self.name} cannot decode")

    def fake(self, x: Array, outer: Array | None = None) -> Array:
        """Encode and decode inputs `x [..., in]`, in the dtype of `x`, as a server does at run time."""
        return jnp.asarray(self.decode(self.encode(x, outer))).astype(x.dtype)

    def spec(self, shape: tuple[int, ...], dtype: np.dtype) -> QTensor:
        """The QTensor of ShapeDtypeStructs that `encode` gives for a weight of this shape."""
        return jax.eval_shape(self.encode, jax.ShapeDtypeStruct(shape, dtype))


class Scheme(NamedTuple):
    """How one linear runs: the format of its weight and of its input (None: as they are)."""

    weights: Format
    inputs: Format | None = None
