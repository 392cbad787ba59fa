"""Small random checkpoints of Mixture-of-Experts families, as they are published: one tensor per expert."""

from __future__ import annotations

import json
from importlib import resources
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
from safetensors.numpy import save_file

TINY = resources.files("mojax") / "data" / "tiny"  # the tokenizer is that of the built-in model
DTYPES = {"bfloat16": ml_dtypes.bfloat16, "float16": np.float16, "float32": np.float32}
BASE = {
    "attention_dropout": 0.0,
    "bos_token_id": 0,
    "eos_token_id": 1,
    "head_dim": 32,
    "hidden_act": "silu",
    "hidden_size": 128,
    "initializer_range": 0.02,
    "intermediate_size": 64,
    "max_position_embeddings": 256,
    "num_attention_heads": 4,
    "num_experts_per_tok": 2,
    "num_hidden_layers": 2,
    "num_key_value_heads": 2,
    "rms_norm_eps": 1e-6,
    "rope_parameters": {"rope_theta": 10000.0, "rope_type": "default"},
    "tie_word_embeddings": False,
    "use_cache": True,
    "vocab_size": 4096,
}
QWEN3_MOE = BASE | {
    "architectures": ["Qwen3MoeForCausalLM"],
    "attention_bias": False,
    "decoder_sparse_step": 1,
    "intermediate_size": 128,
    "mlp_only_layers": [],
    "model_type": "qwen3_moe",
    "moe_intermediate_size": 64,
    "norm_topk_prob": True,
    "num_experts": 8,
    "sliding_window": None,
    "use_sliding_window": False,
}
MIXTRAL = BASE | {
    "architectures": ["MixtralForCausalLM"],
    "model_type": "mixtral",
    "num_local_experts": 8,
    "sliding_window": None,
}


def tiny_qwen3_moe(
    folder: Path, dtype: str = "bfloat16", *, shards: int = 1, seed: int = 0, **changes: Any
) -> Path:
    """Write a Qwen3-MoE checkpoint to `folder` and return it.

    Args:
      dtype: of every tensor, "bfloat16", "float16" or "float32".
      shards: number of safetensors files; above 1 there is an index, and experts of one layer are parted.
      changes: other values for keys of config.json, e.g. `mlp_only_layers=[0]` for a dense first layer.
    """
    c = QWEN3_MOE | changes
    table = _outside(c)
    for i in range(c["num_hidden_layers"]):
        layer, hidden = f"model.layers.{i}.", c["hidden_size"]
        table |= _attention(c, layer)
        table |= {f"{layer}self_attn.{n}_norm.weight": (c["head_dim"],) for n in "qk"}
        if i in c["mlp_only_layers"] or (i + 1) % c["decoder_sparse_step"]:
            table |= _mlp(
                layer + "mlp.", hidden, c["intermediate_size"], ("gate_proj", "up_proj", "down_proj")
            )
            continue
        table[layer + "mlp.gate.weight"] = (c["num_experts"], hidden)
        for e in range(c["num_experts"]):
            names = ("gate_proj", "up_proj", "down_proj")
            table |= _mlp(f"{layer}mlp.experts.{e}.", hidden, c["moe_intermediate_size"], names)
    return _write(folder, c, table, dtype, shards, seed)


def tiny_mixtral(
    folder: Path, dtype: str = "bfloat16", *, shards: int = 1, seed: int = 0, **changes: Any
) -> Path:
    """Write a Mixtral checkpoint to `folder` and return it; arguments as for `tiny_qwen3_moe`."""
    c = MIXTRAL | changes
    table = _outside(c)
    for i in range(c["num_hidden_layers"]):
        layer, hidden = f"model.layers.{i}.", c["hidden_size"]
        table |= _attention(c, layer)
        table[layer + "block_sparse_moe.gate.weight"] = (c["num_local_experts"], hidden)
        for e in range(c["num_local_experts"]):
            expert = f"{layer}block_sparse_moe.experts.{e}."
            table |= _mlp(expert, hidden, c["intermediate_size"], ("w1", "w3", "w2"))
    return _write(folder, c, table, dtype, shards, seed)


Table = dict[str, tuple[int, ...]]


def _outside(c: dict) -> Table:
    table: Table = {
        "model.embed_tokens.weight": (c["vocab_size"], c["hidden_size"]),
        "model.norm.weight": (c["hidden_size"],),
    }
    head: Table = {"lm_head.weight": (c["vocab_size"], c["hidden_size"])}
    return table if c["tie_word_embeddings"] else table | head


def _attention(c: dict, layer: str) -> Table:
    hidden, q, kv = (
        c["hidden_size"],
        *(c[k] * c["head_dim"] for k in ("num_attention_heads", "num_key_value_heads")),
    )
    return {
        f"{layer}input_layernorm.weight": (hidden,),
        f"{layer}post_attention_layernorm.weight": (hidden,),
        f"{layer}self_attn.q_proj.weight": (q, hidden),
        f"{layer}self_attn.k_proj.weight": (kv, hidden),
        f"{layer}self_attn.v_proj.weight": (kv, hidden),
        f"{layer}self_attn.o_proj.weight": (hidden, q),
    }


def _mlp(prefix: str, hidden: int, inner: int, names: tuple[str, str, str]) -> Table:
    gate, up, down = (f"{prefix}{n}.weight" for n in names)
    return {gate: (inner, hidden), up: (inner, hidden), down: (hidden, inner)}


def _write(folder: Path, config: dict, table: Table, dtype: str, shards: int, seed: int) -> Path:
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    rng = np.random.default_rng(seed)
    tensors = {name: _draw(rng, name, shape).astype(DTYPES[dtype]) for name, shape in sorted(table.items())}
    parts = [dict(list(tensors.items())[i::shards]) for i in range(shards)]
    where: dict[str, str] = {}
    for i, part in enumerate(parts):
        file = "model.safetensors" if shards == 1 else f"model-{i + 1:05}-of-{shards:05}.safetensors"
        save_file(part, folder / file, metadata={"format": "pt"})
        where |= dict.fromkeys(part, file)
    if shards > 1:
        total = sum(t.nbytes for t in tensors.values())
        index = {"metadata": {"total_size": total}, "weight_map": where}
        (folder / "model.safetensors.index.json").write_text(json.dumps(index, indent=2))
    (folder / "config.json").write_text(json.dumps(config | {"dtype": dtype}, indent=2))
    for name in ("tokenizer.json", "tokenizer_config.json", "generation_config.json"):
        (folder / name).write_bytes((TINY / name).read_bytes())
    return folder


def _draw(rng: np.random.Generator, name: str, shape: tuple[int, ...]) -> np.ndarray:
    """Weights that keep a residual stream near 1, with outlier channels, and logits of about 2."""
    noise = rng.standard_normal(shape).astype(np.float32)
    if "norm" in name:
        gain = 1 + 0.1 * noise
        if "layernorm" in name:
            gain[rng.choice(shape[0], 3, replace=False)] *= 5
        return gain
    if "embed_tokens" in name:
        return 0.5 * noise
    scale = 2.0 if name == "lm_head.weight" else 0.7
    return scale * noise / np.float32(shape[1] ** 0.5)
