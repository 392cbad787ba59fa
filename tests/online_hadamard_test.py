"""Inputs rotated by Hadamard blocks when a linear runs: y = q(x H) q(W H)^T, in plans, runs and files."""

import dataclasses
import functools
import json
import shutil

import jax.numpy as jnp
import numpy as np
import pytest

import mojax
from mojax import stream
from mojax.checkpoint import open_checkpoint, read_entries, write_shard
from mojax.conversion import convert
from mojax.converters import compressed_tensors, modelopt
from mojax.converters.compressed_tensors import rotation
from mojax.errors import InputError, PlanError
from mojax.formats import int8, mxfp4, nvfp4
from mojax.formats.base import QTensor, Scheme
from mojax.kernels.hadamard_matrices import matrix
from mojax.program import block_of, cache_scales, watched
from mojax.recipe import load_recipe
from mojax.sources import as_source
from mojax.verify import VerifyError, verify

LLAMA = "tests/golden/models/llama"
DOWN = "model.layers.0.mlp.down_proj"
MX = {"match": "*", "weights": "mxfp4", "inputs": "mxfp4"}
STATIC = {"match": "*", "weights": "int8", "inputs": {"format": "int8", "per": "tensor"}}


def recipe(*rules, steps=("rtn",)):
    return load_recipe({"rules": list(rules), "steps": list(steps)})


@functools.cache
def llama():
    return mojax.load(LLAMA)


@functools.cache
def tokens():
    return np.random.default_rng(0).integers(3, 512, (4, 32)).astype(np.int32)


def logits(model):
    return np.asarray(model(tokens()), np.float32).reshape(-1, 512)


def kl(p, q):
    p, q = (x.astype(np.float64) - x.max(-1, keepdims=True) for x in (p, q))
    p, q = (x - np.log(np.exp(x).sum(-1, keepdims=True)) for x in (p, q))
    return float((np.exp(p) * (p - q)).sum(-1).mean())


def hadamard(block, width):
    """The orthonormal matrix `[width, width]`."""
    return np.kron(np.eye(width // block), matrix(block)) / np.sqrt(block)


# ---------------------------------------------------------------- the function and what is seen of it


@pytest.mark.parametrize("block", [32, 256, 768, 12])
def test_the_function_stays_in_float32(block):
    """768 and 12 are Paley's."""
    model = llama()
    rule = {"match": "*.down_proj.weight" if 256 % block else "*", "hadamard": block}
    plan = mojax.plan(model, recipe(MX | {"inputs": "none"}, rule), target="mojax")
    wide = {n: jnp.asarray(w, jnp.float32) for n, w in model.params.items()}
    turned = {n: w for b in model.blocks for n, w in stream.rotated(plan.context(b), wide).items()}
    assert len(turned) == (14 if rule["match"] == "*" else 2)
    plain = dataclasses.replace(model, params=wide)
    rotated = dataclasses.replace(model, params=wide | turned, schemes=plan.schemes)
    expected = logits(plain)
    scale = np.abs(expected).max()
    assert np.abs(logits(rotated) - expected).max() <= 1e-5 * scale
    assert np.abs(logits(dataclasses.replace(rotated, schemes={})) - expected).max() > 0.1 * scale


def rows(name):
    """Inputs `[tokens, in]` of a weight of the first block."""
    model = llama()
    block = model.blocks[0]
    program = model.program(block)

    def look(place, rounded):
        return place.x if block.prefix + place.name == name else None

    run = watched(program, block_of(program), look)
    x = mojax.program.embed(model.family, model.hyper, model.outside("embed"), tokens())
    _, taps = run(model.local(block), x, cache_scales({}))
    (tap,) = taps.values()
    return np.asarray(tap, np.float32).reshape(-1, tap.shape[-1])


@pytest.mark.parametrize("migration", [[], ["smoothquant"]])
def test_static_scales_are_of_rotated_inputs(migration):
    plan = mojax.plan(
        llama(), recipe(STATIC, {"match": "*.down_proj.weight", "hadamard": 256}, steps=[*migration, "rtn"])
    )
    stats = mojax.calibrate(llama(), plan, tokens())
    model = mojax.apply(llama(), plan, stats)
    x = rows(DOWN + ".weight")
    found = float(model.params[DOWN + ".input_scale"])
    expected = np.abs(x @ hadamard(256, 768)).max()
    assert abs(np.abs(x).max() / expected - 1) > 0.1
    if migration:  # the inputs have changed: what the leaf holds is still the largest that arrives
        assert found == np.float32(stats[DOWN + ".weight@encode"]["absmax"].max())
        assert found < 0.99 * expected
        return
    assert found == pytest.approx(expected, rel=1e-5)


def test_statistics_of_encoding_steps_are_of_rotated_inputs():
    plain = mojax.plan(llama(), recipe(MX | {"inputs": "none"}, steps=["gptq"]))
    plan = mojax.plan(llama(), recipe(MX | {"inputs": "none", "hadamard": 32}, steps=["gptq"]))
    before, after = (mojax.calibrate(llama(), p, tokens()) for p in (plain, plan))
    name = "model.layers.0.self_attn.k_proj.weight"
    h = hadamard(32, 256)
    gram = before[f"{name}@encode"]["gram"]
    found = after[f"{name}@encode"]["gram"]
    assert np.abs(found - h.T @ gram @ h).max() <= 0.02 * np.abs(gram).max()  # inputs are rounded to bfloat16
    assert np.abs(found - gram).max() > 0.2 * np.abs(gram).max()
    assert kl(logits(llama()), logits(mojax.apply(llama(), plan, after))) < 0.2


# ---------------------------------------------------------------- runs


@functools.cache
def encoded(*rules):
    """The llama in memory: packed."""
    plan = mojax.plan(llama(), recipe(*(json.loads(r) for r in rules)))
    stats = mojax.calibrate(llama(), plan, tokens()) if plan.needs else {}
    return mojax.apply(llama(), plan, stats)


MX_32 = json.dumps(MX | {"hadamard": 32})
STATIC_256 = json.dumps(STATIC), json.dumps({"match": "*.down_proj.weight", "hadamard": 256})


@pytest.mark.parametrize("rules", [(MX_32,), STATIC_256], ids=["mxfp4", "int8"])
def test_packed_runs_compute_what_decoded_weights_do(rules):
    model = encoded(*rules)
    own = kl(logits(llama()), logits(model))
    assert 0 < own < 0.5
    decoded = logits(mojax.dequantize(model))
    assert kl(logits(llama()), decoded) == pytest.approx(own, rel=0.35)
    assert kl(decoded, logits(model)) < own
    still = {m: s._replace(hadamard=0) for m, s in model.schemes.items()}
    assert kl(logits(model), logits(dataclasses.replace(model, schemes=still))) > 2 * own


def test_generation_rotates():
    model = encoded(MX_32)
    prompt = [int(t) for t in tokens()[0, :8]]
    (text,) = mojax.run(model).generate([prompt], max_tokens=3).texts
    expected = list(prompt)
    for _ in text.tokens:
        expected.append(int(np.argmax(np.asarray(model(np.asarray([expected], np.int32)))[0, -1])))
    assert list(text.tokens) == expected[8:]


# ---------------------------------------------------------------- files


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    """What `optimize` writes, by name."""
    tmp = tmp_path_factory.mktemp("rotated")
    calibration = tmp / "calibration.npz"
    np.savez(calibration, tokens=tokens())
    rules = {
        "mxfp4": [MX | {"hadamard": 32}],
        "int8": [STATIC, {"match": "*.down_proj.weight", "hadamard": 256}],
        "paley": [STATIC, {"match": "*.down_proj.weight", "hadamard": 12}],
        "nvfp4": [{"match": "*", "weights": "nvfp4", "inputs": "none", "hadamard": 16}],
        "smooth": [MX | {"hadamard": 32}],
    }
    small = {"sequences": 4, "length": 32}
    for name, said in rules.items():
        steps = ["smoothquant", "rtn"] if name == "smooth" else ["rtn"]
        made = load_recipe({"rules": said, "steps": steps, "calibration": small})
        mojax.optimize(LLAMA, made, tmp / name, calibration_text=str(calibration), evaluate=False)
    return tmp


@pytest.mark.parametrize("name", ["mxfp4", "int8", "paley", "nvfp4"])
def test_files_come_back_as_they_were_made(name, folders):
    back = mojax.load(folders / name)
    if name in ("mxfp4", "int8"):
        made = encoded(*((MX_32,) if name == "mxfp4" else STATIC_256))
        assert {m: (s.weights.label, s.hadamard) for m, s in back.schemes.items()} == {
            m: (s.weights.label, s.hadamard) for m, s in made.schemes.items()
        }
        for module in made.schemes:
            a, b = (model.params[module + ".weight"] for model in (made, back))
            assert isinstance(b, QTensor) and np.array_equal(np.asarray(a.codes), np.asarray(b.codes))
        assert np.array_equal(logits(made), logits(back))
    blocks = {s.hadamard for s in back.schemes.values()}
    assert blocks == {"mxfp4": {32}, "int8": {0, 256}, "paley": {0, 12}, "nvfp4": {16}}[name]
    assert not [n for n in back.params if "hadamard" in n]
    config = json.loads((folders / name / "config.json").read_text())["quantization_config"]
    assert len(config["config_groups"]) == 1  # a rotation does not split a group
    (group,) = config["transform_config"]["config_groups"].values()
    assert group["type"] == ("random-hadamard" if name == "paley" else "hadamard")
    targets = group["apply"][0]["targets"]
    assert targets == (["Linear"] if len(blocks) == 1 else [DOWN, DOWN.replace("0", "1")])


@pytest.mark.parametrize("name", ["mxfp4", "smooth", "paley"])
def test_errors_and_sources_are_of_weights_turned_back(name, folders):
    found = verify(folders / name, LLAMA)
    assert len(found.errors) == 14 and max(found.errors.values()) < 0.2
    source = as_source(mojax.load(folders / name))
    assert not source.schemes and not [n for n in source.params if "hadamard" in n]
    if name == "smooth":  # whose weights were scaled as well
        return
    w, back = (np.asarray(m.params[DOWN + ".weight"], np.float32) for m in (llama(), source))
    assert np.linalg.norm(w - back) < 0.2 * np.linalg.norm(w)


def test_the_plan_knows_the_bytes_of_a_matrix_that_is_stored(folders):
    plan = mojax.plan(llama(), recipe(STATIC, {"match": "*.down_proj.weight", "hadamard": 12}))
    files = [p for p in (folders / "paley").glob("*.safetensors")]
    entries = [e for f in files for e in read_entries(f).values()]
    assert sum(e.stop - e.start for e in entries) == plan.bytes_after
    assert sum(e.name.endswith("down_proj.hadamard_12_input.weight") for e in entries) == 2


@pytest.mark.parametrize("damage", ["another", "missing"])
def test_another_matrix_is_noticed(damage, folders, tmp_path):
    copy = shutil.copytree(folders / "paley", tmp_path / "copy")
    name = DOWN + ".hadamard_12_input.weight"
    file = open_checkpoint(copy).entries[name].file
    tensors = {n: np.array(w) for n, w in open_checkpoint(copy).items() if n in read_entries(file)}
    if damage == "missing":
        del tensors[name]
    else:
        tensors[name][0, 0] *= -1
    write_shard(file, tensors)
    (copy / "model.safetensors.index.json").unlink(missing_ok=True)
    with pytest.raises((InputError, PlanError, VerifyError), match="hadamard_12_input"):
        mojax.load(copy).params[DOWN + ".weight"]


# ---------------------------------------------------------------- refusals


@pytest.mark.parametrize(
    ("rule", "options", "said"),
    [
        (
            {"hadamard": 96},
            {},
            "256 input channels, .* blocks of 96 do not divide; use hadamard: 256",
        ),
        ({"match": "*.down_proj.weight", "hadamard": 6}, {}, "no Hadamard matrix of order 6 is known"),
        ({"hadamard": 32}, {"format": "modelopt"}, "cannot be told of them.*--format=compressed-tensors"),
        ({"hadamard": 32}, {"target": "transformers"}, "ignores rotations.*--target=vllm"),
        ({"hadamard": 32}, {"target": "sglang"}, "ignores rotations"),
        ({"hadamard": 32}, {"target": "trtllm"}, "cannot load"),
        ({"match": "*.q_proj.weight", "hadamard": 32}, {}, "vllm fuses these.*rotated by hadamard 32"),
    ],
)
def test_what_cannot_be_is_a_problem_of_the_plan(rule, options, said):
    with pytest.raises(PlanError, match=said):
        mojax.plan(llama(), recipe(MX, {"match": "*"} | rule), **options)


def test_vllm_runs_rotated_linears_without_a_bias(tmp_path):
    source = open_checkpoint(LLAMA)
    config = source.config | {"attention_bias": True}
    tensors = {n: np.array(source[n]) for n in source}
    for i in range(2):
        for module in "qkvo":
            name = f"model.layers.{i}.self_attn.{module}_proj"
            tensors[name + ".bias"] = np.zeros_like(tensors[name + ".weight"][:, 0])
    (tmp_path / "config.json").write_text(json.dumps(config))
    write_shard(tmp_path / "model.safetensors", tensors)
    with pytest.raises(PlanError, match=r"q_proj.weight: has a bias, and vllm"):
        mojax.plan(mojax.load(tmp_path), recipe(MX | {"hadamard": 32}))
    assert mojax.plan(mojax.load(tmp_path), recipe(MX | {"hadamard": 32}), target="mojax").schemes


@pytest.mark.parametrize("value", [1, -32, True, "all", 32.0, [32]])
def test_a_block_is_a_number_of_channels(value):
    with pytest.raises(InputError, match=r"rules\[0\].hadamard: found .* such as 32"):
        recipe(MX | {"hadamard": value})


def test_a_later_rule_takes_the_rotation_away():
    plan = mojax.plan(llama(), recipe(MX | {"hadamard": 32}, {"match": "*.mlp.*", "hadamard": "none"}))
    assert {s.hadamard for m, s in plan.schemes.items() if ".mlp." in m} == {0}
    assert {s.hadamard for m, s in plan.schemes.items() if "self_attn" in m} == {32}


def test_functions_are_not_rotated():
    params = {"w": jnp.ones((64, 64))}
    function = mojax.from_function(lambda params, x: x @ params["w"], params, jnp.ones((4, 64)))
    with pytest.raises(PlanError, match="hadamard: 32 rotates linears of a checkpoint's model"):
        mojax.quantize(function, recipe(MX | {"hadamard": 32}))


def test_conversion_to_a_dialect_without_rotations_is_refused(folders, tmp_path):
    with pytest.raises(PlanError, match="cannot be told of them"):
        convert(folders / "nvfp4", "modelopt", tmp_path / "out")
    scheme = Scheme(nvfp4.FORMAT(), nvfp4.FORMAT(), 16)
    with pytest.raises(InputError, match="rotated by hadamard 16"):
        modelopt.config({"m": scheme}, [], None)


def test_experts_and_large_matrices_are_refused():
    def said(scheme, **more):
        return compressed_tensors.check(scheme, "vllm", **more)

    assert said(Scheme(mxfp4.FORMAT(), mxfp4.FORMAT(), 32)) is None
    assert "experts" in said(Scheme(mxfp4.FORMAT(), mxfp4.FORMAT(), 32), experts=True)
    static = int8.FORMAT(per="tensor")
    assert "no power of two" in said(Scheme(int8.FORMAT(), static, 1536))
    assert said(Scheme(int8.FORMAT(), static, 4096)) is None


# ---------------------------------------------------------------- configs of others


def parsed(apply, module="model.layers.0.mlp.down_proj", name="v", **group):
    group = {"type": "hadamard", "head_dim": 128, "apply": apply} | group
    return rotation.parse({"config_groups": {name: group}})(module)


INPUT = {"targets": ["Linear"], "location": "input", "ignore": ["lm_head"]}


def test_configs_of_others_are_read():
    folded = [{"targets": ["Linear"], "location": place, "inverse": True} for place in ("weight_input",) * 2]
    assert parsed([INPUT, *folded]) == 128
    assert parsed(folded) == 0  # a record of what was done
    assert parsed([INPUT], module="lm_head") == 0
    assert parsed([INPUT | {"targets": "re:.*down_proj$"}]) == 128
    assert parsed([INPUT | {"targets": ["re:.*down_proj$"]}], module="model.layers.0.mlp.up_proj") == 0
    assert rotation.parse(None)("m") == rotation.parse({})("m") == 0


@pytest.mark.parametrize(
    ("apply", "group", "said"),
    [
        ([INPUT | {"location": "output"}], {}, "applied at 'output'"),
        ([INPUT], {"head_dim": None}, "head_dim is None"),
        ([INPUT], {"type": "random-hadamard"}, "is a 'random-hadamard' of 128 channels"),
        ([INPUT], {"randomize": True}, "not randomized"),
        ([INPUT], {"head_dim": 12}, "a power of two"),
        ([INPUT, INPUT], {}, "2 times"),
    ],
)
def test_rotations_that_are_not_ours_are_refused(apply, group, said):
    with pytest.raises(InputError, match=said):
        parsed(apply, **group)


def test_a_rotated_linear_that_is_not_encoded_is_refused(folders, tmp_path):
    copy = shutil.copytree(folders / "mxfp4", tmp_path / "copy")
    config = json.loads((copy / "config.json").read_text())
    config["quantization_config"]["ignore"].append(DOWN)
    (copy / "config.json").write_text(json.dumps(config))
    with pytest.raises(InputError, match=f"rotates the input of {DOWN}, which is not encoded"):
        mojax.load(copy)


# ---------------------------------------------------------------- the client


@pytest.mark.parametrize("name", ["mxfp4", "int8", "paley"])
@pytest.mark.filterwarnings("ignore:You passed `quantization_config`:UserWarning")
def test_compressed_tensors_computes_the_same(name, folders):
    """transformers loads the weights; its quantizer leaves out the rotations, which the library then adds."""
    torch = pytest.importorskip("torch")
    transformers = pytest.importorskip("transformers")
    transform = pytest.importorskip("compressed_tensors.transform")
    folder = folders / name
    theirs = transformers.AutoModelForCausalLM.from_pretrained(folder, attn_implementation="eager")
    said = json.loads((folder / "config.json").read_text())["quantization_config"]["transform_config"]
    ours = logits(mojax.dequantize(mojax.load(folder)))
    own = kl(logits(llama()), ours)

    def ask():
        with torch.no_grad():
            return theirs(torch.from_numpy(tokens()).long()).logits.float().numpy().reshape(-1, 512)

    assert kl(ours, ask()) > own
    transform.apply_transform_config(theirs, transform.TransformConfig.model_validate(said))
    for module in theirs.modules():
        if hasattr(module, "hadamard_12_input"):  # the file's matrix, which the library draws at random
            tensors = open_checkpoint(folder)
            stored = np.asarray(tensors[DOWN + ".hadamard_12_input.weight"], np.float32)
            module.hadamard_12_input.weight.data.copy_(torch.from_numpy(stored))
    assert kl(ours, ask()) <= 0.35 * own
