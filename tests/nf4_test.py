"""NF4: bitsandbytes' codes, doubly quantized scales, rounding by other algorithms, and the dialect."""

import hashlib
import json
from pathlib import Path

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest

import mojax
from mojax import cli, verify
from mojax.converters import bitsandbytes, compressed_tensors, modelopt
from mojax.errors import InputError
from mojax.formats import nf4, nvfp4
from mojax.formats.base import Scheme
from mojax.kernels.matmul import matmul
from mojax.model import decode, load
from mojax.rounding import feedback, objective
from mojax.sources import as_source

BF16 = np.dtype(ml_dtypes.bfloat16)
NF4 = nf4.FORMAT()
DOUBLE = nf4.FORMAT(double=True)
TINY = Path(mojax.__file__).parent / "data" / "tiny"


def weight():
    """bfloat16 [96, 512] with a row of zeros, a constant block, a small row and an outlier."""
    w = np.random.default_rng(0).standard_normal((96, 512)).astype(np.float32)
    w[0], w[1, :64], w[3, 5] = 0, 0.75, 40
    w[2] *= 1e-3
    return w.astype(BF16)


def numpy(q):
    return jax.tree.map(np.asarray, q)


def digest(a):
    return hashlib.sha256(np.ascontiguousarray(a).tobytes()).hexdigest()[:16]


def test_the_bytes_of_bitsandbytes():
    """What `quantize_4bit(w, blocksize=64, quant_type="nf4")` of bitsandbytes 0.50.2 gives on a CPU."""
    q = numpy(NF4.encode(weight()))
    written = bitsandbytes.write("m", q, Scheme(NF4), None)
    assert digest(written["m.weight"]) == "69fae867a0eed97d"
    assert digest(written["m.weight.absmax"]) == "3bfe1f59708e48b2"
    assert digest(np.asarray(NF4.decode(q)).astype(BF16)) == "e7e90fe921c3d536"


def test_the_book_is_the_published_one():
    """QLoRA's construction: quantiles of a normal distribution, eight positive and seven negative ones."""
    from statistics import NormalDist

    offset = 0.9677083
    right = [NormalDist().inv_cdf(p) for p in np.linspace(offset, 0.5, 9)[:-1]]
    left = [-NormalDist().inv_cdf(p) for p in np.linspace(offset, 0.5, 8)[:-1]]
    book = np.sort([*right, 0.0, *left]) / max(right)
    np.testing.assert_allclose(nf4.BOOK, book, atol=1e-6)


def test_codes_are_the_nearest_numbers():
    w = weight().astype(np.float32)
    q = numpy(NF4.encode(w))
    value = np.asarray(NF4.decode(q)).reshape(-1, 64)
    exact = w.astype(np.float64).reshape(-1, 64)
    possible = np.abs(exact)[..., None].max(1, keepdims=True) * nf4.BOOK.astype(np.float64)
    best = np.abs(exact[..., None] - possible).min(-1)
    assert (np.abs(value - exact) <= best + 1e-6 * np.abs(exact)).all()


def test_doubly_quantized_scales():
    w = weight()
    q, plain = numpy(DOUBLE.encode(w)), numpy(NF4.encode(w))
    assert q.scales["inner"].dtype == np.uint8 and q.scales["second"].shape == (96, 1)
    a, exact = np.asarray(DOUBLE.step(q.scales)), plain.scales["inner"]
    assert (a >= 0).all() and not a[0].any()
    spread = np.abs(exact - exact.mean(1, keepdims=True)).max(1, keepdims=True)
    assert (np.abs(a - exact) <= 0.008 * spread + 1e-6 * exact).all()  # half the widest gap of the map
    error = [np.linalg.norm((np.asarray(x.format.decode(x)) - w.astype(np.float32))[4:]) for x in (q, plain)]
    assert error[0] < 1.005 * error[1] and error[0] != error[1]
    wide = np.random.default_rng(1).standard_normal((4, 64 * 300)).astype(np.float32)
    bits = [8 * f.encode(wide).nbytes / wide.size for f in (DOUBLE, NF4)]
    assert bits == pytest.approx([4 + 8 / 64 + 4 * 32 / (64 * 300), 4.5], rel=1e-6)
    large = np.random.default_rng(1).standard_normal((2, 64 * 512)).astype(np.float32)
    assert 8 * DOUBLE.encode(large).nbytes / large.size == pytest.approx(4.129, abs=1e-3)


@pytest.mark.parametrize("format", [NF4, DOUBLE], ids=lambda f: f.label)
def test_a_part_of_a_weight_has_the_bytes_it_has_in_the_whole(format):
    whole, part = numpy(format.encode(weight())), numpy(format.encode(weight()[32:64]))
    assert whole.codes[32:64].tobytes() == part.codes.tobytes()
    for level, scale in whole.scales.items():
        assert scale[32:64].tobytes() == part.scales[level].tobytes()


@pytest.mark.parametrize("format", [NF4, DOUBLE], ids=lambda f: f.label)
def test_the_grid_that_other_algorithms_round_to(format):
    w = weight().astype(np.float32)
    q = numpy(format.encode(w))
    step = np.asarray(format.step(q.scales))
    y = w.reshape(96, 8, 64) / np.where(step == 0, 1, step)[..., None]
    value = np.asarray(format.element(y)) * step[..., None]
    np.testing.assert_array_equal(value.reshape(96, 512), np.asarray(format.decode(q)))
    same = format.rescaled(q.scales, jnp.float32(1))
    assert np.asarray(same).tobytes() == q.scales["inner"].tobytes()
    found = np.asarray(format.candidates(q.scales, 0.8, 1.2, 5))
    assert found.shape == (96, 8, 5) and found.dtype == q.scales["inner"].dtype
    assert found[..., 0].tobytes() == q.scales["inner"].tobytes()
    steps = np.stack([np.asarray(format.step({**q.scales, "inner": found[..., i]})) for i in range(5)], -1)
    low, now, high = steps[4:, :, 1], steps[4:, :, 0], steps[4:, :, 4]
    assert (low <= now).all() and (high >= now).all() and (low < now).mean() > 0.9
    assert (high > now).mean() > 0.8  # doubly quantized, a row's largest scale is the largest of all


def test_error_feedback_rounds_to_the_book():
    random = np.random.default_rng(3)
    x = random.standard_normal((512, 256)) @ random.standard_normal((256, 256)) / 16
    w = random.standard_normal((64, 256)).astype(np.float32)
    h = objective.damped(jnp.asarray(x.T @ x, jnp.float32))
    scales = NF4.fit(jnp.asarray(w))
    found = np.asarray(feedback.solve(NF4, jnp.asarray(w), scales, h))
    elements = found.reshape(64, 4, 64) / np.asarray(scales["inner"])[..., None]
    assert np.abs(elements[..., None] - nf4.BOOK).min(-1).max() < 1e-6
    nearest = np.asarray(NF4.decode(NF4.encode(w)))
    cost = [np.sum(((q - w) @ x.T.astype(np.float32)) ** 2) for q in (found, nearest)]
    assert cost[0] < 0.6 * cost[1]


@pytest.mark.parametrize("format", [NF4, DOUBLE], ids=lambda f: f.label)
def test_a_function_runs_packed(format):
    w = jnp.asarray(weight())
    x = jnp.asarray(np.random.default_rng(2).standard_normal((3, 512)).astype(BF16))
    model = mojax.from_function(lambda p, x: x @ p["w"].T, {"w": w}, x)
    rule = {"match": "*", "weights": {"format": "nf4", "double": format.double}, "inputs": "none"}
    packed = mojax.quantize(model, {"rules": [rule], "steps": ["rtn"]})
    q = packed.params["w"]
    assert q.format.double == format.double and q.nbytes < 0.3 * w.nbytes
    expected = np.asarray(x, np.float64) @ np.asarray(format.decode(q)).astype(BF16).astype(np.float64).T
    np.testing.assert_allclose(np.asarray(packed(x), np.float64), expected, rtol=0.01, atol=0.1)
    np.testing.assert_allclose(np.asarray(matmul(x, q, dtype=jnp.float32)), expected, rtol=1e-5, atol=1e-4)


@pytest.mark.parametrize(
    ("options", "message"),
    [({"group": 7}, "nf4 group: 7 is not a positive even"), ({"double": 1}, "nf4 double: 1 is neither")],
)
def test_impossible_options_are_said(options, message):
    with pytest.raises(InputError, match=message):
        nf4.FORMAT(**options)


# ---------------------------------------------------------------- the dialect


def test_who_cannot_hold_it():
    for dialect in (compressed_tensors, modelopt):
        for target in ("vllm", "transformers"):
            said = dialect.check(Scheme(NF4), target)
            assert said and ("no code books" in said or "does not know it" in said)
    assert bitsandbytes.check(Scheme(NF4), "transformers", BF16) is None
    assert "--target=transformers" in bitsandbytes.check(Scheme(NF4), "vllm")
    assert "run across rows" in bitsandbytes.check(Scheme(DOUBLE), "transformers")
    assert "no Linear" in bitsandbytes.check(Scheme(NF4), "transformers", BF16, experts=True)
    assert "no loader" in bitsandbytes.check(Scheme(nvfp4.FORMAT()), "transformers")
    with pytest.raises(InputError, match="no form"):
        bitsandbytes.config({"m": Scheme(nvfp4.FORMAT())}, [], None)


def test_nested_scales_are_read_exactly():
    random = np.random.default_rng(0)
    q = numpy(NF4.encode(weight()))
    tensors = dict(bitsandbytes.write("m", q, Scheme(NF4), None))
    codes = random.integers(0, 256, 768).astype(np.uint8)
    second = random.random(3).astype(np.float32)
    state = json.loads(tensors[f"m.weight{bitsandbytes.STATE}"].tobytes())
    state |= {"nested_blocksize": 256, "nested_dtype": "float32", "nested_offset": 2.607398271560669}
    book = np.sort(random.standard_normal(256)).astype(np.float32)
    tensors |= {
        "m.weight.absmax": codes,
        "m.weight.nested_absmax": second,
        "m.weight.nested_quant_map": book,
        f"m.weight{bitsandbytes.STATE}": np.frombuffer(json.dumps(state).encode(), np.uint8),
    }
    read, _ = bitsandbytes.read("m", tensors.__getitem__, Scheme(NF4), BF16)
    assert read.codes.tobytes() == q.codes.tobytes()
    expected = [book[c] * second[i // 256] + np.float32(2.607398271560669) for i, c in enumerate(codes)]
    assert read.scales["inner"].tobytes() == np.array(expected, np.float32).reshape(96, 8).tobytes()


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"quant_type": "fp4"}, "only nf4 in blocks of 64"),
        ({"blocksize": 128}, "only nf4 in blocks of 64"),
        ({"shape": [96]}, "is not a description of a matrix"),
        ({"shape": [95, 512]}, "has shape"),
    ],
)
def test_other_descriptions_are_refused(change, message):
    tensors = dict(bitsandbytes.write("m", numpy(NF4.encode(weight())), Scheme(NF4), None))
    name = f"m.weight{bitsandbytes.STATE}"
    state = json.loads(tensors[name].tobytes()) | change
    tensors[name] = np.frombuffer(json.dumps(state).encode(), np.uint8)
    with pytest.raises(InputError, match=message):
        bitsandbytes.read("m", tensors.__getitem__, Scheme(NF4), BF16)


def test_a_checkpoint_in_nf4(tmp_path, capsys):
    """Written, verified, evaluated packed; then it is a source itself."""
    line = ["quantize", "--model=tiny", "--recipe=nf4", "--format=bitsandbytes", "--target=transformers"]
    few = ["--sequences=2", "--length=32"]
    assert cli.run([*line, f"--out={tmp_path / 'out'}", *few]) == 0
    out = load(tmp_path / "out")
    section = json.loads((tmp_path / "out" / "config.json").read_text())["quantization_config"]
    assert section["quant_method"] == "bitsandbytes" and section["llm_int8_skip_modules"] == ["lm_head"]
    assert len(out.schemes) == 28
    report = json.loads((tmp_path / "out" / "report.json").read_text())
    assert 0 < report["kl_mean"] < 0.05
    assert 0.08 < max(verify.verify(tmp_path / "out", TINY).errors.values()) < 0.1
    tokens = np.arange(32, dtype=np.int32).reshape(1, 32) * 31 % 4096
    whole = as_source(out)
    np.testing.assert_allclose(np.asarray(out(tokens)), np.asarray(whole(tokens)), atol=0.15)
    name = "model.layers.1.mlp.up_proj.weight"
    assert whole.params[name].tobytes() == np.asarray(decode(out.params[name])).tobytes()
    again = ["quantize", f"--model={tmp_path / 'out'}", "--recipe=int8", "--noevaluate"]
    assert cli.run([*again, f"--out={tmp_path / 'int8'}"]) == 0
    assert not [n for n in load(tmp_path / "int8").checkpoint if "absmax" in n or "quant_" in n]
    assert cli.run(["plan", "--model=tiny", "--recipe=nf4"]) == 2
    assert "no code books" in capsys.readouterr().err
