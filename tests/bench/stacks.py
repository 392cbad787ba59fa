"""Recipes of a benchmark by name, as the peers' are named: BASE/STEP+STEP. A shipped recipe is its own name.

    nvfp4/sweep+gptq+cd      the numerics of nvfp4 with these steps, what is not said as the steps have it
    int4/gptq@n256,seed1     calibrated on one sequence of 256 tokens, drawn with seed 1
    nvfp4/rtn@layer2         only layer 2 is encoded

BASE is a shipped recipe or one of BASES, STEP a step of mojax or one of STEPS; `gradients` among the steps
stands for the backward pass. `source` is the model as it is.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

Step = dict[str, Any] | str


def _numerics(weights: Any, inputs: Any, **more: Any) -> dict[str, Any]:
    return {"rules": [{"match": "*", "weights": weights, "inputs": inputs, **more}]}


def _cache(**said: Any) -> dict[str, Any]:
    return {"rules": [{"match": "*", "weights": "keep", "kv_cache": said}]}


BASES: dict[str, dict[str, Any]] = {
    "int4_g32": _numerics({"format": "int4", "group": 32}, "none"),
    "nvfp4_hadamard": _numerics("nvfp4", "nvfp4", hadamard=16),
    "int4_hadamard256": _numerics({"format": "int4", "group": 32}, "none", hadamard=256),
    "mxfp4_hadamard256": _numerics("mxfp4", "mxfp4", hadamard=256),
    "kv_fp8": _cache(format="fp8"),
    "kv_nvfp4": _cache(format="nvfp4"),
    "kv_fp8k_nvfp4v": _cache(k="fp8", v="nvfp4"),
    "kv_nvfp4k_fp8v": _cache(k="nvfp4", v="fp8"),
    "kv_nvfp4_rotated": _cache(format="nvfp4", rotate=True),
    "kv_nvfp4_affine": _cache(format="nvfp4", affine=True),
    "kv_nvfp4_skip_first": _cache(format="nvfp4", skip_first=1),
    "kv_nvfp4_skip_last": _cache(format="nvfp4", skip_last=1),
}
STEPS: dict[str, Step] = {
    "gptq-in-order": {"gptq": {"act_order": False}},
    "gptq-d.001": {"gptq": {"damping": 0.001}},
    "gptq-d.1": {"gptq": {"damping": 0.1}},
    "gptq-d1": {"gptq": {"damping": 1.0}},
    "cd": {"refine": {"rounds": 1, "scales": False}},
    "wmse": {"mse": {"weighted": True}},
    "qep1": {"qep": {"strength": 1.0}},
    "local_hessian-signed": {"local_hessian": {"signed": True}},
    "refine-signed": {"refine": {"signed": True}},
    "smoothquant-all": {"smoothquant": {"sites": "all"}},
}


def recipe(name: str) -> str | Mapping[str, Any]:
    """What `mojax.load_recipe` takes, for a name."""
    name, _, options = name.partition("@")
    base, _, steps = name.partition("/")
    if not steps and not options:
        return BASES.get(base, base)
    words = [word for word in steps.split("+") if word]
    said = dict(BASES.get(base, {"extends": base})) | {"limits": {"kl_mean": None}}
    if found := [STEPS.get(word, word) for word in words if word != "gradients"]:
        said["steps"] = found
    calibration = {"gradients": 2} if "gradients" in words else {}
    for option in filter(None, options.split(",")):
        kind, number = re.fullmatch(r"(n|seed|layer)(\d+)", option).groups()  # pyright: ignore
        if kind == "n":
            calibration |= {"sequences": max(1, int(number) // 256), "length": min(256, int(number))}
        elif kind == "seed":
            calibration["seed"] = int(number)
        else:
            numerics = said.pop("rules", [])
            only = {"match": "*", "weights": "keep"}
            said["rules"] = [*numerics, only, _layer(base, int(number))]
    return said | ({"calibration": calibration} if calibration else {})


def _layer(base: str, number: int) -> dict[str, Any]:
    """The rule that encodes one layer as a base encodes all."""
    from mojax.recipe import choose, load_recipe

    rule = choose(load_recipe(BASES.get(base, base)), "*")
    return {"match": f"model.layers.{number}.*", "weights": rule.weights, "inputs": rule.inputs}


def kept_here(name: str) -> bool:
    """Whether no file can hold it, so that it is judged in memory."""
    return name.startswith("kv_") or "flatquant" in name
