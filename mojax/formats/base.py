"""What a number format is: a value that can encode, decode and count bits.

A format is a frozen dataclass, one per file, exported there as `FORMAT`. Its own fields are the options a
recipe may set (`{format: int4, group: 128}`); the two fields below are set by converters:

  arithmetic  whose rounding makes a scale. "checkpoint": every intermediate is rounded to the dtype of the
              checkpoint, as compressed-tensors does. "float32": intermediates are float32, as ModelOpt does.
  as_read     True when scales came from a file: `outer` then inverts what the file holds in float32, without
              a second rounding to the dtype of the checkpoint.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable
from functools import partial
from typing import Any, ClassVar, Literal, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from mojax.errors import InputError, nearest
from mojax.formats import leaf
from mojax.formats.leaf import encode_leaf as encode_leaf
from mojax.formats.leaf import outer_leaf as outer_leaf
from mojax.formats.leaf import stack_rows as stack_rows
from mojax.formats.numerics import narrow, pack, unpack

Arithmetic = Literal["checkpoint", "float32"]
Array = jax.Array | np.ndarray


@dataclasses.dataclass(frozen=True, repr=False)
class QTensor:
    """A tensor in a number format, packed as it rests on disk.

    Codes and scales are those of the leaf seen as matrices `[*batch, out, in]`; for a weight `[out, in]`
    that is the leaf itself.

    Attributes:
      codes: uint8 `[*batch, out, in / 2]` for 4-bit elements (low nibble first), else one element per entry.
      scales: by level: "inner" (per block, channel or group), "outer" (per matrix, `[*batch]`), "zero" (zero
        points).
      format: the number format; static.
      shape: the logical shape of the leaf; static.
      dtype: of the tensor before encoding; `decode` returns float32 all the same; static.
      contract: axes of `shape` that are summed over, flattened in ascending order to `in`; `()` for a weight
        `[out, in]` and for a tensor whose blocks run along the last axis and keep its shape; static.
      batch: axes of `shape` along which every entry is a matrix of its own (experts, layers); static.
      order: "" as files keep the codes, else the name of the order that a kernel wants them in; static.
    Raises:
      InputError: `contract` or `batch` name an axis that does not exist, or one twice.
    """

    codes: Any
    scales: dict[str, Any]
    format: Format
    shape: tuple[int, ...]
    dtype: np.dtype
    contract: tuple[int, ...] = ()
    batch: tuple[int, ...] = ()
    order: str = ""

    def __post_init__(self) -> None:
        """One way to say each thing, so that equal QTensors have equal tree structures."""
        if not self.contract and not self.batch:
            return
        batch, _, contract = leaf.axes(self.shape, self.contract, self.batch)
        plain = not batch and len(self.shape) == 2 and contract == (1,)
        object.__setattr__(self, "batch", batch)
        object.__setattr__(self, "contract", () if plain else contract)

    def row(self, i: Any, axis: int | None = None) -> QTensor:
        """Entry `i` (an int, or a traced integer scalar) of a batch axis (None: the first), without it.

        A matrix `[out, in]` that remains is an ordinary one. An int leaves numpy arrays in numpy.

        Raises:
          InputError: there is no such batch axis, or no such entry.
        """
        return leaf.row(self, i, axis)

    def __repr__(self) -> str:
        return f"QTensor({self.format.label}, {list(self.shape)})"

    @property
    def nbytes(self) -> int:
        arrays = (self.codes, *self.scales.values())
        return sum(int(np.prod(a.shape)) * np.dtype(a.dtype).itemsize for a in arrays)


jax.tree_util.register_dataclass(
    QTensor,
    data_fields=["codes", "scales"],
    meta_fields=["format", "shape", "dtype", "contract", "batch", "order"],
)


@dataclasses.dataclass(frozen=True)
class Format:
    """A number format.

    Subclasses set the class attributes, `check`, `fit_outer` where there is an outer scale, and the
    arithmetic: `fit` finds scales, `round` codes under scales, `value` gives their meaning. The rest
    follows from these.
    """

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
    def block_rows(self) -> int:
        """How many rows of a matrix `[out, in]` share their inner scales."""
        return 1

    @property
    def block_columns(self) -> int:
        """How many entries of a row share an inner scale; 0 for all of them."""
        return 0

    @property
    def static(self) -> bool:
        """As an input format: needs a maximum from calibration (`outer`)."""
        return False

    @property
    def fused(self) -> bool:
        """As a weight format: linears that a server fuses must share the outer scale."""
        return False

    def check(self, shape: tuple[int, ...]) -> str | None:
        """Why a weight of this shape cannot be encoded ("last axis 1408 is not divisible by 32"), or None."""
        return None

    def outer(self, amax: Array, dtype: np.dtype) -> Array:
        """The outermost scale, float32 `[]`, for a largest magnitude `amax` (of a weight group or an input).

        Args:
          amax: float32 `[]`.
          dtype: of the checkpoint; what "checkpoint" arithmetic rounds to.
        Raises:
          TypeError: this format has no outer scale.
        """
        return _outer(self, amax, np.dtype(dtype))

    def fit_outer(self, top: jax.Array, dtype: np.dtype) -> jax.Array:
        """`outer` for a float32 `top`; what a subclass with an outer scale defines."""
        raise TypeError(f"{self.name} has no outer scale")

    def fit(self, w: jax.Array, outer: Array | None = None) -> dict[str, jax.Array]:
        """The scales of `w [..., in]`, by level as in `QTensor.scales`, in the dtypes they rest in."""
        raise TypeError(f"{self.name} cannot encode")

    def round(self, w: jax.Array, scales: dict[str, jax.Array]) -> jax.Array:
        """The nearest codes of `w` under `scales`, one entry per element (4-bit: uint8, not yet packed)."""
        raise TypeError(f"{self.name} cannot encode")

    def value(self, codes: jax.Array, scales: dict[str, jax.Array]) -> jax.Array:
        """float32 of unpacked `codes` under `scales`, exactly what a server computes."""
        raise TypeError(f"{self.name} cannot decode")

    def factored(
        self, codes: jax.Array, scales: dict[str, jax.Array], dtype: Any
    ) -> tuple[jax.Array, jax.Array | None]:
        """`value` as `(w, after)`: what a product multiplies with, and what multiplies its sums afterwards.

        Args:
          codes: unpacked, `[..., out, in]`; or the codes of one nibble, `[..., out, in / 2]`.
          dtype: of the tensor before encoding; what a value that no smaller number equals is rounded to.
        Returns:
          `w`, bfloat16 or int8 where `value = w * after` exactly but for the last rounding, else of `dtype`;
          `after`, float32 `[]` or `[..., out, 1]`, None for 1.
        """
        return narrow(self.value(codes, scales), dtype).astype(dtype), None

    def step(self, scales: dict[str, Any]) -> jax.Array:
        """What one unit of an element is worth: float32 `[..., out, blocks]`, `[1, 1]` without inner scales.

        `value` is `element * step`. A block of zeros may have the step 0.
        """
        if "inner" in scales:
            return jnp.asarray(scales["inner"]).astype(jnp.float32)
        return jnp.asarray(scales["outer"], jnp.float32).reshape(1, 1)

    def element(self, y: jax.Array, zero: jax.Array | None = None) -> jax.Array:
        """The element nearest to `y = w / step`, float32, with the ties of `round`; `y` may be negative.

        Args:
          zero: float32, the zero points, broadcastable to `y`, of a format that has them; an element is then
            a code less its zero point.
        """
        raise TypeError(f"{self.name} cannot encode")

    def rescaled(self, scales: dict[str, Any], factor: jax.Array) -> jax.Array:
        """The legal inner scales nearest to `factor` (float32, positive, broadcastable) times those given.

        In the dtype they rest in. Factor 1 gives the same scales; zero points do not change.

        Raises:
          TypeError: this format has no inner scales.
        """
        if "inner" not in scales:
            raise TypeError(f"{self.label} has no inner scales")
        inner = jnp.asarray(scales["inner"])
        return (inner.astype(jnp.float32) * factor).astype(inner.dtype)

    def candidates(self, scales: dict[str, Any], low: float, high: float, count: int) -> jax.Array:
        """Legal inner scales around those of `scales`: `[..., out, blocks, n]`, the given ones first.

        Args:
          low, high: the window, times the given scales.
          count: at most so many, at least 3. NVFP4 takes every E4M3 number of the window if that many are
            enough (24 are for 0.25 to 1.75), MX formats one exponent less and one more whatever the window.
        Returns:
          `n <= count` scales a block in the dtype they rest in; some may occur twice. A format without inner
          scales has no choice: its outer scale, `[1, 1, 1]`.
        """
        if "inner" not in scales:
            return jnp.asarray(scales["outer"]).reshape(1, 1, 1)
        return _candidates(self, scales, jnp.append(1.0, jnp.linspace(low, high, count - 1)))

    def around(self, scales: dict[str, Any], factors: jax.Array) -> jax.Array:
        """`candidates` at factors float32 `[count]`: 1, then from the window's low end to its high end.

        A format may look at the ends and the count alone, or at nothing.
        """
        inner = jnp.asarray(scales["inner"])[..., None]
        return self.rescaled({**scales, "inner": inner}, factors.reshape((1,) * (inner.ndim - 1) + (-1,)))

    def encode(self, w: Array, outer: Array | None = None) -> QTensor:
        """Round to nearest. `w` is `[..., in]` in the checkpoint's dtype; `outer` from `self.outer`, or own.

        The same bytes inside and outside `jax.jit`. `encode(w)` is `encode_as(w, fit(w))`.

        Raises:
          InputError: `w` holds integers or nothing, or has a shape that the format cannot encode.
        """
        if not jnp.issubdtype(w.dtype, jnp.floating) or not w.size:
            raise InputError(f"{self.label}: found {w.dtype} {w.shape}; floating-point numbers are needed")
        if reason := self.check(tuple(w.shape)):
            raise InputError(f"{self.label}: {reason}; the shape is {tuple(w.shape)}")
        return _encode(self, w, outer)

    def encode_as(self, w: Array, scales: dict[str, Any]) -> QTensor:
        """Round `w [..., in]` to nearest under given `scales` (of `fit`, or found by a search)."""
        return _encode_as(self, w, scales)

    def decode(self, q: QTensor) -> Array:
        """float32 of the leaf's shape, exactly what a server computes from the codes and scales.

        Raises:
          InputError: the codes are in the order of a kernel.
        """
        if q.order:
            raise InputError(
                f"{q!r}: its codes are in the order {q.order!r} of a kernel; keep the one it came from"
            )
        return _decode(q)

    def fake(self, x: Array, outer: Array | None = None) -> Array:
        """Encode and decode inputs `x [..., in]`, in the dtype of `x`, as a server does at run time."""
        return _fake(self, x, outer)

    def spec(
        self,
        shape: tuple[int, ...],
        dtype: np.dtype,
        contract: tuple[int, ...] = (),
        batch: tuple[int, ...] = (),
    ) -> QTensor:
        """The QTensor of ShapeDtypeStructs that `encode_leaf` gives for a leaf of this shape."""
        encode = partial(encode_leaf, self, contract=contract, batch=batch)
        return jax.eval_shape(encode, jax.ShapeDtypeStruct(shape, dtype))

    def rounded_to(self, dtype: np.dtype) -> np.dtype:
        """The dtype that `outer` rounds to: the checkpoint's, unless it was read and so rounded before."""
        return np.dtype(np.float32) if self.as_read else np.dtype(dtype)

    def working(self, dtype: np.dtype) -> np.dtype:
        """The dtype that intermediates are rounded to, for a tensor of `dtype`."""
        return {"checkpoint": np.dtype(dtype), "float32": np.dtype(np.float32)}[self.arithmetic]

    def empty(self, dtype: np.dtype) -> float:
        """The scale of a block, channel or tensor of zeros, where the scale is linear in the maximum."""
        return {"checkpoint": float(jnp.finfo(dtype).eps), "float32": 1.0}[self.arithmetic]

    def own_outer(self, top: jax.Array, dtype: np.dtype, outer: Array | None) -> jax.Array:
        """`outer`, or when there is none the one for the largest magnitude `top` of the tensor at hand."""
        if outer is not None:
            return jnp.asarray(outer, jnp.float32).reshape(())
        return dataclasses.replace(self, as_read=False).fit_outer(top, dtype)


def one_of(option: str, found: Any, known: Iterable[str]) -> None:
    """Raises InputError when `found` is not one of the values an option may take."""
    if found not in known:
        raise InputError(f"{option}: {found!r} is not possible{nearest(str(found), known)}")


# Jitted so that eager calls run fused; inlined so that a caller's program stays flat.
@partial(jax.jit, static_argnums=(0, 2), inline=True)
def _outer(format: Format, amax: jax.Array, dtype: np.dtype) -> jax.Array:
    outer = format.fit_outer(jnp.asarray(amax, jnp.float32), dtype)
    if not format.as_read:
        return outer
    # A scale that the file held in the checkpoint's dtype may come back from its maximum a unit off.
    whole = narrow(outer, dtype)
    return jnp.where(jnp.abs(whole - outer) <= jnp.abs(outer) * 2.0**-21, whole, outer)


@partial(jax.jit, static_argnums=0, inline=True)
def _candidates(format: Format, scales: dict[str, jax.Array], factors: jax.Array) -> jax.Array:
    return format.around(scales, factors)


@partial(jax.jit, static_argnums=0, inline=True)
def _encode(format: Format, w: jax.Array, outer: jax.Array | None) -> QTensor:
    return _encode_as(format, w, format.fit(w, outer))


@partial(jax.jit, static_argnums=0, inline=True)
def _encode_as(format: Format, w: jax.Array, scales: dict[str, jax.Array]) -> QTensor:
    codes = format.round(w, scales)
    packed = pack(codes) if format.bits == 4 else codes
    return QTensor(packed, dict(scales), format, tuple(w.shape), np.dtype(w.dtype))


@partial(jax.jit, inline=True)
def _decode(q: QTensor) -> jax.Array:
    if q.contract or q.batch:
        return leaf.decode_leaf(q)
    return q.format.value(unpack(q.codes) if q.format.bits == 4 else q.codes, q.scales)


@partial(jax.jit, static_argnums=0, inline=True)
def _fake(format: Format, x: jax.Array, outer: jax.Array | None) -> jax.Array:
    scales = format.fit(x, outer)
    return format.value(format.round(x, scales), scales).astype(x.dtype)


class Scheme(NamedTuple):
    """How one linear runs: y = q(x H) q(W H)^T, with the formats of its weight and of its input.

    With a branch y = q(x H) q(R)^T + (x A^T) B^T; see `mojax.beside`.

    Attributes:
      inputs: None for as they are.
      hadamard: the order of the blocks of H, the orthonormal Hadamard matrix of `mojax.kernels.hadamard`
        along the input axis: inputs are rotated when the linear runs, its weight before it was encoded.
        0 for no rotation.
      rank: of the branch A, B beside it; 0 for none.
      flat: whether its input passes learned matrices when it runs, which its weight has absorbed the inverse
        of; see `mojax.flat`.
    """

    weights: Format
    inputs: Format | None = None
    hadamard: int = 0
    rank: int = 0
    flat: bool = False

    @property
    def label(self) -> str:
        """`nvfp4, inputs as they are`, `mxfp4, inputs mxfp4, both rotated by hadamard 32`."""
        turned = f", both rotated by hadamard {self.hadamard}" if self.hadamard else ""
        beside = f", beside a branch of rank {self.rank}" if self.rank else ""
        flat = ", both through learned matrices" if self.flat else ""
        inputs = self.inputs.label if self.inputs else "as they are"
        return f"{self.weights.label}, inputs {inputs}{turned}{flat}{beside}"
