"""Few inputs times an encoded weight: the order for the kernel, the kernel interpreted, lowered and run."""

import dataclasses
import math

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
from kernel_checks import INTERPRET, gpu, lowered

from mojax.errors import InputError
from mojax.formats.fp8 import FP8
from mojax.formats.int4 import INT4
from mojax.formats.int8 import INT8
from mojax.formats.leaf import encode_leaf
from mojax.formats.mxfp4 import MXFP4
from mojax.formats.mxfp8 import MXFP8
from mojax.formats.numerics import e2m1_value, unpack
from mojax.formats.nvfp4 import NVFP4
from mojax.kernels.gpu import fragments
from mojax.kernels.gpu.fragments import BYTES, FIELDS, MEMORY_REGISTERS, ROWS, Block, moved, specs
from mojax.kernels.gpu.weight_only import (
    SHAPES,
    SMS,
    Tiles,
    arrays,
    permuted,
    repack,
    restore,
    sums,
    tiles,
    weight_only,
    why_not,
)

FORMATS = {
    "nvfp4": NVFP4(),
    "nvfp4 ct": NVFP4(arithmetic="checkpoint"),
    "mxfp4": MXFP4(),
    "int4 32 zero": INT4(group=32, symmetric=False),
    "int4 32": INT4(group=32, arithmetic="checkpoint"),
    "int4 64": INT4(group=64),
    "int4 128": INT4(arithmetic="checkpoint"),
    "int4 128 zero": INT4(symmetric=False, arithmetic="checkpoint"),
    "fp8": FP8(),
    "fp8 channel": FP8(per="channel", arithmetic="checkpoint"),
    "fp8 block": FP8(per="block"),
    "int8": INT8(arithmetic="checkpoint"),
}
each_format = pytest.mark.parametrize("format", FORMATS.values(), ids=FORMATS)


def block(format) -> Block:
    found = fragments.block(format)
    assert found is not None
    return found


def inputs(M, K, seed=0):
    return jnp.asarray(np.random.default_rng(seed).standard_normal((M, K)), jnp.bfloat16)


def weight(format, N, K, seed=1):
    """Encoded, with a block of zeros, an outlier, and scales up to their bounds where the format has some."""
    rng = np.random.default_rng(seed)
    w = rng.standard_normal((N, K)) * np.exp2(rng.integers(-4, 4, (N, 1)))
    w[3, :128] = 0
    w[5, 7] = 60
    q = format.encode(jnp.asarray(w, jnp.bfloat16))
    inner = q.scales.get("inner")
    if format.name == "nvfp4":
        extreme = rng.choice(np.asarray([2.0**-9, 2.0**-7, 0.75, 448.0, 0.0]), inner.shape)
        return dataclasses.replace(q, scales={**q.scales, "inner": jnp.asarray(extreme, inner.dtype)})
    if format.name == "mxfp4":
        extreme = rng.choice(np.asarray([0, 40, 127, 200]), (N, 1)) + rng.integers(0, 9, inner.shape)
        return dataclasses.replace(q, scales={"inner": jnp.asarray(extreme, inner.dtype)})
    return q


def factored(q):
    codes = unpack(q.codes) if q.format.bits == 4 else q.codes
    w, after = q.format.factored(codes, q.scales, q.dtype)
    return np.asarray(w, np.float64), np.float64(1) if after is None else np.asarray(
        after, np.float64
    ).reshape(-1)


def check(y, x, q, bias=None, tolerance=2.0**-20):
    """Equal to the sum in float64, up to the rounding of float32 sums of terms of these sizes."""
    w, after = factored(q)
    x = np.asarray(x, np.float64)
    expected, size = x @ w.T * after, np.abs(x) @ np.abs(w).T * np.abs(after)
    if bias is not None:
        expected, size = expected + np.asarray(bias, np.float64), size + np.abs(np.asarray(bias, np.float64))
    assert y.shape == expected.shape
    np.testing.assert_array_less(np.abs(np.asarray(y, np.float64) - expected), tolerance * size + 1e-300)


def same(a, b):
    a, b = jax.tree.leaves(a), jax.tree.leaves(b)
    assert len(a) == len(b)
    for x, y in zip(a, b, strict=True):
        assert (
            x.dtype == y.dtype and x.shape == y.shape and np.asarray(x).tobytes() == np.asarray(y).tobytes()
        )


@each_format
def test_restore_inverts_repack(format):
    K = 1152  # of whole tiles of 8-bit codes, not of 4-bit
    q = weight(format, 192, K)
    packed = jax.jit(repack)(q)
    same(jax.jit(restore)(packed), q)
    host = jax.tree.map(np.asarray, q)
    assert all(isinstance(a, np.ndarray) for a in jax.tree.leaves((repack(host), restore(repack(host)))))
    same(repack(host), packed)
    same(restore(repack(host)), q)
    assert repack(packed) is packed and restore(q) is q
    if block(format).scale:
        assert packed.order == "weight_only"
        with pytest.raises(InputError, match="weight_only"):
            format.decode(packed)
    else:
        assert repack(q) is q


def test_repack_pads_8_bit_codes():
    host = jax.tree.map(np.asarray, weight(INT8(), 64, 200))
    packed = repack(host)
    assert packed.codes.shape == (64, 256) and packed.order == "weight_only"
    same(restore(packed), host)


@pytest.mark.parametrize("name", ["nvfp4", "int4 32 zero", "int4 128 zero", "fp8 block"])
def test_repack_of_many_is_that_of_each(name):
    w = jnp.asarray(np.random.default_rng(0).standard_normal((2, 128, 512)), jnp.bfloat16)
    many = jax.tree.map(np.asarray, encode_leaf(FORMATS[name], w, batch=(0,)))
    packed = repack(many)
    same(restore(packed), many)
    for i in range(2):
        one, expected = packed.row(i), repack(many.row(i))
        assert one.order == expected.order == "weight_only"
        same(one, expected)


def test_repack_leaves_what_the_kernel_cannot_take():
    for q in (
        weight(NVFP4(), 100, 256),
        MXFP8().encode(inputs(64, 256)),
        INT4().encode(inputs(64, 256).astype(jnp.float32)),
    ):
        assert repack(q) is q


def test_patterns_decode_every_word():
    """The arithmetic that the kernel does on bits, in bfloat16 as a GPU has it: with subnormals."""
    word = np.arange(2**16, dtype=np.uint16)

    def bfloat16(a):
        return a.astype(np.uint16).view(ml_dtypes.bfloat16).astype(np.float32)

    for i, fields in enumerate(FIELDS["e2m1"]):
        pattern = moved(word, fields)
        code = (pattern >> 12 & 8) | (pattern >> 6 & 7)
        np.testing.assert_array_equal(bfloat16(pattern) * np.float32(2.0**126), e2m1_value(jnp.asarray(code)))
        assert sorted(np.unique(code, return_counts=True)[1]) == [2**12] * 16, f"code {i} has bits of others"
    for i, fields in enumerate(FIELDS["int4"]):
        n = (word >> 4 * i).astype(np.int32) % 16
        found = bfloat16(moved(word, fields) ^ 0x4308) - 136
        np.testing.assert_array_equal(found, np.where(n < 8, n, n - 16))
    finite = (word & 0x7F7F) % 128 < 127
    finite &= (word >> 8) % 128 < 127
    for i, fields in enumerate(FIELDS["e4m3"]):
        expected = (word >> 8 * i).astype(np.uint8).view(ml_dtypes.float8_e4m3fn).astype(np.float32)
        found = bfloat16(moved(word, fields)) * np.float32(2.0**120)
        np.testing.assert_array_equal(found[finite], expected[finite])
    for i, fields in enumerate(FIELDS["int8"]):
        low, sign = (bfloat16(moved(word, fields) & mask | 0x4300) for mask in (0x7F, 0x80))
        np.testing.assert_array_equal(low - sign, (word >> 8 * i).astype(np.uint8).view(np.int8))


def test_e2m1_fields_share_no_bit():
    taken = [
        bit - left
        for fields in FIELDS["e2m1"]
        for left, mask in fields
        for bit in range(16)
        if mask >> bit & 1
    ]
    assert sorted(taken) == list(range(16))


@each_format
def test_interpreted(format):
    found = block(format)
    q, x = weight(format, 64, found.period), inputs(5, found.period)
    bias = jnp.asarray(np.random.default_rng(7).standard_normal(64), jnp.bfloat16)
    y = weight_only(x, repack(q), dtype=jnp.float32, bias=bias, interpret=INTERPRET)
    check(y, x, q, bias)


def test_interpreted_with_splits_warpgroups_and_ragged_k():
    q, x = weight(NVFP4(), 128, 432), inputs(9, 432)
    cut = tiles(9, 128, 512, block(q.format))
    assert cut.warpgroups == 2 and cut.splits == 2 and cut.m == 16
    y = jax.jit(lambda x, q: weight_only(x, q, dtype=jnp.bfloat16, interpret=INTERPRET))(x, q)
    assert y.dtype == jnp.bfloat16
    check(y, x, q, tolerance=2.0**-8)


def test_interpreted_with_more_inputs_than_a_tile():
    q, x = weight(INT8(), 64, 128), inputs(70, 128)
    check(weight_only(x, q, dtype=jnp.float32, interpret=INTERPRET), x, q)


def test_interpreted_with_a_smaller_last_split():
    q, x = weight(FP8(), 64, 384), inputs(8, 384)
    found = block(q.format)
    parts = sums(Tiles(8, 1, 2, 1, 2), found, INTERPRET)(permuted(x, found, 384).T, *arrays(repack(q)))
    assert parts.shape == (2, 64, 8)
    w, _ = factored(q)
    for part, k in zip(parts, (slice(0, 256), slice(256, 384)), strict=True):
        np.testing.assert_allclose(part, w[:, k] @ np.asarray(x, np.float64)[:, k].T, rtol=1e-4, atol=1e-2)


def test_unpermuted_scales_are_wrong():
    """Negative control: `check` would not pass by chance."""
    q, x = weight(NVFP4(), 64, 512), inputs(8, 512)
    packed = repack(q)
    flat = q.scales["inner"].reshape(packed.scales["inner"].shape)
    wrong = dataclasses.replace(packed, scales={**packed.scales, "inner": flat})
    with pytest.raises(AssertionError):
        check(weight_only(x, wrong, dtype=jnp.float32, interpret=INTERPRET), x, q, tolerance=0.01)


def test_unpermuted_codes_are_wrong():
    q, x = weight(NVFP4(), 64, 256), inputs(5, 256)
    wrong = dataclasses.replace(repack(q), codes=q.codes)
    with pytest.raises(AssertionError):
        check(weight_only(x, wrong, dtype=jnp.float32, interpret=INTERPRET), x, q, tolerance=0.01)


def test_permuted_reorders_within_a_period_only():
    for format in FORMATS.values():
        found = block(format)
        x = jnp.arange(found.period * 2, dtype=jnp.int32)[None]
        y = np.asarray(permuted(x, found, found.period * 3))[0]
        first, second, rest = np.split(y, 3)
        assert sorted(first) == list(range(found.period)) and not rest.any()
        np.testing.assert_array_equal(first + found.period, second)


def spec(format, N, K):
    return jax.eval_shape(lambda w: repack(format.encode(w)), jax.ShapeDtypeStruct((N, K), jnp.bfloat16))


@pytest.mark.parametrize("M", [1, 16, 64, 200])
@pytest.mark.parametrize("name", ["nvfp4", "mxfp4", "int4 128 zero", "fp8 block"])
def test_lowers_for_hopper(name, M):
    for N, K in {"nvfp4": ((4096, 14336), (4096, 11008)), "mxfp4": ((2880, 2880),)}.get(
        name, ((28672, 4096),)
    ):
        x = jax.ShapeDtypeStruct((M, K), jnp.bfloat16)
        lowered(lambda x, q: weight_only(x, q, dtype=jnp.bfloat16), x, spec(FORMATS[name], N, K))


@pytest.mark.parametrize("name", sorted(FORMATS.keys() - {"nvfp4", "mxfp4", "int4 128 zero", "fp8 block"}))
def test_every_format_lowers_for_hopper(name):
    x = jax.ShapeDtypeStruct((16, 4096), jnp.bfloat16)
    lowered(lambda x, q: weight_only(x, q, dtype=jnp.bfloat16), x, spec(FORMATS[name], 4096, 4096))


def test_registers_suffice():
    """What a kernel asks for by setmaxnreg beyond what its thread block starts with, it waits for forever."""
    chosen = {tiles(M, N, K, block(NVFP4())).warpgroups for M, N, K in SHAPES}
    assert len(chosen | {tiles(4, 64, 256, block(NVFP4())).warpgroups}) > 1
    for warpgroups in chosen:
        at_start = 2**16 // (128 * (warpgroups + 1)) // 8 * 8 * (warpgroups + 1)
        multiply = min(256, (512 - MEMORY_REGISTERS) // warpgroups // 8 * 8)
        assert MEMORY_REGISTERS + warpgroups * multiply <= at_start, warpgroups


@pytest.mark.parametrize("scale", [jnp.bfloat16, jnp.float32])
def test_tiles_fit_in_shared_memory(scale):
    """All that a pipeline holds, each buffer at a multiple of 1024 bytes, and its barriers."""
    more = (INT4(64, symmetric=False), INT4(256, symmetric=False))
    for format in (*FORMATS.values(), *more):
        found = block(format)
        for M, N, K in SHAPES:
            K += -K % found.period
            q = spec(format, N, K)
            if format.name == "int4":
                inner = jax.ShapeDtypeStruct(q.scales["inner"].shape, scale)
                q = dataclasses.replace(q, scales={**q.scales, "inner": inner})
            cut = tiles(M, N, K, found)
            sizes = [cut.m * found.k * 2]
            for part, array in zip(
                specs(found, cut.warpgroups * ROWS, lambda k: (0, k)), arrays(q), strict=True
            ):
                sizes.append(math.prod(n for n in part.block_shape if n) * array.dtype.itemsize)
            used = sum(-(-size * cut.stages // 1024) * 1024 for size in sizes)
            assert used + 2 * 8 * cut.stages <= 227 * 1024, (format, M, N, K)


def test_tiles_fit_and_fill():
    for M, N, K in SHAPES:
        for format in FORMATS.values():
            found = block(format)
            wide = -(-K // found.period) * found.period
            cut = tiles(M, N, wide, found)
            steps = wide // found.k
            assert N % (cut.warpgroups * ROWS * cut.pair) == 0
            assert (cut.splits - 1) * -(-steps // cut.splits) < steps, "a split without a step"
            assert cut.m % 8 == 0 and cut.m <= 256
            stage = cut.warpgroups * ROWS * BYTES + cut.m * found.k * 2
            assert cut.stages >= 2 and cut.stages * stage <= 227 * 1024
            assert cut.stages * cut.warpgroups * ROWS * BYTES >= 40 * 1024, "too few bytes in flight"
            if M <= 64 and N * K > 2**24:
                assert N // (cut.warpgroups * ROWS) * cut.splits >= 0.45 * SMS, "multiprocessors without work"


def test_why_not():
    q, x = weight(NVFP4(), 64, 256), inputs(4, 256)
    many = encode_leaf(NVFP4(), jnp.zeros((2, 64, 256), jnp.bfloat16), batch=(0,))
    for reason, args in {
        "inputs are float32, not bfloat16": (x.astype(jnp.float32), q),
        "inputs have shape (256,)": (x[0], q),
        "inputs (4, 128) and a weight of K = 256": (x[:, :128], q),
        "N = 100 is no multiple of 64": (x, weight(NVFP4(), 100, 256)),
        "mxfp8 is not decoded": (x, MXFP8().encode(inputs(64, 256))),
        "group=16 is not decoded": (x, INT4(group=16).encode(inputs(64, 256))),
        "dtype float32, which is not bfloat16": (x, INT4().encode(inputs(64, 256).astype(jnp.float32))),
        "the order 'other'": (x, dataclasses.replace(q, order="other")),
        "batch axes (0,)": (x, many),
    }.items():
        found = why_not(*args, dtype=jnp.bfloat16)
        assert found is not None and reason in found, (reason, found)
        with pytest.raises(InputError) as e:
            weight_only(*args, dtype=jnp.bfloat16)
        assert found in str(e.value)
    assert "bias has shape" in str(why_not(x, q, dtype=jnp.bfloat16, bias=jnp.zeros(3)))
    assert "int32" in str(why_not(x, q, dtype=jnp.int32))
    assert why_not(x, q, dtype=jnp.float16, bias=jnp.zeros(64)) is None


@gpu
@each_format
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_on_a_gpu(format, shape):
    M, N, K = shape
    if format.name == "int4" and K % format.group:
        pytest.skip("the format has no such K")
    q, x = weight(format, N, K), inputs(M, K)
    bias = jnp.asarray(np.random.default_rng(7).standard_normal(N), jnp.float32)
    run = jax.jit(lambda x, q: weight_only(x, q, dtype=jnp.float32, bias=bias))
    # What the result lies on afterwards: a NaN that the kernel does not write over would show.
    jax.block_until_ready(jnp.full((64 * 2**20,), jnp.nan, jnp.float32))
    y = run(x, repack(q))
    exact = block(format).scale == "" or format.name in ("nvfp4", "mxfp4")
    check(y, x, q, bias, tolerance=2.0**-15 if exact else 2.0**-12)
    same(y, run(x, repack(q)))
    same(y, run(x, q))


@gpu
def test_a_nan_stays_in_its_row():
    q, x = weight(NVFP4(), 4096, 4096), inputs(16, 4096)
    y = weight_only(x.at[3, 17].set(jnp.nan), repack(q), dtype=jnp.float32)
    assert bool(jnp.all(jnp.isnan(y[3])))
    check(jnp.delete(y, 3, 0), jnp.delete(x, 3, 0), q, tolerance=2.0**-15)
