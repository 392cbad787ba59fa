"""One quantization with NVIDIA ModelOpt as its documentation shows it; run by its own environment's python.

    python ptq_modelopt.py MODEL_DIR TOKENS.npz SCHEME OUT_DIR

SCHEME is nvfp4 (calibrated on every row of `tokens`), fp8_dynamic or int4 (group 128); the last two need no
data, so none is given. Prints one line of JSON: versions and the seconds of each phase.
"""

# pyright: reportMissingImports=false

import json
import sys
import time

start = time.perf_counter()

import modelopt  # noqa: E402
import modelopt.torch.quantization as mtq  # noqa: E402
import numpy as np  # noqa: E402
import torch  # noqa: E402
import transformers  # noqa: E402
from modelopt.torch.export import export_hf_checkpoint  # noqa: E402

SCHEMES = {
    "nvfp4": mtq.NVFP4_DEFAULT_CFG,
    "fp8_dynamic": mtq.FP8_PER_CHANNEL_PER_TOKEN_CFG,
    "int4": mtq.INT4_BLOCKWISE_WEIGHT_ONLY_CFG,
}


def main() -> None:
    model_dir, tokens_file, scheme, out = sys.argv[1:]
    imported = time.perf_counter()
    model = transformers.AutoModelForCausalLM.from_pretrained(model_dir, dtype="auto")
    loaded = time.perf_counter()

    def forward_loop(model):
        with torch.no_grad():
            for row in torch.from_numpy(np.load(tokens_file)["tokens"]).long():
                model(row[None])

    model = mtq.quantize(model, SCHEMES[scheme], forward_loop if scheme == "nvfp4" else None)
    quantized = time.perf_counter()
    with torch.inference_mode():
        export_hf_checkpoint(model, export_dir=out)
    said = {
        "versions": {package.__name__: package.__version__ for package in (modelopt, transformers, torch)},
        "import": imported - start,
        "load": loaded - imported,
        "quantize": quantized - loaded,
        "save": time.perf_counter() - quantized,
    }
    print(json.dumps(said))


if __name__ == "__main__":
    main()
