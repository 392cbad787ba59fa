"""The two streams, the statistics that encoding steps see, gradients, and what the frame of steps refuses."""

import dataclasses
import functools
import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from moe_models import tiny_mixtral, tiny_qwen3_moe

import mojax
from mojax import calibration, checkpoint, gradients, pipeline, verify
from mojax.formats.base import QTensor
from mojax.planner import plan
from mojax.recipe import adjusted, load_recipe
from mojax.stream import Stream
from mojax.transforms.base import Context, Outcome, Transform, chain, folds, move, rewrites

LENGTH = 64


@pytest.fixture(scope="module")
def model():
    return mojax.load("tiny")


@pytest.fixture(scope="module")
def tokens():
    return np.random.default_rng(0).integers(0, 4096, (8, LENGTH), dtype=np.int32)


def recipe(base, steps, draws=0, **rules):
    calibration = {"gradients": draws, "sequences": 8, "length": LENGTH}
    limits = {"kl_mean": 100.0}
    return load_recipe(
        {"extends": base, "steps": steps, "calibration": calibration, "limits": limits} | rules
    )


@pytest.mark.parametrize("dtype", ["bfloat16", "float16", "float32"])
@pytest.mark.parametrize("width", [24, 256, 300, 1100])
def test_second_moments(dtype, width):
    x = jnp.asarray(np.random.default_rng(width).standard_normal((96, width)), dtype)
    found = np.asarray(calibration.second_moments(x))
    wide = np.asarray(x, np.float64)
    np.testing.assert_allclose(found, wide.T @ wide, rtol=1e-5, atol=1e-4)
    assert found.dtype == np.float32 and (found == found.T).all()


def seen_by(model, todo, tokens):
    """What every call of the encoding steps sees, in order."""
    calls = []

    def look(params, stats, context):
        calls.append((tuple(sorted(context.schemes)), {n: dict(v) for n, v in stats.items()}, dict(params)))
        return {}

    spy = Transform(look, ("gram", "seen_gram", "drift", "absmax", "count"), phase="encode")
    todo = dataclasses.replace(todo, steps=(*todo.steps[:-1], spy, todo.steps[-1]))
    stream = Stream(model, todo, tokens)
    for block in model.blocks:
        stream.make(block)
    return calls


def test_a_block_is_encoded_input_after_input_and_sees_what_became_of_it(model, tokens):
    todo = plan(model, recipe("int4", ["rtn"]))
    calls = seen_by(model, todo, tokens)
    names = [tuple(n.rsplit(".", 1)[1][0] for n in modules) for modules, _, _ in calls[:4]]
    assert names == [("k", "q", "v"), ("o",), ("g", "u"), ("d",)]
    assert len(calls) == 4 * len(model.blocks)
    first, second = calls[0], calls[1]
    q, o = "model.layers.0.self_attn.q_proj.weight", "model.layers.0.self_attn.o_proj.weight"
    np.testing.assert_array_equal(first[1][q]["drift"], 0)  # nothing was encoded before
    np.testing.assert_array_equal(first[1][q]["gram"], first[1][q]["seen_gram"])
    assert np.abs(second[1][o]["drift"]).max() > 0
    assert isinstance(second[2][q], QTensor) and not isinstance(second[2][o], QTensor)
    assert int(second[1][o]["count"]) == tokens.size
    k, v = q.replace("q_proj", "k_proj"), q.replace("q_proj", "v_proj")
    assert all(first[1][q][need] is first[1][w][need] for w in (k, v) for need in ("gram", "drift", "absmax"))


def test_drift_and_grams_are_sums_over_both_streams(model, tokens):
    """Against a plain calculation of the second block's first input, from the encoded first block."""
    todo = plan(model, recipe("int4", ["rtn"]))
    calls = seen_by(model, todo, tokens)
    made = pipeline.apply(model, todo, {})
    name = "model.layers.1.self_attn.q_proj.weight"

    def norm(x):
        return np.asarray(
            x.astype(jnp.float32)
            / jnp.sqrt(jnp.mean(jnp.square(x.astype(jnp.float32)), -1, keepdims=True) + 1e-5)
        ) * np.asarray(model.params["model.layers.1.input_layernorm.weight"], np.float32)

    def inputs(m):
        x = m.family.embed(m.hyper, {n: m.params[n] for n in ("model.embed_tokens.weight",)}, tokens)
        block = model.blocks[0]
        from mojax.program import run_block

        return norm(run_block(m.program(block), jax.device_put(m.local(block)), x)).reshape(-1, 256)

    x, after = inputs(model), inputs(made)
    seen = next(
        s for modules, s, _ in calls if any(m.startswith("model.layers.1.self_attn.q") for m in modules)
    )
    np.testing.assert_allclose(seen[name]["gram"], after.T @ after, rtol=0.02, atol=0.5)
    scale = np.abs((x - after).T @ after).max()
    np.testing.assert_allclose(seen[name]["drift"], (x - after).T @ after, atol=0.05 * scale)


def test_the_gram_is_of_rounded_inputs(model, tokens):
    """A quantized input reaches the error feedback as the layer will see it."""
    plain = seen_by(model, plan(model, recipe("nvfp4_weight_only", ["rtn"])), tokens)[0][1]
    rounded = seen_by(model, plan(model, recipe("nvfp4", ["rtn"])), tokens)[0][1]
    name = "model.layers.0.self_attn.q_proj.weight"
    a, b = (np.asarray(s[name]["gram"]) for s in (plain, rounded))
    assert 0.001 < np.abs(a - b).max() / np.abs(a).max() < 0.2
    assert np.abs(rounded[name]["drift"]).max() > 0


@pytest.mark.parametrize("draws", [0, 1])
def test_in_memory_and_on_disk_are_the_same(model, tmp_path, draws):
    """calibrate and apply give what optimize writes, to the last code."""
    chosen = recipe("nvfp4", [{"smoothquant": {"alpha": 0.3}}, "qep", "gptq"], draws)
    todo = plan(model, chosen)
    seen = pipeline.read_text(model, todo, chosen, None, "calibration")
    made = pipeline.apply(model, todo, pipeline.calibrate(model, todo, seen.ids))
    report = mojax.optimize("tiny", chosen, tmp_path / "out", evaluate=False)
    written = mojax.load(tmp_path / "out")
    for module in todo.schemes:
        a, b = made.params[module + ".weight"], written.params[module + ".weight"]
        np.testing.assert_array_equal(np.asarray(a.codes), np.asarray(b.codes), err_msg=module)
    assert [row["step"] for row in report.steps] == ["gptq"]
    assert report.steps[0]["weights"] == 28 and report.steps[0]["objective"] < 0.9
    assert not (tmp_path / "out" / "scratch").exists()


def test_an_interrupted_run_goes_on_to_the_same_bytes(tmp_path):
    """Blocks that were finished are read back from what was written."""
    chosen = recipe("nvfp4", ["qep", "gptq"])
    mojax.optimize("tiny", chosen, tmp_path / "whole", evaluate=False)
    calls = iter(range(100))
    with pytest.raises(pipeline.Interrupted):
        mojax.optimize("tiny", chosen, tmp_path / "cut", evaluate=False, interrupted=lambda: next(calls) == 2)
    report = mojax.optimize("tiny", chosen, tmp_path / "cut", evaluate=False)
    for file in sorted((tmp_path / "whole").glob("*.safetensors")):
        assert file.read_bytes() == (tmp_path / "cut" / file.name).read_bytes(), file.name
    assert report.steps[0]["weights"] == 28  # those of the first run are remembered


def test_an_encoding_step_may_set_a_target_for_the_next():
    w = np.arange(8, dtype=np.float32).reshape(2, 4)
    scheme = plan(mojax.load("tiny"), load_recipe("int4")).schemes["model.layers.0.self_attn.q_proj"]
    context = Context((), {"m": scheme})
    code = QTensor(w.astype(np.uint8), {}, scheme.weights, (2, 8), np.dtype(np.float32))
    seen = []

    def look(params, stats, context):
        seen.append((params["m.weight"], context.targets["m.weight"]))
        return {}

    steps = chain(
        Transform(look, phase="encode"),
        Transform(lambda *a: {"m.weight": code}, encodes=True, phase="encode"),
        Transform(lambda *a: {"m.weight": w + 1}, phase="encode"),
        Transform(look, phase="encode"),
    )
    out = steps.apply({"m.weight": w}, {}, context)
    assert seen[0][0] is w and seen[0][1] is w
    assert seen[1][0] is code and np.array_equal(seen[1][1], w + 1)
    assert out["m.weight"] is code


# ---------------------------------------------------------------- gradients


def test_output_gradients_are_those_of_the_loss(model):
    """One token: the gradient of a weight is g x^T, so that G is known from JAX's own derivative."""
    wide = {n: np.asarray(model.params[n]).astype(np.float32) for n in model.params}
    model = dataclasses.replace(model, params=wide)
    ids = np.array([[17]], np.int32)
    name = "model.layers.1.mlp.gate_proj.weight"
    found = gradients.gradients(model, ids, draws=1, seed=3, weights={"model.layers.1.": [name]})
    key = jax.random.fold_in(jax.random.key(3), 0)

    def loss(w):
        family, p = model.family, wide | {name: w}
        x = family.embed(model.hyper, p, ids)
        for b in model.blocks:
            local = {n.removeprefix(b.prefix): v for n, v in p.items() if n.startswith(b.prefix)}
            x = family.block(model.hyper, b.kind, local, x, jnp.arange(1))
        return -jax.nn.log_softmax(family.head(model.hyper, p, x))[0, 0, label]

    label = int(jax.random.categorical(key, model(ids), axis=-1)[0, 0])
    d = np.asarray(jax.grad(loss)(jnp.asarray(wide[name])), np.float64)
    u, s, _ = np.linalg.svd(d)
    assert s[1] < 1e-4 * s[0]
    stats = calibration.calibrate_block(
        model, model.blocks[1], [first(model, ids)], {name: name}, ("sumsq",)
    )[1]
    square = s[0] ** 2 / np.asarray(stats[name]["sumsq"]).sum()
    expected = square * np.outer(u[:, 0], u[:, 0])
    gram = found.output_gram[name]
    assert gram.shape == (1, 768, 768) and gram.dtype == np.float32
    np.testing.assert_allclose(gram[0], expected, atol=2e-3 * np.abs(expected).max())
    np.testing.assert_allclose(found.tokens[name][0], [square / 768], rtol=2e-3)


def first(model, ids):
    """The input of the second block."""
    from mojax.evaluation import through

    return through(model, model.blocks[0], calibration.start(model, ids))[0]


def test_gradients_are_sums_over_batches_and_draws(model, tokens):
    name = "model.layers.3.mlp.down_proj.weight"
    weights = {"model.layers.3.": [name]}
    both = gradients.gradients(model, tokens, draws=2, seed=0, weights=weights)
    trace = np.trace(both.output_gram[name][0])
    assert sum(len(t) for t in both.tokens[name]) == tokens.size
    # w is a mean over draws and outputs, G a sum over draws and tokens
    np.testing.assert_allclose(trace, 2 * 256 * sum(t.sum() for t in both.tokens[name]), rtol=1e-3)
    again = gradients.gradients(model, tokens, draws=2, seed=0, weights=weights)
    np.testing.assert_array_equal(both.output_gram[name], again.output_gram[name])
    other = gradients.gradients(model, tokens, draws=2, seed=1, weights=weights)
    assert np.abs(other.output_gram[name] - both.output_gram[name]).max() > 0


def test_wide_outputs_have_blocks():
    assert gradients.block_rows(1024) == 1024
    assert gradients.block_rows(14336) == 128
    assert 1500 % gradients.block_rows(1500) == 0


@pytest.mark.parametrize("make", [tiny_mixtral, tiny_qwen3_moe])
def test_experts_have_grams_and_gradients_of_their_own(make, tmp_path):
    folder = make(tmp_path / "moe")
    mixture = mojax.load(folder)
    ids = np.random.default_rng(0).integers(0, 4096, (4, 32), dtype=np.int32)
    todo = plan(mixture, recipe("nvfp4_weight_only", ["qep", "gptq"], draws=1))
    stats = pipeline.calibrate(mixture, todo, ids)
    name = next(n for n in stats if "*" in n and ("down" in n or "w2" in n) and n.endswith("@encode"))
    values = stats[name]
    experts = values["gram"].shape[0]
    assert values["gram"].shape[1] == values["gram"].shape[2] and values["output_gram"].shape[0] == experts
    assert "drift" not in values  # the streams may route a token to different experts
    unseen = np.asarray(values["count"]) == 0
    assert not np.any(values["gram"][unseen]) and not np.any(values["output_gram"][unseen])
    made = pipeline.apply(mixture, todo, stats)
    assert isinstance(made.params[name.removesuffix("@encode")], QTensor)
    assert np.isfinite(np.asarray(made(ids))).all()


# ---------------------------------------------------------------- what is refused, and what is said


@pytest.mark.parametrize(
    ("steps", "said"),
    [
        (["gptq", "smoothquant", "rtn"], "smoothquant moves .* stands after gptq"),
        (["qep", "smoothquant", "rtn"], "smoothquant .* after qep.*put smoothquant first"),
        (["smoothquant", "smoothquant", "rtn"], "smoothquant stands twice"),
        (["gptq", "qep"], "the last step must encode"),
        (["mse", "rtn"], "rtn chooses scales anew, and what mse has found .* lost; leave out rtn"),
        (["gptq", "rtn"], "what gptq has found"),
        (["gptq", "mse"], "mse chooses codes anew, .* put mse before gptq"),
        (["refine", "gptq"], "put gptq before refine"),
        (["smoothquant"], "the last step must encode"),
    ],
)
def test_an_order_that_cannot_be_right(model, steps, said):
    with pytest.raises(mojax.InputError, match=said):
        plan(model, recipe("int4", steps))


def test_orders_that_lose_nothing(model):
    for steps in (["rtn", "mse", "gptq", "refine"], ["gptq", "qep", "gptq"], ["sweep", "gptq"]):
        assert plan(model, recipe("nvfp4", steps)).steps


def test_a_function_has_no_blocks():
    w = jnp.ones((32, 32), jnp.bfloat16)
    fn = mojax.from_function(lambda p, x: x @ p["w"], {"w": w}, w)
    chosen = load_recipe(
        {
            "extends": "int4",
            "steps": ["qep", "gptq"],
            "rules": [{"match": "*", "weights": {"format": "int4", "group": 32}}],
        }
    )
    with pytest.raises(mojax.PlanError, match="qep looks at what was encoded before in the blocks"):
        mojax.calibrate(fn, chosen, [w])


def halved(params, stats, context):
    """Powers of two move from inputs to weights; the function stays."""
    changed = {}
    for fold in folds(context, "norms"):
        now = {**params, **changed}
        size = params[fold.producer].shape[-1]
        changed |= move(fold, now, jnp.full((size,), 2.0, jnp.float32), context, None)
    return changed


MINE = Transform(halved, rewrites=functools.partial(rewrites, sites="norms"))


def test_a_step_of_ones_own_is_exported_and_recorded(model, tokens, tmp_path):
    todo = plan(model, recipe("int4", ["rtn"]))
    todo = dataclasses.replace(todo, steps=(MINE, *todo.steps))
    made = mojax.apply(model, todo, tokens)
    mojax.export(made, tmp_path / "out", plan=todo)
    written = mojax.load(tmp_path / "out")
    assert np.array_equal(np.asarray(written(tokens[:1])), np.asarray(made(tokens[:1])))
    record = json.loads((tmp_path / "out/mojax.json").read_text())
    assert record["steps"] == ["a step without a name", "rtn"] and record["recipe"]["steps"] == ["rtn"]
    errors = verify.verify(tmp_path / "out", "tiny").errors
    assert max(errors.values()) < 0.2  # the scales are taken off again


def test_what_are_neither_statistics_nor_tokens(model):
    todo = plan(model, recipe("int4", ["gptq"]))
    for data in (
        np.zeros((2, 8), np.float32),
        np.zeros(8, np.int32),
        (np.zeros((2, 8), np.int32), "of"),
        "text",
    ):
        with pytest.raises(mojax.InputError, match=r"needed what mojax.calibrate gives, or token ids"):
            mojax.apply(model, todo, data)


@pytest.mark.parametrize(
    ("step", "said"),
    [
        (halved, "found <function halved.*needed a Transform"),
        (
            Transform(halved, needs=("absmx",)),
            "needs 'absmx', an unknown statistic; did you mean 'absmax'",
        ),
        (
            Transform(lambda p, s, c: {"model.layers.0.q": p}),
            r"layers\.0\.q: a step returned this leaf",
        ),
    ],
)
def test_a_step_of_ones_own_that_cannot_be(model, tokens, step, said):
    todo = plan(model, recipe("int4", ["rtn"]))
    todo = dataclasses.replace(todo, steps=(step, *todo.steps))
    for data in (tokens, calibration.Stats()):
        with pytest.raises(mojax.InputError, match=said):
            mojax.apply(model, todo, data)


def test_few_tokens_are_said_and_damped(tmp_path):
    chosen = adjusted(recipe("int4", ["gptq"]), sequences=2, length=16)
    report = mojax.optimize("tiny", chosen, tmp_path / "out", evaluate=False)
    assert any("gptq" in note and "32 tokens are too few for 256 inputs" in note for note in report.notes)
    chosen = adjusted(recipe("int4", ["gptq"]), sequences=8, length=64)
    report = mojax.optimize("tiny", chosen, tmp_path / "more", evaluate=False)
    assert any("512 tokens for 256 inputs: more damping" in note for note in report.notes)
    card = (tmp_path / "more" / "README.md").read_text()
    assert "objective of gptq" in card
    facts = json.loads((tmp_path / "more" / "report.json").read_text())
    assert facts["steps"][0]["step"] == "gptq"


def test_inputs_that_are_not_finite_name_the_first_site(model, tokens):
    """NaN in a norm gain shows at the first weight that reads it."""
    gain = "model.layers.2.post_attention_layernorm.weight"
    broken = np.array(model.params[gain])
    broken[3] = np.nan
    params = {n: model.params[n] for n in model.params} | {gain: broken}
    sick = dataclasses.replace(model, params=params)
    with pytest.raises(
        mojax.errors.NotFiniteError, match=r"model\.layers\.2\.mlp\.(gate|up)_proj\.weight: its inputs"
    ):
        pipeline.calibrate(sick, plan(model, recipe("int4", ["gptq"])), tokens)


def test_outcomes_in_few_words():
    from mojax import outcomes

    did = [
        Outcome("gptq", "a", 2.0, 1.0),
        Outcome("gptq", "b", 1.0, 1.0, "few tokens"),
        Outcome("gptq", "c", 4.0, 1.0, "few tokens"),
        Outcome("qep", "a", 0.0, 0.0),
    ]
    assert outcomes.line(did[:2]) == "gptq x0.75"
    rows = outcomes.summary(did)
    assert rows[0] == {"step": "gptq", "weights": 3, "left_alone": 1, "objective": pytest.approx(1.75 / 3)}
    assert rows[1]["objective"] is None
    assert outcomes.notes(did) == ("gptq: b, c: few tokens",)


def test_verify_tells_error_feedback_from_other_numbers(model, tmp_path):
    """Feedback may leave much in directions that hardly matter; swapped nibbles are something else."""
    chosen = recipe("nvfp4", ["gptq"])
    todo = plan(model, chosen)
    mojax.optimize("tiny", chosen, tmp_path / "out", evaluate=False)
    assert max(verify.verify(tmp_path / "out", "tiny", plan=todo).errors.values()) < 0.5
    shard = next((tmp_path / "out").glob("*.safetensors"))
    name = "model.layers.0.self_attn.v_proj.weight_packed"
    table = {n: np.array(t) for n, t in checkpoint.read_shard(shard).items()}
    table[name] = table[name] << 4 | table[name] >> 4
    checkpoint.write_shard(shard, table)
    with pytest.raises(verify.VerifyError, match=r"v_proj.weight: decodes to something else .*error 1\.[34]"):
        verify.verify(tmp_path / "out", "tiny", plan=todo)
