"""Inputs times an encoded weight.

hopper weight-only     codes become bfloat16 in registers, wgmma        kernels/gpu/weight_only.py
hopper 8-bit           FP8 x FP8 and INT8 x INT8, wgmma                 kernels/gpu/scaled.py
blackwell block-scaled NVFP4, MXFP4, MXFP8, tcgen05 (lowered, never run) kernels/gpu/block_scaled.py
cudnn block-scaled     NVFP4, MXFP8 by jax.nn.scaled_matmul             kernels/gpu/cudnn_scaled.py
xla per block          FP8 per block on both sides; every device        kernels/scaled.py
xla                    codes times inner scales in a dot; every device  kernels/product.py
"""

from __future__ import annotations

from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from mojax.errors import InputError
from mojax.formats.base import Array, Format, QTensor
from mojax.formats.fp8 import FP8
from mojax.kernels import scaled
from mojax.kernels.base import Implementation, dispatch, in_file_order, pallas, weight_of
from mojax.kernels.product import FEWEST, factors, multiply, rounded
from mojax.kernels.quantize import quantize

_GROUP = 128  # inputs under one scale where FP8 is "per block"


def matmul(
    x: Array,
    q: QTensor,
    *,
    dtype: Any,
    bias: Array | None = None,
    inputs: Format | None = None,
    outer: Array | None = None,
    implementation: str | None = None,
) -> jax.Array:
    """`x [*batch, ..., in]` times `q [*batch, out, in]`, summed in float32, as `dtype [*batch, ..., out]`.

    A leaf of another layout is taken as its matrices: `out` and `in` are their axes in ascending order.
    Differentiable in `x` and `bias`; the gradient passes straight through the rounding of `x`.

    Args:
      bias: `[out]`, added before rounding to `dtype`.
      inputs: a format that `x` is rounded to first; the product is then of the codes, as a server's is.
      outer: the static scale of `inputs`, float32 `[]`; None is that of `x` at hand.
      implementation: the name of one (above); None is the first that takes the arguments on this device.
    Raises:
      InputError: `in` or the batch axes of inputs and weight differ, bias, inputs or outer are not as above,
        or no implementation takes these; the message has the reason of each.
    """
    x = jnp.asarray(x)
    w = weight_of("matmul", x, q)
    n = len(w.batch)
    if x.ndim <= n or x.shape[:n] != w.shape[:n]:
        raise InputError(
            f"matmul: inputs {x.shape} do not begin with the batch {w.shape[:n]} of weight {w.shape}"
        )
    if not jnp.issubdtype(x.dtype, jnp.floating):
        raise InputError(f"matmul: inputs are {x.dtype}; floating-point numbers are needed")
    if not jnp.issubdtype(dtype, jnp.floating):
        raise InputError(f"matmul: the result is {jnp.dtype(dtype)}; a floating-point dtype is needed")
    if not isinstance(inputs, Format | None):
        raise InputError(f"matmul: inputs is {inputs!r}; needed: a format, mojax.formats.nvfp4.FORMAT()")
    if outer is not None and (inputs is None or jnp.shape(outer)):
        raise InputError(f"matmul: outer {jnp.shape(outer)} is the scale [] of inputs, which are {inputs}")
    rows = x if n else x.reshape(-1, x.shape[-1])
    inputs = inputs if rows.size else None  # a maximum of nothing does not exist
    bias = None if bias is None else jnp.asarray(bias)
    if bias is not None and bias.shape != (w.shape[-2],):
        raise InputError(f"matmul: bias {bias.shape} is not [out]; weight {w.shape} needs ({w.shape[-2]},)")
    y = _product(rows, w, bias, outer, jnp.dtype(dtype), inputs, implementation)
    return y if n else y.reshape(*x.shape[:-1], y.shape[-1])


@partial(jax.custom_jvp, nondiff_argnums=(4, 5, 6))
def _product(
    x: jax.Array, w: QTensor, bias: Any, outer: Any, dtype: np.dtype, inputs: Format | None, only: str | None
) -> jax.Array:
    how = {"dtype": dtype, "bias": bias, "inputs": inputs, "outer": outer}
    return dispatch("matmul", IMPLEMENTATIONS, x, w, only=only, **how)


@_product.defjvp
def _(dtype: np.dtype, inputs: Any, only: Any, primals: tuple, tangents: tuple) -> tuple[Any, Any]:
    """A product by codes has no derivative of its own: of a GPU's kernel, or of rounded inputs."""
    (_, w, bias, _), (dx, _, dbias, _) = primals, tangents
    dbias = None if bias is None else dbias
    return _product(*primals, dtype, inputs, only), _xla(dx, w, dtype=dtype, bias=dbias)


def _xla(
    x: jax.Array, w: QTensor, *, dtype: Any, bias: Any = None, inputs: Format | None = None, outer: Any = None
) -> jax.Array:
    after = None
    if inputs is not None:
        x, after = rounded(x, inputs, outer)
    y = multiply(x, factors(in_file_order(w)))
    y = y if after is None else y * after
    if bias is not None:
        y = y + bias.astype(jnp.float32).reshape((1,) * (y.ndim - 1) + (-1,))
    return y.astype(dtype)


def _per_block(
    x: jax.Array, w: QTensor, *, dtype: Any, bias: Any = None, inputs: Format, outer: Any = None
) -> jax.Array:
    """As `scaled`, with as many rows as XLA multiplies fast on a CPU."""
    padded = jnp.pad(x, [(0, max(0, FEWEST - len(x))), (0, 0)])
    return scaled.reference(_encoded(padded, inputs, outer), w, dtype=dtype, bias=bias)[: len(x)]


def _not_per_block(x: jax.Array, w: QTensor, *, inputs: Any, **_: Any) -> str | None:
    if not (isinstance(inputs, FP8) and inputs.per == "block" and scaled.per_block(w)):
        return "takes fp8 per block for weight and inputs"
    return f"the weight has batch axes {w.batch}" if w.batch or w.order else None


def _encoded(x: jax.Array, inputs: Format, outer: Any) -> QTensor:
    """Inputs `[rows, in]` as a kernel of codes takes them."""
    if isinstance(inputs, FP8) and inputs.per == "block":
        x = jnp.pad(x, [(0, 0), (0, -x.shape[1] % _GROUP)]).reshape(len(x), -1, _GROUP)
        inputs = FP8("token", arithmetic=inputs.arithmetic)
    return quantize(x, inputs, outer=outer)


def _of_inputs(only_weight: bool, made: Implementation) -> Implementation:
    """An implementation of `matmul` from a kernel of plain inputs, or from one of encoded inputs."""

    def why_not(x: Any, w: QTensor, *, inputs: Any, outer: Any, **rest: Any) -> str | None:
        if w.batch:
            return f"the weight has batch axes {w.batch}"
        if only_weight:
            return "rounds no inputs" if inputs is not None else made.why_not(x, w, **rest)
        if inputs is None:
            return "takes rounded inputs"
        return made.why_not(jax.eval_shape(partial(_encoded, inputs=inputs, outer=outer), x), w, **rest)

    def run(x: Any, w: QTensor, *, inputs: Any, outer: Any, **rest: Any) -> jax.Array:
        return made.run(x if only_weight else _encoded(x, inputs, outer), w, **rest)

    return Implementation(made.name, made.arch, why_not, run)


IMPLEMENTATIONS = (
    _of_inputs(True, pallas("hopper weight-only", (9,), "weight_only", "weight_only")),
    _of_inputs(False, pallas("hopper 8-bit", (9,), "scaled", "scaled")),
    _of_inputs(False, pallas("blackwell block-scaled", (10,), "block_scaled", "block_scaled")),
    _of_inputs(False, pallas("cudnn block-scaled", (10,), "cudnn_scaled", "scaled_matmul")),
    Implementation("xla per block", (), _not_per_block, _per_block),
    Implementation("xla", (), lambda *_, **__: None, _xla),
)
