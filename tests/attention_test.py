"""Attention to a cache: the reference against the models' own and float64, the Hopper kernel against both."""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.experimental.pallas import mosaic_gpu as plgpu
from kernel_checks import INTERPRET, gpu, lowered

from mojax.errors import InputError
from mojax.formats.base import QTensor
from mojax.formats.fp8 import FP8
from mojax.formats.int8 import INT8
from mojax.formats.numerics import e2m1_value
from mojax.formats.nvfp4 import NVFP4
from mojax.kernels.attention import attend
from mojax.kernels.gpu import attention as hopper
from mojax.kernels.gpu import cache_codes
from mojax.models import layers

FORMATS = {"fp8": FP8(), "nvfp4": NVFP4(), "": None}


def normal(seed, shape, dtype=jnp.bfloat16):
    return jnp.asarray(np.random.default_rng(seed).standard_normal(shape), dtype)


def case(seed, batch, length, heads, kv_heads, size, slots, keys="", values="", dtype=jnp.bfloat16):
    """q, k, v and positions: sequences of different lengths, whose slots are in order and filled from 0."""
    q = normal(seed, (batch, length, heads, size), dtype)
    k, v = (normal(seed + i, (batch, slots, kv_heads, size), dtype) for i in (1, 2))
    k, v = (a if FORMATS[name] is None else FORMATS[name].encode(a) for a, name in ((k, keys), (v, values)))
    used = np.linspace(slots, length, batch).astype(np.int32)  # the first sequence fills every slot
    slot = np.arange(slots, dtype=np.int32)[None]
    key_positions = np.where(slot < used[:, None], slot, -1)
    positions = used[:, None] - length + np.arange(length, dtype=np.int32)[None]
    return q, k, v, jnp.asarray(positions), jnp.asarray(key_positions)


def exact(q, k, v, positions, key_positions, window=None):
    """float64 of the same, from the decoded values."""
    k, v = (np.asarray(a.format.decode(a) if isinstance(a, QTensor) else a, np.float64) for a in (k, v))
    q, positions, key_positions = np.asarray(q, np.float64), np.asarray(positions), np.asarray(key_positions)
    batch, length, heads, size = q.shape
    kv_heads = k.shape[2]
    q = q.reshape(batch, length, kv_heads, -1, size).transpose(
        0, 2, 3, 1, 4
    )  # [batch, kv, group, length, size]
    scores = q @ k.transpose(0, 2, 3, 1)[:, :, None] / np.sqrt(size)
    distance = positions[:, :, None] - key_positions[:, None, :]
    seen = (distance >= 0) & (key_positions >= 0)[:, None, :] & (distance < (window or 2**31))
    scores = np.where(seen[:, None, None], scores, -np.inf)
    top = scores.max(-1, keepdims=True)
    weights = np.exp(scores - np.where(np.isinf(top), 0, top))
    total = weights.sum(-1, keepdims=True)
    y = (weights / np.where(total == 0, 1, total)) @ v.transpose(0, 2, 1, 3)[:, :, None]
    y = y.transpose(0, 3, 1, 2, 4)
    return y.reshape(batch, length, heads * size)


jitted = jax.jit(partial(attend, implementation="xla"), static_argnames="window")


@partial(jax.jit, static_argnames="window")
def interpreted(*arguments, window=None):
    return hopper.attend(*arguments, window=window, interpret=INTERPRET)


def close(found, wanted, error=0.02):
    found = np.asarray(found, np.float64)
    assert found.shape == wanted.shape
    assert np.isfinite(found).all()
    assert np.abs(found - wanted).max() <= error * np.abs(wanted).max()


@pytest.mark.parametrize("dtype", [jnp.bfloat16, jnp.float32])
@pytest.mark.parametrize("shape", [(2, 9, 8, 2, 64), (1, 7, 4, 4, 32), (3, 5, 14, 2, 64)])
@pytest.mark.parametrize("window", [None, 3])
def test_reference_is_the_models_attention_bit_for_bit(shape, window, dtype):
    batch, length, heads, kv_heads, size = shape
    q = normal(0, (batch, length, heads, size), dtype)
    k, v = (normal(i, (batch, length, kv_heads, size), dtype) for i in (1, 2))
    p = jnp.arange(length, dtype=jnp.int32)
    wanted = jax.jit(layers.attend, static_argnums=4)(q, k, v, p, window)
    rows = jnp.broadcast_to(p, (batch, length))
    found = jitted(q, k, v, rows, rows, window=window)
    assert found.dtype == dtype
    np.testing.assert_array_equal(np.asarray(found, np.float32), np.asarray(wanted, np.float32))


def test_slots_in_any_order_and_with_padding_give_the_same_rows():
    q, k, v, positions, key_positions = case(3, 1, 1, 4, 2, 32, 10)
    shuffled = np.random.default_rng(0).permutation(10)
    pad = ((0, 0), (0, 6), (0, 0), (0, 0))
    k2, v2 = (jnp.pad(a[:, shuffled], pad, constant_values=50.0) for a in (k, v))
    p2 = jnp.pad(key_positions[:, shuffled], ((0, 0), (0, 6)), constant_values=-1)
    close(jitted(q, k2, v2, positions, p2), exact(q, k, v, positions, key_positions))


@pytest.mark.parametrize("keys, values", [("fp8", "fp8"), ("nvfp4", "nvfp4"), ("fp8", "nvfp4"), ("", "fp8")])
@pytest.mark.parametrize("length", [1, 4])
def test_reference_of_a_quantized_cache_against_float64(keys, values, length):
    arguments = case(7, 3, length, 6, 2, 64, 40, keys, values)
    close(jitted(*arguments), exact(*arguments))
    close(jitted(*arguments, window=5), exact(*arguments, window=5))


def test_a_query_that_sees_no_key_gives_zeros():
    q, k, v, positions, _ = case(1, 2, 2, 4, 2, 32, 5)
    nothing = jnp.full((2, 5), -1, jnp.int32)
    np.testing.assert_array_equal(np.asarray(attend(q, k, v, positions, nothing), np.float32), 0)
    above = positions.at[0, 1].set(-3)  # a padding row among others
    y = np.asarray(attend(q, k, v, above, jnp.broadcast_to(jnp.arange(5), (2, 5))), np.float32)
    assert not y[0, 1].any()
    assert y[0, 0].all() and y[1].all()


def test_bad_input_is_named():
    q, k, v, p, kp = case(0, 2, 1, 4, 2, 32, 5)
    for arguments, said in (
        ((q[0], k, v, p, kp), "needed: q"),
        ((q, k, v[:, :4], p, kp), "needed: q"),
        ((q[:, :, :3], k, v, p, kp), "multiple of kv_heads"),
        ((q[..., :16], k, v, p, kp), "head_dim"),
        ((q, k, v, p[:1], kp), "positions are int32"),
        ((q, k, v, p, kp.astype(jnp.float32)), "key_positions are float32"),
    ):
        with pytest.raises(InputError, match=said):
            attend(*arguments)
    with pytest.raises(InputError, match="window is 0"):
        attend(q, k, v, p, kp, window=0)
    with pytest.raises(InputError, match="no implementation 'hoper'; did you mean 'hopper'"):
        attend(q, k, v, p, kp, implementation="hoper")
    with pytest.raises(InputError, match="hopper: head_dim is 32"):
        attend(q, k, v, p, kp, implementation="hopper")


def test_hopper_says_why_not():
    def why(*arguments, **changes):
        return hopper.why_not(*case(0, *arguments, **changes))

    assert why(1, 1, 8, 2, 64, 5) is None
    for empty in ((0, 1, 8, 2, 64, 5), (2, 0, 8, 2, 64, 5), (2, 1, 8, 2, 64, 0)):
        assert "nothing to compute" in str(hopper.why_not(*specs(empty, "", "")))
    assert why(1, 17, 8, 2, 64, 5) == "length is 17, above 16"
    assert why(1, 16, 16, 2, 64, 5) == "128 query rows share a key head, above 64"
    assert why(1, 1, 8, 2, 96, 5) == "head_dim is 96, none of 64, 128 and 256"
    assert why(1, 1, 8, 2, 64, 5, dtype=jnp.float32) == "q is float32, neither bfloat16 nor float16"
    q, k, v, p, kp = case(0, 1, 1, 8, 2, 64, 5)
    assert hopper.why_not(q, k.astype(jnp.float32), v, p, kp) == "k is float32, q is bfloat16"
    assert "neither FP8 nor NVFP4" in str(hopper.why_not(q, k, INT8().encode(v), p, kp))
    assert "not FP8 per tensor" in str(hopper.why_not(q, FP8(per="token").encode(k), v, p, kp))


INTERPRETED = [
    # batch, length, heads, kv_heads, head_dim, slots, keys, values, window
    (2, 1, 2, 2, 64, 100, "nvfp4", "nvfp4", None),  # ragged slots, one query per key head, 8 scales in a row
    (2, 2, 7, 1, 64, 150, "fp8", "nvfp4", None),  # two formats, splits that nobody sees
    (1, 3, 8, 2, 128, 130, "nvfp4", "fp8", 40),  # rows beyond 8, a window that leaves a split out
    (2, 1, 4, 2, 64, 70, "", "", None),
]


@pytest.mark.parametrize("case_", INTERPRETED, ids=str)
def test_hopper_is_the_reference(case_):
    *sizes, keys, values, window = case_
    arguments = case(11, *sizes, keys, values)
    assert hopper.why_not(*arguments, window=window) is None
    found = interpreted(*arguments, window=window)
    assert found.dtype == jnp.bfloat16
    close(found, exact(*arguments, window=window), 0.006)  # the last rounding, and weights in 16 bits
    close(jitted(*arguments, window=window), exact(*arguments, window=window))


def test_hopper_with_queries_beyond_float16_and_rows_of_padding():
    q, k, v, positions, key_positions = case(5, 2, 1, 4, 1, 64, 64, "fp8", "fp8")
    q = (q.astype(jnp.float32) * 1e6).astype(jnp.bfloat16).at[0, 0, 1].set(0)
    positions = positions.at[1, 0].set(-1)
    found = interpreted(q, k, v, positions, key_positions)
    close(found, exact(q, k, v, positions, key_positions), 0.006)
    assert not np.asarray(found[1], np.float32).any()


def spread(layout, shape):
    """The place in a matrix of each number that a thread has, int `[128, *registers, vector]`."""
    layout = layout.to_mgpu()
    a = np.arange(np.prod(shape)).reshape(shape)
    for tile in layout.tiling.tiles:
        lead, last = a.shape[: a.ndim - len(tile)], a.shape[a.ndim - len(tile) :]
        a = a.reshape(*lead, *(x for d, t in zip(last, tile, strict=True) for x in (d // t, t)))
        at = a.ndim - 2 * len(tile)
        a = a.transpose(*range(at), *range(at, a.ndim, 2), *range(at + 1, a.ndim, 2))
    moved = (*layout.warp_dims, *layout.lane_dims)
    a = np.moveaxis(a, moved, range(len(moved)))
    return a.reshape(128, *layout.registers_shape(shape), -1)


@pytest.mark.parametrize("size", [64, 128, 256])
@pytest.mark.parametrize("packed", [False, True])
def test_order_is_where_the_registers_put_the_columns(size, packed):
    order, each, per = cache_codes.order(size, packed), cache_codes._chunk(size, packed), 2 if packed else 1
    codes = spread(cache_codes._layout(size // per, each), (64, size // per))
    made = spread(plgpu.Layout.WGMMA, (64, size))
    scales = spread(cache_codes._layout(size // 16, each // 8), (64, size // 16)) if packed else None
    pairs = cache_codes._E2M1_PAIRS if packed else cache_codes._E4M3_PAIRS
    words = each // 4
    for row, chunk, *rest in np.ndindex(codes.shape[1:-1]):
        here = codes[(slice(None), row, chunk, *rest)].astype(np.int64)
        numbers = (here[..., None] * per + np.arange(per)).reshape(128, words, 4 * per)  # flat, of [64, size]
        for i, j in np.ndindex(words, len(pairs)):
            found = numbers[:, i][:, list(pairs[j])]
            place = made[(slice(None), row, (chunk * words + i) * len(pairs) + j, *rest)]
            np.testing.assert_array_equal(found, place // size * size + order[place % size])
            if scales is not None:
                scale = scales[(slice(None), row, chunk, *rest, i * 8 // 16)]
                np.testing.assert_array_equal(found // 16, np.stack([scale] * 2, 1))


def run_ptx(text, *operands):
    """What the few PTX instructions of `text` write to its first registers, as pairs of float16."""
    registers = {f"${i + text.count('cvt')}": np.uint32(a) for i, a in enumerate(operands)}

    def value(name):
        return registers[name] if name in registers else np.uint32(int(name, 0))

    for line in text.strip("{}").replace("{", "").replace("}", "").split(";"):
        op, *names = line.replace(",", " ").split() or [".reg"]
        match op:
            case ".reg":
                pass
            case "shl.b32":
                registers[names[0]] = value(names[1]) << value(names[2])
            case "shr.u32":
                registers[names[0]] = value(names[1]) >> value(names[2])
            case "and.b32":
                registers[names[0]] = value(names[1]) & value(names[2])
            case "lop3.b32":
                assert names[4] == "0xea"
                registers[names[0]] = value(names[1]) & value(names[2]) | value(names[3])
            case "mov.b32":
                registers[names[0]], registers[names[1]] = value(names[2]) & 0xFFFF, value(names[2]) >> 16
            case "cvt.rn.f16x2.e4m3x2":
                codes = np.array([value(names[1])], np.uint16).view(jnp.float8_e4m3fn)
                registers[names[0]] = codes.astype(np.float16).view(np.uint32)[0]
            case "mul.rn.f16x2":
                a, b = (np.array([value(n)]).view(np.float16) for n in names[1:])
                registers[names[0]] = (a * b).view(np.uint32)[0]
            case _:
                raise AssertionError(op)
    return [np.array([registers[f"${i}"]]).view(np.float16) for i in range(text.count("cvt"))]


@pytest.mark.parametrize("scale", [1.0, 448.0, 2.0**-9])
def test_ptx_of_e2m1_gives_every_value_times_its_scale(scale):
    twice = np.full(2, scale, np.float16).view(np.uint32)[0]
    value = np.asarray(e2m1_value(jnp.arange(16, dtype=jnp.uint8))) * scale / cache_codes.SHRUNK
    for first in range(16):
        codes = np.arange(first, first + 8) * 5 % 16
        word = (codes.astype(np.uint64) << (4 * np.arange(8, dtype=np.uint64))).sum()
        pairs = run_ptx(cache_codes._E2M1, word, twice)
        for pair, places in zip(pairs, cache_codes._E2M1_PAIRS, strict=True):
            np.testing.assert_array_equal(pair, value[codes[list(places)]].astype(np.float16))
            np.testing.assert_array_equal(pair.astype(np.float64), value[codes[list(places)]])


def test_ptx_of_e4m3_gives_every_value():
    for first in range(0, 256, 4):
        codes = np.arange(first, first + 4, dtype=np.uint8)
        pairs = run_ptx(cache_codes._E4M3, codes.view(np.uint32)[0])
        for pair, places in zip(pairs, cache_codes._E4M3_PAIRS, strict=True):
            value = codes[list(places)].view(jnp.float8_e4m3fn).astype(np.float16)
            np.testing.assert_array_equal(pair, value)


def spec(name, shape):
    if FORMATS[name] is None:
        return jax.ShapeDtypeStruct(shape, jnp.bfloat16)
    return FORMATS[name].spec(shape, np.dtype(jnp.bfloat16))


def specs(shape, keys, values):
    batch, length, heads, kv_heads, size, slots = shape
    cache = (batch, slots, kv_heads, size)
    q = jax.ShapeDtypeStruct((batch, length, heads, size), jnp.bfloat16)
    positions = (jax.ShapeDtypeStruct((batch, n), jnp.int32) for n in (length, slots))
    return q, spec(keys, cache), spec(values, cache), *positions


@pytest.mark.parametrize(
    "shape, keys, values, window",
    [
        (hopper.SHAPES[0], "fp8", "fp8", None),
        (hopper.SHAPES[1], "nvfp4", "nvfp4", None),
        (hopper.SHAPES[3], "fp8", "nvfp4", 1024),
        (hopper.SHAPES[4], "", "", None),
        (hopper.SHAPES[5], "nvfp4", "fp8", None),
        (hopper.SHAPES[6], "nvfp4", "nvfp4", None),
        ((1, 1, 16, 8, 256, 999), "", "nvfp4", None),
    ],
    ids=str,
)
def test_hopper_lowers(shape, keys, values, window):
    arguments = specs(shape, keys, values)
    assert hopper.why_not(*arguments, window=window) is None
    lowered(lambda *a: hopper.attend(*a, window=window), *arguments)


@gpu
@pytest.mark.parametrize("keys, values", [("fp8", "fp8"), ("nvfp4", "nvfp4"), ("fp8", "nvfp4"), ("", "")])
@pytest.mark.parametrize("shape", hopper.SHAPES, ids=str)
@pytest.mark.parametrize("window", [None, 300])
def test_hopper_on_a_gpu_against_float64(shape, keys, values, window):
    arguments = case(13, *shape, keys, values)
    found = jax.jit(lambda *a: attend(*a, window=window, implementation="hopper"))(*arguments)
    close(found, exact(*arguments, window=window), 0.006)


@gpu
@pytest.mark.parametrize("slots", [5, 64, 65, 300])
@pytest.mark.parametrize("heads, kv_heads", [(4, 4), (7, 1), (12, 2), (64, 2)])
@pytest.mark.parametrize("size", [64, 128, 256])
def test_hopper_on_a_gpu_at_ragged_edges(size, heads, kv_heads, slots):
    for keys, values in (("fp8", "nvfp4"), ("nvfp4", "fp8"), ("", "fp8")):
        arguments = case(17, 3, 1, heads, kv_heads, size, slots, keys, values)
        close(attend(*arguments, implementation="hopper"), exact(*arguments), 0.006)


@gpu
def test_hopper_on_a_gpu_keeps_nan_of_one_query_to_itself():
    q, k, v, positions, key_positions = case(19, 2, 2, 8, 2, 128, 500, "fp8", "nvfp4")
    wanted = exact(q, k, v, positions, key_positions)
    found = attend(q.at[0, 1, 3, 5].set(jnp.nan), k, v, positions, key_positions, implementation="hopper")
    lost = np.isnan(np.asarray(found, np.float64))
    assert lost[0, 1, 3 * 128 : 4 * 128].all() and lost.sum() == 128
    assert (
        np.abs(np.where(lost, 0, np.asarray(found, np.float64) - wanted)).max() < 0.006 * np.abs(wanted).max()
    )
