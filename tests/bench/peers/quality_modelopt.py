"""What ModelOpt's algorithms reach; run by its own environment's python, started by quality.py.

Recipes are FORMAT/ALGORITHM, the names of CONFIGS, with the tool's defaults; and nvfp4_weight_only/ALGORITHM
and mxfp4_weight_only/ALGORITHM, which are the same with the input quantizers off. sweep tries all FP8 scales.

ModelOpt simulates FP4 with CUDA kernels only. Here they are replaced by the same arithmetic in torch:
    unit = amax / (6 M), s = e4m3(block_amax / (6 unit)), x~ = e2m1(x / (s unit)) s unit, M = 448, for 4/6 256
and for MX by a power of two, rounded up so that nothing is clipped.
"""

# pyright: reportMissingImports=false

from __future__ import annotations

import copy
from types import SimpleNamespace
from typing import Any

import modelopt
import modelopt.torch.quantization as mtq
import quality_torch
import torch
import transformers
from modelopt.torch.quantization import tensor_quant

BITS = {"nvfp4": 4 + 8 / 16, "mxfp4": 4 + 8 / 32, "int4": 4 + 16 / 128}
STATIC = mtq.NVFP4_W4A4_WEIGHT_MSE_FP8_SWEEP_CFG
CONFIGS = {
    "nvfp4/max": mtq.NVFP4_DEFAULT_CFG,
    "nvfp4/mse": STATIC | {"algorithm": {"method": "mse"}},
    "nvfp4/sweep": STATIC,
    "nvfp4/four_over_six": mtq.NVFP4_FOUR_OVER_SIX_CFG,
    "nvfp4/local_hessian": mtq.NVFP4_W4A4_WEIGHT_LOCAL_HESSIAN_CFG,
    "nvfp4/awq_lite": mtq.NVFP4_AWQ_LITE_CFG,
    "nvfp4/awq_clip": mtq.NVFP4_AWQ_CLIP_CFG,
    "nvfp4/awq_full": mtq.NVFP4_AWQ_FULL_CFG,
    "nvfp4/svdquant": mtq.NVFP4_SVDQUANT_DEFAULT_CFG,
    "nvfp4/gptq": STATIC | {"algorithm": {"method": "gptq", "layerwise": {"enable": True}}},
    "mxfp4/max": mtq.MXFP4_DEFAULT_CFG,
    "int4/max": mtq.INT4_BLOCKWISE_WEIGHT_ONLY_CFG,
    "int4/mse": mtq.INT4_BLOCKWISE_WEIGHT_ONLY_CFG | {"algorithm": {"method": "mse"}},
    "int4/awq_lite": mtq.INT4_AWQ_CFG,
    "int4/awq_clip": mtq.INT4_AWQ_CFG | {"algorithm": {"method": "awq_clip"}},
    "int4/awq_full": mtq.INT4_AWQ_CFG | {"algorithm": {"method": "awq_full", "alpha_step": 0.1}},
    "int4/gptq": mtq.INT4_BLOCKWISE_WEIGHT_ONLY_CFG
    | {"algorithm": {"method": "gptq", "layerwise": {"enable": True}}},
    "int8_static/max": mtq.INT8_DEFAULT_CFG,
    "int8_static/smoothquant": mtq.INT8_SMOOTHQUANT_CFG,
}


def e2m1(y: Any) -> Any:
    """The nearest of 0, .5, 1, 1.5, 2, 3, 4, 6 and their negatives; of two equally near the even code."""
    size = y.abs()
    step = torch.where(size < 2, 0.5, torch.where(size < 4, 1.0, 2.0))
    return torch.sign(y) * (torch.round(size / step) * step).clamp(max=6.0)


def scaled(blocks: Any, scales: Any) -> Any:
    """`blocks [n, size]` rounded at `scales [n, 1]`; a block whose scale is 0 becomes 0."""
    safe = torch.where(scales > 0, scales, torch.ones_like(scales))
    return torch.where(scales > 0, e2m1(blocks / safe) * safe, torch.zeros_like(blocks))


def fp8_scales(amax: Any, largest: Any, top: float = 448.0) -> Any:
    """Scales of blocks with the magnitudes `amax`, in e4m3 times what makes `largest` the value `top`."""
    unit = (largest.float() / (6.0 * top)).clamp(min=torch.finfo(torch.float32).tiny)
    return (amax / (6.0 * unit)).clamp(max=448.0).to(torch.float8_e4m3fn).float() * unit


def dynamic(ctx: Any, x: Any, size: int, amax: Any, bits: Any, scale_bits: Any, *rest: Any) -> Any:
    """In place of `_dynamic_block_quantize_forward`, for E2M1 in blocks along the last axis."""
    if tuple(bits) != (2, 1):
        raise ValueError(f"{bits} in blocks: only E2M1 is simulated here")
    blocks = x.float().reshape(-1, size)
    largest = blocks.abs().amax(dim=1, keepdim=True)
    if tuple(scale_bits) == (8, 0):
        scales = torch.exp2(torch.ceil(torch.log2(largest / 6.0)).clamp(-127, 127))
    else:
        whole = amax.float().amax() if amax is not None else largest.amax()
        scales = fp8_scales(largest, whole)
    return scaled(blocks, scales).reshape(x.shape).to(x.dtype)


def static(x: Any, amax: Any, whole: Any, quantized: bool, top: float, dtype: Any) -> Any:
    """In place of the kernel `static_blockwise_fp4_fake_quant`: every block has the `amax` it was given."""
    largest = amax.float().reshape(-1, 1)
    scales = (
        fp8_scales(largest, largest.amax() if whole is None else whole, top) if quantized else largest / 6
    )
    return scaled(x.float().reshape(len(largest), -1), scales).reshape(x.shape).to(dtype or x.dtype)


def configuration(recipe: str) -> dict[str, Any]:
    """A configuration of the tool; of a weight-only recipe that of both, with input quantizers off."""
    form, _, algorithm = recipe.partition("/")
    found = copy.deepcopy(CONFIGS[f"{form.removesuffix('_weight_only')}/{algorithm}"])
    if form.endswith("_weight_only"):
        found["quant_cfg"] = [*found["quant_cfg"], {"quantizer_name": "*input_quantizer", "enable": False}]
    return found


def quantize(model: Any, tokens: Any, recipe: str) -> float:
    """Changes the model; bits per quantized weight, what runs beside the weights included."""

    def loop(model: Any) -> None:
        with torch.no_grad():
            for row in torch.from_numpy(tokens):
                model(row[None])

    mtq.quantize(model, configuration(recipe), loop)
    form = recipe.split("/")[0].removesuffix("_weight_only")
    folded = ("q_proj", "k_proj", "v_proj", "gate_proj", "up_proj")  # their factors go into the norm
    beside = {m for n, m in quality_torch.linears(model).items() if not n.endswith(folded)}

    def each(layer: Any) -> float:
        count = layer.weight.numel()
        size = 8 * count + 16 * len(layer.weight) if form == "int8_static" else BITS[form] * count
        if layer in beside and getattr(layer.input_quantizer, "pre_quant_scale", None) is not None:
            size += 16 * layer.weight.shape[1]
        added = [m for m in layer.modules() if hasattr(m, "_svdquant_lora_a")]
        return size + sum(16 * (m._svdquant_lora_a.numel() + m._svdquant_lora_b.numel()) for m in added)

    return quality_torch.bits(model, each)


if __name__ == "__main__":
    tensor_quant._dynamic_block_quantize_forward = dynamic
    tensor_quant.triton_kernel = SimpleNamespace(IS_AVAILABLE=True, static_blockwise_fp4_fake_quant=static)
    packages = (modelopt, transformers, torch)
    quality_torch.run("modelopt", quantize, {p.__name__: p.__version__ for p in packages})
