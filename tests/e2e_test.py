"""The whole path on small models: every shipped recipe in both dialects."""

import hashlib
import json
import shutil
from pathlib import Path

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
from shipped import distinct

import mojax
from mojax import calibration, checkpoint, cli, evaluation, model, pipeline, planner, verify, writer
from mojax.calibration import Stats
from mojax.converters import base as dialects
from mojax.formats.base import QTensor
from mojax.recipe import adjusted, load_recipe
from mojax.transforms import smoothquant

TINY = Path(model.__file__).parent / "data" / "tiny"
NATIVE = Path(__file__).parent / "golden" / "native" / "llama"
SMALL = {"sequences": 4, "length": 32}
DIALECTS = ("compressed-tensors", "modelopt")
LINEARS = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")

# What each pair of recipe and dialect needs to be allowed; None is a plan problem everywhere.
# Those of caches alone are in cache_test.py, those with other steps where the steps are.
NAMES = [n for n in distinct() if load_recipe(n).steps == (("rtn", {}),) and n != "nvfp4_mlp_only"]
NAMES = [*NAMES, "int8_smoothquant"]
TARGET = {(name, d): "vllm" for name in NAMES for d in DIALECTS}
TARGET |= {("int4", "modelopt"): "trtllm", ("mxfp4_weight_only", "modelopt"): "trtllm"}
REFUSED = [(name, "modelopt") for name in ("mxfp4", "int8", "int8_smoothquant", "int4_asymmetric")]
REFUSED += [(name, "modelopt") for name in ("mxfp4_hadamard", "int8_hadamard")]
REFUSED += [("nf4", dialect) for dialect in DIALECTS]  # a dialect of its own: tests/nf4_test.py


def config(**changes):
    small = {
        "hidden_size": 128,
        "intermediate_size": 256,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "head_dim": 64,
        "vocab_size": 4096,
        "max_position_embeddings": 64,
        "tie_word_embeddings": False,
    }
    return small | changes


def build(folder, dtype="bfloat16", tokenizer=True, **changes):
    """A random Qwen3 as transformers writes it, in three files or so."""
    from transformers import Qwen3Config, Qwen3ForCausalLM

    return random_model(Qwen3ForCausalLM, Qwen3Config(**config(**changes)), folder, dtype, tokenizer)


def random_model(make, own, folder, dtype, tokenizer=True):
    import torch

    torch.manual_seed(0)
    made = make(own).to(getattr(torch, dtype))
    with torch.no_grad():
        for name, p in made.named_parameters():
            if "norm" in name:
                p.copy_((1 + 0.3 * torch.randn(p.shape)).to(p.dtype))
            elif name.endswith("bias"):
                p.copy_((0.1 * torch.randn(p.shape)).to(p.dtype))
            else:
                p.mul_(3)  # logits that differ, so that KL measures something
    made.save_pretrained(folder, max_shard_size="1MB")
    if tokenizer:
        for name in ("tokenizer.json", "tokenizer_config.json"):
            shutil.copyfile(TINY / name, folder / name)
    (folder / "README.md").write_text("# A model\n")
    (folder / "extra").mkdir()
    (folder / "extra" / "notes.txt").write_bytes(b"side \xff file")
    return folder


@pytest.fixture(scope="module")
def qwen(tmp_path_factory):
    folder = build(tmp_path_factory.mktemp("qwen") / "model")
    assert len(list(folder.glob("*.safetensors"))) >= 3
    return folder


@pytest.fixture(scope="module")
def tokens():
    return np.random.default_rng(0).integers(0, 4096, (4, 32), dtype=np.int32)


def small(name, **more):
    return adjusted(load_recipe(str(name)), **(SMALL | more))


def optimize(source, name, out, **more):
    return mojax.optimize(source, name if not isinstance(name, str) else small(name), out, **more)


def files_of(folder):
    return {
        p.relative_to(folder).as_posix(): hashlib.sha256(p.read_bytes()).hexdigest()
        for p in folder.rglob("*")
        if p.is_file()
    }


def check_output(source, out, plan):
    """What must hold of any output."""
    before, after = checkpoint.open_checkpoint(source), checkpoint.open_checkpoint(out)
    made = model.load(out, generic=True)
    encoded = {m + ".weight" for m in made.schemes}
    assert encoded == {m + ".weight" for m in plan.schemes}
    kept = set(before) - encoded
    extra = dialects.dialect(made.config, [p.name for p in out.iterdir()]).layout
    parts = {
        n
        for m, s in plan.schemes.items()
        for n in extra(m, before.spec(m + ".weight").shape, plan_dtype(before), s)
    }
    caches = {n for n in after if n.endswith((".k_scale", ".v_scale"))}
    assert set(after) == kept | parts | caches  # conservation: nothing lost, nothing invented
    rewritten = smoothed_norms(plan, made)
    assert rewritten == {r.name for r in plan.rows if r.reason == "absorbs smoothing scales"}
    for name in kept:
        assert (before[name].tobytes() == after[name].tobytes()) is (name not in rewritten), name
    for path in checkpoint.side_files(source):
        assert (out / path.relative_to(source)).read_bytes() == path.read_bytes()
    assert set(files_of(source)) - {"README.md", "config.json"} - {
        f for f in files_of(source) if "safetensors" in f
    } <= set(files_of(out))
    index = json.loads((out / checkpoint.INDEX).read_text())["weight_map"]
    assert index == {name: entry.file.name for name, entry in after.entries.items()}
    for a, b in ((a, b) for group in fused(made) for a in group for b in group):
        if made.params[a].format.fused and a in encoded and b in encoded:
            assert made.params[a].scales["outer"] == made.params[b].scales["outer"], (a, b)
    return made


def smoothed_norms(plan, made):
    """The norm gains that SmoothQuant changes: all that read them are encoded."""
    if "smoothquant" not in [name for name, _ in plan.recipe.steps]:
        return set()
    readers = {"input_layernorm": LINEARS[:3], "post_attention_layernorm": LINEARS[4:6]}
    return {
        f"{b.prefix}{norm}.weight"
        for b in made.blocks
        for norm, names in readers.items()
        if all(any(b.prefix in m and m.endswith(n) for m in plan.schemes) for n in names)
    }


def plan_dtype(files):
    return files.spec(next(iter(files))).dtype


def fused(made):
    for block in made.blocks:
        for group in made.family.FUSED:
            yield [f"{block.prefix}{m}.weight" for m in group]


def ignore_of(out):
    section = json.loads((out / "config.json").read_text())["quantization_config"]
    return section["ignore"]


# ---------------------------------------------------------------- every recipe


@pytest.mark.parametrize("dialect", DIALECTS)
@pytest.mark.parametrize("name", NAMES)
def test_recipe(qwen, tmp_path, name, dialect):
    target, out = TARGET[name, dialect], tmp_path / "out"
    if (name, dialect) in REFUSED:
        for server in planner.TARGETS:
            with pytest.raises(mojax.PlanError, match=f"{dialect} dialect"):
                mojax.plan(mojax.load(qwen), name, format=dialect, target=server)
        with pytest.raises(mojax.PlanError):
            optimize(qwen, name, out, format=dialect)
        assert not list(tmp_path.iterdir())
        return
    if target != "vllm":
        with pytest.raises(mojax.PlanError, match="vllm cannot load"):
            mojax.plan(mojax.load(qwen), name, format=dialect)
    report = optimize(qwen, name, out, format=dialect, target=target)
    plan = mojax.plan(mojax.load(qwen), name, format=dialect, target=target)
    assert np.isfinite([report.kl_mean, report.kl_p99, report.perplexity, report.perplexity_source]).all()
    assert 0 < report.kl_mean < 1 and 0 < report.bits_per_quantized_weight < 9 and report.tokens == 128
    made = check_output(qwen, out, plan)
    assert len(made.schemes) == 14 and made.schemes.keys() == {
        f"{b.prefix}{group}.{m}"
        for b in made.blocks
        for m in LINEARS
        for group in ("self_attn" if m[0] in "qkvo" else "mlp",)
    }
    assert "lm_head" in ignore_of(out)
    verified = verify.verify(out, qwen)
    assert set(verified.errors) == {m + ".weight" for m in made.schemes}
    assert report.worst[0]["rel_error"] == pytest.approx(max(verified.errors.values()), abs=1e-6)
    written = json.loads((out / "report.json").read_text())
    assert written["kl_mean"] == report.kl_mean and written["bits_per_weight"] == pytest.approx(
        plan.bits_per_weight
    )
    assert (out / "README.md").read_text().startswith("# A model\n\n## Quantization")
    assert not (tmp_path / "out.partial").exists()


def test_modelopt_lists_embeddings_and_has_its_own_file(qwen, tmp_path):
    optimize(qwen, "nvfp4_weight_only", tmp_path / "out", format="modelopt", evaluate=False)
    extra = json.loads((tmp_path / "out" / "hf_quant_config.json").read_text())
    assert "model.embed_tokens" in extra["quantization"]["exclude_modules"]
    assert "lm_head" in extra["quantization"]["exclude_modules"]


def test_tiny_has_a_tied_head_in_the_ignore_list(tmp_path):
    for dialect in DIALECTS:
        out = tmp_path / dialect
        report = optimize("tiny", "nvfp4", out, format=dialect)
        assert report.kl_mean < 0.1
        made = check_output(TINY, out, mojax.plan(mojax.load("tiny"), "nvfp4", format=dialect))
        assert "lm_head" in ignore_of(out) and "lm_head.weight" not in made.checkpoint
        assert cli.run(["verify", f"--model={out}", f"--reference={TINY}"]) == 0


def test_same_command_same_bytes(qwen, tmp_path):
    for out in ("a", "b"):
        optimize(qwen, "fp8", tmp_path / out)
    a, b = files_of(tmp_path / "a"), files_of(tmp_path / "b")
    assert {k: v for k, v in a.items() if k != "report.json"} == {
        k: v for k, v in b.items() if k != "report.json"
    }


def test_shards_are_split_by_size(qwen, tmp_path):
    optimize(qwen, "fp8_dynamic", tmp_path / "whole", evaluate=False)
    optimize(qwen, "fp8_dynamic", tmp_path / "split", evaluate=False, max_shard_size=100_000)
    whole, split = (checkpoint.open_checkpoint(tmp_path / n) for n in ("whole", "split"))
    assert len({e.file for e in whole.entries.values()}) == 3  # outside the blocks, and two blocks
    sizes = {
        f: sum(e.stop - e.start for e in split.entries.values() if e.file == f)
        for f in {e.file for e in split.entries.values()}
    }
    assert (
        len(sizes) > 3 and sorted(sizes.values())[-3] <= 100_000
    )  # only embedding and head are larger, alone
    assert {n: split[n].tobytes() for n in split} == {n: whole[n].tobytes() for n in whole}


# ---------------------------------------------------------------- the pieces, in memory


def test_apply_evaluate_export_are_optimize(qwen, tmp_path):
    optimize(qwen, "nvfp4", tmp_path / "streamed")
    source = mojax.load(qwen)
    plan = mojax.plan(source, small("nvfp4"))
    seen = pipeline.read_text(source, plan, plan.recipe, None, "calibration")
    stats = mojax.calibrate(source, plan, seen.ids)
    before = {n: np.array(source.params[n]).tobytes() for n in source.params}
    made = mojax.apply(source, plan, stats)
    assert {n: np.array(source.params[n]).tobytes() for n in source.params} == before
    assert mojax.export(made, tmp_path / "exported", plan=plan) == tmp_path / "exported"
    a, b = (checkpoint.open_checkpoint(tmp_path / n) for n in ("streamed", "exported"))
    assert set(a) == set(b) and all(a[n].tobytes() == b[n].tobytes() for n in a)
    assert json.loads((tmp_path / "streamed" / "config.json").read_text()) == json.loads(
        (tmp_path / "exported" / "config.json").read_text()
    )
    report = mojax.evaluate(made, source, seen.ids)
    again = mojax.evaluate(mojax.load(tmp_path / "streamed"), source, seen.ids)
    assert report.kl_mean == pytest.approx(again.kl_mean, rel=1e-6)
    assert report.bits_per_weight == pytest.approx(again.bits_per_weight, rel=1e-3)
    assert report.bits_per_weight < 16


def test_export_refuses_an_existing_folder(qwen, tmp_path):
    source = mojax.load(qwen)
    plan = mojax.plan(source, "fp8_dynamic")
    made = mojax.apply(source, plan, {})
    (tmp_path / "out").mkdir()
    with pytest.raises(mojax.InputError, match="exists already"):
        mojax.export(made, tmp_path / "out", plan=plan)
    assert not list((tmp_path / "out").iterdir())


def test_stats_save_load_merge(qwen, tokens, tmp_path):
    source = mojax.load(qwen)
    plan = mojax.plan(source, "nvfp4")
    once = mojax.calibrate(source, plan, tokens)
    halves = mojax.calibrate(source, plan, tokens[:2]).merge(mojax.calibrate(source, plan, tokens[2:]))
    assert set(once) == set(halves) and len(once) == 14
    once.save(tmp_path / "stats.safetensors")
    loaded = Stats.load(tmp_path / "stats.safetensors")
    for name, values in once.items():
        for key, value in values.items():
            np.testing.assert_array_equal(np.asarray(value), np.asarray(halves[name][key]), err_msg=name)
            np.testing.assert_array_equal(np.asarray(value), loaded[name][key], err_msg=name)


def test_every_statistic_merges(tokens):
    x = np.random.default_rng(1).normal(size=(64, 8)).astype(np.float32)
    for name, s in calibration.STATISTICS.items():
        whole = np.asarray(s.take(jnp.asarray(x)))
        parts = s.merge(np.asarray(s.take(jnp.asarray(x[:20]))), np.asarray(s.take(jnp.asarray(x[20:]))))
        np.testing.assert_allclose(parts, whole, rtol=1e-5, err_msg=name)


def test_unknown_statistic_is_refused(tmp_path):
    checkpoint.write_shard(tmp_path / "s.safetensors", {"a.weight.absmaxx": np.zeros(2, np.float32)})
    with pytest.raises(mojax.InputError, match="absmax"):
        Stats.load(tmp_path / "s.safetensors")


# ---------------------------------------------------------------- smoothquant


@pytest.fixture(scope="module")
def single(tmp_path_factory):
    """The same architecture in float32."""
    return build(tmp_path_factory.mktemp("single") / "model", dtype="float32", num_hidden_layers=1)


def test_smoothquant_keeps_the_function_and_levels_the_maxima(single, tokens):
    source = mojax.load(single)
    plan = mojax.plan(source, "int8_smoothquant")
    stats = mojax.calibrate(source, plan, tokens)
    params = dict(source.params)
    step = smoothquant.smoothquant(alpha=0.5)
    changed = {}
    for block in source.blocks:
        changed |= step.apply(params, stats, plan.context(block))
    assert {n.split(".", 3)[-1] for n in changed} >= {
        "input_layernorm.weight",
        "post_attention_layernorm.weight",
    }
    assert any(not np.array_equal(np.asarray(changed[n]), np.asarray(params[n])) for n in changed)
    before = np.asarray(source.apply(params, tokens))
    after = np.asarray(source.apply(params | changed, tokens))
    assert np.abs(after - before).max() <= 1e-5 * np.abs(before).max()
    smoothed = mojax.calibrate(
        mojax.Model(source.config, params | changed, source.family, source.checkpoint), plan, tokens
    )
    group = [f"model.layers.0.self_attn.{m}_proj.weight" for m in "qkv"]
    w = np.max([np.abs(np.asarray(changed[n])).max(0) for n in group], axis=0)
    np.testing.assert_allclose(
        np.asarray(smoothed[group[0]]["absmax"]), w, rtol=1e-3
    )  # alpha 1/2: sqrt(X W) both


@pytest.mark.parametrize("kind", ["qwen2", "llama", "mistral"])
def test_other_families(tmp_path, tokens, kind):
    """Biases of every sort, a window, as many heads of keys as of queries."""
    import transformers

    make = getattr(
        transformers, {"qwen2": "Qwen2", "llama": "Llama", "mistral": "Mistral"}[kind] + "ForCausalLM"
    )
    more = {"llama": {"attention_bias": True, "mlp_bias": True}, "mistral": {"sliding_window": 8}}.get(
        kind, {}
    )
    own = config(num_hidden_layers=1, num_key_value_heads=4, **more)
    source = random_model(make, make.config_class(**own), tmp_path / "source", "float32")
    loaded = mojax.load(source)
    plan = mojax.plan(loaded, "int8_smoothquant")
    step = smoothquant.smoothquant(alpha=0.5)
    params = dict(loaded.params)
    changed = step.apply(params, mojax.calibrate(loaded, plan, tokens), plan.context(loaded.blocks[0]))
    producers = {s.producer for s in plan.context(loaded.blocks[0]).sites} - {None}
    assert producers and producers <= set(changed)
    before, after = (np.asarray(loaded.apply(p, tokens)) for p in (params, params | changed))
    assert np.abs(after - before).max() <= 1e-5 * np.abs(before).max()
    for name in ("int8_smoothquant", "nvfp4"):
        assert optimize(source, name, tmp_path / name).kl_mean < 1
    check_output(source, tmp_path / "nvfp4", mojax.plan(loaded, "nvfp4"))
    assert cli.run(["verify", f"--model={tmp_path / 'int8_smoothquant'}", f"--reference={source}"]) == 0


def test_smoothquant_output_keeps_what_it_did_not_fold(qwen, tmp_path):
    optimize(qwen, "int8_smoothquant", tmp_path / "out")
    before, after = checkpoint.open_checkpoint(qwen), checkpoint.open_checkpoint(tmp_path / "out")
    differ = {
        n.split(".", 3)[-1]
        for n in before
        if n in after and n.endswith("norm.weight") and before[n].tobytes() != after[n].tobytes()
    }
    assert differ == {"input_layernorm.weight", "post_attention_layernorm.weight"}
    assert cli.run(["verify", f"--model={tmp_path / 'out'}", f"--reference={qwen}"]) == 0


INPUT_NORM, MLP_NORM = "input_layernorm.weight", "post_attention_layernorm.weight"


@pytest.mark.parametrize(
    "keep, target, folded",
    [
        (["up_proj.weight", "gate_proj.weight"], "vllm", {INPUT_NORM}),
        (["q_proj.weight", "k_proj.weight", "v_proj.weight"], "vllm", {MLP_NORM}),
        (["up_proj.weight"], "transformers", {INPUT_NORM}),
        ([INPUT_NORM], "vllm", {MLP_NORM}),
        ([INPUT_NORM, MLP_NORM], "vllm", set()),  # up_proj still absorbs scales, and no gain shows it
    ],
)
def test_smoothquant_leaves_what_is_kept(qwen, tmp_path, keep, target, folded):
    mine, out = adjusted(small("int8_smoothquant"), keep=[f"*.{k}" for k in keep]), tmp_path / "out"
    report = optimize(qwen, mine, out, target=target)
    plan = mojax.plan(mojax.load(qwen), mine, target=target)
    before, after = checkpoint.open_checkpoint(qwen), checkpoint.open_checkpoint(out)
    kept = {r.name: r.reason for r in plan.rows if r.scheme is None}
    changed = {n for n in kept if before[n].tobytes() != after[n].tobytes()}
    assert changed == {f"model.layers.{i}.{norm}" for i in range(2) for norm in folded}
    assert changed == {n for n, reason in kept.items() if reason == planner.SMOOTHED}
    assert {reason for n, reason in kept.items() if n.endswith(keep[0])} == {f"rule *.{keep[0]}"}
    assert report.worst[0]["rel_error"] < 0.03  # the folded scales are undone before weights are compared
    assert cli.run(["verify", f"--model={out}", f"--reference={qwen}"]) == 0


def test_smoothquant_needs_statistics(qwen):
    source = mojax.load(qwen)
    with pytest.raises(mojax.InputError, match=r"q_proj\.weight: smoothquant needs"):
        mojax.apply(source, mojax.plan(source, "int8_smoothquant"), {})


# ---------------------------------------------------------------- what a recipe can say


def write_recipe(folder, text):
    path = folder / "mine.yaml"
    path.write_text(text)
    return path


@pytest.mark.parametrize("dialect", DIALECTS)
def test_fp8_cache(qwen, tmp_path, dialect):
    mine = write_recipe(tmp_path, "extends: fp8\nrules: [{match: '*', kv_cache: fp8}]\n")
    report = optimize(qwen, small(mine), tmp_path / "out", format=dialect)
    made = mojax.load(tmp_path / "out")
    scales = {n: made.checkpoint[n] for n in made.checkpoint if n.endswith((".k_scale", ".v_scale"))}
    assert len(scales) == 4 and made.cache is not None and made.cache.label == "fp8"
    assert all(np.asarray(v).astype(np.float32) > 0 for v in scales.values())
    source = mojax.load(qwen)
    plan = mojax.plan(source, small(mine), format=dialect)
    stats = mojax.calibrate(
        source, plan, pipeline.read_text(source, plan, plan.recipe, None, "calibration").ids
    )
    for n in [n for n in stats if n.endswith("_cache")]:
        want = np.max(np.asarray(stats[n]["absmax"]))
        assert float(made.params[n + ".input_scale"]) == pytest.approx(float(want), rel=2**-8)
    without = optimize(qwen, "fp8", tmp_path / "plain", format=dialect)
    assert report.kl_mean != without.kl_mean  # the cache is simulated
    written = json.loads((tmp_path / "out" / "config.json").read_text())["quantization_config"]
    assert written["kv_cache_scheme"]["num_bits"] == 8


def test_cache_alone(qwen, tmp_path):
    """Only mlp encoded, and the cache: its scales must be found again."""
    mine = write_recipe(
        tmp_path, "extends: fp8_dynamic\nrules: [{match: '*self_attn*', weights: keep, kv_cache: fp8}]\n"
    )
    optimize(qwen, small(mine), tmp_path / "out")
    made = mojax.load(tmp_path / "out")
    assert sum(n.endswith("_cache.input_scale") for n in made.params) == 4
    assert not any(n.endswith((".k_scale", ".v_scale")) for n in made.params)


@pytest.mark.parametrize("share", [True, False])
def test_share_scale(qwen, tmp_path, share):
    mine = write_recipe(
        tmp_path, f"extends: fp8\nrules: [{{match: '*', share_scale: {str(share).lower()}}}]\n"
    )
    optimize(qwen, small(mine), tmp_path / "out", evaluate=False)
    made = mojax.load(tmp_path / "out")
    same = [len({float(made.params[n].scales["outer"]) for n in group}) == 1 for group in fused(made)]
    assert all(same) is share
    assert bool(verify.verify(tmp_path / "out").notes) is not share


def test_keep(qwen, tmp_path):
    kept = "*.down_proj.weight"
    args = [
        f"--model={qwen}",
        "--recipe=nvfp4-weight-only",
        f"--keep={kept}",
        "--keep=model.layers.1.self_attn.o_proj.weight",
    ]
    out = tmp_path / "out"
    assert cli.run(["quantize", *args, f"--out={out}", "--sequences=4", "--length=32"]) == 0
    before, after = checkpoint.open_checkpoint(qwen), checkpoint.open_checkpoint(out)
    names = [
        "model.layers.0.mlp.down_proj",
        "model.layers.1.mlp.down_proj",
        "model.layers.1.self_attn.o_proj",
    ]
    for name in names:
        assert before[name + ".weight"].tobytes() == after[name + ".weight"].tobytes()
        assert name in ignore_of(out)
    assert "model.layers.0.self_attn.o_proj.weight_packed" in after


def test_half_of_a_fused_group_is_a_plan_problem(qwen):
    with pytest.raises(mojax.PlanError, match="fuses these"):
        mojax.plan(mojax.load(qwen), adjusted(load_recipe("fp8"), keep=["*.q_proj.weight"]))
    mojax.plan(
        mojax.load(qwen), adjusted(load_recipe("fp8"), keep=["*.q_proj.weight"]), target="transformers"
    )


def test_members_of_a_group_may_differ_where_no_server_fuses(qwen, tmp_path):
    """Only those of one format share the outer scale."""
    fp8 = "{format: fp8, per: channel}, inputs: {format: fp8, per: token}"
    rules = [
        "{match: '*.layers.0.*.k_proj.weight', weights: keep}",
        f"{{match: '*.layers.1.*.q_proj.weight', weights: {fp8}}}",
    ]
    mine = write_recipe(tmp_path, f"extends: nvfp4_weight_only\nrules: [{', '.join(rules)}]\n")
    optimize(qwen, small(mine), tmp_path / "out", target="transformers", evaluate=False)
    made = mojax.load(tmp_path / "out")
    shared = {0: "qv", 1: "kv"}
    for layer, names in shared.items():
        q = [made.params[f"model.layers.{layer}.self_attn.{n}_proj.weight"] for n in names]
        assert [x.format.name for x in q] == ["nvfp4", "nvfp4"]
        assert q[0].scales["outer"] == q[1].scales["outer"]
    assert made.params["model.layers.1.self_attn.q_proj.weight"].format.name == "fp8"
    assert cli.run(["verify", f"--model={tmp_path / 'out'}", f"--reference={qwen}"]) == 0


def test_head_by_its_full_name(qwen, tmp_path):
    mine = write_recipe(
        tmp_path,
        "extends: fp8_dynamic\nrules: "
        "[{match: lm_head.weight, weights: {format: fp8, per: channel}, "
        "inputs: {format: fp8, per: token}}]\n",
    )
    report = optimize(qwen, small(mine), tmp_path / "out")
    assert "lm_head" in mojax.load(tmp_path / "out").schemes and "lm_head" not in ignore_of(tmp_path / "out")
    assert report.kl_mean > 0


def test_mixed_formats(qwen, tmp_path):
    mine = write_recipe(
        tmp_path,
        "extends: nvfp4\nrules: "
        "[{match: '*.mlp.*', weights: {format: fp8, per: channel}, inputs: {format: fp8, per: token}}]\n",
    )
    optimize(qwen, small(mine), tmp_path / "out")
    made = check_output(qwen, tmp_path / "out", mojax.plan(mojax.load(qwen), small(mine)))
    assert {s.weights.name for s in made.schemes.values()} == {"nvfp4", "fp8"}


@pytest.mark.parametrize("name", ["nvfp4", "int4", "fp8"])
@pytest.mark.parametrize("dialect", DIALECTS)
def test_float32_source(single, tmp_path, name, dialect):
    report = optimize(single, name, tmp_path / "out", format=dialect, target=TARGET[name, dialect])
    assert 0 < report.kl_mean < 1
    check_output(
        single,
        tmp_path / "out",
        mojax.plan(mojax.load(single), name, format=dialect, target=TARGET[name, dialect]),
    )


def test_float16_source(tmp_path):
    source = build(tmp_path / "half", dtype="float16", num_hidden_layers=1)
    assert optimize(source, "nvfp4", tmp_path / "out").kl_mean < 1
    check_output(source, tmp_path / "out", mojax.plan(mojax.load(source), "nvfp4"))


# ---------------------------------------------------------------- without a tokenizer, without a family


def test_tokens_from_npz(tmp_path, tokens):
    source = build(tmp_path / "bare", tokenizer=False, num_hidden_layers=1)
    np.savez(tmp_path / "t.npz", tokens=tokens)
    npz = str(tmp_path / "t.npz")
    report = optimize(source, "fp8", tmp_path / "out", calibration_text=npz, evaluation_text=npz)
    assert report.kl_mean > 0 and report.tokens == tokens.size
    assert optimize(source, "fp8_dynamic", tmp_path / "free", evaluate=False).kl_mean is None


@pytest.mark.parametrize("name", [n for n in NAMES if n != "nf4" and not load_recipe(n).menu.needs_data])
def test_generic(qwen, tmp_path, name):
    source = tmp_path / "odd"
    shutil.copytree(qwen, source)
    config = json.loads((source / "config.json").read_text()) | {"model_type": "novel"}
    (source / "config.json").write_text(json.dumps(config))
    report = optimize(source, name, tmp_path / "out", generic=True)
    assert len(list((tmp_path / "out").glob("*.safetensors"))) == 3  # block by block all the same
    assert report.kl_mean is None and "no forward" in report.notes[0] and 0 < report.bits_per_weight < 16
    plain = tmp_path / "plain"
    optimize(qwen, name, plain, evaluate=False)
    a, b = checkpoint.open_checkpoint(plain), checkpoint.open_checkpoint(tmp_path / "out")
    if "nvfp4" not in name:  # without a trace more tensors share NVFP4's outer scale than a server fuses
        assert {n: a[n].tobytes() for n in a} == {n: b[n].tobytes() for n in b}
    assert set(a) == set(b)
    assert cli.run(["verify", f"--model={tmp_path / 'out'}", f"--reference={source}"]) == 0
    assert cli.run(["inspect", f"--model={tmp_path / 'out'}"]) == 0


@pytest.mark.parametrize("dialect", DIALECTS)
def test_generic_with_a_tied_head(tmp_path, dialect):
    source = tmp_path / "odd"
    shutil.copytree(TINY, source)
    config = json.loads((source / "config.json").read_text()) | {"model_type": "novel"}
    (source / "config.json").write_text(json.dumps(config))
    out = tmp_path / "out"
    optimize(source, "nvfp4_weight_only", out, generic=True, format=dialect)
    assert "lm_head" in ignore_of(out)
    written = json.loads((out / "config.json").read_text())
    written["quantization_config"]["ignore"].remove("lm_head")
    (out / "config.json").write_text(json.dumps(written))
    with pytest.raises(verify.VerifyError, match="lm_head: is in full precision"):
        verify.verify(out)


@pytest.mark.parametrize("generic", [False, True])
def test_a_tied_head_that_is_stored_all_the_same(tmp_path, generic):
    source = tmp_path / "source"
    shutil.copytree(TINY, source)
    config = json.loads((source / "config.json").read_text())
    if generic:
        (source / "config.json").write_text(json.dumps(config | {"model_type": "novel"}))
    (shard,) = source.glob("*.safetensors")
    tensors = {n: np.array(v) for n, v in checkpoint.read_shard(shard).items()}
    tensors["lm_head.weight"] = tensors["model.embed_tokens.weight"]
    checkpoint.write_shard(shard, tensors)
    optimize(source, "fp8_dynamic", tmp_path / "out", generic=generic, evaluate=False)
    assert "lm_head" in ignore_of(tmp_path / "out")
    assert "lm_head.weight" in checkpoint.open_checkpoint(tmp_path / "out")
    assert cli.run(["verify", f"--model={tmp_path / 'out'}", f"--reference={source}"]) == 0


@pytest.mark.parametrize("name", ["fp8", "int8_smoothquant"])
def test_generic_has_no_calibration(qwen, tmp_path, capsys, name):
    source = tmp_path / "odd"
    shutil.copytree(qwen, source)
    config = json.loads((source / "config.json").read_text()) | {"model_type": "novel"}
    (source / "config.json").write_text(json.dumps(config))
    code = cli.run(
        ["quantize", f"--model={source}", f"--recipe={name}", "--generic", f"--out={tmp_path / 'out'}"]
    )
    assert code == 2 and "fp8_dynamic" in capsys.readouterr().err
    assert [p.name for p in tmp_path.iterdir()] == ["odd"]


# ---------------------------------------------------------------- convert


@pytest.mark.parametrize("name", ["nvfp4", "nvfp4_weight_only", "fp8_block", "mxfp8"])
def test_convert_there_and_back(qwen, tmp_path, name):
    optimize(qwen, name, tmp_path / "ct", evaluate=False)
    assert (
        cli.run(["convert", f"--model={tmp_path / 'ct'}", "--format=modelopt", f"--out={tmp_path / 'mo'}"])
        == 0
    )
    assert (
        cli.run(
            [
                "convert",
                f"--model={tmp_path / 'mo'}",
                "--format=compressed_tensors",
                f"--out={tmp_path / 'back'}",
            ]
        )
        == 0
    )
    ct, mo, back = (mojax.load(tmp_path / n) for n in ("ct", "mo", "back"))
    assert ct.schemes.keys() == mo.schemes.keys() == back.schemes.keys()
    for module in ct.schemes:
        a, b, c = (m.params[module + ".weight"] for m in (ct, mo, back))
        for other in (b, c):
            assert np.asarray(a.codes).tobytes() == np.asarray(other.codes).tobytes()
            assert (
                np.asarray(a.scales["inner"]).astype(np.float32)
                == np.asarray(other.scales["inner"]).astype(np.float32)
            ).all()
        if "outer" in a.scales:
            want = np.float32(1) / np.float32(a.scales["outer"])
            assert abs(np.float32(b.scales["outer"]) - want) <= np.spacing(want)
            assert abs(np.float32(c.scales["outer"]) - a.scales["outer"]) <= np.spacing(
                np.float32(a.scales["outer"])
            )
    for n in ct.checkpoint:
        if "norm" in n or "embed" in n:
            assert ct.checkpoint[n].tobytes() == mo.checkpoint[n].tobytes()
    assert (tmp_path / "mo" / "hf_quant_config.json").exists() and not (
        tmp_path / "back" / "hf_quant_config.json"
    ).exists()
    assert (tmp_path / "back" / "extra" / "notes.txt").read_bytes() == (
        qwen / "extra" / "notes.txt"
    ).read_bytes()
    cards = [(tmp_path / n / "README.md").read_bytes() for n in ("ct", "mo")]
    assert cards[1] == cards[0] + (
        b"\nConverted by mojax from compressed-tensors to modelopt; the codes are the same.\n"
    )
    assert sorted(ignore_of(tmp_path / "back")) == sorted(ignore_of(tmp_path / "ct"))
    assert cli.run(["verify", f"--model={tmp_path / 'back'}", f"--reference={qwen}"]) == 0


def test_convert_the_cache(qwen, tmp_path):
    mine = write_recipe(tmp_path, "extends: fp8_dynamic\nrules: [{match: '*', kv_cache: fp8}]\n")
    optimize(qwen, small(mine), tmp_path / "ct", evaluate=False)
    assert (
        cli.run(["convert", f"--model={tmp_path / 'ct'}", "--format=modelopt", f"--out={tmp_path / 'mo'}"])
        == 0
    )
    a, b = mojax.load(tmp_path / "ct"), mojax.load(tmp_path / "mo")
    for n in [n for n in a.params if n.endswith("_cache.input_scale")]:
        assert float(a.params[n]) == pytest.approx(float(b.params[n]), rel=1e-6)
    assert sum(n.endswith(".k_scale") for n in b.checkpoint) == 2


def test_convert_refuses_what_does_not_fit(qwen, tmp_path, capsys):
    optimize(qwen, "int4", tmp_path / "mo", format="modelopt", target="trtllm", evaluate=False)
    assert cli.run(["convert", f"--model={tmp_path / 'mo'}", f"--out={tmp_path / 'ct'}"]) == 2
    assert "cannot hold exactly" in capsys.readouterr().err
    optimize(qwen, "int8", tmp_path / "int8", evaluate=False)
    assert (
        cli.run(["convert", f"--model={tmp_path / 'int8'}", "--format=modelopt", f"--out={tmp_path / 'no'}"])
        == 2
    )
    assert "no algorithm for this pair" in capsys.readouterr().err
    assert cli.run(["convert", f"--model={tmp_path / 'int8'}", f"--out={tmp_path / 'no'}"]) == 2
    assert "already" in capsys.readouterr().err
    assert cli.run(["convert", f"--model={qwen}", f"--out={tmp_path / 'no'}"]) == 2
    assert "not quantized" in capsys.readouterr().err
    assert sorted(p.name for p in tmp_path.iterdir()) == ["int8", "mo"]


def native(qwen, folder):
    """The model as Hugging Face's own FP8, 128 x 128 blocks: weight and weight_scale_inv."""
    folder.mkdir()
    source = checkpoint.open_checkpoint(qwen)
    tensors = {}
    for name in source:
        w = source[name]
        if name.removesuffix(".weight").endswith(LINEARS):
            n, k = w.shape
            blocks = np.pad(w.astype(np.float32), ((0, -n % 128), (0, -k % 128)))
            blocks = blocks.reshape(-(-n // 128), 128, -(-k // 128), 128)
            scale = np.abs(blocks).max((1, 3)) / np.float32(448)
            codes = (blocks / scale[:, None, :, None]).astype(ml_dtypes.float8_e4m3fn)
            tensors[name] = np.ascontiguousarray(codes.reshape(-(-n // 128) * 128, -1)[:n, :k])
            tensors[name + "_scale_inv"] = scale
        else:
            tensors[name] = np.array(w)
    checkpoint.write_shard(folder / "model.safetensors", tensors)
    config = json.loads((qwen / "config.json").read_text())
    config["quantization_config"] = {
        "quant_method": "fp8",
        "activation_scheme": "dynamic",
        "weight_block_size": [128, 128],
        "modules_to_not_convert": ["lm_head"],
    }
    (folder / "config.json").write_text(json.dumps(config))
    return folder


@pytest.mark.parametrize("dialect", DIALECTS)
def test_convert_native_fp8(qwen, tmp_path, dialect, tokens):
    source = native(qwen, tmp_path / "native")
    assert cli.run(["inspect", f"--model={source}"]) == 0
    assert cli.run(["convert", f"--model={source}", f"--format={dialect}", f"--out={tmp_path / 'out'}"]) == 0
    a, b = mojax.load(source), mojax.load(tmp_path / "out")
    assert len(a.schemes) == 14 and a.schemes.keys() == b.schemes.keys()
    for module in a.schemes:
        p, q = (m.params[module + ".weight"] for m in (a, b))
        assert np.asarray(p.codes).tobytes() == np.asarray(q.codes).tobytes()
        np.testing.assert_array_equal(
            np.asarray(p.scales["inner"]), np.asarray(q.scales["inner"]).astype(np.float32)
        )
    report = mojax.evaluate(b, a, tokens)
    # Rounding of the inputs' scales is simulated as each dialect's own tools do it.
    assert report.kl_mean < {"compressed-tensors": 1e-2, "modelopt": 1e-4}[dialect]


def test_native_fp8_is_not_written(qwen, tmp_path, capsys):
    code = cli.run(["quantize", f"--model={qwen}", "--format=hf_fp8", f"--out={tmp_path / 'out'}"])
    assert code == 2 and "read, not written" in capsys.readouterr().err


# ---------------------------------------------------------------- the same numbers as outside


def test_evaluate_is_the_definition(qwen, tmp_path, tokens):
    """KL, agreement and perplexity from the logits, by numpy in float64."""
    optimize(qwen, "mxfp4_weight_only", tmp_path / "out", evaluate=False)
    source, made = mojax.load(qwen), mojax.load(tmp_path / "out")
    report = mojax.evaluate(made, source, tokens)
    p, q = (np.asarray(jax.nn.log_softmax(m(tokens)), np.float64) for m in (source, made))
    kl = (np.exp(p) * (p - q)).sum(-1)
    assert report.kl_mean == pytest.approx(kl.mean(), rel=1e-3)
    assert report.kl_p99 == pytest.approx(np.quantile(kl, 0.99), rel=1e-3)
    assert report.top1_agreement == (p.argmax(-1) == q.argmax(-1)).mean()
    nll = -np.take_along_axis(q[:, :-1], tokens[:, 1:, None].astype(np.int64), -1)
    assert report.perplexity == pytest.approx(np.exp(nll.mean()), rel=1e-3)
    size = sum(e.stop - e.start for e in made.checkpoint.entries.values())
    count = sum(int(np.prod(e.shape)) for e in source.checkpoint.entries.values())
    assert report.bits_per_weight == pytest.approx(8 * size / count)


def test_units_are_fixed_by_the_plan(qwen):
    source = mojax.load(qwen)
    plan = mojax.plan(source, "nvfp4")
    units = writer.units(plan, source)
    assert [u.prefix for u in units] == ["", "model.layers.0.", "model.layers.1."]
    assert sorted(r.name for u in units for _, rows in u.files for r in rows) == sorted(source.params)
    assert isinstance(
        mojax.apply(source, mojax.plan(source, "int4"), {}).params["model.layers.0.mlp.up_proj.weight"],
        QTensor,
    )
    assert evaluation.bits(source, source) == 16
