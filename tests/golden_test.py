"""The bytes that llm-compressor and ModelOpt write for the same weights, per folder of tests/golden."""

import functools
import hashlib
import json
from pathlib import Path

import jax
import numpy as np
import pytest

from mojax.checkpoint import open_checkpoint
from mojax.find import find

GOLDEN = Path(__file__).parent / "golden"
FUSED = (
    ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"),
    ("mlp.gate_proj", "mlp.up_proj"),
)
STORED = {"BF16": "bfloat16", "F32": "float32"}

# Folder: the weight format and its options. Only what plain round-to-nearest gives; the other folders hold
# searched or solved weights.
FP8_CHANNEL = ("fp8", {"per": "channel"})
FP8_BLOCK = ("fp8", {"per": "block"})
CHECKPOINT = {
    "FP8": ("fp8", {}),
    "FP8_BLOCK": FP8_BLOCK,
    "FP8_CHANNEL_STATIC": FP8_CHANNEL,
    "FP8_DYNAMIC": FP8_CHANNEL,
    "FP8_DYNAMIC_KV": FP8_CHANNEL,
    "FP8_KV": ("fp8", {}),
    "FP8_W8A16": FP8_CHANNEL,
    "MIXED_FP8_NVFP4": ("nvfp4", {}),  # attention: FP8 per channel
    "MXFP4": ("mxfp4", {}),
    "MXFP4A16": ("mxfp4", {}),
    "MXFP8": ("mxfp8", {}),
    "MXFP8A16": ("mxfp8", {}),
    "NVFP4": ("nvfp4", {}),
    "NVFP4A16": ("nvfp4", {}),
    "NVFP4_KV": ("nvfp4", {}),
    "W4A16": ("int4", {}),
    "W4A16_ASYM": ("int4", {"symmetric": False}),
    "W4A16_G32": ("int4", {"group": 32}),
    "W4AFP8_PACKED": ("int4", {}),
    "W8A8": ("int8", {}),
    "W8A8_STATIC": ("int8", {}),
}
FLOAT32 = {
    "FP8_2D_BLOCKWISE_WEIGHT_ONLY_CFG": FP8_BLOCK,
    "FP8_DEFAULT_CFG": ("fp8", {}),
    "FP8_DEFAULT_CFG+FP8_KV_CFG": ("fp8", {}),
    "FP8_PER_CHANNEL_PER_TOKEN_CFG": FP8_CHANNEL,
    "INT4_BLOCKWISE_WEIGHT_ONLY_CFG": ("int4", {}),
    "INT8_DEFAULT_CFG": ("int8", {}),
    "MXFP4_DEFAULT_CFG": ("mxfp4", {}),
    "MXFP8_DEFAULT_CFG": ("mxfp8", {}),
    "NVFP4_DEFAULT_CFG": ("nvfp4", {}),
    "NVFP4_DEFAULT_CFG+NVFP4_KV_CFG": ("nvfp4", {}),
    "W4A16_NVFP4_CFG": ("nvfp4", {}),
}
EDGE = ("FP8_BLOCK", "FP8_DYNAMIC", "MXFP4", "MXFP8", "NVFP4", "W4A16_ASYM", "W8A8")
EDGE_FLOAT32 = ("FP8_DEFAULT_CFG", "MXFP8_DEFAULT_CFG", "NVFP4_DEFAULT_CFG")

FOLDERS = {
    **{f"llmcompressor/{f}": (*CHECKPOINT[f], "checkpoint") for f in CHECKPOINT},
    **{f"llmcompressor-edge/{f}": (*CHECKPOINT[f], "checkpoint") for f in EDGE},
    **{f"modelopt/{f}": (*FLOAT32[f], "float32") for f in FLOAT32},
    **{f"modelopt-edge/{f}": (*FLOAT32[f], "float32") for f in EDGE_FLOAT32},
}

# ModelOpt divides a tensor of zeros by its scale 0 and writes NaN; mojax writes zeros with scale 1.
WRONG = {("modelopt-edge/FP8_DEFAULT_CFG", "model.layers.1.self_attn.v_proj")}


@functools.cache
def source(name):
    return open_checkpoint(GOLDEN / "models" / name)


def group(module):
    """The linears that share an outer scale with `module`."""
    for locals_ in FUSED:
        for local in locals_:
            if module.endswith(local):
                return [module.removesuffix(local) + other for other in locals_]
    return [module]


@functools.cache
def encoded(model, module, name, options, arithmetic):
    """The QTensor of one linear, as numpy arrays."""
    format = find("formats", name).FORMAT(**dict(options), arithmetic=arithmetic)
    weights = source(model)
    w = weights[module + ".weight"]
    outer = None
    if format.fused:
        top = max(np.abs(weights[m + ".weight"].astype(np.float32)).max() for m in group(module))
        outer = format.outer(top, w.dtype)
    return jax.tree.map(np.asarray, format.encode(w, outer))


def nibbles(packed):
    return np.stack([packed & 15, packed >> 4], axis=-1).reshape(*packed.shape[:-1], -1)


def pack_rows(codes):
    """Rows 2i and 2i + 1 in the low and high nibble."""
    return codes[0::2] | codes[1::2] << 4


def written(q, arithmetic, expected):
    """Suffix -> array of what the dialect stores for a weight; bytes only, shapes may differ."""
    name = q.format.name
    inner, outer = q.scales.get("inner"), q.scales.get("outer")
    if name == "nvfp4" and arithmetic == "checkpoint":
        return {"weight_packed": q.codes, "weight_scale": inner, "weight_global_scale": outer}
    if name == "nvfp4":
        return {"weight": q.codes, "weight_scale": inner, "weight_scale_2": outer}
    if name == "int4" and arithmetic == "checkpoint":
        zero = {}
        if "zero" in q.scales:
            words = pack_rows((q.scales["zero"] + 8).astype(np.uint8)).T
            zero["weight_zero_point"] = np.ascontiguousarray(words).view(np.int32).T
        return {"weight_packed": q.codes ^ 0x88, "weight_scale": inner, **zero}
    if name == "int4":
        return {"weight": pack_rows(nibbles(q.codes)), "weight_scale": inner}
    codes = "weight_packed" if "weight_packed" in expected else "weight"
    scale = inner if inner is not None else outer.astype(STORED[expected["weight_scale"]["dtype"]])
    return {codes: q.codes, "weight_scale": scale}


def sha256(array):
    return hashlib.sha256(np.ascontiguousarray(array).tobytes()).hexdigest()


def manifest(folder):
    """module -> suffix -> {dtype, shape, sha256} of one golden folder."""
    modules = {}
    for name, entry in json.loads((GOLDEN / folder / "manifest.json").read_text())["tensors"].items():
        module, _, suffix = name.rpartition(".")
        modules.setdefault(module, {})[suffix] = entry
    return {m: entries for m, entries in modules.items() if m.endswith("_proj") and "norm" not in m}


@pytest.mark.parametrize("folder", FOLDERS)
def test_codes_and_weight_scales_are_the_peers_bytes(folder):
    name, options, arithmetic = FOLDERS[folder]
    model = "llama-edge" if "-edge/" in folder else "llama"
    modules = manifest(folder)
    assert len(modules) == 14
    different = []
    for module, expected in modules.items():
        kind, chosen = name, options
        if folder.endswith("MIXED_FP8_NVFP4") and "self_attn" in module:
            kind, chosen = FP8_CHANNEL
        q = encoded(model, module, kind, tuple(chosen.items()), arithmetic)
        if (folder, module) in WRONG:
            assert not np.asarray(q.format.decode(q)).any()
            continue
        for suffix, array in written(q, arithmetic, expected).items():
            if sha256(array) != expected[suffix]["sha256"]:
                different.append(f"{module}.{suffix}")
    assert not different


@pytest.mark.parametrize("folder", [f for f in FOLDERS if f.startswith("modelopt")])
def test_static_input_scales_are_modelopts_bits(folder):
    name, _, _ = FOLDERS[folder]
    format = find("formats", name).FORMAT(**({"per": "tensor"} if name == "int8" else {}))
    amax = np.load(GOLDEN / folder / "amax.npz")
    modules = manifest(folder)
    scales = {m: e["input_scale"] for m, e in modules.items() if "input_scale" in e}
    assert bool(scales) == (folder not in WITHOUT_INPUT_SCALES)
    for module, entry in scales.items():
        top = amax[module + ".input_quantizer"]
        assert sha256(format.outer(top, np.dtype("bfloat16"))) == entry["sha256"], module


WITHOUT_INPUT_SCALES = {
    "modelopt/FP8_2D_BLOCKWISE_WEIGHT_ONLY_CFG",
    "modelopt/FP8_PER_CHANNEL_PER_TOKEN_CFG",
    "modelopt/INT4_BLOCKWISE_WEIGHT_ONLY_CFG",
    "modelopt/MXFP4_DEFAULT_CFG",
    "modelopt/MXFP8_DEFAULT_CFG",
    "modelopt/W4A16_NVFP4_CFG",
    "modelopt-edge/MXFP8_DEFAULT_CFG",
}


@pytest.mark.parametrize("folder", ["FP8_DEFAULT_CFG+FP8_KV_CFG", "NVFP4_DEFAULT_CFG+NVFP4_KV_CFG"])
def test_cache_scales_are_modelopts_bits(folder):
    amax = np.load(GOLDEN / "modelopt" / folder / "amax.npz")
    modules = manifest(f"modelopt/{folder}")
    seen = 0
    for name in amax.files:
        if name.endswith("_bmm_quantizer"):
            attention, _, quantizer = name.rpartition(".")
            kind = quantizer[0]  # k or v
            entry = modules[f"{attention}.{kind}_proj"][f"{kind}_scale"]
            assert (
                sha256(find("formats", "fp8").FORMAT().outer(amax[name], np.dtype("bfloat16")))
                == entry["sha256"]
            )
            seen += 1
    assert seen == 4


def test_sources_are_what_the_peers_read():
    """The tensors that every tool left as they are have the same bytes in the sources committed here."""
    for folder in FOLDERS:
        weights = source("llama-edge" if "-edge/" in folder else "llama")
        tensors = json.loads((GOLDEN / folder / "manifest.json").read_text())["tensors"]
        assert sha256(weights["model.embed_tokens.weight"]) == tensors["model.embed_tokens.weight"]["sha256"]
