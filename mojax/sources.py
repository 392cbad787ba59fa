"""A quantized checkpoint as a source: its weights in full precision, decoded whenever they are read."""

from __future__ import annotations

import collections
import dataclasses
import functools
from collections.abc import Callable, Mapping
from types import ModuleType
from typing import Any

import numpy as np

from mojax import beside, checkpoint, experts, model
from mojax.converters import base as dialects
from mojax.distance import recorded
from mojax.errors import InputError, PlanError
from mojax.formats.base import Scheme
from mojax.kernels.hadamard import hadamard
from mojax.model import Model
from mojax.program import INPUT

SECTIONS = ("quantization_config", "compression_config")  # of config.json


def as_source(loaded: Model) -> Model:
    """A model from `mojax.load` as one in full precision; itself where nothing of it is encoded.

    Encoded weights are decoded to the model's dtype at each access, none is kept. Static input scales, scales
    of the key/value cache and the quantization section of config.json are left out.

    Raises:
      InputError: the weights were encoded in memory.
      PlanError: codes or scales are missing or misshapen, as far as headers show.
    """
    files = loaded.checkpoint
    if not loaded.schemes and loaded.cache is None:
        return loaded
    if files is None or type(loaded.params) is not model.Lazy:
        raise InputError(
            "the weights of this model were quantized in memory; give the model that they were made from"
        )
    dialect = dialects.dialect(loaded.config, model.file_names(files))
    assert dialect is not None  # it says so
    schemes = experts.spread(loaded.schemes, loaded.shapes)
    weights = _weights(loaded, dialect, schemes)
    config = {k: v for k, v in files.config.items() if k not in SECTIONS}
    decoded = checkpoint.Decoded(
        files.folder,
        config,
        files.entries,
        files.headers_only,
        names=_names(loaded, weights),
        weights=weights,
        said=_said(schemes, dialect),
    )
    source = Model(config, decoded, loaded.family, decoded)
    model.check_shapes(source)
    return dataclasses.replace(source, params=source.tensors)


def reference_for(out: Model, loaded: Model) -> Model:
    """What to compare `out` with: the decoded weights of what our recipes quantized, else `loaded` as it is.

    A conversion has the codes of its source, and is compared with how that one runs.
    """
    return as_source(loaded) if recorded(out) is not None else loaded


def _names(loaded: Model, weights: Mapping[str, object]) -> tuple[str, ...]:
    """The decoded weights where the first of their tensors lies, and what is not encoded."""
    assert loaded.checkpoint is not None
    tensors = loaded.tensors
    leaves = [n for n in loaded.params if not n.endswith((INPUT, *beside.LEAVES)) and n in tensors]
    listed = tensors.names if isinstance(tensors, experts.Stacked) else {n: (n,) for n in leaves}
    kept = {name for leaf in leaves for name in listed[leaf]}
    found: dict[str, None] = {}
    for name in loaded.checkpoint:
        weight = name.rpartition(".")[0] + ".weight"
        if weight in weights:
            found[weight] = None
        elif name in kept:
            found[name] = None
    return tuple(found)


def _weights(
    loaded: Model, dialect: ModuleType, schemes: Mapping[str, Scheme]
) -> dict[str, tuple[checkpoint.Spec, Callable[[], np.ndarray]]]:
    """By name in the files, the spec of every encoded weight and how to decode it."""
    files = loaded.checkpoint
    assert files is not None
    shapes = {m: loaded.shapes[m + ".weight"] for m in loaded.schemes if loaded.shapes}
    plain = {m: s[1:] if experts.starred(m) else s for m, s in shapes.items()}
    known = {n: plain[m] for m in plain for n in experts.expand(m, shapes[m][0])}
    found, problems = {}, []
    for module, scheme in schemes.items():
        read = functools.partial(dialect.read, module, files.__getitem__, scheme, loaded.dtype)
        shape = known[module] if known else read()[0].shape
        problems += _problems(files, dialect, dialect.layout(module, shape, loaded.dtype, scheme), scheme)
        spec = checkpoint.Spec(np.dtype(loaded.dtype), tuple(shape))
        low = dialect.branch(module) if scheme.rank else ()
        get = functools.partial(lambda names: [files[n] for n in names], low)
        found[module + ".weight"] = spec, functools.partial(_decode, read, scheme.hadamard, get)
    if problems:
        raise PlanError(problems)
    return found


def _decode(read: Callable[[], tuple], block: int, branch: Callable[[], list]) -> np.ndarray:
    """The weight, in Hadamard blocks of this order turned back, H H = 1, and with its branch."""
    q = read()[0]
    if low := branch():
        w = q.format.decode(q)
        w = hadamard(w, block=block) if block else w
        return np.asarray(w + beside.product(*low)).astype(q.dtype)
    if block:
        return np.asarray(hadamard(q.format.decode(q), block=block)).astype(q.dtype)
    return np.asarray(model.decode(q)).astype(q.dtype, copy=False)


def _problems(
    files: checkpoint.Checkpoint, dialect: ModuleType, layout: Mapping[str, Any], scheme: Scheme
) -> list[str]:
    """What the headers lack of one encoded weight; axes of length 1 may differ, as writers do."""
    said = []
    for name, spec in layout.items():
        if name not in files and name.endswith(model.MATRIX):
            continue  # `read` says which of these must be there
        if name not in files:
            said.append(f"{name}: missing; config.json says {scheme.weights.label}, which needs it")
            continue
        if name.endswith(dialects.varies(dialect)):
            continue
        found = files.spec(name).shape
        if [n for n in found if n != 1] != [n for n in spec.shape if n != 1]:
            said.append(
                f"{name}: the file holds {list(found)}, {scheme.weights.label} needs {list(spec.shape)}; "
                "the file is damaged, or config.json belongs to another model"
            )
    return said


def _said(schemes: Mapping[str, Scheme], dialect: ModuleType) -> str:
    """`fp8 block weights with fp8 block inputs (the fp8 dialect)`, the most frequent first."""
    if not schemes:
        return f"the key/value cache alone (the {dialect.DIALECT} dialect)"
    counts = collections.Counter(dialects.label(s) for s in schemes.values())
    return f"{'; '.join(label for label, _ in counts.most_common())} (the {dialect.DIALECT} dialect)"
