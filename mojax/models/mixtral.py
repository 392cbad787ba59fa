"""The Mixtral family (model_type "mixtral"): Mistral's decoder with a mixture of experts in every layer."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from mojax.errors import InputError
from mojax.models import llama
from mojax.models.layers import Experts
from mojax.models.llama import Config, block, blocks, embed, head, read, shapes, size

__all__ = ["FUSED", "KEEP", "Config", "block", "blocks", "configure", "embed", "head", "shapes"]

FUSED = (llama.FUSED[0], ("block_sparse_moe.experts.*.w1", "block_sparse_moe.experts.*.w3"))
KEEP = (*llama.KEEP, "model.layers.*.block_sparse_moe.gate.weight")

# What other routers do, by the keys that say so, and the values that mean it is not done.
OTHERS: dict[str, tuple[Any, ...]] = {
    "moe_layer_freq": (None, 1),
    "n_group": (None, 0, 1),
    "n_shared_experts": (None, 0),
    "num_shared_experts": (None, 0),
    "routed_scaling_factor": (None, 1),
    "scoring_func": (None, "softmax"),
    "shared_expert_intermediate_size": (None, 0),
    "topk_method": (None, "greedy"),
}


def configure(config: Mapping[str, Any]) -> Config:
    """Config from a raw config.json; InputError names the key of anything that cannot be done exactly."""
    config = {"rms_norm_eps": 1e-5, "rope_theta": 1e6, **config}
    window = None if config.get("sliding_window") is None else size(config, "sliding_window")
    experts = Experts(
        module="block_sparse_moe",
        names=("w1", "w3", "w2"),
        width=size(config, "intermediate_size"),
        normalise=True,
        rounded=False,
        **counts(config, experts=8, per_token=2),
    )
    family: dict[str, Any] = {"experts": experts, **attention(config, window)}
    return read(config, **family if "num_key_value_heads" in config else family | {"num_key_value_heads": 8})


def attention(config: Mapping[str, Any], window: int | None) -> dict[str, Any]:
    """The fields `sliding_window` and `layer_types` where every layer has the window, or none has (None).

    Raises:
      InputError: `layer_types` says something else.
    """
    kind = "full_attention" if window is None else "sliding_attention"
    if any(t != kind for t in config.get("layer_types") or ()):
        raise InputError(
            f"config.json: layer_types is {config['layer_types']!r}, needed {kind!r} in every layer "
            f"(sliding_window {window})"
        )
    return {"sliding_window": window, "layer_types": (kind,) * size(config, "num_hidden_layers")}


def counts(config: Mapping[str, Any], *, experts: int, per_token: int) -> dict[str, int]:
    """`count` and `per_token` of Experts from `num_local_experts` or `num_experts`, and their defaults.

    Raises:
      InputError: no such number of experts, or a key of another kind of router.
    """
    for key, plain in OTHERS.items():
        if config.get(key) not in plain:
            raise InputError(
                f"config.json: {key} is {config[key]!r}, needed {plain[-1]!r} or no such key; "
                "this family's router is a softmax, and it has no shared experts"
            )
    keys = [k for k in ("num_local_experts", "num_experts") if config.get(k) is not None]
    found = {k: size(config, k) for k in keys}
    if len(set(found.values())) > 1:
        raise InputError(f"config.json: num_experts and num_local_experts are {found}, needed one number")
    count = next(iter(found.values()), experts)
    chosen = size(config, "num_experts_per_tok", per_token)
    if chosen > count:
        raise InputError(
            f"config.json: num_experts_per_tok is {chosen}, needed at most the number of experts ({count})"
        )
    return {"count": count, "per_token": chosen}
