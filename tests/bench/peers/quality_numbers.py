"""What is kept of one quantized model: figures over tokens, and per sequence what a paired test needs.

KL and its standard error are over sequences, because the tokens of one are correlated. The 99th percentile is
over tokens, its standard error a bootstrap over sequences. One JSON file per tool, recipe, model and seed.
"""

from __future__ import annotations

import hashlib
import json
import re
from pathlib import Path
from typing import Any

import numpy as np

PACKAGE = Path(__file__).resolve().parents[3]


def summary(kl: Any, same: Any, nll_source: Any, nll: Any) -> dict[str, Any]:
    """Figures of one model.

    Args:
      kl, same, nll_source, nll: per token, `[sequences, length]`; of the last token of a sequence, which has
        no next one, the two negative log-likelihoods are not used.
    """
    kl, same = np.asarray(kl, np.float64), np.asarray(same, np.float64)
    nll_source, nll = (np.asarray(a, np.float64)[:, :-1].mean(axis=1) for a in (nll_source, nll))
    draws = np.random.default_rng(0).integers(len(kl), size=(200, len(kl)))
    p99 = [np.quantile(kl[draw], 0.99) for draw in draws]
    return {
        "kl": kl.mean(axis=1).tolist(),
        "same": same.mean(axis=1).tolist(),
        "nll": nll.tolist(),
        "nll_source": nll_source.tolist(),
        "p99": float(np.quantile(kl, 0.99)),
        "p99_error": float(np.std(p99, ddof=1)),
    }


def digest(model: Path) -> str:
    """Of the weights of a model folder, so that results of another model of the same name are not taken."""
    found = hashlib.sha256()
    for path in sorted(model.glob("*.safetensors")):
        found.update(path.read_bytes())
    return found.hexdigest()[:12]


def sources() -> str:
    """Of the package as it lies there: its results are its own."""
    found = hashlib.sha256()
    roots = [PACKAGE / name for name in ("mojax", "transforms", "converters", "kernels", "recipes")]
    for path in sorted(p for root in roots for end in ("*.py", "*.yaml") for p in root.rglob(end)):
        found.update(path.read_bytes())
    return found.hexdigest()[:12]


def folder(work: Path, model: Path) -> Path:
    """Where the tokens and the results of a model lie."""
    return work / f"{model.name}-{digest(model)}"


def place(work: Path, model: Path, tool: str, recipe: str, seed: int) -> Path:
    """The file of one result."""
    return folder(work, model) / tool / f"{re.sub(r'[^a-z0-9_+]+', '-', recipe)}-{seed}.json"


def write(path: Path, facts: dict[str, Any]) -> None:
    """Whole or not at all."""
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_suffix(".partial")
    partial.write_text(json.dumps(facts))
    partial.rename(path)


def tokens(work: Path, model: Path, purpose: str, seed: int) -> np.ndarray:
    """int64 `[sequences, length]` of a file that quality.py wrote."""
    return np.load(folder(work, model) / f"{purpose}-{seed}.npz")["tokens"].astype(np.int64)
