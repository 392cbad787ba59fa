"""compressed-tensors and transformers read the experts that mojax writes: the same weights, bit by bit.

transformers keeps the experts of a layer in two tensors, decodes them while loading, and never quantizes
their inputs. It cannot load every scheme; what the dialect's table says of that is tested here as well.
Rounding sends one token in a hundred to other experts, where KL is a thousand times larger: medians are
compared.
"""

import dataclasses
import functools
import json
from typing import Any

import numpy as np
import pytest
from moe_models import tiny_mixtral, tiny_qwen3_moe
from shipped import distinct

import mojax
from mojax import recipe
from mojax.checkpoint import open_checkpoint
from mojax.converters.compressed_tensors.schemes import check
from mojax.experts import starred
from mojax.kernels.base import decoded

torch = pytest.importorskip("torch")
transformers = pytest.importorskip("transformers")
compressors = pytest.importorskip("compressed_tensors.compressors")
quantization = pytest.importorskip("compressed_tensors.quantization")

COUNT = 4
SHAPE: dict[str, Any] = {"hidden_size": 256, "num_key_value_heads": 4, "head_dim": 64, "vocab_size": 512}
FAMILIES = ("qwen3_moe", "mixtral")
WEIGHTS_ONLY, SHARE = 1e-4, 0.2  # nats; of the scheme's own KL, where inputs are quantized
NOT_READ = {"fp8_block", "int4_asymmetric", "int8", "mxfp8"}  # an error
WRONG = {"nvfp4", "nvfp4_weight_only"}  # no error

# NF4 has a dialect of its own; the others give experts the scheme of a recipe that is here.
OTHERS = {"nf4", "int8_hadamard", "mxfp4_hadamard", "mxfp4_rotated", "nvfp4_mlp_only"}
OTHERS |= {"int8_static", "int8_static_rotated"}
CASES = [n for n in distinct() if n not in OTHERS]

pytestmark = pytest.mark.filterwarnings("ignore:You passed `quantization_config`:UserWarning")


@pytest.fixture(scope="module")
def source(tmp_path_factory):
    @functools.cache
    def make(family):
        folder = tmp_path_factory.mktemp(family) / "source"
        if family == "mixtral":
            return tiny_mixtral(folder, num_local_experts=COUNT, intermediate_size=256, **SHAPE)
        return tiny_qwen3_moe(folder, num_experts=COUNT, moe_intermediate_size=256, **SHAPE)

    return make


@pytest.fixture(scope="module")
def quantize(tmp_path_factory, source):
    """Quantizes once per recipe and family; gives the folder."""
    calibration = tmp_path_factory.mktemp("calibration") / "tokens.npz"
    np.savez(calibration, tokens=np.random.default_rng(1).integers(3, 512, (8, 32)).astype(np.int32))

    @functools.cache
    def make(family, name):
        out = tmp_path_factory.mktemp("quantized") / "out"
        said = recipe.adjusted(recipe.load_recipe(name), sequences=8, length=32)
        mojax.optimize(source(family), said, out, calibration_text=str(calibration), evaluate=False)
        return out

    return make


def same_bits(a, b):
    return np.array_equal(
        np.asarray(a, np.float32).view(np.uint32), np.asarray(b, np.float32).view(np.uint32)
    )


def weights(folder):
    """Decoded weights by module, float32."""
    model = mojax.load(folder)
    found = {m: decoded(model.params[m + ".weight"]) for m in model.schemes}
    return {m: np.asarray(w, np.float32) for m, w in found.items()}


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("name", CASES)
def test_compressed_tensors_decodes_every_expert_to_our_weights(name, family, quantize):
    folder = quantize(family, name)
    config = json.loads((folder / "config.json").read_text())["quantization_config"]
    read = quantization.QuantizationConfig.model_validate(config)
    (scheme,) = read.config_groups.values()
    compressor = compressors.BaseCompressor.get_value_from_registry(scheme.format)
    files = open_checkpoint(folder)
    count = 0
    for module, stack in weights(folder).items():
        for i, ours in enumerate(stack if starred(module) else ()):
            prefix = module.replace("*", str(i)) + "."
            parts = {n.removeprefix(prefix): files[n] for n in files if n.startswith(prefix)}
            theirs = compressor.decompress({n: tensor(a) for n, a in parts.items()}, scheme)["weight"]
            assert same_bits(ours, theirs.to(torch.bfloat16).float().numpy()), prefix
            count += 1
    assert count == 2 * 3 * COUNT


def tensor(a):
    """A torch tensor of a numpy array, also of ml_dtypes."""
    views = {"bfloat16": (np.int16, torch.bfloat16), "float8_e4m3fn": (np.uint8, torch.float8_e4m3fn)}
    if a.dtype.name not in views:
        return torch.from_numpy(np.array(a))
    whole, dtype = views[a.dtype.name]
    return torch.from_numpy(np.array(a).reshape(a.shape).view(whole)).view(dtype)


class Answer:
    """What transformers made of a folder: expert weights by our module, and logits `[tokens, vocabulary]`."""

    def __init__(self, folder, tokens):
        model = transformers.AutoModelForCausalLM.from_pretrained(folder, attn_implementation="eager")
        with torch.no_grad():
            logits = model(torch.from_numpy(tokens).long()).logits
        self.logits = logits.float().numpy().reshape(tokens.size, -1)
        self.state = model.state_dict()

    def weight(self, module):
        """Of a starred module the stack; `gate_up_proj` holds gate (w1) before up (w3)."""
        if not starred(module):
            return self.state[module + ".weight"].float().numpy()
        layer, part = module.replace("block_sparse_moe", "mlp").split(".*.")
        if part in ("down_proj", "w2"):
            return self.state[layer + ".down_proj"].float().numpy()
        both = self.state[layer + ".gate_up_proj"].float().numpy()
        half = both.shape[1] // 2
        return both[:, :half] if part in ("gate_proj", "w1") else both[:, half:]


def kl(p, q):
    """KL(p || q) of each token."""
    p, q = (x.astype(np.float64) - x.max(-1, keepdims=True) for x in (p, q))
    p, q = (x - np.log(np.exp(x).sum(-1, keepdims=True)) for x in (p, q))
    return (np.exp(p) * (p - q)).sum(-1)


def logits(model, tokens):
    """Rounded to the dtype of the client's."""
    found = np.asarray(model(tokens)).astype(model.dtype).astype(np.float32)
    return found.reshape(tokens.size, -1)


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("name", [n for n in CASES if n not in NOT_READ | WRONG])
def test_transformers_computes_what_mojax_computes(name, family, quantize, source):
    folder, tokens = (
        quantize(family, name),
        np.random.default_rng(0).integers(3, 512, (4, 64)).astype(np.int32),
    )
    answer, found = Answer(folder, tokens), weights(folder)
    assert [m for m, w in found.items() if not same_bits(w, answer.weight(m))] == []
    model = mojax.dequantize(mojax.load(folder))
    quiet = {m: s._replace(inputs=None) if starred(m) else s for m, s in model.schemes.items()}
    ours = logits(dataclasses.replace(model, schemes=quiet), tokens)
    own = float(np.median(kl(logits(mojax.load(source(family)), tokens), ours)))
    limit = SHARE * own if any(s.inputs for s in quiet.values()) else WEIGHTS_ONLY
    assert np.median(kl(ours, answer.logits)) <= limit < own


@pytest.mark.parametrize("name", sorted(NOT_READ | WRONG))
def test_what_transformers_cannot_load_is_refused(name, quantize, source):
    """When a release reads these experts, this test fails and the table can be relaxed."""
    with pytest.raises(mojax.PlanError, match="transformers cannot load"):
        mojax.plan(mojax.load(source("qwen3_moe")), name, target="transformers")
    folder, tokens = quantize("qwen3_moe", name), np.full((1, 8), 5, np.int32)
    if name in NOT_READ:
        with pytest.raises(RuntimeError, match="conversion of the weights"):
            Answer(folder, tokens)
        return
    answer, module = Answer(folder, tokens), "model.layers.0.mlp.experts.*.up_proj"
    ours = weights(folder)
    assert same_bits(
        ours["model.layers.0.self_attn.q_proj"], answer.weight("model.layers.0.self_attn.q_proj")
    )
    assert np.abs(answer.weight(module)).max() > 100 * np.abs(ours[module]).max()  # outer scales are missing


def test_the_table_of_experts_is_what_is_tested(source):
    """Every shipped recipe is in one of the lists above."""
    for name in CASES:
        plan = mojax.plan(mojax.load(source("mixtral")), name)
        scheme = plan.schemes["model.layers.0.block_sparse_moe.experts.*.w1"]
        refused = check(scheme, "transformers", np.dtype(plan.rows[0].dtype), experts=True)
        assert (refused is not None) is (name in NOT_READ | WRONG), name
