"""Tensors of compressed-tensors: an encoded Linear as a file holds it, written and read.

Specification: compressed-tensors 0.19. NVFP4's global scales are divisors, 2688 / amax. Integers are packed
little-endian into int32 with an offset, u = q + 2^(bits - 1); zero points the same way, but along the rows.
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
    narrow,
    nibbles,
    outer_as,
    static_outer,
)
from mojax.converters.compressed_tensors import rotation
from mojax.converters.compressed_tensors.adapter import branch
from mojax.converters.compressed_tensors.schemes import ARITHMETIC, storage
from mojax.formats import int4
from mojax.formats.base import Format, QTensor, Scheme

SUFFIXES = (
    ".weight_packed",
    ".weight_scale",
    ".weight_shape",
    ".weight_zero_point",
    ".weight_global_scale",
    ".input_scale",
    ".input_global_scale",
    ".k_scale",
    ".v_scale",
)

E4M3 = np.dtype(ml_dtypes.float8_e4m3fn)
FLOATS = (np.dtype(ml_dtypes.bfloat16), np.dtype(np.float16), np.dtype(np.float32))


def layout(
    module: str, shape: tuple[int, ...], dtype: Any, scheme: Scheme
) -> dict[str, jax.ShapeDtypeStruct]:
    """The names, shapes and dtypes of what `write` gives for a weight `[out, in]` of dtype `dtype`."""
    n, k = shape
    w = scheme.weights
    kept = _scale_dtype(w, dtype)
    tensors: dict[str, tuple[tuple[int, ...], Any]] = {}
    match storage(scheme), w:
        case "pack-quantized", int4.FORMAT():
            tensors["weight_packed"] = (n, -(-k // 8)), np.int32
            tensors["weight_scale"] = (n, k // w.group), dtype
            if not w.symmetric:
                tensors["weight_zero_point"] = (-(-n // 8), k // w.group), np.int32
            tensors["weight_shape"] = (2,), np.int64
        case "pack-quantized", _:
            tensors["weight_packed"] = (n, -(-k // 4)), np.int32
            tensors["weight_scale"] = _scale_shape(w, shape), dtype
            tensors["weight_shape"] = (2,), np.int64
        case "nvfp4-pack-quantized", _:
            tensors["weight_packed"] = (n, k // 2), np.uint8
            tensors["weight_scale"] = (n, k // 16), E4M3
            tensors["weight_global_scale"] = (1,), np.float32
        case "mxfp4-pack-quantized", _:
            tensors["weight_packed"] = (n, k // 2), np.uint8
            tensors["weight_scale"] = (n, k // 32), np.uint8
        case "mxfp8-quantized", _:
            tensors["weight"] = (n, k), E4M3
            tensors["weight_scale"] = (n, k // 32), np.uint8
        case _, _:
            tensors["weight"] = (n, k), np.int8 if w.name == "int8" else E4M3
            tensors["weight_scale"] = _scale_shape(w, shape), kept
    if scheme.inputs and scheme.inputs.static:
        if scheme.inputs.name == "nvfp4":
            tensors["input_global_scale"] = (1,), np.float32
        else:
            tensors["input_scale"] = (1,), _scale_dtype(scheme.inputs, dtype)
    if rotation.stored(scheme):
        tensors[rotation.leaf(scheme.hadamard)] = (scheme.hadamard, scheme.hadamard), dtype
    found = {f"{module}.{name}": jax.ShapeDtypeStruct(s, d) for name, (s, d) in tensors.items()}
    return found | branch_layout(branch(module), shape, dtype, scheme)


def _scale_dtype(format: Format, dtype: Any) -> np.dtype:
    """Scales made in the checkpoint's dtype stay in it; servers take any float for fp8 and int8."""
    return np.dtype({"checkpoint": dtype, "float32": np.float32}[format.arithmetic])


def _scale_shape(format: Format, shape: tuple[int, ...]) -> tuple[int, ...]:
    n, k = shape
    per = getattr(format, "per", "")
    return {"tensor": (1,), "channel": (n, 1), "block": (-(-n // 128), -(-k // 128))}[per]


def write(module: str, q: QTensor, scheme: Scheme, amax: Any) -> dict[str, np.ndarray]:
    """The tensors of one encoded Linear, without those of a branch.

    Args:
      module: full name, without `.weight`.
      q: the encoded weight, of either arithmetic; `scheme.weights` is `q.format`.
      amax: the calibrated maximum of a static input.
    Raises:
      InputError: a scale that the dialect's dtype cannot hold, or a static input without a maximum.
    """
    spec = layout(module, q.shape, q.dtype, scheme._replace(rank=0))
    codes = np.asarray(q.codes)
    scales = {level: np.asarray(value) for level, value in q.scales.items()}
    inner = scales.get("inner", scales.get("outer"))
    tensors: dict[str, Any] = {"weight_scale": inner}
    if f"{module}.weight_shape" in spec:
        offset = np.uint8(0x88 if q.format.name == "int4" else 0x80)
        tensors["weight_packed"] = _words(codes.view(np.uint8) ^ offset)
        tensors["weight_shape"] = np.array(q.shape, np.int64)
        if "zero" in scales:
            tensors["weight_zero_point"] = _pack_zero(scales["zero"])
    elif f"{module}.weight_packed" in spec:
        tensors["weight_packed"] = codes
    else:
        tensors["weight"] = codes
    if q.format.name == "nvfp4":
        tensors["weight_global_scale"] = outer_as(scales["outer"], q.format.arithmetic, ARITHMETIC)
    if scheme.inputs and scheme.inputs.static:
        outer = static_outer(scheme.inputs, module, amax, q.dtype)
        if scheme.inputs.name == "nvfp4":
            tensors["input_global_scale"] = outer_as(outer, scheme.inputs.arithmetic, ARITHMETIC)
        else:
            tensors["input_scale"] = outer
    if rotation.stored(scheme):
        tensors[rotation.leaf(scheme.hadamard)] = rotation.known(scheme.hadamard).astype(q.dtype)
    return {
        name: narrow(name, np.asarray(tensors[name.removeprefix(f"{module}.")]), s.dtype).reshape(s.shape)
        for name, s in spec.items()
    }


def _words(packed: np.ndarray) -> np.ndarray:
    """uint8 `[n, bytes]` as little-endian int32 `[n, ceil(bytes / 4)]`, padded with zeros."""
    padded = np.pad(packed, ((0, 0), (0, -packed.shape[1] % 4)))
    return np.ascontiguousarray(padded).view(np.int32)


def _pack_zero(zero: np.ndarray) -> np.ndarray:
    """int8 zero points `[n, groups]` -> int32 `[ceil(n / 8), groups]`: eight rows to a word."""
    u = (zero.T + np.int8(8)).view(np.uint8)
    return np.ascontiguousarray(_words(bytes_of(np.pad(u, ((0, 0), (0, u.shape[1] % 2))))).T)


def _unpack_zero(packed: np.ndarray, n: int) -> np.ndarray:
    u = nibbles(np.ascontiguousarray(packed.T).view(np.uint8))[:, :n]
    return np.ascontiguousarray(u.view(np.int8).T - np.int8(8))


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
    if scheme.hadamard:
        rotation.check(module, scheme.hadamard, get)
    leaf = "weight_packed" if "pack" in storage(scheme) else "weight"
    arrangement = layout(module, (0, 0), dtype, scheme)[f"{module}.{leaf}"].dtype
    codes = expect(f"{module}.{leaf}", get, (arrangement,))
    if storage(scheme) == "pack-quantized":
        shape = tuple(int(n) for n in expect(f"{module}.weight_shape", get, (np.dtype(np.int64),), (2,)))
    else:
        shape = (codes.shape[0], codes.shape[1] * (2 if leaf == "weight_packed" else 1))
    spec = layout(module, shape, dtype, scheme)

    def tensor(leaf: str) -> np.ndarray:
        name = f"{module}.{leaf}"
        dtypes = FLOATS if spec[name].dtype in FLOATS else (spec[name].dtype,)
        return expect(name, get, dtypes, spec[name].shape)

    codes, scales = tensor(leaf), {"inner": tensor("weight_scale")}
    if storage(scheme) == "pack-quantized":
        offset, width = (0x88, shape[1] // 2) if w.name == "int4" else (0x80, shape[1])
        codes = (codes.view(np.uint8) ^ np.uint8(offset))[:, :width]
        codes = codes if w.name == "int4" else codes.view(np.int8)
        if f"{module}.weight_zero_point" in spec:
            scales["zero"] = _unpack_zero(tensor("weight_zero_point"), shape[0])
    if w.name == "nvfp4":
        scales["outer"] = tensor("weight_global_scale").reshape(())
    elif getattr(w, "per", None) == "tensor":
        scales = {"outer": scales["inner"].reshape(()).astype(np.float32)}
    amax = None
    if scheme.inputs and scheme.inputs.static:
        leaf = "input_global_scale" if scheme.inputs.name == "nvfp4" else "input_scale"
        amax = amax_of(scheme.inputs, tensor(leaf).reshape(()).astype(np.float32))
    return QTensor(codes, scales, w, shape, np.dtype(dtype)), amax


def cache_names(attention: str) -> tuple[str, str]:
    """The names of the scales of K and V."""
    return f"{attention}.k_scale", f"{attention}.v_scale"


def write_cache(attention: str, k_amax: Any, v_amax: Any, dtype: Any) -> dict[str, np.ndarray]:
    """The scales of a KV cache, `[1]` or `[kv_heads, 1, 1]` in the checkpoint's dtype, from the maxima."""
    scales = cache_scales(cache_names(attention), (k_amax, v_amax), ARITHMETIC, dtype)
    return {name: s.astype(dtype).reshape((-1, 1, 1) if s.ndim else 1) for name, s in scales.items()}


def read_cache(attention: str, get: Get) -> tuple[np.ndarray, ...]:
    """The maxima of K and V that the file's scales stand for, float32 `[]` or per head `[kv_heads]`."""
    return cache_maxima([expect(name, get, FLOATS) for name in cache_names(attention)], ARITHMETIC)
