"""The Qwen3 family (model_type "qwen3"): Llama's decoder with RMSNorm on every head of q and k."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from mojax.models.llama import FUSED, KEEP, Config, block, blocks, embed, head, read, shapes, size
from mojax.models.qwen2 import windows

__all__ = ["FUSED", "KEEP", "Config", "block", "blocks", "configure", "embed", "head", "shapes"]


def configure(config: Mapping[str, Any]) -> Config:
    """Config from a raw config.json; InputError names the key of anything that cannot be done exactly."""
    bias = bool(config.get("attention_bias", False))
    head_dim = size(config, "head_dim", 128)
    return read(config, qkv_bias=bias, output_bias=bias, qk_norm=True, head_dim=head_dim, **windows(config))
