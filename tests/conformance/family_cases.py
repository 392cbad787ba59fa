"""The configurations under which every model family is compared with transformers, and those it refuses."""

import json
import random

BASE = {
    "vocab_size": 61,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "max_position_embeddings": 64,
    "hidden_act": "silu",
    "rms_norm_eps": 1e-5,
}
EXPERTS = {  # what a family adds to BASE
    "mixtral": {"num_local_experts": 8, "num_experts_per_tok": 2},
    "qwen3_moe": {
        "num_experts": 8,
        "num_experts_per_tok": 2,
        "moe_intermediate_size": 24,
        "norm_topk_prob": True,
    },
}
MISSING = object()  # the key is taken out of BASE

# The wavelengths of BASE are 6, 35, 199 and 1117 positions for theta 1000, and 6, 11, 20 and 35 for theta 10:
# some are kept, some divided by the factor, some in between (test_rope_frequencies asserts it).
LLAMA3 = {
    "factor": 4.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 40,
}
YARN = {"factor": 4.0, "original_max_position_embeddings": 32}
ROPES = {
    "rope_theta": {"rope_theta": 500.0},
    "rope_parameters": {"rope_parameters": {"rope_type": "default", "rope_theta": 500.0}},
    "rope_scaling_wins": {
        "rope_scaling": {"rope_type": "linear", "factor": 2.0},
        "rope_parameters": {"rope_type": "default", "rope_theta": 500.0},
    },
    "linear": {"rope_scaling": {"type": "linear", "factor": 4.0}, "rope_theta": 100.0},
    "llama3": {"rope_scaling": {"rope_type": "llama3", **LLAMA3}, "rope_theta": 1000.0},
    "llama3_v5": {"rope_parameters": {"rope_type": "llama3", "rope_theta": 1000.0, **LLAMA3}},
    "llama3_top": {
        "rope_parameters": {"rope_type": "llama3", "rope_theta": 1000.0, **LLAMA3},
        "original_max_position_embeddings": 60,
    },
    "yarn": {"rope_scaling": {"type": "yarn", **YARN}, "rope_theta": 10.0},
    "yarn_v5": {"rope_parameters": {"rope_type": "yarn", "rope_theta": 10.0, **YARN, "beta_fast": 2}},
    "yarn_slow": {"rope_parameters": {"rope_type": "yarn", "rope_theta": 10.0, **YARN, "beta_slow": 0.5}},
    "yarn_exact_range": {
        "rope_parameters": {"rope_type": "yarn", **YARN, "truncate": False, "attention_factor": 1.5},
        "rope_theta": 10.0,
    },
    "yarn_mscale": {
        "rope_parameters": {"type": "yarn", **YARN, "factor": None, "mscale": 2.0, "mscale_all_dim": 0.5},
        "rope_theta": 10.0,
    },
}
PUBLISHED = {  # Llama 3.1 8B, Qwen2.5 7B with its long-context setting
    "llama3_1": {
        "head_dim": 128,
        "max_position_embeddings": 131072,
        "rope_theta": 500000.0,
        "rope_scaling": {"type": "llama3", **LLAMA3, "factor": 8.0, "original_max_position_embeddings": 8192},
    },
    "qwen2_5": {
        "head_dim": 128,
        "max_position_embeddings": 32768,
        "rope_theta": 1000000.0,
        "rope_scaling": {"type": "yarn", "factor": 4.0, "original_max_position_embeddings": 32768},
    },
}
CASES = ROPES | {
    "grouped": {},
    "defaults": {
        "num_key_value_heads": 4,
        "head_dim": MISSING,
        "hidden_act": MISSING,
        "rms_norm_eps": MISSING,
    },
    "wide_heads": {"head_dim": 16},
    "one_kv_head": {"num_key_value_heads": 1},
    "tied": {"tie_word_embeddings": True},
    "gelu": {"hidden_act": "gelu"},
    "gelu_tanh": {"hidden_act": "gelu_pytorch_tanh"},
    "relu": {"hidden_act": "relu", "attention_dropout": 0.5},
}
WINDOWS = {
    "window": {"use_sliding_window": True, "sliding_window": 8, "max_window_layers": 1},
    "window_off": {"use_sliding_window": False, "sliding_window": 8, "max_window_layers": 0},
    "layer_types": {"use_sliding_window": True, "sliding_window": 5}
    | {"layer_types": ["sliding_attention", "full_attention"]},
    "kv_heads_missing": {"num_attention_heads": 32, "num_key_value_heads": MISSING},
    "kv_heads_null": {"num_key_value_heads": None},
}
ROUTERS = {
    "one_expert": {"num_experts_per_tok": 1},
    "every_expert": {"num_experts_per_tok": 8},
    "many_experts": {"num_experts": 40, "num_experts_per_tok": 6},
}
BIASES = {"attention_bias": {"attention_bias": True}, "no_attention_bias": {"attention_bias": False}}
OWN = {
    "llama": BIASES
    | {
        "mlp_bias": {"mlp_bias": True},
        "kv_heads_missing": {"num_key_value_heads": MISSING, "sliding_window": 3},
    },
    "mixtral": ROUTERS
    | {
        "window": {"sliding_window": 8},
        "kv_heads_missing": {"num_attention_heads": 16, "num_key_value_heads": MISSING},
        "head_dim_missing": {"head_dim": MISSING},
    },
    "qwen3_moe": ROUTERS
    | BIASES
    | {
        "no_renormalising": {"norm_topk_prob": False},
        "some_dense": {"mlp_only_layers": [0]},
        "sparse_step": {"decoder_sparse_step": 2},
        "window": {"use_sliding_window": True, "sliding_window": 8, "max_window_layers": 1},
        "window_dense": {"use_sliding_window": True, "sliding_window": 5, "mlp_only_layers": [1]},
        "window_off": {"use_sliding_window": False, "sliding_window": 8},
        "kv_heads_missing": {"num_attention_heads": 16, "num_key_value_heads": MISSING},
        "head_dim_missing": {"head_dim": MISSING},
        "mlp_bias_unread": {"mlp_bias": True},
    },
    "mistral": {
        "window": {"sliding_window": 8},
        "no_window": {"sliding_window": None},
        "kv_heads_missing": {"num_attention_heads": 16, "num_key_value_heads": MISSING},
    },
    "qwen2": WINDOWS,
    "qwen3": WINDOWS | BIASES | {"head_dim_128": {"head_dim": MISSING}},
}


def draw(family: str, seed: int) -> dict:
    """A random configuration: one rope, and each of the family's own features with chance one half."""
    rng = random.Random(f"{family} {seed}")
    kv_heads = rng.choice([1, 2, 3])
    config = {
        "hidden_size": kv_heads * 24,
        "num_key_value_heads": kv_heads,
        "num_attention_heads": kv_heads * rng.choice([1, 2, 4]),
        "head_dim": rng.choice([4, 6, 10]),
        "num_hidden_layers": 2,
        "tie_word_embeddings": rng.random() < 0.5,
    }
    own = {
        k: v
        for k, v in OWN.get(family, {}).items()
        if k not in ("kv_heads_missing", "kv_heads_null", "head_dim_128", "head_dim_missing")
    }
    for feature in own.values():
        config |= feature if rng.random() < 0.5 else {}
    return config | rng.choice(list(ROPES.values()))


def raw(family: str, changes: dict) -> dict:
    """The config.json of a case."""
    config = {"model_type": family, **BASE, **EXPERTS.get(family, {}), **changes}
    if family == "mixtral" and "num_experts" in changes and "num_local_experts" not in changes:
        config["num_local_experts"] = config.pop("num_experts")
    return json.loads(json.dumps({k: v for k, v in config.items() if v is not MISSING}))


BAD = {
    "unknown_rope": ({"rope_scaling": {"rope_type": "longrope"}}, r"rope_scaling\.rope_type"),
    "dynamic_rope": (
        {"rope_parameters": {"rope_type": "dynamic", "factor": 2.0}},
        r"rope_parameters\.rope_type",
    ),
    "nested_rope": ({"rope_parameters": {"full_attention": {"rope_type": "default"}}}, "rope_parameters"),
    "rope_text": ({"rope_scaling": "linear"}, "rope_scaling"),
    "no_factor": ({"rope_scaling": {"type": "linear"}}, r"rope_scaling\.factor"),
    "no_low": (
        {"rope_parameters": {"rope_type": "llama3", "factor": 2.0}},
        r"rope_parameters\.low_freq_factor",
    ),
    "partial": ({"partial_rotary_factor": 0.5}, "partial_rotary_factor"),
    "theta": ({"rope_theta": None}, "rope_theta"),
    "odd": ({"head_dim": 7}, "head_dim"),
    "activation": ({"hidden_act": "quick_gelu"}, "hidden_act"),
    "missing": ({"hidden_size": MISSING}, "hidden_size"),
    "text": ({"vocab_size": "many"}, "vocab_size"),
    "heads": ({"num_key_value_heads": 3}, "num_key_value_heads"),
    "per_layer": ({"per_layer_config": {"0": {"head_dim": 4}}}, "per_layer_config"),
}
BAD_ROUTERS = {
    "too_many": ({"num_experts_per_tok": 9}, "num_experts_per_tok"),
    "two_counts": ({"num_experts": 8, "num_local_experts": 4}, "num_experts"),
    "shared": ({"n_shared_experts": 1}, "n_shared_experts"),
    "shared_width": ({"shared_expert_intermediate_size": 64}, "shared_expert_intermediate_size"),
    "sigmoid": ({"scoring_func": "sigmoid"}, "scoring_func"),
    "groups": ({"n_group": 4}, "n_group"),
    "factor": ({"routed_scaling_factor": 2.5}, "routed_scaling_factor"),
    "windows": ({"layer_types": ["sliding_attention", "full_attention"]}, "layer_types"),
}
BAD_OWN = {
    "mixtral": BAD_ROUTERS | {"no_experts": ({"num_local_experts": 0}, "num_local_experts")},
    "qwen3_moe": BAD_ROUTERS
    | {
        "no_experts": ({"num_experts": 0}, "num_experts"),
        "dense_text": ({"mlp_only_layers": "0"}, "mlp_only_layers"),
        "dense_names": ({"mlp_only_layers": ["0"]}, "mlp_only_layers"),
        "step": ({"decoder_sparse_step": 0}, "decoder_sparse_step"),
        "width": ({"moe_intermediate_size": 0}, "moe_intermediate_size"),
    },
    "mistral": {"mixed": ({"sliding_window": 4, "layer_types": ["full_attention"] * 2}, "layer_types")},
    "qwen2": {
        "count": ({"layer_types": ["full_attention"]}, "layer_types"),
        "kind": ({"layer_types": ["linear_attention"] * 2}, "layer_types"),
        "no_window": ({"layer_types": ["sliding_attention"] * 2}, "layer_types"),
        "zero": ({"use_sliding_window": True, "sliding_window": 0}, "sliding_window"),
    },
}
