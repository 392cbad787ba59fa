"""The Mistral family (model_type "mistral"): Llama's decoder with a sliding window in every layer."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from mojax.errors import InputError
from mojax.models.llama import FUSED, KEEP, Config, block, blocks, embed, head, read, shapes, size

__all__ = ["FUSED", "KEEP", "Config", "block", "blocks", "configure", "embed", "head", "shapes"]


def configure(config: Mapping[str, Any]) -> Config:
    """Config from a raw config.json; InputError names the key of anything that cannot be done exactly."""
    # A missing window is 4096 positions; a null one is none.
    window = config.get("sliding_window", 4096)
    window = None if window is None else size(config, "sliding_window", 4096)
    kind = "full_attention" if window is None else "sliding_attention"
    if any(t != kind for t in config.get("layer_types") or ()):
        raise InputError(
            f"config.json: layer_types is {config['layer_types']!r}, needed {kind!r} in every layer "
            f"(sliding_window {window})"
        )
    kinds = (kind,) * size(config, "num_hidden_layers")
    family: dict[str, Any] = {"sliding_window": window, "layer_types": kinds}
    if "num_key_value_heads" not in config:
        family["num_key_value_heads"] = 8
    return read(config, **family)
