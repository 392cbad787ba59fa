"""Decoding with a cache computes what the model computes without one, whatever is packed."""

import dataclasses
import json
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from families_test import arrays, reference
from family_cases import ROPES, raw
from moe_models import tiny_mixtral
from safetensors.numpy import save_file

import mojax
from mojax import decoding, recipe
from mojax.cache import Cache
from mojax.find import find
from mojax.formats import nvfp4
from mojax.formats.base import QTensor
from mojax.model import Model

GOLDEN = Path(__file__).parents[1] / "golden"
WINDOW = {"use_sliding_window": True, "sliding_window": 5, "max_window_layers": 1}
FAMILIES = [
    ("llama", {}),
    ("llama", ROPES["llama3"]),
    ("mistral", {"sliding_window": 8}),
    ("mixtral", {"sliding_window": 6}),
    ("qwen2", WINDOW),
    ("qwen3", WINDOW | {"tie_word_embeddings": True}),
    ("qwen3_moe", WINDOW | {"mlp_only_layers": [0]}),
]
PROMPTS = [
    list(range(3, 3 + n)) for n in (18, 1, 7)
]  # one longer than a multiple of what lengths are padded to
NEW = 12


@pytest.mark.parametrize(
    ("family", "changes"), FAMILIES, ids=[f"{f}-{i}" for i, (f, _) in enumerate(FAMILIES)]
)
def test_greedy_tokens_are_those_of_transformers(family, changes):
    """One batch of prompts of several lengths here, every prompt alone there."""
    import torch

    config = raw(family, changes) | {"eos_token_id": None, "dtype": "float32"}
    theirs = reference(config)
    theirs.generation_config.eos_token_id = None
    want = [
        theirs.generate(
            torch.tensor([p]), attention_mask=torch.ones(1, len(p)), do_sample=False, max_new_tokens=NEW
        )[0, len(p) :].tolist()
        for p in PROMPTS
    ]
    assert len({token for tokens in want for token in tokens}) > 6
    ours = Model(config, arrays(theirs), find("models", family))
    made = mojax.run(ours).generate(PROMPTS, max_tokens=NEW)
    assert [list(t.tokens) for t in made.texts] == want
    assert {(t.text, t.reason) for t in made.texts} == {(None, "length")}
    assert made.prompt_tokens == tuple(map(len, PROMPTS))


CONFIG = {
    "model_type": "llama",
    "vocab_size": 96,
    "hidden_size": 128,
    "intermediate_size": 256,
    "num_hidden_layers": 1,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 64,
    "max_position_embeddings": 128,
    "rms_norm_eps": 1e-5,
    "dtype": "float32",
}
TOKENS = np.random.default_rng(0).integers(0, 96, (3, 22), dtype=np.int32)
START = np.array([0, 3, 9], np.int32)  # of padding
FIRST = 16  # tokens of the prompts, padding included


@pytest.fixture(scope="module")
def llama(tmp_path_factory):
    folder = tmp_path_factory.mktemp("llama")
    family, rng = find("models", "llama"), np.random.default_rng(1)
    shapes = family.shapes(family.configure(CONFIG))
    scale = {n: 0.3 if len(s) == 1 else 2 * s[-1] ** -0.5 for n, s in shapes.items()}
    tensors = {
        n: (scale[n] * rng.standard_normal(s) + (len(s) == 1)).astype(np.float32) for n, s in shapes.items()
    }
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    (folder / "config.json").write_text(json.dumps(CONFIG))
    return folder


def applied(folder, name, tmp_path, **more):
    """The model in memory with its weights packed by a recipe."""
    file = tmp_path / "own.yaml"
    file.write_text(f"extends: {name}\n" + more.get("rules", ""))
    model = mojax.load(folder)
    plan = mojax.plan(model, recipe.adjusted(mojax.load_recipe(str(file)), sequences=4, length=16))
    vocab = model.config["vocab_size"]
    batches = np.random.default_rng(2).integers(0, vocab, (4, 16), dtype=np.int32)
    return mojax.apply(model, plan, mojax.calibrate(model, plan, batches))


def differences(model, tokens=TOKENS):
    """|cached - uncached| over the largest |logit|: of every sequence and step, `[batch, steps]`."""
    start, length = START[: len(tokens)], tokens.shape[1]
    straight = np.stack(
        [np.roll(row, -n) for row, n in zip(tokens, start, strict=True)]
    )  # padding at the end
    found = np.asarray(model(jnp.asarray(straight)))
    whole = np.stack([row[FIRST - 1 - n : length - n] for row, n in zip(found, start, strict=True)])
    runner, c = mojax.run(model), model.hyper
    shape = (len(tokens), 64, c.num_key_value_heads, c.head_dim)
    names = [f"self_attn.{kv}_cache.input_scale" for kv in "kv"]
    layers = tuple(
        decoding.empty(model.cache, shape, model.dtype, tuple(p.get(n) for n in names))
        for p in runner.weights.blocks
    )
    prompts = np.where(np.arange(FIRST)[None] < start[:, None], 0, tokens[:, :FIRST])
    state = decoding.prefill(runner.programs, runner.weights, layers, prompts, None, start)
    np.testing.assert_array_equal(state.token, whole[:, 0].argmax(-1))
    forward = jax.jit(decoding.forward, static_argnums=0)
    found = []
    for i in range(FIRST, length):
        state = state._replace(token=jnp.asarray(tokens[:, i]))
        logits, state = forward(runner.programs, runner.weights, state)
        found.append(np.asarray(logits))
    return np.abs(np.stack(found, 1) - whole[:, 1:]).max(-1) / np.abs(whole).max()


def check(model, tokens=TOKENS):
    """A sum in another order now and then moves a rounded input by a step; nothing else may differ."""
    assert any(isinstance(leaf, QTensor) for leaf in model.params.values()) or model.cache
    found = differences(model, tokens)
    print(np.sort(found.ravel()))
    assert np.median(found) < 1e-5 and found.max() < 0.03


RECIPES = ["fp8", "fp8_block", "fp8_dynamic", "int4", "int8", "mxfp4", "mxfp8", "nvfp4"]


@pytest.mark.parametrize("name", RECIPES)
def test_with_packed_weights(name, llama, tmp_path):
    check(applied(llama, name, tmp_path))


def test_with_packed_experts(tmp_path):
    small = {"hidden_size": 64, "vocab_size": 96, "num_local_experts": 4, "num_hidden_layers": 1}
    check(applied(tiny_mixtral(tmp_path / "source", "float32", **small), "nvfp4", tmp_path))


def test_with_an_fp8_cache(llama, tmp_path):
    model = applied(llama, "fp8", tmp_path, rules="rules: [{match: '*', kv_cache: fp8}]\n")
    assert (
        model.cache.k.name == model.cache.v.name == "fp8"
        and "model.layers.0.self_attn.k_cache.input_scale" in model.params
    )
    check(model)
    plain = dataclasses.replace(model, cache=None)
    rounded, exact = (np.asarray(m(TOKENS)) for m in (model, plain))
    assert np.abs(rounded - exact).max() > 1e-2  # the cache is rounded at all


def test_with_an_nvfp4_cache(llama):
    """Without scales of the file: they are 1."""
    model = dataclasses.replace(mojax.load(llama), cache=Cache(nvfp4.FORMAT(), nvfp4.FORMAT()))
    check(model)
    layer = decoding.empty(model.cache, (1, 64, 2, 32), jnp.float32, (None, None))
    assert layer.k.codes.dtype == jnp.uint8 and layer.k.codes.shape == (1, 64, 2, 16)
    assert layer.k.nbytes == 64 * 2 * (16 + 2) + 4


PEERS = ["modelopt/NVFP4_DEFAULT_CFG", "llmcompressor/W4A16_ASYM", "native/llama/FP8_BLOCK128"]


@pytest.mark.parametrize("folder", PEERS)
def test_with_weights_of_peers(folder):
    """In float32, where a sum in another order is no step of a rounded input."""
    model = mojax.load(GOLDEN / folder)
    one = model.blocks[0].prefix
    names = [n for n in model.params if n.startswith(one) or not n.startswith("model.layers.")]
    params = {n: widened(model.params[n]) for n in names}
    config = dict(model.config) | {"num_hidden_layers": 1, "dtype": "float32"}
    schemes = {m: s for m, s in model.schemes.items() if m + ".weight" in params}
    small = dataclasses.replace(model, config=config, params=params, schemes=schemes, checkpoint=None)
    check(small, TOKENS[:2])


def widened(leaf):
    if isinstance(leaf, QTensor):
        return dataclasses.replace(leaf, dtype=np.dtype(np.float32))
    return np.asarray(leaf, np.float32)
