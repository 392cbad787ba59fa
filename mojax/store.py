"""Parameters in one safetensors file, packed ones too.

A QTensor `w` is the tensors `w.codes` and `w.scales.<level>`; what is static of it (format with options,
shape, dtype, axes) is JSON in the metadata of the header, under "mojax".
"""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from mojax import find
from mojax.checkpoint import read_shard, write_shard
from mojax.errors import InputError
from mojax.formats.base import Format, QTensor

VERSION = 1
KEY = "mojax"


def save_params(path: str | Path, params: Mapping[str, Any]) -> None:
    """Write a flat dict of arrays and QTensors to a new file. The same params give the same bytes.

    Raises:
      InputError: the file exists, a leaf is no array or its dtype or format cannot be stored, or two tensors
        would have one name.
    """
    path = Path(path)
    if path.exists():
        raise InputError(f"{path}: exists already; choose another name, or remove it")
    tensors: dict[str, np.ndarray] = {}
    packed: dict[str, Any] = {}
    for name in sorted(params):
        leaf = params[name]
        if isinstance(leaf, QTensor):
            packed[name] = _described(name, leaf)
        for key, value in _parts(name, leaf).items():
            if key in tensors:
                raise InputError(f"{key}: is the name of two tensors; rename a leaf")
            if isinstance(value, jax.ShapeDtypeStruct) or not hasattr(value, "dtype"):
                raise InputError(f"{key}: is {type(value).__name__}, not an array, and cannot be saved")
            if not isinstance(value, np.ndarray) and jnp.issubdtype(value.dtype, jax.dtypes.prng_key):
                raise InputError(f"{key}: is a random key; save jax.random.key_data of it")
            tensors[key] = np.asarray(value)
    said = {"version": VERSION, "packed": packed}
    write_shard(path, tensors, metadata={KEY: json.dumps(said, sort_keys=True)})


def load_params(path: str | Path) -> dict[str, Any]:
    """What `save_params` wrote: read-only numpy arrays, mapped from the file, and QTensors of such.

    Raises:
      InputError: no such file, it is damaged, or something else wrote it.
    """
    path = Path(path)
    tensors = read_shard(path)
    packed = _metadata(path)
    params: dict[str, Any] = {}
    for name, said in packed.items():
        spec = _spec(path, name, said)
        parts = _parts(name, spec)
        for key, expected in parts.items():
            found = tensors.get(key)
            if found is None or (found.shape, found.dtype) != (expected.shape, expected.dtype):
                has = f"{found.dtype} {list(found.shape)}" if found is not None else "nothing"
                raise InputError(
                    f"{path}: {key}: found {has}, needed {expected.dtype} {list(expected.shape)} for "
                    f"{spec.format.label} of shape {list(spec.shape)}; the file is damaged, save it again"
                )
        scales = {level: tensors.pop(f"{name}.scales.{level}") for level in spec.scales}
        params[name] = dataclasses.replace(spec, codes=tensors.pop(f"{name}.codes"), scales=scales)
    return dict(sorted((tensors | params).items()))


def _parts(name: str, leaf: Any) -> dict[str, Any]:
    """The tensors of a leaf by their names in the file."""
    if not isinstance(leaf, QTensor):
        return {name: leaf}
    return {f"{name}.codes": leaf.codes} | {f"{name}.scales.{k}": v for k, v in leaf.scales.items()}


def _described(name: str, q: QTensor) -> dict[str, Any]:
    """The static part of a QTensor as JSON."""
    kind = q.format.name
    if kind not in find.names("formats") or find.find("formats", kind).FORMAT is not type(q.format):
        raise InputError(f"{name}: its format {kind!r} is no file in formats/, so it could not be read back")
    options = {f.name: getattr(q.format, f.name) for f in dataclasses.fields(q.format)}
    return {
        "format": {"name": kind, **options},
        "shape": list(q.shape),
        "dtype": np.dtype(q.dtype).name,
        "contract": list(q.contract),
        "batch": list(q.batch),
    }


def _metadata(path: Path) -> dict[str, Any]:
    from safetensors import safe_open

    with safe_open(path, "numpy") as file:
        text = (file.metadata() or {}).get(KEY)
    if text is None:
        raise InputError(f"{path}: was not written by mojax.save_params; open a checkpoint with mojax.load")
    try:
        said = json.loads(text)
        version, packed = said["version"], dict(said["packed"])
    except (ValueError, TypeError, KeyError) as error:
        raise InputError(f"{path}: the metadata cannot be read ({error}); the file is damaged") from error
    if version != VERSION:
        raise InputError(f"{path}: has version {version!r}, this mojax reads {VERSION}; update mojax")
    return packed


def _spec(path: Path, name: str, said: Any) -> QTensor:
    """A QTensor of ShapeDtypeStructs, as a file describes it."""
    try:
        options = dict(said["format"])
        format: Format = find.find("formats", options.pop("name")).FORMAT(**options)
        shape, contract, batch = (tuple(map(int, said[k])) for k in ("shape", "contract", "batch"))
        return format.spec(shape, jnp.dtype(said["dtype"]), contract, batch)
    except (InputError, TypeError, KeyError, ValueError, AttributeError) as error:
        raise InputError(
            f"{path}: {name}: its description cannot be used ({error}); the file is damaged"
        ) from error
