"""transformers with compressed-tensors loads what mojax writes: the same weights, nearly the same logits.

Decoded weights must be the same bits. Logits are compared by KL(mojax || client), mean over tokens, in nats:
torch and XLA add in different orders, and a quantized input one bfloat16 unit away may get another code.
"""

import functools
import json
import shutil
from typing import NamedTuple

import jax.numpy as jnp
import numpy as np
import pytest
from shipped import distinct

import mojax
from mojax import recipe, text
from mojax.checkpoint import open_checkpoint
from mojax.converters.base import kind
from mojax.converters.compressed_tensors.schemes import LOADS
from mojax.kernels.base import decoded

torch = pytest.importorskip("torch")
safetensors_torch = pytest.importorskip("safetensors.torch")
transformers = pytest.importorskip("transformers")
pytest.importorskip("compressed_tensors")

SEQUENCES, LENGTH = 8, 128
WEIGHTS_ONLY = 1e-3  # nats
SHARE = 0.35  # of the scheme's own KL, where inputs are quantized
DEQUANTIZED = {"int4_asymmetric"}  # the client's default mode fails on packed zero points
BFLOAT16_ONLY = ("nvfp4", "mxfp4", "mxfp8")  # the client decodes these to bfloat16 whatever the checkpoint is
FP8_TOKEN = {"format": "fp8", "per": "token"}
BEYOND = {  # what the dialect's table says of transformers and no shipped recipe does
    ("fp8 channel", "fp8 tensor"): ({"format": "fp8", "per": "channel"}, {"format": "fp8"}),
    ("fp8 tensor", "none"): ({"format": "fp8"}, "none"),
    ("fp8 channel", "none"): ({"format": "fp8", "per": "channel"}, "none"),
    ("int8 tensor", "int8 token"): ({"format": "int8", "per": "tensor"}, {"format": "int8", "per": "token"}),
    ("int8 tensor", "int8 tensor"): ({"format": "int8", "per": "tensor"},) * 2,
    ("int8 channel", "none"): ({"format": "int8"}, "none"),
    ("mxfp4", "fp8 token"): ({"format": "mxfp4"}, FP8_TOKEN),
    ("mxfp8", "none"): ({"format": "mxfp8"}, "none"),
}

pytestmark = pytest.mark.filterwarnings("ignore:You passed `quantization_config`:UserWarning")


class Answer(NamedTuple):
    """What the client made of a folder: weights by module, float32, and logits `[tokens, vocabulary]`."""

    weights: dict[str, np.ndarray]
    logits: np.ndarray


def ask(folder, tokens, **options):
    """Load a folder in transformers and run it; the first forward is what decodes the weights."""
    model = transformers.AutoModelForCausalLM.from_pretrained(folder, attn_implementation="eager", **options)
    with torch.no_grad():
        logits = model(torch.from_numpy(tokens).long()).logits
    leaves = {n: v.float().numpy() for n, v in model.state_dict().items() if n.endswith(".weight")}
    weights = {name.removesuffix(".weight"): value for name, value in leaves.items()}
    return Answer(weights, logits.float().numpy().reshape(tokens.size, -1))


def ours(folder, tokens):
    """float32 logits `[tokens, vocabulary]` of mojax, rounded to the dtype of the client's.

    The client multiplies decoded weights and inputs, so the weights are decoded here too; a rounding
    elsewhere flips codes of the inputs of later layers (`test_packed_and_decoded_are_as_far`).
    """
    model = mojax.dequantize(mojax.load(folder))
    logits = jnp.asarray(model(tokens)).astype(model.dtype).astype(jnp.float32)
    return np.asarray(logits).reshape(tokens.size, -1)


def kl(p, q):
    """KL(p || q) of logits `[tokens, vocabulary]`, mean over tokens."""
    p, q = (x.astype(np.float64) - x.max(-1, keepdims=True) for x in (p, q))
    p, q = (x - np.log(np.exp(x).sum(-1, keepdims=True)) for x in (p, q))
    return float((np.exp(p) * (p - q)).sum(-1).mean())


def different(folder, answer):
    """The encoded modules whose decoded weights are not, bit by bit, those of the client."""
    model = mojax.load(folder)
    assert model.schemes
    weights = {m: decoded(model.params[m + ".weight"]) for m in model.schemes}
    return [m for m, w in weights.items() if not same_bits(np.asarray(w, np.float32), answer.weights[m])]


def same_bits(a, b):
    return np.array_equal(a.view(np.uint32), b.view(np.uint32))


def limit(folder, own):
    """The largest KL(mojax || client) to accept for a scheme whose KL to its source is `own`."""
    model = mojax.load(folder)
    simulated = model.cache is not None or any(s.inputs for s in model.schemes.values())
    return SHARE * own if simulated else WEIGHTS_ONLY


def options(name):
    if name in DEQUANTIZED:
        return {"quantization_config": transformers.CompressedTensorsConfig(dequantize=True)}
    return {}


@pytest.fixture(scope="module")
def quantize(tmp_path_factory):
    """Quantizes once per recipe and source, in this process; gives the folder."""

    @functools.cache
    def make(name, source="tiny"):
        out = tmp_path_factory.mktemp("quantized") / "out"
        target = "vllm" if name in DEQUANTIZED else "transformers"
        small = recipe.adjusted(recipe.load_recipe(name), sequences=16, length=64)
        mojax.optimize(source, small, out, target=target, evaluate=False)
        return out

    return make


@pytest.fixture(scope="module")
def tokens():
    folder = mojax.load("tiny").checkpoint.folder
    return text.tokens(
        "builtin", folder, sequences=SEQUENCES, length=LENGTH, seed=0, purpose="evaluation", vocab=None
    ).ids


@pytest.fixture(scope="module")
def source(tokens):
    """Logits of the source."""
    return ours("tiny", tokens)


@pytest.fixture
def copy(quantize, tmp_path):
    """A copy of the NVFP4 folder for a test to damage."""
    return shutil.copytree(quantize("nvfp4"), tmp_path / "copy")


def agree(folder, tokens, source, answer):
    """Assert the same weights, and logits as near as two programs can be."""
    assert different(folder, answer) == []
    logits = ours(folder, tokens)
    own = kl(source, logits)
    assert own > 1e-4, "nothing was quantized"
    assert kl(logits, answer.logits) <= limit(folder, own)


@pytest.mark.parametrize("name", ["nvfp4", "fp8", "int8"])
def test_packed_and_decoded_are_as_far(name, quantize, tokens, source):
    """The two arithmetics differ by flipped codes, which is no bias: both are as far from the source."""
    decoded = kl(source, ours(quantize(name), tokens))
    packed = np.asarray(mojax.load(quantize(name))(tokens), np.float32).reshape(tokens.size, -1)
    assert kl(source, packed) == pytest.approx(decoded, rel=0.1)


# Without NF4, which has a dialect of its own, and rotated inputs, which this client ignores.
SHIPPED = [n for n in distinct() if n not in ("nf4", "int8_hadamard", "mxfp4_hadamard", "mxfp4_rotated")]


@pytest.mark.parametrize("name", SHIPPED)
def test_the_client_computes_what_mojax_computes(name, quantize, tokens, source):
    folder = quantize(name)
    agree(folder, tokens, source, ask(folder, tokens, **options(name)))


def test_negative_scales_are_the_same_in_the_client(quantize, tokens, source, tmp_path):
    """As those of int4_best."""
    path = tmp_path / "signed.yaml"
    path.write_text(json.dumps({"extends": "int4", "steps": [{"local_hessian": {"signed": True}}, "gptq"]}))
    folder = quantize(str(path))
    model = mojax.load(folder)
    assert any(
        (np.asarray(model.params[m + ".weight"].scales["inner"], np.float32) < 0).any() for m in model.schemes
    )
    agree(folder, tokens, source, ask(folder, tokens))


def written(tmp_path, *rules):
    """A recipe file; a rule is (match, weights, inputs)."""
    path = tmp_path / "own.yaml"
    said = [dict(zip(("match", "weights", "inputs"), rule, strict=True)) for rule in rules]
    path.write_text(json.dumps({"rules": said, "calibration": {"sequences": 16, "length": 64}}))
    return str(path)


def test_every_scheme_that_transformers_should_load_is_tested(quantize):
    claimed = {pair for pair, targets in LOADS.items() if "transformers" in targets}
    assert set(BEYOND) <= claimed
    tested = set(BEYOND)
    for name in set(SHIPPED) - DEQUANTIZED:
        schemes = mojax.plan(mojax.load("tiny"), name).schemes.values()
        tested |= {(kind(s.weights), kind(s.inputs)) for s in schemes}
    assert claimed == tested


@pytest.mark.parametrize("pair", BEYOND, ids=", inputs ".join)
def test_schemes_beyond_the_shipped_recipes(pair, quantize, tokens, source, tmp_path):
    folder = quantize(written(tmp_path, ("*", *BEYOND[pair])))
    agree(folder, tokens, source, ask(folder, tokens))


def test_two_schemes_and_a_kept_linear_in_one_model(quantize, tokens, source, tmp_path):
    kept = "model.layers.0.mlp.down_proj"
    path = written(
        tmp_path,
        ("*", {"format": "nvfp4"}, {"format": "nvfp4"}),
        ("*.self_attn.*", {"format": "fp8", "per": "channel"}, FP8_TOKEN),
        (f"{kept}.weight", "keep", "none"),
    )
    folder = quantize(path)
    schemes = mojax.load(folder).schemes
    assert kept not in schemes and len(schemes) == 27 and len(set(schemes.values())) == 2
    agree(folder, tokens, source, ask(folder, tokens))


def test_a_quantized_cache_is_the_same_in_the_client(quantize, tokens, source, tmp_path):
    path = tmp_path / "cached.yaml"
    path.write_text("extends: fp8\nrules:\n  - {match: '*', kv_cache: fp8}\n")
    folder = quantize(str(path))
    answer = ask(folder, tokens)
    agree(folder, tokens, source, answer)
    without = ours(quantize("fp8"), tokens)
    assert kl(without, answer.logits) > limit(folder, kl(source, ours(folder, tokens)))


@pytest.mark.parametrize("dtype", ["float16", "float32"])
def test_sources_of_other_dtypes_decode_to_the_clients_weights(dtype, quantize, tmp_path):
    """Random weights; the client runs its 4-bit and microscaling formats in bfloat16 only."""
    torch.manual_seed(0)
    config = transformers.LlamaConfig(
        vocab_size=64,
        hidden_size=128,
        intermediate_size=256,
        num_hidden_layers=1,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=64,
        initializer_range=0.05,
    )
    model = transformers.LlamaForCausalLM(config).to(getattr(torch, dtype))
    model.save_pretrained(tmp_path / "source")
    calibration = tmp_path / "calibration.npz"
    np.savez(calibration, tokens=np.arange(64, dtype=np.int32).reshape(4, 16))
    for name in ("fp8", "int8", "int4", "nvfp4", "mxfp4"):
        out = tmp_path / name
        small = recipe.adjusted(recipe.load_recipe(name), sequences=4, length=16)
        facts = {"calibration_text": str(calibration), "evaluate": False}
        mojax.optimize(tmp_path / "source", small, out, **facts)
        run_in = "bfloat16" if name in BFLOAT16_ONLY else dtype
        answer = ask(out, np.arange(8, dtype=np.int32)[None], dtype=run_in)
        assert np.isfinite(answer.logits).all()
        encoded = mojax.load(out)
        assert len(encoded.schemes) == 7 and encoded.dtype == dtype
        for module in encoded.schemes:
            q = encoded.params[module + ".weight"]
            expected = np.asarray(q.format.decode(q)).astype(jnp.dtype(run_in)).astype(np.float32)
            assert same_bits(expected, answer.weights[module]), f"{name} {module}"


def edit(folder, name, change):
    """Change one tensor of a folder."""
    entry = open_checkpoint(folder).entries[name]
    tensors = safetensors_torch.load_file(entry.file)
    tensors[name] = torch.from_numpy(change(tensors[name].numpy()))
    safetensors_torch.save_file(tensors, entry.file, metadata={"format": "pt"})


@pytest.mark.parametrize(
    ("tensor", "change"),
    [
        ("weight_packed", lambda v: (v << 4) | (v >> 4)),  # the other nibble order
        ("weight_global_scale", lambda v: 1 / v),  # a multiplier where a divisor belongs
        ("weight_packed", lambda v: np.where(np.arange(v.size).reshape(v.shape) == 77, v ^ 1, v)),  # one code
    ],
    ids=["nibbles", "reciprocal", "one code"],
)
def test_wrong_weights_are_noticed(tensor, change, quantize, copy, tokens):
    """The comparison of weights can fail: the client reads a damaged copy, mojax the folder."""
    module = "model.layers.1.mlp.up_proj"
    edit(copy, f"{module}.{tensor}", change)
    assert different(quantize("nvfp4"), ask(copy, tokens[:1, :8])) == [module]


@pytest.mark.parametrize("damage", ["weights only", "one input scale"])
def test_wrong_inputs_are_noticed(damage, quantize, copy, tokens, source):
    """The comparison of logits can fail while the weights are right."""
    if damage == "weights only":
        path = copy / "config.json"
        config = json.loads(path.read_text())
        for group in config["quantization_config"]["config_groups"].values():
            del group["input_activations"]
        path.write_text(json.dumps(config))
    else:
        edit(copy, "model.layers.0.mlp.down_proj.input_global_scale", lambda v: 16 * v)
    folder = quantize("nvfp4")
    answer = ask(copy, tokens)
    assert different(folder, answer) == []
    logits = ours(folder, tokens)
    assert kl(logits, answer.logits) > limit(folder, kl(source, logits))
