"""Hugging Face's native MXFP4 checkpoints (as gpt-oss is stored): read only.

weight = E2M1 element * 2^(scale - 127), `_blocks` uint8 `[..., out, in / 32, 16]`, low nibble first, and
`_scales` uint8 `[..., out, in / 32]`. A Linear has `<module>.weight_blocks` and `.weight_scales`; experts may
lie together in `<experts>.gate_up_proj_blocks [experts, 2 * width, ...]`, the gate's rows first, and
`<experts>.down_proj_blocks`. gpt-oss itself, whose rows of gate and up alternate, is no family here.
"""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Iterator, Sequence
from typing import Any

import jax
import numpy as np

from mojax.checkpoint import Checkpoint
from mojax.converters.base import Get, Parsed, as_read, expect, section
from mojax.errors import InputError
from mojax.formats import mxfp4
from mojax.formats.base import Arithmetic, QTensor, Scheme
from mojax.header import Entry

DIALECT = "mxfp4"
ARITHMETIC: Arithmetic = "float32"
WRITES = False
METHODS = ("mxfp4",)
SUFFIXES = (".weight_blocks", ".weight_scales")

U8 = np.dtype(np.uint8)
TOGETHER = (("gate_proj", "up_proj", "down_proj"), ("w1", "w3", "w2"))  # the names of experts' linears


def check(scheme: Scheme, target: str) -> str:
    """Why this dialect cannot be written."""
    return f"the {DIALECT} dialect is read, not written; use --format=compressed-tensors or --format=modelopt"


def parted(files: Checkpoint, modules: Sequence[str]) -> Checkpoint:
    """The same files with experts that lie together as a tensor of each: parts of what the files hold.

    Args:
      modules: the model's linears, experts with a star.
    Raises:
      InputError: experts of a model that is no family here, or of another number or width.
    """
    entries: dict[str, Entry] = {}
    for name, entry in files.entries.items():
        found = re.fullmatch(r"(.*\.experts)\.(gate_up_proj|down_proj)_(blocks|scales)", name)
        if found is None:
            entries[name] = entry
        else:
            entries |= {e.name: e for e in _experts(entry, found[1], found[2], found[3], modules)}
    return dataclasses.replace(files, entries=entries)


def _experts(entry: Entry, prefix: str, part: str, kind: str, modules: Sequence[str]) -> Iterator[Entry]:
    """The parts of one tensor of experts, by their own names."""
    names = next((t for t in TOGETHER if f"{prefix}.*.{t[0]}" in modules), None)
    if names is None:
        raise InputError(
            f"{entry.name}: experts together in one tensor, of a model that is no family here (gpt-oss is "
            "none): mojax does not know which rows are the gate's; start from another checkpoint"
        )
    halves = names[:2] if part == "gate_up_proj" else names[2:]
    count, rows = entry.shape[0], entry.shape[1] // len(halves)
    size = (entry.stop - entry.start) // max(1, count * len(halves))
    for i in range(count * len(halves)):
        name = f"{prefix}.{i // len(halves)}.{halves[i % len(halves)]}.weight_{kind}"
        start = entry.start + i * size
        shape = (rows, *entry.shape[2:])
        yield entry._replace(name=name, shape=shape, start=start, stop=start + size)


def parse(config: dict[str, Any], extra: dict[str, Any] | None, modules: Sequence[str]) -> Parsed:
    """What config.json says about the Linear `modules` of a file; `extra` is not used.

    `lm_head` is never encoded. `modules_to_not_convert` are names or parts of them, with `*` for a number.
    """
    listed = [*(section(config).get("modules_to_not_convert") or ()), "lm_head"]
    format = as_read(mxfp4.FORMAT(), ARITHMETIC)
    assert format is not None
    schemes = {m: Scheme(format) for m in modules if not any(_matches(m, entry) for entry in listed)}
    names = [entry for entry in listed if "*" not in entry]
    return Parsed(schemes, None, tuple(dict.fromkeys([*names, *(m for m in modules if m not in schemes)])))


def _matches(module: str, entry: str) -> bool:
    pattern = re.escape(entry).replace(r"\*", "[^.]+")
    return re.search(rf"(?:^|\.){pattern}(?:\.|$)", module) is not None


def layout(
    module: str, shape: tuple[int, ...], dtype: Any, scheme: Scheme
) -> dict[str, jax.ShapeDtypeStruct]:
    """The names, shapes and dtypes of what `read` takes for a weight `[out, in]`."""
    n, k = shape
    return {
        f"{module}.weight_blocks": jax.ShapeDtypeStruct((n, k // 32, 16), U8),
        f"{module}.weight_scales": jax.ShapeDtypeStruct((n, k // 32), U8),
    }


def read(module: str, get: Get, scheme: Scheme, dtype: Any) -> tuple[QTensor, None]:
    """An encoded Linear of a file, its codes and exponents as they are.

    Args:
      module: full name, without `.weight`.
      get: tensor name -> array.
      scheme: from `parse`.
      dtype: of the checkpoint's other tensors.
    Raises:
      InputError: a tensor of another dtype or shape than the scheme says.
    """
    codes = expect(f"{module}.weight_blocks", get, (U8,))
    if codes.ndim != 3 or codes.shape[-1] != 16:
        raise InputError(
            f"{module}.weight_blocks has shape {list(codes.shape)}, needed [out, in / 32, 16]; "
            "the file is damaged"
        )
    n, groups, _ = codes.shape
    inner = expect(f"{module}.weight_scales", get, (U8,), (n, groups))
    shape = (n, groups * 32)
    return QTensor(codes.reshape(n, -1), {"inner": inner}, scheme.weights, shape, np.dtype(dtype)), None
