"""The Qwen2 and Qwen2.5 family (model_type "qwen2"): Llama's decoder with biases on q, k and v."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from mojax.errors import InputError
from mojax.models.llama import FUSED, KEEP, Config, block, blocks, embed, head, read, shapes, size

__all__ = ["FUSED", "KEEP", "Config", "block", "blocks", "configure", "embed", "head", "shapes", "windows"]


def configure(config: Mapping[str, Any]) -> Config:
    """Config from a raw config.json; InputError names the key of anything that cannot be done exactly."""
    return read(config, qkv_bias=True, **windows(config))


def windows(config: Mapping[str, Any]) -> dict[str, Any]:
    """The fields `sliding_window` and `layer_types`, and `num_key_value_heads` where its key is missing.

    `layer_types` says it layer by layer; without it the layers from `max_window_layers` on have the window.

    Raises:
      InputError: another kind of attention, a wrong count, a sliding layer without a window.
    """
    count, window = size(config, "num_hidden_layers"), None
    if config.get("use_sliding_window", False) and config.get("sliding_window", 4096) is not None:
        window = size(config, "sliding_window", 4096)
    first = config.get("max_window_layers", 28)
    kinds = config.get("layer_types") or [
        "full_attention" if window is None or i < first else "sliding_attention" for i in range(count)
    ]
    allowed = ("full_attention",) if window is None else ("full_attention", "sliding_attention")
    if len(kinds) != count or not set(kinds) <= set(allowed):
        raise InputError(
            f"config.json: layer_types is {list(kinds)!r}, needed {count} of {' or '.join(allowed)} "
            f"(use_sliding_window {config.get('use_sliding_window', False)}, sliding_window {window})"
        )
    fields: dict[str, Any] = {"sliding_window": window, "layer_types": tuple(kinds)}
    return fields if "num_key_value_heads" in config else fields | {"num_key_value_heads": 32}
