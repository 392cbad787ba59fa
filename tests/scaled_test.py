"""Products of two operands in 8 bits: the reference; the Hopper kernel interpreted, lowered and on a GPU."""

import dataclasses
import re
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from kernel_checks import INTERPRET, gpu, lowered

from mojax.errors import InputError
from mojax.formats.base import QTensor
from mojax.formats.fp8 import FP8
from mojax.formats.int8 import INT8
from mojax.formats.nvfp4 import NVFP4
from mojax.kernels.gpu import scaled as hopper
from mojax.kernels.scaled import reference, scaled

# How inputs and weights are scaled.
FORMATS = {
    "block": (FP8("token"), FP8("block")),
    "channel": (FP8("token"), FP8("channel")),
    "tensor": (FP8("tensor"), FP8("tensor")),
    "static": (FP8("tensor"), FP8("channel", arithmetic="checkpoint")),
    "int8": (INT8("token"), INT8("channel")),
    "int8 tensor": (INT8("tensor"), INT8("tensor")),
}
LOWERED = [(m, n, k) for n, k in ((4096, 4096), (14336, 4096), (7168, 18432)) for m in (16, 1024, 4096)]
WIDE = hopper.Tiles(m=64, n=64, stages=2, pair=1, clusters=1)  # few tiles, which the interpreter is slow at


def cut_off(kind, x):
    """Inputs `[M, K]` as they are encoded: a weight per block takes groups of 128."""
    if kind != "block":
        return x
    return jnp.pad(x, ((0, 0), (0, -x.shape[1] % 128))).reshape(x.shape[0], -1, 128)


def operands(kind, M, N, K, seed=0):
    rng, (inputs, weights) = np.random.default_rng(seed), FORMATS[kind]
    x, w = (jnp.asarray(rng.standard_normal((n, K)), jnp.bfloat16) for n in (M, N))
    return inputs.encode(cut_off(kind, x)), weights.encode(w)


def specs(kind, M, N, K):
    inputs, weights = FORMATS[kind]
    x = (M, K // 128, 128) if kind == "block" else (M, K)
    return inputs.spec(x, np.dtype(jnp.bfloat16)), weights.spec((N, K), np.dtype(jnp.bfloat16))


def spread(scale, shape):
    """Scales as float64 of every element; those of a block cover 128 x 128."""
    scale = np.asarray(scale, np.float64)
    if len(shape) == 2 and scale.ndim == 2 and scale.shape[1] > 1:
        scale = np.repeat(np.repeat(scale, 128, 0), 128, 1)[: shape[0], : shape[1]]
    return scale


def exact(x, q, rows=slice(None)):
    """The product of what the codes mean, float64."""
    (s,), (t,) = x.scales.values(), q.scales.values()
    codes = np.asarray(x.codes)[rows].astype(np.float64)
    a = codes * spread(np.asarray(s)[rows] if np.ndim(s) else s, codes.shape)
    w = np.asarray(q.codes).astype(np.float64) * spread(t, q.codes.shape)
    return a.reshape(len(a), -1)[:, : w.shape[1]] @ w.T


def rescaled(q, rng, binades):
    """The same codes under random scales of both signs, 2^-binades to 2^binades."""
    (level, scale), *_ = q.scales.items()
    found = rng.choice([-1.0, 1.0], scale.shape) * 2.0 ** rng.uniform(-binades, binades, scale.shape)
    return dataclasses.replace(q, scales={level: jnp.asarray(found, jnp.float32)})


def close(y, want, relative):
    """Every entry differs by at most `relative` of the largest one."""
    np.testing.assert_allclose(np.asarray(y, np.float64), want, rtol=0, atol=relative * np.abs(want).max())


class TestReference:
    @pytest.mark.parametrize("kind", FORMATS)
    @pytest.mark.parametrize("shape", [(1, 40, 256), (5, 136, 200)])
    def test_float64(self, kind, shape):
        x, q = operands(kind, *shape)
        bias = jnp.arange(shape[1], dtype=jnp.bfloat16)
        want = exact(x, q) + np.arange(shape[1])
        close(reference(x, q, dtype=jnp.float32, bias=bias), want, 1e-6)
        close(reference(x, q, dtype=jnp.bfloat16, bias=bias), want, 2.0**-8)

    def test_integers_are_exact(self):
        x, q = ones_scaled(operands("int8", 7, 40, 2048))
        want = np.asarray(x.codes, np.int64) @ np.asarray(q.codes, np.int64).T
        assert np.abs(want).max() > 2**17
        np.testing.assert_array_equal(np.asarray(reference(x, q, dtype=jnp.float32)), want)

    def test_scales_of_every_block(self):
        wide_scales(lambda x, q: reference(x, q, dtype=jnp.float32), (6, 200, 1000))

    def test_on_any_device(self):
        x, q = operands("channel", 3, 24, 128)
        np.testing.assert_array_equal(scaled(x, q, dtype=jnp.bfloat16), reference(x, q, dtype=jnp.bfloat16))
        with pytest.raises(InputError, match=r"hopper 8-bit: .*K = 96"):
            scaled(*operands("channel", 3, 24, 96), dtype=jnp.bfloat16, implementation="hopper 8-bit")


def ones_scaled(pair):
    return tuple(dataclasses.replace(q, scales={"inner": jnp.ones((len(q.codes), 1))}) for q in pair)


def wide_scales(fn, shape):
    """Scales over 40 binades: a sum that met one of them late, or another block's, would be far off."""
    rng = np.random.default_rng(1)
    x, q = (rescaled(t, rng, 20) for t in operands("block", *shape))
    y, want = np.asarray(fn(x, q), np.float64), exact(x, q)
    terms = exact(*(positive(t) for t in (x, q)))  # no sum can be better than an ulp of its largest term
    assert (np.abs(y - want) <= 1e-6 * terms).all()
    spread_out = np.log2(np.abs(want))
    assert spread_out.max() - spread_out.min() > 15


def positive(q):
    codes = jnp.abs(q.codes.astype(jnp.float32)).astype(q.codes.dtype)
    return dataclasses.replace(q, codes=codes, scales={k: jnp.abs(s) for k, s in q.scales.items()})


class TestInterpreted:
    @pytest.mark.parametrize("kind", ["block", "channel", "int8"])
    def test_equals_reference(self, kind):
        x, q = operands(kind, 5, 40, 256)
        bias, cut = jnp.linspace(-9, 9, 40), None if kind == "block" else WIDE
        y = hopper.scaled(x, q, dtype=jnp.float32, bias=bias, interpret=INTERPRET, cut=cut)
        close(y, np.asarray(reference(x, q, dtype=jnp.float32, bias=bias)), 1e-6)

    @pytest.mark.parametrize("kind", ["block", "int8 tensor"])
    def test_tiles_in_turn(self, kind):
        """One thread block for all tiles, with two warpgroups; stages that do not divide K."""
        x, q = operands(kind, 132, 24, 384)
        cut = hopper.Tiles(m=128, n=32, stages=2, pair=1, clusters=1)
        y = hopper.scaled(x, q, dtype=jnp.bfloat16, interpret=INTERPRET, cut=cut)
        assert y.shape == (132, 24)
        close(y, np.asarray(reference(x, q, dtype=jnp.float32)), 2.0**-8)

    def test_integers_are_exact(self):
        x, q = ones_scaled(operands("int8", 3, 32, 256))
        y = hopper.scaled(x, q, dtype=jnp.float32, interpret=INTERPRET, cut=WIDE)
        np.testing.assert_array_equal(y, np.asarray(x.codes, np.int64) @ np.asarray(q.codes, np.int64).T)

    def test_scales_of_every_block(self):
        def run(x, q):
            return hopper.scaled(x, q, dtype=jnp.float32, interpret=INTERPRET, cut=WIDE)

        wide_scales(run, (3, 136, 384))  # two rows of blocks; the first has two tiles

    def test_nan(self):
        x, q = operands("block", 4, 32, 256)
        x = dataclasses.replace(x, codes=x.codes.at[2, 1, 5].set(jnp.nan))
        q = dataclasses.replace(q, codes=q.codes.at[7, 200].set(jnp.nan))
        y = np.isnan(hopper.scaled(x, q, dtype=jnp.float32, interpret=INTERPRET, cut=WIDE))
        np.testing.assert_array_equal(y, (np.arange(4) == 2)[:, None] | (np.arange(32) == 7)[None])


class TestLowered:
    @pytest.mark.parametrize("kind", ["block", "channel"])
    @pytest.mark.parametrize("shape", LOWERED)
    def test_real_shapes(self, kind, shape):
        bias = jax.ShapeDtypeStruct(shape[1:2], jnp.bfloat16)
        self.check(kind, shape, jnp.bfloat16, bias)

    @pytest.mark.parametrize(
        "kind,dtype", [("tensor", jnp.float16), ("int8", jnp.float32), ("block", jnp.float32)]
    )
    def test_dtypes(self, kind, dtype):
        self.check(kind, (1024, 4096, 4096), dtype, jax.ShapeDtypeStruct((4096,), jnp.float32))

    @pytest.mark.parametrize("kind", FORMATS)
    @pytest.mark.parametrize("shape", [(1, 24, 128), (65, 1000, 384), (1003, 4100, 512)])
    def test_ragged(self, kind, shape):
        self.check(kind, shape, jnp.bfloat16, None)

    def check(self, kind, shape, dtype, bias):
        def run(x, q, bias):
            return hopper.scaled(x, q, dtype=dtype, bias=bias)

        (M, N, _), name = (
            shape,
            {"bfloat16": "bf16", "float16": "f16", "float32": "f32"}[jnp.dtype(dtype).name],
        )
        text = lowered(run, *specs(kind, *shape), bias)
        assert re.search(rf"return %\S+ : tensor<{M}x{N}x{name}>", text)


class TestTiles:
    @pytest.mark.parametrize("block", [False, True])
    @pytest.mark.parametrize("M", [1, 16, 64, 65, 128, 300, 1024, 1100, 8192])
    @pytest.mark.parametrize("N,K", [(24, 128), (4096, 4096), (7168, 18432), (128256, 4096)])
    def test_fit(self, M, N, K, block):
        t = hopper.tiles(M, N, K, block=block)
        shared = t.stages * ((t.m + t.n) * 128 + 4 * t.m * block) + 2 * t.m * 128
        assert shared <= (225 * 1024 // 2 if t.m == 64 else 225 * 1024)
        assert t.stages >= min(3, K // 128)
        assert t.n * t.m * (1 + block) <= 128 * 256
        assert t.n * (1 + block) <= (128 if t.m == 64 else 256)
        assert 1 <= t.clusters * t.pair <= (264 if t.m == 64 else 132)

    def test_a_pair_has_two_rows_of_tiles(self):
        assert [hopper.tiles(M, 4096, 4096).pair for M in (64, 128, 256, 384, 1024, 1100)] == [
            1,
            1,
            2,
            1,
            2,
            2,
        ]

    def test_few_rows_use_every_multiprocessor(self):
        assert hopper.tiles(16, 4096, 4096).clusters >= 120
        assert hopper.tiles(16, 14336, 4096).clusters >= 200


class TestWhyNot:
    @pytest.mark.parametrize(
        "change,reason",
        [
            (lambda x, q: (x, operands("int8", 8, 32, 256)[1]), "not both fp8 or both int8"),
            (lambda x, q: (x, NVFP4().encode(jnp.ones((32, 256)))), "not both fp8 or both int8"),
            (lambda x, q: (x, operands("block", 8, 32, 256)[1]), "a weight per block"),
            (lambda x, q: (operands("block", 8, 32, 256)[0], q), "a weight per block"),
            (lambda x, q: (x, operands("channel", 8, 32, 384)[1]), "K = 384"),
            (lambda x, q: operands("channel", 8, 32, 96), "multiple of 128"),
            (lambda x, q: (x, dataclasses.replace(q, order="tiled")), "order 'tiled'"),
            (lambda x, q: (x, batched(q)), "not [N, K]"),
        ],
    )
    def test_operands(self, change, reason):
        x, q = change(*operands("channel", 8, 32, 256))
        assert reason in (hopper.why_not(x, q, dtype=jnp.bfloat16) or "")
        with pytest.raises(InputError, match="scaled for Hopper: "):
            hopper.scaled(x, q, dtype=jnp.bfloat16)

    def test_results(self):
        x, q = operands("channel", 8, 32, 256)
        assert hopper.why_not(x, q, dtype=jnp.bfloat16, bias=jnp.zeros(32)) is None
        assert "bias (8,)" in (hopper.why_not(x, q, dtype=jnp.bfloat16, bias=jnp.zeros(8)) or "")
        assert "float8" in (hopper.why_not(x, q, dtype=jnp.float8_e4m3fn) or "")
        with pytest.raises(InputError, match=r"bias \(8,\)"):
            reference(x, q, dtype=jnp.bfloat16, bias=jnp.zeros(8))


def batched(q: QTensor) -> QTensor:
    codes, scales = q.codes[None], {k: s[None] for k, s in q.scales.items()}
    return dataclasses.replace(q, codes=codes, scales=scales, shape=codes.shape, contract=(2,), batch=(0,))


@gpu
class TestOnGPU:
    """FP8 sums over all of K keep the bits of the tensor core: up to 2 % of the largest sum may be lost."""

    def check(self, kind, shape, dtype=jnp.bfloat16, cut=None):
        bound = 6e-3 if kind in ("block", "int8", "int8 tensor") else 2e-2
        x, q = operands(kind, *shape)
        bias = jnp.linspace(-3, 3, shape[1])
        poison = [jnp.full((shape[0], shape[1]), jnp.nan, dtype).block_until_ready() for _ in range(3)]
        del poison  # what is freed is given out next: an entry that is not written shows as NaN
        plain = jax.jit(reference, static_argnames="dtype")
        run = jax.jit(partial(hopper.scaled, cut=cut), static_argnames="dtype")
        y = np.asarray(run(x, q, dtype=dtype, bias=bias), np.float64)
        np.testing.assert_array_equal(y, np.asarray(run(x, q, dtype=dtype, bias=bias), np.float64))
        rows = np.unique(np.linspace(0, shape[0] - 1, 24).astype(int))
        close(y[rows], exact(x, q, rows) + np.asarray(bias, np.float64), bound)
        close(y, np.asarray(plain(x, q, dtype=dtype, bias=bias), np.float64), bound)

    @pytest.mark.parametrize("kind", ["block", "channel", "int8"])
    @pytest.mark.parametrize("shape", hopper.SHAPES)
    def test_real_shapes(self, kind, shape):
        self.check(kind, shape)

    @pytest.mark.parametrize("kind", ["block", "channel"])
    @pytest.mark.parametrize("n", [32, 64, 128])
    def test_many_tiles_in_turn(self, kind, n):
        """Tiles of one piece and of two, which leave while the next are computed."""
        self.check(kind, (1000, 1024, 256), cut=hopper.Tiles(m=128, n=n, stages=2, pair=2, clusters=2))

    @pytest.mark.parametrize("kind", FORMATS)
    @pytest.mark.parametrize("shape", [(1, 24, 128), (65, 1000, 384), (1003, 4100, 512), (1152, 512, 2944)])
    @pytest.mark.parametrize("dtype", [jnp.bfloat16, jnp.float16, jnp.float32])
    def test_ragged(self, kind, shape, dtype):
        self.check(kind, shape, dtype)

    def test_integers_are_exact(self):
        x, q = ones_scaled(operands("int8", 200, 520, 2048))
        y = np.asarray(hopper.scaled(x, q, dtype=jnp.float32))
        np.testing.assert_array_equal(y, np.asarray(x.codes, np.int64) @ np.asarray(q.codes, np.int64).T)

    def test_scales_of_every_block(self):
        rng = np.random.default_rng(1)
        x, q = (rescaled(t, rng, 20) for t in operands("block", 200, 520, 2048))
        y = np.asarray(hopper.scaled(x, q, dtype=jnp.float32), np.float64)
        assert (np.abs(y - exact(x, q)) <= 2e-3 * exact(positive(x), positive(q))).all()

    def test_nan(self):
        x, q = operands("channel", 300, 512, 1024)
        x = dataclasses.replace(x, codes=x.codes.at[130, 700].set(jnp.nan))
        q = dataclasses.replace(q, scales={"inner": q.scales["inner"].at[9].set(jnp.nan)})
        y = np.isnan(np.asarray(hopper.scaled(x, q, dtype=jnp.bfloat16), np.float32))
        np.testing.assert_array_equal(y, (np.arange(300) == 130)[:, None] | (np.arange(512) == 9)[None])
