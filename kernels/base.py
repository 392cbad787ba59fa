"""What kernels share: the decoded weight, how its matrices meet the inputs, and who computes an operation."""

from __future__ import annotations

import importlib
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from mojax.errors import InputError, nearest
from mojax.formats.base import Format, QTensor
from mojax.formats.leaf import matrices
from mojax.formats.numerics import narrow


def decoded(q: QTensor) -> jax.Array:
    """A QTensor in the weight's own dtype `q.dtype`, of the leaf's shape."""
    # Rounded in float32 first, so that no compiler can drop the rounding by cancelling a pair of casts.
    return narrow(jnp.asarray(q.format.decode(q)), q.dtype).astype(q.dtype)


def weight_of(kernel: str, x: Any, q: QTensor, batch: int | None = None) -> QTensor:
    """The weight as matrices `[*batch, out, in]`, if inputs `x [..., in]` fit it.

    Raises:
      InputError: it is not encoded, `in` differs, or there are not `batch` batch axes (None: any number).
    """
    if not isinstance(q, QTensor):
        raise InputError(
            f"{kernel}: the weight is {type(q).__name__}, needed a QTensor, as "
            "mojax.formats.nvfp4.FORMAT().encode(w) gives"
        )
    w = matrices(q)
    if batch is not None and len(w.batch) != batch:
        raise InputError(
            f"{kernel}: the weight has shape {q.shape} with batch axes {q.batch}; needed: {batch}, as "
            "mojax.formats.base.encode_leaf(format, w, batch=(0,)) gives"
        )
    if not x.ndim or x.shape[-1] != w.shape[-1]:
        raise InputError(
            f"{kernel}: inputs {x.shape} and weight {w.shape} differ in their last axis, which is summed over"
        )
    return w


def same_dtype(x: jax.Array, w: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Both operands in the dtype they have in common, else in float32."""
    dtype = x.dtype if x.dtype == w.dtype else jnp.float32
    return x.astype(dtype), w.astype(dtype)


def prepared(q: QTensor, inputs: Format | None = None, major: int | None = None) -> QTensor:
    """The weight in the order that a device's kernel reads fastest; made once, when a model is loaded.

    Args:
      inputs: the format that inputs will be rounded to, None for none.
      major: of the device's compute capability; None is that of the default device.
    """
    major = major or compute_capability()
    if major == 9 and inputs is None:
        return importlib.import_module("mojax.kernels.gpu.weight_only").repack(q)
    if major == 10 and inputs is not None:
        kernel = importlib.import_module("mojax.kernels.gpu.scaled_operands")
        return kernel.repack(q) if kernel.repacks(q) else q
    return q


def in_file_order(q: QTensor) -> QTensor:
    """The weight as files keep it: the inverse of `prepared`."""
    if not q.order:
        return q
    name = {"weight_only": "weight_only", "tcgen05": "scaled_operands"}[q.order]
    return importlib.import_module(f"mojax.kernels.gpu.{name}").restore(q)


class Implementation(NamedTuple):
    """One way to compute an operation.

    Attributes:
      name: of what runs it, in errors: "hopper weight-only".
      arch: compute capabilities (major numbers) of the GPUs it is for; () is any device.
      why_not: `why_not(*args, **options)`, why it cannot take these arguments, or None.
      run: `run(*args, **options)`.
    """

    name: str
    arch: tuple[int, ...]
    why_not: Callable[..., str | None]
    run: Callable[..., Any]


def dispatch(
    op: str, implementations: Sequence[Implementation], *args: Any, only: str | None = None, **options: Any
) -> Any:
    """Run the first implementation that takes the arguments on the default device.

    Args:
      only: the name of the one to run; None tries them in order.
    Raises:
      InputError: none can take them; the reason of every one. No implementation has that name.
    """
    names = [i.name for i in implementations]
    if only is not None and only not in names:
        raise InputError(f"{op}: there is no implementation {only!r}{nearest(only, names)}")
    reasons, major = [], compute_capability()
    for i in implementations:
        if only not in (None, i.name):
            continue
        elsewhere = bool(i.arch) and major not in i.arch
        reason = None if elsewhere and only is None else i.why_not(*args, **options)
        if reason is None and elsewhere:
            reason = f"is for compute capability {', '.join(f'{a}.x' for a in i.arch)}, not {device_kind()}"
        if reason is None:
            with jax.named_scope(f"{op}[{i.name}]"):  # so that programs and profiles say what ran
                return i.run(*args, **options)
        reasons.append(f"{i.name}: {reason}")
    raise InputError(f"{op}: no implementation takes these arguments; " + "; ".join(reasons))


def pallas(name: str, arch: tuple[int, ...], file: str, run: str, why_not: str = "why_not") -> Implementation:
    """The Pallas kernel `run` of kernels/gpu/<file>.py, imported when it is tried: Pallas takes a while."""

    def late(function: str) -> Callable[..., Any]:
        def call(*args: Any, **options: Any) -> Any:
            return getattr(importlib.import_module(f"mojax.kernels.gpu.{file}"), function)(*args, **options)

        return call

    return Implementation(name, arch, late(why_not), late(run))


def compute_capability() -> int | None:
    """The major number of the default device's CUDA compute capability; None where it is no such GPU."""
    found = str(getattr(_device(), "compute_capability", ""))
    major = found.partition(".")[0]
    return int(major) if major.isdigit() else None


def device_kind() -> str:
    """The default device in words."""
    return _device().device_kind


def _device() -> Any:
    chosen = jax.config.jax_default_device  # type: ignore[attr-defined]  # a device, a platform or None
    return chosen if isinstance(chosen, jax.Device) else jax.devices(chosen)[0]
