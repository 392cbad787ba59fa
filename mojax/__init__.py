"""A quantization compiler for JAX: Hugging Face checkpoints in, verified compressed checkpoints out.

Importing this package imports nothing else: a name below is fetched from its module when it is first used.
"""

from __future__ import annotations

import importlib
from typing import Any

__version__ = "0.1.0"

_HOME = {
    "InputError": "mojax.errors",
    "PlanError": "mojax.errors",
    "load_recipe": "mojax.recipe",
    "Model": "mojax.model",
    "load": "mojax.model",
    "plan": "mojax.planner",
    "calibrate": "mojax.compress",
    "apply": "mojax.pipeline",
    "evaluate": "mojax.compress",
    "export": "mojax.writer",
    "optimize": "mojax.pipeline",
    "run": "mojax.generation",
    "Function": "mojax.function",
    "from_function": "mojax.function",
    "from_flax": "mojax.function",
    "sites": "mojax.function",
    "coverage": "mojax.function",
    "coupled_axes": "mojax.function",
    "fake_quant": "mojax.compress",
    "quantize": "mojax.compress",
    "dequantize": "mojax.compress",
    "save_params": "mojax.store",
    "load_params": "mojax.store",
}


def __getattr__(name: str) -> Any:
    if name not in _HOME:
        raise AttributeError(f"module 'mojax' has no attribute {name!r}")
    return getattr(importlib.import_module(_HOME[name]), name)


def __dir__() -> list[str]:
    return sorted({*globals(), *_HOME})
