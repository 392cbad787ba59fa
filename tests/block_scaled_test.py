"""Block-scaled matmul for Blackwell: what the kernel is given, that it lowers, that its pipeline is right."""

import dataclasses
import re
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from kernel_checks import BLACKWELL, INTERPRET, REGISTERS, gpu, lowered

from mojax.errors import InputError
from mojax.formats.base import QTensor
from mojax.formats.fp8 import FP8
from mojax.formats.mxfp4 import MXFP4
from mojax.formats.mxfp8 import MXFP8
from mojax.formats.nvfp4 import NVFP4
from mojax.kernels.base import compute_capability
from mojax.kernels.gpu import block_scaled as kernel
from mojax.kernels.gpu import cudnn_scaled
from mojax.kernels.gpu.scaled_operands import KINDS

FORMATS = (NVFP4, MXFP4, MXFP8)
BF16 = jnp.dtype(jnp.bfloat16)
INSTRUCTION = {
    NVFP4: r"kind::mxf4nvf4\.block_scale",
    MXFP4: r"kind::mxf4(nvf4)?\.block_scale",  # both take E8M0 scales per 32
    MXFP8: r"kind::mxf8f6f4\.block_scale",
}


def encoded(format, shape, seed=0, spread=8.0):
    """Numbers of many magnitudes, blocks of zeros among them."""
    rng = np.random.default_rng(seed)
    x = rng.standard_normal(shape) * 2.0 ** rng.uniform(-spread, spread, (shape[0], 1))
    x[:, 32:64] = 0
    return format.encode(jnp.asarray(x, BF16))


def product(x, q, bias=None):
    """float64 of what the codes and scales stand for."""
    y = np.asarray(x.format.decode(x), np.float64) @ np.asarray(q.format.decode(q), np.float64).T
    return y if bias is None else y + np.asarray(bias, np.float64)


def magnitude(x, q):
    """The sums of magnitudes, `[M, N]`, that rounding errors are measured by."""
    return np.abs(np.asarray(x.format.decode(x), np.float64)) @ np.abs(
        np.asarray(q.format.decode(q), np.float64).T
    )


def values(codes, tiles, kind):
    """float64 `[rows, K]` from codes, and from the bytes that `tcgen05.cp` reads, by address."""
    assert codes.dtype == kind.codes
    found = np.asarray(codes).astype(np.float64)
    flat = np.asarray(tiles).reshape(-1)
    r, c = np.indices((len(codes), found.shape[1] // kind.block))
    address = (r // 128 * tiles.shape[1] + c // 4) * 512 + r % 32 * 16 + r % 128 // 32 * 4 + c % 4
    return found * np.repeat(flat[address].astype(np.float64), kind.block, axis=1)


@pytest.mark.parametrize("shape", [(128, 4), (256, 8), (384, 32), (200, 10), (1, 1)])
def test_scales_lie_where_the_hardware_reads_them(shape):
    scales = np.random.default_rng(0).integers(0, 256, shape).astype(np.uint8)
    tiles = np.asarray(kernel.scale_layout(jnp.asarray(scales)))
    n, m = -(-shape[0] // 128), -(-shape[1] // 4)
    want = np.zeros(n * m * 512, np.uint8)
    for r, c in np.ndindex(shape):
        want[(r // 128 * m + c // 4) * 512 + r % 32 * 16 + r % 128 // 32 * 4 + c % 4] = scales[r, c]
    assert tiles.shape == (n, m, 32, 16)
    assert np.array_equal(tiles.reshape(-1), want)


@pytest.mark.parametrize("format", FORMATS)
def test_restore_is_the_inverse_of_repack(format):
    q = encoded(format(), (200, 1056))
    there = kernel.repack(q)
    back = kernel.restore(there)
    assert there.order and back.order == ""
    assert back.scales["inner"].dtype == q.scales["inner"].dtype
    same = jax.tree.map(lambda a, b: np.array_equal(np.asarray(a), np.asarray(b)), back, q)
    assert all(jax.tree.leaves(same))
    with pytest.raises(InputError, match="already"):
        kernel.repack(there)
    with pytest.raises(InputError, match="only 'tcgen05'"):
        kernel.restore(q)
    with pytest.raises(InputError, match="order"):
        q.format.decode(there)


@pytest.mark.parametrize("arithmetic", ["checkpoint", "float32"])
@pytest.mark.parametrize("format", FORMATS)
def test_what_the_kernel_is_given_has_the_product_of_the_reference(format, arithmetic):
    x = encoded(format(), (13, 1152), 1)
    q = encoded(format(arithmetic=arithmetic), (256, 1152), 2, 0.0 if format is NVFP4 else 30.0)
    bias = jnp.linspace(-9, 9, 256).astype(BF16)
    given, kind = kernel.operands(x, q, bias), KINDS[format]
    again = kernel.operands(x, kernel.repack(q), bias)
    assert all(np.array_equal(np.asarray(a), np.asarray(b)) for a, b in zip(given, again, strict=True))
    assert given[0].shape[0] == 128 and given[2].shape[0] == 256
    assert given[1].dtype == given[3].dtype == kind.scales
    found = values(given[0], given[1], kind) @ values(given[2], given[3], kind).T * float(given[4][0])
    assert not found[13:].any()
    error = np.abs(found[:13] + np.asarray(given[5], np.float64) - product(x, q, bias))
    assert np.all(error <= 1e-6 * magnitude(x, q) + 1e-30)


def test_outer_scales_of_both_operands_and_arithmetics_multiply_the_sums():
    x, q = encoded(NVFP4(arithmetic="checkpoint"), (1, 128)), encoded(NVFP4(), (128, 128), 3)
    after = kernel.operands(x, q)[4]
    want = np.float32(q.scales["outer"]) / np.float32(x.scales["outer"])
    assert after.shape == (1,)
    np.testing.assert_allclose(np.asarray(after)[0], want, rtol=1e-6)


@pytest.mark.parametrize("format", FORMATS)
@pytest.mark.parametrize("M, N, K", [*kernel.SHAPES, (1, 128, 128), (16, 2048, 1152)])
def test_a_plan_covers_the_product_and_fits_twice_on_a_multiprocessor(format, M, N, K):
    p = kernel.plan(M, N, K, KINDS[format])
    assert p.steps * p.depth == K and 0 < p.stages <= p.steps
    assert p.grid[0] * p.rows >= M > (p.grid[0] - 1) * 128 and p.grid[1] * 128 == N
    assert p.rows % 8 == 0 and (p.rows == 128 or p.grid[0] == 1)
    assert 2 * p.stages * 128 * (p.width + p.columns) <= 113 * 1024  # of shared memory
    assert 128 + 2 * p.stages * p.columns <= 256  # of 512 columns of tensor memory
    assert p.width in (64, 128) and p.columns % 4 == 0


@pytest.mark.parametrize("format", FORMATS)
@pytest.mark.parametrize("M, N, K", [*kernel.SHAPES, (1, 128, 128), (16, 2048, 1152)])
def test_lowers_for_blackwell(format, M, N, K):
    x, q = format().spec((M, K), BF16), format().spec((N, K), BF16)
    text = lowered(lambda x, q: kernel.block_scaled(x, q, dtype=BF16), x, q, arch=BLACKWELL)
    assert re.search(INSTRUCTION[format], text)


@pytest.mark.parametrize("dtype", [jnp.bfloat16, jnp.float16, jnp.float32])
def test_lowers_with_a_bias_and_a_repacked_weight(dtype):
    def run(x, q, bias):
        return kernel.block_scaled(x, kernel.repack(q), dtype=dtype, bias=bias)

    x, q = NVFP4().spec((300, 4096), BF16), NVFP4().spec((512, 4096), BF16)
    text = lowered(run, x, q, jax.ShapeDtypeStruct((512,), BF16), arch=BLACKWELL)
    assert re.search(INSTRUCTION[NVFP4], text)


def test_why_not():
    x, q = NVFP4().spec((16, 256), BF16), NVFP4().spec((128, 256), BF16)

    def why(x: Any = x, q: Any = q, dtype: Any = BF16, **options):
        return kernel.why_not(x, q, dtype=dtype, **options)

    assert why() is None
    assert why(x=jnp.zeros((16, 256))) == "inputs are not quantized"
    assert why(x=MXFP4().spec((16, 256), BF16)) == "inputs are mxfp4, the weight nvfp4"
    assert why(x=NVFP4().spec((16, 128), BF16)) == "inputs have K = 128, the weight 256"
    none = dataclasses.replace(x, codes=jax.ShapeDtypeStruct((0, 128), jnp.uint8), shape=(0, 256))
    assert why(x=none) == "there are no inputs"
    assert why(q=NVFP4().spec((96, 256), BF16)) == "N = 96 is no multiple of 128"
    odd = NVFP4().spec((16, 320), BF16), NVFP4().spec((128, 320), BF16)
    assert why(*odd) == "K = 320 is no multiple of 128"
    assert why(dtype=jnp.int8) == "the result is int8"
    assert why(bias=jnp.zeros(127)) == "the bias has shape (127,), not (128,)"
    assert why(q=dataclasses.replace(q, order="hopper")) == "the codes are in the order 'hopper'"
    assert why(q=dataclasses.replace(q, order="tcgen05")) is None
    experts = NVFP4().spec((2, 128, 256), BF16, batch=(0,), contract=(2,))
    assert why(q=experts) == f"{experts!r} is no matrix"
    eight = FP8().spec((16, 256), BF16), FP8().spec((128, 256), BF16)
    assert why(*eight) == f"{FP8.name} is no block-scaled format of the tensor core"
    with pytest.raises(InputError, match="block_scaled: K = 320 is no multiple of 128"):
        kernel.block_scaled(*odd, dtype=BF16)


interpreted = pytest.mark.skipif(not REGISTERS, reason="tensor memory needs the interpreter of jax 0.11")


@interpreted
@pytest.mark.parametrize(
    "format, M, K, dtype",
    [(NVFP4, 136, 1152, jnp.float32), (MXFP4, 13, 1024, jnp.bfloat16), (MXFP8, 128, 640, jnp.float32)],
)
def test_the_pipeline_without_races(format, M, K, dtype):
    x, q = encoded(format(), (M, K), 1), encoded(format(arithmetic="checkpoint"), (256, K), 2, 0.0)
    bias = jnp.linspace(-1, 1, 256).astype(BF16)
    watched = dataclasses.replace(INTERPRET, detect_races=True)
    y = kernel.block_scaled(x, kernel.repack(q), dtype=dtype, bias=bias, interpret=watched)
    assert y.shape == (M, 256) and y.dtype == dtype
    error = np.abs(np.asarray(y, np.float64) - product(x, q, bias))
    rounding = float(jnp.finfo(dtype).eps) / 2 * np.abs(product(x, q, bias))
    assert np.all(error <= 1e-5 * magnitude(x, q) + 1.01 * rounding + 1e-6)


@interpreted
def test_nan_stays_in_its_column():
    x, q = encoded(NVFP4(), (8, 256), 1), encoded(NVFP4(), (128, 256), 2)
    inner = q.scales["inner"].at[5, 3].set(jnp.asarray(jnp.nan, jnp.float8_e4m3fn))
    q = dataclasses.replace(q, scales={**q.scales, "inner": inner})
    y = np.asarray(kernel.block_scaled(x, q, dtype=jnp.float32, interpret=INTERPRET))
    assert np.array_equal(np.isnan(y).all(0), np.arange(128) == 5)
    assert np.isfinite(np.delete(y, 5, axis=1)).all()


@pytest.mark.parametrize("format", [NVFP4, MXFP8])
def test_the_library_call_lowers(format):
    x, q = format().spec((16, 4096), BF16), format().spec((6144, 4096), BF16)

    def run(x, q, bias):
        return cudnn_scaled.scaled_matmul(x, q, dtype=BF16, bias=bias)

    traced = jax.jit(run).trace(x, q, jax.ShapeDtypeStruct((6144,), BF16))
    text = traced.lower(lowering_platforms=("cuda",)).as_text()
    (call,) = [line for line in text.splitlines() if "__op$block_scaled_dot" in line]
    elements = {NVFP4: "f4E2M1FN", MXFP8: "f8E4M3FN"}[format]
    scales = {NVFP4: "256xf8E4M3FN", MXFP8: "128xf8E8M0FNU"}[format]
    assert f"tensor<1x16x4096x{elements}>" in call and f"tensor<1x6144x4096x{elements}>" in call
    assert f"tensor<1x16x{scales}>" in call and f"tensor<1x6144x{scales}>" in call


@pytest.mark.skipif(not REGISTERS, reason="jax 0.10 has no CPU form of scaled_matmul")
@pytest.mark.parametrize("format", [NVFP4, MXFP8])
def test_the_library_call_equals_the_reference(format):
    x, q = encoded(format(), (13, 320), 1), encoded(format(arithmetic="checkpoint"), (96, 320), 2, 0.0)
    bias = jnp.linspace(-1, 1, 96).astype(BF16)
    y = cudnn_scaled.scaled_matmul(x, q, dtype=jnp.float32, bias=bias)
    error = np.abs(np.asarray(y, np.float64) - product(x, q, bias))
    assert np.all(error <= 1e-5 * magnitude(x, q) + 1e-6)


def test_why_not_the_library_call():
    def why(x, q, dtype=BF16, **options):
        return cudnn_scaled.why_not(x, q, dtype=dtype, **options)

    x, q = NVFP4().spec((16, 320), BF16), NVFP4().spec((96, 320), BF16)
    four = MXFP4().spec((16, 320), BF16), MXFP4().spec((96, 320), BF16)
    assert why(x, q) is None
    assert why(*four) == "cuDNN multiplies nvfp4 and mxfp8, not mxfp4"
    assert why(jnp.zeros((16, 320)), q) == "inputs are not quantized"
    assert why(x, dataclasses.replace(q, order="tcgen05")) == "the scales are in the order 'tcgen05'"
    assert why(x, q, jnp.int32) == "the result is int32"
    assert why(x, q, bias=jnp.zeros(95)) == "the bias has shape (95,), not (96,)"
    with pytest.raises(InputError, match="scaled_matmul: cuDNN multiplies"):
        cudnn_scaled.scaled_matmul(*four, dtype=BF16)


def on_device(format, M, N, K):
    """Operands of a real size, encoded on the device."""

    def one(key, shape):
        return format().encode(jax.random.normal(key, shape, BF16))

    a, b = jax.random.split(jax.random.key(M + N + K))
    return jax.jit(one, static_argnums=1)(a, (M, K)), jax.jit(one, static_argnums=1)(b, (N, K))


@gpu
@pytest.mark.parametrize("run", [kernel.block_scaled, cudnn_scaled.scaled_matmul])
@pytest.mark.parametrize("format", FORMATS)
@pytest.mark.parametrize("M, N, K", [*kernel.SHAPES, (1, 128, 128), (16, 2048, 1152)])
def test_on_blackwell(run, format, M, N, K):
    if compute_capability() != 10:
        pytest.skip("needs compute capability 10.x")
    x, q = on_device(format, M, N, K)
    if run is cudnn_scaled.scaled_matmul and cudnn_scaled.why_not(x, q, dtype=jnp.float32):
        pytest.skip("cuDNN does not multiply this format")
    jax.block_until_ready(
        jnp.full((2 * M + 256, N), jnp.nan, jnp.float32)
    )  # what memory of results begins as
    y = np.asarray(jax.jit(lambda x, q: run(x, q, dtype=jnp.float32))(x, q))
    few = np.random.default_rng(0).permutation(N)[:64]
    part = dataclasses.replace(
        q,
        codes=q.codes[few],
        scales={**q.scales, "inner": q.scales["inner"][few]},
        shape=(64, K),
    )
    assert isinstance(part, QTensor) and np.isfinite(y).all()
    assert np.all(np.abs(y[:, few] - product(x, part)) <= 1e-5 * magnitude(x, part) + 1e-6)


@gpu
@pytest.mark.parametrize("format", [NVFP4, MXFP8])
def test_nan_on_blackwell(format):
    if compute_capability() != 10:
        pytest.skip("needs compute capability 10.x")
    x, q = on_device(format, 200, 256, 512)
    if format is MXFP8:
        q = dataclasses.replace(q, codes=q.codes.at[5, 3].set(jnp.asarray(jnp.nan, jnp.float8_e4m3fn)))
    else:
        inner = q.scales["inner"].at[5, 3].set(jnp.asarray(jnp.nan, jnp.float8_e4m3fn))
        q = dataclasses.replace(q, scales={**q.scales, "inner": inner})
    y = np.asarray(kernel.block_scaled(x, kernel.repack(q), dtype=jnp.bfloat16)).astype(np.float32)
    assert np.array_equal(np.isnan(y).all(0), np.arange(256) == 5)
    assert np.isfinite(np.delete(y, 5, axis=1)).all()
