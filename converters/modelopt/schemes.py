"""Schemes of ModelOpt: `quantization_config` of config.json and hf_quant_config.json, written and read.

Specification: nvidia-modelopt 0.47. One algorithm for all modules but the excluded ones, or MIXED_PRECISION
with a list of the quantized layers.
"""

from __future__ import annotations

import dataclasses
import fnmatch
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from mojax.cache import Cache
from mojax.converters.base import (
    Parsed,
    as_read,
    cache_kind,
    cache_refusal,
    experts_refusal,
    label,
    plain_scheme,
    refusal,
    rotation_refusal,
    section,
)
from mojax.errors import InputError
from mojax.formats import fp8, int4, mxfp4, mxfp8, nvfp4
from mojax.formats.base import Arithmetic, Format, Scheme

DIALECT = "modelopt"
ARITHMETIC: Arithmetic = "float32"
PRODUCER = {"name": "modelopt", "version": "0.47.0"}


@dataclasses.dataclass(frozen=True)
class Algorithm:
    """A `quant_algo`: its scheme, its keys in hf_quant_config.json, its arguments in a config group."""

    name: str
    scheme: Scheme
    more: dict[str, Any] = dataclasses.field(default_factory=dict)
    weights: dict[str, Any] = dataclasses.field(default_factory=dict)
    inputs: dict[str, Any] = dataclasses.field(default_factory=dict)
    grouped: bool = False  # ModelOpt writes config_groups for these only
    mixes: bool = True  # may be one of several
    branch: bool = False  # a low-rank one beside every linear


def _args(bits: int, dynamic: bool = False, **more: Any) -> dict[str, Any]:
    return {"dynamic": dynamic, "num_bits": bits, "type": "float", **more}


FP8, TOKEN, BLOCK = fp8.FORMAT(per="tensor"), fp8.FORMAT(per="token"), fp8.FORMAT(per="block")
NV, MX8 = nvfp4.FORMAT(), mxfp8.FORMAT()
E2M1 = _args(4, group_size=16)
SVD = {"group_size": 16, "has_zero_point": False, "pre_quant_scale": False}
AWQ = {"group_size": 128, "has_zero_point": False, "pre_quant_scale": False}
ALGORITHMS = (
    Algorithm("FP8", Scheme(FP8, FP8), {}, _args(8), _args(8), grouped=True),
    Algorithm(
        "FP8_PER_CHANNEL_PER_TOKEN", Scheme(fp8.FORMAT(per="channel"), TOKEN), {}, _args(8), _args(8, True)
    ),
    Algorithm("fp8_pb_wo", Scheme(BLOCK, BLOCK), {}, _args(8), _args(8, True, group_size=128)),
    Algorithm("NVFP4", Scheme(NV, NV), {"group_size": 16}, E2M1, E2M1, grouped=True),
    Algorithm("NVFP4_SVD", Scheme(NV, NV), SVD, E2M1, E2M1, grouped=True, mixes=False, branch=True),
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
BY_SCHEME = {(algorithm.scheme, algorithm.branch): algorithm for algorithm in ALGORITHMS}
CACHES: dict[str, Any] = {"fp8": _args(8), "nvfp4": "NVFP4"}  # kind -> kv_cache_scheme
CACHE_LOADS = dict.fromkeys(CACHES, ("vllm", "sglang", "trtllm"))

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
    ("fp8 channel", "fp8 token", "sglang"): "it reads only per-tensor FP8; use --format=compressed-tensors",
    ("fp8 block", "fp8 block", "sglang"): "it reads only per-tensor FP8; use --format=compressed-tensors",
    ("mxfp8", "mxfp8", "sglang"): "it reads mxfp8 only as Hugging Face's own quant_method; use"
    " --recipe=fp8_block --format=compressed-tensors",
    ("int4", "none", "vllm"): "it rejects W4A16_AWQ; use --format=compressed-tensors",
    ("int4", "none", "sglang"): "it rejects W4A16_AWQ; use --format=compressed-tensors",
    ("mxfp4", "none", "vllm"): "it rejects this algorithm; use --format=compressed-tensors",
    ("mxfp4", "none", "sglang"): "it rejects this algorithm; use --recipe=nvfp4_weight_only",
}

# Experts that a server cannot load although it loads the other linears so.
TENSORS = "it reads only one scale per tensor for experts there; use --format=compressed-tensors"
EXPERTS = {("fp8 channel", "fp8 token", "vllm"): TENSORS, ("fp8 block", "fp8 block", "vllm"): TENSORS}


def check(scheme: Scheme, target: str, dtype: Any = None, experts: bool = False) -> str | None:
    """Why `target` (vllm, sglang, trtllm, transformers) cannot load this scheme in this dialect, or None.

    Args:
      dtype: of the checkpoint, where it is known.
      experts: of a mixture of experts.
    """
    if reason := rotation_refusal(DIALECT, scheme, target):
        return reason
    if experts and (reason := experts_refusal(DIALECT, scheme, target, EXPERTS)):
        return reason
    if target == "vllm" and scheme.weights.name == "mxfp8" and dtype is not None and dtype == np.float16:
        return (
            f"vllm loads mxfp8 in the {DIALECT} dialect only with bfloat16, and this checkpoint is float16; "
            "use --format=compressed-tensors"
        )
    if target == "transformers":
        return (
            f"transformers cannot load {label(scheme)} in the {DIALECT} dialect: it does not know it, and FP8"
            " loads without an error and with raw codes as weights; use --format=compressed-tensors"
        )
    if scheme.weights.name == "nf4":
        return (
            f"{target} cannot load {label(scheme)} in the {DIALECT} dialect: it has no code books; use "
            "--format=bitsandbytes --target=transformers"
        )
    if _algorithm(scheme) is None:
        return f"{target} cannot load {_unknown(scheme)}"
    if scheme.rank and target != "trtllm":
        return (
            f"{target} cannot load {label(scheme)} in the {DIALECT} dialect: it rejects NVFP4_SVD; use "
            "--target=trtllm, or --format=compressed-tensors, where the branch is a LoRA adapter"
        )
    return refusal(DIALECT, scheme, target, LOADS, REASONS)


def check_cache(cache: Cache, target: str, encodes: bool = True) -> str | None:
    """Why `target` cannot load a key/value cache in this dialect, or None.

    Args:
      encodes: whether weights are encoded too.
    """
    others = {"fp8": "--format=compressed-tensors", "fp8 per head": "--format=compressed-tensors"}
    said = cache_refusal(DIALECT, cache, target, CACHE_LOADS, others)
    if said is None and not encodes and target != "trtllm":
        kind = cache_kind(cache)
        other = f", or use {others[kind]}" if kind in others else ""
        return (
            f"{target} loads a key/value cache in the {DIALECT} dialect only beside encoded weights; encode "
            f"some (extends: [{kind.split()[0]}, ...]){other}"
        )
    return said


def _algorithm(scheme: Scheme) -> Algorithm | None:
    return BY_SCHEME.get((plain_scheme(scheme)._replace(rank=0), scheme.rank > 0))


def _unknown(scheme: Scheme) -> str:
    group = getattr(scheme.weights, "group", 128)
    detail = f" (int4 has groups of 128 only, not {group})" if group != 128 else ""
    return (
        f"{label(scheme)} in the {DIALECT} dialect, which has no algorithm for this pair{detail}; use"
        " --format=compressed-tensors"
    )


def known(scheme: Scheme) -> Algorithm:
    algorithm = _algorithm(scheme)
    if algorithm is None:
        raise InputError(f"cannot write {_unknown(scheme)}")
    return algorithm


def config(
    schemes: Mapping[str, Scheme], ignore: Sequence[str], cache: Cache | None
) -> dict[str, dict[str, Any]]:
    """`quantization_config` for config.json and the whole of `hf_quant_config.json`.

    Args:
      schemes: of every encoded module; several kinds make MIXED_PRECISION.
      ignore: full names of the Linear and embedding modules that are not encoded.
      cache: fp8 per tensor or nvfp4, or None.
    Raises:
      InputError: a scheme or a cache that this dialect does not have, or cannot mix.
    """
    kept = cache_kind(cache) if cache else None
    if kept not in (None, *CACHES):
        raise InputError(f"a key/value cache kept as {kept} has no form in {DIALECT}; use fp8 or nvfp4")
    members: dict[str, list[str]] = {}
    for module, scheme in schemes.items():
        members.setdefault(known(scheme).name, []).append(module)
    algorithms = [BY_NAME[name.upper()] for name in members]
    mixed = len(algorithms) > 1
    alone = [a.name for a in algorithms if mixed and not a.mixes]
    if alone:
        raise InputError(
            f"the {DIALECT} dialect cannot mix {', '.join(members)} ({alone[0]} must be alone);"
            " use --format=compressed-tensors, or one format for all"
        )
    name = "MIXED_PRECISION" if mixed else algorithms[0].name if algorithms else None
    detail: dict[str, Any] = {"quant_algo": name, "kv_cache_quant_algo": kept.upper() if kept else None}
    written: dict[str, Any] = {"quant_method": DIALECT, "quant_algo": name, "producer": PRODUCER}
    rank = {"lora_rank": max(s.rank for s in schemes.values())} if any(a.branch for a in algorithms) else {}
    if mixed or any(a.grouped for a in algorithms):
        targets = members if mixed else {algorithms[0].name: ["Linear"]}
        written["config_groups"] = {
            f"group_{i}": _group(a, targets[a.name]) | rank for i, a in enumerate(algorithms)
        }
    if mixed:
        layers = {m: _layer(known(scheme)) for m, scheme in schemes.items()}
        detail["quantized_layers"] = written["quantized_layers"] = layers
    elif algorithms:
        detail |= algorithms[0].more | rank
    if kept:
        written["kv_cache_scheme"] = CACHES[kept]
    detail["exclude_modules"] = written["ignore"] = sorted(ignore)
    return {
        "quantization_config": written,
        "hf_quant_config.json": {"producer": PRODUCER, "quantization": detail},
    }


def _group(algorithm: Algorithm, targets: list[str]) -> dict[str, Any]:
    group: dict[str, Any] = {"weights": algorithm.weights, "targets": targets}
    more = {k: v for k, v in algorithm.more.items() if algorithm.branch and k != "group_size"}
    return group | ({"input_activations": algorithm.inputs} if algorithm.inputs else {}) | more


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
            f"config.json says quant_algo {name!r}, hf_quant_config.json {other!r}; correct the wrong one"
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
        only_cache = name is None and _cache(found, detail) is not None
        settings = detail | found | {"quant_algo": name}
        schemes = {} if only_cache else dict.fromkeys(included, _scheme("quantization", settings))
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


def _cache(found: Mapping[str, Any], detail: Mapping[str, Any]) -> Cache | None:
    stated = found.get("kv_cache_scheme") or found.get("kv_cache_quant_algo")
    other = detail.get("kv_cache_quant_algo")
    formats = [_cache_format(said) for said in (stated, other) if said]
    if not formats:
        return None
    if formats[0] != formats[-1]:
        raise InputError(
            f"config.json says that the KV cache is quantized as {stated!r}, hf_quant_config.json {other!r}; "
            "correct the wrong one"
        )
    return Cache(formats[0], formats[0])


def _cache_format(said: Any) -> Format | None:
    """The format of a `kv_cache_scheme`: a name, or the arguments of a quantizer."""
    read = {"FP8": FP8, "NVFP4": NV}
    name = str(said).upper()
    if isinstance(said, dict) and said.get("type") == "float":
        found = (said.get("num_bits"), said.get("group_size"))
        name = "FP8" if found == (8, None) else "NVFP4" if found in ((4, None), (4, 16)) else name
    if name not in read:
        raise InputError(f"the KV cache is quantized as {said!r}; mojax reads FP8 and NVFP4")
    return as_read(read[name], ARITHMETIC)
