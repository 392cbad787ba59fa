"""Plain torch experts for a vLLM on a CPU, whose wheel has no quantized kernel for them.

vLLM chooses the scheme, creates the parameters and loads every expert's tensors into them; what follows its
loading is replaced: decoding, quantizing inputs, and the experts' arithmetic.
"""

# pyright: reportMissingImports=false

from __future__ import annotations

from importlib import import_module
from typing import Any

import torch

LAYERS = "vllm.model_executor.layers.quantization"
THERE = f"{LAYERS}.compressed_tensors.compressed_tensors_moe.compressed_tensors_moe"
E4M3 = torch.float8_e4m3fn
E2M1 = torch.tensor([0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0])
LOADED = "mojax_experts"  # attribute of a layer: its decoded matrices


def tiled(scale: torch.Tensor, shape: torch.Size) -> torch.Tensor:
    """Scales `[experts]`, `[experts, halves]`, or `[experts, n, k]` of any blocks, spread over `shape`."""
    scale = scale.float()
    if scale.ndim < 3:
        scale = scale.reshape(shape[0], -1, 1)
    for axis in (1, 2):
        times = -(-shape[axis] // scale.shape[axis])
        scale = scale.repeat_interleave(times, axis).narrow(axis, 0, shape[axis])
    return scale


def exponents(scale: torch.Tensor) -> torch.Tensor:
    """2^(s - 127) of uint8 scales, float32."""
    return torch.exp2(scale.float() - 127)


def e2m1(packed: torch.Tensor) -> torch.Tensor:
    """uint8 `[..., k / 2]`, low nibble first -> float32 `[..., k]`."""
    codes = torch.stack((packed & 15, packed >> 4), dim=-1).flatten(-2).long()
    return E2M1[codes & 7] * (1.0 - 2.0 * (codes >> 3))


def round_e2m1(x: torch.Tensor) -> torch.Tensor:
    """Nearest E2M1 value, ties to the even mantissa."""
    step = torch.exp2(torch.frexp(x)[1].clamp(min=1).float() - 2)
    return (torch.round(x / step) * step).clamp(-6, 6)


def nibbles(words: torch.Tensor, axis: int) -> torch.Tensor:
    """int32 of eight unsigned nibbles, little-endian, unpacked along `axis`."""
    parts = [(words >> shift) & 15 for shift in range(0, 32, 4)]
    return torch.stack(parts, dim=axis + 1).flatten(axis, axis + 1)


def weight(layer: Any, which: str) -> torch.Tensor:
    """float32 `[experts, n, k]` of w13 (gate over up) or w2, from what vLLM loaded."""
    found = {
        name.removeprefix(f"{which}_"): p.data
        for name, p in layer.named_parameters()
        if name.startswith(f"{which}_")
    }
    codes = found.get("weight_packed", found.get("weight"))
    assert codes is not None
    scale = found["weight_scale"]
    if codes.dtype == torch.int32:
        values = nibbles(codes, 2).float()
        zero = nibbles(found["weight_zero_point"], 1).float() if "weight_zero_point" in found else 8.0
        zero = tiled(zero, values.shape) if isinstance(zero, torch.Tensor) else zero
        return (values - zero) * tiled(scale, values.shape)
    if codes.dtype == torch.uint8:
        values = e2m1(codes)
        if scale.dtype == torch.uint8:
            return values * tiled(exponents(scale), values.shape)
        if "weight_global_scale" in found:  # a divisor
            outer = tiled(found["weight_global_scale"], values.shape)
            return values * (tiled(scale, values.shape) / outer)
        return values * tiled(scale, values.shape) * tiled(found["weight_scale_2"], values.shape)
    scale = exponents(scale) if scale.dtype == torch.uint8 else scale
    return codes.float() * tiled(scale, codes.shape)


def one(scales: torch.Tensor) -> torch.Tensor:
    """The scale of the inputs of a layer: all experts must have the same."""
    assert bool((scales == scales.reshape(-1)[0]).all()), f"experts differ in input scales: {scales}"
    return scales.reshape(-1)[0].float()


def token(x: torch.Tensor, largest: float, width: int | None = None) -> tuple[torch.Tensor, torch.Tensor]:
    """Rows, or groups of `width` of them, over their scale, and the scale."""
    groups = x.float().unflatten(-1, (-1, width or x.shape[-1]))
    scale = groups.abs().amax(-1, keepdim=True).clamp(min=1e-12) / largest
    return groups / scale, scale


def inputs(layer: Any, which: str, scheme: str, x: torch.Tensor) -> torch.Tensor:
    """`x [tokens, k]` quantized as a checkpoint says: "none", or a kind of inputs."""
    if scheme == "none":
        return x
    if scheme == "fp8 tensor":
        scale = one(getattr(layer, f"{which}_input_scale"))
        y = (x.float() / scale).clamp(-448, 448).to(E4M3).float() * scale
    elif scheme in ("fp8 token", "fp8 group"):
        q, scale = token(x, 448, 128 if scheme == "fp8 group" else None)
        y = (q.clamp(-448, 448).to(E4M3).float() * scale).flatten(-2)
    elif scheme == "int8 token":
        q, scale = token(x, 127)
        y = (q.round().clamp(-128, 127) * scale).flatten(-2)
    elif scheme == "nvfp4":
        outer = getattr(layer, f"{which}_input_global_scale", None)
        divisor = one(outer) if outer is not None else 1 / one(getattr(layer, f"{which}_input_scale"))
        groups = x.float().unflatten(-1, (-1, 16))
        inner = (divisor * groups.abs().amax(-1, keepdim=True) / 6).clamp(max=448).to(E4M3).float()
        step = torch.where(inner == 0, torch.ones_like(inner), inner / divisor)
        y = (round_e2m1((groups / step).clamp(-6, 6)) * step * (inner != 0)).flatten(-2)
    else:
        raise AssertionError(f"unknown inputs {scheme}")
    return y.to(x.dtype)


def kind(args: Any) -> str:
    """`input_activations` of a config group as a word."""
    if not args:
        return "none"
    name = f"{'fp' if args['type'] == 'float' else 'int'}{args['num_bits']}"
    size = args.get("group_size")
    if size in (16, 32):
        return {16: "nvfp4", 32: f"mx{name}"}[size]
    if size == 128:
        return f"{name} group"
    return f"{name} {'token' if args.get('dynamic') else 'tensor'}"


class Kernel:
    """What a method asks of its kernel before the weights are loaded."""

    @staticmethod
    def is_monolithic() -> bool:
        return False


def register(config: dict[str, Any], more: dict[str, Any]) -> None:
    """Replace what follows loading in every method for experts.

    Args:
      config: `quantization_config` of the checkpoint that is loaded next; all experts have its first scheme.
      more: kind of inputs -> function of `x`, for those that the caller has.
    """
    groups = list(config.get("config_groups", {}).values())
    said = kind(groups[0].get("input_activations") if groups else None)
    if config.get("quant_algo") == "MXFP8":
        said = "mxfp8"

    def process(self: Any, layer: Any) -> None:
        dtype = torch.get_default_dtype()
        setattr(layer, LOADED, {which: weight(layer, which).to(dtype) for which in ("w13", "w2")})

    def apply(self: Any, layer: Any, x: Any, topk_weights: Any, topk_ids: Any, *_: Any, **__: Any) -> Any:
        def fake(which: str, rows: torch.Tensor) -> torch.Tensor:
            return more[said](rows) if said in more else inputs(layer, which, said, rows)

        matrices = getattr(layer, LOADED)
        out = torch.zeros(x.shape, dtype=torch.float32)
        for expert in range(len(matrices["w2"])):
            row, slot = torch.where(topk_ids == expert)
            if len(row):
                both = torch.nn.functional.linear(fake("w13", x[row]), matrices["w13"][expert])
                gate, up = both.chunk(2, dim=-1)
                hidden = torch.nn.functional.silu(gate.float()).to(x.dtype) * up
                y = torch.nn.functional.linear(fake("w2", hidden), matrices["w2"][expert])
                out.index_add_(0, row, y.float() * topk_weights[row, slot, None].float())
        return out.to(x.dtype)

    for module in methods():
        for name, value in vars(module).items():
            if name.startswith("select_") and name.endswith("_moe_backend"):
                setattr(module, name, lambda *_, **__: (None, Kernel))
            if (
                isinstance(value, type)
                and hasattr(value, "apply_monolithic")
                and value.__module__ == module.__name__
            ):
                value.process_weights_after_loading, value.apply = process, apply
                value.get_fused_moe_quant_config = lambda self, layer: None


def methods() -> list[Any]:
    """The modules that define methods for experts."""
    kinds = ("w4a4_mxfp4", "w4a4_nvfp4", "w8a8_fp8", "w8a8_int8", "w8a8_mxfp8", "wna16")
    return [import_module(f"{THERE}_{name}") for name in kinds] + [import_module(f"{LAYERS}.modelopt")]
