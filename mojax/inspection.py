"""What is inside a checkpoint, ours or a peer's: dialect, formats, scales, fused groups, surprises."""

from __future__ import annotations

import collections
from pathlib import Path
from typing import Any

import numpy as np

from mojax.beside import LEAVES
from mojax.converters import base as dialects
from mojax.errors import InputError
from mojax.evaluation import quantized_bits
from mojax.experts import expand
from mojax.model import Model, load
from mojax.program import INPUT
from mojax.verify import VerifyError, verify


def inspect(source: str | Path) -> dict[str, Any]:
    """Facts about a checkpoint, as plain data.

    Returns:
      model_type, dialect, tensors, bytes, bits_per_weight, dtypes (count and bytes of each), formats
      (count of modules, range of every scale level and of static inputs), ignore, surprises.
    Raises:
      InputError: not a readable checkpoint.
    """
    model = load(source, generic=True)
    files = model.checkpoint
    assert files is not None
    found = dialects.section(model.config)
    dtypes: dict[str, list[int]] = {}
    for entry in files.entries.values():
        count = dtypes.setdefault(entry.dtype.name, [0, 0])
        count[0] += 1
        count[1] += entry.stop - entry.start
    size = sum(total for _, total in dtypes.values())
    method = found.get("quant_method") or ("modelopt" if model.schemes else None)
    return {
        "source": str(source),
        "model_type": model.config.get("model_type"),
        "dialect": method or "none: full precision",
        "tensors": len(files),
        "bytes": size,
        "bits_per_weight": 8 * size / max(_parameters(model), 1),
        "bits_per_quantized_weight": quantized_bits(model),
        "dtypes": {name: {"tensors": n, "bytes": b} for name, (n, b) in sorted(dtypes.items())},
        "formats": _formats(model),
        "cache": model.cache.label if model.cache else None,
        "ignore": found.get("ignore") or found.get("modules_to_not_convert") or [],
        "surprises": _surprises(source, model),
    }


def _parameters(model: Model) -> int:
    """How many numbers the model has when nothing is encoded."""
    return sum(int(np.prod(model.params[n].shape)) for n in model.params if not n.endswith((INPUT, *LEAVES)))


def _formats(model: Model) -> list[dict[str, Any]]:
    """One entry per scheme, with the range of its scales over all modules."""
    groups: dict[str, dict[str, Any]] = {}
    for module, scheme in model.schemes.items():
        label = scheme.label
        q = model.params[module + ".weight"]
        names = expand(module, q.shape[0])
        entry = groups.setdefault(label, {"format": label, "modules": 0, "example": names[0], "scales": {}})
        entry["modules"] += len(names)
        levels = {f"weight {k}": v for k, v in q.scales.items()}
        if module + INPUT in model.params:
            levels["input maximum"] = np.asarray(model.params[module + INPUT])
        for level, values in levels.items():
            values = np.asarray(values).astype(np.float32)
            low, high = entry["scales"].get(level, (np.inf, -np.inf))
            entry["scales"][level] = (min(low, float(values.min())), max(high, float(values.max())))
    return [e | {"scales": {k: list(v) for k, v in e["scales"].items()}} for e in groups.values()]


def _surprises(source: str | Path, model: Model) -> list[str]:
    out = []
    if model.family is None:
        out.append(f"model_type {model.config.get('model_type')!r} has no family here: no forward function")
    if not model.schemes:
        return out
    try:
        out += verify(source).notes
    except VerifyError as error:
        out += error.differences
    except InputError as error:
        out.append(str(error))
    parents = collections.Counter(m.rsplit(".", 1)[-1] for m in model.schemes)
    most = max(parents.values())
    out += [
        f"only {n} of {most} {name} are encoded" for name, n in parents.items() if n < most and model.blocks
    ]
    return out


def text(facts: dict[str, Any]) -> str:
    """The facts as lines."""
    lines = [
        f"{facts['source']}: {facts['model_type']}, {facts['dialect']}",
        f"{facts['tensors']} tensors, {facts['bytes'] / 1e6:.1f} MB, "
        f"{facts['bits_per_weight']:.2f} bits per weight",
    ]
    for name, d in facts["dtypes"].items():
        lines.append(f"  {name}: {d['tensors']} tensors, {d['bytes'] / 1e6:.2f} MB")
    for entry in facts["formats"]:
        lines.append(f"{entry['modules']} modules {entry['format']}, such as {entry['example']}")
        for level, (low, high) in entry["scales"].items():
            lines.append(f"  {level}: {low:.6g} to {high:.6g}")
    if facts["cache"]:
        lines.append(f"key/value cache: {facts['cache']}")
    if facts["ignore"]:
        lines.append("ignored: " + ", ".join(facts["ignore"]))
    lines += [f"surprise: {s}" for s in facts["surprises"]]
    return "\n".join(lines)
