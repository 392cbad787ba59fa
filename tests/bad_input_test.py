"""Bad input: one clear message, exit code 2, nothing that looks finished, and a source that is untouched."""

import hashlib
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import ml_dtypes
import numpy as np
import pytest

from mojax import checkpoint, cli, model

TINY = Path(model.__file__).parent / "data" / "tiny"
QUICK = ("--recipe=fp8_dynamic", "--noevaluate")
SMALL = ("--sequences=2", "--length=32")
UP = "model.layers.1.mlp.up_proj.weight"
Q = "model.layers.2.self_attn.q_proj.weight"


@pytest.fixture
def source(tmp_path, monkeypatch):
    """A copy of the built-in model, to be broken."""
    monkeypatch.chdir(tmp_path)
    return Path(shutil.copytree(TINY, tmp_path / "source"))


def state(folder):
    return {
        p.relative_to(folder).as_posix(): (hashlib.sha256(p.read_bytes()).hexdigest(), p.stat().st_mtime_ns)
        for p in sorted(folder.rglob("*"))
        if p.is_file()
    }


def refused(capsys, source, *args, words=(), problems=1, verb="quantize"):
    """One command that must not work; the message in full."""
    before, around = state(source) if source.is_dir() else None, sorted(os.listdir(source.parent))
    capsys.readouterr()
    out = (
        ()
        if verb != "quantize" or any(a.startswith("--out=") for a in args)
        else (f"--out={source.parent / 'out'}",)
    )
    code = cli.run([verb, f"--model={source}", *args, *out])
    said, err = capsys.readouterr()
    assert code == 2 and not said, (code, said, err)
    assert "Traceback" not in err and len(err.splitlines()) == problems, err
    assert all(line.startswith("mojax: ") for line in err.splitlines())
    for word in words:
        assert word in err, (word, err)
    assert before is None or state(source) == before
    assert sorted(os.listdir(source.parent)) == around  # not even OUT.partial
    return err


def edit(source, **changes):
    config = json.loads((source / "config.json").read_text())
    for key, value in changes.items():
        if value is None:
            config.pop(key, None)
        else:
            config[key] = value
    (source / "config.json").write_text(json.dumps(config))


def rewrite(source, change):
    """Apply `change` to the dictionary of all tensors, and write the file again."""
    tensors = {n: np.array(v) for n, v in checkpoint.read_shard(source / "model.safetensors").items()}
    change(tensors)
    checkpoint.write_shard(source / "model.safetensors", tensors)


# ---------------------------------------------------------------- files


def test_truncated_file(capsys, source):
    file = source / "model.safetensors"
    file.write_bytes(file.read_bytes()[:-1000])
    refused(capsys, source, *QUICK, words=["model.safetensors", "incomplete"])
    file.write_bytes(file.read_bytes()[:100])
    refused(capsys, source, *QUICK, words=["model.safetensors", "incomplete"])
    file.write_bytes(b"")
    refused(capsys, source, *QUICK, words=["model.safetensors"])


@pytest.mark.parametrize("lie", ["dtype", "offsets", "shape", "json"])
def test_lying_header(capsys, source, lie):
    file = source / "model.safetensors"
    data = file.read_bytes()
    length = int.from_bytes(data[:8], "little")
    header = json.loads(data[8 : 8 + length])
    if lie == "dtype":
        header[UP]["dtype"] = "F32"
    elif lie == "offsets":
        header[UP]["data_offsets"] = header[Q]["data_offsets"]
    elif lie == "shape":
        header[UP]["shape"] = [3, 5]
    raw = json.dumps(header).encode() if lie != "json" else b"{" * length
    file.write_bytes(len(raw).to_bytes(8, "little") + raw + data[8 + length :])
    refused(capsys, source, *QUICK, words=["model.safetensors", *([UP] if lie in ("dtype", "shape") else [])])


def test_missing_shard(capsys, source):
    tensors = checkpoint.read_shard(source / "model.safetensors")
    half = dict(list(tensors.items())[:10])
    names = ["model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors"]
    checkpoint.write_shard(source / names[0], half)
    checkpoint.write_index(source, {n: names[n not in half] for n in tensors}, 0)
    (source / "model.safetensors").unlink()
    refused(capsys, source, *QUICK, words=[names[1], "missing"])
    (source / checkpoint.INDEX).unlink()  # the number in the name says it too
    refused(capsys, source, *QUICK, words=[names[1], "missing"])


def test_missing_tensor(capsys, source):
    rewrite(source, lambda t: t.pop(UP))
    refused(capsys, source, *QUICK, words=[UP, "[768, 256]"])


def test_shapes_that_contradict_the_config(capsys, source):
    edit(source, intermediate_size=512)
    err = refused(capsys, source, *QUICK, words=[UP, "[768, 256]", "[512, 256]"], problems=12)
    assert "down_proj" in err  # all of them at once


def test_no_config_and_broken_config(capsys, source):
    (source / "config.json").write_text('{"model_type": ')
    refused(capsys, source, *QUICK, words=["config.json", "JSON"])
    (source / "config.json").write_text("[]")
    refused(capsys, source, *QUICK, words=["config.json", "object"])
    (source / "config.json").unlink()
    refused(capsys, source, *QUICK, words=["no config.json"])


@pytest.mark.parametrize("name", ["pytorch_model.bin", "model.gguf", "model.pth"])
def test_only_other_weights(capsys, source, name):
    os.rename(source / "model.safetensors", source / name)
    refused(capsys, source, *QUICK, words=["safetensors", name, "save_pretrained"])


def test_a_file_as_model(capsys, source):
    refused(capsys, source / "model.safetensors", *QUICK, words=["is a file"])


@pytest.mark.parametrize("name", ["mojax.json", "report.json", "hf_quant_config.json"])
def test_a_source_file_with_the_name_of_ours(capsys, source, name):
    (source / name).write_text("{}")
    refused(
        capsys, source, *QUICK, words=["quant_algo" if name.startswith("hf") else name]
    )  # it says: quantized


# ---------------------------------------------------------------- config.json


@pytest.mark.parametrize("verb", ["quantize", "plan"])
def test_unknown_model_type(capsys, source, verb):
    """Answered from headers: the data are not there at all."""
    edit(source, model_type="lama")
    file = source / "model.safetensors"
    size = file.stat().st_size
    header = file.read_bytes()[: 8 + int.from_bytes(file.read_bytes()[:8], "little")]
    file.write_bytes(header)
    os.truncate(file, size)
    flags = QUICK if verb == "quantize" else ()
    refused(capsys, source, *flags, verb=verb, words=["'lama'", "'llama'", "--generic"])


@pytest.mark.parametrize(
    "key, value",
    [
        ("hidden_size", None),
        ("hidden_size", "256"),
        ("num_attention_heads", 0),
        ("num_key_value_heads", 3),
        ("num_hidden_layers", -1),
        ("hidden_act", "swoosh"),
        ("hidden_act", ["silu"]),
        ("rms_norm_eps", "x"),
        ("rope_parameters", {"rope_type": "novel", "rope_theta": 1.0}),
        ("quantization_config", 3),
        ("quantization_config", {"quant_method": "gptq"}),
        ("quantization_config", {"quant_method": "awq", "bits": 4}),
    ],
)
def test_config_values(capsys, source, key, value):
    edit(source, **{key: value})
    refused(capsys, source, *QUICK, words=["config.json"])
    refused(capsys, source, verb="plan", words=["config.json"])


def test_the_dtype_in_the_config_is_not_trusted(source, tmp_path):
    """It is often wrong; the tensors say what they are."""
    for said in ("float32", "x", None):
        edit(source, dtype=said)
        assert (
            cli.run(
                ["quantize", f"--model={source}", f"--out={tmp_path / str(said)}", "--recipe=int4", *SMALL]
            )
            == 0
        )
        assert (
            checkpoint.open_checkpoint(tmp_path / str(said))
            .spec("model.layers.0.mlp.up_proj.weight_scale")
            .dtype
            == "bfloat16"
        )


# ---------------------------------------------------------------- weights


@pytest.mark.parametrize("recipe", ["int4", "fp8"])
@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
def test_weights_that_are_not_finite(capsys, source, recipe, value):
    def spoil(tensors):
        tensors[UP][5, 7] = value

    rewrite(source, spoil)
    refused(capsys, source, f"--recipe={recipe}", "--noevaluate", *SMALL, words=[UP])


def test_a_repaired_source_starts_anew(capsys, source, tmp_path):
    whole = (source / "model.safetensors").read_bytes()
    assert cli.run(["quantize", f"--model={source}", f"--out={tmp_path / 'want'}", *QUICK]) == 0

    def spoil(tensors):
        tensors[UP][5, 7] = np.nan
        tensors["model.embed_tokens.weight"][:] = 0  # written before the error

    rewrite(source, spoil)
    refused(capsys, source, *QUICK, words=[UP])
    (source / "model.safetensors").write_bytes(whole)
    assert cli.run(["quantize", f"--model={source}", f"--out={tmp_path / 'out'}", *QUICK]) == 0
    names = [p.name for p in (tmp_path / "want").glob("*.safetensors")]
    assert all((tmp_path / "want" / n).read_bytes() == (tmp_path / "out" / n).read_bytes() for n in names)


@pytest.mark.parametrize("name", ["model.layers.0.input_layernorm.weight", "model.embed_tokens.weight"])
def test_kept_weights_that_are_not_finite(capsys, source, name):
    """Seen far behind where it is: the message names the tensor all the same."""

    def spoil(tensors):
        tensors[name][..., 3] = np.nan

    rewrite(source, spoil)
    refused(capsys, source, "--recipe=fp8", *SMALL, words=[name, "NaN"])
    code = cli.run(["quantize", f"--model={source}", "--out=out", "--recipe=fp8_dynamic", *SMALL])
    assert code == 2 and name in capsys.readouterr().err and not Path("out").exists()


def test_zero_weights_are_fine(source, tmp_path):
    def clear(tensors):
        tensors[UP][:] = 0
        tensors[Q][3] = 0

    rewrite(source, clear)
    for recipe in ("nvfp4", "fp8", "int4", "int8", "mxfp4"):
        assert (
            cli.run(
                ["quantize", f"--model={source}", f"--out={tmp_path / recipe}", f"--recipe={recipe}", *SMALL]
            )
            == 0
        )


# ---------------------------------------------------------------- recipes


@pytest.mark.parametrize(
    "text, words",
    [
        ("extends: nvfp4\nstesp: [rtn]\n", ["stesp", "'steps'"]),
        ("extends: nvfp5\n", ["nvfp5", "'nvfp4'"]),
        ("rules: [{match: '*', weights: nvfp5}]\n", ["nvfp5", "'nvfp4'"]),
        ("rules: [{match: '*', weights: {format: int4, gruop: 32}}]\n", ["gruop", "'group'"]),
        ("rules: [{match: '*', weights: {format: fp8, per: row}}]\n", ["row"]),
        ("rules: [{match: '*', wieghts: int4}]\n", ["wieghts", "'weights'"]),
        ("extends: nvfp4\nsteps: [rnt]\n", ["rnt", "'rtn'"]),
        ("extends: nvfp4\nsteps: [{smoothquant: {alhpa: 1}}, rtn]\n", ["alhpa", "'alpha'"]),
        ("extends: nvfp4\nsteps: [{smoothquant: {alpha: 2}}, rtn]\n", ["alpha", "2"]),
        ("extends: nvfp4\ncalibration: {sequences: 0}\n", ["sequences", "0"]),
        ("extends: nvfp4\ncalibration: {lenght: 8}\n", ["lenght", "'length'"]),
        ("extends: nvfp4\nlimits: {kl_mean: low}\n", ["kl_mean", "low"]),
        ("extends: fp8\nrules: [{match: '*', kv_cache: int8}]\n", ["int8", "fp8"]),
        (
            "extends: fp8\nrules: [{match: '*.up_porj.weight', weights: keep}]\n",
            ["*.up_porj.weight", "matches no tensor", "up_proj.weight"],
        ),
        ("extends: fp8\nrules: [{match: '*', weights: keep}]\n", ["nothing would be quantized"]),
        ("extends: [", ["YAML"]),
        ("", []),
    ],
)
def test_recipe(capsys, source, text, words):
    Path("mine.yaml").write_text(text)
    refused(capsys, source, "--recipe=mine.yaml", words=words)
    refused(capsys, source, "--recipe=mine.yaml", verb="plan", words=words)


def test_python_recipe_needs_trust(capsys, source):
    Path("mine.py").write_text(
        "import pathlib\npathlib.Path('ran').touch()\nrecipe = {'extends': 'fp8_dynamic'}\n"
    )
    refused(capsys, source, "--recipe=mine.py", "--noevaluate", words=["--trust_remote_code"])
    assert not Path("ran").exists()
    assert cli.run(["plan", f"--model={source}", "--recipe=mine.py", "--trust_remote_code"]) == 0
    assert Path("ran").exists()


def test_every_plan_problem_at_once(capsys, source):
    (source / "report.json").write_text("{}")
    Path("mine.yaml").write_text(
        "extends: int4\nrules:\n"
        "- {match: '*.k_proj.weight', weights: keep}\n"
        "- {match: '*.nothing.weight', weights: keep}\n"
        "- {match: '*.down_proj.weight', weights: {format: int4, group: 80}}\n"
        "- {match: 'model.layers.0.mlp.up_proj.weight', weights: mxfp4, inputs: mxfp4}\n"
    )
    err = refused(capsys, source, "--recipe=mine.yaml", "--target=sglang", problems=12)
    for word in (
        "report.json",
        "*.nothing.weight",
        "fuses these",
        "--keep=model.layers.3.mlp.down_proj.weight",
        "mxfp4",
    ):
        assert word in err


def test_keep_matches_nothing(capsys, source):
    refused(capsys, source, "--keep=*.gate.weight", words=["*.gate.weight", "matches no tensor"])


# ---------------------------------------------------------------- text


def test_text(capsys, source):
    Path("empty.txt").write_text("")
    Path("blank.txt").write_text(" \n\n \n")
    Path("short.txt").write_text("Only a few words.")
    Path("bad.jsonl").write_text('{"text": "fine"}\n{"txet": "no"}\n')
    Path("bytes.txt").write_bytes(b"\xff\xfe\x00")
    np.savez("floats.npz", tokens=np.zeros((64, 256)))
    np.savez("large.npz", tokens=np.full((64, 256), 4096))
    np.savez("few.npz", tokens=np.zeros((2, 256), np.int32))
    np.savez("other.npz", ids=np.zeros((64, 256), np.int32))
    Path("broken.npz").write_bytes(b"PK nothing")
    for file, words in [
        ("nowhere.txt", ["no such file"]),
        ("empty.txt", ["no text"]),
        ("blank.txt", ["no text"]),
        ("short.txt", ["needed 64 x 256"]),
        ("bad.jsonl", ["bad.jsonl, row 2", "txet"]),
        ("bytes.txt", ["UTF-8"]),
        ("floats.npz", ["float64"]),
        ("large.npz", ["4096", "vocabulary"]),
        ("few.npz", ["--sequences=2"]),
        ("other.npz", ["'tokens'", "ids"]),
        ("broken.npz", ["npz"]),
    ]:
        refused(capsys, source, "--recipe=fp8", "--noevaluate", f"--calibration={file}", words=[file, *words])
        refused(capsys, source, "--recipe=fp8_dynamic", f"--text={file}", words=[file, *words])
        plan = {"verb": "plan", "words": [file, *words]}
        refused(capsys, source, "--recipe=fp8", f"--calibration={file}", **plan)
        refused(capsys, source, "--recipe=fp8_dynamic", f"--text={file}", **plan)


def test_length_over_the_positions(capsys, source):
    refused(capsys, source, "--recipe=fp8", "--length=300", words=["--length=300", "256"])
    refused(capsys, source, "--recipe=fp8_dynamic", "--length=300", words=["--length=300", "256"])


def test_no_tokenizer(capsys, source, tmp_path):
    for file in source.glob("tokenizer*"):
        file.unlink()
    words = ["no tokenizer", "--text=FILE.npz", "--noevaluate", "fp8_dynamic"]
    refused(capsys, source, "--recipe=fp8", words=["--calibration=FILE.npz", *words])
    refused(capsys, source, "--recipe=fp8_dynamic", words=words)
    refused(capsys, source, "--recipe=fp8", verb="plan", words=words)
    assert cli.run(["plan", f"--model={source}", "--recipe=fp8_dynamic"]) == 0  # as with --noevaluate
    assert "evaluation text: none (" in capsys.readouterr().out
    np.savez("t.npz", tokens=np.random.default_rng(0).integers(0, 4096, (2, 32)))
    args = ["quantize", f"--model={source}", "--recipe=fp8", *SMALL]
    refused(
        capsys, source, "--recipe=fp8", "--calibration=t.npz", *SMALL, words=["no tokenizer"]
    )  # to evaluate
    assert cli.run([*args, "--calibration=t.npz", "--text=t.npz", "--out=a"]) == 0
    assert cli.run(["quantize", f"--model={source}", *QUICK, "--out=b"]) == 0
    assert (tmp_path / "a" / "report.json").exists() and (tmp_path / "b" / "report.json").exists()


def test_a_model_card_in_any_encoding(source, tmp_path):
    """Its bytes come first, as they are."""
    for i, card in enumerate([b"# caf\xe9\r\n\r\ntext  \r\n", b"no newline", b"\n\n", b"x\n"]):
        (source / "README.md").write_bytes(card)
        assert cli.run(["quantize", f"--model={source}", f"--out={tmp_path / str(i)}", *QUICK]) == 0
        written = (tmp_path / str(i) / "README.md").read_bytes()
        assert written.startswith(card) and written[len(card) :].lstrip(b"\n").startswith(b"## Quantization")


# ---------------------------------------------------------------- places


def test_out_in_the_source(capsys, source):
    refused(capsys, source, *QUICK, f"--out={source / 'q'}", words=["lies in the source"])
    refused(capsys, source, *QUICK, f"--out={source}", words=["exists already"])
    os.symlink(source, source.parent / "link")
    refused(capsys, source, *QUICK, f"--out={source.parent / 'link' / 'q'}", words=["lies in the source"])


def test_out_that_cannot_be_made(capsys, source):
    Path("file").write_text("")
    refused(capsys, source, *QUICK, "--out=file/q", words=["file/q"])
    refused(capsys, source, *QUICK, "--out=/proc/nowhere/q", words=["/proc/nowhere/q"])  # not even for root


def test_too_little_disk(capsys, source):
    """A model of 9 TB that is there, as a sparse file."""
    edit(source, vocab_size=2**30, hidden_size=4096, num_hidden_layers=1, intermediate_size=128)
    from mojax.models import llama

    config = json.loads((source / "config.json").read_text())
    header, at = {}, 0
    for name, shape in llama.shapes(llama.configure(config)).items():
        stop = at + 2 * int(np.prod(shape))
        header[name] = {"dtype": "BF16", "shape": list(shape), "data_offsets": [at, stop]}
        at = stop
    raw = json.dumps(header).encode()
    file = source / "model.safetensors"
    file.write_bytes(len(raw).to_bytes(8, "little") + raw)
    os.truncate(file, 8 + len(raw) + at)
    around = sorted(os.listdir("."))
    code = cli.run(["quantize", f"--model={source}", *QUICK, "--out=out"])  # its bytes are too many to hash
    err = capsys.readouterr().err
    assert code == 2 and "MB of disk" in err and "9235" in err and err.count("\n") == 1
    assert sorted(os.listdir(".")) == around


def test_hub_without_its_client(tmp_path):
    """In a process where huggingface_hub cannot be imported."""
    (tmp_path / "sitecustomize.py").write_text(
        "import sys\n"
        "class Without:\n"
        "    def find_spec(self, name, path=None, target=None):\n"
        "        if name.partition('.')[0] == 'huggingface_hub':\n"
        "            raise ImportError(name)\n"
        "sys.meta_path.insert(0, Without())\n"
    )
    done = subprocess.run(
        [sys.executable, "-m", "mojax", "plan", "--model=org/name"],
        capture_output=True,
        text=True,
        env=os.environ | {"PYTHONPATH": str(tmp_path)},
        cwd=tmp_path,
    )
    assert done.returncode == 2 and "pip install 'mojax[hf]'" in done.stderr and done.stderr.count("\n") == 1


# ---------------------------------------------------------------- a broken output


@pytest.mark.parametrize("verb", ["verify", "inspect", "evaluate", "convert"])
def test_a_broken_output(capsys, source, tmp_path, verb):
    assert cli.run(["quantize", f"--model={source}", "--out=q", *QUICK]) == 0
    file = sorted((tmp_path / "q").glob("*.safetensors"))[2]
    file.write_bytes(file.read_bytes()[:-10])
    more = {"evaluate": ["--reference=tiny"], "convert": ["--format=modelopt", "--out=c"]}.get(verb, [])
    refused(capsys, tmp_path / "q", *more, verb=verb, words=[file.name, "incomplete"])


def test_evaluate_of_another_model(capsys, source):
    edit(source, vocab_size=4000)
    rewrite(
        source,
        lambda t: t.update({"model.embed_tokens.weight": t["model.embed_tokens.weight"][:4000].copy()}),
    )
    refused(capsys, source, "--reference=tiny", *SMALL, verb="evaluate", words=["vocab_size", "4000", "4096"])


def test_float64_and_integers_are_not_quantized(capsys, source):
    def widen(tensors):
        tensors[Q] = tensors[Q].astype(np.float32).astype(ml_dtypes.float8_e4m3fn)

    rewrite(source, widen)
    refused(capsys, source, *QUICK, words=[Q, "float8_e4m3fn"])
