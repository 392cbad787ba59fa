"""The command line's contract: verbs, flags, exit codes, interruption and resumption."""

import hashlib
import json
import os
import pty
import shlex
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import ml_dtypes
import numpy as np
import pytest

import mojax
from mojax import arguments, checkpoint, cli, model, pipeline
from mojax.recipe import adjusted, load_recipe

TINY = Path(model.__file__).parent / "data" / "tiny"
SMALL = ["--sequences=2", "--length=32"]
FLAGS = {  # every flag of every verb; --help comes by itself
    "quantize": "model recipe out format target calibration text sequences length seed keep "
    "kl_limit noevaluate "
    "max_shard_size revision trust_remote_code generic",
    "plan": "model recipe format target calibration text sequences length seed keep revision "
    "trust_remote_code generic json",
    "evaluate": "model reference text sequences length seed json report",
    "verify": "model reference json",
    "inspect": "model json",
    "convert": "model out format max_shard_size",
    "recipes": "json",
}


@pytest.fixture(autouse=True)
def here(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """The built-in model in NVFP4, as the command line makes it."""
    out = tmp_path_factory.mktemp("made") / "out"
    assert cli.run(["quantize", "--model=tiny", f"--out={out}", *SMALL]) == 0
    return out


@pytest.fixture
def copy(made, tmp_path):
    return Path(shutil.copytree(made, tmp_path / "copy"))


def run(capsys, line, *more):
    """(exit code, stdout, stderr) of one command."""
    capsys.readouterr()
    code = cli.run([*shlex.split(line), *map(str, more)])
    out, err = capsys.readouterr()
    assert "Traceback" not in err
    return code, out, err


def digests(folder):
    return {
        p.relative_to(folder).as_posix(): hashlib.sha256(p.read_bytes()).hexdigest()
        for p in sorted(folder.rglob("*"))
        if p.is_file() and p.name not in ("report.json", "README.md")
    }


# ---------------------------------------------------------------- flags


@pytest.mark.parametrize("verb", FLAGS)
def test_flags_of_a_verb(capsys, verb):
    assert set(arguments.define(verb)) == {"help", *FLAGS[verb].split()}
    code, out, _ = run(capsys, f"{verb} --help")
    assert code == 0 and all(f"--{flag} " in out for flag in FLAGS[verb].split()) and f"mojax {verb}" in out


def test_help_and_version(capsys):
    code, out, _ = run(capsys, "--help")
    assert code == 0 and all(verb in out for verb in FLAGS)
    assert run(capsys, "--version") == (0, f"mojax {mojax.__version__}\n", "")
    code, out, _ = run(capsys, "")
    assert code == 2 and "usage" in out


@pytest.mark.parametrize(
    "line, words",
    [
        ("quantise --model=tiny", ["quantise", "'quantize'"]),
        ("--bogus", ["--bogus", "quantize"]),
        ("quantize --modle=tiny --out=x", ["--modle", "'--model'"]),
        ("quantize --model=tiny --out=x --kl_limt=1", ["--kl_limt", "'--kl_limit'"]),
        ("quantize --model=tiny --out=x --no_evaluate", ["--no_evaluate", "'--noevaluate'"]),
        ("quantize --model=tiny --out=x --json", ["--json", "plan", "evaluate"]),
        ("quantize --model=tiny --out=x --nomodel", ["--nomodel", "'--model'"]),
        ("plan --model=tiny --out=x", ["plan has no flag --out", "quantize"]),
        ("verify --model=tiny --recipe=nvfp4", ["verify has no flag --recipe", "'--reference'"]),
        ("inspect --model=tiny --reference=tiny", ["inspect has no flag --reference"]),
        ("convert --model=tiny --out=x --target=vllm", ["convert has no flag --target"]),
        ("evaluate --model=tiny --reference=tiny --generic", ["evaluate has no flag --generic"]),
        ("recipes --model=tiny", ["recipes has no flag --model"]),
        ("quantize --model", ["--model"]),
        ("quantize --model= --out=x", ["--model has no value"]),
        ("quantize --out --model=tiny", ["--out has no value"]),
        ("quantize --model=tiny", ["needs --out"]),
        ("plan", ["needs --model"]),
        ("evaluate --model=tiny", ["needs --reference"]),
        ("quantize tiny", ["'tiny'", "--flag=value"]),
        ("quantize --model=tiny --out=x --seed=a", ["--seed", "a"]),
        ("quantize --model=tiny --out=x --sequences=0", ["--sequences"]),
        ("quantize --model=tiny --out=x --recipe=fp8_dynamic --length=1", ["--length=1"]),
        ("evaluate --model=tiny --reference=tiny --sequences=0", ["--sequences"]),
        ("quantize --model=tiny --out=x --length=257", ["--length=257", "256"]),
        ("evaluate --model=tiny --reference=tiny --length=257", ["--length=257", "256"]),
        ("quantize --model=tiny --out=x --kl_limit=nan", ["--kl_limit"]),
        ("quantize --model=tiny --out=x --kl_limit=-1", ["--kl_limit"]),
        ("quantize --model=tiny --out=x --kl_limit=1 --noevaluate", ["--noevaluate"]),
        ("quantize --model=tiny --out=x --max_shard_size=5", ["500MB"]),
        ("quantize --model=tiny --out=x --max_shard_size=0GB", ["500MB"]),
        ("plan --model=tiny --format=modelop", ["'modelopt'"]),
        ("plan --model=tiny --format=hf_fp8", ["read, not written"]),
        ("plan --model=tiny --target=vlm", ["'vllm'"]),
        ("plan --model=tiny --recipe=nvfp", ["'nvfp4'"]),
        ("plan --model=tiny --recipe=W4A16", ["called int4 here"]),
        ("plan --model=tiny --recipe=FP8_DYNAMIC", ["called fp8_dynamic here"]),
        ("recipes nvfp", ["'nvfp4'"]),
        ("recipes nvfp4 fp8", ["one NAME"]),
        ("verify --model=tiny", ["not quantized"]),
        ("convert --model=tiny --format=modelopt --out=x", ["not quantized"]),
        ("inspect --model=nowhere", ["no such folder"]),
    ],
)
def test_refused(capsys, tmp_path, line, words):
    code, out, err = run(capsys, line)
    assert code == 2 and not out
    assert err.startswith("mojax: ") and err.count("\n") == 1  # one message, one line
    for word in words:
        assert word in err
    assert not list(tmp_path.iterdir())


def test_dashes_are_underscores(capsys, made, tmp_path):
    a = run(
        capsys,
        "plan --model=tiny --recipe=fp8-dynamic --format=compressed_tensors --trust-remote-code --json",
    )
    b = run(
        capsys,
        "plan --model=tiny --recipe=fp8_dynamic --format=compressed-tensors --trust_remote_code --json",
    )
    assert a == b and a[0] == 0
    code, _, err = run(
        capsys, f"convert --model={made} --format=compressed_tensors --max-shard-size=1MB --out=x"
    )
    assert code == 2 and "compressed-tensors already" in err


# ---------------------------------------------------------------- verbs


def test_plan(capsys):
    code, out, _ = run(capsys, "plan --model=tiny --recipe=nvfp4")
    assert code == 0 and "self_attn.q_proj.weight" in out and "bits per weight" in out
    code, out, _ = run(capsys, "plan --model=tiny --recipe=nvfp4 --json")
    rows = json.loads(out)["tensors"]
    assert code == 0 and {r["tensor"] for r in rows} == set(checkpoint.open_checkpoint(TINY))
    encoded = [r for r in rows if r["weights"]]
    assert len(encoded) == 28 and all(r["bytes_after"] < r["bytes_before"] for r in encoded)


def test_recipes(capsys):
    code, out, _ = run(capsys, "recipes")
    assert code == 0 and "nvfp4" in out and "int8_smoothquant" in out
    code, out, _ = run(capsys, "recipes --json")
    assert code == 0 and {r["name"] for r in json.loads(out)} >= {"nvfp4", "fp8_block"}
    code, out, _ = run(capsys, "recipes int8-smoothquant --json")
    assert code == 0 and json.loads(out)["steps"] == [{"smoothquant": {"alpha": 0.8}}, "rtn"]


def test_quantize_says_how_to_serve(capsys, tmp_path):
    line = "quantize --model=tiny --recipe=fp8_dynamic --noevaluate --target={} --format={} --out={}/"
    for target, dialect, said in [
        ("vllm", "compressed-tensors", "vllm serve a"),
        ("trtllm", "modelopt", "trtllm-serve b"),
    ]:
        code, out, err = run(capsys, line.format(target, dialect, said[-1]))
        assert code == 0 and out.splitlines()[-1] == said and not err
    assert sorted(p.name for p in tmp_path.iterdir()) == ["a", "b"]


def test_evaluate(capsys, made, tmp_path):
    line = f"evaluate --model={made} --reference=tiny --sequences=2 --length=32 --report=r.json"
    code, out, _ = run(capsys, line + " --json")
    assert code == 0 and json.loads(out) == json.loads((tmp_path / "r.json").read_text())
    written = json.loads((made / "report.json").read_text())
    assert json.loads(out)["kl_mean"] == written["kl_mean"] > 0
    code, out, _ = run(capsys, line)
    assert code == 0 and "perplexity" in out


def test_evaluate_takes_the_text_of_the_report(capsys, made):
    """The recipe's sequences, length and seed are in mojax.json; flags go before them."""
    line = f"evaluate --model={made} --reference=tiny --json"
    written = json.loads((made / "report.json").read_text())
    found = json.loads(run(capsys, line)[1])
    assert found["tokens"] == written["tokens"] == 64 and found["kl_mean"] == written["kl_mean"]
    assert json.loads(run(capsys, f"{line} --length=16")[1])["tokens"] == 32
    assert json.loads(run(capsys, f"{line} --seed=7")[1])["kl_mean"] != written["kl_mean"]
    code, _, err = run(capsys, f"{line} --seed=-1")
    assert code == 2 and "--seed" in err


def test_plan_reads_the_texts(capsys, tmp_path):
    text = tmp_path / "mine.txt"
    text.write_text("Some words and more of them. " * 200)
    line = f"plan --model=tiny --recipe=nvfp4 --calibration={text} {' '.join(SMALL)}"
    code, out, _ = run(capsys, line)
    assert code == 0 and f"calibration text: {text}" in out and f"of {text} text" in out
    assert "evaluation text: built-in evaluation text" in out
    code, out, _ = run(capsys, f"{line} --text={text} --json")
    facts = json.loads(out)
    assert code == 0 and str(text) in facts["calibration_text"] and str(text) in facts["evaluation_text"]
    code, out, _ = run(capsys, "plan --model=tiny --recipe=int4 --json")
    assert json.loads(out)["calibration_text"] is None


def test_notes_are_printed_and_recorded(capsys, tmp_path):
    rules = "[{match: '*', weights: {format: fp8, per: tensor}, inputs: none, share_scale: false}]"
    (tmp_path / "apart.yaml").write_text(f"rules: {rules}\n")
    line = "quantize --model=tiny --recipe=apart.yaml --noevaluate --target=transformers --out=out"
    code, out, _ = run(capsys, line)
    notes = json.loads((tmp_path / "out" / "report.json").read_text())["notes"]
    assert code == 0 and len(notes) == 1 and "per-tensor scales differ in 8 fused groups" in notes[0]
    assert all(note in out for note in notes)


def test_inspect(capsys, made):
    code, out, _ = run(capsys, f"inspect --model={made} --json")
    facts = json.loads(out)
    assert code == 0 and facts["dialect"] == "compressed-tensors" and facts["formats"][0]["modules"] == 28
    assert facts["ignore"] == ["lm_head"] and not facts["surprises"]
    assert facts["bits_per_weight"] == pytest.approx(
        json.loads((made / "report.json").read_text())["bits_per_weight"], rel=1e-3
    )
    assert run(capsys, "inspect --model=tiny")[0] == 0


def test_verify(capsys, made):
    code, out, err = run(capsys, f"verify --model={made}")
    assert code == 0 and "no difference" in out and not err
    code, out, _ = run(capsys, f"verify --model={made} --reference=tiny --json")
    found = json.loads(out)
    assert code == 0 and not found["differences"] and len(found["errors"]) == 28


# ---------------------------------------------------------------- verify finds


def change(folder, name, where, mask):
    """Flip bits of one byte of a tensor, in its file."""
    entry = checkpoint.open_checkpoint(folder).entries[name]
    with open(entry.file, "r+b") as file:
        file.seek(entry.start + where)
        byte = file.read(1)[0]
        file.seek(entry.start + where)
        file.write(bytes([byte ^ mask]))


def differs(capsys, folder, *words, reference=False):
    code, out, err = run(capsys, f"verify --model={folder}" + (" --reference=tiny" if reference else ""))
    assert code == 1 and "no difference" not in out
    for word in words:
        assert word in err
    code, out, _ = run(capsys, f"verify --model={folder} --json")
    assert code == 1 and json.loads(out)["differences"]


def test_verify_finds_a_flipped_code(capsys, copy):
    change(copy, "model.layers.1.mlp.up_proj.weight_packed", 777, 0x10)
    differs(capsys, copy, "model-00003-of-00005.safetensors")


def test_verify_finds_a_flipped_code_of_a_kept_tensor(capsys, copy):
    change(copy, "model.norm.weight", 3, 0x01)
    differs(capsys, copy, "model.norm.weight", reference=True)


def test_verify_finds_a_changed_scale_of_a_fused_member(capsys, copy):
    (copy / "mojax.json").unlink()  # as in a peer's folder: no digests
    change(copy, "model.layers.0.self_attn.k_proj.weight_global_scale", 2, 0x20)
    differs(capsys, copy, "fuses", "model.layers.0.self_attn.k_proj.weight")


def test_verify_finds_a_scale_that_is_not_finite(capsys, copy):
    (copy / "mojax.json").unlink()
    change(copy, "model.layers.0.mlp.down_proj.weight_scale", 0, 0xFF)
    entry = checkpoint.open_checkpoint(copy).entries["model.layers.0.mlp.down_proj.weight_scale"]
    with open(entry.file, "r+b") as file:
        file.seek(entry.start)
        file.write(b"\x7f")  # NaN in float8_e4m3fn
    differs(capsys, copy, "model.layers.0.mlp.down_proj")


def test_verify_finds_a_missing_ignore_entry(capsys, copy):
    config = json.loads((copy / "config.json").read_text())
    config["quantization_config"]["ignore"].remove("lm_head")
    (copy / "config.json").write_text(json.dumps(config))
    (copy / "mojax.json").unlink()
    differs(capsys, copy, "lm_head", "ignore")


def test_verify_finds_a_changed_side_file(capsys, copy):
    (copy / "generation_config.json").write_text("{}")
    differs(capsys, copy, "generation_config.json")
    (copy / "mojax.json").unlink()
    code, _, err = run(capsys, f"verify --model={copy} --reference=tiny")
    assert code == 1 and "generation_config.json" in err


def test_verify_finds_another_source(capsys, copy):
    """Weights of another model decode to something else."""
    other = checkpoint.open_checkpoint(TINY)
    folder = copy.parent / "other"
    shutil.copytree(TINY, folder)
    tensors = {n: np.array(other[n]) for n in other}
    name = "model.layers.2.mlp.gate_proj.weight"
    tensors[name] = tensors[name][::-1].copy()
    checkpoint.write_shard(folder / "model.safetensors", tensors)
    code, _, err = run(capsys, f"verify --model={copy} --reference={folder}")
    assert code == 1 and name in err and err.count("\n") == 1


def test_verify_finds_a_missing_and_an_extra_tensor(capsys, copy):
    (copy / "mojax.json").unlink()
    index = json.loads((copy / checkpoint.INDEX).read_text())
    file = copy / index["weight_map"]["model.layers.3.mlp.up_proj.weight_scale"]
    tensors = {n: np.array(v) for n, v in checkpoint.read_shard(file).items()}
    tensors["surplus.weight"] = np.zeros(4, np.float32)
    del tensors["model.layers.3.input_layernorm.weight"], tensors["model.layers.3.mlp.up_proj.weight_scale"]
    checkpoint.write_shard(file, tensors)
    (copy / checkpoint.INDEX).unlink()
    code, _, err = run(capsys, f"verify --model={copy} --reference=tiny")
    assert code == 1 and "model.layers.3.mlp.up_proj.weight_scale" in err
    assert "surplus.weight" in err and "model.layers.3.input_layernorm.weight" in err


# ---------------------------------------------------------------- limits, existing folders, resuming


def test_limit(capsys, tmp_path):
    line = f"quantize --model=tiny --recipe=fp8_dynamic --kl_limit=1e-9 --out=out {' '.join(SMALL)}"
    code, _, err = run(capsys, line)
    assert code == 3 and "out.rejected" in err and "nats" in err
    assert [p.name for p in tmp_path.iterdir()] == ["out.rejected"]
    assert json.loads((tmp_path / "out.rejected" / "report.json").read_text())["kl_mean"] > 1e-9
    code, _, err = run(capsys, line)  # known before any work
    assert code == 2 and "out.rejected: exists already" in err
    assert [p.name for p in tmp_path.iterdir()] == ["out.rejected"]


def test_an_existing_output_is_untouched(capsys, tmp_path):
    out = tmp_path / "out"
    out.mkdir()
    (out / "mine").write_text("precious")
    os.symlink("nowhere", tmp_path / "link")
    for name in ("out", "out/", "link"):
        code, _, err = run(capsys, f"quantize --model=tiny --recipe=fp8_dynamic --noevaluate --out={name}")
        assert code == 2 and "exists already" in err
    assert (out / "mine").read_text() == "precious" and sorted(p.name for p in tmp_path.iterdir()) == [
        "link",
        "out",
    ]


def begin(out, **calibration):
    """A run that is stopped after its first unit."""
    recipe = adjusted(load_recipe("nvfp4"), **{"sequences": 2, "length": 32, **calibration})
    with pytest.raises(pipeline.Interrupted):
        pipeline.optimize("tiny", recipe, out, interrupted=lambda: True)


def test_another_partial_is_refused(capsys, made, tmp_path):
    begin(tmp_path / "out")
    before = digests(tmp_path / "out.partial")
    assert len([n for n in before if n.endswith(".safetensors")]) == 1
    small = " ".join(SMALL)
    for more, said in [
        ("--recipe=nvfp4_weight_only", "recipe"),
        ("--seed=7", "seed"),
        ("--keep=*.o_proj.weight", "recipe"),
        ("--target=sglang", "target"),
        ("--format=modelopt", "format"),
        ("--max_shard_size=1MB", "max_shard_size"),
        (f"--calibration={TINY.parent / 'text' / 'evaluation.txt'}", "data"),
    ]:
        code, _, err = run(capsys, f"quantize --model=tiny --out=out {small} {more}")
        assert code == 2 and "out.partial" in err and said in err, more
    assert digests(tmp_path / "out.partial") == before
    code, _, _ = run(capsys, f"quantize --model=tiny --out=out {small}")
    assert code == 0 and digests(tmp_path / "out") == digests(made)


def test_a_foreign_partial_is_refused(capsys, tmp_path):
    (tmp_path / "out.partial").mkdir()
    (tmp_path / "out.partial" / "x").write_text("mine")
    code, _, err = run(capsys, "quantize --model=tiny --recipe=fp8_dynamic --noevaluate --out=out")
    assert code == 2 and "not begun by mojax" in err
    assert [p.name for p in (tmp_path / "out.partial").iterdir()] == ["x"]


def test_a_changed_source_is_not_resumed(capsys, tmp_path):
    """Headers are the same, weights may not be: half of each would be a model that never was."""
    shutil.copytree(TINY, tmp_path / "m")
    with pytest.raises(pipeline.Interrupted):
        pipeline.optimize("m", load_recipe("fp8_dynamic"), "out", evaluate=False, interrupted=lambda: True)
    file = tmp_path / "m" / "model.safetensors"
    data = file.read_bytes()
    file.write_bytes(data[:-2] + bytes([data[-2] ^ 1]) + data[-1:])
    code, _, err = run(capsys, "quantize --model=m --recipe=fp8_dynamic --noevaluate --out=out")
    assert code == 2 and "model.safetensors" in err and "changed since" in err


def test_resume_after_everything_is_written(capsys, made, tmp_path):
    """Killed in the evaluation: nothing is computed twice, the result is the same."""
    small = " ".join(SMALL)
    shutil.copytree(made, tmp_path / "out.partial", copy_function=shutil.copy2)
    before = times(tmp_path / "out.partial")
    code, _, _ = run(capsys, f"quantize --model=tiny --out=out {small}")
    assert code == 0 and digests(tmp_path / "out") == digests(made)
    assert len(before) == 5 and times(tmp_path / "out") == before


def times(folder):
    """When each shard was written, and that it is the same file."""
    return {p.name: (p.stat().st_ino, p.stat().st_mtime_ns) for p in folder.glob("*.safetensors")}


# ---------------------------------------------------------------- real processes


def deep(folder):
    """A random Llama of many small layers, so that a signal meets it half way."""
    rng = np.random.default_rng(0)
    config = json.loads((TINY / "config.json").read_text()) | {
        "num_hidden_layers": 48,
        "intermediate_size": 256,
    }
    shutil.copytree(TINY, folder)
    (folder / "config.json").write_text(json.dumps(config))
    from mojax.models import llama

    tensors = {}
    for name, shape in llama.shapes(llama.configure(config)).items():
        w = np.ones(shape) if len(shape) == 1 else rng.normal(size=shape) * 0.05
        tensors[name] = w.astype(ml_dtypes.bfloat16)
    checkpoint.write_shard(folder / "model.safetensors", tensors)
    return folder


def start(args, folder, **more):
    return subprocess.Popen([sys.executable, "-m", "mojax", *args], cwd=folder, text=True, **more)


def wait_for(folder, count, process):
    """Until so many shards are complete."""
    while len(list(folder.glob("*.safetensors"))) < count:
        assert process.poll() is None, process.communicate()
        time.sleep(0.002)


def test_signals_and_terminals(tmp_path):
    """Interrupted or killed and resumed gives the bytes of a run that was left alone."""
    deep(tmp_path / "m")
    args = ["quantize", "--model=m", "--recipe=nvfp4", "--noevaluate", "--sequences=16", "--length=64"]

    parent, child = pty.openpty()  # a terminal: one line per block
    alone = start([*args, "--out=alone"], tmp_path, stdout=subprocess.PIPE, stderr=child)
    os.close(child)
    seen = b""
    while chunk := read(parent):
        seen += chunk
    out, _ = alone.communicate()
    lines = seen.decode().splitlines()
    assert alone.returncode == 0 and out.splitlines()[-1] == "vllm serve alone"
    assert [sum(f" model.layers.{i} " in line for line in lines) for i in range(48)] == [1] * 48
    want = digests(tmp_path / "alone")

    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE}
    stopped = start([*args, "--out=a"], tmp_path, **pipes)
    wait_for(tmp_path / "a.partial", 3, stopped)
    stopped.send_signal(signal.SIGINT)
    out, err = stopped.communicate()
    assert stopped.returncode == 130 and not out and "Traceback" not in err
    command = shlex.split(err.splitlines()[-1].partition("to go on: ")[2])
    assert command[:2] == ["mojax", "quantize"] and sorted(command[2:]) == sorted([*args[1:], "--out=a"])
    written = sorted((tmp_path / "a.partial").glob("*.safetensors"))
    assert (
        3 <= len(written) < 49
        and not list((tmp_path / "a.partial").glob("*.tmp"))
        and not (tmp_path / "a").exists()
    )
    assert all(hashlib.sha256(p.read_bytes()).hexdigest() == want[p.name] for p in written)
    times = {p.name: p.stat().st_mtime_ns for p in written}
    resumed = start(command[1:], tmp_path, **pipes)
    out, err = resumed.communicate()
    assert resumed.returncode == 0 and not err  # quiet where nobody watches
    assert digests(tmp_path / "a") == want
    assert {n: (tmp_path / "a" / n).stat().st_mtime_ns for n in times} == times  # not written again

    killed = start([*args, "--out=b"], tmp_path, **pipes)
    wait_for(tmp_path / "b.partial", 7, killed)
    killed.kill()
    killed.communicate()
    assert killed.returncode == -signal.SIGKILL and not (tmp_path / "b").exists()
    again = start([*args, "--out=b"], tmp_path, **pipes)
    again.communicate()
    assert again.returncode == 0 and digests(tmp_path / "b") == want


def test_a_full_disk(tmp_path):
    """What was written stays; when there is room, the same command goes on from it."""
    args = "-m mojax quantize --model=tiny --recipe=nvfp4_weight_only --noevaluate --out=out"
    line = f"{shlex.quote(sys.executable)} {args}"
    limited = ["bash", "-c", f"ulimit -f 1000; exec {line}"]  # files of 1 MB at most fail as a full disk does
    full = subprocess.run(limited, cwd=tmp_path, capture_output=True, text=True)
    assert full.returncode == 2 and "cannot be written" in full.stderr and full.stderr.count("\n") == 1
    assert not (tmp_path / "out").exists() and (tmp_path / "out.partial" / "mojax.json").exists()
    assert not list((tmp_path / "out.partial").glob("*.tmp")) and not full.stdout
    assert subprocess.run(shlex.split(line), cwd=tmp_path, capture_output=True).returncode == 0
    assert (tmp_path / "out" / "config.json").exists()


def read(fd):
    try:
        return os.read(fd, 65536)
    except OSError:  # how a terminal says that the other side is closed
        return b""


def test_a_closed_pipe_is_no_error():
    line = f"{shlex.quote(sys.executable)} -m mojax recipes | head -n 1"
    done = subprocess.run(["bash", "-c", line], capture_output=True, text=True)
    assert done.returncode == 0 and not done.stderr and done.stdout.startswith("recipe")


def deeper(folder, times):
    """The built-in model with its layers again and again, so that a text takes long."""
    shutil.copytree(TINY, folder)
    config = json.loads((folder / "config.json").read_text())
    layers = config["num_hidden_layers"]
    (folder / "config.json").write_text(json.dumps(config | {"num_hidden_layers": times * layers}))
    table = {n: np.array(w) for n, w in checkpoint.read_shard(folder / "model.safetensors").items()}
    for name in [n for n in table if n.startswith("model.layers.")]:
        _, _, i, rest = name.split(".", 3)
        more = {f"model.layers.{int(i) + k * layers}.{rest}": table[name] for k in range(1, times)}
        table |= more
    checkpoint.write_shard(folder / "model.safetensors", table)
    return folder


def test_an_interrupt_ends_generation_quietly(tmp_path):
    """While XLA computes, an ordinary exit of Python takes its memory away and crashes."""
    model = deeper(tmp_path / "deeper", 16)
    for _ in range(5):  # on a busy machine it may be done before the signal comes
        child = start(
            ["generate", f"--model={model}", "--prompt=import os", "--max_tokens=250"],
            tmp_path,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
        )
        assert child.stdout is not None and child.stdout.read(1)
        child.send_signal(signal.SIGINT)
        _, err = child.communicate(timeout=60)
        if child.returncode:
            break
    assert (child.returncode, err) == (130, "")
