"""Quantize and dequantize: operations against the formats, kernels against the operations bit for bit."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp
from kernel_checks import BLACKWELL, HOPPER, INTERPRET, gpu, lowered

from mojax.errors import InputError
from mojax.formats import fp8, int4, int8, mxfp4, mxfp8, numerics, nvfp4
from mojax.formats.base import encode_leaf
from mojax.kernels.dequantize import dequantize
from mojax.kernels.gpu import dequantize as gpu_dequantize
from mojax.kernels.gpu import quantize as gpu_quantize
from mojax.kernels.gpu import rounding
from mojax.kernels.gpu.lanes import InterpretedLanes
from mojax.kernels.quantize import block_errors, quantize, rotate

BF16, F32 = jnp.bfloat16, jnp.float32
FORMATS = {
    "nvfp4": (nvfp4.FORMAT(), (5, 512)),
    "mxfp4": (mxfp4.FORMAT(), (5, 512)),
    "mxfp8": (mxfp8.FORMAT(), (3, 2, 512)),
    "fp8 tensor": (fp8.FORMAT("tensor"), (5, 512)),
    "fp8 token": (fp8.FORMAT("token"), (3, 1536)),
    "fp8 groups": (fp8.FORMAT("token"), (5, 4, 128)),
    "int8 token": (int8.FORMAT("token"), (9, 512)),
    "int4 32": (int4.FORMAT(32), (5, 512)),
    "int4 128": (int4.FORMAT(128), (5, 512)),
}
LANES = InterpretedLanes()


def of(name, arithmetic="float32"):
    format, shape = FORMATS[name]
    return dataclasses.replace(format, arithmetic=arithmetic), shape


def extremes(shape, dtype, seed=0):
    """Values over many magnitudes, with blocks of zeros, ties, infinities, subnormal and huge numbers."""
    rng = np.random.default_rng(seed)
    x = rng.standard_normal(shape) * np.exp(2 * rng.standard_normal(shape))
    flat = x.reshape(-1)
    flat[0:32] = 0
    flat[64], flat[160] = np.inf, -np.inf
    flat[192:256], flat[256:288], flat[320:352] = 1e-40, 1e-38, 3e38
    flat[352:384] = -0.0
    flat[384:400] = [0, 0.25, 0.5, 0.75, 1.25, 1.75, 2.5, 3.5, 5, 6, -0.25, -0.75, -1.25, -2.5, -5, 6]
    flat[400:416] = flat[384:400] * 2.0**-20
    return jnp.asarray(x.astype(np.float32)).astype(dtype)


def normal(shape, dtype=BF16, seed=0):
    rng = np.random.default_rng(seed)
    return jnp.asarray(rng.standard_normal(shape) * np.exp(rng.standard_normal(shape)), F32).astype(dtype)


def outer_of(format):
    return jnp.float32(0.003) if format.static and format.arithmetic == "float32" else None


def assert_same(a, b):
    """Bit for bit, but that NaN is NaN."""
    a, b = np.asarray(a), np.asarray(b)
    assert a.shape == b.shape and a.dtype == b.dtype
    lost = np.isnan(a.astype(np.float32)) & np.isnan(b.astype(np.float32))
    unsigned = f"u{a.dtype.itemsize}"
    np.testing.assert_array_equal(np.where(lost, 0, a.view(unsigned)), np.where(lost, 0, b.view(unsigned)))


def assert_same_q(a, b):
    assert (a.format, a.shape, a.dtype, set(a.scales)) == (b.format, b.shape, b.dtype, set(b.scales))
    assert_same(a.codes, b.codes)
    for level in a.scales:
        assert_same(a.scales[level], b.scales[level])


@pytest.mark.parametrize("name", FORMATS)
def test_the_operations_are_the_format(name):
    format, shape = of(name)
    x = extremes(shape, BF16)
    q = quantize(x, format, outer=outer_of(format))
    assert_same_q(q, format.encode(x, outer_of(format)))
    assert_same(dequantize(q, dtype=F32), format.decode(q))
    assert dequantize(q).dtype == BF16


@pytest.mark.parametrize(
    ("name", "arithmetic", "dtype"),
    [
        *((name, "float32", BF16) for name in FORMATS),
        *((name, "checkpoint", BF16) for name in ("nvfp4", "mxfp4", "fp8 token", "int8 token")),
        *((name, "float32", F32) for name in ("mxfp4", "int4 128")),
        ("nvfp4", "checkpoint", F32),
    ],
)
def test_quantize_kernel_is_the_reference(name, arithmetic, dtype):
    format, shape = of(name, arithmetic)
    x = extremes(shape, dtype)
    outer = outer_of(format)
    assert gpu_quantize.why_not(x, format, outer=outer) is None
    found = gpu_quantize.quantize(x, format, outer=outer, interpret=INTERPRET)
    assert_same_q(found, format.encode(x, outer))


@pytest.mark.parametrize(
    ("format", "shape"),
    [
        (nvfp4.FORMAT(), (5, 512)),
        (nvfp4.FORMAT(arithmetic="checkpoint"), (5, 512)),
        (mxfp4.FORMAT(), (5, 512)),
        (mxfp8.FORMAT(), (5, 512)),
        (fp8.FORMAT("channel"), (3, 1536)),
        (fp8.FORMAT("block"), (150, 208)),
        (int8.FORMAT(), (5, 512)),
        (int4.FORMAT(32), (5, 512)),
        (int4.FORMAT(128, False), (5, 512)),
    ],
    ids=lambda v: v.label + v.arithmetic if hasattr(v, "label") else "",
)
def test_dequantize_kernel_is_the_reference(format, shape):
    x = normal(shape)
    q = format.encode(x if format.name == "int4" or format.block_rows > 1 else extremes(shape, BF16))
    assert gpu_dequantize.why_not(q) is None
    assert_same(gpu_dequantize.dequantize(q, interpret=INTERPRET), dequantize(q, implementation="xla"))


def test_dequantize_kernel_of_experts_with_scales_of_their_own():
    w = normal((3, 48, 64)) * jnp.arange(1, 4, dtype=BF16)[:, None, None]
    q = encode_leaf(nvfp4.FORMAT(), w, contract=(1,), batch=(0,))
    found = gpu_dequantize.dequantize(q, dtype=F32, interpret=INTERPRET)
    assert_same(found, dequantize(q, dtype=F32, implementation="xla"))


def test_nan_takes_its_block_and_no_other():
    x = normal((8, 512)).at[3, 40].set(jnp.nan)
    q = gpu_quantize.quantize(x, nvfp4.FORMAT(), outer=jnp.float32(0.01), interpret=INTERPRET)
    lost = np.isnan(np.asarray(q.scales["inner"], np.float32))
    assert np.argwhere(lost).tolist() == [[3, 2]]
    clean = nvfp4.FORMAT().encode(jnp.where(jnp.isnan(x), 1, x), jnp.float32(0.01))
    keep = np.repeat(~lost, 8, axis=1)
    np.testing.assert_array_equal(np.asarray(q.codes)[keep], np.asarray(clean.codes)[keep])


def test_rotation_kernel_is_the_reference(hadamard=128):
    x = normal((5, 512))
    options = {"outer": None, "hadamard": hadamard}
    found = gpu_quantize.quantize(x, nvfp4.FORMAT(), **options, interpret=INTERPRET)
    assert_same_q(found, quantize(x, nvfp4.FORMAT(), **options, implementation="xla"))


@pytest.mark.parametrize("hadamard", [16, 32, 64, 128])
def test_rotation_is_sylvesters_and_its_own_inverse(hadamard):
    h = np.ones((1, 1))
    while len(h) < hadamard:
        h = np.kron([[1, 1], [1, -1]], h)
    x = normal((7, 256), F32)
    y = np.asarray(x, np.float64).reshape(7, -1, hadamard) @ h / np.sqrt(hadamard)
    np.testing.assert_allclose(rotate(x, hadamard), y.reshape(7, 256), rtol=1e-5, atol=1e-5)
    np.testing.assert_allclose(rotate(rotate(x, hadamard), hadamard), x, rtol=1e-5, atol=1e-5)


def ties(rng, count):
    """Blocks where many scales are nearly as good: few values, all multiples of one step."""
    return jnp.asarray(rng.integers(-12, 13, (count, 16)) * 2.0 ** rng.integers(-9, 9, (count, 1)), F32)


@pytest.mark.parametrize("arithmetic", ["float32", "checkpoint"])
@pytest.mark.parametrize("outer", [None, 0.003, 40.0])
def test_sweep_finds_the_best_of_all_scales(arithmetic, outer):
    format = nvfp4.FORMAT(arithmetic=arithmetic)
    rng = np.random.default_rng(2)
    x = jnp.concatenate([normal((100, 16), F32), ties(rng, 100), extremes((32, 16), F32)])
    x = jnp.where(jnp.isfinite(x) & (jnp.abs(x) < 1e30), x, 1)
    given = None if outer is None else jnp.float32(outer)
    plain = format.fit(x, given)

    def error_of(code):
        inner = jax.lax.bitcast_convert_type(
            jnp.full_like(plain["inner"], 0, jnp.uint8) + code, jnp.float8_e4m3fn
        )
        return block_errors(x, format, {**plain, "inner": inner})

    best = jnp.min(jax.lax.map(error_of, jnp.arange(1, 127, dtype=jnp.uint8)), axis=0)
    found = block_errors(x, format, quantize(x, format, outer=given, sweep=True, implementation="xla").scales)
    best = jnp.minimum(best, block_errors(x, format, plain))
    np.testing.assert_allclose(found, best, rtol=1e-5, atol=1e-9)  # sums of squares are fused here and there


def test_sweep_kernel_finds_scales_as_good_as_the_reference():
    x, format = extremes((5, 512), BF16), nvfp4.FORMAT()
    x = jnp.where(jnp.isfinite(x) & (jnp.abs(x) < 1e30), x, 1)
    kernel = gpu_quantize.quantize(x, format, sweep=True, interpret=INTERPRET)
    reference = quantize(x, format, sweep=True, implementation="xla")
    a, b = (block_errors(x, format, q.scales) for q in (kernel, reference))
    np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-9)  # sums of squares are fused on some devices
    assert_same_q(kernel, format.encode_as(x, kernel.scales))


finite = hnp.arrays(np.float32, 64, elements=st.floats(-7, 7, width=32, allow_subnormal=False))


@settings(max_examples=50, deadline=None)
@given(finite)
def test_e2m1_in_registers_is_e2m1(x):
    a, negative = jnp.minimum(jnp.abs(x), 6.5), jnp.asarray(x < 0)
    code, value = rounding.e2m1(a, negative)
    wanted = numerics.e2m1(jnp.asarray(x), negative)
    np.testing.assert_array_equal(code & 15, wanted.astype(jnp.uint32))
    np.testing.assert_array_equal(value, jnp.abs(numerics.e2m1_value(wanted)))


def test_e4m3_in_registers_is_e4m3():
    codes = jnp.arange(127, dtype=jnp.uint8)
    values = np.asarray(jax.lax.bitcast_convert_type(codes, jnp.float8_e4m3fn), np.float32)
    ties_ = (values[1:] + values[:-1]) / 2
    near = np.concatenate(
        [values, ties_, np.nextafter(ties_, 0), np.nextafter(ties_, 500), [448, 464, 1e9, np.inf]]
    )
    a = jnp.asarray(near, F32)
    code, value = rounding.e4m3(LANES, a)
    wanted = numerics.e4m3(a)
    np.testing.assert_array_equal(code, jax.lax.bitcast_convert_type(wanted, jnp.uint8).astype(jnp.uint32))
    np.testing.assert_array_equal(value, wanted.astype(F32))
    np.testing.assert_array_equal(rounding.from_e4m3(code), value)


def test_what_cannot_be_is_said():
    x = normal((4, 96))
    with pytest.raises(InputError, match="last axis 96 is not divisible by 128"):
        quantize(x, int4.FORMAT(128))
    with pytest.raises(InputError, match="K = 96 is no multiple of hadamard = 64"):
        quantize(x, nvfp4.FORMAT(), hadamard=64)
    with pytest.raises(InputError, match="hadamard is 8; needed"):
        quantize(x, nvfp4.FORMAT(), hadamard=8)
    with pytest.raises(InputError, match="sweep is for nvfp4, not mxfp4"):
        quantize(x, mxfp4.FORMAT(), sweep=True)
    with pytest.raises(InputError, match="x is int32"):
        quantize(jnp.zeros((4, 96), jnp.int32), nvfp4.FORMAT())
    with pytest.raises(InputError, match=r"x \(0, 96\) has no values"):
        quantize(x[:0], mxfp4.FORMAT())
    q = dataclasses.replace(nvfp4.FORMAT().encode(x), order="tiles")
    with pytest.raises(InputError, match="in the order 'tiles'"):
        dequantize(q)


def test_kernels_say_what_they_cannot_take():
    x = normal((8, 1000))

    def why(x, format, **options):
        return str(gpu_quantize.why_not(x, format, **options))

    assert "float16" in why(x.astype(jnp.float16), fp8.FORMAT("tensor"))
    assert "K = 1000" in why(x, fp8.FORMAT("token"))
    assert "K = 1000" in why(x, fp8.FORMAT("tensor"))
    assert "no kernel" in why(x, fp8.FORMAT("block"))
    assert "no kernel" in why(normal((8, 512)), int4.FORMAT(128, False))
    assert "less than 2048" in why(x[:1], nvfp4.FORMAT())
    assert "no whole runs" in why(normal((8, 1536)), fp8.FORMAT("token"), hadamard=128)
    q = int4.FORMAT(8).encode(normal((16, 512)))
    assert "less than 16 neighbouring" in str(gpu_dequantize.why_not(q))
    assert "float16" in str(gpu_dequantize.why_not(q, dtype=jnp.float16))


SHAPES = [(4096, 14336), (16, 5120), (1, 4096)]


@pytest.mark.parametrize("arch", [HOPPER, BLACKWELL], ids=["sm_90", "sm_100"])
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_kernels_lower(shape, arch):
    x = jax.ShapeDtypeStruct(shape, BF16)
    outer = jax.ShapeDtypeStruct((), F32)
    lowered(lambda x, s: gpu_quantize.quantize(x, nvfp4.FORMAT(), outer=s), x, outer, arch=arch)
    lowered(lambda x: gpu_quantize.quantize(x, fp8.FORMAT("token")), x, arch=arch)
    q = nvfp4.FORMAT().spec(shape, np.dtype(BF16))
    lowered(gpu_dequantize.dequantize, q, arch=arch)


@pytest.mark.parametrize("name", FORMATS)
@pytest.mark.parametrize("dtype", [BF16, F32], ids=["bf16", "f32"])
def test_every_format_lowers(name, dtype):
    format, _ = of(name, "checkpoint")
    shape = (4096, 32, 128) if name == "fp8 groups" else (4096, 4096)
    x = jax.ShapeDtypeStruct(shape, dtype)
    lowered(lambda x: gpu_quantize.quantize(x, format), x)
    lowered(gpu_dequantize.dequantize, format.spec(shape, np.dtype(dtype)))


@pytest.mark.parametrize("arch", [HOPPER, BLACKWELL], ids=["sm_90", "sm_100"])
def test_sweep_and_rotation_lower(arch):
    x = jax.ShapeDtypeStruct((4096, 4096), BF16)
    lowered(lambda x: gpu_quantize.quantize(x, nvfp4.FORMAT(), sweep=True), x, arch=arch)
    lowered(lambda x: gpu_quantize.quantize(x, nvfp4.FORMAT(), hadamard=128), x, arch=arch)


def on_cpu(fn, *args):
    """The reference where division is IEEE's: with JAX_PLATFORMS=cuda,cpu."""
    cpu = jax.devices("cpu")[0]
    with jax.default_device(cpu):
        return fn(*(jax.device_put(a, cpu) for a in args))


@gpu
@pytest.mark.parametrize("name", [n for n in FORMATS if n != "fp8 groups"])
@pytest.mark.parametrize("arithmetic", ["float32", "checkpoint"])
@pytest.mark.parametrize("shape", [*gpu_quantize.SHAPES, (3, 2560), (129, 4096)], ids=str)
@pytest.mark.parametrize("dtype", [BF16, F32], ids=["bf16", "f32"])
def test_quantize_on_a_gpu_is_the_reference(name, arithmetic, shape, dtype):
    format, _ = of(name, arithmetic)
    x = normal(shape, dtype, seed=3)
    outer = jnp.float32(0.003) if format.static else None
    found = quantize(x, format, outer=outer, implementation="mosaic")
    wanted = on_cpu(lambda x: format.encode(x, None if outer is None else jnp.float32(0.003)), x)
    assert_same_q(found, wanted)
    assert_same(dequantize(found, implementation="mosaic"), on_cpu(dequantize, wanted))


@gpu
@pytest.mark.parametrize("name", FORMATS)
@pytest.mark.parametrize("arithmetic", ["float32", "checkpoint"])
def test_extremes_on_a_gpu(name, arithmetic):
    format, shape = of(name, arithmetic)
    x = extremes(shape, BF16)
    x = jnp.where(jnp.abs(x) < 1e-30, 0, x)  # a CPU flushes subnormal numbers
    outer = jnp.float32(0.003) if format.static else None
    found = quantize(x, format, outer=outer, implementation="mosaic")
    assert_same_q(found, on_cpu(lambda x: format.encode(x, None if outer is None else jnp.float32(0.003)), x))


@gpu
@pytest.mark.parametrize("hadamard", [None, 16, 32, 64, 128])
@pytest.mark.parametrize("sweep", [False, True])
def test_rotation_and_sweep_on_a_gpu(hadamard, sweep):
    x, format = normal((1000, 4096), seed=4), nvfp4.FORMAT()
    outer = jnp.float32(0.01)
    found = quantize(x, format, outer=outer, hadamard=hadamard, sweep=sweep, implementation="mosaic")

    def reference(x):
        y = rotate(x, hadamard) if hadamard else x
        q = quantize(y, format, outer=jnp.float32(0.01), sweep=sweep, implementation="xla")
        return q, block_errors(y, format, q.scales), block_errors(y, format, found_on_cpu.scales)

    found_on_cpu = jax.device_put(found, jax.devices("cpu")[0])
    q, least, error = on_cpu(reference, x)
    np.testing.assert_allclose(error, least, rtol=1e-5, atol=1e-9)
    if not sweep:
        assert_same_q(found_on_cpu, q)


@gpu
def test_nan_on_a_gpu_takes_its_block_and_no_other():
    x = normal((8, 512)).at[3, 40].set(jnp.nan)
    q = quantize(x, nvfp4.FORMAT(), outer=jnp.float32(0.01), implementation="mosaic")
    assert np.argwhere(np.isnan(np.asarray(q.scales["inner"], np.float32))).tolist() == [[3, 2]]
    lost = np.isnan(np.asarray(dequantize(q, implementation="mosaic"), np.float32))
    assert lost[3, 32:48].all() and lost.sum() == 16
