"""Operands of block-scaled products: dtypes that the tensor core reads, and the order of block scales."""

from __future__ import annotations

import dataclasses
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax

from mojax.errors import InputError
from mojax.formats.base import QTensor
from mojax.formats.mxfp4 import MXFP4
from mojax.formats.mxfp8 import MXFP8
from mojax.formats.nvfp4 import NVFP4

ORDER = "tcgen05"  # QTensor.order of a weight whose scales are arranged


class Kind(NamedTuple):
    """How the tensor core reads a format.

    Attributes:
      codes: the dtype of elements.
      scales: the dtype of block scales.
      block: elements that share a scale.
      bits: of an element.
    """

    codes: Any
    scales: Any
    block: int
    bits: int


KINDS = {
    NVFP4: Kind(jnp.float4_e2m1fn, jnp.float8_e4m3fn, 16, 4),
    MXFP4: Kind(jnp.float4_e2m1fn, jnp.float8_e8m0fnu, 32, 4),
    MXFP8: Kind(jnp.float8_e4m3fn, jnp.float8_e8m0fnu, 32, 8),
}


def kind(q: QTensor) -> Kind:
    """That of a QTensor in one of the formats of KINDS."""
    return KINDS[type(q.format)]


def matrix(q: QTensor) -> tuple[int, int]:
    """Rows of the codes, and numbers in a row."""
    rows, width = q.codes.shape
    return rows, width * 8 // q.format.bits


def unfit(x: Any, q: QTensor) -> str | None:
    """Why `x [M, K]` and `q [N, K]` are no two operands of a block-scaled product, or None."""
    if not isinstance(x, QTensor):
        return "inputs are not quantized"
    odd = _odd(x) or _odd(q)
    if odd:
        return odd
    if type(x.format) is not type(q.format):
        return f"inputs are {x.format.name}, the weight {q.format.name}"
    (M, K), (_, k) = matrix(x), matrix(q)
    if K != k:
        return f"inputs have K = {K}, the weight {k}"
    return None if M else "there are no inputs"


def after(x: QTensor, q: QTensor) -> jax.Array:
    """What multiplies the sums of codes times block scales: the product of outer scales, float32 `[]`."""
    found = jnp.float32(1)
    for t in (q, x):
        if "outer" in t.scales:  # the same for all blocks, so one block of zeros is asked
            scales = {"inner": jnp.ones((1, 1), kind(t).scales), "outer": t.scales["outer"]}
            _, outer = t.format.factored(jnp.zeros((1, kind(t).block), jnp.uint8), scales, t.dtype)
            found = found * outer
    return found


def elements(q: QTensor, rows: int = 1) -> jax.Array:
    """The codes in the dtype that the tensor core reads, `[M, K]`; zeros fill M up to a multiple of `rows`.

    On a GPU two 4-bit numbers share a byte as they do in files, so that XLA moves nothing.
    """
    found = jnp.pad(jnp.asarray(q.codes), ((0, -q.codes.shape[0] % rows), (0, 0)))
    if found.dtype != kind(q).codes:
        found = lax.bitcast_convert_type(found, kind(q).codes)
    return found.reshape(found.shape[0], -1)


def typed(q: QTensor, scales: jax.Array) -> jax.Array:
    """Block scales, in whatever arrangement, in the dtype that the tensor core reads."""
    wanted = kind(q).scales
    return scales if scales.dtype == wanted else lax.bitcast_convert_type(scales, wanted)


def arranged(q: QTensor) -> jax.Array:
    """The block scales of `q` in `scale_layout`."""
    inner = jnp.asarray(q.scales["inner"])
    return inner if q.order == ORDER else typed(q, scale_layout(inner))


def scale_layout(scales: jax.Array) -> jax.Array:
    """Block scales `[rows, columns]` as tiles `[rows / 128, columns / 4, 32, 16]`; zeros fill the last ones.

    Scale (r, c) goes to tile (r // 128, c // 4), line r % 32, place 4 * (r // 32 % 4) + c % 4, as
    `tcgen05.cp` copies it to tensor memory (PTX ISA 8.7, "scale factor A layout"). The dtype is kept.
    """
    rows, columns = scales.shape
    scales = jnp.pad(scales, ((0, -rows % 128), (0, -columns % 4)))
    tiles = scales.reshape(-(-rows // 128), 4, 32, -(-columns // 4), 4)
    return tiles.transpose(0, 3, 2, 1, 4).reshape(tiles.shape[0], tiles.shape[3], 32, 16)


def scale_rows(tiles: jax.Array) -> jax.Array:
    """The inverse of `scale_layout`, with the zeros that it added: `[n, m, 32, 16]` to `[128 * n, 4 * m]`."""
    n, m = tiles.shape[:2]
    return tiles.reshape(n, m, 32, 4, 4).transpose(0, 3, 2, 1, 4).reshape(128 * n, 4 * m)


def repacks(q: QTensor) -> bool:
    """Whether `block_scaled` takes this weight, and it is as files keep it."""
    return _odd(q) is None and not q.order and all(n and n % 128 == 0 for n in matrix(q))


def repack(q: QTensor) -> QTensor:
    """A weight `[N, K]` whose scales are arranged for the kernel; once, where it is loaded.

    Raises:
      InputError: it is in the order of a kernel already, or of another format, or no matrix.
    """
    reason = _odd(q) or (f"it is in the order {q.order!r} already" if q.order else None)
    if reason:
        raise InputError(f"block_scaled: {q!r} cannot be repacked: {reason}")
    return dataclasses.replace(q, scales={**q.scales, "inner": arranged(q)}, order=ORDER)


def restore(q: QTensor) -> QTensor:
    """The inverse of `repack`.

    Raises:
      InputError: `q` is not from `repack`.
    """
    if q.order != ORDER:
        raise InputError(f"block_scaled: {q!r} is in the order {q.order!r}; only {ORDER!r} is restored here")
    rows, numbers = matrix(q)
    inner = scale_rows(jnp.asarray(q.scales["inner"]))[:rows, : numbers // kind(q).block]
    if kind(q).scales == jnp.float8_e8m0fnu:
        inner = lax.bitcast_convert_type(inner, jnp.uint8)
    return dataclasses.replace(q, scales={**q.scales, "inner": inner}, order="")


def _odd(q: QTensor) -> str | None:
    """What about one operand no product can take, or None."""
    if type(q.format) not in KINDS:
        return f"{q.format.name} is no block-scaled format of the tensor core"
    if q.codes.ndim != 2:
        return f"{q!r} is no matrix"
    if q.order not in ("", ORDER):
        return f"the codes are in the order {q.order!r}"
    return None
