"""A quantized key/value cache and FP8 attention: simulated, decoded step by step, written, read, refused."""

import dataclasses
import json
from typing import Any

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest

import mojax
from mojax import attention, cli, decoding, pipeline, recipe, verify
from mojax.cache import LARGEST, Cache
from mojax.errors import InputError, NotFiniteError
from mojax.formats import fp8, nvfp4
from mojax.formats.base import QTensor

FP8, NVFP4 = fp8.FORMAT(), nvfp4.FORMAT()
SMALL: dict[str, Any] = {"sequences": 8, "length": 128}
# What a rule can say of a cache: (kv_cache, attention).
KINDS = {
    "fp8": ("fp8", None),
    "cast": ({"format": "fp8", "cast": True}, None),
    "head": ({"format": "fp8", "per": "head"}, None),
    "affine": ({"format": "fp8", "affine": True}, None),
    "nvfp4": ("nvfp4", None),
    "mixed": ({"k": "fp8", "v": "nvfp4"}, None),
    "mixed the other way": ({"k": "nvfp4", "v": "fp8"}, None),
    "keys": ({"k": "nvfp4", "v": "none"}, None),
    "rotate": ({"format": "nvfp4", "rotate": True}, None),
    "rotate affine": ({"format": "nvfp4", "rotate": True, "affine": True}, None),
    "skip": ({"format": "nvfp4", "skip_first": 1, "skip_last": 1}, None),
    "attention": (None, "fp8"),
    "fp8 attention": ("fp8", "fp8"),
    "nvfp4 attention": ("nvfp4", "fp8"),
}


def recipe_of(kv_cache=None, attention=None, **more):
    said = {"kv_cache": kv_cache, "attention": attention}
    rule = {"match": "*"} | {k: v for k, v in said.items() if v is not None}
    return recipe.adjusted(recipe.load_recipe({"rules": [rule], **more}), **SMALL)


@pytest.fixture(scope="module")
def source():
    return mojax.load("tiny")


@pytest.fixture(scope="module")
def single(source):
    """The built-in model in float32, where two ways to the same number differ by little."""
    params = {n: jnp.asarray(source.params[n]).astype(jnp.float32) for n in source.params}
    return dataclasses.replace(source, params=params)


@pytest.fixture(scope="module")
def stats(source):
    plan = mojax.plan(source, recipe_of("fp8"), target="mojax")
    return mojax.calibrate(
        source, plan, pipeline.read_text(source, plan, plan.recipe, None, "calibration").ids
    )


@pytest.fixture(scope="module")
def tokens(source):
    said = recipe_of("fp8")
    plan = mojax.plan(source, said, target="mojax")
    return pipeline.read_text(source, plan, said, None, "evaluation").ids


def quantized(model, source, stats, kind):
    """`model` with the cache of a kind; the plan is of `source`, which has files."""
    plan = mojax.plan(source, recipe_of(*KINDS[kind]), target="mojax")
    made = mojax.apply(source, plan, stats)
    leaves = {n: leaf for n, leaf in made.params.items() if "_cache." in n}
    return dataclasses.replace(model, params={**model.params, **leaves}, cache=made.cache)


# ---------------------------------------------------------------- the numbers


def floats(*shape, seed=0, dtype=jnp.float32):
    return jnp.asarray(np.random.default_rng(seed).normal(size=shape), dtype)


def test_statistics_are_those_of_numpy():
    x = floats(2, 5, 3, 8)
    found = attention.statistics(x)
    plain = np.asarray(x).reshape(10, 3, 8)
    h = np.array([[1.0]])
    for _ in range(3):
        h = np.block([[h, h], [h, -h]])
    for i, values in enumerate((plain, plain @ h / 8**0.5)):
        np.testing.assert_allclose(found["high"][i], values.max(0), rtol=1e-5)
        np.testing.assert_allclose(found["low"][i], (-values).max(0), rtol=1e-5)
        np.testing.assert_allclose(found["sum"][i], values.sum(0), rtol=1e-4, atol=1e-5)
    assert int(found["count"]) == 10


def test_leaves_hold_what_is_rounded():
    x = floats(4, 16, 2, 32) + jnp.arange(2 * 32, dtype=jnp.float32).reshape(2, 32)[None, None]
    stats = {"a.k_cache": {k: np.asarray(v) for k, v in attention.statistics(x).items()}}
    mean = np.asarray(x).mean((0, 1))
    rest = np.abs(np.asarray(x) - mean)

    def leaves(**options):
        return Cache(FP8, FP8, **options).leaves("a.k_cache", stats)

    assert leaves()["a.k_cache.input_scale"] == np.abs(x).max()
    np.testing.assert_array_equal(leaves(per="head")["a.k_cache.input_scale"], np.abs(x).max((0, 1, 3)))
    made = leaves(affine=True)
    np.testing.assert_allclose(made["a.k_cache.mean"], mean, rtol=1e-5)
    np.testing.assert_allclose(made["a.k_cache.input_scale"], rest.max(), rtol=1e-5)
    made = leaves(affine=True, per="head")
    np.testing.assert_allclose(made["a.k_cache.input_scale"], rest.max((0, 1, 3)), rtol=1e-5)
    turned = leaves(rotate=True)["a.k_cache.input_scale"]
    np.testing.assert_allclose(
        turned, np.abs(attention.turned(Cache(FP8, FP8, rotate=True), x)).max(), rtol=1e-6
    )
    assert Cache(None, FP8).leaves("a.k_cache", stats) == {}
    with pytest.raises(InputError, match=r"a\.v_cache: needs a static scale"):
        Cache(FP8, FP8).leaves("a.v_cache", stats)
    broken = {
        "a.k_cache": {
            k: np.asarray(v) for k, v in attention.statistics(x.at[0, 0, 0, 0].set(jnp.nan)).items()
        }
    }
    with pytest.raises(NotFiniteError, match="is not finite during calibration"):
        Cache(FP8, FP8).leaves("a.k_cache", broken)


def test_every_head_has_its_own_scale():
    x = floats(1, 8, 2, 16) * jnp.array([1e-3, 100.0])[None, None, :, None]
    amax = jnp.abs(x).max((0, 1, 3))
    y = attention.kept(Cache(FP8, FP8, per="head"), "k", x, {"k": amax})
    for h in range(2):
        want = FP8.fake(x[:, :, h], FP8.outer(amax[h], x.dtype))
        np.testing.assert_array_equal(y[:, :, h], want)
    whole = attention.kept(Cache(FP8, FP8), "k", x, {"k": amax.max()})
    small = (slice(None), slice(None), 0)
    assert float(jnp.abs(y - x)[small].max()) < 0.2 * float(jnp.abs(whole - x)[small].max())


def test_means_are_taken_off_and_added_again():
    mean = jnp.full((2, 16), 200.0)
    x = floats(1, 8, 2, 16) + mean[None, None]
    y = attention.kept(Cache(FP8, FP8, affine=True), "v", x, {"v": jnp.float32(4), "v_mean": mean})
    assert float(jnp.abs(y - x).max()) < 0.15
    plain = attention.kept(Cache(FP8, FP8), "v", x, {"v": jnp.abs(x).max()})
    assert float(jnp.abs(plain - x).max()) > 2


def test_a_missing_scale_is_one():
    x = floats(1, 8, 2, 16)
    want = x.astype(jnp.float8_e4m3fn).astype(jnp.float32)
    np.testing.assert_array_equal(attention.kept(Cache(FP8, FP8, cast=True), "k", x, {}), want)
    assert FP8.outer(jnp.float32(LARGEST), x.dtype) == 1


def test_a_rotation_leaves_scores():
    q, k = floats(1, 8, 4, 64), floats(1, 8, 4, 64, seed=1)
    cache = Cache(NVFP4, NVFP4, rotate=True)
    turned = [np.asarray(attention.turned(cache, x), np.float64) for x in (q, k)]
    scores = [np.einsum("bqhd,bkhd->bhqk", a, b) for a, b in ((np.asarray(q, np.float64), k), turned)]
    np.testing.assert_allclose(*scores, atol=1e-5)
    assert np.abs(turned[1] - np.asarray(k)).max() > 0.1


def test_gradients_pass_through():
    cache = Cache(NVFP4, NVFP4)
    slope = jax.grad(lambda x: jnp.sum(attention.kept(cache, "k", x, {"k": jnp.float32(3)}) * 2))(
        floats(1, 2, 2, 16)
    )
    np.testing.assert_array_equal(slope, np.full((1, 2, 2, 16), 2, np.float32))


def test_fp8_products_are_those_of_ml_dtypes():
    """Four query heads on two key heads, a window of 3; every operand as numpy rounds it."""
    q, k, v = floats(1, 6, 4, 16), floats(1, 6, 2, 16, seed=1), floats(1, 6, 2, 16, seed=2)
    found = attention.over_text(Cache(None, None, attention=True), {})(q, k, v, jnp.arange(6), 3)

    def eight(x):
        return np.asarray(x, np.float32).astype(ml_dtypes.float8_e4m3fn).astype(np.float64)

    q8, k8, v8 = eight(q), np.repeat(eight(k), 2, 2), np.repeat(eight(v), 2, 2)
    scores = np.einsum("bqhd,bkhd->bhqk", q8, k8) / 4
    distance = np.arange(6)[:, None] - np.arange(6)
    scores = np.where((distance >= 0) & (distance < 3), scores, -np.inf)
    p = np.exp(scores - scores.max(-1, keepdims=True))
    p = eight(448 * p / p.sum(-1, keepdims=True)) / 448
    want = np.einsum("bhqk,bkhd->bqhd", p, v8).reshape(1, 6, 64)
    np.testing.assert_allclose(found, want, atol=1e-5)
    plain = attention.over_text(Cache(FP8, FP8), {"k": jnp.float32(4), "v": jnp.float32(4)})
    assert np.abs(np.asarray(plain(q, k, v, jnp.arange(6), 3)) - want).max() > 1e-3


# ---------------------------------------------------------------- in a model


def test_keys_hurt_more_than_values(source, stats):
    """FP8, FP8 keys with NVFP4 values, the other way around, NVFP4; what a rotation and a skip gain."""

    said = recipe.adjusted(recipe_of("fp8"), sequences=12, length=256)
    longer = pipeline.read_text(source, mojax.plan(source, said), said, None, "evaluation").ids

    def kl(kind):
        return mojax.evaluate(quantized(source, source, stats, kind), source, longer).kl_mean

    eight, mixed, other, four = map(kl, ("fp8", "mixed", "mixed the other way", "nvfp4"))
    assert 0 < 2 * eight < mixed < 0.9 * other < 0.8 * four
    assert kl("rotate") < 0.97 * four
    assert kl("skip") < 0.9 * four


@pytest.mark.parametrize("kind", KINDS)
def test_decoding_computes_what_the_model_does(single, source, stats, tokens, kind):
    """Token by token over the cache, and all at once."""
    made, batch, begin = quantized(single, source, stats, kind), tokens[:2, :24], 16
    want = np.asarray(made(batch))[:, begin - 1 :]
    runner = mojax.run(made)
    c = made.hyper
    shape = (2, 32, c.num_key_value_heads, c.head_dim)
    layers = tuple(
        decoding.empty(
            p.cache, shape, jnp.float32, tuple(leaves.get(f"self_attn.{s}_cache.input_scale") for s in "kv")
        )
        for p, leaves in zip(runner.programs.blocks, runner.weights.blocks, strict=True)
    )
    for p, layer in zip(runner.programs.blocks, layers, strict=True):
        for side, rows in zip("kv", layer, strict=True):
            packed = p.cache is not None and p.cache.packed(side)
            assert isinstance(rows, QTensor) is packed
    state = decoding.prefill(
        runner.programs, runner.weights, layers, batch[:, :begin], None, np.zeros(2, np.int32)
    )
    forward = jax.jit(decoding.forward, static_argnums=0)
    found = []
    for i in range(begin, 24):
        logits, state = forward(
            runner.programs, runner.weights, state._replace(token=jnp.asarray(batch[:, i]))
        )
        found.append(logits)
    effect = np.abs(np.asarray(single(batch))[:, begin:] - want[:, 1:]).mean()
    gap = np.abs(np.stack(found, 1) - want[:, 1:]).mean()
    assert effect > 0 and gap < 0.1 * effect


def test_generated_tokens_are_the_likeliest(source, stats):
    made = quantized(source, source, stats, "rotate affine")
    (text,) = mojax.run(made).generate([[5, 6, 7, 8]], max_tokens=6).texts
    seen = [5, 6, 7, 8, *text.tokens]
    logits = np.asarray(made(np.array([seen], np.int32)))[0, 3:-1]
    chosen = np.take_along_axis(logits, np.array(text.tokens)[:, None], 1)[:, 0]
    assert len(text.tokens) and (logits.max(1) - chosen < 0.1).all()


def test_what_is_skipped_is_as_it_was(source, stats, tokens):
    made = quantized(source, source, stats, "skip")
    caches = [made.program(block).cache for block in made.blocks]
    assert caches[0] is None and caches[-1] is None and all(c is not None for c in caches[1:-1])

    def first_layer(model):
        runner = mojax.run(model)
        c, width = model.hyper, 16
        shape = (1, 32, c.num_key_value_heads, c.head_dim)
        layers = tuple(
            decoding.empty(p.cache, shape, model.dtype, (None, None)) for p in runner.programs.blocks
        )
        return decoding.prefill(
            runner.programs, runner.weights, layers, tokens[:1, :width], None, np.zeros(1, np.int32)
        ).layers[0]

    for a, b in zip(first_layer(made), first_layer(source), strict=True):
        assert a.dtype == source.dtype and np.asarray(a).tobytes() == np.asarray(b).tobytes()


# ---------------------------------------------------------------- plans


@pytest.mark.parametrize(
    ("kv_cache", "attention", "dialect", "target", "why"),
    [
        (
            "nvfp4",
            None,
            "compressed-tensors",
            "vllm",
            "kept as nvfp4 in the compressed-tensors .* use --format=modelopt",
        ),
        ("nvfp4", None, "modelopt", "transformers", "transformers cannot load .* use --target=vllm"),
        ({"k": "fp8", "v": "nvfp4"}, None, "modelopt", "vllm", "one format for keys and values"),
        ({"format": "fp8", "per": "head"}, None, "modelopt", "vllm", "use --format=compressed-tensors"),
        ({"format": "fp8", "per": "head"}, None, "compressed-tensors", "trtllm", "use --target=vllm"),
        ({"format": "fp8", "affine": True}, None, "modelopt", "vllm", "no server takes the means off"),
        ({"format": "nvfp4", "rotate": True}, None, "modelopt", "trtllm", "no server rotates"),
        (
            {"format": "fp8", "skip_last": 1},
            None,
            "compressed-tensors",
            "vllm",
            "--kv-cache-dtype-skip-layers",
        ),
        ("fp8", "fp8", "compressed-tensors", "vllm", "servers choose what attention multiplies"),
        ("fp8", None, "modelopt", "vllm", "only beside encoded weights"),
        ("fp8", None, "bitsandbytes", "transformers", "keeps weights only; use kv_cache: none"),
    ],
)
def test_what_no_server_loads_is_a_problem(source, kv_cache, attention, dialect, target, why):
    said = recipe_of(kv_cache, attention)
    with pytest.raises(mojax.PlanError, match=why) as caught:
        mojax.plan(source, said, format=dialect, target=target)
    assert "target 'mojax' evaluates it" in str(caught.value)
    here = mojax.plan(source, said, format=dialect, target="mojax")
    assert here.cache is not None


def test_a_plan_for_this_process_is_not_written(source, stats, tmp_path):
    plan = mojax.plan(source, recipe_of(*KINDS["mixed"]), target="mojax")
    made = mojax.apply(source, plan, stats)
    with pytest.raises(InputError, match="the plan is for this process alone"):
        mojax.export(made, tmp_path / "out", plan=plan)
    with pytest.raises(InputError, match="the plan is for this process alone"):
        mojax.optimize("tiny", recipe_of("fp8"), tmp_path / "out", target="mojax")
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("kv_cache", "why"),
    [
        ("int8", "int8 is not a cache format here; known: fp8, nvfp4, none"),
        ({"format": "nvfp4", "per": "head"}, "per: head is for fp8"),
        ({"format": "fp8", "per": "head", "cast": True}, "cast calibrates nothing"),
        ({"k": "none", "v": "fp8", "rotate": True}, "give k a format"),
        ({"format": "fp8", "skip_first": 2, "skip_last": 2}, "leave none of 4 layers"),
        ({"format": "none", "affine": True}, "neither k nor v has a format"),
    ],
)
def test_options_that_cannot_be(source, kv_cache, why):
    with pytest.raises(mojax.PlanError, match=why):
        mojax.plan(source, recipe_of(kv_cache), target="mojax")


def test_a_cast_needs_no_data(source):
    assert mojax.plan(source, recipe_of(*KINDS["cast"])).needs == ()
    assert mojax.plan(source, recipe_of("fp8")).needs == ("absmax",)


def test_recipes_of_caches_go_on_top_of_others(source):
    said = recipe.load_recipe({"extends": ["nvfp4", "nvfp4_kv"]})
    plan = mojax.plan(source, said, format="modelopt")
    assert len(plan.schemes) == 28 and plan.cache.label == "nvfp4"
    alone = mojax.plan(source, "fp8_kv")
    assert not alone.schemes and alone.cache.label == "fp8"
    assert mojax.plan(source, "fp8k_nvfp4v", target="mojax").cache.label == "k fp8, v nvfp4"


# ---------------------------------------------------------------- files


@pytest.mark.parametrize(
    ("kind", "dialect", "base"),
    [
        ("fp8", "compressed-tensors", None),
        ("fp8", "modelopt", "fp8"),
        ("cast", "compressed-tensors", None),
        ("cast", "modelopt", "fp8"),
        ("head", "compressed-tensors", "fp8_dynamic"),
        ("nvfp4", "modelopt", "nvfp4"),
    ],
)
def test_a_written_cache_is_read_again(source, stats, tokens, tmp_path, kind, dialect, base):
    said = recipe_of(*KINDS[kind], **({"extends": base} if base else {}))
    mojax.optimize("tiny", said, tmp_path / "out", format=dialect, evaluate=False)
    back = mojax.load(tmp_path / "out")
    plan = mojax.plan(source, said, format=dialect)
    assert dataclasses.replace(plan.cache, cast=False).label == back.cache.label and back.cache.calibrated
    assert len(back.schemes) == (28 if base else 0)
    scale = {"compressed-tensors": "self_attn.k_scale", "modelopt": "self_attn.k_proj.k_scale"}[dialect]
    shape = {"modelopt": (), "compressed-tensors": (2, 1, 1) if kind == "head" else (1,)}[dialect]
    assert back.checkpoint[f"model.layers.3.{scale}"].shape == shape
    for block in source.blocks:
        for side in "kv":
            name = f"{block.prefix}self_attn.{side}_cache"
            found = np.asarray(back.params[name + ".input_scale"])
            if kind == "cast":
                assert found == LARGEST
            else:
                want = plan.cache.leaves(name, stats)[name + ".input_scale"]
                np.testing.assert_allclose(found, want, rtol=2.0**-8)
    assert verify.verify(tmp_path / "out", "tiny").tensors == len(back.checkpoint)
    assert cli.run(["inspect", f"--model={tmp_path / 'out'}"]) == 0
    report = mojax.evaluate(back, source, tokens[:2])
    assert 0 < report.kl_mean < 0.2
    rounded = dataclasses.replace(back, cache=None)
    assert mojax.evaluate(rounded, source, tokens[:2]).kl_mean != report.kl_mean
    with pytest.raises(InputError, match="quantized"):
        mojax.plan(dataclasses.replace(source, cache=back.cache), "fp8")


def test_a_cache_goes_to_the_other_dialect_and_not_where_it_has_no_form(tmp_path, capsys):
    said = recipe_of("fp8", extends="nvfp4")
    mojax.optimize("tiny", said, tmp_path / "ct", evaluate=False)
    assert (
        cli.run(["convert", f"--model={tmp_path / 'ct'}", "--format=modelopt", f"--out={tmp_path / 'mo'}"])
        == 0
    )
    config = json.loads((tmp_path / "mo" / "config.json").read_text())["quantization_config"]
    assert config["kv_cache_scheme"] == {"dynamic": False, "num_bits": 8, "type": "float"}
    said = recipe_of("nvfp4", extends="nvfp4")
    mojax.optimize("tiny", said, tmp_path / "four", format="modelopt", evaluate=False)
    config = json.loads((tmp_path / "four" / "config.json").read_text())["quantization_config"]
    other = json.loads((tmp_path / "four" / "hf_quant_config.json").read_text())["quantization"]
    assert config["kv_cache_scheme"] == other["kv_cache_quant_algo"] == "NVFP4"
    capsys.readouterr()
    flags = [f"--model={tmp_path / 'four'}", "--format=compressed-tensors", f"--out={tmp_path / 'no'}"]
    assert cli.run(["convert", *flags]) == 2
    assert "kept as nvfp4 in the compressed-tensors dialect" in capsys.readouterr().err


@pytest.mark.filterwarnings("ignore:You passed `quantization_config`:UserWarning")
@pytest.mark.parametrize("kind", ["fp8", "cast", "head"])
def test_transformers_computes_the_same(source, tokens, tmp_path, kind):
    torch = pytest.importorskip("torch")
    transformers = pytest.importorskip("transformers")
    pytest.importorskip("compressed_tensors")
    said = recipe_of(*KINDS[kind])
    mojax.optimize("tiny", said, tmp_path / "out", target="transformers", evaluate=False)
    model = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "out", attn_implementation="eager")
    with torch.no_grad():
        theirs = model(torch.from_numpy(tokens[:2]).long(), use_cache=True).logits.float().numpy()
    back = mojax.load(tmp_path / "out")
    ours, plain = (np.asarray(m(tokens[:2])) for m in (back, source))
    assert np.abs(ours - theirs).mean() < 0.5 * np.abs(plain - theirs).mean()
