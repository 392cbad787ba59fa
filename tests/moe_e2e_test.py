"""Mixtures of experts from checkpoint to output: one leaf inside, one tensor per expert on disk."""

import dataclasses
import json
import shutil
from typing import Any

import jax.numpy as jnp
import numpy as np
import pytest
from e2e_test import native
from moe_models import tiny_mixtral, tiny_qwen3_moe
from shipped import distinct

import mojax
from mojax import (
    calibration,
    checkpoint,
    cli,
    experts,
    inspection,
    pipeline,
    plan_table,
    program,
    stream,
    verify,
)
from mojax.calibration import Stats
from mojax.formats.base import QTensor
from mojax.kernels.base import decoded
from mojax.recipe import adjusted, load_recipe

SMALL: dict[str, Any] = {"sequences": 4, "length": 32}
HIDDEN, WIDTH, COUNT = 128, 256, 4
SHAPE: dict[str, Any] = {"hidden_size": HIDDEN, "num_key_value_heads": 4, "head_dim": 64}
LAYER = {"qwen3": "model.layers.1.mlp.experts", "mixtral": "model.layers.1.block_sparse_moe.experts"}
NAMES = {"qwen3": ("gate_proj", "up_proj", "down_proj"), "mixtral": ("w1", "w3", "w2")}
RECIPES = [*(n for n in distinct() if n != "nf4" and "rotated" not in n), "nvfp4_gptq"]
CASES = [("qwen3", "compressed-tensors", name) for name in RECIPES]
CASES += [("mixtral", "compressed-tensors", name) for name in ("nvfp4", "int4_asymmetric", "fp8_block")]
CASES += [("mixtral", "modelopt", name) for name in ("fp8", "nvfp4", "nvfp4_weight_only", "mxfp8")]
CASES += [("qwen3", "modelopt", name) for name in ("nvfp4", "int4", "fp8_dynamic")]
TARGETS = {("modelopt", "int4"): "trtllm", ("modelopt", "fp8_dynamic"): "trtllm"}


@pytest.fixture(scope="module")
def sources(tmp_path_factory):
    """A Qwen3-MoE whose first layer is dense, and a Mixtral; the experts of a layer in two files."""
    tmp = tmp_path_factory.mktemp("moe")
    qwen: dict[str, Any] = {"moe_intermediate_size": WIDTH, "num_experts": COUNT, "mlp_only_layers": [0]}
    mixtral: dict[str, Any] = {"intermediate_size": WIDTH, "num_local_experts": COUNT}
    return {
        "qwen3": tiny_qwen3_moe(tmp / "qwen3", shards=2, intermediate_size=WIDTH, **SHAPE, **qwen),
        "mixtral": tiny_mixtral(tmp / "mixtral", shards=2, **SHAPE, **mixtral),
    }


def small(name, **more):
    return adjusted(load_recipe(str(name)), **(SMALL | more))


def written(folder, text):
    path = folder / "mine.yaml"
    path.write_text(text)
    return str(path)


def problems(source, recipe, **more):
    with pytest.raises(mojax.PlanError) as caught:
        mojax.plan(mojax.load(source), recipe, **more)
    return "\n".join(caught.value.problems)


def tensors(folder):
    files = checkpoint.open_checkpoint(folder)
    return {name: (files[name].dtype.name, files[name].shape, files[name].tobytes()) for name in files}


def changed(source, folder, change=lambda tensors: tensors, **config):
    """A copy of a source in one file, with other tensors and another config."""
    shutil.copytree(source, folder, ignore=shutil.ignore_patterns("*.safetensors*"))
    files = checkpoint.open_checkpoint(source)
    checkpoint.write_shard(folder / "model.safetensors", change({n: np.array(files[n]) for n in files}))
    said = json.loads((folder / "config.json").read_text()) | config
    (folder / "config.json").write_text(json.dumps(said))
    return folder


def section(folder):
    return json.loads((folder / "config.json").read_text())["quantization_config"]


# ---------------------------------------------------------------- every recipe


@pytest.mark.parametrize(("family", "dialect", "name"), CASES)
def test_recipe(sources, tmp_path, family, dialect, name):
    source, out = sources[family], tmp_path / "out"
    target = TARGETS.get((dialect, name), "vllm")
    report = mojax.optimize(source, small(name), out, format=dialect, target=target)
    assert 0 < report.kl_mean < 0.5 and 0 < report.bits_per_quantized_weight < 9
    before, after = checkpoint.open_checkpoint(source), checkpoint.open_checkpoint(out)
    made, plan = mojax.load(out), mojax.plan(mojax.load(source), name, format=dialect, target=target)
    each = [f"{LAYER[family]}.{i}.{part}" for i in range(COUNT) for part in NAMES[family]]
    assert set(each) <= set(plan.modules) and not any("*" in n for n in after)
    parts = {
        part
        for m, scheme in plan.modules.items()
        for part in plan.dialect.layout(
            m, before.spec(f"{m}.weight").shape, before.spec(f"{m}.weight").dtype, scheme
        )
    }
    kept = {n for n in before if n.removesuffix(".weight") not in plan.modules}
    assert set(after) == kept | parts
    for n in kept - {r.name for r in plan.rows if r.reason == "absorbs smoothing scales"}:
        assert before[n].tobytes() == after[n].tobytes(), n
    router = LAYER[family].removesuffix(".experts") + ".gate"
    assert router + ".weight" in kept and router in section(out)["ignore"]
    index = json.loads((out / checkpoint.INDEX).read_text())["weight_map"]
    assert index == {n: e.file.name for n, e in after.entries.items()}
    for part in NAMES[family]:
        q = made.params[f"{LAYER[family]}.*.{part}.weight"]
        assert isinstance(q, QTensor) and q.batch == (0,) and q.shape[0] == COUNT
    gate, up = (made.params[f"{LAYER[family]}.*.{part}.weight"] for part in NAMES[family][:2])
    if gate.format.fused:
        assert np.array_equal(gate.scales["outer"], up.scales["outer"]) and gate.scales["outer"].shape == (
            COUNT,
        )
        assert len(set(np.asarray(gate.scales["outer"]).tolist())) > 1
    found = verify.verify(out, source)
    assert set(found.errors) == {m + ".weight" for m in plan.modules}
    assert report.worst[0]["rel_error"] == pytest.approx(max(found.errors.values()), abs=1e-6)


@pytest.mark.parametrize("name", ["nvfp4_weight_only", "int4_asymmetric", "fp8_block", "mxfp4_weight_only"])
@pytest.mark.parametrize("family", ["qwen3", "mixtral"])
def test_every_expert_is_encoded_as_a_weight_of_its_own(sources, tmp_path, family, name):
    """The same bytes as without a family, where every expert is a weight of its own."""
    odd = changed(sources[family], tmp_path / "odd", model_type="novel")
    mojax.optimize(odd, name, tmp_path / "apart", generic=True, evaluate=False)
    mojax.optimize(sources[family], name, tmp_path / "stacked", evaluate=False)
    assert tensors(tmp_path / "apart") == tensors(tmp_path / "stacked")
    apart, stacked = (section(tmp_path / n) for n in ("apart", "stacked"))
    assert sorted(apart.pop("ignore")) == sorted(stacked.pop("ignore")) and apart == stacked
    assert len(mojax.load(tmp_path / "apart", generic=True).schemes) == len(
        mojax.plan(mojax.load(sources[family]), name).modules
    )


# ---------------------------------------------------------------- calibration


def test_static_inputs_are_one_value_for_all_experts(sources, tmp_path):
    source = mojax.load(sources["mixtral"])
    plan = mojax.plan(source, "nvfp4")
    tokens = np.random.default_rng(0).integers(3, 4096, (4, 32)).astype(np.int32)
    stats = mojax.calibrate(source, plan, tokens)
    made = mojax.apply(source, plan, stats)
    for part in NAMES["mixtral"]:
        name = f"{LAYER['mixtral']}.*.{part}"
        seen = stats[name + ".weight"]
        assert seen["absmax"].shape[0] == COUNT == len(seen["count"]) and seen["count"].sum() == 4 * 32 * 2
        assert np.shape(made.params[name + ".input_scale"]) == ()
        assert made.params[name + ".input_scale"] == seen["absmax"].max()
    mojax.export(made, tmp_path / "out", plan=plan)
    files = checkpoint.open_checkpoint(tmp_path / "out")
    scales = {files[f"{LAYER['mixtral']}.{i}.w1.input_global_scale"].tobytes() for i in range(COUNT)}
    assert len(scales) == 1
    again = mojax.load(tmp_path / "out")
    back = float(again.params[f"{LAYER['mixtral']}.*.w1.input_scale"])
    assert back == pytest.approx(float(made.params[f"{LAYER['mixtral']}.*.w1.input_scale"]), rel=1e-2)
    logits = [np.asarray(m(tokens)) for m in (made, again)]
    assert np.abs(logits[0] - logits[1]).max() <= 0.3 * np.abs(logits[0]).max()
    stats.save(tmp_path / "stats.safetensors")
    loaded = Stats.load(tmp_path / "stats.safetensors")
    w1 = f"{LAYER['mixtral']}.*.w1.weight"
    np.testing.assert_array_equal(loaded[w1]["count"], stats[w1]["count"])


def test_experts_without_tokens_are_reported(sources, tmp_path):
    """Two tokens reach four experts at most."""
    source = changed(sources["mixtral"], tmp_path / "wide")
    report = mojax.optimize(source, small("nvfp4", sequences=1, length=2), tmp_path / "out", evaluate=False)
    plan = mojax.plan(mojax.load(source), "nvfp4")
    seen = pipeline.read_text(
        mojax.load(source), plan, small("nvfp4", sequences=1, length=2), None, "calibration"
    )
    counts = calibration.tokens_per_expert(mojax.calibrate(mojax.load(source), plan, seen.ids))
    idle = {layer: [i for i, n in enumerate(found) if n == 0] for layer, found in counts.items()}
    assert len(counts) == 2 and any(idle.values())
    (note,) = (n for n in report.notes if "tokens per expert: 0 at least" in n)
    for layer, numbers in idle.items():
        said = f"{len(numbers)} of {COUNT} experts of {layer} saw no calibration token: "
        assert (said + experts.listed(numbers) in note) is bool(numbers)
    verify.verify(tmp_path / "out", source)
    assert json.loads((tmp_path / "out" / "mojax.json").read_text())["tokens_per_expert"] == counts


def test_a_layer_without_any_token_is_refused(sources):
    source = mojax.load(sources["mixtral"])
    plan = mojax.plan(source, "fp8")
    stats = mojax.calibrate(source, plan, np.full((1, 2), 7, np.int32))
    name = f"{LAYER['mixtral']}.*.w1.weight"
    stats[name] = {key: np.zeros_like(value) for key, value in stats[name].items()}
    with pytest.raises(mojax.InputError, match=r"w1.weight: its inputs need a static scale"):
        mojax.apply(source, plan, stats)


def test_counts_of_two_calibrations_add_up(sources):
    source = mojax.load(sources["qwen3"])
    plan = mojax.plan(source, "fp8")
    tokens = np.random.default_rng(0).integers(3, 4096, (4, 16)).astype(np.int32)
    once = mojax.calibrate(source, plan, tokens)
    twice = mojax.calibrate(source, plan, tokens[:1]).merge(mojax.calibrate(source, plan, tokens[1:]))
    assert calibration.tokens_per_expert(once) == calibration.tokens_per_expert(twice)
    for name, values in once.items():
        np.testing.assert_array_equal(values["absmax"], twice[name]["absmax"], err_msg=name)


# ---------------------------------------------------------------- what the plan refuses


def test_the_plan_counts_experts(sources):
    plan = mojax.plan(mojax.load(sources["mixtral"]), "int4")
    line = next(v for v in plan_table.table(plan).splitlines() if "experts.*.w1" in v)
    assert (
        line.startswith("model.layers.*.block_sparse_moe.experts.*.w1.weight") and f"{COUNT}x256x128" in line
    )
    assert line.split()[-5] == str(2 * COUNT)  # two layers
    row = next(r for r in plan_table.as_dict(plan)["tensors"] if "experts.*.w1" in r["tensor"])
    assert row["experts"] == COUNT and row["bytes_before"] == COUNT * WIDTH * HIDDEN * 2


def test_one_expert_cannot_be_kept(sources):
    name = f"{LAYER['qwen3']}.2.up_proj.weight"
    for keep in (name, "*.experts.2.*", "*.experts.[0-9].up_proj.weight"):
        said = problems(sources["qwen3"], adjusted(load_recipe("int4"), keep=[keep]))
        assert (
            f"{keep}: names some experts of a layer" in said
            and "name all of them, model.layers.1.mlp" in said
        )
    plan = mojax.plan(mojax.load(sources["qwen3"]), adjusted(load_recipe("int4"), keep=["*.mlp.experts.*"]))
    assert not any("experts" in m for m in plan.schemes) and "model.layers.0.mlp.up_proj" in plan.schemes


def test_experts_of_a_layer_have_one_format(sources):
    keep = adjusted(load_recipe("int4"), keep=["*.w2.weight"])
    said = problems(sources["mixtral"], keep)
    assert "vllm runs all experts of a layer alike" in said and "w2.weight kept" in said
    mojax.plan(mojax.load(sources["mixtral"]), keep, target="transformers")


def test_kept_experts_are_in_the_ignore_list_by_full_name(sources, tmp_path):
    keep = small("fp8_dynamic", keep=["model.layers.1.block_sparse_moe.experts.*"])
    mojax.optimize(sources["mixtral"], keep, tmp_path / "out", evaluate=False)
    names = {f"{LAYER['mixtral']}.{i}.{part}" for i in range(COUNT) for part in NAMES["mixtral"]}
    assert names <= set(section(tmp_path / "out")["ignore"])
    made = mojax.load(tmp_path / "out")
    leaf = made.params[f"{LAYER['mixtral']}.*.w1.weight"]
    assert leaf.shape == (COUNT, WIDTH, HIDDEN) and leaf.dtype.name == "bfloat16"
    assert cli.run(["verify", f"--model={tmp_path / 'out'}", f"--reference={sources['mixtral']}"]) == 0


def test_a_router_is_encoded_only_by_its_full_name(sources, tmp_path):
    router = "model.layers.1.mlp.gate.weight"
    rule = "rules: [{match: '%s', weights: {format: fp8, per: channel}, inputs: {format: fp8, per: token}}]\n"
    source = mojax.load(sources["qwen3"])
    wide = mojax.plan(source, written(tmp_path, "extends: fp8_dynamic\n" + rule % "*.gate.weight"))
    assert not any(m.endswith(".gate") for m in wide.schemes)
    named = mojax.plan(source, written(tmp_path, "extends: fp8_dynamic\n" + rule % router))
    assert router.removesuffix(".weight") in named.schemes


def test_routers_are_found_by_the_trace_alone(sources, monkeypatch):
    source = mojax.load(sources["qwen3"])
    monkeypatch.setattr(source.family, "KEEP", ())
    assert not any(m.endswith(".gate") for m in mojax.plan(source, "int4").schemes)


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (
            lambda t: _without(t, "experts.2.up_proj"),
            r"experts.\*.up_proj.weight: .* experts 0 to 3, the files lack 2",
        ),
        (lambda t: _renamed(t, "experts.3.", "experts.4."), r"down_proj.weight: .* lack 3"),
        (
            lambda t: t | {LAYER["qwen3"] + ".4.up_proj.weight": t[LAYER["qwen3"] + ".0.up_proj.weight"]},
            "have more",
        ),
        (lambda t: _renamed(t, "experts.1.", "experts.01."), "lack 1"),
        (lambda t: _cut(t, "experts.1.up_proj"), r"experts.1.up_proj.weight: the file holds \[8, 128\]"),
        (lambda t: _as_float32(t, "experts.1.up_proj"), "experts are bfloat16 and float32"),
        (lambda t: _fused(t), "gate_up_proj, experts fused in one tensor"),
    ],
)
def test_experts_that_contradict_the_config(sources, tmp_path, change, said):
    with pytest.raises(mojax.PlanError, match=said):
        mojax.load(changed(sources["qwen3"], tmp_path / "bad", change))


def _without(table, part):
    return {n: v for n, v in table.items() if part not in n}


def _renamed(table, old, new):
    return {n.replace(old, new): v for n, v in table.items()}


def _cut(table, part):
    return {n: v[:8].copy() if part in n else v for n, v in table.items()}


def _as_float32(table, part):
    return {n: v.astype(np.float32) if part in n else v for n, v in table.items()}


def _fused(table):
    layer = LAYER["qwen3"]
    both = [
        np.concatenate([table[f"{layer}.{i}.{part}.weight"] for part in ("gate_proj", "up_proj")])
        for i in range(COUNT)
    ]
    return _without(_without(table, "gate_proj"), "up_proj") | {f"{layer}.gate_up_proj": np.stack(both)}


def test_damage_in_one_expert_is_named(sources, tmp_path, capsys):
    def spoil(table):
        table[f"{LAYER['qwen3']}.2.up_proj.weight"][3, 5] = np.nan
        return table

    bad = changed(sources["qwen3"], tmp_path / "bad", spoil)
    assert (
        cli.run(["quantize", f"--model={bad}", "--recipe=nvfp4_weight_only", f"--out={tmp_path / 'out'}"])
        == 2
    )
    assert f"{LAYER['qwen3']}.2.up_proj.weight: holds NaN" in capsys.readouterr().err
    assert not (tmp_path / "out.partial").exists()


def test_what_servers_cannot_load(sources, tmp_path):
    static = (
        "rules: [{match: '*', weights: {format: fp8, per: channel}, inputs: {format: fp8, per: tensor}}]\n"
    )
    mine = written(tmp_path, static)
    assert "vllm cannot load experts of fp8 channel" in problems(sources["qwen3"], mine)
    assert "vllm cannot load experts of fp8 block" in problems(
        sources["qwen3"], "fp8_block", format="modelopt"
    )
    for name in ("nvfp4", "nvfp4_weight_only", "fp8_block", "int8", "mxfp8"):
        assert "transformers cannot load experts" in problems(sources["qwen3"], name, target="transformers")
    keep = adjusted(load_recipe("nvfp4"), keep=["*.experts.*"])
    mojax.plan(mojax.load(sources["qwen3"]), keep, target="transformers")


# ---------------------------------------------------------------- the whole run


def test_an_interrupted_run_goes_on(sources, tmp_path):
    """The same bytes and the same notes, wherever it stops."""
    mojax.optimize(sources["mixtral"], small("nvfp4"), tmp_path / "whole", evaluate=False)
    want = tensors(tmp_path / "whole")
    for stop in (1, 2, 3):
        out, calls = tmp_path / f"out{stop}", iter([*[False] * (stop - 1), True])
        with pytest.raises(pipeline.Interrupted):
            mojax.optimize(
                sources["mixtral"],
                small("nvfp4"),
                out,
                evaluate=False,
                interrupted=lambda calls=calls: next(calls),
            )
        assert not out.exists()
        report = mojax.optimize(sources["mixtral"], small("nvfp4"), out, evaluate=False)
        assert tensors(out) == want
        assert (out / "mojax.json").read_bytes() == (tmp_path / "whole" / "mojax.json").read_bytes()
        assert any("tokens per expert" in note for note in report.notes)


def test_apply_and_export_are_optimize(sources, tmp_path):
    mojax.optimize(sources["qwen3"], small("nvfp4"), tmp_path / "streamed", evaluate=False)
    source = mojax.load(sources["qwen3"])
    plan = mojax.plan(source, small("nvfp4"))
    seen = pipeline.read_text(source, plan, plan.recipe, None, "calibration")
    made = mojax.apply(source, plan, mojax.calibrate(source, plan, seen.ids))
    mojax.export(made, tmp_path / "exported", plan=plan)
    assert tensors(tmp_path / "streamed") == tensors(tmp_path / "exported")
    read = mojax.load(tmp_path / "exported")
    assert mojax.evaluate(made, source, seen.ids).kl_mean == pytest.approx(
        mojax.evaluate(read, source, seen.ids).kl_mean, rel=1e-5
    )
    assert mojax.evaluate(source, source, seen.ids).kl_mean == 0


def test_run_block_takes_packed_stacks(sources, tmp_path):
    mojax.optimize(sources["mixtral"], small("int4"), tmp_path / "out", evaluate=False)
    made = mojax.load(tmp_path / "out")
    local = made.local(made.blocks[1])
    plain = {n: decoded(leaf) if isinstance(leaf, QTensor) else leaf for n, leaf in local.items()}
    x = jnp.asarray(np.random.default_rng(0).standard_normal((2, 8, HIDDEN)), jnp.bfloat16)
    y, expected = (
        np.asarray(program.run_block(made.program(made.blocks[1]), p, x), np.float32) for p in (local, plain)
    )
    assert y.shape == x.shape and np.isfinite(y).all()
    np.testing.assert_allclose(y, expected, rtol=0.02, atol=0.02 * np.abs(expected).max())


@pytest.mark.parametrize("name", ["nvfp4", "mxfp8", "fp8"])
def test_convert_there_and_back(sources, tmp_path, name):
    mojax.optimize(sources["mixtral"], small(name), tmp_path / "ct", evaluate=False)
    steps = [("ct", "modelopt", "mo"), ("mo", "compressed_tensors", "back")]
    for origin, dialect, out in steps:
        command = [
            "convert",
            f"--model={tmp_path / origin}",
            f"--format={dialect}",
            f"--out={tmp_path / out}",
        ]
        assert cli.run(command) == 0
    ct, back = (mojax.load(tmp_path / n) for n in ("ct", "back"))
    assert ct.schemes.keys() == back.schemes.keys()
    for module in ct.schemes:
        a, b = (m.params[module + ".weight"] for m in (ct, back))
        assert np.asarray(a.codes).tobytes() == np.asarray(b.codes).tobytes(), module
    assert cli.run(["verify", f"--model={tmp_path / 'back'}", f"--reference={sources['mixtral']}"]) == 0
    assert sorted(section(tmp_path / "ct")["ignore"]) == sorted(section(tmp_path / "back")["ignore"])


def test_inspect_counts_experts(sources, tmp_path, capsys):
    mojax.optimize(sources["mixtral"], small("nvfp4_weight_only"), tmp_path / "out", evaluate=False)
    facts = inspection.inspect(tmp_path / "out")
    assert sum(f["modules"] for f in facts["formats"]) == 2 * (4 + 3 * COUNT) and not facts["surprises"]
    assert cli.run(["evaluate", f"--model={tmp_path / 'out'}", f"--reference={sources['mixtral']}"]) == 0
    assert "KL" in capsys.readouterr().out


# ---------------------------------------------------------------- verify


def damaged(folder, out, change):
    shutil.copytree(folder, out)
    (out / "mojax.json").unlink()
    for shard in out.glob("*.safetensors"):
        table = {n: np.array(v) for n, v in checkpoint.read_shard(shard).items()}
        checkpoint.write_shard(shard, change(table))
    (out / checkpoint.INDEX).unlink()
    return out


def test_verify_sees_every_expert(sources, tmp_path):
    source, out = sources["qwen3"], tmp_path / "out"
    mojax.optimize(source, small("nvfp4_weight_only"), out, evaluate=False)
    module = LAYER["qwen3"]

    def scaled(table):
        name = f"{module}.2.up_proj.weight_global_scale"
        return table | ({name: table[name] * np.float32(1.5)} if name in table else {})

    def swapped(table):
        names = [f"{module}.{i}.down_proj.weight_packed" for i in (1, 3)]
        return table | (
            dict(zip(names, [table[n] for n in names[::-1]], strict=True)) if names[0] in table else {}
        )

    def missing(table):
        return _without(table, f"{module}.3.down_proj.weight_scale")

    said = "one outer scale for all, they differ: " + module + ".2.gate_proj.weight"
    for i, (change, words) in enumerate(
        [
            (scaled, said),
            (swapped, f"{module}.1.down_proj.weight: decodes to something else"),
            (missing, "is missing"),
        ]
    ):
        with pytest.raises(verify.VerifyError, match=words):
            verify.verify(damaged(out, tmp_path / f"bad{i}", change), source)


def test_experts_named_as_llm_compressor_does(sources, tmp_path):
    """llm-compressor 0.14 renames Mixtral's w1, w3 and w2."""
    mojax.optimize(sources["mixtral"], small("nvfp4_weight_only"), tmp_path / "out", evaluate=False)
    for old, new in zip(NAMES["mixtral"], NAMES["qwen3"], strict=True):
        shutil.copytree(tmp_path / "out", tmp_path / new)
        for shard in (tmp_path / new).glob("*.safetensors"):
            table = checkpoint.read_shard(shard)
            checkpoint.write_shard(
                shard, {n.replace(f".{old}.", f".{new}."): np.array(v) for n, v in table.items()}
            )
        (tmp_path / new / checkpoint.INDEX).unlink()
        with pytest.raises(mojax.PlanError, match=f"lack all 4; they hold .*{new}.*llm-compressor"):
            mojax.load(tmp_path / new)


def test_experts_that_config_json_tells_apart(sources, tmp_path):
    mojax.optimize(sources["mixtral"], small("int4"), tmp_path / "out", evaluate=False)
    config = json.loads((tmp_path / "out" / "config.json").read_text())
    config["quantization_config"]["ignore"].append(f"{LAYER['mixtral']}.2.w1")
    (tmp_path / "out" / "config.json").write_text(json.dumps(config))
    with pytest.raises(mojax.InputError, match=r"experts.\*.w1: .* alike, .*experts.2.w1 as it is"):
        mojax.load(tmp_path / "out")


def test_smoothquant_leaves_experts_alone(sources):
    source = mojax.load(sources["mixtral"])
    plan = mojax.plan(source, "int8_smoothquant")
    tokens = np.random.default_rng(0).integers(3, 4096, (2, 16)).astype(np.int32)
    stats = mojax.calibrate(source, plan, tokens)
    block = source.blocks[1]
    mine = {r.name: source.params[r.name] for r in plan.rows if r.block == block.prefix}
    made = stream.transform(plan, block, mine, stats)
    alone = dataclasses.replace(plan, steps=mojax.plan(source, "int8").steps)
    plain = stream.transform(alone, block, mine, stats)
    for part in NAMES["mixtral"]:
        name = f"{LAYER['mixtral']}.*.{part}.weight"
        assert np.asarray(made[name].codes).tobytes() == np.asarray(plain[name].codes).tobytes()
    rewritten = f"{block.prefix}post_attention_layernorm.weight"
    assert rewritten not in made and f"{block.prefix}input_layernorm.weight" in made


def test_experts_in_native_fp8_are_read_and_converted(sources, tmp_path):
    """Hugging Face's own FP8, 128 x 128 blocks, as Qwen publishes its large mixtures."""
    source = native(sources["qwen3"], tmp_path / "native")
    config = json.loads((source / "config.json").read_text())
    config["quantization_config"]["modules_to_not_convert"] += ["model.layers.1.mlp.gate"]
    (source / "config.json").write_text(json.dumps(config))
    made = mojax.load(source)
    name = f"{LAYER['qwen3']}.*.up_proj.weight"
    found = np.asarray(decoded(made.params[name]), np.float32)
    exact = np.asarray(mojax.load(sources["qwen3"]).params[name], np.float32)
    assert np.abs(found - exact).max() <= 0.07 * np.abs(exact).max()
    assert cli.run(["convert", f"--model={source}", f"--out={tmp_path / 'out'}"]) == 0
    again = mojax.load(tmp_path / "out")
    assert again.schemes.keys() == made.schemes.keys()
    for module in made.schemes:
        a, b = (np.asarray(m.params[module + ".weight"].codes) for m in (made, again))
        assert a.tobytes() == b.tobytes(), module
