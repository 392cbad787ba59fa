"""What README.md and ARCHITECTURE.md show: code runs, commands print what is pasted, tables are true."""

import ast
import dataclasses
import importlib
import json
import re
import shlex
import shutil
import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from shipped import distinct

import mojax
from mojax import arguments, cli, recipe, verify
from mojax.checkpoint import write_shard
from mojax.find import find, names
from mojax.formats import int8
from mojax.formats.base import Scheme
from mojax.planner import plan
from mojax.resolve import resolve_format

ROOT = Path(__file__).parents[1]
README = (ROOT / "README.md").read_text()
ARCHITECTURE = (ROOT / "ARCHITECTURE.md").read_text()
TINY = Path(mojax.__file__).parent / "data" / "tiny"
TOKENS = np.arange(64, dtype=np.int32).reshape(2, 32) * 17 % 4096


def blocks(text, language):
    """The fenced code blocks of a language."""
    return re.findall(rf"^```{language}\n(.*?)^```$", text, re.M | re.S)


def section(title):
    """The part of README.md under a heading."""
    (found,) = re.findall(rf"^## {title}\n(.*?)(?=^## |\Z)", README, re.M | re.S)
    return found


def as_table(rows):
    """Markdown."""
    lines = ["| " + " | ".join(row) + " |" for row in rows]
    return "\n".join([lines[0], "|---" * len(rows[0]) + "|", *lines[1:]]) + "\n"


def run(line, capsys, *more):
    """Exit code, stdout and stderr of a command line that begins with mojax."""
    words = shlex.split(line)
    assert words[0] == "mojax"
    capsys.readouterr()
    code = cli.run([*words[1:], *more])
    return code, *capsys.readouterr()


# ---------------------------------------------------------------- README.md


@pytest.mark.parametrize("name", ["first", "test"])
def test_a_marked_command_is_one_line_in_a_block_of_its_own(name):
    """As .ci/run and others read it."""
    (line,) = re.findall(rf"^<!-- {name} command -->\n```bash\n(.*)\n```$", README, re.M)
    assert line.startswith("python3 -m venv .venv && ")


def test_the_first_command_prints_what_is_pasted(capsys, tmp_path, monkeypatch):
    """Numbers apart, and with less text, so that it is quick."""

    def words(text):
        return re.sub(r"\d[\d.]*", "#", re.sub(r"^  model.*\n", "  ...\n", text, flags=re.M))

    monkeypatch.chdir(tmp_path)
    line = "mojax " + README.split(".venv/bin/mojax ", 1)[1].splitlines()[0]
    code, out, _ = run(line, capsys, "--sequences=2", "--length=32")
    assert code == 0
    pasted = words(blocks(section("Try it"), "text")[0])
    assert re.sub(r"(  \.\.\.\n)+", "  ...\n", words(out)) == re.sub(r"(  \.\.\.\n)+", "  ...\n", pasted)


def test_every_verb_is_listed():
    rows = [["verb", "what it does"], *([f"`{verb}`", what] for verb, what in arguments.VERBS.items())]
    assert as_table(rows) in README


def test_the_menu_is_todays():
    heads = ["recipe", "weights", "inputs", "calibrates", "bits per weight", "KL", "runs on"]
    rows = [heads]
    for row in recipe.menu_rows():
        numbers = [f"{row['bits_per_weight']:.2f}", f"{row['kl_tiny']:.4f}"]
        formats = [row["weights"] or "as they are", row["inputs"] or "as they are"]
        data = "yes" if row["needs_data"] else "no"
        rows.append([row["name"], *formats, data, *numbers, row["hardware"]])
    assert as_table(rows) in README


def test_who_loads_what_is_what_the_dialects_say():
    columns = {"vLLM": "vllm", "SGLang": "sglang", "TensorRT-LLM": "trtllm", "transformers": "transformers"}
    pairs = [("compressed-tensors", t) for t in columns] + [("modelopt", t) for t in list(columns)[:3]]
    rows = [["recipe", *(f"{d}: {t}" if t == "vLLM" else t for d, t in pairs)]]
    for name in sorted((*distinct(), "nvfp4_svdquant")):
        steps = dict(recipe.load_recipe(name).steps)
        every = recipe.choose(recipe.load_recipe(name), "model.layers.0.mlp.down_proj.weight")
        marks = []
        for dialect, target in pairs:
            converter = find("converters", dialect)
            scheme = find_scheme(every, converter.ARITHMETIC)._replace(
                hadamard=every.hadamard or 0, rank=steps.get("svdquant", {}).get("rank", 0)
            )
            marks.append("-" if converter.check(scheme, columns[target]) else "yes")
            assert find("converters", "modelopt").check(scheme, "transformers")  # so it has no column
        rows.append([name, *marks])
    assert as_table(rows) in README


def find_scheme(rule, arithmetic):
    weights, inputs = rule.weights, rule.inputs
    made = None if inputs in (None, "none") else resolve_format(inputs, "", arithmetic)
    return Scheme(resolve_format(weights, "", arithmetic), made)


def test_every_family_is_named():
    (line,) = re.findall(r"`model_type` is (.*?)\.", section("What it reads"), re.S)
    assert tuple(re.findall(r"`(\w+)`", line)) == names("models")


def test_the_python_runs(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    code, running, _ = blocks(README, "python")
    made = {}
    exec(code.replace("sequences=64, length=256", "sequences=2, length=32"), made)
    assert 0 < made["report"].kl_mean < 1
    assert (tmp_path / "tiny-nvfp4" / "config.json").is_file()
    assert verify.verify(tmp_path / "tiny-nvfp4", "tiny").tensors
    exec(running, made)
    assert [len(t.tokens) for t in made["made"].texts] == [16, 16]
    (shell,) = blocks(section("Running what was packed"), "bash")
    assert cli.run(shlex.split(shell)[1:]) == 0


def test_kernels_are_used_as_pasted():
    (code,) = blocks((ROOT / "docs" / "kernels.md").read_text(), "python")
    made = {}
    exec(code, made)
    assert made["y"].shape == (4, 128) and jnp.isfinite(made["y"]).all()


def test_any_function_is_covered_as_pasted(tmp_path, capsys):
    *_, code = blocks(README, "python")
    (tmp_path / "mlp.py").write_text(code)
    made = {}
    with jax.numpy_rank_promotion("allow"):  # as users have it
        exec(compile(code, tmp_path / "mlp.py", "exec"), made)
    assert capsys.readouterr().out == blocks(section("Any JAX function"), "text")[0]
    assert 0 < made["report"].rel_error < 0.5
    assert set(made["small"].schemes) == {"gate", "up"}
    assert all(jnp.isfinite(g).all() for g in made["grads"].values())


def test_the_recipe_is_one(tmp_path):
    (text,) = blocks(README, "yaml")
    (tmp_path / "mine.yaml").write_text(text)
    made = plan(mojax.load("tiny"), str(tmp_path / "mine.yaml"))
    labels = {m: s.weights.label for m, s in made.schemes.items()}
    assert labels["model.layers.1.mlp.down_proj"] == "fp8 per=channel"
    assert labels["model.layers.1.mlp.up_proj"] == "nvfp4"
    assert "model.layers.0.self_attn.o_proj" not in labels
    assert made.cache is not None and made.recipe.limits and len(made.steps) == 3


MESSAGES = [
    pytest.param(*part.split("\n", 1), id=part.partition("\n")[0])
    for block in blocks(README, "console")
    for part in re.split(r"^\$ ", block, flags=re.M)[1:]
]


@pytest.mark.parametrize("command, said", MESSAGES)
def test_a_command_says_what_is_pasted(command, said, capsys, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "tiny-nvfp4").mkdir()
    (tmp_path / "short.txt").write_text("too short\n")
    code, out, err = run(command, capsys)
    assert code == 2 and not out
    first, *more = err.splitlines(keepends=True)
    assert first + "...\n" * bool(more) == said


# ---------------------------------------------------------------- ARCHITECTURE.md


def test_every_file_that_is_named_exists():
    prose = re.sub(r"^```(python|yaml)\n.*?^```$", "", ARCHITECTURE, flags=re.M | re.S)
    folders = ("mojax", "tests", *rooms_at_the_top())
    there = {path.name for folder in folders for path in (ROOT / folder).rglob("*.py")}
    assert set(re.findall(r"\b\w+\.py\b", prose)) <= there


def test_every_file_of_the_core_is_told_by_its_own_first_sentence():
    told = dict(re.findall(r"^- `([\w/]+)\.py`: (.*)$", ARCHITECTURE, re.M))
    folder = ROOT / "mojax"
    files = [*folder.glob("*.py"), *(folder / "structure").glob("*.py")]
    expected = {}
    for path in files:
        doc = ast.get_docstring(ast.parse(path.read_text())) or ""
        if not path.stem.startswith("__"):
            name = path.relative_to(folder).with_suffix("").as_posix()
            expected[name] = doc.split("\n\n")[0].replace("\n", " ")
    assert told == expected


def rooms_at_the_top():
    return [path.name for path in (ROOT / "mojax").iterdir() if path.is_symlink()]


def test_every_room_is_named():
    for room in [*rooms_at_the_top(), "formats", "models"]:
        assert f"{room}/` |" in ARCHITECTURE


@pytest.fixture
def rooms(tmp_path, monkeypatch):
    """Each example of ARCHITECTURE.md, as a file of its room; gives the path of the one that is YAML."""
    made = []
    for code in blocks(ARCHITECTURE, "(?:python|yaml)"):
        path = code.splitlines()[0].removeprefix("# ")
        room = Path(path).parent.name
        file = tmp_path / room / Path(path).name
        file.parent.mkdir()
        file.write_text(code)
        if file.suffix == ".py":
            package = importlib.import_module(f"mojax.{room}")
            monkeypatch.setattr(package, "__path__", [*package.__path__, str(file.parent)])
            made.append((package, file.stem))
    importlib.invalidate_caches()
    yield tmp_path
    for package, name in made:
        sys.modules.pop(f"{package.__name__}.{name}", None)
        vars(package).pop(name, None)


def test_every_kind_of_addition_has_an_example(rooms):
    found = {path.parent.name for path in rooms.glob("*/*")}
    assert found == {"formats", "transforms", "models", "converters", "recipes"}


def test_the_format_encodes_and_no_dialect_writes_it_yet(rooms):
    format = find("formats", "e4m3").FORMAT()
    w = np.random.default_rng(0).standard_normal((8, 32), np.float32)
    decoded = np.asarray(format.decode(format.encode(w)))
    np.testing.assert_allclose(decoded, w, rtol=2**-4, atol=2**-10)  # three bits behind the point
    (rooms / "mine.yaml").write_text("rules: [{match: '*', weights: e4m3, inputs: none}]\n")
    with pytest.raises(mojax.PlanError, match="vllm cannot load e4m3 weights"):
        plan(mojax.load("tiny"), str(rooms / "mine.yaml"))


def test_the_algorithm_runs_as_a_step_of_the_recipe(rooms):
    model = mojax.load("tiny")
    made = plan(model, str(rooms / "recipes" / "int4_clipped.yaml"))
    assert [name for name, _ in made.recipe.steps] == ["shrink", "rtn"]
    name = "model.layers.0.mlp.up_proj.weight"
    shrink = find("transforms", "shrink").shrink(share=0.9)
    clipped = shrink.apply(model.params, {}, made.context(model.blocks[0]))
    assert jnp.abs(clipped[name]).max() < jnp.abs(model.params[name]).max()
    q = mojax.apply(model, made, {}).params[name]
    np.testing.assert_array_equal(q.codes, q.format.encode(clipped[name]).codes)
    assert (np.asarray(q.codes) != q.format.encode(model.params[name]).codes).any()


def test_the_family_loads_a_checkpoint(rooms):
    """The built-in model under another name; the biases that this family has by default are missed."""
    config = json.loads((TINY / "config.json").read_text()) | {"model_type": "seed_oss"}
    folder = rooms / "checkpoint"
    shutil.copytree(TINY, folder)
    (folder / "config.json").write_text(json.dumps(config | {"attention_bias": False}))
    model, tiny = mojax.load(folder), mojax.load("tiny")
    np.testing.assert_array_equal(model(TOKENS), tiny(TOKENS))
    assert len(plan(model, "nvfp4").schemes) == 28
    (folder / "config.json").write_text(json.dumps(config | {"attention_bias": True}))
    with pytest.raises(mojax.PlanError, match=r"q_proj\.bias: config\.json implies this tensor \[256\]"):
        mojax.load(folder)


def test_the_dialect_opens_a_checkpoint(rooms):
    source = mojax.load("tiny")
    format = int8.FORMAT()
    tensors = {}
    for name in source.params:
        w = np.asarray(source.params[name])
        if w.ndim == 2 and "embed" not in name:
            q = format.encode(w)
            tensors[name] = np.asarray(q.codes)
            tensors[name.removesuffix("weight") + "scale"] = np.asarray(q.scales["inner"])
        else:
            tensors[name] = w
    folder = rooms / "quantized"
    folder.mkdir()
    write_shard(folder / "model.safetensors", tensors)
    config = dict(source.config) | {"quantization_config": {"quant_method": "rows8"}}
    (folder / "config.json").write_text(json.dumps(config))
    found = mojax.load(folder)
    some = next(iter(found.schemes.values()))
    assert "read, not written" in find("converters", "rows8").check(some, "vllm")
    assert len(found.schemes) == 28
    name = "model.layers.3.mlp.down_proj.weight"
    q = found.params[name]
    assert dataclasses.replace(q.format, as_read=False) == format
    np.testing.assert_array_equal(q.format.decode(q), format.decode(format.encode(source.params[name])))
