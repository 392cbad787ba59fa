"""Quantized checkpoints as sources: decoded when they are read, then treated as any other."""

import json
import shutil
from pathlib import Path

import ml_dtypes
import moe_models
import numpy as np
import pytest
from e2e_test import LINEARS, native

import mojax
from mojax import checkpoint, cli, evaluation, pipeline, verify
from mojax.converters import base as dialects
from mojax.find import find
from mojax.formats.base import QTensor, Scheme
from mojax.model import decode, load
from mojax.planner import plan
from mojax.sources import as_source
from mojax.transforms.base import Context, chain

BF16 = np.dtype(ml_dtypes.bfloat16)
GOLDEN = Path(__file__).parent / "golden"
TINY = Path(mojax.__file__).parent / "data" / "tiny"
FEW = ("--sequences=2", "--length=32")
Q = "model.layers.0.self_attn.q_proj"


@pytest.fixture(scope="module")
def mixture(tmp_path_factory):
    return moe_models.tiny_qwen3_moe(tmp_path_factory.mktemp("moe") / "source")


def decoded(folder):
    """Every tensor of a quantized checkpoint by hand: codes decoded, everything else as it is."""
    found = {}
    model = load(folder)
    for name in model.params:
        leaf = model.params[name]
        if not name.endswith("input_scale"):
            encoded = name.removesuffix(".weight") in model.schemes
            found[name] = np.asarray(decode(leaf)) if encoded else np.asarray(leaf)
    return found


def quantize(source, out, recipe="nvfp4_weight_only", *flags):
    return cli.run(["quantize", f"--model={source}", f"--recipe={recipe}", f"--out={out}", *flags])


@pytest.fixture(scope="module")
def fp8(tmp_path_factory):
    """The built-in model as Hugging Face's own FP8, with everything else that its folder holds."""
    folder = native(TINY, tmp_path_factory.mktemp("fp8") / "source")
    for path in checkpoint.side_files(TINY):
        shutil.copy(path, folder / path.name)
    return folder


def same(source, folder):
    """A source reads as the tensors of a folder decoded by hand, and as nothing else."""
    expected = decoded(folder)
    assert not source.schemes and source.cache is None and "quantization_config" not in source.config
    assert set(source.params) == set(expected)
    for name, value in expected.items():
        assert source.tensors.spec(name) == (value.dtype, value.shape)
        assert np.asarray(source.params[name]).tobytes() == value.tobytes(), name


@pytest.mark.parametrize(
    "peer", ["native/llama/FP8_BLOCK128", "llmcompressor/W4A16_ASYM", "modelopt/NVFP4_DEFAULT_CFG"]
)
@pytest.mark.parametrize("generic", [False, True])
def test_a_peers_checkpoint_is_read_as_what_it_decodes_to(peer, generic):
    source = as_source(load(GOLDEN / peer, generic=generic))
    same(source, GOLDEN / peer)
    assert source.params[Q + ".weight"].dtype == source.dtype == BF16
    assert set(source.checkpoint) == set(source.params)


def test_an_unknown_architecture_is_read_too(fp8, tmp_path):
    shutil.copytree(fp8, tmp_path / "other")
    config = json.loads((fp8 / "config.json").read_text())
    (tmp_path / "other" / "config.json").write_text(json.dumps(config | {"model_type": "unheard"}))
    source, known = as_source(load(tmp_path / "other", generic=True)), as_source(load(fp8))
    for name in known.params:
        assert np.asarray(source.params[name]).tobytes() == np.asarray(known.params[name]).tobytes()


def test_nothing_of_the_source_stays(fp8, tmp_path, capsys):
    """From native FP8 to NVFP4 with quantized inputs: config, index, side files, kept weights, report."""
    kept = "model.layers.1.mlp.down_proj.weight"
    code = quantize(fp8, tmp_path / "out", "nvfp4", f"--keep={kept}", "--sequences=4", "--length=64")
    assert code == 0, capsys.readouterr().err
    out, source = load(tmp_path / "out"), as_source(load(fp8))
    config = json.loads((tmp_path / "out" / "config.json").read_text())
    assert config["quantization_config"]["quant_method"] == "compressed-tensors"
    assert {s.weights.name for s in out.schemes.values()} == {"nvfp4"}
    assert not [n for n in out.checkpoint if n.endswith("_inv")]
    assert kept.removesuffix(".weight") in config["quantization_config"]["ignore"]
    assert out.checkpoint[kept].tobytes() == np.asarray(source.params[kept]).tobytes()
    assert out.checkpoint[kept].dtype == BF16
    index = json.loads((tmp_path / "out" / checkpoint.INDEX).read_text())
    assert set(index["weight_map"]) == set(out.checkpoint)
    report = json.loads((tmp_path / "out" / "report.json").read_text())
    (note,) = [n for n in report["notes"] if "source" in n]
    assert "fp8 block weights with fp8 block inputs (the fp8 dialect)" in note and "bfloat16" in note
    assert max(verify.verify(tmp_path / "out", fp8).errors.values()) < 0.15
    again = pipeline.evaluate_folder(str(tmp_path / "out"), str(fp8), "builtin")
    assert again.kl_mean == report["kl_mean"] and again.kl_mean > 0
    assert again.perplexity_source == report["perplexity_source"]


def test_the_same_codes_as_from_the_decoded_checkpoint(fp8, tmp_path):
    """Quantizing what is encoded is quantizing a folder that holds the decoded weights."""
    folder = tmp_path / "decoded"
    folder.mkdir()
    source = as_source(load(fp8))
    checkpoint.write_shard(
        folder / "model.safetensors",
        {n: np.ascontiguousarray(source.checkpoint[n]) for n in source.checkpoint},
    )
    (folder / "config.json").write_text(json.dumps(source.config))
    for path in checkpoint.side_files(TINY):
        shutil.copy(path, folder / path.name)
    for name, origin in (("a", fp8), ("b", folder)):
        assert quantize(origin, tmp_path / name, "mxfp4", "--noevaluate") == 0
    a, b = (load(tmp_path / n).checkpoint for n in "ab")
    assert set(a) == set(b)
    for name in a:
        assert a[name].tobytes() == b[name].tobytes(), name


def test_an_output_with_a_cache_and_static_inputs_is_a_source(tmp_path, capsys):
    mine = tmp_path / "mine.yaml"
    text = (Path(mojax.__file__).parent / "recipes" / "fp8.yaml").read_text()
    mine.write_text(text.replace("inputs: ", "kv_cache: fp8\n    inputs: "))
    assert quantize(TINY, tmp_path / "first", str(mine), "--noevaluate", *FEW) == 0
    first = load(tmp_path / "first")
    assert first.cache is not None and any(n.endswith(".input_scale") for n in first.checkpoint)
    assert quantize(tmp_path / "first", tmp_path / "second", "int8", "--noevaluate") == 0
    second = load(tmp_path / "second")
    assert second.cache is None
    assert not [n for n in second.checkpoint if n.endswith(("input_scale", "k_scale", "v_scale"))]
    same(as_source(first), tmp_path / "first")
    assert not verify.changed_files(tmp_path / "second")


def test_modelopts_second_config_is_not_copied(tmp_path):
    assert quantize(TINY, tmp_path / "mo", "fp8_block", "--format=modelopt", "--noevaluate") == 0
    assert (tmp_path / "mo" / "hf_quant_config.json").exists()
    assert quantize(tmp_path / "mo", tmp_path / "ct", "int4", "--noevaluate") == 0
    assert not (tmp_path / "ct" / "hf_quant_config.json").exists()
    assert dialects.section(load(tmp_path / "ct").config)["quant_method"] == "compressed-tensors"
    verify.verify(tmp_path / "ct", tmp_path / "mo")


def test_plan_shows_the_tensors_that_the_source_stands_for(fp8, capsys):
    assert cli.run(["plan", f"--model={fp8}", "--recipe=nvfp4", "--json"]) == 0
    rows = {r["tensor"]: r for r in json.loads(capsys.readouterr().out)["tensors"]}
    assert set(rows) == set(load(TINY).params)
    for name, row in rows.items():
        assert row["dtype"] == "bfloat16" and row["shape"] == list(load(TINY).params[name].shape)


def test_experts_and_an_untied_head(mixture, tmp_path):
    source = native(mixture, tmp_path / "fp8")
    config = json.loads((source / "config.json").read_text())
    config["quantization_config"]["modules_to_not_convert"] += [
        f"model.layers.{i}.mlp.gate" for i in range(2)
    ]
    (source / "config.json").write_text(json.dumps(config))
    same(as_source(load(source)), source)
    one = "model.layers.0.mlp.experts.3.up_proj.weight"
    star = one.replace(".3.", ".*.")
    assert (
        as_source(load(source)).params[star][3].tobytes() == as_source(load(source)).checkpoint[one].tobytes()
    )
    model = load(source)
    made = mojax.apply(model, mojax.plan(model, "nvfp4_weight_only"), {})
    assert not [n for n in made.params if n.endswith("_inv")]
    todo = plan(model, "nvfp4_weight_only")
    out = mojax.export(made, tmp_path / "out", plan=todo)
    assert "lm_head.weight" in load(out).checkpoint
    assert max(verify.verify(out, source).errors.values()) < 0.15
    assert evaluation.evaluate(load(out), as_source(model), np.arange(32).reshape(1, 32)).kl_mean < 0.1


def test_calibration_does_not_round_the_inputs_of_the_source(fp8):
    model = load(fp8)
    todo, tokens = mojax.plan(model, "nvfp4"), np.arange(64, dtype=np.int32).reshape(2, 32)
    seen = mojax.calibrate(model, todo, tokens)
    exact = mojax.calibrate(as_source(model), todo, tokens)
    for name in exact:
        np.testing.assert_array_equal(seen[name]["absmax"], exact[name]["absmax"])


def damaged(fp8, tmp_path, change):
    shutil.copytree(fp8, tmp_path / "bad")
    tensors = dict(checkpoint.read_shard(fp8 / "model.safetensors"))
    change(tensors)
    checkpoint.write_shard(tmp_path / "bad" / "model.safetensors", tensors)
    return tmp_path / "bad"


def test_what_headers_lack_is_said_all_together(fp8, tmp_path, capsys):
    def change(tensors):
        del tensors[Q + ".weight_scale_inv"]
        tensors["model.layers.1.mlp.up_proj.weight_scale_inv"] = np.ones((3, 3), np.float32)

    assert cli.run(["plan", f"--model={damaged(fp8, tmp_path, change)}", "--recipe=nvfp4"]) == 2
    err = capsys.readouterr().err
    assert (
        f"{Q}.weight_scale_inv: missing" in err and "up_proj.weight_scale_inv: the file holds [3, 3]" in err
    )


def test_weights_encoded_in_memory_are_no_source(fp8):
    model = load(fp8)
    made = mojax.apply(model, mojax.plan(model, "int8"), {})
    with pytest.raises(mojax.InputError, match="in memory"):
        mojax.plan(made, "int8")


# ---------------------------------------------------------------- MXFP4 as NVFP4


def mxfp4(shape, seed=0, low=120, high=127):
    """Random MXFP4 codes, all sixteen of them, under exponents of the given range."""
    random = np.random.default_rng(seed)
    codes = random.integers(0, 256, (shape[0], shape[1] // 2), dtype=np.uint8)
    inner = random.integers(low, high + 1, (shape[0], shape[1] // 32)).astype(np.uint8)
    return QTensor(codes, {"inner": inner}, find("formats", "mxfp4").FORMAT(), shape, BF16)


def cast_as(format, weights, shared=()):
    """The cast of some weights, by name, with what it said of inexact blocks."""
    said = {}
    schemes = {name.removesuffix(".weight"): Scheme(format) for name in weights}
    context = Context((), schemes, shared, log=lambda o: said.update({o.weight: (o.before, o.after)}))
    steps = chain(find("transforms", "rtn").rtn(), find("transforms", "cast").cast())
    return {n: q for n, q in steps.apply(weights, {}, context).items() if n in weights}, said


@pytest.mark.parametrize("arithmetic", ["checkpoint", "float32"])
@pytest.mark.parametrize("dtype", [BF16, np.dtype(np.float32)], ids=str)
def test_cast_is_exact_over_seventeen_powers_of_two(arithmetic, dtype):
    format = find("formats", "nvfp4").FORMAT(arithmetic=arithmetic)
    q = mxfp4((64, 256), low=127 - 17, high=127)
    w = np.asarray(decode(q)).astype(dtype)
    w[3], w[4, :32] = 0, -0.0
    made, said = cast_as(format, {"a.weight": w})
    value = np.asarray(format.decode(made["a.weight"])).astype(dtype)
    assert value.tobytes() == w.tobytes()
    assert said == {"a.weight": (64 * 16, 0)}
    plain = np.asarray(format.decode(format.encode(w))).astype(dtype)
    assert (plain != w).mean() > 0.1  # which rounding to nearest is not


def test_cast_of_a_wider_range_rounds_the_smallest_blocks_and_counts_them():
    format = find("formats", "nvfp4").FORMAT()
    codes = np.full((1, 32), 0x21, np.uint8)  # 0.5 and 1
    codes[0, :16] = 0x77
    codes[0, 16:24] = 0x11
    inner = np.array([[127, 127 - 23]], np.uint8)
    q = QTensor(codes, {"inner": inner}, find("formats", "mxfp4").FORMAT(), (1, 64), BF16)
    w = np.asarray(decode(q))
    made, said = cast_as(format, {"a.weight": w})
    value = np.asarray(format.decode(made["a.weight"]))
    assert said == {"a.weight": (4, 2)}
    assert value[:, :32].tobytes() == w[:, :32].astype(np.float32).tobytes()
    smallest = 2.0**-17 / 2  # an element of 0.5 under the smallest scale
    assert np.abs(value - w.astype(np.float32)).max() <= smallest / 2


def test_cast_shares_the_outer_scale_of_fused_weights():
    format = find("formats", "nvfp4").FORMAT()
    weights = {
        f"{n}.weight": np.asarray(decode(mxfp4((32, 64), i, 110 + i, 118 + i))) for i, n in enumerate("abc")
    }
    made, said = cast_as(format, weights, (("a.weight", "b.weight"),))
    outer = {n: float(q.scales["outer"]) for n, q in made.items()}
    assert outer["a.weight"] == outer["b.weight"] != outer["c.weight"]
    assert all(np.log2(v) == np.round(np.log2(v)) for v in outer.values())
    for name, w in weights.items():
        np.testing.assert_array_equal(np.asarray(format.decode(made[name])), w.astype(np.float32))
    assert all(wrong == 0 for _, wrong in said.values())


def test_cast_of_other_numbers_is_near_rounding_to_nearest():
    format = find("formats", "nvfp4").FORMAT()
    w = np.random.default_rng(0).standard_normal((128, 256)).astype(BF16)
    made, said = cast_as(format, {"a.weight": w})
    errors = [
        np.linalg.norm(np.asarray(format.decode(q)) - w.astype(np.float32))
        for q in (made["a.weight"], format.encode(w))
    ]
    assert errors[0] < 1.03 * errors[1] and said["a.weight"][1] > 0.99 * said["a.weight"][0]


@pytest.mark.parametrize("dialect", ["compressed-tensors", "modelopt"])
def test_an_mxfp4_checkpoint_becomes_nvfp4_without_a_change(tmp_path, dialect):
    assert quantize(TINY, tmp_path / "mx", "mxfp4_weight_only", "--noevaluate") == 0
    assert quantize(tmp_path / "mx", tmp_path / "nv", "nvfp4_cast", f"--format={dialect}", *FEW) == 0
    source, out = as_source(load(tmp_path / "mx")), load(tmp_path / "nv")
    assert {s.weights.name for s in out.schemes.values()} == {"nvfp4"}
    for module in out.schemes:
        name = module + ".weight"
        assert np.asarray(decode(out.params[name])).tobytes() == source.params[name].tobytes()
    report = json.loads((tmp_path / "nv" / "report.json").read_text())
    assert report["kl_mean"] < 1e-6 and not any(w["rel_error"] for w in report["worst"])
    total = sum(source.params[m + ".weight"].size for m in out.schemes) // 16
    assert f"cast: {total} of {total} blocks decode to exactly the numbers of the source" in report["notes"]


def test_cast_of_experts(mixture, tmp_path):
    for name, recipe in (("mx", "mxfp4_weight_only"), ("nv", "nvfp4_cast")):
        origin = {"mx": mixture, "nv": tmp_path / "mx"}[name]
        assert quantize(origin, tmp_path / name, recipe, "--noevaluate") == 0
    source, out = as_source(load(tmp_path / "mx")), load(tmp_path / "nv")
    for part in ("gate_proj", "up_proj", "down_proj"):
        name = f"model.layers.1.mlp.experts.*.{part}.weight"
        assert np.asarray(decode(out.params[name])).tobytes() == source.params[name].tobytes()
    assert not any(verify.verify(tmp_path / "nv", tmp_path / "mx").errors.values())


# ---------------------------------------------------------------- MXFP4 as Hugging Face stores it


def native_mxfp4(folder, out, together=()):
    """A copy with its linears as `_blocks` and `_scales`, and what they decode to.

    Args:
      together: names of the linears of experts (gate, up, down) to lay together as gpt-oss does; () for none.
    """
    out.mkdir()
    files, tensors, values = checkpoint.open_checkpoint(folder), {}, {}
    parts = (*LINEARS, "w1", "w2", "w3")
    for name in files:
        module = name.removesuffix(".weight")
        if not module.endswith(parts) or module.endswith(".gate"):
            tensors[name] = np.array(files[name])
            continue
        q = find("formats", "mxfp4").FORMAT().encode(files[name])
        n, k = q.shape
        tensors[module + ".weight_blocks"] = np.asarray(q.codes).reshape(n, k // 32, 16)
        tensors[module + ".weight_scales"] = np.asarray(q.scales["inner"])
        values[name] = np.asarray(decode(q))
    if together:
        gate, up, down = together
        prefixes = sorted({n.split(".experts.")[0] + ".experts" for n in tensors if ".experts." in n})
        for prefix in prefixes:
            for kind in ("blocks", "scales"):

                def take(part, prefix=prefix, kind=kind):
                    return np.stack([tensors.pop(f"{prefix}.{e}.{part}.weight_{kind}") for e in range(8)])

                tensors[f"{prefix}.gate_up_proj_{kind}"] = np.concatenate([take(gate), take(up)], 1)
                tensors[f"{prefix}.down_proj_{kind}"] = take(down)
    checkpoint.write_shard(out / "model.safetensors", tensors)
    config = json.loads((folder / "config.json").read_text())
    excluded = ["model.layers.*.mlp.gate", "model.layers.*.block_sparse_moe.gate", "model.embed_tokens"]
    config["quantization_config"] = {"quant_method": "mxfp4", "modules_to_not_convert": excluded}
    (out / "config.json").write_text(json.dumps(config))
    for path in checkpoint.side_files(folder):
        shutil.copy(path, out / path.name)
    return values


@pytest.mark.parametrize("generic", [False, True])
def test_native_mxfp4_of_a_dense_model(tmp_path, generic):
    values = native_mxfp4(TINY, tmp_path / "mx")
    if generic:
        config = json.loads((tmp_path / "mx" / "config.json").read_text())
        (tmp_path / "mx" / "config.json").write_text(json.dumps(config | {"model_type": "unheard"}))
    source = as_source(load(tmp_path / "mx", generic=generic))
    for name, value in values.items():
        assert source.params[name].tobytes() == value.tobytes()
    assert set(source.params) == set(load(TINY).params)
    if not generic:
        assert quantize(tmp_path / "mx", tmp_path / "nv", "nvfp4_cast", "--noevaluate") == 0
        assert not any(verify.verify(tmp_path / "nv", tmp_path / "mx").errors.values())


@pytest.mark.parametrize("family", ["qwen3_moe", "mixtral"])
@pytest.mark.parametrize("together", [False, True])
def test_native_mxfp4_of_experts(tmp_path, family, together):
    make = {"qwen3_moe": moe_models.tiny_qwen3_moe, "mixtral": moe_models.tiny_mixtral}[family]
    names = {"qwen3_moe": ("gate_proj", "up_proj", "down_proj"), "mixtral": ("w1", "w3", "w2")}[family]
    make(tmp_path / "source")
    values = native_mxfp4(tmp_path / "source", tmp_path / "mx", names if together else ())
    assert any("gate_up_proj_blocks" in n for n in checkpoint.open_checkpoint(tmp_path / "mx")) == together
    source = as_source(load(tmp_path / "mx"))
    for name, value in values.items():
        assert source.checkpoint[name].tobytes() == value.tobytes(), name
    assert set(source.params) == set(load(tmp_path / "source").params)
    assert quantize(tmp_path / "mx", tmp_path / "nv", "nvfp4_cast", "--noevaluate") == 0
    assert not any(verify.verify(tmp_path / "nv", tmp_path / "mx").errors.values())
    assert cli.run(["convert", f"--model={tmp_path / 'mx'}", f"--out={tmp_path / 'ct'}"]) == 0


def test_experts_together_of_an_unknown_family_are_refused(tmp_path):
    moe_models.tiny_qwen3_moe(tmp_path / "source")
    native_mxfp4(tmp_path / "source", tmp_path / "mx", ("gate_proj", "up_proj", "down_proj"))
    config = json.loads((tmp_path / "mx" / "config.json").read_text())
    (tmp_path / "mx" / "config.json").write_text(json.dumps(config | {"model_type": "gpt_oss"}))
    with pytest.raises(mojax.InputError, match="gpt-oss is none"):
        load(tmp_path / "mx", generic=True)


def test_a_quantized_cache_alone_is_left_out(tmp_path):
    assert quantize(TINY, tmp_path / "kv", "fp8_kv", "--noevaluate", *FEW) == 0
    kv = load(tmp_path / "kv")
    assert kv.cache is not None and not kv.schemes
    source = as_source(kv)
    assert source.cache is None and set(source.params) == set(load(TINY).params)
    assert quantize(tmp_path / "kv", tmp_path / "out", "int8", "--noevaluate") == 0
    assert load(tmp_path / "out").cache is None
    verify.verify(tmp_path / "out", tmp_path / "kv")
