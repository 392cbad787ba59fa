"""The ModelOpt dialect, as nvidia-modelopt 0.47 exports it and vLLM, SGLang and TensorRT-LLM read it.

Specification: `hf_quant_config.json` and `quantization_config` in config.json; all scales are multipliers in
float32: w = q * weight_scale (* weight_scale_2), x = q * input_scale. NVFP4's are amax / 2688.
"""

from __future__ import annotations

import fnmatch
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import jax
import ml_dtypes
import numpy as np

from mojax.converters.base import (
    Get,
    Parsed,
    amax_of,
    as_read,
    bytes_of,
    expect,
    kind,
    label,
    narrow,
    nibbles,
    outer_as,
    plain,
    refusal,
    section,
    static_outer,
)
from mojax.errors import InputError
from mojax.formats import fp8, int4, mxfp4, mxfp8, nvfp4
from mojax.formats.base import Arithmetic, Format, QTensor, Scheme

DIALECT = "modelopt"
ARITHMETIC: Arithmetic = "float32"
WRITES = True
METHODS = ("modelopt", "modelopt_fp4", "modelopt_mxfp8", "modelopt_mixed")
LISTS_EMBEDDINGS = True
PRODUCER = {"name": "modelopt", "version": "0.47.0"}

SUFFIXES = (".weight_scale", ".weight_scale_2", ".input_scale", ".k_scale", ".v_scale")

E4M3 = np.dtype(ml_dtypes.float8_e4m3fn)
U8, F32 = np.dtype(np.uint8), np.dtype(np.float32)
FLOATS = (F32, np.dtype(ml_dtypes.bfloat16), np.dtype(np.float16))


class Algorithm(NamedTuple):
    """A `quant_algo`: its scheme, the keys it adds to hf_quant_config.json, its arguments in config groups."""

    name: str
    scheme: Scheme
    more: dict[str, Any] = {}  # noqa: RUF012 - never written to
    weights: dict[str, Any] = {}  # noqa: RUF012
    inputs: dict[str, Any] = {}  # noqa: RUF012
    grouped: bool = False  # ModelOpt writes config_groups for these only
    mixes: bool = True  # may be one of several


def _args(bits: int, dynamic: bool = False, **more: Any) -> dict[str, Any]:
    return {"dynamic": dynamic, "num_bits": bits, "type": "float", **more}


FP8, TOKEN, BLOCK = fp8.FORMAT(per="tensor"), fp8.FORMAT(per="token"), fp8.FORMAT(per="block")
NV, MX8 = nvfp4.FORMAT(), mxfp8.FORMAT()
E2M1 = _args(4, group_size=16)
AWQ = {"group_size": 128, "has_zero_point": False, "pre_quant_scale": False}
ALGORITHMS = (
    Algorithm("FP8", Scheme(FP8, FP8), {}, _args(8), _args(8), grouped=True),
    Algorithm(
        "FP8_PER_CHANNEL_PER_TOKEN", Scheme(fp8.FORMAT(per="channel"), TOKEN), {}, _args(8), _args(8, True)
    ),
    Algorithm("fp8_pb_wo", Scheme(BLOCK, BLOCK), {}, _args(8), _args(8, True, group_size=128)),
    Algorithm("NVFP4", Scheme(NV, NV), {"group_size": 16}, E2M1, E2M1, grouped=True),
    Algorithm("W4A16_NVFP4", Scheme(NV), {"group_size": 16}, E2M1, grouped=True),
    Algorithm(
        "MXFP8",
        Scheme(MX8, MX8),
        {"group_size": 32},
        _args(8, group_size=32),
        _args(8, True, group_size=32),
    ),
    Algorithm("mxfp4", Scheme(mxfp4.FORMAT()), mixes=False),
    Algorithm("W4A16_AWQ", Scheme(int4.FORMAT(group=128)), AWQ, mixes=False),
)
BY_NAME = {algorithm.name.upper(): algorithm for algorithm in ALGORITHMS}
BY_SCHEME = {algorithm.scheme: algorithm for algorithm in ALGORITHMS}
CACHE = FP8

# (weights, inputs) -> who loads it. transformers is never here: it knows no quant_method "modelopt".
LOADS = {
    ("fp8 tensor", "fp8 tensor"): ("vllm", "sglang", "trtllm"),
    ("fp8 channel", "fp8 token"): ("vllm", "trtllm"),
    ("fp8 block", "fp8 block"): ("vllm", "trtllm"),
    ("nvfp4", "nvfp4"): ("vllm", "sglang", "trtllm"),
    ("nvfp4", "none"): ("vllm", "sglang", "trtllm"),
    ("mxfp8", "mxfp8"): ("vllm", "trtllm"),
    ("mxfp4", "none"): ("trtllm",),
    ("int4", "none"): ("trtllm",),
}
REASONS = {
    ("fp8 channel", "fp8 token", "sglang"): "it reads only per-tensor FP8 there; use --format=compressed-tensors",
    ("fp8 block", "fp8 block", "sglang"): "it reads only per-tensor FP8 there; use --format=compressed-tensors",
    ("mxfp8", "mxfp8", "sglang"): "it reads mxfp8 only as Hugging Face's own quant_method; use --recipe=fp8_block"
    " --format=compressed-tensors",
    ("int4", "none", "vllm"): "it rejects W4A16_AWQ; use --format=compressed-tensors",
    ("int4", "none", "sglang"): "it rejects W4A16_AWQ; use --format=compressed-tensors",
    ("mxfp4", "none", "vllm"): "it rejects this algorithm; use --format=compressed-tensors",
    ("mxfp4", "none", "sglang"): "it rejects this algorithm; use --recipe=nvfp4_weight_only",
}


def check(scheme: Scheme, target: str) -> str | None:
    """Why `target` (vllm, sglang, trtllm, transformers) cannot load this scheme in this dialect, or None."""
    if target == "transformers":
        return (
            f"transformers cannot load {label(scheme)} in the {DIALECT} dialect: it does not know it, and FP8 loads"
            " without an error and with raw codes as weights; use --format=compressed-tensors"
        )
    if _algorithm(scheme) is None:
        return f"{target} cannot load {_unknown(scheme)}"
    return refusal(DIALECT, scheme, target, LOADS, REASONS)


def _algorithm(scheme: Scheme) -> Algorithm | None:
    weights = plain(scheme.weights)
    return BY_SCHEME.get(Scheme(weights, plain(scheme.inputs))) if weights else None


def _unknown(scheme: Scheme) -> str:
    group = getattr(scheme.weights, "group", 128)
    detail = f" (it has groups of 128 only, not {group})" if kind(scheme.weights) == "int4" and group != 128 else ""
    return (
        f"{label(scheme)} in the {DIALECT} dialect, which has no algorithm for this pair{detail}; use"
        " --format=compressed-tensors"
    )


def _known(scheme: Scheme) -> Algorithm:
    algorithm = _algorithm(scheme)
    if algorithm is None:
        raise InputError(f"cannot write {_unknown(scheme)}")
    return algorithm


def config(
    schemes: Mapping[str, Scheme], ignore: Sequence[str], cache: Format | None
) -> dict[str, dict[str, Any]]:
    """`quantization_config` for config.json and the whole of `hf_quant_config.json`.

    Args:
      schemes: of every encoded module; several kinds make MIXED_PRECISION.
      ignore: full names of the Linear and embedding modules that are not encoded.
      cache: fp8 per tensor, or None.
    Raises:
      InputError: a scheme or a cache that this dialect does not have, or cannot mix.
    """
    if cache and plain(cache) != CACHE:
        raise InputError(f"a {cache.label} KV cache is not written in the {DIALECT} dialect; use kv_cache: fp8")
    members: dict[str, list[str]] = {}
    for module, scheme in schemes.items():
        members.setdefault(_known(scheme).name, []).append(module)
    algorithms = [BY_NAME[name.upper()] for name in members]
    mixed = len(algorithms) > 1
    alone = [a.name for a in algorithms if mixed and not a.mixes]
    if alone:
        raise InputError(
            f"the {DIALECT} dialect cannot mix {alone[0]} with {', '.join(n for n in members if n != alone[0])};"
            " use --format=compressed-tensors, or one format for all"
        )
    name = "MIXED_PRECISION" if mixed else algorithms[0].name if algorithms else None
    detail: dict[str, Any] = {"quant_algo": name, "kv_cache_quant_algo": "FP8" if cache else None}
    written: dict[str, Any] = {"quant_method": DIALECT, "quant_algo": name, "producer": PRODUCER}
    if mixed or any(a.grouped for a in algorithms):
        written["config_groups"] = {
            f"group_{i}": _group(a, members[a.name] if mixed else ["Linear"]) for i, a in enumerate(algorithms)
        }
    if mixed:
        layers = {m: _layer(_known(scheme)) for m, scheme in schemes.items()}
        detail["quantized_layers"] = written["quantized_layers"] = layers
    elif algorithms:
        detail |= algorithms[0].more
    if cache:
        written["kv_cache_scheme"] = _args(8)
    detail["exclude_modules"] = written["ignore"] = sorted(ignore)
    return {
        "quantization_config": written,
        "hf_quant_config.json": {"producer": PRODUCER, "quantization": detail},
    }


def _group(algorithm: Algorithm, targets: list[str]) -> dict[str, Any]:
    group: dict[str, Any] = {"weights": algorithm.weights, "targets": targets}
    return group | ({"input_activations": algorithm.inputs} if algorithm.inputs else {})


def _layer(algorithm: Algorithm) -> dict[str, Any]:
    return {"quant_algo": algorithm.name.upper()} | algorithm.more


def parse(config: dict[str, Any], extra: dict[str, Any] | None, modules: Sequence[str]) -> Parsed:
    """What config.json and hf_quant_config.json (`extra`) say about the Linear `modules` of a file.

    An entry of the exclude list is a full name, a part of one between dots, or a wildcard.

    Raises:
      InputError: an algorithm or a KV cache that cannot be read exactly, or two files that disagree.
    """
    found = section(config)
    found = found | found.get("quantization", {})
    detail = (extra or {}).get("quantization", {})
    name = found.get("quant_algo") or detail.get("quant_algo")
    other = detail.get("quant_algo") or name
    if str(name).upper() != str(other).upper():
        raise InputError(
            f"config.json says quant_algo {name!r}, hf_quant_config.json says {other!r}; correct the wrong one"
        )
    excluded = found.get("ignore") or found.get("exclude_modules") or detail.get("exclude_modules") or []
    included = [m for m in modules if not any(_excludes(entry, m) for entry in excluded)]
    if str(name).upper() == "MIXED_PRECISION":
        layers = found.get("quantized_layers") or detail.get("quantized_layers") or {}
        schemes = {m: _scheme(f"quantized_layers.{m}", layers[m]) for m in included if m in layers}
    else:
        groups = (found.get("config_groups") or {}).values()
        weight_only = bool(groups) and not any(g.get("input_activations") for g in groups)
        if str(name).upper() == "NVFP4" and weight_only:
            name = "W4A16_NVFP4"
        scheme = _scheme("quantization", detail | found | {"quant_algo": name})
        schemes = dict.fromkeys(included, scheme)
    names = [entry for entry in excluded if "*" not in entry and "?" not in entry and "[" not in entry]
    ignore = dict.fromkeys([*names, *(m for m in modules if m not in schemes)])
    return Parsed(schemes, _cache(found, detail), tuple(ignore))


def _excludes(entry: str, module: str) -> bool:
    return f".{entry}." in f".{module}." or fnmatch.fnmatchcase(module, entry)


def _scheme(where: str, settings: Mapping[str, Any]) -> Scheme:
    name = settings.get("quant_algo")
    algorithm = BY_NAME.get({"FP8_BLOCK_SCALES": "FP8_PB_WO"}.get(str(name).upper(), str(name).upper()))
    if algorithm is None:
        raise InputError(
            f"{where}.quant_algo is {name!r}; mojax reads {', '.join(a.name for a in ALGORITHMS)};"
            " start from the unquantized checkpoint"
        )
    for key in ("group_size", "has_zero_point"):
        value, needed = settings.get(key), algorithm.more.get(key)
        if value and needed is not None and value != needed:
            raise InputError(f"{where}.{key} is {value!r}; for {name} mojax reads {needed!r} only")
    weights = as_read(algorithm.scheme.weights, ARITHMETIC)
    assert weights is not None
    return Scheme(weights, as_read(algorithm.scheme.inputs, ARITHMETIC))


def _cache(found: Mapping[str, Any], detail: Mapping[str, Any]) -> Format | None:
    scheme = found.get("kv_cache_scheme") or found.get("kv_cache_quant_algo") or detail.get("kv_cache_quant_algo")
    if scheme is None:
        return None
    eight = isinstance(scheme, dict) and (scheme.get("num_bits"), scheme.get("type")) == (8, "float")
    if not eight and str(scheme).upper() != "FP8":
        raise InputError(f"the KV cache is quantized as {scheme!r}; mojax reads FP8 only")
    return as_read(CACHE, ARITHMETIC)


def layout(
    module: str, shape: tuple[int, ...], dtype: Any, scheme: Scheme
) -> dict[str, jax.ShapeDtypeStruct]:
    """The names, shapes and dtypes of what `write` gives for a weight `[out, in]`.

    Raises:
      InputError: a scheme that this dialect does not have, or an odd number of rows for int4.
    """
    _known(scheme)
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
    return {f"{module}.{name}": jax.ShapeDtypeStruct(s, d) for name, (s, d) in tensors.items()}


def write(module: str, q: QTensor, scheme: Scheme, amax: float | None) -> dict[str, np.ndarray]:
    """The tensors of one encoded Linear.

    Args:
      module: full name, without `.weight`.
      q: the encoded weight, of either arithmetic; `scheme.weights` is `q.format`.
      amax: the calibrated maximum of a static input.
    Raises:
      InputError: a scheme that this dialect does not have, or a static input without a maximum.
    """
    spec = layout(module, q.shape, q.dtype, scheme)
    scales = {level: np.asarray(value) for level, value in q.scales.items()}
    codes = np.asarray(q.codes)
    if q.format.name == "int4":
        codes = bytes_of(nibbles(codes).T).T  # pairs of rows instead of pairs of columns
    tensors = {"weight": codes, "weight_scale": scales.get("inner", scales.get("outer"))}
    if q.format.name == "nvfp4":
        tensors["weight_scale_2"] = outer_as(scales["outer"], q.format.arithmetic, ARITHMETIC)
    if scheme.inputs and scheme.inputs.static:
        outer = static_outer(scheme.inputs, module, amax, q.dtype)
        nvfp4_inputs = scheme.inputs.name == "nvfp4"
        tensors["input_scale"] = outer_as(outer, scheme.inputs.arithmetic, ARITHMETIC) if nvfp4_inputs else outer
    arrays = {name: np.asarray(tensors[name.removeprefix(f"{module}.")]) for name in spec}
    return {name: np.ascontiguousarray(narrow(name, arrays[name], s.dtype)).reshape(s.shape) for name, s in spec.items()}


def read(module: str, get: Get, scheme: Scheme, dtype: Any) -> tuple[QTensor, np.float32 | None]:
    """An encoded Linear of a file.

    Args:
      module: full name, without `.weight`.
      get: tensor name -> array.
      scheme: from `parse`.
      dtype: of the checkpoint's other tensors.
    Returns:
      The weight, its arrays views of the file's where the arrangement is the same, and the maximum of a static
      input or None.
    Raises:
      InputError: a tensor of another dtype or shape than the scheme says.
    """
    w = scheme.weights
    codes = get(f"{module}.weight")
    rows, columns = {"int4": (2, 1), "nvfp4": (1, 2), "mxfp4": (1, 2)}.get(w.name, (1, 1))
    shape = (codes.shape[0] * rows, codes.shape[1] * columns)
    spec = layout(module, shape, dtype, scheme)

    def tensor(leaf: str) -> np.ndarray:
        name = f"{module}.{leaf}"
        dtypes = FLOATS if spec[name].dtype == F32 else (spec[name].dtype,)
        return expect(name, get(name), dtypes, spec[name].shape)

    codes, inner = tensor("weight"), tensor("weight_scale")
    inner = inner.astype(F32) if inner.dtype in FLOATS else inner
    per = getattr(w, "per", None)
    shapes = {"channel": (shape[0], 1), "block": (-(-shape[0] // 128), -(-shape[1] // 128))}
    scales = {"outer": inner.reshape(())} if per == "tensor" else {"inner": inner.reshape(shapes.get(per, inner.shape))}
    if w.name == "int4":
        _refuse_scaled(module, get)
        codes = np.ascontiguousarray(bytes_of(nibbles(codes.T).T))
    if w.name == "nvfp4":
        scales["outer"] = tensor("weight_scale_2").astype(F32)
    amax = None
    if scheme.inputs and scheme.inputs.static:
        amax = amax_of(scheme.inputs, tensor("input_scale").astype(F32))
    return QTensor(codes, scales, w, shape, np.dtype(dtype)), amax


def _refuse_scaled(module: str, get: Get) -> None:
    try:
        get(f"{module}.pre_quant_scale")
    except (KeyError, InputError):
        return
    raise InputError(
        f"{module}.pre_quant_scale: inputs scaled at run time are not read; start from the unquantized checkpoint"
    )


def cache_names(attention: str) -> tuple[str, str]:
    """The names of the scales of K and V."""
    return f"{attention}.k_proj.k_scale", f"{attention}.v_proj.v_scale"


def write_cache(attention: str, k_amax: Any, v_amax: Any, dtype: Any) -> dict[str, np.ndarray]:
    """The scales of an FP8 KV cache, float32 `[]`, from the calibrated maxima; `dtype` is not used."""
    format = fp8.FORMAT(per="tensor", arithmetic=ARITHMETIC)
    maxima = zip(cache_names(attention), (k_amax, v_amax), strict=True)
    return {name: static_outer(format, attention, amax, F32) for name, amax in maxima}


def read_cache(attention: str, get: Get) -> tuple[np.float32, np.float32]:
    """The maxima of K and V that the file's scales stand for."""
    k, v = (expect(name, get(name), FLOATS, ()).astype(F32) for name in cache_names(attention))
    return amax_of(CACHE, k), amax_of(CACHE, v)
