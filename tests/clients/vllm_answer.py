"""Ask a real vLLM on a CPU what it computes with checkpoint folders; run by its own environment's python.

    python vllm_answer.py FOLDER TOKENS.npz OUT.npz [FOLDER TOKENS.npz OUT.npz ...]

TOKENS.npz holds one integer array [sequences, length] (key `--key`). OUT.npz gets
    logprobs   float32 [sequences, length - 1, vocabulary]: row t is log p(. | tokens[:t + 1])
    generated  int32 [sequences, new]: greedy continuation of the first half of every row
    seconds    float64 []: loading and answering
    kernels    str [..]: the kernel class of every quantized linear layer, `module=Kernel`

The wheel has no CPU kernel for NVFP4, MXFP4, MXFP8, static FP8, Hadamard blocks and (without AMX) FP8 blocks.
Plain torch kernels are registered for those. Nothing else of vLLM is replaced: reading the config,
matching targets and ignore lists, loading fused layers and interpreting scales is what this is there for.
"""

# pyright: reportMissingImports=false

import argparse
import gc
import json
import os
import sys
import time
from pathlib import Path
from typing import Any

os.environ.update(
    VLLM_CPU_KVCACHE_SPACE="1",
    VLLM_CPU_OMP_THREADS_BIND="nobind",
    VLLM_CPU_INT4_W4A8="0",  # W4A16 means 16 bit inputs
    VLLM_ENABLE_V1_MULTIPROCESSING="0",
    VLLM_NO_USAGE_STATS="1",
    VLLM_LOGGING_LEVEL=os.environ.get("VLLM_LOGGING_LEVEL", "ERROR"),
    HF_HUB_OFFLINE="1",
    TORCH_CPP_LOG_LEVEL="ERROR",
)

import numpy as np
import torch

# The AMX int4 kernels of the wheel end in SIGILL on some virtual machines.
torch.cpu._is_amx_tile_supported = lambda: False

import vllm.model_executor.kernels.linear as linear  # noqa: E402
import vllm_experts  # noqa: E402  (beside this file)
from vllm.platforms import PlatformEnum  # noqa: E402

E4M3 = torch.float8_e4m3fn
E2M1 = torch.tensor([0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0])


def unpack_e2m1(packed: torch.Tensor) -> torch.Tensor:
    """uint8 [N, K/2], low nibble first -> float32 [N, K]."""
    codes = torch.stack((packed & 15, packed >> 4), dim=-1).flatten(-2).long()
    return E2M1[codes & 7] * (1.0 - 2.0 * (codes >> 3))


def round_e2m1(x: torch.Tensor) -> torch.Tensor:
    """Nearest E2M1 value, ties to the even mantissa; |x| <= 6."""
    exponent = torch.frexp(x)[1].clamp(min=1) - 1  # 0 for |x| < 2, then 1, 2
    step = power_of_two(exponent - 1)
    return torch.round(x / step) * step


def power_of_two(exponent: torch.Tensor) -> torch.Tensor:
    """2^exponent in float32, exactly; exponents of subnormals are raised to -126."""
    return ((exponent.int().clamp(-126, 127) + 127) << 23).view(torch.float32)


def parameter(weight: torch.Tensor) -> torch.nn.Parameter:
    """In the dtype of the model, which is the default one while vLLM loads."""
    return torch.nn.Parameter(weight.to(torch.get_default_dtype()), requires_grad=False)


def fake_mxfp4(x: torch.Tensor) -> torch.Tensor:
    """Inputs through MXFP4 as compressed-tensors does: 2^(floor(log2 amax) - 2), one more from 1.75 * 2^n."""
    blocks = x.float().unflatten(-1, (-1, 32))
    mantissa, exponent = torch.frexp(blocks.abs().amax(-1, keepdim=True))  # mantissa in [0.5, 1)
    scale = power_of_two(exponent - 3 + (mantissa >= 0.875).int())
    return (round_e2m1((blocks / scale).clamp(-6, 6)) * scale).flatten(-2).to(x.dtype)


class Nvfp4WeightOnly(linear.NvFp4LinearKernel):
    """y = x W^T with W = e2m1 * (e4m3 block scale * outer scale), the outer scale a factor here."""

    @classmethod
    def is_supported(cls, compute_capability=None):
        return True, None

    @classmethod
    def can_implement(cls, config):
        return True, None

    def process_weights_after_loading(self, layer):
        scale = layer.weight_scale.float() * layer.weight_global_scale
        weight = unpack_e2m1(layer.weight.data).unflatten(-1, (-1, 16)) * scale[..., None]
        layer.weight = parameter(weight.flatten(-2))

    def apply_weights(self, layer, x, bias=None):
        return torch.nn.functional.linear(x, layer.weight, bias)


class Mxfp4(linear.MxFp4LinearKernel):
    """W = e2m1 * 2^(s - 127); inputs through MXFP4 as well unless `WEIGHT_ONLY`.

    vLLM 0.32 does not look at `input_activations` here: the platform's kernel decides. `answer` puts the
    class that the folder's config asks for in the table.
    """

    WEIGHT_ONLY = False

    @classmethod
    def is_supported(cls, compute_capability=None):
        return True, None

    @classmethod
    def can_implement(cls, config):
        return True, None

    def process_weights_after_loading(self, layer):
        scale = power_of_two(layer.weight_scale.data.int() - 127)
        weight = unpack_e2m1(layer.weight.data).unflatten(-1, (-1, 32)) * scale[..., None]
        layer.weight = parameter(weight.flatten(-2))

    def apply_weights(self, layer, x, bias=None):
        x = x if self.WEIGHT_ONLY else fake_mxfp4(x)
        return torch.nn.functional.linear(x, layer.weight, bias)


class Mxfp4WeightOnly(Mxfp4):
    WEIGHT_ONLY = True


def fake_mxfp8(x: torch.Tensor) -> torch.Tensor:
    """Inputs through MXFP8, as vLLM's own functions do it."""
    from vllm.model_executor.layers.quantization.utils import mxfp8_utils

    return mxfp8_utils.dequant_mxfp8_to_bf16(*mxfp8_utils.mxfp8_e4m3_quantize(x)).to(x.dtype)


class Mxfp8(linear.EmulationMxfp8LinearKernel):
    """vLLM's emulation with the input quantization that it leaves out."""

    def apply_weights(self, layer, x, bias=None):
        return super().apply_weights(layer, fake_mxfp8(x), bias)


class Fp8Block(linear.Fp8BlockScaledMMLinearKernel):
    """W = e4m3 * scale of its 128x128 block, inputs per 128: for CPUs without AMX."""

    @classmethod
    def is_supported(cls, compute_capability=None):
        return True, None

    def process_weights_after_loading(self, layer):
        layer.weight = torch.nn.Parameter(layer.weight.data, requires_grad=False)

    def apply_weights(self, layer, x, bias=None, **_):
        scale = self._get_layer_params(layer).block_scale.float()
        rows, columns = layer.weight.shape
        tile = scale.repeat_interleave(128, 0)[:rows].repeat_interleave(128, 1)[:, :columns]
        blocks = x.float().unflatten(-1, (-1, 128))
        amax = blocks.abs().amax(-1, keepdim=True).clamp(min=1e-12)
        x_scale = amax / 448
        inputs = ((blocks / x_scale).clamp(-448, 448).to(E4M3).float() * x_scale).flatten(-2)
        return torch.nn.functional.linear(inputs, layer.weight.float() * tile, bias).to(x.dtype)

    def apply_block_scaled_mm(self, A, B, As, Bs):
        raise AssertionError("apply_weights does it all")


def choose_nvfp4(use_a16: bool = False):
    """vLLM's own emulation for W4A4; it has none for weight-only."""
    kernel = Nvfp4WeightOnly if use_a16 else linear.EmulationNvFp4LinearKernel
    return kernel(linear.NvFp4LinearLayerConfig())


def static_fp8(output, x, scale, group_shape=None):
    """_C::static_scaled_fp8_quant: e4m3(x / scale), one scale."""
    assert scale.numel() == 1, f"static FP8 with {tuple(scale.shape)} scales, known is one per tensor"
    output.copy_((x.float() / scale.float()).clamp(-448, 448).to(E4M3))


def silu_and_mul_fp8(output, x, scale):
    """_C::silu_and_mul_quant: e4m3(silu(gate) * up / scale), x = [gate, up]."""
    gate, up = x.float().chunk(2, dim=-1)
    static_fp8(output, (torch.nn.functional.silu(gate) * up).to(x.dtype), scale)


def hadacore(x, inplace):
    """_C::hadacore_transform: x H / sqrt(n) along the last axis, with Sylvester's matrix; a new tensor."""
    turned, width = x.float(), 1
    while width < x.shape[-1]:
        a, b = turned.unflatten(-1, (-1, 2, width)).unbind(-2)
        turned, width = torch.stack((a + b, a - b), dim=-2).flatten(-3), 2 * width
    return (turned / x.shape[-1] ** 0.5).to(x.dtype)


def register() -> None:
    """Put the kernels above where vLLM looks for them; before vLLM imports its quantization schemes."""
    linear.init_nvfp4_linear_kernel = choose_nvfp4
    linear._POSSIBLE_MXFP8_KERNELS[PlatformEnum.CPU] = [Mxfp8]
    linear._POSSIBLE_FP8_BLOCK_KERNELS[PlatformEnum.CPU].append(Fp8Block)
    operators: Any = torch.ops._C
    operators.static_scaled_fp8_quant = static_fp8
    operators.silu_and_mul_quant = silu_and_mul_fp8
    operators.hadacore_transform = hadacore


def has_inputs(folder: Path) -> bool:
    """Whether any group of the checkpoint's config quantizes inputs."""
    config = json.loads((folder / "config.json").read_text()).get("quantization_config", {})
    return any(group.get("input_activations") for group in config.get("config_groups", {}).values())


def log_probabilities(output, vocabulary: int) -> np.ndarray:
    """A request's flat prompt log-probabilities -> [length - 1, vocabulary]; every id exactly covered."""
    flat = output.prompt_logprobs
    result = np.full((len(flat) - 1, vocabulary), np.nan, np.float32)
    tokens, values = np.asarray(flat.token_ids), np.asarray(flat.logprobs, np.float32)
    for row in range(1, len(flat)):
        span = slice(flat.start_indices[row], flat.end_indices[row])
        result[row - 1, tokens[span]] = values[span]
    missing = int(np.isnan(result).sum())
    if missing:
        raise SystemExit(f"{missing} log-probabilities are missing or NaN")
    return result


def kernels(llm) -> list[str]:
    """`module=Kernel` of every linear layer that vLLM treats as quantized."""

    def visit(model):
        found = []
        for name, module in model.named_modules():
            scheme = getattr(module, "scheme", None) or getattr(module, "quant_method", None)
            if hasattr(module, vllm_experts.LOADED):
                found.append(f"{name}=Experts")
            for attribute in ("kernel", "fp8_linear"):
                if hasattr(scheme, attribute):
                    found.append(f"{name}={type(getattr(scheme, attribute)).__name__}")
        return found

    return llm.apply_model(visit)[0]


def rank_of(folder: Path) -> int:
    """The rank of the folder's LoRA adapter, 0 for none."""
    path = folder / "adapter" / "adapter_config.json"
    return json.loads(path.read_text())["r"] if path.exists() else 0


def answer(folder: Path, tokens: np.ndarray, new: int) -> dict[str, np.ndarray]:
    """Load one folder, score the rows and continue their first halves; then free the engine."""
    from vllm import LLM, SamplingParams
    from vllm.distributed import cleanup_dist_env_and_memory
    from vllm.lora.request import LoRARequest

    linear._POSSIBLE_MXFP4_KERNELS[PlatformEnum.CPU] = [Mxfp4 if has_inputs(folder) else Mxfp4WeightOnly]
    start = time.perf_counter()
    config = json.loads((folder / "config.json").read_text())
    if any(key in config for key in ("num_experts", "num_local_experts")):
        fakes = {"mxfp4": fake_mxfp4, "mxfp8": fake_mxfp8}
        vllm_experts.register(config.get("quantization_config", {}), fakes)
    vocabulary = config["vocab_size"]
    length = tokens.shape[1]
    llm = LLM(
        model=str(folder),
        dtype="auto",
        enforce_eager=True,
        skip_tokenizer_init=True,
        max_model_len=length + 1,
        max_num_seqs=4,
        max_num_batched_tokens=max(512, length + 1),
        max_logprobs=vocabulary,
        enable_prefix_caching=False,
        seed=0,
        use_tqdm_on_load=False,
        **({"enable_lora": True, "max_lora_rank": rank} if (rank := rank_of(folder)) else {}),
    )
    lora = LoRARequest("svd", 1, str(folder / "adapter")) if rank else None
    score = SamplingParams(max_tokens=1, prompt_logprobs=vocabulary, flat_logprobs=True, detokenize=False)
    rows = [{"prompt_token_ids": [int(t) for t in row]} for row in tokens]
    scored = llm.generate(rows, score, use_tqdm=False) if lora is None else []
    if lora is not None:  # vLLM's CPU has no logits of a whole prompt with an adapter: prefix by prefix
        one = SamplingParams(max_tokens=1, logprobs=vocabulary, detokenize=False)
        starts = [{"prompt_token_ids": row["prompt_token_ids"][:n]} for row in rows for n in range(1, length)]
        nexts = llm.generate(starts, one, use_tqdm=False, lora_request=lora)
        found = np.array([[o.outputs[0].logprobs[0][t].logprob for t in range(vocabulary)] for o in nexts])
        found = found.astype(np.float32).reshape(len(rows), length - 1, vocabulary)
    greedy = SamplingParams(temperature=0, max_tokens=new, min_tokens=new, detokenize=False, ignore_eos=True)
    halves = [{"prompt_token_ids": row["prompt_token_ids"][: length // 2]} for row in rows]
    continued = llm.generate(halves, greedy, use_tqdm=False, lora_request=lora)
    result = {
        "logprobs": np.stack([log_probabilities(o, vocabulary) for o in scored]) if scored else found,
        "generated": np.array([output.outputs[0].token_ids for output in continued], np.int32),
        "kernels": np.array(kernels(llm), dtype=str),
        "seconds": np.float64(time.perf_counter() - start),
    }
    del llm
    gc.collect()
    cleanup_dist_env_and_memory()
    return result


def main() -> None:
    parser = argparse.ArgumentParser(description="Ask a real vLLM on a CPU.")
    parser.add_argument("paths", nargs="+", help="FOLDER TOKENS.npz OUT.npz, once or more")
    parser.add_argument("--key", default="tokens", help="name of the array in TOKENS.npz")
    parser.add_argument("--new", type=int, default=8, help="tokens to generate per row")
    arguments = parser.parse_args()
    if len(arguments.paths) % 3:
        parser.error("needs FOLDER TOKENS.npz OUT.npz, once or more")
    register()
    failures = 0
    for folder, tokens, out in zip(*(iter(arguments.paths),) * 3, strict=True):
        try:
            result = answer(Path(folder), np.load(tokens)[arguments.key], arguments.new)
        except Exception as error:  # report it, and go on to the next folder
            print(f"{folder}: FAILED {type(error).__name__}: {str(error)[:2000]}", flush=True)
            failures += 1
            continue
        np.savez(out, allow_pickle=False, **result)
        names = sorted({entry.split("=")[1] for entry in result["kernels"]})
        print(f"{folder}: {result['seconds']:.1f} s, {', '.join(names) or 'no quantized layer'}", flush=True)
    sys.exit(1 if failures else 0)


if __name__ == "__main__":
    main()
