"""What llm-compressor's algorithms reach; run by its own environment's python, started by quality.py.

Recipes are FORMAT/STEPS, steps joined by `+`: a transform (awq, smoothquant, smoothquant8 with strength .8,
spinquant with R1 and R2 offline, spinquant4 with R4 too, an online Hadamard before down_proj), an observer of
the weights (mse, expanded for NVFP4, imatrix), gptq or autoround; or only rtn. The rest is the tool's own.
"""

# pyright: reportMissingImports=false

from __future__ import annotations

from typing import Any

import compressed_tensors
import llmcompressor
import numpy as np
import quality_torch
import torch
import transformers
from compressed_tensors.quantization import QuantizationScheme, preset_name_to_scheme
from datasets import Dataset
from llmcompressor import oneshot
from llmcompressor.modifiers.autoround import AutoRoundModifier
from llmcompressor.modifiers.gptq import GPTQModifier
from llmcompressor.modifiers.quantization import QuantizationModifier
from llmcompressor.modifiers.transform import SpinQuantModifier
from llmcompressor.modifiers.transform.awq import AWQModifier
from llmcompressor.modifiers.transform.smoothquant import SmoothQuantModifier
from llmcompressor.pipelines.cache import IntermediatesCache

PRESETS = {
    "nvfp4": "NVFP4",
    "nvfp4_weight_only": "NVFP4A16",
    "mxfp4": "MXFP4",
    "mxfp4_weight_only": "MXFP4A16",
    "int4": "W4A16",
    "int8": "W8A8",
}
BITS = {"nvfp4": 4 + 8 / 16, "mxfp4": 4 + 8 / 32, "int4": 4 + 16 / 128, "int4_g32": 4 + 16 / 32}
OBSERVERS = {"mse": "memoryless_mse", "imatrix": "imatrix_mse", "expanded": "nvfp4_expanded_mse"}
TRANSFORMS = {
    "awq": lambda: AWQModifier(),
    "smoothquant": lambda: SmoothQuantModifier(),
    "smoothquant8": lambda: SmoothQuantModifier(smoothing_strength=0.8),
    "spinquant": lambda: SpinQuantModifier(),
    "spinquant4": lambda: SpinQuantModifier(rotations=["R1", "R2", "R4"], transform_type="random-hadamard"),
}


def scheme(form: str, observer: str | None) -> QuantizationScheme:
    """How linears run in a format, with the observer that chooses the scales of weights."""
    integers = {"type": "int", "symmetric": True}
    groups = integers | {"num_bits": 4, "strategy": "group", "group_size": 32}
    channels = integers | {"num_bits": 8, "strategy": "channel"}
    tensor = integers | {"num_bits": 8, "strategy": "tensor", "dynamic": False, "observer": "static_minmax"}
    if form == "int4_g32":
        found = QuantizationScheme.model_validate({"targets": ["Linear"], "weights": groups})
    elif form == "int8_static":
        both = {"weights": channels, "input_activations": tensor}
        found = QuantizationScheme.model_validate({"targets": ["Linear"], **both})
    else:
        found = preset_name_to_scheme(PRESETS[form], ["Linear"]).model_copy(deep=True)
    if observer and found.weights is not None:
        found.weights.observer = OBSERVERS[observer]
    return found


def steps(recipe: str) -> list[Any]:
    """The modifiers of a recipe."""
    form, _, names = recipe.partition("/")
    chosen = names.split("+")
    observer = next((name for name in chosen if name in OBSERVERS), None)
    common = {"config_groups": {"all": scheme(form, observer)}, "ignore": ["lm_head", "re:.*mlp.gate$"]}
    before = [TRANSFORMS[name]() for name in chosen if name in TRANSFORMS]
    if unknown := set(chosen) - {*OBSERVERS, *TRANSFORMS, "gptq", "autoround", "rtn"}:
        raise ValueError(f"{recipe}: unknown steps {sorted(unknown)}")
    if "autoround" in chosen:
        return [*before, AutoRoundModifier(**common, enable_torch_compile=False)]
    return [*before, (GPTQModifier if "gptq" in chosen else QuantizationModifier)(**common)]


def quantize(model: Any, tokens: Any, recipe: str) -> float:
    """Changes the model; bits per quantized weight."""
    rows = {"input_ids": tokens.tolist(), "attention_mask": np.ones_like(tokens).tolist()}
    oneshot(
        model=model,
        recipe=steps(recipe),
        dataset=Dataset.from_dict(rows),
        num_calibration_samples=len(tokens),
        max_seq_length=tokens.shape[1],
        shuffle_calibration_samples=False,
    )
    form = recipe.split("/")[0]

    def each(layer: Any) -> float:
        if form.startswith("int8"):
            return 8 * layer.weight.numel() + 16 * len(layer.weight)
        return BITS[form.removesuffix("_weight_only")] * layer.weight.numel()

    return quality_torch.bits(model, each)


if __name__ == "__main__":
    if not torch.accelerator.is_available():  # AWQ pins memory without asking whether there is a device
        IntermediatesCache.pin_memory = lambda *args: None
    packages = (llmcompressor, compressed_tensors, transformers, torch)
    quality_torch.run("llm-compressor", quantize, {p.__name__: p.__version__ for p in packages})
