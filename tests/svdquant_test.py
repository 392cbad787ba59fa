"""SVDQuant: a low-rank branch beside packed linears, as mathematics, in runs and in files."""

import dataclasses
import functools
import json
import re
import shutil

import jax.numpy as jnp
import numpy as np
import pytest
from moe_models import tiny_qwen3_moe

import mojax
from mojax import beside, cli
from mojax.checkpoint import open_checkpoint, read_shard, write_shard
from mojax.conversion import convert
from mojax.errors import InputError, NotFiniteError, PlanError
from mojax.formats import int4, nvfp4
from mojax.kernels.hadamard import hadamard
from mojax.recipe import load_recipe
from mojax.rounding.objective import damped
from mojax.sources import as_source
from mojax.transforms.base import Context
from mojax.transforms.svdquant import Rounding, low_rank, solve, svdquant
from mojax.verify import VerifyError, verify

LLAMA = "tests/golden/models/llama"
RANK = 8
BF16, F32 = np.dtype(jnp.bfloat16), np.dtype(np.float32)
NV = Rounding(nvfp4.FORMAT(), F32, BF16)


def recipe(*steps, hadamard=None, inputs="nvfp4", weights="nvfp4"):
    rule = {"match": "*", "weights": weights, "inputs": inputs} | ({"hadamard": hadamard} if hadamard else {})
    return load_recipe(
        {"rules": [rule], "steps": list(steps), "calibration": {"sequences": 2, "length": 16}, "name": "svd"}
    )


def svd(**options):
    return {"svdquant": {"rank": RANK} | options}


@functools.cache
def llama():
    return mojax.load(LLAMA)


@functools.cache
def tokens():
    return np.random.default_rng(0).integers(3, 512, (2, 16)).astype(np.int32)


def logits(model):
    return np.asarray(model(tokens()), np.float64).reshape(-1, 512)


def distance(a, b):
    return float(np.abs(a - b).max() / np.abs(b).max())


def weight(rows=48, columns=64, seed=0):
    rng = np.random.default_rng(seed)
    w = rng.standard_normal((rows, columns)) * np.linspace(4, 0.2, columns)
    x = rng.standard_normal((400, columns)) @ rng.standard_normal((columns, columns))
    return jnp.asarray(w, jnp.float32), damped(jnp.asarray(x.T @ x, jnp.float32))


# ---------------------------------------------------------------- mathematics


@pytest.mark.parametrize("shape", [(48, 64), (64, 48)])
def test_what_is_left_is_the_rest_of_the_spectrum(shape):
    w, _ = weight(*shape)
    a, b = low_rank(RANK, w, None)
    rest = np.asarray(w, np.float64) - np.asarray(b, np.float64) @ np.asarray(a, np.float64)
    s = np.linalg.svd(np.asarray(w, np.float64), compute_uv=False)
    assert (rest**2).sum() == pytest.approx((s[RANK:] ** 2).sum(), rel=1e-5)
    assert a.shape == (RANK, shape[1]) and b.shape == (shape[0], RANK)


def test_the_metric_of_the_inputs_is_minimised():
    """In the coordinates of H the error is the rest of the spectrum: nothing of this rank is better."""
    w, h = weight()
    root = np.linalg.cholesky(np.asarray(h, np.float64))
    a, b = low_rank(RANK, w, jnp.asarray(root, jnp.float32))
    rest = (np.asarray(w, np.float64) - np.asarray(b, np.float64) @ np.asarray(a, np.float64)) @ root
    s = np.linalg.svd(np.asarray(w, np.float64) @ root, compute_uv=False)
    assert (rest**2).sum() == pytest.approx((s[RANK:] ** 2).sum(), rel=1e-4)
    plain = low_rank(RANK, w, None)
    plain = (np.asarray(w) - np.asarray(plain[1] @ plain[0])).astype(np.float64) @ root
    assert (rest**2).sum() < 0.9 * (plain**2).sum()


def test_the_rest_is_that_of_the_rounded_leaves():
    w, h = weight()
    made = solve(w, h, NV, RANK)
    assert made.a.dtype == made.b.dtype == BF16
    product = np.asarray(made.b, np.float64) @ np.asarray(made.a, np.float64)
    assert np.abs(np.asarray(made.rest) + product - np.asarray(w)).max() < 1e-5
    assert made.after < 0.7 * made.before


@pytest.mark.parametrize("fit", ["weight", "error"])
def test_more_rounds_are_never_worse_and_neither_is_a_branch(fit):
    for seed in range(3):
        w, h = weight(seed=seed)
        values = NV.near(w) if fit == "error" else None
        errors = [solve(w, h, NV, RANK, rounds, values).after for rounds in (0, 1, 3)]
        none = solve(w, h, NV, RANK, 0, values).before
        assert errors[0] < none and sorted(errors, reverse=True) == errors
        assert solve(w, h, NV, RANK, 3, values).before == none


def test_what_a_branch_cannot_better_keeps_none():
    """On the grid already: there is no error to take."""
    w, h = weight()
    w = NV.near(w)
    made = solve(w, h, NV, RANK, 2, w)
    assert made.after == made.before == 0
    assert not np.any(np.asarray(made.a, np.float32)) and np.array_equal(made.rest, w)


def test_a_branch_reads_inputs_before_they_are_rotated():
    w, _ = weight(columns=64)
    turned = hadamard(w, block=64)
    made = solve(turned, None, NV._replace(hadamard=64), RANK)
    rest = np.asarray(hadamard(made.rest, block=64)) + np.asarray(beside.product(made.a, made.b))
    assert np.abs(rest - np.asarray(w)).max() < 1e-5


def test_a_weight_that_is_not_finite_is_named():
    w = np.ones((32, 32), np.float32)
    w[3, 3] = np.nan
    scheme = mojax.formats.base.Scheme(int4.FORMAT(group=32), rank=4)
    context = Context((), {"m": scheme}, targets={"m.weight": w})
    with pytest.raises(NotFiniteError, match=r"m\.weight: holds NaN"):
        svdquant(rank=4, metric="weights").apply({"m.weight": w}, {}, context)


@pytest.mark.parametrize(
    "options", [{"rank": -1}, {"rounds": -1}, {"fit": "x"}, {"metric": "x"}, {"damping": 0.0}]
)
def test_options_are_checked(options):
    with pytest.raises(InputError, match=f"svdquant: .*{next(iter(options))}"):
        svdquant(**options)


# ---------------------------------------------------------------- runs


@functools.cache
def encoded(*steps, **options):
    steps = recipe(*(json.loads(s) for s in steps), **options)
    plan = mojax.plan(llama(), steps)
    stats = mojax.calibrate(llama(), plan, tokens()) if plan.needs else {}
    return plan, mojax.apply(llama(), plan, stats)


def test_the_function_stays_in_float32_while_nothing_is_rounded():
    model = llama()
    wide = {n: np.asarray(w, np.float32) for n, w in model.params.items()}
    plan = mojax.plan(model, recipe(svd(), "rtn"), target="mojax")
    made = dict(wide)
    for module, scheme in plan.schemes.items():
        assert scheme.rank == RANK
        found = solve(jnp.asarray(wide[module + ".weight"]), None, NV, RANK)
        assert found.after < found.before
        made |= {module + ".weight": found.rest, module + ".lora_a": found.a, module + ".lora_b": found.b}
    plain = logits(dataclasses.replace(model, params=wide))
    assert distance(logits(dataclasses.replace(model, params=made)), plain) < 1e-5
    without = {n: leaf for n, leaf in made.items() if not n.endswith(beside.LEAVES)}
    assert distance(logits(dataclasses.replace(model, params=without)), plain) > 1e-2


def test_packed_runs_and_generation_compute_what_decoded_weights_do():
    _, model = encoded(json.dumps(svd(metric="weights", rounds=0)), '"rtn"', inputs="none")
    found = logits(model)
    assert distance(found, logits(mojax.dequantize(model))) < 0.05
    lost = {n: leaf for n, leaf in model.params.items() if not n.endswith(beside.LEAVES)}
    assert distance(found, logits(dataclasses.replace(model, params=lost))) > 0.3
    said = mojax.run(model).generate([tokens()[0].tolist()], max_tokens=3)
    best = model(np.asarray(tokens()[:1]))[0, -1]
    assert said.texts[0].tokens[:1] == (int(jnp.argmax(best)),) or said.texts[0].reason == "stop"


def test_rank_0_is_the_recipe_without_the_step():
    _, none = encoded(json.dumps({"svdquant": {"rank": 0}}), '"rtn"')
    _, plain = encoded('"rtn"')
    assert none.schemes == plain.schemes and set(none.params) == set(plain.params)
    for name in plain.schemes:
        a, b = none.params[name + ".weight"], plain.params[name + ".weight"]
        assert np.array_equal(a.codes, b.codes)
        assert all(np.array_equal(a.scales[level], b.scales[level]) for level in b.scales)


def test_later_steps_work_on_the_rest():
    plan, model = encoded(json.dumps(svd()), '"gptq"', '{"svdquant": {"rank": 8, "fit": "error"}}')
    assert "gram" in plan.needs
    name = next(iter(plan.schemes))
    q, (a, b) = model.params[name + ".weight"], beside.branch(model.params, name)
    w = np.asarray(llama().params[name + ".weight"], np.float32)
    total = np.asarray(q.format.decode(q)) + np.asarray(beside.product(a, b))
    assert np.linalg.norm(total - w) < 0.15 * np.linalg.norm(w)
    assert np.linalg.norm(np.asarray(q.format.decode(q)) - w) > 0.2 * np.linalg.norm(w)


def test_bits_count_the_branch():
    plan, model = encoded(json.dumps(svd()), '"rtn"')
    plain, _ = encoded('"rtn"')
    more = sum(16 * RANK * sum(r.shape) for r in plan.rows if r.scheme)
    count = sum(int(np.prod(r.shape)) for r in plan.rows if r.scheme)
    assert plan.bits_per_quantized_weight - plain.bits_per_quantized_weight == pytest.approx(more / count)
    assert mojax.evaluation.quantized_bits(model) == pytest.approx(plan.bits_per_quantized_weight, rel=1e-3)


# ---------------------------------------------------------------- refusals


@pytest.mark.parametrize(
    ("format", "target", "rank", "said"),
    [
        ("modelopt", "vllm", 8, "it rejects NVFP4_SVD; use --target=trtllm, or --format=compressed-tensors"),
        ("modelopt", "sglang", 8, "it rejects NVFP4_SVD"),
        ("compressed-tensors", "trtllm", 8, "LoRA adapter; use --format=modelopt"),
        ("bitsandbytes", "transformers", 8, "bitsandbytes"),
        ("compressed-tensors", "vllm", 256, "would be the whole of it"),
        ("compressed-tensors", "vllm", 600, "serves adapters up to rank 512"),
    ],
)
def test_what_cannot_be_served_is_refused(format, target, rank, said):
    weights, inputs = ("nf4", "none") if format == "bitsandbytes" else ("nvfp4", "nvfp4")
    steps = recipe({"svdquant": {"rank": rank}}, "rtn", weights=weights, inputs=inputs)
    with pytest.raises(PlanError, match=re.escape(said)):
        mojax.plan(llama(), steps, format=format, target=target)


def test_orders_that_make_no_sense_are_refused():
    with pytest.raises(InputError, match="last step must encode"):
        mojax.plan(llama(), recipe("rtn", svd()))
    with pytest.raises(InputError, match=r"ranks \[4, 8\]"):
        mojax.plan(llama(), recipe(svd(), "rtn", svd(rank=4, fit="error")))
    plan = mojax.plan(llama(), recipe(svd(fit="error", metric="weights"), inputs="none"))
    with pytest.raises(InputError, match="put it after rtn, mse or gptq"):
        mojax.apply(llama(), plan, {})


# ---------------------------------------------------------------- files


@pytest.fixture(scope="module", params=["compressed-tensors", "modelopt"])
def written(request, tmp_path_factory):
    """The llama with branches beside NVFP4 weights, in both dialects."""
    out = tmp_path_factory.mktemp("svd") / "out"
    target = {"modelopt": "trtllm"}.get(request.param, "vllm")
    report = mojax.optimize(
        LLAMA,
        recipe("smoothquant", svd(), "rtn"),
        out,
        format=request.param,
        target=target,
        evaluate=False,
    )
    return request.param, out, report


def test_a_checkpoint_reads_back(written):
    dialect, out, report = written
    model = mojax.load(out)
    assert {s.rank for s in model.schemes.values()} == {RANK}
    verified = verify(out, LLAMA)
    assert max(verified.errors.values()) < 0.15
    assert any("adapter/" in note for note in report.notes) == (dialect == "compressed-tensors")
    assert mojax.evaluation.quantized_bits(model) == pytest.approx(report.bits_per_quantized_weight, rel=1e-2)
    name = next(iter(model.schemes))
    decoded = as_source(model).params[name + ".weight"]
    q = model.params[name + ".weight"]
    low = np.asarray(beside.product(*beside.branch(model.params, name)))
    assert np.abs(np.asarray(decoded, np.float32) - np.asarray(q.format.decode(q)) - low).max() < 0.01
    assert np.isfinite(logits(model)).all()


def test_the_names_are_those_of_the_dialect(written):
    dialect, out, _ = written
    main, module = open_checkpoint(out), "model.layers.0.mlp.down_proj"
    if dialect == "modelopt":
        assert main.spec(f"{module}.weight_quantizer._svdquant_lora_a").shape == (RANK, 768)
        assert main.spec(f"{module}.weight_quantizer._svdquant_lora_b").shape == (256, RANK)
        said = json.loads((out / "hf_quant_config.json").read_text())["quantization"]
        assert (said["quant_algo"], said["lora_rank"], said["pre_quant_scale"]) == ("NVFP4_SVD", RANK, False)
        assert not (out / "adapter").exists()
        return
    assert not any("lora" in n for n in main)
    tensors = read_shard(out / "adapter" / "adapter_model.safetensors")
    assert tensors[f"base_model.model.{module}.lora_A.weight"].shape == (RANK, 768)
    assert tensors[f"base_model.model.{module}.lora_B.weight"].shape == (256, RANK)
    said = json.loads((out / "adapter" / "adapter_config.json").read_text())
    assert (said["r"], said["lora_alpha"], said["bias"], said["peft_type"]) == (RANK, RANK, "none", "LORA")
    assert said["target_modules"] == sorted(
        ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
    )
    assert "enable-lora" in (out / "README.md").read_text()


def test_dialects_convert_into_each_other(written, tmp_path):
    dialect, out, _ = written
    other = {"modelopt": "compressed-tensors"}.get(dialect, "modelopt")
    made = convert(out, other, tmp_path / "other")
    assert made.target == ("vllm" if other == "compressed-tensors" else "trtllm")
    a, b = mojax.load(out), mojax.load(made.folder)
    assert set(a.params) == set(b.params) and a.schemes.keys() == b.schemes.keys()
    for name in (leaf for module in a.schemes for leaf in beside.leaves(module)):
        assert np.array_equal(a.params[name], b.params[name])


def test_the_last_lines_say_how_to_serve(written):
    dialect, out, _ = written
    if dialect == "compressed-tensors":
        served = {"vllm": "--max-lora-rank 8", "sglang": "--lora-paths", "transformers": "Peft"}
        for target, words in served.items():
            said = cli.serve(str(out), target)
            assert words in said and f"{out}/adapter" in said
    else:
        assert cli.serve(str(out), "trtllm") == f"trtllm-serve {out}"


def damage(name, change):
    def edit(out):
        path = out / "adapter" / "adapter_model.safetensors"
        tensors = dict(read_shard(path))
        change(tensors, f"base_model.model.{name}.lora_A.weight")
        write_shard(path, tensors)

    return edit


def configured(**keys):
    def edit(out):
        path = out / "adapter" / "adapter_config.json"
        path.write_text(json.dumps(json.loads(path.read_text()) | keys))

    return edit


def nan(tensors, name):
    tensors[name] = np.full_like(tensors[name], np.nan)


Q = "model.layers.0.self_attn.q_proj"


@pytest.mark.parametrize("written", ["compressed-tensors"], indirect=True)
@pytest.mark.parametrize(
    ("edit", "said"),
    [
        (damage(Q, nan), "the branch holds NaN"),
        (damage(Q, lambda t, n: t.update({n: t[n][:, :-1]})), "shape is"),
        (damage(Q, lambda t, n: t.pop(n.replace("_A", "_B"))), "cannot be read back|missing"),
        (
            damage(Q, lambda t, n: t.update({n.replace("q_proj", "z"): t[n]})),
            "no encoded weight is beside it",
        ),
        (configured(lora_alpha=16), "r = lora_alpha"),
        (configured(rank_pattern={"q_proj": 4}), "rank_pattern"),
        (lambda out: shutil.rmtree(out / "adapter"), "adapter_model.safetensors: is missing"),
    ],
)
def test_verify_looks_at_the_adapter(written, tmp_path, edit, said):
    _, out, _ = written
    shutil.copytree(out, tmp_path / "out")
    edit(tmp_path / "out")
    with pytest.raises((VerifyError, InputError), match=said):
        verify(tmp_path / "out")


def test_an_interrupted_run_goes_on_to_the_same_bytes(tmp_path):
    calls = []

    def stop():
        calls.append(1)
        return len(calls) == 2

    steps = recipe(svd(rounds=0), "gptq")
    mojax.optimize(LLAMA, steps, tmp_path / "a", evaluate=False)
    with pytest.raises(mojax.pipeline.Interrupted):
        mojax.optimize(LLAMA, steps, tmp_path / "b", evaluate=False, interrupted=stop)
    mojax.optimize(LLAMA, steps, tmp_path / "b", evaluate=False)
    names = sorted(p.relative_to(tmp_path / "a") for p in (tmp_path / "a").rglob("*.safetensors"))
    assert any(p.parent.name == "adapter" for p in names)
    assert all((tmp_path / "a" / n).read_bytes() == (tmp_path / "b" / n).read_bytes() for n in names)


def test_experts_are_left_alone_and_the_outcome_says_so(tmp_path):
    source = tiny_qwen3_moe(tmp_path / "in")
    report = mojax.optimize(
        source,
        recipe(svd(metric="weights", rounds=0), "rtn", inputs="none"),
        tmp_path / "out",
        evaluate=False,
    )
    model = mojax.load(tmp_path / "out")
    assert {("*" in m, s.rank) for m, s in model.schemes.items()} == {(True, 0), (False, RANK)}
    assert any("none beside experts" in note for note in report.notes)


def test_a_run_that_stops_while_it_is_judged_keeps_its_adapter(tmp_path):
    out = tmp_path / "out"
    steps = recipe({"svdquant": {"rank": RANK, "rounds": 0, "metric": "weights"}}, "rtn")
    made = out.with_name("out.partial") / "adapter/adapter_config.json"
    with pytest.raises(mojax.pipeline.Interrupted):
        mojax.optimize(LLAMA, steps, out, interrupted=made.exists)
    assert made.exists()
    mojax.optimize(LLAMA, steps, out, evaluate=False)
    assert len(read_shard(out / "adapter/adapter_model.safetensors")) == 2 * len(mojax.load(out).schemes)


def test_a_model_without_a_forward_function(tmp_path):
    shutil.copytree(LLAMA, tmp_path / "source")
    config = json.loads((tmp_path / "source/config.json").read_text()) | {"model_type": "other"}
    (tmp_path / "source/config.json").write_text(json.dumps(config))
    steps = recipe({"svdquant": {"rank": RANK, "rounds": 0, "metric": "weights"}}, "rtn", inputs="none")
    mojax.optimize(tmp_path / "source", steps, tmp_path / "out", generic=True, evaluate=False)
    model = mojax.load(tmp_path / "out", generic=True)
    assert all(beside.branch(model.params, m) is not None for m in model.schemes) and len(model.schemes) == 14


def test_both_leaves_fit_float16_where_inputs_are_large():
    w, h = weight(96, 64)
    root = jnp.linalg.cholesky(h * 1e8)
    a, b = low_rank(RANK, w, root)
    assert np.allclose(np.linalg.norm(a, axis=1), np.linalg.norm(b, axis=0), rtol=1e-4)
    assert np.abs(np.asarray(b)).max() < 100 and np.abs(np.asarray(a)).max() < 100
