"""Every model family computes what transformers computes, and says so when it cannot."""

import fnmatch
import json
import re
from importlib import resources

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import safetensors.numpy
from family_cases import BAD, BAD_OWN, CASES, OWN, PUBLISHED, ROPES, draw, raw

from mojax.errors import InputError
from mojax.find import find, names

FAMILIES = names("models")
LENGTH = 40
TINY = resources.files("mojax") / "data" / "tiny"
ALL = [(f, n, c) for f in FAMILIES for n, c in (CASES | OWN.get(f, {})).items()]
ALL += [(f, f"random{seed}", draw(f, seed)) for f in FAMILIES for seed in range(2)]
each_case = pytest.mark.parametrize(
    ("family", "changes"), [(f, c) for f, _, c in ALL], ids=[f"{f}-{n}" for f, n, _ in ALL]
)


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
                p.copy_(noise if p.ndim == 1 or "embed" in name else noise * 1.5 / p.shape[-1] ** 0.5)
    return model


def published(model) -> dict:
    """The tensors under the names of checkpoints, experts one by one; a tied head is left out."""
    from transformers.core_model_loading import revert_weight_conversion

    tensors = revert_weight_conversion(model, model.state_dict())
    return {
        k: v for k, v in tensors.items() if not (model.config.tie_word_embeddings and k == "lm_head.weight")
    }


def starred(tensors: dict) -> dict[str, list]:
    """By name with a star for the expert, the tensors in the order of the experts."""
    numbered: dict[str, dict[int, object]] = {}
    for name, tensor in tensors.items():
        expert = re.search(r"\.experts\.(\d+)\.", name)
        star = re.sub(r"\.experts\.\d+\.", ".experts.*.", name)
        numbered.setdefault(star, {})[int(expert[1]) if expert else -1] = tensor
    return {name: [rows[i] for i in sorted(rows)] for name, rows in numbered.items()}


def arrays(model) -> dict[str, np.ndarray]:
    """The model's parameters: experts stacked."""
    return {
        name: np.stack([t.numpy() for t in rows]) if "*" in name else rows[0].numpy()
        for name, rows in starred(published(model)).items()
    }


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
    want = {
        name: (len(rows), *rows[0].shape) if "*" in name else tuple(rows[0].shape)
        for name, rows in starred(published(model)).items()
    }
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


KINDS = [(f, {}) for f in FAMILIES] + [("qwen3_moe", {"mlp_only_layers": [0]})]


@pytest.mark.parametrize(("family", "changes"), KINDS)
def test_linears_of_one_input_read_one_variable(family, changes):
    """A tracer finds the servers' fused groups: one norm output feeds q, k and v, another gate and up."""
    module = find("models", family)
    c = module.configure(raw(family, changes))
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
        if "dot_general" in eqn.primitive.name and eqn.invars[1] in leaf:
            grouped = eqn.primitive.name == "ragged_dot_general"
            assert grouped == ("*" in leaf[eqn.invars[1]])
            readers.setdefault(eqn.invars[0], set()).add(leaf[eqn.invars[1]].removesuffix(".weight"))
    groups = list(readers.values())
    here = [set(group) for group in module.FUSED if f"{group[0]}.weight" in local]
    assert len(here) > 1 and all(group in groups for group in here)
    linears = {k.removesuffix(".weight") for k, v in local.items() if len(v.shape) > 1}
    assert set().union(*groups) == linears
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
    if family == "qwen3_moe":  # one layer of each kind
        table |= module.shapes(module.configure(raw(family, {"mlp_only_layers": [0]})))
    fused = set()
    for group in module.FUSED:
        layers = [{f"{p}{m}.weight" for m in group} for p, _ in module.blocks(c)]
        assert any(layer <= set(table) for layer in layers)
        fused = fused.union(*layers)
    for glob in module.KEEP:
        kept = fnmatch.filter(table, glob)
        assert kept and fused.isdisjoint(kept)


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


def divergences(p: np.ndarray, q: np.ndarray) -> np.ndarray:
    """KL(p || q) of every token in nats, from logits."""
    p, q = (x.astype(np.float64) - x.max(-1, keepdims=True) for x in (p, q))
    p, q = (x - np.log(np.exp(x).sum(-1, keepdims=True)) for x in (p, q))
    return (np.exp(p) * (p - q)).sum(-1)


def kl(p: np.ndarray, q: np.ndarray) -> float:
    return float(divergences(p, q).mean())


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
