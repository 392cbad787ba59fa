"""Every model family computes what transformers computes, and says so when it cannot."""

import fnmatch
import json
import random
from importlib import resources

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import safetensors.numpy

from mojax.errors import InputError
from mojax.find import find, names

FAMILIES = names("models")
TINY = resources.files("mojax") / "data" / "tiny"
LENGTH = 40
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
BIASES = {"attention_bias": {"attention_bias": True}, "no_attention_bias": {"attention_bias": False}}
OWN = {
    "llama": BIASES
    | {
        "mlp_bias": {"mlp_bias": True},
        "kv_heads_missing": {"num_key_value_heads": MISSING, "sliding_window": 3},
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
        if k not in ("kv_heads_missing", "kv_heads_null", "head_dim_128")
    }
    for feature in own.values():
        config |= feature if rng.random() < 0.5 else {}
    return config | rng.choice(list(ROPES.values()))


ALL = [(f, n, c) for f in FAMILIES for n, c in (CASES | OWN.get(f, {})).items()]
ALL += [(f, f"random{seed}", draw(f, seed)) for f in FAMILIES for seed in range(2)]
each_case = pytest.mark.parametrize(
    ("family", "changes"), [(f, c) for f, _, c in ALL], ids=[f"{f}-{n}" for f, n, _ in ALL]
)


def raw(family: str, changes: dict) -> dict:
    """The config.json of a case."""
    config = {"model_type": family, **BASE, **changes}
    return json.loads(json.dumps({k: v for k, v in config.items() if v is not MISSING}))


def reference(config: dict):
    """transformers' model with weights that make attention sharp and every bias and gain matter."""
    import torch
    import transformers

    kind = transformers.CONFIG_MAPPING[config["model_type"]]
    torch.manual_seed(0)
    model = transformers.AutoModelForCausalLM.from_config(
        kind.from_dict(json.loads(json.dumps(config))), attn_implementation="eager", dtype=torch.float32
    ).eval()
    with torch.no_grad():
        for name, p in model.named_parameters():
            noise = torch.randn_like(p)
            if "norm" in name:
                p.copy_(1 + 0.3 * noise)
            else:
                p.copy_(noise if p.ndim == 1 or "embed" in name else noise * 1.5 / p.shape[1] ** 0.5)
    return model


def arrays(model) -> dict[str, np.ndarray]:
    """The tensors as they would be saved: a tied head is left out."""
    tied = model.config.tie_word_embeddings
    return {k: v.numpy() for k, v in model.state_dict().items() if not (tied and k == "lm_head.weight")}


def logits(family, config, params, tokens) -> jax.Array:
    c = family.configure(config)
    positions = jnp.arange(tokens.shape[1], dtype=jnp.int32)
    x = family.embed(c, params, jnp.asarray(tokens, jnp.int32))
    for prefix, kind in family.blocks(c):
        local = {k.removeprefix(prefix): v for k, v in params.items() if k.startswith(prefix)}
        x = family.block(c, kind, local, x, positions)
    return family.head(c, params, x)


def tokens_for(config: dict) -> np.ndarray:
    return np.random.default_rng(1).integers(0, config["vocab_size"], (2, LENGTH))


@each_case
def test_logits_are_those_of_transformers(family, changes):
    import torch

    config = raw(family, changes)
    model = reference(config)
    tokens = tokens_for(config)
    with torch.no_grad():
        want = model(torch.from_numpy(tokens)).logits.numpy()
    params = {k: jnp.asarray(v) for k, v in arrays(model).items()}
    got = np.asarray(logits(find("models", family), config, params, tokens))
    difference = np.abs(got - want).max() / np.abs(want).max()
    print(f"max relative difference {difference:.2e}")
    assert difference < 2e-5  # float32 sums in another order, through two sharp layers


@each_case
def test_shapes_are_those_of_transformers(family, changes):
    import torch
    import transformers

    config = raw(family, changes)
    with torch.device("meta"):
        kind = transformers.CONFIG_MAPPING[family]
        model = transformers.AutoModelForCausalLM.from_config(kind.from_dict(dict(config)))
    tied = model.config.tie_word_embeddings
    want = {k: tuple(v.shape) for k, v in model.state_dict().items() if not (tied and k == "lm_head.weight")}
    module = find("models", family)
    c = module.configure(config)
    assert module.shapes(c) == want
    assert hash(c) == hash(module.configure(config))


@pytest.mark.parametrize("rope", ROPES | PUBLISHED)
def test_rope_frequencies(rope):
    """Those of transformers; a scaled rope keeps, divides and interpolates, so every branch is run."""
    import transformers

    config = raw("llama", (ROPES | PUBLISHED)[rope])
    kind = transformers.models.llama.modeling_llama.LlamaRotaryEmbedding
    theirs = kind(transformers.LlamaConfig.from_dict(json.loads(json.dumps(config))))
    ours = find("models", "llama").configure(config).rope
    np.testing.assert_allclose(ours.frequencies, theirs.inv_freq.numpy(), rtol=4e-7)  # float32, a few ulps
    assert ours.scale == pytest.approx(theirs.attention_scaling, rel=1e-12)
    if rope.startswith(("llama3", "yarn", "qwen")):
        theta = config.get("rope_theta") or config["rope_parameters"]["rope_theta"]
        plain = 1 / theta ** (np.arange(0, config["head_dim"], 2) / config["head_dim"])
        ratio = np.array(ours.frequencies) / plain
        assert ratio.max() > 1 - 1e-6
        assert ((ratio > ratio.min() * 1.01) & (ratio < 0.99)).any()


@pytest.mark.parametrize("rope", ROPES)
def test_rope_cases_change_the_logits(rope):
    module = find("models", "llama")
    plain, scaled = raw("llama", {}), raw("llama", ROPES[rope])
    rng = np.random.default_rng(0)
    params = {
        k: jnp.asarray(
            rng.standard_normal(s).astype(np.float32) * (1.5 / s[-1] ** 0.5 if len(s) > 1 else 1.0)
        )
        for k, s in module.shapes(module.configure(plain)).items()
    }
    tokens = tokens_for(plain)
    a, b = (np.asarray(logits(module, c, params, tokens)) for c in (plain, scaled))
    assert np.abs(a - b).max() / np.abs(a).max() > 1e-3


@pytest.mark.parametrize("family", FAMILIES)
def test_linears_of_one_input_read_one_variable(family):
    """A tracer finds the servers' fused groups: one norm output feeds q, k and v, another gate and up."""
    module = find("models", family)
    c = module.configure(raw(family, {}))
    prefix, kind = module.blocks(c)[0]
    local = {
        k.removeprefix(prefix): jax.ShapeDtypeStruct(s, jnp.bfloat16)
        for k, s in module.shapes(c).items()
        if k.startswith(prefix)
    }
    x = jax.ShapeDtypeStruct((2, LENGTH, c.hidden_size), jnp.bfloat16)
    positions = jax.ShapeDtypeStruct((LENGTH,), jnp.int32)
    jaxpr = jax.make_jaxpr(lambda p, x, i: module.block(c, kind, p, x, i))(local, x, positions).jaxpr
    leaf = dict(zip(jaxpr.invars[: len(local)], sorted(local), strict=True))
    readers: dict = {}
    for eqn in jaxpr.eqns:
        if eqn.primitive.name == "dot_general" and eqn.invars[1] in leaf:
            readers.setdefault(eqn.invars[0], set()).add(leaf[eqn.invars[1]].removesuffix(".weight"))
    groups = list(readers.values())
    assert all(set(group) in groups for group in module.FUSED)
    assert set().union(*groups) == {k.removesuffix(".weight") for k in local if "_proj.weight" in k}
    named = {e.params["name"]: e.outvars[0].aval for e in jaxpr.eqns if e.primitive.name == "name"}
    cache = (2, LENGTH, c.num_key_value_heads, c.head_dim)
    assert {k: v.shape for k, v in named.items()} == dict.fromkeys(
        ["self_attn.k_cache", "self_attn.v_cache"], cache
    )


@pytest.mark.parametrize("family", FAMILIES)
def test_fused_and_kept_names_exist(family):
    module = find("models", family)
    c = module.configure(raw(family, {}))
    table = module.shapes(c)
    fused = {f"{p}{m}.weight" for p, _ in module.blocks(c) for group in module.FUSED for m in group}
    assert fused <= set(table)
    for glob in module.KEEP:
        kept = fnmatch.filter(table, glob)
        assert kept and fused.isdisjoint(kept)


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
BAD_OWN = {
    "mistral": {"mixed": ({"sliding_window": 4, "layer_types": ["full_attention"] * 2}, "layer_types")},
    "qwen2": {
        "count": ({"layer_types": ["full_attention"]}, "layer_types"),
        "kind": ({"layer_types": ["linear_attention"] * 2}, "layer_types"),
        "no_window": ({"layer_types": ["sliding_attention"] * 2}, "layer_types"),
        "zero": ({"use_sliding_window": True, "sliding_window": 0}, "sliding_window"),
    },
}
BAD_ALL = [(f, n, *b) for f in FAMILIES for n, b in (BAD | BAD_OWN.get(f, {})).items()]


@pytest.mark.parametrize(
    ("family", "changes", "key"),
    [(f, c, k) for f, _, c, k in BAD_ALL],
    ids=[f"{f}-{n}" for f, n, _, _ in BAD_ALL],
)
def test_what_cannot_be_computed_is_an_error_that_names_the_key(family, changes, key):
    with pytest.raises(InputError, match=rf"config\.json: .*{key}"):
        find("models", family).configure(raw(family, changes))


def test_a_token_outside_the_vocabulary_is_not_silent():
    llama = find("models", "llama")
    c = llama.configure(raw("llama", {}))
    table = {"model.embed_tokens.weight": jnp.ones((c.vocab_size, c.hidden_size), jnp.bfloat16)}
    x = llama.embed(c, table, jnp.array([[0, c.vocab_size, -1]], jnp.int32))
    assert x.dtype == jnp.bfloat16
    assert np.isnan(np.asarray(x, np.float32)).all(-1).tolist() == [[False, True, True]]


def kl(p: np.ndarray, q: np.ndarray) -> float:
    """Mean KL(p || q) over tokens in nats, from logits."""
    p, q = (x.astype(np.float64) - x.max(-1, keepdims=True) for x in (p, q))
    p, q = (x - np.log(np.exp(x).sum(-1, keepdims=True)) for x in (p, q))
    return float((np.exp(p) * (p - q)).sum(-1).mean())


def test_bfloat16_rounds_as_transformers_does():
    """On the built-in model: as close to transformers' float32 as transformers' own bfloat16 is."""
    import tokenizers
    import torch
    import transformers

    config = json.loads((TINY / "config.json").read_text())
    text = (resources.files("mojax") / "data" / "text" / "evaluation.txt").read_text()[:8000]
    tokens = tokenizers.Tokenizer.from_str((TINY / "tokenizer.json").read_text()).encode(text).ids
    tokens = np.array(tokens[: 8 * 128]).reshape(8, 128)
    with resources.as_file(TINY / "model.safetensors") as file:
        params = safetensors.numpy.load_file(file)
    llama = find("models", "llama")
    assert {k: v.shape for k, v in params.items()} == llama.shapes(llama.configure(config))
    ours = jax.jit(lambda p, t: logits(llama, config, p, t))(params, tokens)
    assert ours.dtype == jnp.float32

    def theirs(dtype: torch.dtype) -> np.ndarray:
        with resources.as_file(TINY) as folder:
            model = transformers.AutoModelForCausalLM.from_pretrained(
                folder, dtype=dtype, attn_implementation="eager"
            )
        with torch.no_grad():
            return model(torch.from_numpy(tokens)).logits.float().numpy()

    exact, rounded = theirs(torch.float32), theirs(torch.bfloat16)
    noise, own, between = kl(exact, rounded), kl(exact, np.asarray(ours)), kl(np.asarray(ours), rounded)
    print(f"KL float32||theirs {noise:.2e}, float32||ours {own:.2e}, ours||theirs {between:.2e}")
    # KL grows with the variance of the logits' rounding. Ours leaves the logits in float32, so it has no more
    # than theirs; between two roundings the variances add at most. 1.2 is for the sample of 1024 tokens.
    assert own < 1.2 * noise
    assert between < 1.2 * (own + noise)
