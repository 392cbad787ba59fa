"""The header of a safetensors file: where each tensor lies, and everything a header can get wrong.

The format: https://github.com/huggingface/safetensors#format. 8 bytes of header length, a JSON header, then
the data without holes.
"""

from __future__ import annotations

import json
import math
import os
import re
from pathlib import Path
from typing import Any, NamedTuple, TypeGuard

import ml_dtypes
import numpy as np

from mojax.errors import InputError

DTYPES = {
    "F64": np.dtype(np.float64),
    "F32": np.dtype(np.float32),
    "F16": np.dtype(np.float16),
    "BF16": np.dtype(ml_dtypes.bfloat16),
    "F8_E4M3": np.dtype(ml_dtypes.float8_e4m3fn),
    "F8_E5M2": np.dtype(ml_dtypes.float8_e5m2),
    "F8_E8M0": np.dtype(ml_dtypes.float8_e8m0fnu),
    "I64": np.dtype(np.int64),
    "I32": np.dtype(np.int32),
    "I16": np.dtype(np.int16),
    "I8": np.dtype(np.int8),
    "U64": np.dtype(np.uint64),
    "U32": np.dtype(np.uint32),
    "U16": np.dtype(np.uint16),
    "U8": np.dtype(np.uint8),
    "BOOL": np.dtype(np.bool_),
}
_LONGEST_HEADER = 100_000_000  # bytes; the limit of the safetensors library


class Entry(NamedTuple):
    """Where a tensor lies: bytes `start` to `stop` of `file`, counted from the start of the file."""

    name: str
    dtype: np.dtype
    shape: tuple[int, ...]
    file: Path
    start: int
    stop: int


def read_header(file: Path) -> list[Entry]:
    """The entries of one safetensors file, in the order of their data.

    Raises:
      InputError: the header does not describe the file.
    """
    try:
        with open(file, "rb") as f:
            size = os.fstat(f.fileno()).st_size
            length = header_length(f.read(8), size, file)
            return parse_header(f.read(length), size, file)
    except OSError as error:
        raise InputError(f"{file} cannot be read: {error}") from error


def header_length(prefix: bytes, size: int, file: Path) -> int:
    """Bytes of the JSON header from the first 8 bytes of a file of `size` bytes.

    Raises:
      InputError: the length cannot be that of a header.
    """
    if prefix == b"version ":
        raise InputError(f"{file} is a git-lfs pointer, not the tensors; run `git lfs pull`")
    length = int.from_bytes(prefix, "little")
    if len(prefix) < 8 or length > size - 8:
        raise InputError(f"{file}: {size} bytes, shorter than its header; the download is incomplete")
    if length > _LONGEST_HEADER:
        raise InputError(f"{file}: a header of {length} bytes; at most {_LONGEST_HEADER} is allowed")
    return length


def parse_header(raw: bytes, size: int, file: Path) -> list[Entry]:
    """The entries of a JSON header `raw` of a file of `size` bytes, in the order of their data.

    Raises:
      InputError: not a header, or one that does not describe `size` bytes without holes or overlap.
    """
    header = _load_header(raw, file)
    base = 8 + len(raw)
    entries = [_parse_entry(n, found, base, file) for n, found in header.items() if n != "__metadata__"]
    entries.sort(key=lambda e: (e.start, e.stop))
    end = base
    for e in entries:
        if e.stop > size:
            raise InputError(
                f"{file}: {e.name!r} ends at byte {e.stop}, the file at {size}; the download is incomplete"
            )
        if e.start != end:
            what = "overlaps the tensor before it" if e.start < end else "leaves unused bytes before it"
            raise InputError(f"{file}: {e.name!r} starts at byte {e.start} and {what}, which ends at {end}")
        end = e.stop
    if end != size:
        raise InputError(f"{file}: {size - end} bytes after the last tensor; download the file again")
    return entries


def _load_header(raw: bytes, file: Path) -> dict[str, Any]:
    def unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        found: dict[str, Any] = {}
        for name, value in pairs:
            if name in found:
                raise InputError(f"{file}: {name!r} is in the header twice")
            found[name] = value
        return found

    def refuse(constant: str) -> None:
        raise ValueError(f"{constant} is not JSON")

    try:
        text = raw.decode("utf-8")
        header = None
        if text.startswith("{"):
            header = json.loads(text, object_pairs_hook=unique, parse_constant=refuse)
    except InputError:
        raise
    except (ValueError, RecursionError) as error:
        raise InputError(f"{file}: the header is not JSON ({error}); is this a safetensors file?") from error
    if not isinstance(header, dict):
        raise InputError(f"{file}: the header is not a JSON object; is this a safetensors file?")
    metadata = header.get("__metadata__", {})
    if metadata is not None and not (
        isinstance(metadata, dict) and all(isinstance(v, str) for v in metadata.values())
    ):
        raise InputError(f"{file}: __metadata__ is {metadata!r:.80}; needed an object of strings")
    return header


def _parse_entry(name: str, found: Any, base: int, file: Path) -> Entry:
    where = f"{file}: {name!r}"
    if re.search("[\ud800-\udfff]", name):
        raise InputError(f"{where}: the name is not valid Unicode")
    if not isinstance(found, dict):
        raise InputError(f"{where}: found {found!r:.80}, needed an object of dtype, shape and data_offsets")
    dtype = DTYPES.get(found["dtype"]) if isinstance(found.get("dtype"), str) else None
    if dtype is None:
        raise InputError(f"{where}: dtype {found.get('dtype')!r:.80} is unknown; known: {', '.join(DTYPES)}")
    shape, offsets = found.get("shape"), found.get("data_offsets")
    if not _counts(shape) or len(shape) > 64:
        raise InputError(f"{where}: shape {shape!r:.80}; needed a list of at most 64 sizes")
    if not _counts(offsets) or len(offsets) != 2 or offsets[0] > offsets[1]:
        raise InputError(f"{where}: data_offsets {offsets!r:.80}; needed 0 <= start <= stop")
    if math.prod(s for s in shape if s) * dtype.itemsize >= 1 << 63:
        raise InputError(f"{where}: shape {shape!r:.80} is larger than memory can address")
    start, stop = offsets
    need = math.prod(shape) * dtype.itemsize
    if stop - start != need:
        given = stop - start
        raise InputError(f"{where}: {found['dtype']} {shape} takes {need} bytes, data_offsets give {given}")
    return Entry(name, dtype, tuple(shape), file, base + start, base + stop)


def _counts(x: Any) -> TypeGuard[list[int]]:
    return isinstance(x, list) and all(type(i) is int and 0 <= i < 1 << 63 for i in x)
