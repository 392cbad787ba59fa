"""Schemes of compressed-tensors: the `quantization_config` of config.json, written and read.

Specification: compressed-tensors 0.19. A config group is a list of targets ("Linear", a full name or
`re:<regex>`) with the arguments of their weights and inputs.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import ml_dtypes
import numpy as np

from mojax.cache import Cache
from mojax.converters.base import (
    Parsed,
    as_read,
    cache_kind,
    cache_refusal,
    experts_refusal,
    label,
    plain,
    plain_scheme,
    refusal,
    rotation_refusal,
    section,
)
from mojax.converters.compressed_tensors import adapter, rotation
from mojax.converters.compressed_tensors.rotation import LARGEST, ROTATES, matches, power_of_two
from mojax.errors import InputError
from mojax.formats import fp8, int4, int8, mxfp4, mxfp8, nvfp4
from mojax.formats.base import Arithmetic, Format, Scheme

DIALECT = "compressed-tensors"
ARITHMETIC: Arithmetic = "checkpoint"
VERSION = "0.19.0"

# (weights, inputs) -> who loads it: vLLM 0.33, SGLang 0.5.23, TensorRT-LLM main, transformers 5.23.
LOADS = {
    ("fp8 tensor", "fp8 tensor"): ("vllm", "sglang", "transformers"),
    ("fp8 channel", "fp8 tensor"): ("vllm", "sglang", "transformers"),
    ("fp8 channel", "fp8 token"): ("vllm", "sglang", "trtllm", "transformers"),
    ("fp8 block", "fp8 block"): ("vllm", "sglang", "trtllm", "transformers"),
    ("fp8 tensor", "none"): ("vllm", "sglang", "transformers"),
    ("fp8 channel", "none"): ("vllm", "sglang", "transformers"),
    ("int8 channel", "int8 token"): ("vllm", "sglang", "transformers"),
    ("int8 channel", "int8 tensor"): ("vllm", "sglang", "transformers"),
    ("int8 tensor", "int8 token"): ("vllm", "sglang", "transformers"),
    ("int8 tensor", "int8 tensor"): ("vllm", "sglang", "transformers"),
    ("int8 channel", "none"): ("vllm", "sglang", "transformers"),
    ("int4", "none"): ("vllm", "sglang", "transformers"),
    ("int4 asymmetric", "none"): ("vllm", "sglang"),
    ("int4", "fp8 token"): ("vllm", "transformers"),
    ("nvfp4", "nvfp4"): ("vllm", "sglang", "trtllm", "transformers"),
    ("nvfp4", "none"): ("vllm", "sglang", "transformers"),
    ("mxfp4", "mxfp4"): ("vllm", "transformers"),
    ("mxfp4", "fp8 token"): ("vllm", "transformers"),
    ("mxfp4", "none"): ("vllm", "trtllm", "transformers"),
    ("mxfp8", "mxfp8"): ("vllm", "transformers"),
    ("mxfp8", "none"): ("vllm", "transformers"),
}
REASONS = {
    ("fp8 tensor", "fp8 tensor", "trtllm"): "it reads only channel or block scales there;"
    " use --recipe=fp8_dynamic, or --format=modelopt",
    ("nvfp4", "none", "trtllm"): "it needs quantized inputs there; use --recipe=nvfp4, or --format=modelopt",
    ("mxfp8", "mxfp8", "trtllm"): "it reads mxfp8 only in other dialects; use --format=modelopt",
    ("mxfp4", "mxfp4", "trtllm"): "it runs mxfp4 only with 16-bit inputs; use --recipe=mxfp4_weight_only",
    ("int8 channel", "int8 token", "trtllm"): "it reads no int8 there; use --recipe=fp8_dynamic",
    ("int4", "none", "trtllm"): "it reads no int4 there; use --format=modelopt",
    ("int4 asymmetric", "none", "transformers"): "its default mode fails on packed zero points (only"
    " CompressedTensorsConfig(dequantize=True) works); use --recipe=int4",
    **{
        ("nf4", "none", target): "it has no code books; use --format=bitsandbytes --target=transformers"
        for target in ("vllm", "sglang", "trtllm", "transformers")
    },
}

# Experts that a server cannot load although it loads the other linears so: (weights, inputs, target) -> why.
NO_KERNEL = "it has no kernel for experts there; use --recipe=fp8_dynamic, or keep the experts"
CHANNELS = "it runs int8 experts with one scale per channel and per token only; use --recipe=int8"
DROPPED = "its reader drops their outer scales and computes nonsense without an error; use --recipe=int4"
FAILS = "its reader fails on their tensors; use --recipe=int4 or --recipe=fp8_dynamic"
NPU = "it runs such experts on NPUs only; use --recipe=fp8_dynamic"
EXPERTS = {
    ("fp8 tensor", "none", "vllm"): NO_KERNEL,
    ("fp8 channel", "none", "vllm"): NO_KERNEL,
    ("fp8 channel", "fp8 tensor", "vllm"): NO_KERNEL,
    ("int8 channel", "int8 tensor", "vllm"): CHANNELS,
    ("int8 tensor", "int8 token", "vllm"): CHANNELS,
    ("int8 tensor", "int8 tensor", "vllm"): CHANNELS,
    **{("int8 " + w, "int8 " + i, "sglang"): NPU for w in ("tensor", "channel") for i in ("tensor", "token")},
    **{
        ("int8 " + w, "int8 " + i, "transformers"): FAILS
        for w in ("tensor", "channel")
        for i in ("tensor", "token")
    },
    ("fp8 block", "fp8 block", "transformers"): FAILS,
    ("mxfp8", "mxfp8", "transformers"): FAILS,
    ("mxfp8", "none", "transformers"): FAILS,
    ("nvfp4", "nvfp4", "transformers"): DROPPED,
    ("nvfp4", "none", "transformers"): DROPPED,
}


def _args(bits: int, type: str, strategy: str, dynamic: bool | str = False, **more: Any) -> dict[str, Any]:
    base = {"num_bits": bits, "type": type, "symmetric": True, "strategy": strategy, "dynamic": dynamic}
    return base | more


MX = {"group_size": 32, "scale_dtype": "torch.uint8"}
NV = {"group_size": 16, "scale_dtype": "torch.float8_e4m3fn"}

WEIGHTS: dict[Format, dict[str, Any]] = {
    fp8.FORMAT(per="tensor"): _args(8, "float", "tensor"),
    fp8.FORMAT(per="channel"): _args(8, "float", "channel"),
    fp8.FORMAT(per="block"): _args(8, "float", "block", block_structure=[128, 128]),
    int8.FORMAT(per="tensor"): _args(8, "int", "tensor"),
    int8.FORMAT(per="channel"): _args(8, "int", "channel"),
    nvfp4.FORMAT(): _args(4, "float", "tensor_group", **NV),
    mxfp4.FORMAT(): _args(4, "float", "group", **MX),
    mxfp8.FORMAT(): _args(8, "float", "group", **MX),
}
INPUTS: dict[Format, dict[str, Any]] = {
    fp8.FORMAT(per="tensor"): _args(8, "float", "tensor"),
    fp8.FORMAT(per="token"): _args(8, "float", "token", True),
    fp8.FORMAT(per="block"): _args(8, "float", "group", True, group_size=128),
    int8.FORMAT(per="tensor"): _args(8, "int", "tensor"),
    int8.FORMAT(per="token"): _args(8, "int", "token", True),
    nvfp4.FORMAT(): _args(4, "float", "tensor_group", "local", **NV),
    mxfp4.FORMAT(): _args(4, "float", "group", True, **MX),
    mxfp8.FORMAT(): _args(8, "float", "group", True, **MX),
}
FP8 = fp8.FORMAT(per="tensor")
CACHES = {"fp8": INPUTS[FP8], "fp8 per head": _args(8, "float", "attn_head")}  # kind -> kv_cache_scheme
CACHE_LOADS = {"fp8": ("vllm", "sglang", "trtllm", "transformers"), "fp8 per head": ("vllm", "transformers")}


def check(scheme: Scheme, target: str, dtype: Any = None, experts: bool = False) -> str | None:
    """Why `target` (vllm, sglang, trtllm, transformers) cannot load this scheme in this dialect, or None.

    Args:
      dtype: of the checkpoint, where it is known.
      experts: of a mixture of experts.
    """
    if reason := rotation_refusal(DIALECT, scheme, target, ROTATES) or (
        experts_refusal(DIALECT, scheme, target, EXPERTS) if experts else None
    ):
        return reason
    if reason := adapter.refusal(target, scheme.rank):
        return reason
    if scheme.hadamard and experts:
        return f"{target} does not rotate the inputs of experts; give them hadamard: none"
    if scheme.hadamard > LARGEST and not power_of_two(scheme.hadamard):
        return (
            f"hadamard: {scheme.hadamard} is no power of two, and {target} would read and multiply by the "
            f"whole matrix; use a block of at most {LARGEST} channels, or a power of two"
        )
    narrow = scheme.weights.name in ("nvfp4", "mxfp4", "mxfp8")
    if target == "transformers" and narrow and dtype is not None and dtype != ml_dtypes.bfloat16:
        return (
            f"transformers decodes {scheme.weights.name} to bfloat16, and this checkpoint is "
            f"{np.dtype(dtype).name}: its forward would fail; convert the source to bfloat16, or use int8"
        )
    group = getattr(scheme.weights, "group", 128)
    if scheme.inputs and scheme.weights.name == "int4" and target == "vllm" and group != 128:
        return f"vllm runs int4 weights with fp8 inputs only for groups of 128, not {group}; use group: 128"
    return refusal(DIALECT, scheme, target, LOADS, REASONS)


def check_cache(cache: Cache, target: str, encodes: bool = True) -> str | None:
    """Why `target` cannot load a key/value cache in this dialect, or None.

    Args:
      encodes: whether weights are encoded too.
    """
    beside = "--format=modelopt --target=vllm, beside encoded weights (extends: [nvfp4, nvfp4_kv])"
    return cache_refusal(DIALECT, cache, target, CACHE_LOADS, {"nvfp4": beside})


def storage(scheme: Scheme) -> str:
    """The name of the dialect's arrangement of a scheme's tensors: `float-quantized`, ..."""
    with_inputs = {"fp8": "float-quantized", "int8": "int-quantized"}
    alone = {"fp8": "naive-quantized", "int8": "pack-quantized"}
    either = {
        "int4": "pack-quantized",
        "nvfp4": "nvfp4-pack-quantized",
        "mxfp4": "mxfp4-pack-quantized",
        "mxfp8": "mxfp8-quantized",
    }
    return (either | (with_inputs if scheme.inputs else alone))[scheme.weights.name]


def weight_args(format: Format) -> dict[str, Any]:
    """The `weights` entry of a config group.

    Raises:
      InputError: a format that this dialect does not have.
    """
    if isinstance(format, int4.FORMAT):
        args = _args(4, "int", "group", group_size=format.group)
        return args if format.symmetric else args | {"symmetric": False, "zp_dtype": "torch.int8"}
    return _known(WEIGHTS, format, "weights")


def _known(table: dict[Format, dict[str, Any]], format: Format, what: str) -> dict[str, Any]:
    known = plain(format)
    if known not in table:
        raise InputError(f"{format.label} {what} have no form in the {DIALECT} dialect; use another recipe")
    return table[known]


def config(
    schemes: Mapping[str, Scheme], ignore: Sequence[str], cache: Cache | None
) -> dict[str, dict[str, Any]]:
    """`{"quantization_config": ...}` for config.json.

    Args:
      schemes: of every encoded module. One scheme: a group for every "Linear"; several: groups by full names.
      ignore: full names of the Linear modules that are not encoded.
      cache: fp8 per tensor or per head, or None.
    Raises:
      InputError: a format or a cache that this dialect does not have.
    """
    members: dict[Scheme, list[str]] = {}
    for module, scheme in schemes.items():
        members.setdefault(plain_scheme(scheme)._replace(hadamard=0, rank=0), []).append(module)
    groups = {}
    for number, (scheme, modules) in enumerate(members.items()):
        group = {"targets": ["Linear"] if len(members) == 1 else modules, "format": storage(scheme)}
        group["weights"] = weight_args(scheme.weights)
        if scheme.inputs:
            group["input_activations"] = _known(INPUTS, scheme.inputs, "inputs")
        groups[f"group_{number}"] = group
    storages = {group["format"] for group in groups.values()}
    written = {
        "quant_method": DIALECT,
        "version": VERSION,
        "quantization_status": "compressed",
        "format": storages.pop() if len(storages) == 1 else "mixed-precision" if storages else "dense",
        "config_groups": groups,
        "ignore": list(ignore),
    }
    if cache:
        if cache_kind(cache) not in CACHES:
            raise InputError(f"a key/value cache kept as {cache.label} has no form in {DIALECT}; use fp8")
        written["kv_cache_scheme"] = CACHES[cache_kind(cache)]
    if rotations := rotation.config({m: s.hadamard for m, s in schemes.items()}, ignore):
        written["transform_config"] = rotations
    return {"quantization_config": written}


def parse(config: dict[str, Any], extra: dict[str, Any] | None, modules: Sequence[str]) -> Parsed:
    """What config.json says about the Linear `modules` of a file; `extra` is not used.

    A group's exact names and regular expressions win over the class name "Linear", as in vLLM.

    Raises:
      InputError: anything that cannot be read exactly; names the key and the value.
    """
    found = section(config)
    _refuse(found)
    groups = [_group(name, group, found) for name, group in found.get("config_groups", {}).items()]
    rotations = rotation.parse(found.get("transform_config"))
    listed = list(found.get("ignore") or [])
    schemes = {}
    for module in modules:
        named = (s for targets, s in groups if any(matches(module, t) for t in targets if t != "Linear"))
        by_class = (s for targets, s in groups if "Linear" in targets)
        kept = any(matches(module, entry) for entry in listed)
        scheme = None if kept else next(named, None) or next(by_class, None)
        if scheme:
            schemes[module] = scheme._replace(hadamard=rotations(module))
        elif rotations(module):
            raise InputError(
                f"quantization_config.transform_config: rotates the input of {module}, which is not encoded; "
                "such linears are not read"
            )
    names = [entry for entry in listed if not entry.startswith("re:")]
    ignore = dict.fromkeys([*names, *(m for m in modules if m not in schemes)])
    cache = None
    if found.get("kv_cache_scheme"):
        cache = _cache(found["kv_cache_scheme"])
    return Parsed(schemes, cache, tuple(ignore))


def _cache(args: dict[str, Any]) -> Cache:
    head = args.get("strategy") == "attn_head"
    known: dict[Format, dict[str, Any]] = {FP8: CACHES["fp8 per head" if head else "fp8"]}
    format = _format(args, known, "kv_cache_scheme")
    return Cache(format, format, per="head" if head else "tensor")


def _refuse(found: dict[str, Any]) -> None:
    status = found.get("quantization_status")
    if status not in (None, "compressed"):
        raise InputError(f"quantization_config.quantization_status is {status!r}; only 'compressed' is read")
    sparsity = found.get("sparsity_config") or {}
    if sparsity.get("targets") or sparsity.get("format") not in (None, "dense"):
        raise InputError(
            f"quantization_config.sparsity_config is {sparsity!r}: compressed sparse weights are not read (no"
            " current server loads them either); use the dense checkpoint"
        )


def _group(name: str, group: Any, found: dict[str, Any]) -> tuple[list[str], Scheme]:
    where = f"quantization_config.config_groups.{name}"
    if not isinstance(group, dict) or not group.get("weights"):
        raise InputError(f"{where} is {group!r}; only groups with a `weights` entry can be read")
    if group.get("output_activations"):
        outputs = group["output_activations"]
        raise InputError(f"{where}.output_activations is {outputs!r}; quantized outputs are not read")
    args = _settings(group["weights"], f"{where}.weights")
    table: dict[Format, dict[str, Any]] = WEIGHTS
    if (args["type"], args["num_bits"], args["strategy"]) == ("int", 4, "group"):
        grouped: Format = int4.FORMAT(group=args["group_size"], symmetric=args["symmetric"])
        table = {grouped: weight_args(grouped)}
    weights = _format(group["weights"], table, f"{where}.weights")
    inputs = None
    if group.get("input_activations"):
        inputs = _format(group["input_activations"], INPUTS, f"{where}.input_activations")
    scheme = Scheme(weights, inputs)
    written = group.get("format") or found.get("format")
    same = {"naive-quantized": ("float-quantized", "int-quantized"), "float-quantized": ("naive-quantized",)}
    accepted = (storage(scheme), *same.get(storage(scheme), ()), None)
    if storage(scheme) in ("float-quantized", "int-quantized"):
        accepted += ("naive-quantized",)
    if written not in (*accepted, "mixed-precision"):
        raise InputError(f"{where}.format is {written!r}; {label(scheme)} are {storage(scheme)!r}")
    return list(group.get("targets") or []), scheme


def _settings(args: dict[str, Any], where: str) -> dict[str, Any]:
    """The entries that decide how numbers are stored, with the dialect's defaults."""
    if args.get("actorder") in ("group", "dynamic", True):
        raise InputError(
            f"{where}.actorder is {args['actorder']!r}: columns reordered at run time (g_idx) are not read"
            " (removed from compressed-tensors as well); quantize again with actorder 'static'"
        )
    size = args.get("group_size")
    guess = "tensor" if size is None else "channel" if size == -1 else "group"
    settings = {
        "num_bits": args.get("num_bits", 8),
        "type": str(args.get("type") or "int").lower(),
        "symmetric": args.get("symmetric", True),
        "strategy": str(args.get("strategy") or guess).lower(),
        "dynamic": args.get("dynamic") or False,
    }
    if size not in (None, -1):
        settings["group_size"] = size
    if args.get("block_structure"):
        settings["block_structure"] = list(args["block_structure"])
    return settings


def _format(args: dict[str, Any], table: dict[Format, dict[str, Any]], where: str) -> Format:
    settings = _settings(args, where)
    best: dict[str, Any] = {}
    for format, known in table.items():
        wanted = _settings(known, where)
        differ = {k: settings.get(k) for k in settings | wanted if settings.get(k) != wanted.get(k)}
        if not differ and args.get("scale_dtype") in (None, known.get("scale_dtype")):
            known_format = as_read(format, ARITHMETIC)
            assert known_format is not None
            return known_format
        if not best or len(differ) < len(best):
            best = differ or {"scale_dtype": args["scale_dtype"]}
    keys = ", ".join(f"{where}.{key} is {value!r}" for key, value in best.items())
    raise InputError(f"{keys}: mojax does not read {settings}; start from the unquantized checkpoint")
