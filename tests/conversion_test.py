"""What `convert` checks by itself: that what it wrote reads back as what it read."""

import dataclasses
import json
import re
import shutil
import tracemalloc
import weakref
from pathlib import Path

import jax.numpy as jnp
import numpy as np
import pytest

from mojax import calibration, cli, conversion, evaluation, find, model, pipeline, text, verify
from mojax.checkpoint import open_checkpoint, write_shard
from mojax.errors import InputError, PlanError
from mojax.formats import fp8, int4, nvfp4
from mojax.formats.base import QTensor, Scheme
from mojax.recipe import adjusted, load_recipe

TINY = Path(model.__file__).parent / "data" / "tiny"
DOWN = "model.layers.2.mlp.down_proj"


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """The built-in model in NVFP4 with static inputs."""
    out = tmp_path_factory.mktemp("made") / "out"
    recipe = adjusted(load_recipe("nvfp4"), sequences=2, length=32)
    pipeline.optimize("tiny", recipe, out, evaluate=False)
    return out


def up(value, units):
    """The float32 so many units above."""
    return (np.asarray(value, np.float32).view(np.int32) + np.int32(units)).view(np.float32)


LIES = {
    "codes": lambda t, leaf: t | {f"{leaf}.weight": t[f"{leaf}.weight"][::-1].copy()},
    "inner scale": lambda t, leaf: t | {f"{leaf}.weight_scale": t[f"{leaf}.weight_scale"][::-1].copy()},
    "outer scale": lambda t, leaf: t | {f"{leaf}.weight_scale_2": up(t[f"{leaf}.weight_scale_2"], 9)},
    "calibrated maximum": lambda t, leaf: t | {f"{leaf}.input_scale": up(t[f"{leaf}.input_scale"], 9)},
}


@pytest.mark.parametrize("what", LIES)
def test_a_writer_that_changes_something_is_noticed(made, tmp_path, monkeypatch, what):
    dialect = find.find("converters", "modelopt")
    write = dialect.write

    def lie(module, *args):
        tensors = write(module, *args)
        return LIES[what](tensors, module) if module == DOWN else tensors

    monkeypatch.setattr(dialect, "write", lie)
    with pytest.raises(verify.VerifyError) as error:
        conversion.convert(made, "modelopt", tmp_path / "out")
    (said,) = error.value.differences
    assert said.startswith(DOWN) and what in said
    assert [p.name for p in tmp_path.iterdir()] == ["out.partial"]


def test_a_changed_kept_tensor_is_noticed(made):
    source = model.load(made)
    params = dict(source.params)
    params["model.norm.weight"] = np.array(params["model.norm.weight"])
    params["model.norm.weight"].view(np.uint16)[3] ^= 1
    del params["model.layers.0.input_layernorm.weight"]
    found = conversion.differences(source, dataclasses.replace(source, params=params))
    assert len(found) == 2 and all("norm.weight" in line for line in found)


def test_a_tensor_of_zeros_is_no_difference():
    """Its multiplier is 0 in one dialect, its divisor 1 in the other."""
    formats = nvfp4.FORMAT(arithmetic="float32"), nvfp4.FORMAT(arithmetic="checkpoint")
    q = formats[0].encode(np.zeros((4, 32), jnp.bfloat16))
    models = []
    for format, outer in zip(formats, (0, 1), strict=True):
        scales = dict(q.scales) | {"outer": np.float32(outer)}
        leaf = dataclasses.replace(q, scales=scales, format=format)
        models.append(model.Model({}, {"w.weight": leaf}, None))
    assert conversion.differences(*models) == conversion.differences(*models[::-1]) == []


def test_what_the_dialect_cannot_mix_is_a_plan_problem(made):
    """Said before anything is written."""
    source = model.load(made)
    schemes = dict(source.schemes)
    mixed = int4.FORMAT(arithmetic="checkpoint", as_read=True)
    q = mixed.encode(np.ones((256, 768), jnp.bfloat16))
    schemes[DOWN] = Scheme(mixed)
    params = {n: source.params[n] for n in source.params} | {DOWN + ".weight": q}
    odd = dataclasses.replace(source, schemes=schemes, params=params)
    with pytest.raises(PlanError, match="cannot mix"):
        conversion.as_plan(odd, find.find("converters", "modelopt"))


def test_the_plan_looks_for_linears_once(made, monkeypatch):
    source = model.load(made)
    calls = []
    linears = model.linears
    monkeypatch.setattr(conversion, "linears", lambda *args: calls.append(1) or linears(*args))
    plan = conversion.as_plan(source, find.find("converters", "modelopt"))
    assert len(calls) == 1
    for row in plan.rows:
        found = re.match(r"model\.layers\.\d+\.", row.name)
        assert row.block == (found[0] if found else "") == source.prefix(row.name)


# ---------------------------------------------------------------- memory


def test_same_bytes_makes_no_copy():
    a, b = np.zeros(2**26, np.uint8), np.zeros(2**26, np.uint8)
    tracemalloc.start()
    assert verify.same_bytes(a, b)
    b[-1] = 1
    assert not verify.same_bytes(a, b)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < a.nbytes / 2
    assert not verify.same_bytes(a, a[:-1]) and verify.same_bytes(np.float32(2), np.float32(2))


def test_bits_hold_one_tensor_at_a_time():
    alive, most = set(), []

    def leaf():
        codes = np.zeros((8, 16), np.uint8)
        alive.add(id(codes))
        weakref.finalize(codes, alive.discard, id(codes))
        most.append(len(alive))
        return QTensor(codes, {}, fp8.FORMAT(), codes.shape, np.dtype(jnp.bfloat16))

    scheme = Scheme(fp8.FORMAT())
    lazy = model.Lazy({f"m{i}.weight": leaf for i in range(20)})
    encoded = model.Model({}, lazy, None, schemes={f"m{i}": scheme for i in range(20)})
    assert evaluation.quantized_bits(encoded) == 8 and len(most) == 20
    assert max(most) <= 2


def test_only_what_embed_or_head_reads_goes_to_the_device():
    tiny = model.load(TINY)
    embedding, head = tiny.outside("embed"), tiny.outside("head")
    assert set(embedding) == {"model.embed_tokens.weight"}
    assert set(head) == {"model.norm.weight", "model.embed_tokens.weight"}  # tied
    assert all(hasattr(leaf, "devices") for leaf in [*embedding.values(), *head.values()])


# ---------------------------------------------------------------- errors of a run


def test_a_writers_error_does_not_read_the_whole_source(tmp_path, monkeypatch, capsys):
    dialect = find.find("converters", "compressed-tensors")

    def refuse(module, *args):
        raise InputError(f"{module}: does not fit")

    monkeypatch.setattr(dialect, "write", refuse)
    monkeypatch.setattr(evaluation, "not_finite", lambda model: pytest.fail("read everything"))
    args = ["quantize", "--model=tiny", "--recipe=int4", "--noevaluate", f"--out={tmp_path / 'out'}"]
    assert cli.run(args) == 2
    assert "does not fit" in capsys.readouterr().err and not list(tmp_path.iterdir())


def overflowing(folder):
    """The built-in model in float16, with one output just below the largest number, that FP8 rounds up.

    Its weights are 273 / 448 of the largest of the row, whose input is zero; E4M3 makes that 288 / 448.
    """
    shutil.copytree(TINY, folder)
    files = open_checkpoint(TINY)
    tensors = {n: np.asarray(files[n]).astype(np.float16) for n in files}
    tensors["model.layers.1.mlp.up_proj.weight"][5] = 0
    down = tensors["model.layers.1.mlp.down_proj.weight"]
    config = json.loads((folder / "config.json").read_text()) | {"dtype": "float16"}
    (folder / "config.json").write_text(json.dumps(config))
    down[0] = 0
    without = written(folder, tensors)
    down[0] = 1
    sums = np.abs(written(folder, tensors)[..., 0] - without[..., 0]).max()
    down[0] = 64000 / sums
    down[0, 5] = 64000 / sums * 448 / 273
    written(folder, tensors)
    return folder


def written(folder, tensors):
    """What the second block gives for the evaluation text, once these tensors are the model's."""
    write_shard(folder / "model.safetensors", tensors)
    read = model.load(folder)
    ids = text.tokens("builtin", folder, sequences=2, length=32, purpose="evaluation").ids
    xs = calibration.start(read, ids)
    for block in read.blocks[:2]:
        xs = evaluation.through(read, block, xs)
    return np.concatenate([np.asarray(x, np.float32) for x in xs])


def test_a_quantized_model_without_finite_logits_is_rejected(tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    overflowing(tmp_path / "m")
    args = ["--model=m", "--recipe=fp8_dynamic", "--sequences=2", "--length=32"]
    assert cli.run(["quantize", *args, "--out=out"]) == 3
    err = capsys.readouterr().err
    assert "out.rejected" in err and "the quantized model gives logits that are not finite" in err
    assert sorted(p.name for p in tmp_path.iterdir()) == ["m", "out.rejected"]
    report = json.loads((tmp_path / "out.rejected" / "report.json").read_text())
    assert report["kl_mean"] is None and "not finite" in report["notes"][0]
    assert cli.run(["evaluate", "--model=out.rejected", "--reference=m"]) == 2
    assert "the quantized model" in capsys.readouterr().err


def test_a_damaged_source_is_not_converted(made, tmp_path):
    shutil.copytree(made, tmp_path / "damaged")
    shard = sorted((tmp_path / "damaged").glob("*.safetensors"))[-1]
    data = bytearray(shard.read_bytes())
    data[-1] ^= 1
    shard.write_bytes(data)
    with pytest.raises(InputError, match=f"{shard.name}: was changed"):
        conversion.convert(tmp_path / "damaged", "modelopt", tmp_path / "out")
    assert not list(tmp_path.glob("out*"))


def test_the_card_says_that_it_was_converted(made, tmp_path):
    conversion.convert(made, "modelopt", tmp_path / "out")
    card = (tmp_path / "out" / "README.md").read_text()
    assert card.startswith((made / "README.md").read_text())
    assert "Converted by mojax from compressed-tensors to modelopt" in card


def test_an_evaluation_stops_between_blocks():
    tiny = model.load("tiny")
    with pytest.raises(KeyboardInterrupt):
        evaluation.evaluate(tiny, tiny, np.zeros((1, 4), np.int32), interrupted=lambda: True)
