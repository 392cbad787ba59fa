"""The bitsandbytes dialect: 4-bit NF4 as transformers stores and loads it (QLoRA's base models).

  weight                               uint8 [out * in / 2, 1]: codes by rows, the first in the high nibble
  weight.absmax                        float32 [out * in / 64], the scales in the same order
  weight.quant_map                     float32 [16], the book
  weight.quant_state.bitsandbytes__nf4 uint8: JSON with the shape, the dtype and the size of a block

Nested ("double quantized") scales are read exactly: absmax = nested_quant_map[code] * nested_absmax + offset.
They are not written, since their blocks of 256 and their mean run across rows.
Specification: bitsandbytes 0.50.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from typing import Any

import jax
import numpy as np

from mojax.cache import Cache
from mojax.converters.base import (
    Get,
    Parsed,
    as_read,
    bytes_of,
    expect,
    label,
    nibbles,
    plain,
    plain_scheme,
    refusal,
    rotation_refusal,
    section,
)
from mojax.errors import InputError
from mojax.formats import nf4
from mojax.formats.base import Arithmetic, QTensor, Scheme

DIALECT = "bitsandbytes"
ARITHMETIC: Arithmetic = "float32"
WRITES = True
METHODS = (DIALECT,)
LISTS_EMBEDDINGS = False
STATE = ".quant_state.bitsandbytes__nf4"
SUFFIXES = tuple(
    ".weight" + end for end in (".absmax", ".quant_map", ".nested_absmax", ".nested_quant_map", STATE)
)

VARIES = (STATE, ".absmax")  # tensors whose size or dtype is the writer's choice

U8, F32 = np.dtype(np.uint8), np.dtype(np.float32)
FORMAT = nf4.FORMAT()
LOADS = {("nf4", "none"): ("transformers",)}
ALONE = "only transformers has been tried with it; use --target=transformers"
NO_CACHE = "bitsandbytes keeps weights only; use kv_cache: none"
REASONS = {("nf4", "none", target): ALONE for target in ("vllm", "sglang", "trtllm")}


def check(scheme: Scheme, target: str, dtype: Any = None, experts: bool = False) -> str | None:
    """Why `target` cannot load this scheme in this dialect, or None.

    Args:
      dtype: of the checkpoint, where it is known.
      experts: of a mixture of experts.
    """
    if reason := rotation_refusal(DIALECT, scheme, target):
        return reason
    if scheme.rank:
        return (
            f"{target} cannot load {label(scheme)} in the {DIALECT} dialect, which has no word for a "
            "branch; use --format=compressed-tensors"
        )
    if scheme.weights.name == "nf4" and plain(scheme.weights) != FORMAT:
        return f"{scheme.weights.label}: {_only_flat()}"
    if experts and scheme.weights.name == "nf4":
        return (
            f"{target} cannot load experts of {label(scheme)} in the {DIALECT} dialect: they are no Linear "
            "modules there; keep them, or use --recipe=nvfp4_weight_only"
        )
    return refusal(DIALECT, scheme, target, LOADS, REASONS)


def check_cache(cache: Cache, target: str, encodes: bool = True) -> str:
    """Why `target` cannot load a key/value cache in this dialect, which has none.

    Args:
      encodes: whether weights are encoded too; makes no difference.
    """
    return (
        f"{target} cannot load a key/value cache kept as {cache.label} in the {DIALECT} dialect: {NO_CACHE}"
    )


def _only_flat() -> str:
    return (
        f"the {DIALECT} dialect has blocks of 64 here, and its doubly quantized scales run across rows; use "
        "{format: nf4}, or double: true in Python only"
    )


def config(
    schemes: Mapping[str, Scheme], ignore: Sequence[str], cache: Cache | None
) -> dict[str, dict[str, Any]]:
    """`{"quantization_config": ...}` for config.json.

    Args:
      schemes: of every encoded module.
      ignore: full names of the Linear modules that are not encoded.
      cache: None; this dialect has none.
    Raises:
      InputError: anything else than NF4 in blocks of 64 with inputs as they are.
    """
    if cache:
        raise InputError(f"a key/value cache kept as {cache.label} has no form in {DIALECT}; {NO_CACHE}")
    odd = next((s for s in schemes.values() if plain_scheme(s) != Scheme(FORMAT)), None)
    if odd is not None:
        raise InputError(f"{label(odd)} have no form in the {DIALECT} dialect; use another --format")
    return {
        "quantization_config": {
            "quant_method": DIALECT,
            "load_in_4bit": True,
            "load_in_8bit": False,
            "bnb_4bit_quant_type": "nf4",
            "bnb_4bit_use_double_quant": False,
            "bnb_4bit_compute_dtype": "bfloat16",
            "bnb_4bit_quant_storage": "uint8",
            "llm_int8_skip_modules": list(ignore),
        }
    }


def parse(config: dict[str, Any], extra: dict[str, Any] | None, modules: Sequence[str]) -> Parsed:
    """What config.json says about the Linear `modules` of a file; `extra` is not used.

    `lm_head` is never encoded. Entries of `llm_int8_skip_modules` match as in transformers: from the start,
    as a regular expression, or as an ending.

    Raises:
      InputError: not 4-bit NF4.
    """
    found = section(config)
    if not found.get("load_in_4bit") or found.get("bnb_4bit_quant_type") != "nf4":
        raise InputError(
            f"quantization_config: load_in_4bit is {found.get('load_in_4bit')!r}, bnb_4bit_quant_type "
            f"{found.get('bnb_4bit_quant_type')!r}; only 4-bit nf4 is read; start from "
            "the unquantized checkpoint"
        )
    format = as_read(FORMAT, ARITHMETIC)
    assert format is not None
    listed = [*(found.get("llm_int8_skip_modules") or ()), "lm_head"]
    schemes = {
        m: Scheme(format)
        for m in modules
        if not any(m.endswith(entry) or re.match(entry, m) for entry in listed)
    }
    return Parsed(schemes, None, tuple(dict.fromkeys([*listed, *(m for m in modules if m not in schemes)])))


def _state(shape: tuple[int, ...], dtype: Any) -> np.ndarray:
    """The JSON of an encoded weight as bytes."""
    said = {
        "quant_type": "nf4",
        "blocksize": FORMAT.group,
        "dtype": np.dtype(dtype).name,
        "shape": list(shape),
    }
    return np.frombuffer(json.dumps(said).encode(), np.uint8)


def layout(
    module: str, shape: tuple[int, ...], dtype: Any, scheme: Scheme
) -> dict[str, jax.ShapeDtypeStruct]:
    """The names, shapes and dtypes of what `write` gives for a weight `[out, in]` of dtype `dtype`."""
    size = int(np.prod(shape))
    tensors = {
        "": ((size // 2, 1), U8),
        ".absmax": ((size // FORMAT.group,), F32),
        ".quant_map": ((16,), F32),
        STATE: (_state(shape, dtype).shape, U8),
    }
    return {f"{module}.weight{end}": jax.ShapeDtypeStruct(s, d) for end, (s, d) in tensors.items()}


def write(module: str, q: QTensor, scheme: Scheme, amax: Any) -> dict[str, np.ndarray]:
    """The tensors of one encoded Linear.

    Args:
      module: full name, without `.weight`.
      q: the encoded weight; `scheme.weights` is `q.format`.
      amax: not used; inputs are as they are.
    Raises:
      InputError: another format than NF4 in blocks of 64.
    """
    if plain(q.format) != FORMAT:
        raise InputError(f"{module}: {q.format.label}: {_only_flat()}")
    codes = nibbles(np.asarray(q.codes)).reshape(-1, 2)[:, ::-1]
    return {
        f"{module}.weight": bytes_of(np.ascontiguousarray(codes)),
        f"{module}.weight.absmax": np.asarray(q.scales["inner"]).reshape(-1),
        f"{module}.weight.quant_map": nf4.BOOK,
        f"{module}.weight{STATE}": _state(q.shape, q.dtype),
    }


def read(module: str, get: Get, scheme: Scheme, dtype: Any) -> tuple[QTensor, None]:
    """An encoded Linear of a file; nested scales are decoded.

    Args:
      module: full name, without `.weight`.
      get: tensor name -> array.
      scheme: from `parse`.
      dtype: of the checkpoint's other tensors.
    Raises:
      InputError: a tensor of another dtype or shape than its own description says, or another book.
    """
    name = f"{module}.weight"
    state = _described(name, expect(name + STATE, get, (U8,)))
    n, k = state["shape"]
    packed = expect(name, get, (U8,), (n * k // 2, 1))
    book = expect(name + ".quant_map", get, (F32,), (16,))
    if not np.array_equal(book, nf4.BOOK):
        raise InputError(f"{name}.quant_map: is not the book of NF4; start from the unquantized checkpoint")
    codes = bytes_of(np.ascontiguousarray(nibbles(packed.reshape(n, k // 2)).reshape(n, -1, 2)[..., ::-1]))
    inner = _absmax(name, get, state, n * k // FORMAT.group).reshape(n, k // FORMAT.group)
    return QTensor(codes.reshape(n, k // 2), {"inner": inner}, scheme.weights, (n, k), np.dtype(dtype)), None


def _described(name: str, raw: np.ndarray) -> dict[str, Any]:
    """The description of a weight, checked."""
    try:
        state = json.loads(raw.tobytes())
        n, k = (int(v) for v in state["shape"])
    except (ValueError, KeyError, TypeError) as error:
        raise InputError(
            f"{name}{STATE}: is not a description of a matrix ({error}); the file is damaged"
        ) from error
    if state.get("quant_type") != "nf4" or state.get("blocksize") != FORMAT.group or k % FORMAT.group:
        raise InputError(
            f"{name}{STATE}: {state!r}; only nf4 in blocks of {FORMAT.group} that end with their rows "
            "is read; start from the unquantized checkpoint"
        )
    return state | {"shape": (n, k)}


def _absmax(name: str, get: Get, state: Mapping[str, Any], count: int) -> np.ndarray:
    """The scales, float32 `[count]`."""
    if "nested_blocksize" not in state:
        return expect(name + ".absmax", get, (F32,), (count,))
    size = int(state["nested_blocksize"])
    codes = expect(name + ".absmax", get, (U8,), (count,))
    book = expect(name + ".nested_quant_map", get, (F32,), (256,))
    second = expect(name + ".nested_absmax", get, (F32,), (-(-count // size),))
    return book[codes] * np.repeat(second, size)[:count] + np.float32(state["nested_offset"])


def cache_names(attention: str) -> tuple[str, str]:
    """The names that scales of K and V would have; this dialect has none."""
    return f"{attention}.k_scale", f"{attention}.v_scale"


def write_cache(attention: str, k_amax: Any, v_amax: Any, dtype: Any) -> dict[str, np.ndarray]:
    """Nothing: `config` refuses a cache."""
    return {}


def read_cache(attention: str, get: Get) -> tuple[np.float32, np.float32]:
    """Raises InputError: this dialect has no KV cache."""
    raise InputError(f"{attention}: the {DIALECT} dialect has no KV cache")
