"""One quantization with llm-compressor as its documentation shows it; run by its own environment's python.

    python peer_llmcompressor.py MODEL_DIR TOKENS.npz SCHEME OUT_DIR

SCHEME is nvfp4 (calibrated on every row of `tokens`), fp8_dynamic or int4 (group 128); the last two need no
data, so none is given. Prints one line of JSON: versions and the seconds of each phase.
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


def main() -> None:
    model_dir, tokens_file, scheme, out = sys.argv[1:]
    imported = time.perf_counter()
    model = transformers.AutoModelForCausalLM.from_pretrained(model_dir, dtype="auto")
    loaded = time.perf_counter()
    recipe = QuantizationModifier(targets="Linear", scheme=SCHEMES[scheme], ignore=["lm_head"])
    data = {}
    if scheme == "nvfp4":
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
