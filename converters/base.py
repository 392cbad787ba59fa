"""What the dialects share: which one a folder speaks, and small checks on tensors and scales.

A dialect is a file here that says how one family of servers names and stores encoded tensors:

  DIALECT, ARITHMETIC, WRITES, METHODS    its name, whose rounding, whether we write it, its `quant_method`s
  SUFFIXES                                endings of tensors that exist only beside an encoded module
  parse, read, read_cache                 config.json and tensors -> schemes, QTensors, calibrated maxima
  check, check_cache, config, layout, write, write_cache     the way back
  branch                                  names of the two tensors of a low-rank branch, if there can be one
  ADAPTER                                 the file that says how they lie in a LoRA adapter, where they do:
                                          PREFIX of their names, FOLDER, CONFIG, TENSORS, settings, NOTE
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Collection, Mapping
from types import ModuleType
from typing import Any, NamedTuple

import jax
import numpy as np

from mojax import find
from mojax.beside import dtype_of
from mojax.cache import Cache
from mojax.errors import InputError, nearest
from mojax.formats import fp8
from mojax.formats.base import Arithmetic, Format, Scheme

Get = Callable[[str], np.ndarray]

TARGETS = ("vllm", "sglang", "trtllm", "transformers")


class Parsed(NamedTuple):
    """What a quantization config says about the modules of a file.

    Attributes:
      schemes: of every encoded module.
      cache: how the key/value cache is kept; None: as it is.
      ignore: full names of Linear modules that are as they were (also ones without a tensor of their own).
    """

    schemes: dict[str, Scheme]
    cache: Cache | None
    ignore: tuple[str, ...]


def section(config: Mapping[str, Any]) -> dict[str, Any]:
    """The quantization section of a config.json; empty when there is none.

    Raises:
      InputError: it is not a JSON object.
    """
    found = config.get("quantization_config") or config.get("compression_config") or {}
    if not isinstance(found, dict):
        raise InputError(f"config.json: quantization_config is {found!r:.80}, needed an object")
    return found


def dialect(config: Mapping[str, Any], files: Collection[str]) -> ModuleType | None:
    """The converter for a folder, or None when it is not quantized.

    Args:
      config: config.json.
      files: names of the folder's files; `hf_quant_config.json` alone makes it ModelOpt's.
    Raises:
      InputError: quantized by a method that no converter reads.
    """
    found = section(config)
    method = found.get("quant_method")
    if method is None:
        if "hf_quant_config.json" in files:
            method = "modelopt"
        elif "config_groups" in found:
            method = "compressed-tensors"
        elif not found:
            return None
    methods = {}
    for name in find.names("converters"):
        module = find.find("converters", name)
        methods |= dict.fromkeys(module.METHODS, module)
    if method not in methods:
        raise InputError(
            f"config.json: the source is quantized with quant_method {method!r}, which mojax does not read"
            f"{nearest(str(method), methods)}; start from the unquantized checkpoint"
        )
    return methods[method]


def varies(dialect: ModuleType) -> tuple[str, ...]:
    """Endings of tensors whose size or dtype is the writer's choice."""
    return getattr(dialect, "VARIES", ())


def plain(format: Format | None) -> Format | None:
    """The format without what converters set, to compare what it is."""
    return format and dataclasses.replace(format, arithmetic="float32", as_read=False)


def plain_scheme(scheme: Scheme) -> Scheme:
    """The scheme with `plain` formats."""
    return scheme._replace(weights=plain(scheme.weights) or scheme.weights, inputs=plain(scheme.inputs))


def as_read(format: Format | None, arithmetic: Arithmetic) -> Format | None:
    """The format as a reader of a dialect returns it."""
    return format and dataclasses.replace(format, arithmetic=arithmetic, as_read=True)


def kind(format: Format | None) -> str:
    """`fp8 channel`, `int4 asymmetric`, `nvfp4`, `none`: what servers tell apart."""
    if format is None:
        return "none"
    if getattr(format, "symmetric", True) is False:
        return f"{format.name} asymmetric"
    return " ".join(str(p) for p in (format.name, getattr(format, "per", None)) if p)


def label(scheme: Scheme) -> str:
    """`fp8 channel weights with fp8 token inputs`: a scheme in a message."""
    inputs = f" with {kind(scheme.inputs)} inputs" if scheme.inputs else " with inputs as they are"
    turned = f" rotated by hadamard {scheme.hadamard}" if scheme.hadamard else ""
    beside = f" beside a branch of rank {scheme.rank}" if scheme.rank else ""
    return f"{kind(scheme.weights)} weights{inputs}{turned}{beside}"


def rotation_refusal(dialect: str, scheme: Scheme, target: str, able: Collection[str] = ()) -> str | None:
    """Why `target` cannot run linears whose inputs are rotated; None when it can, or there is no rotation.

    Args:
      able: targets that can; empty for a dialect that has no word for it.
    """
    if not scheme.hadamard or target in able:
        return None
    why = "ignores rotations and would compute nonsense" if able else "cannot be told of them"
    use = "--target=vllm" if able else "--format=compressed-tensors --target=vllm"
    return (
        f"{target} cannot load {label(scheme)} in the {dialect} dialect: it {why} there; use {use}, or leave "
        "out hadamard"
    )


def refusal(
    dialect: str,
    scheme: Scheme,
    target: str,
    loads: Mapping[tuple[str, str], Collection[str]],
    reasons: Mapping[tuple[str, str, str], str],
) -> str | None:
    """Why `target` cannot load a scheme, from a dialect's table of who loads what; None when it can.

    Args:
      loads: (kind of weights, kind of inputs) -> targets.
      reasons: (kind of weights, kind of inputs, target) -> "why; what to use", where more can be said.
    Raises:
      InputError: an unknown target.
    """
    if target not in TARGETS:
        raise InputError(f"--target={target} is not a server that mojax knows{nearest(target, TARGETS)}")
    pair = (kind(scheme.weights), kind(scheme.inputs))
    able = loads.get(pair, ())
    if target in able:
        return None
    others = " or ".join(f"--target={name}" for name in TARGETS if name in able)
    reason = reasons.get((*pair, target)) or (
        f"it has no loader for this pair; use {others or 'another recipe: no server loads it so'}"
    )
    return f"{target} cannot load {label(scheme)} in the {dialect} dialect: {reason}"


def branch_layout(
    names: tuple[str, str], shape: tuple[int, ...], dtype: Any, scheme: Scheme
) -> dict[str, jax.ShapeDtypeStruct]:
    """The two tensors of the branch beside a weight `[out, in]`: A `[r, in]`, B `[out, r]`; or none."""
    shapes = ((scheme.rank, shape[1]), (shape[0], scheme.rank))
    kept = dtype_of(dtype)
    return {n: jax.ShapeDtypeStruct(s, kept) for n, s in zip(names, shapes, strict=True) if scheme.rank}


def cache_kind(cache: Cache) -> str:
    """`fp8`, `fp8 per head`, `nvfp4`: what servers tell apart; those of none have a longer name."""
    return dataclasses.replace(cache, cast=False).label


def cache_refusal(
    dialect: str, cache: Cache, target: str, loads: Mapping[str, Collection[str]], others: Mapping[str, str]
) -> str | None:
    """Why `target` cannot load a cache, from a dialect's table of who loads what; None when it can.

    Args:
      loads: kind of cache -> targets.
      others: kind of cache -> what to use instead, where another dialect can say it.
    Raises:
      InputError: an unknown target.
    """
    if target not in TARGETS:
        raise InputError(f"--target={target} is not a server that mojax knows{nearest(target, TARGETS)}")
    found = cache_kind(cache)
    able = loads.get(found, ())
    if target in able:
        return None
    instead = " or ".join(f"--target={name}" for name in TARGETS if name in able) or others.get(found)
    reason = f"use {instead}" if instead else NO_SERVER[_odd(cache)]
    said = f"{target} cannot load a key/value cache kept as {cache.label} in the {dialect} dialect"
    return f"{said}: {reason}"


# Why no checkpoint can ask for it, by what is odd about a cache.
NO_SERVER = {
    "attention": "no checkpoint can ask for it, servers choose what attention multiplies when they start",
    "skip": "no checkpoint can name layers to leave out; remove skip_first and skip_last, and tell vLLM when"
    " it starts: --kv-cache-dtype-skip-layers",
    "affine": "no server takes the means off; leave out affine",
    "rotate": "no server rotates queries and keys when it runs; leave out rotate",
    "kinds": "servers have one format for keys and values, fp8 or nvfp4",
}


def _odd(cache: Cache) -> str:
    found = {
        "attention": cache.attention,
        "skip": bool(cache.skip_first or cache.skip_last),
        "affine": cache.affine,
        "rotate": cache.rotate,
    }
    return next((name for name, odd in found.items() if odd), "kinds")


def cache_scales(names: Collection[str], maxima: Collection[Any], arithmetic: Arithmetic, dtype: Any):
    """By name maximum / 448, float32 `[]` or per head `[kv_heads]`; for NVFP4 too, as ModelOpt has it."""
    format = fp8.FORMAT(per="tensor", arithmetic=arithmetic)
    tops = (np.asarray(top, np.float32) for top in maxima)
    return {n: np.asarray(format.outer(t, np.dtype(dtype))) for n, t in zip(names, tops, strict=True)}


def cache_maxima(scales: Collection[np.ndarray], arithmetic: Arithmetic) -> tuple[np.ndarray, ...]:
    """The maxima of keys and values whose scales, `[]`, `[1]` or `[kv_heads, 1, 1]`, a file holds."""
    format = fp8.FORMAT(per="tensor", arithmetic=arithmetic, as_read=True)
    found = []
    for scale in scales:
        tops = np.array([amax_of(format, s) for s in scale.astype(np.float32).reshape(-1)], np.float32)
        found.append(tops if scale.ndim == 3 or tops.size > 1 else tops.reshape(()))
    return tuple(found)


def experts_refusal(
    dialect: str, scheme: Scheme, target: str, reasons: Mapping[tuple[str, str, str], str]
) -> str | None:
    """Why `target` cannot load experts of a scheme whose other linears it loads, from a dialect's table.

    Args:
      reasons: (kind of weights, kind of inputs, target) -> "why; what to use".
    """
    reason = reasons.get((kind(scheme.weights), kind(scheme.inputs), target))
    return reason and f"{target} cannot load experts of {label(scheme)} in the {dialect} dialect: {reason}"


def narrow(name: str, values: np.ndarray, dtype: Any) -> np.ndarray:
    """`values` in `dtype`.

    Raises:
      InputError: some value does not fit exactly; a server would round it.
    """
    if values.dtype == dtype:
        return values
    with np.errstate(over="ignore"):
        narrowed = values.astype(dtype)
    wrong = np.count_nonzero(narrowed.astype(np.float32) != values.astype(np.float32))
    if wrong:
        raise InputError(
            f"{name}: {wrong} of {values.size} scales are {values.dtype} values that {np.dtype(dtype)}"
            " cannot hold exactly, and servers would round them;"
            " quantize the unquantized source to this dialect instead"
        )
    return narrowed


def expect(name: str, get: Get, dtypes: tuple[Any, ...], shape: tuple[int, ...] | None = None) -> np.ndarray:
    """The tensor `name`, in `shape`; axes of length 1 may differ, since writers do not agree on them.

    Raises:
      InputError: it is missing, or has another dtype or another shape.
    """
    advice = "; if the module is not encoded, add it to the config's list of ignored modules"
    try:
        array = get(name)
    except KeyError:
        raise InputError(f"{name} is missing, the config says it is encoded{advice}") from None
    if array.dtype not in dtypes:
        wanted = " or ".join(str(np.dtype(d)) for d in dtypes)
        raise InputError(f"{name} is {array.dtype}, the config says {wanted}{advice}")
    if shape is None:
        return array
    if [n for n in array.shape if n != 1] != [n for n in shape if n != 1]:
        raise InputError(
            f"{name} has shape {list(array.shape)}, its scheme needs {list(shape)}; the file is damaged"
        )
    return array.reshape(shape)


def outer_as(outer: np.ndarray, have: Arithmetic, want: Arithmetic) -> np.ndarray:
    """NVFP4's outer scale in the other dialect's direction: divisor 2688/amax <-> multiplier amax/2688.

    A zero multiplier (a tensor of zeros) becomes the divisor 1, as compressed-tensors writes it.
    """
    if have == want:
        return outer
    return np.float32(1) / outer if outer != 0 else np.ones_like(outer)


# A static input's maximum over its outer scale; "checkpoint" halves an int8 range of 255 steps.
RANGES = {
    ("fp8", "checkpoint"): 448.0,
    ("fp8", "float32"): 448.0,
    ("int8", "checkpoint"): 127.5,
    ("int8", "float32"): 127.0,
    ("nvfp4", "checkpoint"): 2688.0,
    ("nvfp4", "float32"): 2688.0,
}


def amax_of(format: Format, outer: Any) -> np.float32:
    """The maximum whose outer scale is `outer`: the inverse of `format.outer` with as_read, float32.

    The inverse of a rounded quotient can be some units off, so the neighbours are tried as well.
    """
    scale = np.float32(outer)
    if scale == 0:
        return scale
    largest = np.float32(RANGES[format.name, format.arithmetic])
    divides = (format.name, format.arithmetic) == ("nvfp4", "checkpoint")
    guess = np.asarray(largest / scale if divides else scale * largest, np.float32)
    near = (guess.view(np.int32) + np.array([0, -1, 1, -2, 2], np.int32)).view(np.float32)
    found = np.float32(1) / near * largest if divides else near / largest  # as format.outer rounds
    return np.float32(near[np.argmin(np.abs(found - scale))])


def static_outer(format: Format, module: str, amax: Any, dtype: Any) -> np.ndarray:
    """The outer scale of a static input, float32 `[]`.

    Raises:
      InputError: no maximum was calibrated.
    """
    if amax is None:
        raise InputError(
            f"{module}.input_scale: {kind(format)} inputs need a maximum from calibration and there is none;"
            " calibrate, or use a recipe with dynamic inputs"
        )
    top = np.asarray(amax, np.float32).reshape(())
    if format.as_read and top == 0:
        return top
    return np.asarray(format.outer(top, np.dtype(dtype)), np.float32).reshape(())


def nibbles(codes: np.ndarray) -> np.ndarray:
    """uint8 `[..., k / 2]`, low nibble first -> uint8 `[..., k]` in 0..15."""
    return np.stack([codes & 15, codes >> 4], -1).reshape(*codes.shape[:-1], -1)


def bytes_of(nibbles: np.ndarray) -> np.ndarray:
    """uint8 `[..., k]` in 0..15 -> uint8 `[..., k / 2]`, low nibble first."""
    return nibbles[..., 0::2] | nibbles[..., 1::2] << 4
