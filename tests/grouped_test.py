"""Grouped product for Hopper: the schedule, that it lowers, and the operation's results."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from kernel_checks import INTERPRET, REGISTERS, gpu, lowered

from mojax.errors import InputError
from mojax.formats.base import encode_leaf
from mojax.formats.fp8 import FP8
from mojax.formats.int4 import INT4
from mojax.formats.int8 import INT8
from mojax.formats.mxfp4 import MXFP4
from mojax.formats.mxfp8 import MXFP8
from mojax.formats.nvfp4 import NVFP4
from mojax.kernels.base import compute_capability
from mojax.kernels.gpu import grouped as kernel
from mojax.kernels.gpu.fragments import block
from mojax.kernels.gpu.weight_only import repack
from mojax.kernels.grouped_matmul import grouped_matmul

BF16 = jnp.dtype(jnp.bfloat16)
EXACT = (NVFP4(), NVFP4(arithmetic="checkpoint"), MXFP4(), FP8("tensor"), FP8("channel"), INT8())
ROUNDED = (INT4(128), INT4(32), INT4(64, False), INT4(32, False), FP8("block"))  # to bfloat16
FORMATS = (*EXACT, *ROUNDED)


def spec(format, E, N, K, dtype=BF16):
    return format.spec((E, N, K), dtype, batch=(0,), contract=(2,))


def struct(shape, dtype=BF16):
    return jax.ShapeDtypeStruct(shape, dtype)


def error_of(format):
    """Of a product, in sums of magnitudes."""
    return 2.0**-7 if format in ROUNDED else 1e-6


def by_hand(sizes, rows, height):
    """The tiles, and where each row of a group lies."""
    tiles, place, start = [], {}, 0
    for e, size in enumerate(sizes):
        end = min(start + size, rows)
        for first in range(start, end, height):
            valid = min(height, end - first)
            place |= {first + i: len(tiles) * height + i for i in range(valid)}
            tiles.append((e, first, valid))
        start = end
    return tiles, place


scheduled = jax.jit(kernel.schedule, static_argnums=(1, 2))


@st.composite
def routings(draw):
    rows, groups, height = draw(
        st.sampled_from([(0, 3, 8), (1, 4, 8), (13, 1, 8), (40, 5, 8), (40, 5, 16), (40, 40, 32)])
    )
    size = st.one_of(st.just(0), st.integers(0, 9), st.integers(0, rows))
    return draw(st.lists(size, min_size=groups, max_size=groups)), rows, height


def check_schedule(sizes, rows, height):
    found = [np.asarray(a) for a in scheduled(jnp.asarray(sizes, jnp.int32), rows, height)]
    tiles, place = by_hand(sizes, rows, height)
    most = kernel.bound(rows, len(sizes), height)
    group, first, valid, source, where = found
    assert [a.dtype for a in found] == [np.int32] * 5
    assert group.shape == first.shape == valid.shape == (most,) and where.shape == (rows,)
    assert list(zip(group, valid, strict=True))[: len(tiles)] == [(e, n) for e, _, n in tiles]
    assert not valid[len(tiles) :].any()
    assert (0 <= group).all() and (group < len(sizes)).all()
    assert (first % 8 == 0).all() and (first + height <= len(source)).all() and len(source) % 8 == 0
    assert [source[at] for at in first[: len(tiles)]] == [row for _, row, _ in tiles]
    for at, (_, row, n) in zip(first, tiles, strict=False):
        assert np.array_equal(source[at : at + n], np.arange(row, row + n))
    assert {r: p for r, p in enumerate(where) if p < most * height} == place
    return len(tiles)


@settings(deadline=None, max_examples=150)
@given(routings())
def test_the_schedule_is_that_of_a_loop(routing):
    check_schedule(*routing)


@pytest.mark.parametrize(
    "sizes, rows, height",
    [
        ([0, 0, 0, 0], 9, 8),
        ([0, 0, 9, 0], 9, 8),
        ([9, 0, 0, 0], 64, 8),
        ([0, 0, 0, 64], 64, 8),
        ([70, 5, 0, 0], 64, 8),  # beyond the rows
        ([0, 0, 0, 0], 0, 8),
    ],
)
def test_the_schedule_at_the_edges(sizes, rows, height):
    check_schedule(sizes, rows, height)


@pytest.mark.parametrize(
    "sizes, rows, height", [([1] * 5, 5, 8), ([9, 1, 1, 1], 12, 8), ([17, 17, 17, 1], 52, 16), ([8], 8, 8)]
)
def test_no_tile_is_spared(sizes, rows, height):
    assert check_schedule(sizes, rows, height) == kernel.bound(rows, len(sizes), height)


def test_the_schedule_of_many_experts():
    sizes = np.random.default_rng(0).multinomial(2048, np.random.default_rng(1).dirichlet(np.full(128, 0.3)))
    check_schedule([int(s) for s in sizes], 2100, 16)


@pytest.mark.parametrize("itemsize", [2, 4])
@pytest.mark.parametrize("format", FORMATS)
@pytest.mark.parametrize("rows, E, N, K", [*kernel.SHAPES, (1, 1, 64, 512), (100000, 64, 1408, 2048)])
def test_tiles_cover_the_product_and_fit(format, itemsize, rows, E, N, K):
    found = block(format)
    assert found is not None
    cut = kernel.tiles(rows, E, N, -(-K // found.period) * found.period, found, itemsize)
    assert N % (cut.warpgroups * 64 * cut.turns) == 0
    assert cut.height in kernel.HEIGHTS and cut.stages >= 2
    assert cut.warpgroups <= 3  # 4 would wait for registers forever, see weight_only_test.py
    step = cut.warpgroups * 64 * 128 + cut.height * found.k * 2
    assert cut.stages * step + cut.warpgroups * 64 * cut.height * itemsize < 227 * 1024
    if rows <= E:
        assert cut.height == 8
    if rows >= 100 * E:
        assert cut.height >= 32


@pytest.mark.parametrize("rows, E, N, K", kernel.SHAPES)
def test_lowers_for_hopper(rows, E, N, K):
    q = jax.eval_shape(repack, spec(NVFP4(), E, N, K))

    def run(x, q, sizes):
        return kernel.grouped(x, q, sizes, dtype=BF16)

    assert jax.eval_shape(run, struct((rows, K)), q, struct((E,), jnp.int32)) == struct((rows, N))
    lowered(run, struct((rows, K)), q, struct((E,), jnp.int32))


@pytest.mark.parametrize("rows, dtype", [(40, jnp.float32), (4000, jnp.float16)])
@pytest.mark.parametrize("format", FORMATS)
def test_every_format_lowers(format, rows, dtype):
    def run(x, q, sizes):
        return kernel.grouped(x, q, sizes, dtype=dtype)

    lowered(run, struct((rows, 1152)), spec(format, 8, 192, 1152), struct((8,), jnp.int32))


def experts(format, E, N, K, seed=0):
    """Weights of many magnitudes, blocks of zeros among them."""
    rng = np.random.default_rng(seed)
    w = rng.standard_normal((E, N, K)) * 2.0 ** rng.uniform(-6, 6, (E, N, 1))
    w[:, :, 32:64] = 0
    return encode_leaf(format, jnp.asarray(w, BF16), (2,), (0,))


def inputs(rows, K):
    return jnp.asarray(np.random.default_rng(9).standard_normal((rows, K)), BF16)


# Each thread block costs seconds under the interpreter of jax 0.10.
later = pytest.mark.skipif(not REGISTERS, reason="slow before jax 0.11")
CUTS = (
    (NVFP4(), 256, kernel.Tiles(8, 1, 2, 2)),
    (INT4(128), 512, kernel.Tiles(16, 1, 1, 2)),
    (FP8("block"), 256, kernel.Tiles(16, 1, 1, 2)),
    *(pytest.param(f, 1152, kernel.Tiles(8, 2, 2, 3), marks=later) for f in FORMATS),
)


@pytest.mark.parametrize("format, K, cut", CUTS)
def test_equals_the_operation(format, K, cut):
    """An empty group, one of two tiles, a tile that is none; NaN beside other rows, and in no group."""
    q, x = experts(format, 3, 64 * cut.warpgroups * cut.turns, K), inputs(11, K)
    x = x.at[jnp.array([0, 10])].set(jnp.nan)
    sizes = jnp.array([1, 0, 9], jnp.int32)
    given = repack(q) if K == 256 else q
    y = kernel.grouped(x, given, sizes, dtype=jnp.float32, interpret=INTERPRET, cut=cut)
    want = grouped_matmul(x, q, sizes, dtype=jnp.float32)
    assert y.shape == want.shape and y.dtype == want.dtype
    assert np.isnan(y[0]).all() and not np.asarray(y[10]).any()
    w = np.abs(np.asarray(q.format.decode(q), np.float64)[2])
    error = np.abs(np.asarray(y, np.float64) - np.asarray(want, np.float64))[1:10]
    assert np.all(error <= error_of(format) * (np.abs(np.asarray(x[1:10], np.float64)) @ w.T) + 1e-30)


def test_no_rows():
    y = kernel.grouped(
        inputs(0, 256), experts(NVFP4(), 2, 64, 256), jnp.zeros(2, jnp.int32), dtype=jnp.float32
    )
    assert y.shape == (0, 64) and y.dtype == jnp.float32


def test_why_not():
    x, q, sizes = struct((16, 256)), spec(NVFP4(), 4, 128, 256), struct((4,), jnp.int32)

    def why(x=x, q=q, sizes=sizes, dtype=BF16):
        return kernel.why_not(x, q, sizes, dtype=dtype)

    assert why() is None
    assert why(q=jax.eval_shape(repack, q)) is None
    assert why(x=struct((0, 256))) is None
    assert why(x=struct((2, 8, 256))) == "inputs have shape (2, 8, 256), not [rows, K]"
    assert why(x=struct((16, 256), jnp.float32)) == "inputs are float32, not bfloat16"
    assert why(x=struct((16, 128))) == "inputs (16, 128) and a weight of K = 256 do not fit"
    assert why(dtype=jnp.int8) == "the result is int8, not bfloat16, float16 or float32"
    assert why(sizes=struct((3,), jnp.int32)) == "sizes are int32 (3,), not int32 (4,)"
    assert why(sizes=struct((4,), jnp.uint8)) == "sizes are uint8 (4,), not int32 (4,)"
    assert why(q=NVFP4().spec((128, 256), BF16)) == "the weight has batch axes (), not one"
    assert why(q=dataclasses.replace(q, order="tcgen05")) == "the weight's codes are in the order 'tcgen05'"
    assert why(q=spec(NVFP4(), 4, 96, 256)) == "N = 96 is no multiple of 64"
    assert why(q=spec(MXFP8(), 4, 128, 256)) == "mxfp8 is not decoded in registers"
    wide = spec(INT4(128), 4, 128, 256, jnp.float32)
    assert why(q=wide) == "int4 rounds to the weight's dtype float32, which is not bfloat16"
    with pytest.raises(InputError, match="grouped: inputs are float32"):
        kernel.grouped(jnp.zeros((16, 256)), q, jnp.zeros(4, jnp.int32), dtype=BF16)


def on_device(format, E, N, K):
    """Experts of a real size, encoded on the device, one after the other."""

    def one(key):
        return format.encode(jax.random.normal(key, (N, K), BF16))

    q = jax.jit(lambda keys: jax.lax.map(one, keys))(jax.random.split(jax.random.key(N), E))
    return dataclasses.replace(q, shape=(E, N, K), contract=(2,), batch=(0,))


def routed(rows, E, seed):
    """Sizes of groups that differ much; an eighth of the rows is of none."""
    rng = np.random.default_rng(seed)
    return rng.multinomial(rows - rows // 8, rng.dirichlet(np.full(E, 0.5))).astype(np.int32)


def check_on_device(run, x, q, decoded, sizes):
    """A sample of rows and columns against float64; all rows of no group."""
    rows, N = x.shape[0], q.shape[1]
    cut = kernel.bound(rows, len(sizes), 128) * 128
    jax.block_until_ready(jnp.full((cut, N), jnp.nan))  # what memory of results begins as
    y = np.asarray(run(x, q, jnp.asarray(sizes)))
    live = int(sizes.sum())
    assert np.isfinite(y).all() and not y[live:].any()
    rng = np.random.default_rng(3)
    edges = np.concatenate([np.cumsum(sizes), np.cumsum(sizes) - 1, rng.integers(0, max(live, 1), 64)])
    columns = rng.permutation(N)[:64]
    for r in sorted({int(r) for r in edges if 0 <= r < live}):
        e = int(np.searchsorted(np.cumsum(sizes), r, side="right"))
        w, row = np.asarray(decoded[e, columns], np.float64), np.asarray(x[r], np.float64)
        bound = error_of(q.format) * (np.abs(w) @ np.abs(row)) * 10 + 1e-6
        assert np.all(np.abs(y[r, columns] - w @ row) <= bound), (r, e)


@gpu
@pytest.mark.parametrize("format", FORMATS)
@pytest.mark.parametrize("rows, E, N, K", kernel.SHAPES)
def test_on_hopper(format, rows, E, N, K):
    if compute_capability() != 9:
        pytest.skip("needs compute capability 9.x")
    q = on_device(format, E, N, K)
    decoded = jax.jit(lambda q: q.format.decode(q))(q)
    repacked = jax.jit(repack)(q)
    x = jax.random.normal(jax.random.key(1), (rows, K), BF16)
    traced = []

    @jax.jit
    def run(x, q, sizes):
        traced.append(sizes)
        return kernel.grouped(x, q, sizes, dtype=jnp.float32)

    for seed in range(3):
        check_on_device(run, x, repacked, decoded, routed(rows, E, seed))
    check_on_device(run, x, repacked, decoded, np.zeros(E, np.int32))
    check_on_device(run, x, repacked, decoded, np.eye(E, dtype=np.int32)[E // 2] * rows)
    assert len(traced) == 1  # sizes are data


@gpu
@pytest.mark.parametrize("format", [NVFP4(), FP8("channel")])
@pytest.mark.parametrize("cut", [(8, 1, 1, 2), (8, 3, 4, 4), (32, 2, 2, 3), (64, 3, 2, 2), (128, 2, 6, 2)])
def test_every_cut_on_hopper(format, cut):
    if compute_capability() != 9:
        pytest.skip("needs compute capability 9.x")
    q = on_device(format, 16, 768, 2048)
    x, sizes = inputs(500, 2048), jnp.asarray(routed(500, 16, 0))
    x = x.at[3].set(jnp.nan)
    made = [
        jax.jit(lambda x, q, s, c=c: kernel.grouped(x, q, s, dtype=BF16, cut=c))(x, q, sizes)
        for c in (kernel.Tiles(*cut), kernel.Tiles(16, 1, 1, 2))
    ]
    assert np.array_equal(np.isnan(np.asarray(made[0], np.float32)).all(axis=1), np.arange(500) == 3)
    assert np.array_equal(*(np.asarray(y, np.float32) for y in made), equal_nan=True)
