"""Hugging Face's native FP8 checkpoints (DeepSeek's 128 x 128 blocks, MXFP8's groups of 32): read only.

weight = float8_e4m3fn code * weight_scale_inv of its block: a multiplier in spite of its name, float32 or a
power of two (float8_e8m0fnu, or uint8 exponent + 127). Inputs are quantized at run time, in the same blocks.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import Any

import jax
import ml_dtypes
import numpy as np

from mojax.converters.base import Get, Parsed, as_read, expect, section
from mojax.errors import InputError
from mojax.formats import fp8, mxfp8
from mojax.formats.base import Arithmetic, Format, QTensor, Scheme

DIALECT = "fp8"
ARITHMETIC: Arithmetic = "float32"
WRITES = False
METHODS = ("fp8", "mxfp8")
SUFFIXES = (".weight_scale_inv",)

E4M3 = np.dtype(ml_dtypes.float8_e4m3fn)
E8M0 = np.dtype(ml_dtypes.float8_e8m0fnu)
FLOATS = (np.dtype(np.float32), np.dtype(ml_dtypes.bfloat16))

BLOCKS: dict[tuple[int, ...], Format] = {(128, 128): fp8.FORMAT(per="block"), (1, 32): mxfp8.FORMAT()}


def check(scheme: Scheme, target: str) -> str:
    """Why this dialect cannot be written."""
    return f"the {DIALECT} dialect is read, not written; use --format=compressed-tensors or --format=modelopt"


def parse(config: dict[str, Any], extra: dict[str, Any] | None, modules: Sequence[str]) -> Parsed:
    """What config.json says about the Linear `modules` of a file; `extra` is not used.

    `lm_head` is never encoded. The other names in `modules_to_not_convert` match as in transformers: from the
    start or as a regular expression up to a dot, or as an ending.

    Raises:
      InputError: anything else than dynamic inputs and blocks of [128, 128] or [1, 32].
    """
    found = section(config)
    block = tuple(found.get("weight_block_size") or ())
    if block not in BLOCKS:
        raise InputError(
            f"quantization_config.weight_block_size is {found.get('weight_block_size')!r}; only [128, 128]"
            " and [1, 32] are read; start from the unquantized checkpoint"
        )
    if found.get("activation_scheme", "dynamic") != "dynamic":
        raise InputError(
            f"quantization_config.activation_scheme is {found['activation_scheme']!r}; only 'dynamic' is"
            " read; start from the unquantized checkpoint"
        )
    format = as_read(BLOCKS[block], ARITHMETIC)
    assert format is not None
    listed = [*(found.get("modules_to_not_convert") or ()), *(found.get("ignored_layers") or ()), "lm_head"]
    schemes = {m: Scheme(format, format) for m in modules if not any(_matches(m, entry) for entry in listed)}
    names = [entry for entry in listed if re.fullmatch(r"[\w.]+", entry)]
    ignore = dict.fromkeys([*names, *(m for m in modules if m not in schemes)])
    return Parsed(schemes, None, tuple(ignore))


def _matches(module: str, entry: str) -> bool:
    return module.endswith(entry) or re.match(rf"(?:{entry})(?:(?<=\.)|(?=\.|$))", module) is not None


def layout(
    module: str, shape: tuple[int, ...], dtype: Any, scheme: Scheme
) -> dict[str, jax.ShapeDtypeStruct]:
    """The names, shapes and usual dtypes of what `read` takes for a weight `[out, in]`."""
    n, k = shape
    inner = (n, k // 32) if scheme.weights.name == "mxfp8" else (-(-n // 128), -(-k // 128))
    scale = np.dtype(np.uint8 if scheme.weights.name == "mxfp8" else np.float32)
    return {
        f"{module}.weight": jax.ShapeDtypeStruct(shape, E4M3),
        f"{module}.weight_scale_inv": jax.ShapeDtypeStruct(inner, scale),
    }


def read(module: str, get: Get, scheme: Scheme, dtype: Any) -> tuple[QTensor, None]:
    """An encoded Linear of a file: its codes as they are, its scales as float32, or E8M0 bytes for mxfp8.

    Args:
      module: full name, without `.weight`.
      get: tensor name -> array.
      scheme: from `parse`.
      dtype: of the checkpoint's other tensors.
    Raises:
      InputError: a tensor of another dtype or shape than the scheme says.
    """
    codes = expect(f"{module}.weight", get, (E4M3,))
    n, k = codes.shape
    name = f"{module}.weight_scale_inv"
    if scheme.weights.name == "mxfp8":
        inner = expect(name, get, (np.dtype(np.uint8), E8M0), (n, k // 32)).view(np.uint8)
    else:
        shape = (-(-n // 128), -(-k // 128))
        inner = expect(name, get, (*FLOATS, E8M0), shape).astype(np.float32)
    return QTensor(codes, {"inner": inner}, scheme.weights, (n, k), np.dtype(dtype)), None
