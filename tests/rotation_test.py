"""Rotations: which axes turn together, that the function stays, and whole runs with them."""

import dataclasses
import functools
import json
import shutil
from pathlib import Path

import jax
import jax.numpy as jnp
import ml_dtypes
import moe_models
import numpy as np
import pytest
from safetensors.numpy import save_file

import mojax
from mojax import checkpoint, evaluation, experts, pipeline, rewrite, rotation, text, trace, verify
from mojax.errors import InputError
from mojax.find import find
from mojax.kernels.hadamard import hadamard
from mojax.kernels.hadamard_matrices import dividing, signs
from mojax.model import load
from mojax.models.layers import rms_norm
from mojax.planner import plan
from mojax.recipe import load_recipe
from mojax.transforms.quarot import quarot
from mojax.transforms.spinquant import cayley, rounded, spinquant

TINY = Path(mojax.__file__).parent / "data" / "tiny"
SMALL = {
    "vocab_size": 64,
    "hidden_size": 48,
    "intermediate_size": 40,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "max_position_embeddings": 64,
    "rms_norm_eps": 1e-5,
}
MIXTURE = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 24, "norm_topk_prob": True}
CASES = {
    "llama": ("llama", {}),
    "llama_one_head": ("llama", {"num_attention_heads": 2, "head_dim": 24}),
    "llama_biases": ("llama", {"attention_bias": True, "mlp_bias": True}),
    "llama_tied": ("llama", {"tie_word_embeddings": True}),
    "mistral": ("mistral", {"sliding_window": 4}),
    "qwen2": ("qwen2", {"tie_word_embeddings": True}),
    "qwen3": ("qwen3", {"attention_bias": True}),
    "mixtral": ("mixtral", {"num_local_experts": 4, "num_experts_per_tok": 2}),
    "qwen3_moe": ("qwen3_moe", MIXTURE),
    "qwen3_moe_dense_layer": ("qwen3_moe", MIXTURE | {"mlp_only_layers": [0]}),
}
Q = "model.layers.0.self_attn.q_proj"
FEW = {"sequences": 4, "length": 64}
ROTATED = {"extends": "mxfp4", "steps": ["quarot", "rtn"], "calibration": FEW}


def small(folder, kind, dtype=np.float32, **changes):
    """A random model of a family."""
    config = SMALL | {"model_type": kind} | changes
    family = find("models", kind)
    rng, tensors = np.random.default_rng(0), {}
    for leaf, (*lead, last) in family.shapes(family.configure(config)).items():
        names = experts.expand(leaf, lead[0] if lead else 1)
        for name in names:
            shape = [*lead, last][experts.starred(leaf) :]
            noise = rng.standard_normal(shape)
            w = 1 + 0.3 * noise if "norm" in name else noise * (last**-0.5 if lead else 0.3)
            tensors[name] = w.astype(dtype)
    folder.mkdir(parents=True, exist_ok=True)
    save_file(tensors, folder / "model.safetensors")
    (folder / "config.json").write_text(json.dumps(config))
    return load(folder)


def far(a, b):
    """Relative distance of two arrays."""
    return float(np.linalg.norm(np.asarray(a) - np.asarray(b)) / np.linalg.norm(np.asarray(b)))


def tokens(model, sequences=2, length=12):
    return np.random.default_rng(1).integers(0, model.config["vocab_size"], (sequences, length), np.int32)


# The function stays


@pytest.mark.parametrize("case", CASES)
def test_the_function_stays(case, tmp_path):
    kind, changes = CASES[case]
    model = small(tmp_path / "source", kind, **changes)
    turned = rewrite.outlined(model, [quarot(seed=3)])
    ids = tokens(model)
    assert far(turned(ids), model(ids)) < 1e-5
    q = np.asarray(model.params[Q + ".weight"])
    assert far(turned.params[Q + ".weight"], q) > 0.5  # it was turned


@pytest.mark.parametrize("case", ["llama_tied", "qwen3_moe"])
@pytest.mark.parametrize("options", [{"residual": False}, {"heads": False}])
def test_each_half_alone(case, options, tmp_path):
    kind, changes = CASES[case]
    model = small(tmp_path / "source", kind, **changes)
    turned = rewrite.outlined(model, [quarot(**options)])
    ids = tokens(model)
    assert far(turned(ids), model(ids)) < 1e-5
    down = next(n for n in model.params if "down_proj.weight" in n)
    same = np.array_equal(turned.params[down], model.params[down])
    assert same == ("residual" in options)
    value = "model.layers.1.self_attn.v_proj.weight"
    rows = np.asarray(turned.params[value]), np.asarray(model.params[value])
    if "residual" in options:  # the norms of the columns of every head stay, the rows are mixed
        heads = [np.linalg.norm(w.reshape(2, 8, -1), axis=1) for w in rows]
        assert far(*heads) < 1e-5 and far(*rows) > 0.5
        assert turned.config.get("tie_word_embeddings") == model.config.get("tie_word_embeddings")


def test_experts_in_files_are_turned_as_the_stack_is(tmp_path):
    model = small(tmp_path / "source", "qwen3_moe", **MIXTURE)
    turned = rewrite.outlined(model, [quarot()])
    leaf = "model.layers.0.mlp.experts.*.down_proj.weight"
    stack = np.asarray(turned.params[leaf])
    for i, name in enumerate(experts.expand(leaf, 4)):
        assert np.array_equal(turned.checkpoint[name], stack[i])
    router = "model.layers.0.mlp.gate.weight"
    assert far(turned.params[router], model.params[router]) > 0.5


def test_the_residual_stream_keeps_its_norms(tmp_path):
    model = small(tmp_path / "source", "llama")
    turned = rewrite.outlined(model, [quarot()])
    ids = tokens(model)
    before, after = (evaluation.hidden(m, ids, lambda: False)[0] for m in (model, turned))
    norms = [np.linalg.norm(np.asarray(x), axis=-1) for x in (before, after)]
    assert far(*norms) < 1e-5 and far(before, after) > 0.5


def test_norm_gains_become_one_and_a_bias_turns_with_its_weight(tmp_path):
    model = small(tmp_path / "source", "llama", attention_bias=True)
    turned = rewrite.outlined(model, [quarot(heads=False)])
    for name in (n for n in model.params if "norm" in n):
        assert np.all(turned.params[name] == 1) and not np.all(model.params[name] == 1)
    bias = "model.layers.0.self_attn.o_proj.bias"
    q = rotation.dense(signs(0, "model.embed_tokens.weight", 48))
    assert far(turned.params[bias], np.asarray(model.params[bias]) @ q) < 1e-6
    assert np.array_equal(turned.params[Q + ".bias"], model.params[Q + ".bias"])


def test_the_dtype_of_a_tensor_stays_and_is_rounded_to_once(tmp_path):
    half = small(tmp_path / "half", "llama", ml_dtypes.bfloat16)
    turned = rewrite.outlined(half, [quarot()])
    exact = dataclasses.replace(half, params={n: np.asarray(half.params[n], np.float32) for n in half.params})
    exact = rewrite.outlined(exact, [quarot()])
    for name in turned.params:
        w = np.asarray(turned.params[name])
        assert w.dtype == ml_dtypes.bfloat16 == turned.tensors.spec(name).dtype
        assert np.array_equal(w, np.asarray(exact.params[name]).astype(ml_dtypes.bfloat16))


# The matrices


@pytest.mark.parametrize("size", [1, 6, 8, 24, 48, 60, 128, 320])
def test_a_random_hadamard_matrix_is_orthogonal(size):
    q = rotation.dense(signs(0, "x", size))
    assert np.abs(q.astype(np.float64) @ q.T - np.eye(size)).max() < 1e-6
    block = dividing(size)
    assert size % block == 0 and np.allclose(np.abs(q[q != 0]), block**-0.5)
    x = np.random.default_rng(0).standard_normal((3, size)).astype(np.float32)
    kernel = hadamard(x, block=block, signs=signs(0, "x", size).astype(np.float32))
    assert far(x @ q, kernel) < 1e-6


def test_a_whole_matrix_is_taken_where_one_is_known():
    assert [dividing(n) for n in (4096, 5120, 3584, 48, 6, 7)] == [4096, 5120, 3584, 48, 2, 1]


def test_signs_come_from_the_seed_and_the_name_alone():
    assert signs(0, "model.embed_tokens.weight", 12).tolist() == SIGNS
    assert not np.array_equal(signs(0, "a", 64), signs(1, "a", 64))
    assert not np.array_equal(signs(0, "a", 64), signs(0, "b", 64))


SIGNS = [1, 1, 1, 1, -1, 1, -1, 1, -1, 1, 1, 1]


@pytest.mark.parametrize("axis", [-1, -2])
def test_turn_is_a_product_along_an_axis(axis, monkeypatch):
    monkeypatch.setattr(rotation, "PIECE", 64)  # in many pieces
    rng = np.random.default_rng(0)
    w, gain = rng.standard_normal((3, 24, 24)).astype(np.float32), rng.standard_normal(24).astype(np.float32)
    q = rotation.dense(signs(0, "x", 8))
    got = rotation.turn(w, axis, signs(0, "x", 8), 8, gain)
    whole = np.kron(np.eye(3), q)
    want = (w * gain) @ whole if axis == -1 else np.swapaxes(np.swapaxes(w, 1, 2) * gain @ whole, 1, 2)
    assert got.dtype == np.float32 and far(got, want) < 1e-6
    assert far(rotation.turn(w, axis, q, 8, gain), want) < 1e-6


# What cannot be turned is refused


def found(block, params, kind="residual", wanted=True):
    x = jax.ShapeDtypeStruct((1, 4, 16), jnp.float32)
    graph = trace.graph(block, params, x)
    seeds, ends = (graph.args[:1], graph.outputs) if wanted else ([], graph.outputs)
    return rewrite._space(kind, graph, seeds, ends, "layer.")


def struct(*shape):
    return jax.ShapeDtypeStruct(shape, jnp.float32)


SQUARE = {"w": struct(16, 16), "g": struct(16)}


def readers_and_writers(p, x):
    y = rms_norm(x, p["g"], 1e-5)
    return x + jnp.tanh(y @ p["w"].T) @ p["v"]


def test_layouts_other_than_out_in_are_found():
    space = found(readers_and_writers, SQUARE | {"v": struct(16, 16)})
    assert set(space.axes) == {("w", -1), ("v", -1)} and space.gains == (("g", (("w", -1),)),)


REFUSED = {
    "a norm after a writer": (lambda p, x: x + rms_norm(x @ p["w"], p["g"], 1e-5), "layer.g: .*norm"),
    "a gain of 1 + g": (lambda p, x: x + rms_norm(x, 1 + p["g"], 1e-5) @ p["w"], "layer.g: "),
    "LayerNorm": (
        lambda p, x: x + (x - jnp.mean(x, -1, keepdims=True)) * p["g"][None, None] @ p["w"],
        "summed by reduce_sum.*LayerNorm",
    ),
    "a nonlinearity on the stream": (lambda p, x: jnp.tanh(x) @ p["w"], "tanh"),
    "a gain read by others": (
        lambda p, x: x + (y := rms_norm(x, p["g"], 1e-5)) @ p["w"] + y,
        "layer.g: .*can only move into linears",
    ),
    "a branch that is no linear": (lambda p, x: x + jnp.tanh(x @ p["w"]), "layer.w: tanh"),
    "a weight read by others": (
        lambda p, x: x + (x @ p["w"]) + jnp.sum(jnp.square(p["w"])) * x,
        "layer.w: is read by square.* too",
    ),
    "a layer scale": (lambda p, x: x + (x @ p["w"]) * p["g"][None, None], "layer.g: "),
    "a constant": (lambda p, x: x @ p["w"] + x + 1.0, "one number|constant|same for all"),
    "a part of the stream": (lambda p, x: x + x[..., :3] @ p["w"][:3], "part"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_what_would_change_is_refused_by_name(case):
    block, message = REFUSED[case]
    with pytest.raises(InputError, match=message) as caught:
        found(block, SQUARE)
    assert "the residual stream cannot be turned" in str(caught.value)
    assert "residual: false" in str(caught.value)


def test_a_gate_on_the_heads_is_refused():
    def gated(p, x):
        v = (x @ p["v"]).reshape(1, 4, 2, 8)
        y = jnp.einsum("bqhk,bkhd->bqhd", jnp.ones((1, 4, 2, 4)), v)
        return (y * jax.nn.sigmoid(x.reshape(1, 4, 2, 8))).reshape(1, 4, 16) @ p["o"]

    graph = trace.graph(gated, {"v": struct(16, 16), "o": struct(16, 16)}, struct(1, 4, 16))
    with pytest.raises(InputError, match=r"values of attention cannot be turned.*heads: false"):
        rewrite._heads(graph, "layer.")


def test_bad_options_are_refused():
    for make in (quarot, spinquant):
        with pytest.raises(InputError, match="both false"):
            make(residual=False, heads=False)
        with pytest.raises(InputError, match="seed"):
            make(seed=-1)
    with pytest.raises(InputError, match="rate"):
        spinquant(rate=0.0)


def test_a_model_without_a_family_is_refused(tmp_path):
    shutil.copytree(TINY, tmp_path / "other")
    config = json.loads((TINY / "config.json").read_text())
    (tmp_path / "other" / "config.json").write_text(json.dumps(config | {"model_type": "unheard"}))
    with pytest.raises(InputError, match=r"unheard.*no forward function.*rotation"):
        plan(load(tmp_path / "other", generic=True), load_recipe(ROTATED))


# The plan


def test_the_plan_says_what_is_turned_and_reads_no_weight():
    made = plan(load("tiny", headers_only=True), load_recipe(ROTATED))
    rows = {r.name: r for r in made.rows}
    head = rows["lm_head.weight"]
    assert head.reason == "untied by quarot" and head.before == 0 and head.after == 4096 * 256 * 2
    assert head.role == "head" and head.scheme is None
    assert rows["model.embed_tokens.weight"].reason == "turned by quarot"
    assert rows["model.norm.weight"].reason == "becomes 1, by quarot"
    plain = plan(load("tiny"), "mxfp4")
    assert made.source_parameters == plain.source_parameters
    assert made.bytes_before == plain.bytes_before


@pytest.mark.parametrize("steps", [["rtn", "quarot"], [{"smoothquant": {}}, "quarot", "rtn"]])
def test_a_rotation_comes_first(steps):
    with pytest.raises(InputError, match="put quarot first"):
        plan(load("tiny"), load_recipe({"extends": "int8", "steps": steps}))


def test_apply_needs_what_was_learned(tmp_path):
    model = load("tiny")
    made = plan(model, load_recipe({"extends": "mxfp4", "steps": ["spinquant", "rtn"]}))
    assert "sample" in made.needs
    with pytest.raises(InputError, match="must be learned"):
        pipeline.apply(model, made, {})


# Whole runs


@pytest.fixture(scope="module")
def out(tmp_path_factory):
    folder = tmp_path_factory.mktemp("rotated") / "out"
    report = mojax.optimize("tiny", load_recipe(ROTATED), folder)
    return folder, report


def test_a_run_is_written_verified_and_evaluated(out):
    folder, report = out
    config = json.loads((folder / "config.json").read_text())
    assert config["tie_word_embeddings"] is False
    assert "lm_head" in config["quantization_config"]["ignore"]
    model = load(folder)
    assert np.all(np.asarray(model.params["model.norm.weight"]) == 1)
    checked = verify.verify(folder, reference="tiny")
    assert len(checked.errors) == 28 and max(checked.errors.values()) < 0.15
    again = pipeline.evaluate_folder(str(folder), "tiny", "builtin")
    assert again.kl_mean == pytest.approx(report.kl_mean, rel=1e-5) and report.kl_mean < 0.15
    assert {w["tensor"]: w["rel_error"] for w in again.worst} == {
        w["tensor"]: w["rel_error"] for w in report.worst
    }


def test_in_memory_is_the_same_as_streamed(out, tmp_path):
    folder, _ = out
    model = load("tiny")
    made = plan(model, load_recipe(ROTATED))
    memory, disk = pipeline.apply(model, made, pipeline.calibrate(model, made, tokens(model))), load(folder)
    assert not memory.config["tie_word_embeddings"] and set(memory.params) == set(disk.params)
    assert np.array_equal(memory.params[Q + ".weight"].codes, disk.params[Q + ".weight"].codes)
    head = "lm_head.weight"
    assert np.array_equal(np.asarray(memory.params[head]), np.asarray(disk.params[head]))
    assert files(mojax.export(memory, tmp_path / "out", plan=made)) == files(folder)


def test_verify_takes_the_seed_from_the_record(out, tmp_path):
    folder = shutil.copytree(out[0], tmp_path / "copy")
    record = json.loads((folder / "mojax.json").read_text())
    record["recipe"]["steps"][0] = {"quarot": {"seed": 1}}
    (folder / "mojax.json").write_text(json.dumps(record))
    with pytest.raises(verify.VerifyError, match="decodes to something else") as caught:
        verify.verify(folder, reference="tiny")
    assert "lm_head.weight: was to be kept" in str(caught.value)


def test_a_folder_of_others_is_compared_as_far_as_it_can_be(out, tmp_path):
    folder = shutil.copytree(out[0], tmp_path / "copy")
    (folder / "mojax.json").unlink()
    checked = verify.verify(folder, reference="tiny")
    assert checked.errors == {} and any("which rotation" in note for note in checked.notes)


def stopped(after):
    """Says stop the `after`th time it is asked."""
    asked = iter(range(100))
    return lambda: next(asked) == after - 1


def files(folder):
    names = [
        p for p in sorted(folder.iterdir()) if p.suffix in (".safetensors", ".npz") or "config" in p.name
    ]
    return {p.name: p.read_bytes() for p in names}


def test_an_interrupted_run_goes_on_to_the_same_bytes(out, tmp_path):
    with pytest.raises(pipeline.Interrupted):
        mojax.optimize("tiny", load_recipe(ROTATED), tmp_path / "out", interrupted=stopped(3), evaluate=False)
    assert len(list((tmp_path / "out.partial").glob("*.safetensors"))) == 3
    mojax.optimize("tiny", load_recipe(ROTATED), tmp_path / "out", evaluate=False)
    assert files(tmp_path / "out") == files(out[0])


def test_a_quantized_source_and_a_mixture_of_experts(tmp_path):
    source = moe_models.tiny_qwen3_moe(tmp_path / "source", tie_word_embeddings=True, num_hidden_layers=1)
    mojax.optimize(source, "fp8_dynamic", tmp_path / "fp8", evaluate=False)
    steps = {"extends": "nvfp4_weight_only", "steps": ["quarot", "rtn"]}
    mojax.optimize(tmp_path / "fp8", load_recipe(steps), tmp_path / "out", format="modelopt", evaluate=False)
    checked = verify.verify(tmp_path / "out", reference=tmp_path / "fp8")
    assert max(checked.errors.values()) < 0.15 and any("quantized itself" in note for note in checked.notes)


# Outliers


def planted(folder, size):
    """The built-in model with four channels of the residual stream `size` times larger."""
    model, channels, tensors = load("tiny"), [3, 77, 140, 201], {}
    for name in model.params:
        w = np.array(model.params[name], np.float32)
        if name == "model.embed_tokens.weight":
            tensors["lm_head.weight"] = w.copy()
            tensors["lm_head.weight"][:, channels] /= size
            w[:, channels] *= size
        elif name.endswith(("o_proj.weight", "down_proj.weight")):
            w[channels] *= size
        elif w.ndim == 2:
            w[:, channels] /= size
        tensors[name] = w
    folder.mkdir()
    save_file({n: w.astype(ml_dtypes.bfloat16) for n, w in tensors.items()}, folder / "model.safetensors")
    config = dict(model.config) | {"tie_word_embeddings": False}
    (folder / "config.json").write_text(json.dumps(config))
    return load(folder)


@functools.cache
def sample_text():
    return text.tokens("builtin", TINY, sequences=4, length=128, seed=0, purpose="evaluation", vocab=4096).ids


def kl(model, inputs, steps):
    recipe = {"rules": [{"match": "*", "weights": {"format": "int8"}, "inputs": inputs}], "steps": steps}
    made = plan(model, load_recipe(recipe), target="mojax")
    return evaluation.evaluate(pipeline.apply(model, made, {}), model, sample_text()).kl_mean


@pytest.mark.parametrize("inputs, factor", [({"format": "int4", "group": 256}, 4), ("mxfp4", 1.3)])
def test_huge_channels_cost_less_after_a_rotation(inputs, factor, tmp_path):
    """Four-bit integers per 256 channels lose nearly all others, blocks of 32 only their neighbours."""
    model = planted(tmp_path / "source", 16.0)
    assert factor * kl(model, inputs, ["quarot", "rtn"]) < kl(model, inputs, ["rtn"])


# Learned rotations


def test_a_cayley_step_stays_orthogonal_and_goes_downhill():
    rng = np.random.default_rng(0)
    r = jnp.asarray(rotation.dense(signs(0, "x", 16)))
    goal = jnp.asarray(np.linalg.qr(rng.standard_normal((16, 16)))[0], jnp.float32)

    def loss(r):
        return jnp.sum(jnp.square(r - goal))

    first = float(loss(r))
    for _ in range(50):
        r = cayley(r, jax.grad(loss)(r), jnp.float32(0.1))
        assert np.abs(np.asarray(r.T @ r) - np.eye(16)).max() < 1e-5
    assert float(loss(r)) < 0.5 * first


def test_rounding_is_exact_forwards_and_its_error_grows_with_the_largest_entry():
    format = find("formats", "mxfp4").FORMAT()
    x = jnp.asarray(np.random.default_rng(0).standard_normal((2, 64)), jnp.float32)
    assert np.allclose(rounded(format, x), format.fake(x), atol=1e-6)
    slopes = jax.grad(lambda x: jnp.sum(rounded(format, x)))(x)
    others = np.abs(np.asarray(x)).reshape(4, 32) < np.abs(np.asarray(x)).reshape(4, 32).max(1)[:, None]
    assert np.all(np.asarray(slopes).reshape(4, 32)[others] == 1)
    assert not np.any(np.asarray(slopes).reshape(4, 32)[~others] == 1)


def test_learned_rotations_are_better_than_random_ones_and_are_found_again(tmp_path):
    model = small(tmp_path / "source", "qwen3", ml_dtypes.bfloat16, hidden_size=64, intermediate_size=64)
    for name in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copy(TINY / name, tmp_path / "source" / name)
    ids = tmp_path / "ids.npz"
    np.savez(ids, tokens=tokens(model, 8, 32))
    recipe = load_recipe(
        {
            "rules": [{"match": "*", "weights": "mxfp4", "inputs": "mxfp4"}],
            "steps": [{"spinquant": {"steps": 12, "rows": 64}}, "rtn"],
            "calibration": {"text": str(ids), "sequences": 8, "length": 32},
        }
    )
    made, outcomes = plan(model, recipe), []
    stats = rewrite.learned(model, made, tokens(model, 8, 32), outcomes.append)
    assert outcomes[0].after < outcomes[0].before
    seen = pipeline.calibrate(model, made, tokens(model, 8, 32))
    seen.save(tmp_path / "stats")
    memory = pipeline.apply(model, made, type(seen).load(tmp_path / "stats"))
    value = "model.layers.0.self_attn.v_proj.weight"
    assert "rotation" in seen[value] and np.array_equal(seen[value]["rotation"], stats[value]["rotation"])
    turned = rewrite.rewritten(model, made, stats)
    exact = dataclasses.replace(
        model, params={n: np.asarray(model.params[n], np.float32) for n in model.params}
    )
    assert far(rewrite.rewritten(exact, made, stats)(tokens(model)), exact(tokens(model))) < 1e-5
    with pytest.raises(pipeline.Interrupted):
        mojax.optimize(tmp_path / "source", recipe, tmp_path / "out", interrupted=stopped(2), evaluate=False)
    before = (tmp_path / "out.partial" / rewrite.SAVED).read_bytes()
    mojax.optimize(tmp_path / "source", recipe, tmp_path / "out", evaluate=False)
    assert (tmp_path / "out" / rewrite.SAVED).read_bytes() == before
    assert np.array_equal(memory.params[value].codes, load(tmp_path / "out").params[value].codes)
    checked = verify.verify(tmp_path / "out", reference=tmp_path / "source")
    assert max(checked.errors.values()) < 0.15
    saved = rewrite.saved(tmp_path / "out")
    assert set(saved) == set(stats) == {s.name for s in rewrite._turnable(model, made.steps[0])[2]}
    assert isinstance(turned.checkpoint, checkpoint.Derived) and set(turned.checkpoint.learned) == set(stats)
