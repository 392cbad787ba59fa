"""The Qwen3-MoE family (model_type "qwen3_moe"): Qwen3's decoder with a mixture of experts in most layers."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from mojax.errors import InputError
from mojax.models import llama
from mojax.models.layers import Experts
from mojax.models.llama import DENSE, Config, block, blocks, embed, head, read, shapes, size
from mojax.models.mixtral import attention, counts

__all__ = ["FUSED", "KEEP", "Config", "block", "blocks", "configure", "embed", "head", "shapes"]

FUSED = (*llama.FUSED, ("mlp.experts.*.gate_proj", "mlp.experts.*.up_proj"))
KEEP = (*llama.KEEP, "model.layers.*.mlp.gate.weight")


def configure(config: Mapping[str, Any]) -> Config:
    """Config from a raw config.json; InputError names the key of anything that cannot be done exactly."""
    window = None
    if config.get("use_sliding_window", False) and config.get("sliding_window", 4096) is not None:
        window = size(config, "sliding_window", 4096)  # in every layer: max_window_layers is not read
    experts = Experts(
        module="mlp",
        names=("gate_proj", "up_proj", "down_proj"),
        width=size(config, "moe_intermediate_size", 768),
        normalise=bool(config.get("norm_topk_prob", False)),
        rounded=True,
        **counts(config, experts=128, per_token=8),
    )
    bias = bool(config.get("attention_bias", False))
    family: dict[str, Any] = {"qkv_bias": bias, "output_bias": bias, "qk_norm": True, "experts": experts}
    family |= attention(config, window)
    dense = _dense(config, len(family["layer_types"]))
    family["layer_types"] = tuple(k + DENSE * (i in dense) for i, k in enumerate(family["layer_types"]))
    return read(config, **family if "num_key_value_heads" in config else family | {"num_key_value_heads": 4})


def _dense(config: Mapping[str, Any], layers: int) -> set[int]:
    """The layers without experts: those of `mlp_only_layers`, and all but every `decoder_sparse_step`th."""
    listed = config.get("mlp_only_layers")
    listed = [] if listed is None else listed
    if not isinstance(listed, list) or any(type(i) is not int for i in listed):
        raise InputError(f"config.json: mlp_only_layers is {listed!r}, needed a list of layer numbers")
    step = size(config, "decoder_sparse_step", 1)
    return set(listed) | {i for i in range(layers) if (i + 1) % step}
