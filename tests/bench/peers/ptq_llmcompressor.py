"""One quantization with llm-compressor as its documentation shows it; run by its own environment's python.

    python ptq_llmcompressor.py MODEL_DIR TOKENS.npz SCHEME OUT_DIR

SCHEME is nvfp4 (calibrated on every row of `tokens`), fp8_dynamic or int4 (group 128); the last two need no
data, so none is given, unless an algorithm does: FORMAT/gptq and FORMAT/awq do, FORMAT/mse and nvfp4/sweep,
which choose the observer of the weights, do not. Prints one line of JSON: versions and the seconds of each
phase.
"""

# pyright: reportMissingImports=false

import json
import sys
import time

start = time.perf_counter()

import compressed_tensors  # noqa: E402
import llmcompressor  # noqa: E402
import numpy as np  # noqa: E402
import torch  # noqa: E402
import transformers  # noqa: E402
from datasets import Dataset  # noqa: E402
from llmcompressor import oneshot  # noqa: E402
from llmcompressor.modifiers.quantization import QuantizationModifier  # noqa: E402

SCHEMES = {"nvfp4": "NVFP4", "fp8_dynamic": "FP8_DYNAMIC", "int4": "W4A16"}
OBSERVERS = {"mse": "memoryless_mse", "sweep": "nvfp4_expanded_mse"}


def modifiers(form: str, algorithm: str) -> list:
    """The steps of a recipe; an algorithm's code is imported where it is used."""
    ignore = ["lm_head"]
    if algorithm == "gptq":
        from llmcompressor.modifiers.gptq import GPTQModifier

        return [GPTQModifier(targets="Linear", scheme=SCHEMES[form], ignore=ignore)]
    if algorithm in OBSERVERS:
        from compressed_tensors.quantization import preset_name_to_scheme

        scheme = preset_name_to_scheme(SCHEMES[form], ["Linear"]).model_copy(deep=True)
        scheme.weights.observer = OBSERVERS[algorithm]
        return [QuantizationModifier(config_groups={"all": scheme}, ignore=ignore)]
    plain = QuantizationModifier(targets="Linear", scheme=SCHEMES[form], ignore=ignore)
    if algorithm == "awq":
        from llmcompressor.modifiers.transform.awq import AWQModifier
        from llmcompressor.pipelines.cache import IntermediatesCache

        if not torch.accelerator.is_available():  # it pins memory without asking whether there is a device
            IntermediatesCache.pin_memory = lambda *args: None
        return [AWQModifier(), plain]
    return [plain]


def main() -> None:
    model_dir, tokens_file, scheme, out = sys.argv[1:]
    imported = time.perf_counter()
    model = transformers.AutoModelForCausalLM.from_pretrained(model_dir, dtype="auto")
    loaded = time.perf_counter()
    form, _, algorithm = scheme.partition("/")
    recipe = modifiers(form, algorithm)
    data = {}
    if form == "nvfp4" or algorithm in ("gptq", "awq"):
        tokens = np.load(tokens_file)["tokens"]
        mask = np.ones_like(tokens)
        rows = Dataset.from_dict({"input_ids": tokens.tolist(), "attention_mask": mask.tolist()})
        data = {
            "dataset": rows,
            "num_calibration_samples": len(tokens),
            "max_seq_length": tokens.shape[1],
            "shuffle_calibration_samples": False,
        }
    oneshot(model=model, recipe=recipe, **data)
    quantized = time.perf_counter()
    model.save_pretrained(out, save_compressed=True)
    packages = (llmcompressor, compressed_tensors, transformers, torch)
    said = {
        "versions": {package.__name__: package.__version__ for package in packages},
        "import": imported - start,
        "load": loaded - imported,
        "quantize": quantized - loaded,
        "save": time.perf_counter() - quantized,
    }
    print(json.dumps(said))


if __name__ == "__main__":
    main()
