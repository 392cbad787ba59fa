"""compressed-tensors' own code gives the same bytes for bfloat16, float16 and float32 weights."""

import jax
import ml_dtypes
import numpy as np
import pytest
import torch
from compressed_tensors.compressors.mx_utils import compress_mx_scale
from compressed_tensors.compressors.nvfp4.helpers import pack_fp4_to_uint8
from compressed_tensors.quantization import QuantizationArgs
from compressed_tensors.quantization.lifecycle.forward import fake_quantize, quantize
from compressed_tensors.quantization.utils import calculate_qparams, generate_gparam

from mojax.find import find

VIEW = {
    torch.bfloat16: (torch.int16, ml_dtypes.bfloat16),
    torch.float8_e4m3fn: (torch.uint8, ml_dtypes.float8_e4m3fn),
}
ARGS = {
    "nvfp4": {
        "num_bits": 4,
        "type": "float",
        "strategy": "tensor_group",
        "group_size": 16,
        "scale_dtype": torch.float8_e4m3fn,
    },
    "mxfp4": {
        "num_bits": 4,
        "type": "float",
        "strategy": "group",
        "group_size": 32,
        "scale_dtype": torch.uint8,
    },
    "mxfp8": {
        "num_bits": 8,
        "type": "float",
        "strategy": "group",
        "group_size": 32,
        "scale_dtype": torch.uint8,
    },
    "fp8 tensor": {"num_bits": 8, "type": "float", "strategy": "tensor"},
    "fp8 channel": {"num_bits": 8, "type": "float", "strategy": "channel"},
    "int8 channel": {"num_bits": 8, "type": "int", "strategy": "channel"},
    "int8 tensor": {"num_bits": 8, "type": "int", "strategy": "tensor"},
    "int4": {"num_bits": 4, "type": "int", "strategy": "group", "group_size": 128},
    "int4 asymmetric": {
        "num_bits": 4,
        "type": "int",
        "strategy": "group",
        "group_size": 128,
        "symmetric": False,
    },
}


def format_of(scheme):
    name, _, option = scheme.partition(" ")
    options = {"": {}, "asymmetric": {"symmetric": False}}.get(option, {"per": option})
    return find("formats", name).FORMAT(**options, arithmetic="checkpoint")


def to_numpy(t):
    if t.dtype not in VIEW:
        return t.numpy()
    raw, dtype = VIEW[t.dtype]
    return t.view(raw).numpy().view(dtype)


def weight(dtype):
    torch.manual_seed(0)
    w = torch.randn(96, 256) * torch.exp(torch.randn(96, 256))
    w[0] = 0
    w[1, :128] = 0
    w[2, :128] = -3e-4
    w[4, 7] = 96
    w[5, ::2] = -0.0
    w[6] = -0.75
    w[7] = torch.linspace(-1, 3, 256)
    w[8] = torch.linspace(0.01, 1, 256)
    w[9:40] *= 0.01
    return w.to(dtype)


def peer(w, scheme):
    """Codes (integers or E4M3, unpacked FP4 packed) and scales, as llm-compressor makes them."""
    args = QuantizationArgs(**ARGS[scheme])
    if args.group_size:
        parts = w.unflatten(-1, (-1, args.group_size))
        low, high = parts.amin(-1), parts.amax(-1)
    elif args.strategy == "channel":
        low, high = w.amin(-1, keepdim=True), w.amax(-1, keepdim=True)
    else:
        low, high = w.min().reshape(1), w.max().reshape(1)
    g = generate_gparam(w.min().reshape(1), w.max().reshape(1)) if scheme == "nvfp4" else None
    scale, zero = calculate_qparams(low, high, args, global_scale=g)
    stored = {torch.int8: torch.int8, "float": torch.float8_e4m3fn}[
        "float" if args.type == "float" else torch.int8
    ]
    codes = quantize(w, scale, None if args.symmetric else zero, args, global_scale=g)
    codes = pack_fp4_to_uint8(codes) if scheme in ("nvfp4", "mxfp4") else codes.to(stored)
    if scheme.startswith("mx"):
        scale = compress_mx_scale(scale, torch.uint8)
    elif scheme == "nvfp4":
        scale = scale.to(torch.float8_e4m3fn)
    fake = fake_quantize(
        w, calculate_qparams(low, high, args, global_scale=g)[0], None if args.symmetric else zero, args, g
    )
    return to_numpy(codes), to_numpy(scale), None if args.symmetric else to_numpy(zero), g, fake


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32], ids=str)
@pytest.mark.parametrize("scheme", ARGS)
def test_the_same_codes_scales_and_simulated_values(scheme, dtype):
    w = weight(dtype)
    codes, scale, zero, g, fake = peer(w, scheme)
    format = format_of(scheme)
    q = jax.tree.map(np.asarray, format.encode(to_numpy(w)))
    if scheme.startswith("int4"):
        unpacked = np.stack([q.codes & 15, q.codes >> 4], axis=-1).reshape(w.shape).astype(np.int8)
        q_codes = (unpacked ^ 8) - 8
    else:
        q_codes = q.codes
    assert q_codes.tobytes() == codes.tobytes()
    if "inner" in q.scales:
        assert q.scales["inner"].dtype == scale.dtype
        assert q.scales["inner"].tobytes() == scale.tobytes()
    else:
        assert q.scales["outer"] == scale.astype(np.float32)
    if zero is not None:
        assert q.scales["zero"].tobytes() == zero.astype(np.int8).tobytes()
    if g is not None:
        assert q.scales["outer"] == g.numpy()
    np.testing.assert_array_equal(
        np.asarray(format.fake(to_numpy(w))).astype(np.float32), fake.float().numpy()
    )


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32], ids=str)
@pytest.mark.parametrize("name", ["nvfp4", "fp8", "int8"])
def test_the_same_outer_scale_for_any_maximum(name, dtype):
    scheme = name if name == "nvfp4" else f"{name} tensor"
    # From 0.05 on: below, 2688 / amax leaves float16 and compressed-tensors falls back to 1.
    top = torch.cat([torch.linspace(0.05, 200, 3000), torch.tensor([0.0])]).to(dtype)
    if name == "nvfp4":
        expected = torch.stack([generate_gparam(-t.reshape(1), t.reshape(1)) for t in top])
    else:
        args = QuantizationArgs(**ARGS[scheme])
        expected = calculate_qparams(-top.reshape(-1, 1), top.reshape(-1, 1), args)[0]
    format = format_of(scheme)
    scales = jax.jit(jax.vmap(lambda t: format.outer(t, to_numpy(top).dtype)))(top.float().numpy())
    np.testing.assert_array_equal(np.asarray(scales), expected.float().reshape(-1).numpy())
