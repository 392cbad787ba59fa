"""Encoded tensors and configs against what llm-compressor and ModelOpt wrote for the same weights."""

import dataclasses
import functools
import hashlib
import json
from pathlib import Path

import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from mojax import find
from mojax.cache import Cache
from mojax.checkpoint import open_checkpoint
from mojax.converters import base, bitsandbytes, compressed_tensors, hf_fp8, modelopt
from mojax.converters.compressed_tensors import schemes as ct_schemes
from mojax.converters.modelopt import schemes as mo_schemes
from mojax.errors import InputError
from mojax.formats import fp8, int4, int8, mxfp4, mxfp8, nf4, nvfp4
from mojax.formats.base import Scheme

GOLDEN = Path(__file__).parents[1] / "golden"
BF16 = np.dtype(ml_dtypes.bfloat16)
DTYPES = {
    "BF16": BF16,
    "F32": np.dtype(np.float32),
    "F8_E4M3": np.dtype(ml_dtypes.float8_e4m3fn),
    "U8": np.dtype(np.uint8),
    "I8": np.dtype(np.int8),
    "I32": np.dtype(np.int32),
    "I64": np.dtype(np.int64),
}
LINEARS = [
    *(f"self_attn.{n}_proj" for n in "qkvo"),
    *(f"mlp.{n}_proj" for n in ("gate", "up", "down")),
]
MODULES = [f"model.layers.{i}.{n}" for i in range(2) for n in LINEARS]
ATTENTIONS = [f"model.layers.{i}.self_attn" for i in range(2)]
SHARED = [("q_proj", "k_proj", "v_proj"), ("gate_proj", "up_proj")]


def ct(format, **options):
    return format.FORMAT(arithmetic="checkpoint", **options)


def mo(format, **options):
    return format.FORMAT(arithmetic="float32", **options)


CT = {
    "FP8": Scheme(ct(fp8), ct(fp8)),
    "FP8_KV": Scheme(ct(fp8), ct(fp8)),
    "FP8_BLOCK": Scheme(ct(fp8, per="block"), ct(fp8, per="block")),
    "FP8_CHANNEL_STATIC": Scheme(ct(fp8, per="channel"), ct(fp8)),
    "FP8_DYNAMIC": Scheme(ct(fp8, per="channel"), ct(fp8, per="token")),
    "FP8_DYNAMIC_KV": Scheme(ct(fp8, per="channel"), ct(fp8, per="token")),
    "FP8_W8A16": Scheme(ct(fp8, per="channel")),
    "MXFP4": Scheme(ct(mxfp4), ct(mxfp4)),
    "MXFP4A16": Scheme(ct(mxfp4)),
    "MXFP8": Scheme(ct(mxfp8), ct(mxfp8)),
    "MXFP8A16": Scheme(ct(mxfp8)),
    "NVFP4": Scheme(ct(nvfp4), ct(nvfp4)),
    "NVFP4_KV": Scheme(ct(nvfp4), ct(nvfp4)),
    "NVFP4A16": Scheme(ct(nvfp4)),
    "W4A16": Scheme(ct(int4)),
    "W4A16_ASYM": Scheme(ct(int4, symmetric=False)),
    "W4A16_G32": Scheme(ct(int4, group=32)),
    "W4AFP8_PACKED": Scheme(ct(int4), ct(fp8, per="token")),
    "W8A8": Scheme(ct(int8), ct(int8, per="token")),
    "W8A8_STATIC": Scheme(ct(int8), ct(int8, per="tensor")),
}
MO = {
    "FP8_DEFAULT_CFG": Scheme(mo(fp8), mo(fp8)),
    "FP8_DEFAULT_CFG+FP8_KV_CFG": Scheme(mo(fp8), mo(fp8)),
    "FP8_PER_CHANNEL_PER_TOKEN_CFG": Scheme(mo(fp8, per="channel"), mo(fp8, per="token")),
    "FP8_2D_BLOCKWISE_WEIGHT_ONLY_CFG": Scheme(mo(fp8, per="block"), mo(fp8, per="block")),
    "NVFP4_DEFAULT_CFG": Scheme(mo(nvfp4), mo(nvfp4)),
    "NVFP4_DEFAULT_CFG+NVFP4_KV_CFG": Scheme(mo(nvfp4), mo(nvfp4)),
    "W4A16_NVFP4_CFG": Scheme(mo(nvfp4)),
    "MXFP8_DEFAULT_CFG": Scheme(mo(mxfp8), mo(mxfp8)),
    "MXFP4_DEFAULT_CFG": Scheme(mo(mxfp4)),
    "INT4_BLOCKWISE_WEIGHT_ONLY_CFG": Scheme(mo(int4)),
}
CT_EDGE = ("FP8_BLOCK", "FP8_DYNAMIC", "MXFP4", "MXFP8", "NVFP4", "W4A16_ASYM", "W8A8")
MO_EDGE = ("FP8_DEFAULT_CFG", "MXFP8_DEFAULT_CFG", "NVFP4_DEFAULT_CFG")
FOLDERS = [
    *((f"llmcompressor/{n}", "llama", compressed_tensors, s) for n, s in CT.items()),
    *((f"modelopt/{n}", "llama", modelopt, s) for n, s in MO.items()),
    *((f"llmcompressor-edge/{n}", "llama-edge", compressed_tensors, CT[n]) for n in CT_EDGE),
    *((f"modelopt-edge/{n}", "llama-edge", modelopt, MO[n]) for n in MO_EDGE),
]
# ModelOpt divides by the zero scale of a zero tensor and writes NaN codes; ours decode to zeros.
NAN = ("modelopt-edge/FP8_DEFAULT_CFG", "model.layers.1.self_attn.v_proj")
IDS = [folder for folder, *_ in FOLDERS]
CACHES = {
    "llmcompressor/FP8_KV": fp8,
    "llmcompressor/FP8_DYNAMIC_KV": fp8,
    "llmcompressor/NVFP4_KV": fp8,  # as of its weights; the cache is in FP8
    "modelopt/FP8_DEFAULT_CFG+FP8_KV_CFG": fp8,
    "modelopt/NVFP4_DEFAULT_CFG+NVFP4_KV_CFG": nvfp4,
}


def cache_of(folder, arithmetic, as_read=False):
    """The cache that a peer has quantized; None: it has not."""
    if folder not in CACHES:
        return None
    format = CACHES[folder].FORMAT(arithmetic=arithmetic, as_read=as_read)
    return Cache(format, format)


@functools.cache
def source(model):
    return open_checkpoint(GOLDEN / "models" / model)


@functools.cache
def manifest(folder):
    return json.loads((GOLDEN / folder / "manifest.json").read_text())["tensors"]


def read_json(folder, name):
    path = GOLDEN / folder / name
    return json.loads(path.read_text()) if path.exists() else {}


def sharing(module):
    """The modules that share NVFP4's outer scale."""
    parent, _, name = module.rpartition(".")
    return next(([f"{parent}.{n}" for n in group] for group in SHARED if name in group), [module])


@functools.cache
def encoded(model, module, format):
    w = source(model)[f"{module}.weight"]
    outer = None
    if format.fused:
        weights = (source(model)[f"{m}.weight"] for m in sharing(module))
        top = np.float32(max(np.abs(v.astype(np.float32)).max() for v in weights))
        outer = format.outer(top, w.dtype)
    return format.encode(w, outer)


def describe(array):
    return array.dtype, array.shape, hashlib.sha256(array.tobytes()).hexdigest()


@pytest.mark.parametrize("folder, model, dialect, scheme", FOLDERS, ids=IDS)
def test_every_tensor_has_the_bytes_that_the_peer_wrote(folder, model, dialect, scheme):
    wanted = manifest(folder)
    checked = set()
    for module in MODULES:
        q = encoded(model, module, scheme.weights)
        tensors = dialect.write(module, q, scheme, 1.0 if scheme.inputs and scheme.inputs.static else None)
        for name, array in tensors.items():
            expected = wanted[name]
            dtype, shape, digest = describe(array)
            assert (dtype, list(shape)) == (DTYPES[expected["dtype"]], expected["shape"]), name
            if (folder, module) == NAN:
                assert not np.asarray(scheme.weights.decode(q)).any()
            elif ".input_" not in name:
                assert digest == expected["sha256"], name
            checked.add(name)
    beside = {
        n for n in wanted if n.rpartition(".")[0] in MODULES and not n.endswith((".k_scale", ".v_scale"))
    }
    assert checked == beside


def bare(value):
    """A config without nulls, empty sections and observers: they do not say how numbers are stored."""
    useless = ("observer", "observer_kwargs", "actorder")
    if isinstance(value, dict):
        return {k: bare(v) for k, v in value.items() if v not in (None, {}) and k not in useless}
    return value


@pytest.mark.parametrize("folder, model, dialect, scheme", FOLDERS, ids=IDS)
def test_the_config_says_what_the_peers_says(folder, model, dialect, scheme):
    ignore = ["lm_head", "model.embed_tokens"] if dialect.LISTS_EMBEDDINGS else ["lm_head"]
    written = dialect.config(dict.fromkeys(MODULES, scheme), ignore, cache_of(folder, dialect.ARITHMETIC))
    golden = {
        "quantization_config": read_json(folder, "config.json")["quantization_config"],
        "hf_quant_config.json": read_json(folder, "hf_quant_config.json"),
    }
    wanted = bare(golden)
    if "INT4" in folder:  # ModelOpt claims scales that this folder does not have
        wanted["hf_quant_config.json"]["quantization"]["pre_quant_scale"] = False
    assert bare(written) == wanted
    assert json.loads(json.dumps(written)) == written


@pytest.mark.parametrize("folder, model, dialect, scheme", FOLDERS, ids=IDS)
def test_the_peers_config_is_parsed(folder, model, dialect, scheme):
    config, extra = read_json(folder, "config.json"), read_json(folder, "hf_quant_config.json")
    assert base.dialect(config, []) is dialect
    parsed = dialect.parse(config, extra, [*MODULES, "lm_head"])
    assert list(parsed.schemes) == MODULES
    assert set(parsed.schemes.values()) == {
        Scheme(
            base.as_read(scheme.weights, dialect.ARITHMETIC), base.as_read(scheme.inputs, dialect.ARITHMETIC)
        )
    }
    assert "lm_head" in parsed.ignore
    assert parsed.cache == cache_of(folder, dialect.ARITHMETIC, as_read=True)


@pytest.mark.parametrize("folder", [n for n, s in MO.items() if s.inputs and s.inputs.static])
def test_modelopts_static_scales_follow_from_its_maxima(folder):
    wanted, maxima = manifest(f"modelopt/{folder}"), np.load(GOLDEN / "modelopt" / folder / "amax.npz")
    scheme = MO[folder]
    for module in MODULES:
        top = maxima[f"{module}.input_quantizer"]
        if scheme.inputs.name == "nvfp4":  # ModelOpt unifies the modules that share an input
            top = max(maxima[f"{m}.input_quantizer"] for m in sharing(module))
        written = modelopt.write(module, encoded("llama", module, scheme.weights), scheme, top)
        assert describe(written[f"{module}.input_scale"])[2] == wanted[f"{module}.input_scale"]["sha256"]
    for attention in ATTENTIONS if f"modelopt/{folder}" in CACHES else ():
        k, v = (maxima[f"{attention}.{n}_bmm_quantizer"] for n in "kv")
        written = modelopt.write_cache(attention, k, v, BF16)
        for name, array in written.items():
            assert describe(array) == (np.float32, (), wanted[name]["sha256"])
        back = modelopt.read_cache(attention, written.__getitem__)
        np.testing.assert_allclose(back, (k, v), rtol=2.4e-7)
        assert modelopt.write_cache(attention, *back, BF16) == written


@pytest.mark.parametrize(
    "format, amax, expected",
    [
        (ct(fp8), 30.0, jnp.bfloat16(30.0 / 448)),
        (ct(int8, per="tensor"), 30.0, jnp.bfloat16(30.0 / 127.5)),
        (ct(nvfp4), 24.0, jnp.bfloat16(float(jnp.bfloat16(1 / 24.0)) * 2688)),
    ],
)
def test_compressed_tensors_static_scales_are_its_formulas(format, amax, expected):
    weights = format if format.name != "int8" else ct(int8)
    q = encoded("llama", MODULES[0], weights)
    written = compressed_tensors.write(MODULES[0], q, Scheme(weights, format), amax)
    leaf = "input_global_scale" if format.name == "nvfp4" else "input_scale"
    assert float(written[f"{MODULES[0]}.{leaf}"][0]) == float(expected)


STATIC = [
    (compressed_tensors, ct(fp8)),
    (compressed_tensors, ct(nvfp4)),
    (compressed_tensors, ct(int8, per="tensor")),
    (modelopt, mo(fp8)),
    (modelopt, mo(nvfp4)),
]


@pytest.mark.parametrize("dtype", [BF16, np.dtype(np.float16), np.dtype(np.float32)], ids=str)
@pytest.mark.parametrize("dialect, format", STATIC, ids=str)
def test_maxima_come_back_from_static_scales_without_a_changed_bit(dialect, format, dtype):
    read = base.as_read(format, dialect.ARITHMETIC)
    for amax in np.geomspace(0.1, 400, 60).astype(dtype).astype(np.float32):
        outer = base.static_outer(format, "m", amax, dtype)
        back = base.amax_of(read, outer)
        assert base.static_outer(read, "m", back, dtype) == outer
        np.testing.assert_allclose(read.outer(back, dtype), outer, rtol=2.4e-7)
        np.testing.assert_allclose(back, amax, rtol=np.finfo(np.float16).eps * 8)


@pytest.mark.parametrize("maxima", [(7.625, 5.5), ([7.625, 0.5], [5.5, 3.0]), ([7.625], [5.5])], ids=str)
def test_compressed_tensors_cache_scales(maxima):
    attention = "model.layers.0.self_attn"
    k, v = (np.array(top, np.float32) for top in maxima)
    shape = (k.size, 1, 1) if k.ndim else (1,)
    written = compressed_tensors.write_cache(attention, k, v, BF16)
    assert {n: (a.dtype, a.shape) for n, a in written.items()} == {
        f"{attention}.k_scale": (BF16, shape),
        f"{attention}.v_scale": (BF16, shape),
    }
    for top, scale in zip((k, v), written.values(), strict=True):
        np.testing.assert_array_equal(scale.reshape(top.shape), (top / 448).astype(BF16))
    back = compressed_tensors.read_cache(attention, written.__getitem__)
    for top, found in zip((k, v), back, strict=True):
        assert (found.dtype, found.shape) == (np.float32, top.shape)
        np.testing.assert_allclose(found, top, rtol=2.0**-8)
    again = compressed_tensors.write_cache(attention, *back, BF16)
    assert {n: describe(a) for n, a in again.items()} == {n: describe(a) for n, a in written.items()}


@pytest.mark.parametrize("folder", [f for f in CACHES if f.startswith("llmcompressor")])
def test_llm_compressors_cache_scales_are_read_and_written_again(folder):
    every = np.arange(2**16, dtype=np.uint16).view(BF16)
    digests = {hashlib.sha256(scale.tobytes()).hexdigest(): scale for scale in every}
    wanted = {n: e for n, e in manifest(folder).items() if n.endswith((".k_scale", ".v_scale"))}
    assert set(wanted) == {n for a in ATTENTIONS for n in compressed_tensors.cache_names(a)}
    assert all((e["dtype"], e["shape"]) == ("BF16", [1]) for e in wanted.values())
    theirs = {name: digests[e["sha256"]].reshape(1) for name, e in wanted.items()}
    for attention in ATTENTIONS:
        maxima = compressed_tensors.read_cache(attention, theirs.__getitem__)
        for name, top in zip(compressed_tensors.cache_names(attention), maxima, strict=True):
            assert top.shape == () and top == pytest.approx(float(theirs[name][0]) * 448)
        for name, scale in compressed_tensors.write_cache(attention, *maxima, BF16).items():
            assert describe(scale) == (BF16, (1,), wanted[name]["sha256"])


# --- reading what peers wrote ---


def decoded(folder, dialect, module):
    files = open_checkpoint(GOLDEN / folder)
    scheme = dialect.parse(files.config, read_json(folder, "hf_quant_config.json"), MODULES).schemes[module]
    q, amax = dialect.read(module, files.__getitem__, scheme, BF16)
    return np.asarray(q.format.decode(q)), q, amax, scheme, files


@pytest.mark.parametrize("module", [MODULES[1], MODULES[-1]])
@pytest.mark.parametrize(
    "folder, dialect, format",
    [
        ("llmcompressor/W4A16_ASYM", compressed_tensors, ct(int4, symmetric=False)),
        ("modelopt/NVFP4_DEFAULT_CFG", modelopt, mo(nvfp4)),
    ],
)
def test_a_peers_folder_decodes_to_what_encoding_gives_and_is_written_again_byte_for_byte(
    folder, dialect, format, module
):
    values, q, amax, scheme, files = decoded(folder, dialect, module)
    own = encoded("llama", module, format)
    np.testing.assert_array_equal(values, np.asarray(format.decode(own)))
    for name, array in dialect.write(module, q, scheme, amax).items():
        assert describe(array) == describe(files[name]), name


@pytest.mark.parametrize("module", [MODULES[1], MODULES[-1]])
def test_native_fp8_blocks_decode_to_code_times_scale(module):
    values, _, amax, scheme, files = decoded("native/llama/FP8_BLOCK128", hf_fp8, module)
    codes, scale = files[f"{module}.weight"], files[f"{module}.weight_scale_inv"]
    wide = np.kron(scale, np.ones((128, 128), np.float32))
    np.testing.assert_array_equal(values, codes.astype(np.float32) * wide)
    assert amax is None and scheme.inputs.per == "block"


def test_codes_are_views_where_the_arrangement_is_the_files():
    for dialect, scheme in (
        (compressed_tensors, CT["NVFP4A16"]),
        (compressed_tensors, CT["FP8_DYNAMIC"]),
        (modelopt, MO["W4A16_NVFP4_CFG"]),
        (modelopt, MO["MXFP8_DEFAULT_CFG"]),
    ):
        tensors = dialect.write("m", encoded("llama", MODULES[0], scheme.weights), scheme, None)
        q, _ = dialect.read("m", tensors.__getitem__, scheme, BF16)
        codes = tensors.get("m.weight_packed", tensors.get("m.weight"))
        assert np.shares_memory(q.codes, codes)
        assert np.shares_memory(q.scales["inner"], tensors["m.weight_scale"])


def test_native_power_of_two_scales():
    w = encoded("llama", MODULES[0], mo(fp8, per="block"))
    bits = np.array([[120, 127], [1, 130]], np.uint8)
    tensors = {
        f"{MODULES[0]}.weight": np.asarray(w.codes),
        f"{MODULES[0]}.weight_scale_inv": bits.view(ml_dtypes.float8_e8m0fnu),
    }
    q, _ = hf_fp8.read(MODULES[0], tensors.__getitem__, Scheme(mo(fp8, per="block")), BF16)
    np.testing.assert_array_equal(q.scales["inner"], 2.0 ** (bits.astype(np.float32) - 127))
    w = encoded("llama", MODULES[0], mo(mxfp8))
    inner = np.asarray(w.scales["inner"])
    for dtype in (np.uint8, ml_dtypes.float8_e8m0fnu):
        tensors = {
            f"{MODULES[0]}.weight": np.asarray(w.codes),
            f"{MODULES[0]}.weight_scale_inv": inner.view(dtype),
        }
        q, _ = hf_fp8.read(MODULES[0], tensors.__getitem__, Scheme(mo(mxfp8)), BF16)
        np.testing.assert_array_equal(q.scales["inner"], inner)


@pytest.mark.parametrize("folder", ["FP8_BLOCK128", "FP8_BLOCK128_UE8M0", "MXFP8_NATIVE"])
def test_native_configs_are_parsed(folder):
    config = read_json(f"native/llama/{folder}", "config.json")
    assert base.dialect(config, []) is hf_fp8
    parsed = hf_fp8.parse(config, None, [*MODULES, "lm_head"])
    name = "mxfp8" if folder.startswith("MX") else "fp8"
    assert {s.weights.name for s in parsed.schemes.values()} == {name}
    assert list(parsed.schemes) == MODULES and parsed.ignore == ("lm_head",)


CT_ORACLE = {
    **CT,
    "FP8_TENSOR_W8A16": Scheme(ct(fp8)),
    "W8A16": Scheme(ct(int8)),
    "W8A8_TENSOR": Scheme(ct(int8, per="tensor"), ct(int8, per="token")),
}


@pytest.mark.parametrize("name", sorted(n for n in CT_ORACLE if f"llmcompressor/{n}" not in CACHES))
def test_decoding_is_compressed_tensors_own_decompression(name):
    torch = pytest.importorskip("torch")
    compressors = pytest.importorskip("compressed_tensors.compressors")
    quantization = pytest.importorskip("compressed_tensors.quantization")
    scheme, module = CT_ORACLE[name], MODULES[1]
    q = encoded("llama", module, scheme.weights)
    written = compressed_tensors.write(module, q, scheme, 1.0)
    group = compressed_tensors.config({module: scheme}, [], None)["quantization_config"]["config_groups"][
        "group_0"
    ]
    theirs = quantization.QuantizationScheme(**group)
    state = {n.removeprefix(f"{module}."): as_torch(torch, a) for n, a in written.items()}
    compressor = compressors.BaseCompressor.get_value_from_registry(group["format"])
    if state["weight_scale"].dtype == torch.bfloat16:
        state["weight_scale"] = state["weight_scale"].float()  # then the product is not rounded, as ours
    wanted = compressor.decompress(state, theirs)["weight"]
    parsed = compressed_tensors.parse(
        {"quantization_config": {"config_groups": {"a": group}}}, None, [module]
    )
    back, _ = compressed_tensors.read(module, written.__getitem__, parsed.schemes[module], BF16)
    ours = torch.from_numpy(np.array(back.format.decode(back))).to(wanted.dtype)
    np.testing.assert_array_equal(ours.float().numpy(), wanted.float().numpy())


def as_torch(torch, array):
    array = np.array(array)
    kinds = {BF16: (np.int16, torch.bfloat16), DTYPES["F8_E4M3"]: (np.uint8, torch.float8_e4m3fn)}
    if array.dtype in kinds:
        carrier, kind = kinds[array.dtype]
        return torch.from_numpy(array.view(carrier)).view(kind)
    return torch.from_numpy(array)


# --- round trips, layouts ---

ROTATED = [  # the matrix is known to servers; wanted by a kernel; not Sylvester's
    Scheme(ct(mxfp4), ct(mxfp4), 32),
    Scheme(ct(nvfp4), ct(nvfp4), 16),
    Scheme(ct(int8), ct(int8, per="tensor"), 12),
]
EVERY = [
    *((compressed_tensors, s) for s in {s: None for s in CT_ORACLE.values()}),
    *((modelopt, s) for s in {s: None for s in MO.values()}),
    *((compressed_tensors, s) for s in ROTATED),
]


def label(value):
    return value.DIALECT if hasattr(value, "DIALECT") else base.label(value)


@pytest.mark.parametrize("dialect, scheme", EVERY, ids=label)
@given(data=st.data())
@settings(max_examples=15, deadline=None)
def test_writing_reading_and_writing_again_changes_no_byte(dialect, scheme, data):
    n = 2 * data.draw(st.integers(1, 70), label="half the rows")
    blocks = {"int4": getattr(scheme.weights, "group", 0), "nvfp4": 16, "fp8": 1, "int8": 1}
    k = max(blocks.get(scheme.weights.name, 32), scheme.hadamard) * data.draw(
        st.integers(1, 9), label="blocks"
    )
    dtype = data.draw(st.sampled_from([BF16, np.dtype(np.float16), np.dtype(np.float32)]), label="dtype")
    amax = data.draw(st.floats(2**-6, 512, width=32), label="amax")
    q = random_tensor(scheme.weights, (n, k), dtype, data.draw(st.integers(0, 2**32 - 1), label="seed"))
    written = dialect.write("m", q, scheme, amax)
    assert {s: (a.dtype, a.shape) for s, a in written.items()} == {
        s: (np.dtype(a.dtype), a.shape) for s, a in dialect.layout("m", (n, k), dtype, scheme).items()
    }
    matrix = f"m.hadamard_{scheme.hadamard}_input.weight"
    assert all(name.removeprefix("m") in (*dialect.SUFFIXES, ".weight") for name in written if name != matrix)
    assert (matrix in written) == (scheme.hadamard in (12, 16))
    files = dialect.config({"m": scheme}, [], None)
    config = {"quantization_config": files.pop("quantization_config")}
    parsed = dialect.parse(config, files.get("hf_quant_config.json"), ["m"])
    assert parsed.schemes["m"].hadamard == scheme.hadamard
    back, top = dialect.read("m", written.__getitem__, parsed.schemes["m"], dtype)
    assert back.shape == q.shape and back.format == base.as_read(scheme.weights, dialect.ARITHMETIC)
    assert describe(back.codes) == describe(q.codes)
    assert {level: describe(v) for level, v in back.scales.items()} == {
        level: describe(v) for level, v in q.scales.items()
    }
    again = dialect.write("m", back, parsed.schemes["m"], top)
    assert {n: describe(a) for n, a in again.items()} == {n: describe(a) for n, a in written.items()}


def random_tensor(format, shape, dtype, seed):
    """Any codes with positive scales, arranged as `encode` gives them."""
    spec, rng = format.spec(shape, dtype), np.random.default_rng(seed)

    def fill(a):
        low, high = {np.dtype(np.uint8): (0, 256), np.dtype(np.int8): (-8, 8)}.get(a.dtype, (1, 257))
        return rng.integers(low, high, a.shape).astype(a.dtype)

    return dataclasses.replace(
        spec, codes=fill(spec.codes), scales={n: fill(s) for n, s in spec.scales.items()}
    )


CROSSING = [s for s in MO.values() if base.kind(s.weights) != "int4"]


@pytest.mark.parametrize("scheme", {s: None for s in CROSSING}, ids=base.label)
def test_another_dialects_tensors_are_written_and_come_back(scheme):
    module = MODULES[1]
    amax = np.float32(11.3) if scheme.inputs and scheme.inputs.static else None
    first = modelopt.write(module, encoded("llama", module, scheme.weights), scheme, amax)
    q, top = modelopt.read(module, first.__getitem__, scheme, BF16)
    scheme = Scheme(base.as_read(scheme.weights, "float32"), base.as_read(scheme.inputs, "float32"))
    crossed = compressed_tensors.write(module, q, scheme, top)
    assert {n: (a.dtype, a.shape) for n, a in crossed.items()} == {
        n: (np.dtype(a.dtype), a.shape)
        for n, a in compressed_tensors.layout(module, q.shape, BF16, scheme).items()
    }
    config = compressed_tensors.config({module: scheme}, [], None)
    theirs = compressed_tensors.parse(config, None, [module]).schemes[module]
    back, top = compressed_tensors.read(module, crossed.__getitem__, theirs, BF16)
    np.testing.assert_allclose(back.format.decode(back), q.format.decode(q), rtol=3e-7)
    second = modelopt.write(module, back, theirs, top)
    assert set(first) == set(second)
    for name in first:
        outer = name.endswith(("weight_scale_2", "input_scale"))
        np.testing.assert_allclose(
            first[name].astype(np.float32), second[name].astype(np.float32), rtol=1.2e-7 if outer else 0
        )


def test_a_scale_that_bfloat16_cannot_hold_is_refused():
    scheme = Scheme(mo(int4))
    with pytest.raises(InputError, match=r"q_proj.weight_scale: .* scales are float32 values that bfloat16"):
        compressed_tensors.write(MODULES[0], encoded("llama", MODULES[0], mo(int4)), scheme, None)


def test_zeros_cross_the_dialects():
    zeros = np.zeros((4, 32), BF16)
    q = mo(nvfp4).encode(zeros, np.float32(0))
    written = compressed_tensors.write("m", q, Scheme(mo(nvfp4)), None)
    assert written["m.weight_global_scale"] == 1 and not (written["m.weight_packed"] & 0x77).any()


# --- configs ---


def test_several_schemes_are_groups_of_full_names():
    schemes = {m: CT["FP8_DYNAMIC"] if "self_attn" in m else CT["NVFP4"] for m in MODULES}
    written = compressed_tensors.config(schemes, ["lm_head"], None)["quantization_config"]
    groups = written["config_groups"]
    assert written["format"] == "mixed-precision"
    assert [g["format"] for g in groups.values()] == ["float-quantized", "nvfp4-pack-quantized"]
    assert groups["group_0"]["targets"] == [m for m in MODULES if "self_attn" in m]
    golden = read_json("llmcompressor/MIXED_FP8_NVFP4", "config.json")  # the same by regular expressions
    ours = compressed_tensors.parse({"quantization_config": written}, None, [*MODULES, "lm_head"])
    assert ours == compressed_tensors.parse(golden, None, [*MODULES, "lm_head"])
    assert base.plain(ours.schemes[MODULES[0]].weights) == fp8.FORMAT(per="channel")


def test_modelopt_mixes_what_vllm_accepts():
    schemes = {m: MO["FP8_DEFAULT_CFG"] if "self_attn" in m else MO["NVFP4_DEFAULT_CFG"] for m in MODULES}
    written = modelopt.config(schemes, ["lm_head"], Cache(fp8.FORMAT(), fp8.FORMAT()))
    config, extra = written["quantization_config"], written["hf_quant_config.json"]
    assert config["quant_algo"] == extra["quantization"]["quant_algo"] == "MIXED_PRECISION"
    assert config["quantized_layers"][MODULES[-1]] == {"quant_algo": "NVFP4", "group_size": 16}
    for found, beside in (({"quantization_config": config}, extra), ({}, extra)):
        parsed = modelopt.parse(found, beside, [*MODULES, "lm_head"])
        assert {m: (base.plain(s.weights), base.plain(s.inputs)) for m, s in parsed.schemes.items()} == {
            m: (s.weights, s.inputs) for m, s in schemes.items()
        }
        assert parsed.cache == Cache(mo(fp8, as_read=True), mo(fp8, as_read=True))
        assert parsed.ignore == ("lm_head",)
    with pytest.raises(InputError, match="cannot mix FP8, W4A16_AWQ"):
        modelopt.config({"a": MO["FP8_DEFAULT_CFG"], "b": Scheme(mo(int4))}, [], None)


def test_full_names_win_over_linear_and_ignore_takes_regular_expressions():
    groups = {
        "group_0": {"targets": ["Linear"], "weights": ct_schemes.weight_args(ct(nvfp4))},
        "group_1": {
            "targets": ["re:.*down_proj$", "a.b"],
            "weights": ct_schemes.weight_args(ct(mxfp8)),
        },
    }
    config = {"config_groups": groups, "ignore": ["re:.*lm_head", "x.y"], "format": "mixed-precision"}
    names = ["a.b", "a.bc", "x.down_proj", "model.lm_head", "x.y", "x.yz"]
    parsed = compressed_tensors.parse({"quantization_config": config}, None, names)
    assert {m: s.weights.name for m, s in parsed.schemes.items()} == {
        "a.b": "mxfp8",
        "a.bc": "nvfp4",
        "x.down_proj": "mxfp8",
        "x.yz": "nvfp4",
    }
    assert parsed.ignore == ("x.y", "model.lm_head")


def test_modelopts_exclude_list_takes_names_parts_and_wildcards():
    config = {
        "quant_method": "modelopt",
        "quant_algo": "fp8",
        "ignore": ["lm_head", "model.layers.1", "*.o_proj", "model.layers.2.mlp*", "mlp.gate"],
    }
    names = [
        "lm_head",
        "model.layers.1.mlp.up_proj",
        "model.layers.10.mlp.up_proj",
        "model.layers.0.self_attn.o_proj",
        "model.layers.2.mlp.up_proj",
        "model.layers.3.mlp.gate",
        "model.layers.3.mlp.gate_proj",
    ]
    parsed = modelopt.parse({"quantization_config": config}, None, names)
    assert list(parsed.schemes) == [names[2], names[6]]


def changed(folder, *path, value):
    """The golden config with one entry replaced."""
    config = read_json(folder, "config.json")
    place = config["quantization_config"]
    for key in path[:-1]:
        place = place.setdefault(key, {})
    place[path[-1]] = value
    return config


def rotations(ignore=(), **options):
    """A transform_config of one group `u`; `location` and `ignore` are of what it is applied to."""
    place = {"targets": ["Linear"], "location": "input", "inverse": False, "ignore": list(ignore)}
    place |= {k: v for k, v in options.items() if k == "location"}
    group = {"type": "hadamard", "apply": [place], "randomize": False, "requires_grad": False, "head_dim": 32}
    group |= {k: v for k, v in options.items() if k != "location"}
    return {"config_groups": {"u": group | {"precision": "torch.float32"}}}


@pytest.mark.parametrize(
    "group, expected",
    [
        ({}, {32}),
        ({"head_dim": 16}, {16}),
        ({"location": "weight_input"}, {0}),  # folded into the weights: a record
        ({"ignore": ["lm_head", "re:.*down_proj$"]}, {32, 0}),
    ],
)
def test_rotations_of_inputs_are_read(group, expected):
    folder = "llmcompressor/MXFP4"
    said = rotations(**{"ignore": ["lm_head"]} | group)
    config = changed(folder, "transform_config", value=said)
    parsed = compressed_tensors.parse(config, None, [*MODULES, "lm_head"])
    assert {s.hadamard for s in parsed.schemes.values()} == expected
    assert len(parsed.schemes) == len(MODULES) and parsed.ignore == ("lm_head",)
    for module, scheme in parsed.schemes.items():
        assert scheme._replace(hadamard=0) == Scheme(ct(mxfp4, as_read=True), ct(mxfp4, as_read=True))
        assert scheme.hadamard or "down_proj" in module or "weight_input" in group.values()


def test_a_rotation_is_written_as_compressed_tensors_dumps_one():
    scheme = Scheme(ct(mxfp4), ct(mxfp4), 32)
    written = compressed_tensors.config(dict.fromkeys(MODULES, scheme), ["lm_head"], None)
    golden = changed("llmcompressor/MXFP4", "transform_config", value=rotations(["lm_head"]))
    found, wanted = written["quantization_config"], golden["quantization_config"]
    (ours,), (theirs,) = (c.pop("transform_config")["config_groups"].values() for c in (found, wanted))
    assert bare(found) == bare(wanted)
    defaults = {"randomize": False, "requires_grad": False, "precision": "torch.float32"}
    ours["apply"][0].setdefault("inverse", False)
    assert defaults | ours == theirs
    transform = pytest.importorskip("compressed_tensors.transform")
    read = transform.TransformConfig.model_validate({"config_groups": {"u": ours}})
    assert read == transform.TransformConfig.model_validate({"config_groups": {"u": theirs}})


def test_the_matrix_of_a_rotation_is_compressed_tensors_own():
    hadamard = pytest.importorskip("compressed_tensors.transform.utils.hadamard")
    scheme = ROTATED[1]
    written = compressed_tensors.write("m", encoded("llama", MODULES[0], scheme.weights), scheme, 1.0)
    matrix = written["m.hadamard_16_input.weight"].astype(np.float32)
    np.testing.assert_array_equal(matrix, hadamard.deterministic_hadamard_matrix(16).float().numpy())
    damaged = written | {"m.hadamard_16_input.weight": np.eye(16, dtype=BF16)}
    with pytest.raises(InputError, match="is not the matrix that mojax rotates with"):
        compressed_tensors.read("m", damaged.__getitem__, scheme, BF16)


@pytest.mark.parametrize("value", ["NVFP4", {"num_bits": 4, "type": "float", "group_size": 16}, None])
def test_a_cache_in_nvfp4_is_read_from_either_file(value):
    folder = "modelopt/NVFP4_DEFAULT_CFG+NVFP4_KV_CFG"
    extra = read_json(folder, "hf_quant_config.json")
    assert extra["quantization"]["kv_cache_quant_algo"] == "NVFP4"
    if value is not None:
        extra["quantization"]["kv_cache_quant_algo"] = None
    parsed = modelopt.parse(changed(folder, "kv_cache_scheme", value=value), extra, MODULES)
    assert parsed.cache == cache_of(folder, "float32", as_read=True)


def test_two_files_that_disagree_about_the_cache_are_refused():
    folder = "modelopt/NVFP4_DEFAULT_CFG+NVFP4_KV_CFG"
    config = changed(folder, "kv_cache_scheme", value={"num_bits": 8, "type": "float"})
    with pytest.raises(InputError, match=r"the KV cache is quantized as .*8.*, hf_quant_config.json 'NVFP4'"):
        modelopt.parse(config, read_json(folder, "hf_quant_config.json"), MODULES)


def test_a_cache_with_a_scale_per_head_is_read_and_written():
    said = {"num_bits": 8, "type": "float", "strategy": "attn_head"}
    config = changed("llmcompressor/FP8_DYNAMIC_KV", "kv_cache_scheme", value=said)
    found = compressed_tensors.parse(config, None, MODULES).cache
    assert found == Cache(ct(fp8, as_read=True), ct(fp8, as_read=True), per="head")
    schemes = dict.fromkeys(MODULES, CT["FP8_DYNAMIC_KV"])
    written = compressed_tensors.config(schemes, ["lm_head"], found)["quantization_config"]
    golden = read_json("llmcompressor/FP8_DYNAMIC_KV", "config.json")["quantization_config"]
    golden["kv_cache_scheme"]["strategy"] = "attn_head"
    assert bare(written) == bare(golden)


WEIGHTS = ("config_groups", "group_0", "weights")


@pytest.mark.parametrize(
    "path, value, message",
    [
        ((*WEIGHTS, "actorder"), "group", r"group_0\.weights\.actorder is 'group'"),
        ((*WEIGHTS, "num_bits"), 3, r"group_0\.weights\.num_bits is 3"),
        ((*WEIGHTS, "strategy"), "block", r"group_0\.weights\.strategy is 'block'"),
        (
            ("config_groups", "group_0", "format"),
            "int-quantized",
            "format is 'int-quantized'; int4",
        ),
        (
            ("transform_config",),
            rotations(location="output"),
            r"transform_config\.config_groups\.u: is applied at 'output'",
        ),
        (("transform_config",), rotations(location="q_attn"), "is applied at 'q_attn'"),
        (("transform_config",), rotations(type="random-hadamard"), "is a 'random-hadamard' of 32 channels"),
        (("transform_config",), rotations(type="random-matrix"), "is a 'random-matrix' of 32 channels"),
        (("transform_config",), rotations(head_dim=None), r"groups\.u\.head_dim is None"),
        (("transform_config",), "hadamard", "transform_config is 'hadamard', needed an object"),
        (("transform_config",), {"config_groups": {"u": [32]}}, r"groups\.u is \[32\], needed an object"),
        (("sparsity_config",), {"format": "sparse-24-bitmask", "targets": ["Linear"]}, "sparsity_config"),
        (("quantization_status",), "frozen", "quantization_status is 'frozen'"),
        (
            ("kv_cache_scheme",),
            {"num_bits": 8, "type": "float", "strategy": "channel"},
            r"kv_cache_scheme\.strategy is 'channel'",
        ),
        (
            ("kv_cache_scheme",),
            {"num_bits": 4, "type": "float", "strategy": "attn_head"},
            r"kv_cache_scheme\.num_bits is 4",
        ),
        (
            ("kv_cache_scheme",),
            {"num_bits": 8, "type": "int", "strategy": "tensor"},
            r"kv_cache_scheme\.type is 'int'",
        ),
        (
            ("kv_cache_scheme",),
            {"num_bits": 8, "type": "float", "strategy": "attn_head", "dynamic": True},
            r"kv_cache_scheme\.dynamic is True",
        ),
        (
            ("config_groups", "group_0", "input_activations"),
            {"num_bits": 4},
            "input_activations.num_bits is 4",
        ),
        (("config_groups", "group_0", "output_activations"), {"num_bits": 8}, "output_activations is"),
    ],
)
def test_what_compressed_tensors_cannot_be_read_is_named(path, value, message):
    with pytest.raises(InputError, match=message):
        compressed_tensors.parse(changed("llmcompressor/W4A16_ASYM", *path, value=value), None, MODULES)


@pytest.mark.parametrize(
    "path, value, message",
    [
        (
            ("quant_algo",),
            "NVFP4_AWQ",
            "says quant_algo 'NVFP4_AWQ', hf_quant_config.json 'NVFP4'",
        ),
        (("group_size",), 32, r"group_size is 32"),
        (("kv_cache_scheme",), "NVFP4_AFFINE", "the KV cache is quantized as 'NVFP4_AFFINE'"),
        (("kv_cache_scheme",), "INT8", "the KV cache is quantized as 'INT8'"),
        (("kv_cache_scheme",), {"num_bits": 8, "type": "int"}, "the KV cache is quantized as {'num_bits': 8"),
        (("kv_cache_scheme",), {"num_bits": [4, 3], "type": "float"}, r"the KV cache is .*\[4, 3\]"),
        (("kv_cache_scheme",), {"num_bits": 4, "type": "float", "group_size": 32}, "the KV cache is .* 32"),
    ],
)
def test_what_of_modelopt_cannot_be_read_is_named(path, value, message):
    folder = "modelopt/NVFP4_DEFAULT_CFG"
    with pytest.raises(InputError, match=message):
        modelopt.parse(
            changed(folder, *path, value=value), read_json(folder, "hf_quant_config.json"), MODULES
        )


@pytest.mark.parametrize("folder", ["INT8_DEFAULT_CFG", "W4A8_AWQ_BETA_CFG"])
def test_modelopts_other_algorithms_are_refused_by_name(folder):
    config = read_json(f"modelopt/{folder}", "config.json")
    with pytest.raises(InputError, match=config["quantization_config"]["quant_algo"]):
        modelopt.parse(config, read_json(f"modelopt/{folder}", "hf_quant_config.json"), MODULES)


def test_inputs_scaled_at_run_time_are_refused():
    written = modelopt.write("m", encoded("llama", MODULES[0], mo(int4)), Scheme(mo(int4)), None)
    plain, _ = modelopt.read("m", written.__getitem__, Scheme(mo(int4)), BF16)
    written["m.pre_quant_scale"] = np.ones(256, BF16)  # changes nothing
    read, _ = modelopt.read("m", written.__getitem__, Scheme(mo(int4)), BF16)
    np.testing.assert_array_equal(read.codes, plain.codes)
    written["m.pre_quant_scale"][7] = 2
    with pytest.raises(InputError, match=r"m\.pre_quant_scale"):
        modelopt.read("m", written.__getitem__, Scheme(mo(int4)), BF16)


@pytest.mark.parametrize(
    "change, message",
    [
        ({"weight_block_size": None, "activation_scheme": "static"}, "weight_block_size is None"),
        ({"weight_block_size": [64, 64]}, r"weight_block_size is \[64, 64\]"),
        ({"activation_scheme": "static"}, "activation_scheme is 'static'"),
    ],
)
def test_other_native_fp8_is_refused(change, message):
    config = read_json("native/llama/FP8_BLOCK128", "config.json")
    config["quantization_config"] |= change
    with pytest.raises(InputError, match=message):
        hf_fp8.parse(config, None, MODULES)


def test_the_dialect_of_a_folder():
    assert base.dialect({}, ["config.json"]) is None
    assert base.dialect({}, ["config.json", "hf_quant_config.json"]) is modelopt
    assert base.dialect({"compression_config": {"config_groups": {}}}, []) is compressed_tensors
    with pytest.raises(InputError, match="quant_method 'gptq'"):
        base.dialect({"quantization_config": {"quant_method": "gptq"}}, [])


def test_a_tensor_that_contradicts_the_scheme_is_named():
    plain = source("llama")
    with pytest.raises(InputError, match=r"q_proj\.weight is bfloat16, the config says float8_e4m3fn"):
        compressed_tensors.read(MODULES[0], plain.__getitem__, CT["FP8_DYNAMIC"], BF16)
    written = dict(compressed_tensors.write("m", encoded("llama", MODULES[0], ct(mxfp8)), CT["MXFP8"], None))
    written["m.weight_scale"] = written["m.weight_scale"][:-1]
    with pytest.raises(InputError, match=r"m\.weight_scale has shape \[255, 8\], its scheme needs \[256"):
        compressed_tensors.read("m", written.__getitem__, CT["MXFP8"], BF16)


def test_a_static_input_without_a_maximum_is_refused():
    for dialect, scheme in ((compressed_tensors, CT["FP8"]), (modelopt, MO["NVFP4_DEFAULT_CFG"])):
        with pytest.raises(InputError, match=r"m\.input_scale: .* need a maximum"):
            dialect.write("m", encoded("llama", MODULES[0], scheme.weights), scheme, None)


# --- who loads what ---


@pytest.mark.parametrize(
    "dialect, scheme, loads",
    [
        (compressed_tensors, CT["NVFP4"], "vllm sglang trtllm transformers"),
        (compressed_tensors, CT["NVFP4A16"], "vllm sglang transformers"),
        (compressed_tensors, CT["FP8"], "vllm sglang transformers"),
        (compressed_tensors, CT["FP8_DYNAMIC"], "vllm sglang trtllm transformers"),
        (compressed_tensors, CT["FP8_BLOCK"], "vllm sglang trtllm transformers"),
        (compressed_tensors, CT["MXFP8"], "vllm transformers"),
        (compressed_tensors, CT["MXFP4"], "vllm transformers"),
        (compressed_tensors, CT["MXFP4A16"], "vllm trtllm transformers"),
        (compressed_tensors, CT["W4A16"], "vllm sglang transformers"),
        (compressed_tensors, CT["W4A16_ASYM"], "vllm sglang"),
        (compressed_tensors, CT["W8A8"], "vllm sglang transformers"),
        (modelopt, MO["NVFP4_DEFAULT_CFG"], "vllm sglang trtllm"),
        (modelopt, MO["W4A16_NVFP4_CFG"], "vllm sglang trtllm"),
        (modelopt, MO["FP8_DEFAULT_CFG"], "vllm sglang trtllm"),
        (modelopt, MO["FP8_PER_CHANNEL_PER_TOKEN_CFG"], "vllm trtllm"),
        (modelopt, MO["FP8_2D_BLOCKWISE_WEIGHT_ONLY_CFG"], "vllm trtllm"),
        (modelopt, MO["MXFP8_DEFAULT_CFG"], "vllm trtllm"),
        (modelopt, MO["MXFP4_DEFAULT_CFG"], "trtllm"),
        (modelopt, MO["INT4_BLOCKWISE_WEIGHT_ONLY_CFG"], "trtllm"),
        (modelopt, Scheme(mo(int4, group=32)), ""),
        (modelopt, Scheme(mo(int4, symmetric=False)), ""),
        (modelopt, Scheme(mo(mxfp4), mo(mxfp4)), ""),
        (modelopt, Scheme(mo(int8), mo(int8, per="token")), ""),
        (hf_fp8, Scheme(mo(fp8, per="block"), mo(fp8, per="block")), ""),
        (compressed_tensors, CT["MXFP4"]._replace(hadamard=32), "vllm"),
        (compressed_tensors, CT["W8A8_STATIC"]._replace(hadamard=12), "vllm"),
        (modelopt, MO["MXFP8_DEFAULT_CFG"]._replace(hadamard=32), ""),
    ],
)
def test_who_loads_what(dialect, scheme, loads):
    refusals = {target: dialect.check(scheme, target) for target in base.TARGETS}
    assert [target for target, why in refusals.items() if why is None] == loads.split()
    assert all("; use " in why for why in refusals.values() if why)


def test_every_reason_belongs_to_a_refusal():
    weights = [*ct_schemes.WEIGHTS, int4.FORMAT(), int4.FORMAT(symmetric=False), nf4.FORMAT()]
    schemes = {
        (base.kind(w), base.kind(i)): Scheme(w, i) for w in weights for i in (None, *ct_schemes.INPUTS)
    }
    for dialect in (ct_schemes, mo_schemes, bitsandbytes):
        for (w, i, target), reason in dialect.REASONS.items():
            assert (dialect.check(schemes[w, i], target) or "").endswith(reason), (w, i, target)
    for dialect in (ct_schemes, mo_schemes):
        for (w, i, target), reason in dialect.EXPERTS.items():
            assert dialect.check(schemes[w, i], target) is None, (w, i, target)
            assert (dialect.check(schemes[w, i], target, experts=True) or "").endswith(reason)


def test_schemes_a_dialect_lacks_cannot_be_written():
    with pytest.raises(InputError, match="int8 channel weights with int8 token inputs in the modelopt"):
        modelopt.config({"m": Scheme(mo(int8), mo(int8, per="token"))}, [], None)
    with pytest.raises(InputError, match="has 3 rows"):
        modelopt.layout("m", (3, 128), BF16, Scheme(mo(int4)))
    with pytest.raises(InputError, match=r"mxfp8 weights .* rotated by hadamard 32 in the modelopt"):
        modelopt.config({"m": MO["MXFP8_DEFAULT_CFG"]._replace(hadamard=32)}, [], None)


@pytest.mark.parametrize(
    "formats, options, dialects",
    [
        ((fp8, fp8), {}, [compressed_tensors, modelopt]),
        ((fp8, fp8), {"cast": True}, [compressed_tensors, modelopt]),
        ((fp8, fp8), {"per": "head"}, [compressed_tensors]),
        ((nvfp4, nvfp4), {}, [modelopt]),
        ((fp8, nvfp4), {}, []),
        ((fp8, None), {}, []),
        ((fp8, fp8), {"affine": True}, []),
        ((nvfp4, nvfp4), {"rotate": True}, []),
        ((fp8, fp8), {"skip_last": 1}, []),
        ((fp8, fp8), {"attention": True}, []),
        ((None, None), {"attention": True}, []),
    ],
)
def test_a_cache_is_written_where_it_has_a_form_and_is_what_comes_back(formats, options, dialects):
    for dialect, scheme in ((compressed_tensors, CT["FP8"]), (modelopt, MO["FP8_DEFAULT_CFG"])):
        k, v = (f and f.FORMAT(arithmetic=dialect.ARITHMETIC) for f in formats)
        cache = Cache(k, v, **options)
        if dialect not in dialects:
            with pytest.raises(InputError, match=r"^a key/value cache kept as .* has no form in"):
                dialect.config({"m": scheme}, [], cache)
            refused = {target: dialect.check_cache(cache, target) for target in base.TARGETS}
            assert all(why and ": " in why for why in refused.values())
            continue
        written = dialect.config({"m": scheme}, [], cache)
        config = {"quantization_config": written["quantization_config"]}
        read = dialect.parse(config, written.get("hf_quant_config.json"), ["m"]).cache
        k, v = (base.as_read(f, dialect.ARITHMETIC) for f in (k, v))
        assert read == dataclasses.replace(cache, k=k, v=v, cast=False)


def test_every_converter_has_what_the_others_have():
    names = find.names("converters")
    assert names == ("bitsandbytes", "compressed_tensors", "hf_fp8", "hf_mxfp4", "modelopt")
    for name in names:
        module = find.find("converters", name)
        reads = {"DIALECT", "ARITHMETIC", "WRITES", "METHODS", "SUFFIXES", "check", "parse", "read"}
        writes = {"config", "layout", "write", "check_cache", "write_cache", "read_cache", "cache_names"}
        writes |= {"LISTS_EMBEDDINGS"}
        assert reads | (writes if module.WRITES else set()) <= set(dir(module))


def test_a_checkpoint_dtype_that_a_client_cannot_run_is_refused():
    scheme = Scheme(ct(nvfp4), ct(nvfp4))
    assert "bfloat16" in compressed_tensors.check(scheme, "transformers", np.dtype(np.float16))
    assert compressed_tensors.check(scheme, "transformers", BF16) is None
    assert compressed_tensors.check(scheme, "vllm", np.dtype(np.float16)) is None
    scheme = Scheme(mo(mxfp8), mo(mxfp8))
    assert "bfloat16" in modelopt.check(scheme, "vllm", np.dtype(np.float16))
    assert modelopt.check(scheme, "vllm", BF16) is None
