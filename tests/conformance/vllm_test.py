"""A real vLLM on a CPU loads what mojax writes, in both dialects, and computes the same.

Weights alone: KL(mojax || vLLM), mean over tokens, is rounding noise. Quantized inputs amplify that noise: an
input one unit away gets another code, and so do the inputs behind it, until vLLM is as far from mojax as is
mojax without input quantization. Hence two comparisons: of whole models, vLLM's distance to the source with
ours; in float16 with a single quantized linear, where little is amplified, the logits themselves.

Mixtures of experts: the same of whole models, by the median token, since rounding sends some tokens to other
experts. The wheel has no quantized kernel for experts, so their arithmetic is that of
`tests/clients/vllm_experts.py`; config, targets, names of experts and their loading are vLLM's.
"""

import dataclasses
import functools
import itertools
import json
import os
import subprocess
from pathlib import Path
from typing import Any

import jax.numpy as jnp
import numpy as np
import pytest
from moe_models import tiny_mixtral, tiny_qwen3_moe
from shipped import distinct

import mojax
from mojax import evaluation, recipe
from mojax.checkpoint import open_checkpoint, write_shard
from mojax.formats.base import QTensor

pytestmark = pytest.mark.clients

TESTS = Path(__file__).parents[1]
GOLDEN = TESTS / "golden"
WHOLE = {
    # w4a8_awq runs on Hopper alone there; int4_best has negative scales
    "compressed-tensors": (*(n for n in distinct() if n not in ("nf4", "w4a8_awq")), "int4_best"),
    "modelopt": ("fp8", "fp8_dynamic", "mxfp8", "nvfp4", "nvfp4_weight_only"),
}
ONE = {
    "compressed-tensors": ("fp8", "fp8_block", "fp8_dynamic", "int8", "mxfp4", "nvfp4"),
    "modelopt": ("fp8", "fp8_dynamic", "nvfp4"),
}
EXPERTS = {
    "compressed-tensors": (
        "fp8",
        "fp8_block",
        "fp8_dynamic",
        "int4",
        "int4_asymmetric",
        "mxfp4",
        "mxfp8",
        "nvfp4",
    ),
    "modelopt": ("fp8", "nvfp4", "nvfp4_weight_only"),
}
FAMILIES = ("mixtral", "qwen3_moe")
OTHERS = ("*.layers.0.*", "*.self_attn.*", "*.gate_proj.*", "*.up_proj.*")  # all but
LINEAR = "model.layers.1.mlp.down_proj"
WEIGHTS_ONLY = 1e-3  # nats
SHARE = 0.35  # of the scheme's own KL
AS_FAR = 0.25  # relative


def pairs(table):
    return [(dialect, name) for dialect, names in table.items() for name in names]


def half(folder):
    """The golden llama in float16."""
    source = open_checkpoint(GOLDEN / "models" / "llama")
    folder.mkdir()
    config = {k: v for k, v in source.config.items() if k != "torch_dtype"} | {"dtype": "float16"}
    (folder / "config.json").write_text(json.dumps(config))
    write_shard(folder / "model.safetensors", {n: np.asarray(source[n]).astype(np.float16) for n in source})
    return folder


@dataclasses.dataclass(frozen=True)
class Bench:
    """Sources and quantized folders by (dialect, recipe), and what vLLM said, `<folder>.npz`."""

    tokens: np.ndarray
    sources: dict[str, Path]
    folders: dict[tuple[str, str, str], Path]
    said: str

    def answer(self, key):
        """Log-probabilities `[sequences, length - 1, vocabulary]`, generated tokens, quantized modules."""
        out = self.folders[key].with_suffix(".npz")
        if not out.exists():
            pytest.fail(self.said)
        found = np.load(out)
        return found["logprobs"], found["generated"], [entry.split("=")[0] for entry in found["kernels"]]

    @functools.cached_property
    def of_sources(self):
        """Our logits of the sources, by kind."""
        return {kind: logits(mojax.load(folder), self.tokens) for kind, folder in self.sources.items()}


def quantized(tmp, sources, tables):
    """Every folder of `tables`, by kind, made in this process."""
    calibration = tmp / "calibration.npz"
    np.savez(calibration, tokens=np.load(GOLDEN / "calib.npz")["calib_ids"])
    folders = {}
    for kind, table in tables.items():
        for dialect, name in pairs(table):
            keep = OTHERS if kind == "one" else ()
            small = recipe.adjusted(recipe.load_recipe(name), keep=keep, sequences=16, length=64)
            out = tmp / f"{kind}-{dialect}-{name}"
            mojax.optimize(
                sources[kind], small, out, format=dialect, calibration_text=str(calibration), evaluate=False
            )
            folders[kind, dialect, name] = out
    return folders


@pytest.fixture(scope="module")
def bench(tmp_path_factory):
    """All folders of dense models answered by one vLLM process."""
    tmp = tmp_path_factory.mktemp("vllm")
    sources = {"whole": GOLDEN / "models" / "llama", "one": half(tmp / "half")}
    return asked(tmp, sources, {"whole": WHOLE, "one": ONE})


@pytest.fixture(scope="module")
def mixtures(tmp_path_factory):
    """All folders of mixtures of experts answered by one vLLM process."""
    tmp = tmp_path_factory.mktemp("vllm_experts")
    shape: dict[str, Any] = {"hidden_size": 256, "num_key_value_heads": 4, "head_dim": 64, "vocab_size": 512}
    mixtral = tiny_mixtral(tmp / "mixtral", num_local_experts=4, intermediate_size=256, **shape)
    qwen3 = tiny_qwen3_moe(tmp / "qwen3_moe", num_experts=4, moe_intermediate_size=256, **shape)
    sources = {"mixtral": mixtral, "qwen3_moe": qwen3}
    return asked(tmp, sources, dict.fromkeys(sources, EXPERTS))


def asked(tmp, sources, tables):
    """A Bench of the folders of `tables`, or a skip where there is no vLLM."""
    python = os.environ.get("MOJAX_VLLM_PYTHON")
    if not python:
        pytest.skip("MOJAX_VLLM_PYTHON is not set: the python of an environment of tests/clients/make_env.sh")
    folders = quantized(tmp, sources, tables)
    tokens = np.random.default_rng(0).integers(3, 512, (8, 128)).astype(np.int32)
    np.savez(tmp / "tokens.npz", tokens=tokens)
    arguments = [str(p) for f in folders.values() for p in (f, tmp / "tokens.npz", f.with_suffix(".npz"))]
    command = [python, str(TESTS / "clients" / "vllm_answer.py"), *arguments]
    done = subprocess.run(command, capture_output=True, text=True, timeout=1800)
    return Bench(tokens, sources, folders, done.stdout + done.stderr[-4000:])


def logits(model, tokens):
    """float32 `[sequences, length - 1, vocabulary]`, where vLLM's log-probabilities are."""
    return np.asarray(model(tokens))[:, :-1]


def kl(p, q, over=np.mean):
    """KL(p || q) of logits or log-probabilities, mean (or median) over tokens, nats."""
    p, q = (jnp.asarray(x).reshape(-1, x.shape[-1]) for x in (p, q))
    return float(over(evaluation.compare(p, q, np.zeros(len(p), np.int32))[0]))


def without_inputs(model):
    """The model with its weights as they are and inputs in full precision."""
    schemes = {module: scheme._replace(inputs=None) for module, scheme in model.schemes.items()}
    return dataclasses.replace(model, schemes=schemes)


def as_served(model):
    """The model as vLLM runs it: FP8 weights that it fuses are encoded again, under their largest scale."""
    params = {name: model.params[name] for name in model.params}
    for block, names in itertools.product(model.blocks, model.family.FUSED):
        group = [f"{block.prefix}{name}.weight" for name in names]
        leaves = [params[n] for n in group if isinstance(params[n], QTensor)]
        if not leaves or leaves[0].format.label != "fp8":
            continue
        outer = max(float(q.scales["outer"]) for q in leaves)
        for name, q in zip(group, leaves, strict=True):
            params[name] = dataclasses.replace(
                q.format.encode_as(q.format.decode(q), {"outer": jnp.float32(outer)}), dtype=q.dtype
            )
    return dataclasses.replace(model, params=params)


@pytest.mark.parametrize(("dialect", "name"), pairs(WHOLE))
def test_vllm_is_as_far_from_the_source_as_mojax(dialect, name, bench):
    found, generated, modules = bench.answer(("whole", dialect, name))
    assert generated.shape == (8, 8) and generated.min() >= 0 and generated.max() < 512
    model = as_served(mojax.load(bench.folders["whole", dialect, name]))
    fused = {"q_proj": "qkv_proj", "k_proj": "qkv_proj", "v_proj": "qkv_proj", "gate_proj": "up_proj"}
    ours = {(before, fused.get(last, last)) for before, _, last in (m.rpartition(".") for m in model.schemes)}
    assert len(modules) == len(ours) == (4 if "mlp_only" in name else 8)  # nothing ran unquantized
    source, ours = bench.of_sources["whole"], logits(model, bench.tokens)
    own = kl(source, ours)
    far = abs(kl(source, found) / own - 1)
    if not any(scheme.inputs for scheme in model.schemes.values()):
        assert far <= 0.01 and kl(ours, found) <= WEIGHTS_ONLY < own
        return
    assert far <= AS_FAR and kl(ours, found) < own
    assert abs(kl(source, logits(without_inputs(model), bench.tokens)) / own - 1) > AS_FAR  # it could fail


@pytest.mark.parametrize(("dialect", "name"), pairs(ONE))
def test_vllm_computes_a_quantized_linear_as_mojax(dialect, name, bench):
    found, _, modules = bench.answer(("one", dialect, name))
    assert modules == [LINEAR]
    model = mojax.load(bench.folders["one", dialect, name])
    assert list(model.schemes) == [LINEAR]
    ours = logits(model, bench.tokens)
    own = kl(bench.of_sources["one"], ours)
    assert kl(ours, found) <= SHARE * own
    assert kl(logits(without_inputs(model), bench.tokens), found) > SHARE * own  # it could fail


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize(("dialect", "name"), pairs(EXPERTS))
def test_vllm_loads_experts_as_mojax_writes_them(dialect, name, family, mixtures):
    found, generated, modules = mixtures.answer((family, dialect, name))
    assert sorted(m.rpartition(".")[2].replace("routed_", "") for m in modules) == [
        *["experts"] * 2,
        *["o_proj"] * 2,
        *["qkv_proj"] * 2,
    ]
    assert generated.min() >= 0 and generated.max() < 512
    model = mojax.load(mixtures.folders[family, dialect, name])
    source, ours = mixtures.of_sources[family], logits(model, mixtures.tokens)
    own = kl(source, ours, np.median)
    if not any(scheme.inputs for scheme in model.schemes.values()):
        assert kl(ours, found, np.median) <= WEIGHTS_ONLY / 2 < own / 20
        return
    assert abs(kl(source, found, np.median) / own - 1) <= AS_FAR and kl(ours, found, np.median) < own
