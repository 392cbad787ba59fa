"""Tensors of ModelOpt: an encoded Linear as a file holds it, written and read.

Specification: nvidia-modelopt 0.47. All scales are multipliers: w = q * weight_scale (* weight_scale_2),
x = q * input_scale; NVFP4's are amax / 2688. int4 packs pairs of rows, two's complement, no offset.
"""

from __future__ import annotations

from typing import Any

import jax
import ml_dtypes
import numpy as np

from mojax.converters.base import (
    Get,
    amax_of,
    branch_layout,
    bytes_of,
    cache_maxima,
    cache_scales,
    expect,
    kind,
    narrow,
    nibbles,
    outer_as,
    static_outer,
)
from mojax.converters.modelopt.schemes import ARITHMETIC, DIALECT, known
from mojax.errors import InputError
from mojax.formats.base import QTensor, Scheme

BRANCH = (".weight_quantizer._svdquant_lora_a", ".weight_quantizer._svdquant_lora_b")
SUFFIXES = (".weight_scale", ".weight_scale_2", ".input_scale", ".k_scale", ".v_scale", *BRANCH)

E4M3 = np.dtype(ml_dtypes.float8_e4m3fn)
U8, F32 = np.dtype(np.uint8), np.dtype(np.float32)
FLOATS = (F32, np.dtype(ml_dtypes.bfloat16), np.dtype(np.float16))


def layout(
    module: str, shape: tuple[int, ...], dtype: Any, scheme: Scheme
) -> dict[str, jax.ShapeDtypeStruct]:
    """The names, shapes and dtypes of what `write` gives for a weight `[out, in]`.

    Raises:
      InputError: a scheme that this dialect does not have, or an odd number of rows for int4.
    """
    known(scheme)
    n, k = shape
    if kind(scheme.weights) == "int4" and n % 2:
        raise InputError(
            f"{module}.weight has {n} rows; the {DIALECT} dialect packs int4 in pairs of rows; add"
            f" --keep={module}.weight, or use --format=compressed-tensors"
        )
    blocks = (-(-n // 128), 1, -(-k // 128), 1)
    tensors = {
        "fp8 tensor": {"weight": ((n, k), E4M3), "weight_scale": ((), F32)},
        "fp8 channel": {"weight": ((n, k), E4M3), "weight_scale": ((n,), F32)},
        "fp8 block": {"weight": ((n, k), E4M3), "weight_scale": (blocks, F32)},
        "nvfp4": {
            "weight": ((n, k // 2), U8),
            "weight_scale": ((n, k // 16), E4M3),
            "weight_scale_2": ((), F32),
        },
        "mxfp8": {"weight": ((n, k), E4M3), "weight_scale": ((n, k // 32), U8)},
        "mxfp4": {"weight": ((n, k // 2), U8), "weight_scale": ((n, k // 32), U8)},
        "int4": {"weight": ((n // 2, k), U8), "weight_scale": ((n, k // 128), F32)},
    }[kind(scheme.weights)]
    if scheme.inputs and scheme.inputs.static:
        tensors["input_scale"] = ((), F32)
    found = {f"{module}.{name}": jax.ShapeDtypeStruct(s, d) for name, (s, d) in tensors.items()}
    return found | branch_layout(branch(module), shape, dtype, scheme)


def branch(module: str) -> tuple[str, str]:
    """The names of the tensors A and B of a branch."""
    return module + BRANCH[0], module + BRANCH[1]


def write(module: str, q: QTensor, scheme: Scheme, amax: Any) -> dict[str, np.ndarray]:
    """The tensors of one encoded Linear, without those of a branch.

    Args:
      module: full name, without `.weight`.
      q: the encoded weight, of either arithmetic; `scheme.weights` is `q.format`.
      amax: the calibrated maximum of a static input.
    Raises:
      InputError: a scheme that this dialect does not have, or a static input without a maximum.
    """
    known(scheme)
    spec = layout(module, q.shape, q.dtype, scheme._replace(rank=0))
    scales = {level: np.asarray(value) for level, value in q.scales.items()}
    codes = np.asarray(q.codes)
    if q.format.name == "int4":
        codes = np.ascontiguousarray(
            bytes_of(nibbles(codes).T).T
        )  # pairs of rows instead of pairs of columns
    tensors = {"weight": codes, "weight_scale": scales.get("inner", scales.get("outer"))}
    if q.format.name == "nvfp4":
        tensors["weight_scale_2"] = outer_as(scales["outer"], q.format.arithmetic, ARITHMETIC)
    if scheme.inputs and scheme.inputs.static:
        outer = static_outer(scheme.inputs, module, amax, q.dtype)
        if scheme.inputs.name == "nvfp4":
            outer = outer_as(outer, scheme.inputs.arithmetic, ARITHMETIC)
        tensors["input_scale"] = outer
    return {
        name: narrow(name, np.asarray(tensors[name.removeprefix(f"{module}.")]), s.dtype).reshape(s.shape)
        for name, s in spec.items()
    }


def read(module: str, get: Get, scheme: Scheme, dtype: Any) -> tuple[QTensor, np.float32 | None]:
    """An encoded Linear of a file.

    Args:
      module: full name, without `.weight`.
      get: tensor name -> array.
      scheme: from `parse`.
      dtype: of the checkpoint's other tensors.
    Returns:
      The weight, its arrays views of the file's where the arrangement is the same, and the maximum of a
      static input or None.
    Raises:
      InputError: a tensor of another dtype or shape than the scheme says.
    """
    w = scheme.weights
    stored = layout(module, (0, 0), dtype, scheme)[f"{module}.weight"].dtype
    codes = expect(f"{module}.weight", get, (stored,))
    rows, columns = {"int4": (2, 1), "nvfp4": (1, 2), "mxfp4": (1, 2)}.get(w.name, (1, 1))
    shape = (codes.shape[0] * rows, codes.shape[1] * columns)
    spec = layout(module, shape, dtype, scheme)

    def tensor(leaf: str) -> np.ndarray:
        name = f"{module}.{leaf}"
        dtypes = FLOATS if spec[name].dtype == F32 else (spec[name].dtype,)
        return expect(name, get, dtypes, spec[name].shape)

    codes, inner = tensor("weight"), tensor("weight_scale")
    inner = inner.astype(F32) if inner.dtype in FLOATS else inner
    per = getattr(w, "per", "")
    shapes = {"channel": (shape[0], 1), "block": (-(-shape[0] // 128), -(-shape[1] // 128))}
    inner = inner.reshape(shapes.get(per, inner.shape))
    scales = {"outer": inner} if per == "tensor" else {"inner": inner}
    if w.name in ("int4", "nvfp4"):
        _refuse_scaled(module, get)
    if w.name == "int4":
        codes = np.ascontiguousarray(bytes_of(nibbles(codes.T).T))
    if w.name == "nvfp4":
        scales["outer"] = tensor("weight_scale_2").astype(F32)
    amax = None
    if scheme.inputs and scheme.inputs.static:
        amax = amax_of(scheme.inputs, tensor("input_scale").astype(F32))
    return QTensor(codes, scales, w, shape, np.dtype(dtype)), amax


def _refuse_scaled(module: str, get: Get) -> None:
    try:
        if np.all(np.asarray(get(f"{module}.pre_quant_scale"), np.float32) == 1):
            return
    except (KeyError, InputError):
        return
    raise InputError(
        f"{module}.pre_quant_scale: inputs scaled at run time are not read; start from the unquantized"
        " checkpoint"
    )


def cache_names(attention: str) -> tuple[str, str]:
    """The names of the scales of K and V."""
    return f"{attention}.k_proj.k_scale", f"{attention}.v_proj.v_scale"


def write_cache(attention: str, k_amax: Any, v_amax: Any, dtype: Any) -> dict[str, np.ndarray]:
    """The scales of a KV cache, float32 `[]`, from the maxima; `dtype` is not used."""
    return cache_scales(cache_names(attention), (k_amax, v_amax), ARITHMETIC, F32)


def read_cache(attention: str, get: Get) -> tuple[np.ndarray, ...]:
    """The maxima of K and V that the file's scales stand for."""
    return cache_maxima([expect(name, get, FLOATS, ()) for name in cache_names(attention)], ARITHMETIC)
