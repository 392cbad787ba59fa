"""Every number format keeps the promises of mojax.formats.base, on every option and in both arithmetics."""

import dataclasses
import functools
import itertools
import typing

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from mojax.errors import InputError
from mojax.find import find, names
from mojax.formats import numerics

BF16 = np.dtype(ml_dtypes.bfloat16)
ARITHMETIC = ("checkpoint", "float32")
VALUES = {bool: (True, False), int: (32,)}  # tried besides the default


def variants():
    """Every format with every value of its options, in both arithmetics."""
    for name in names("formats"):
        cls = find("formats", name).FORMAT
        hints = typing.get_type_hints(cls)
        own = [f for f in dataclasses.fields(cls) if not f.kw_only]
        choices = [
            dict.fromkeys((f.default, *(typing.get_args(hints[f.name]) or VALUES[hints[f.name]])))
            for f in own
        ]
        for values in itertools.product(*choices):
            options = dict(zip((f.name for f in own), values, strict=True))
            if options.get("per") != "token":  # the arithmetic of "channel", on inputs
                yield from (cls(**options, arithmetic=a) for a in ARITHMETIC)


FORMATS = tuple(variants())
each_format = pytest.mark.parametrize("format", FORMATS, ids=lambda f: f"{f.label} {f.arithmetic}")


def make(name, arithmetic="float32", **options):
    return find("formats", name).FORMAT(**options, arithmetic=arithmetic)


def gauss(shape, seed=0, dtype=np.float32):
    return np.random.default_rng(seed).standard_normal(shape).astype(dtype)


def weight():
    """bfloat16 [130, 256]: a zero row, a zero block, a huge and some tiny blocks, signed zeros, constants."""
    w = gauss((130, 256))
    w[0] = 0
    w[1, :128] = 0
    w[2, :128] = 1e-30
    w[3, :128] = 2.0**-120
    w[4, 7] = 96
    w[5] = np.where(np.arange(256) % 2, -0.0, 1e-6)
    w[6] = -0.75
    w[7] = np.linspace(-1, 3, 256)
    return w.astype(BF16)


def encoded(format, w, outer=None):
    return jax.tree.map(np.asarray, format.encode(w, outer))


def assert_same(a, b):
    """Two QTensors hold the same bytes."""
    assert (a.format, a.shape, a.dtype) == (b.format, b.shape, b.dtype)
    assert a.scales.keys() == b.scales.keys()
    for x, y in zip(jax.tree.leaves(a), jax.tree.leaves(b), strict=True):
        x, y = np.asarray(x), np.asarray(y)
        assert (x.dtype, x.shape) == (y.dtype, y.shape)
        assert x.tobytes() == y.tobytes()


def test_every_format_is_here():
    assert {f.name for f in FORMATS} == set(names("formats"))


@each_format
def test_the_same_bytes_jitted_and_eager_from_numpy_and_jax(format):
    w = weight()
    eager = encoded(format, w)
    assert_same(eager, jax.jit(lambda x: format.encode(x * 1))(jnp.asarray(w)))
    value = np.asarray(format.decode(eager))
    assert value.tobytes() == np.asarray(jax.jit(lambda q: format.decode(q) * 1)(eager)).tobytes()


@each_format
def test_decoding_gives_finite_float32_of_the_logical_shape(format):
    w = weight()
    q = encoded(format, w)
    value = np.asarray(format.decode(q))
    assert (q.shape, q.dtype, value.shape, value.dtype) == (w.shape, BF16, w.shape, np.float32)
    assert np.isfinite(value).all()
    # Rows 2 and 3 are too small for some scales; the rest of the tensor is not disturbed by them.
    rest = np.r_[0:2, 4:130]
    error = value[rest] - w[rest].astype(np.float32)
    assert np.abs(error).max() <= np.abs(w[rest].astype(np.float32)).max() / 4


@each_format
@pytest.mark.parametrize("dtype", [BF16, np.dtype(np.float16), np.dtype(np.float32)], ids=str)
def test_a_tensor_of_zeros_decodes_to_zeros(format, dtype):
    q = encoded(format, np.zeros((4, 256), dtype))
    for array in q.scales.values():
        assert np.isfinite(array.astype(np.float32)).all()
    assert not np.asarray(format.decode(q)).any()


@each_format
def test_spec_is_what_encode_gives(format):
    q, spec = encoded(format, weight()), format.spec((130, 256), BF16)
    assert jax.tree.structure(q) == jax.tree.structure(spec)
    for array, s in zip(jax.tree.leaves(q), jax.tree.leaves(spec), strict=True):
        assert (array.shape, array.dtype) == (s.shape, s.dtype)
    assert q.nbytes == spec.nbytes < weight().nbytes


@each_format
def test_decoded_values_are_fixed_points(format):
    q = encoded(format, weight())
    value = np.asarray(format.decode(q))
    again = np.asarray(format.decode(format.encode_as(value, q.scales)))
    np.testing.assert_array_equal(again, value)


@each_format
def test_fake_is_encode_then_decode_in_the_dtype_of_the_input(format):
    x = weight()[:6].reshape(2, 3, 256)
    outer = format.outer(np.float32(20), BF16) if format.static else None
    y = format.fake(x, outer)
    assert (y.shape, y.dtype) == (x.shape, BF16)
    if format.label == "fp8 per=block":  # inputs: groups of 128 along the last axis, however many tokens
        groups = x.reshape(2, 3, 2, 128)
        expected = dataclasses.replace(format, per="token").fake(groups).reshape(x.shape)
    else:
        expected = np.asarray(format.decode(format.encode(x, outer))).astype(BF16)
    assert np.asarray(y).tobytes() == np.asarray(expected).tobytes()


@each_format
def test_outer_is_for_formats_with_a_scale_per_tensor(format):
    has_outer = "outer" in encoded(format, weight()).scales
    assert (format.static or format.fused) == has_outer
    if not has_outer:
        with pytest.raises(TypeError, match=f"{format.name} has no outer scale"):
            format.outer(np.float32(1), BF16)
        return
    scale = format.outer(np.float32(3.7), BF16)
    assert (scale.dtype, scale.shape) == (np.float32, ())
    read = dataclasses.replace(format, as_read=True)  # a maximum that inverts a scale: no second rounding
    assert read.outer(np.float32(3.7), BF16) == format.outer(np.float32(3.7), np.dtype(np.float32))
    w = weight()
    own = format.outer(np.abs(w.astype(np.float32)).max(), BF16)
    assert encoded(format, w).scales["outer"].tobytes() == np.asarray(own).tobytes()
    assert encoded(read, w).scales["outer"].tobytes() == np.asarray(own).tobytes()
    assert encoded(format, w, scale).scales["outer"].tobytes() == np.asarray(scale).tobytes()


@pytest.mark.parametrize(
    ("format", "size"),
    [
        (make("nvfp4"), 16),
        (make("mxfp4"), 32),
        (make("mxfp8"), 32),
        (make("int4"), 128),
        (make("int4", group=32, symmetric=False), 32),
    ],
    ids=lambda v: getattr(v, "label", v),
)
def test_shapes_that_do_not_divide_are_said(format, size):
    assert format.check((3, 4 * size)) is None
    assert format.check((3, 4 * size + 8)) == f"last axis {4 * size + 8} is not divisible by {size}"


def test_blocks_need_two_axes():
    assert make("fp8", per="block").check((200, 300)) is None
    assert make("fp8", per="block").check((300,)) == "shape (300,) has no blocks of 128 x 128"


@pytest.mark.parametrize(
    ("name", "options", "message"),
    [
        ("fp8", {"per": "blok"}, "fp8 per: 'blok' is not possible; did you mean 'block'"),
        ("int8", {"per": "block"}, "int8 per: 'block' is not possible"),
        ("int4", {"group": 7}, "int4 group: 7 is not a positive even number"),
        ("int4", {"group": "128"}, "int4 group: '128' is not"),
        ("int4", {"group": True}, "int4 group: True is not"),
        ("int4", {"symmetric": "no"}, "int4 symmetric: 'no' is neither true nor false"),
    ],
)
def test_impossible_options_are_said(name, options, message):
    with pytest.raises(InputError, match=message.replace("(", r"\(")):
        make(name, **options)


# Numbers.

GAUSS = [  # relative L2 error of a Gaussian [2048, 2048]; known from independent implementations
    (make("nvfp4"), 0.0951),
    (make("nvfp4", "checkpoint"), 0.0951),
    (make("mxfp4"), 0.1155),
    (make("mxfp8"), 0.0266),
    (make("int4"), 0.1174),
    (make("int4", "checkpoint"), 0.1109),
    (make("int4", group=32), 0.0971),
    (make("int8"), 0.0083),
    (make("fp8"), 0.0265),
    (make("fp8", "checkpoint", per="channel"), 0.0265),
    (make("fp8", "checkpoint", per="block"), 0.0265),
]


@pytest.mark.parametrize(("format", "expected"), GAUSS, ids=lambda v: getattr(v, "label", v))
def test_error_on_a_gaussian(format, expected):
    w = gauss((2048, 2048))
    error = np.asarray(format.decode(format.encode(w))) - w
    assert np.linalg.norm(error) / np.linalg.norm(w) == pytest.approx(expected, rel=0.02)


@functools.cache
def every_code(format):
    """Jitted: scales -> the value of every code, `[codes, out, in]` for a `[4, 256]` weight."""
    if format.bits == 4:
        codes = np.arange(16, dtype=np.uint8)
    elif format.name.startswith("int"):
        codes = np.arange(-128, 128).astype(np.int8)
    else:
        codes = np.arange(256, dtype=np.uint8).view(ml_dtypes.float8_e4m3fn)
        codes = codes[np.isfinite(codes.astype(np.float32))]
    full = np.broadcast_to(codes[:, None, None], (len(codes), 4, 256))
    return jax.jit(lambda scales: jax.vmap(lambda c: format.value(c, scales))(full))


@each_format
@settings(max_examples=8, deadline=None, derandomize=True, database=None)
@given(
    seed=st.integers(0, 2**32 - 1),
    exponent=st.integers(-20, 20),
    spread=st.sampled_from([0, 1, 4]),
    dtype=st.sampled_from([BF16, np.dtype(np.float32)]),
)
def test_the_nearest_code_is_taken(format, seed, exponent, spread, dtype):
    """At most half a step from the value, or clipped; a rounded quotient may miss by its own half unit."""
    random = np.random.default_rng(seed)
    w = random.standard_normal((4, 256)) * np.exp(spread * random.standard_normal((4, 256)))
    w = (w * 2.0**exponent).astype(dtype)
    q = encoded(format, w)
    exact = w.astype(np.float64)
    error = np.abs(np.asarray(format.decode(q)) - exact)
    possible = np.abs(np.asarray(every_code(format)(q.scales)) - exact).min(axis=0)
    working = dtype if format.arithmetic == "checkpoint" or format.label == "fp8" else np.float32
    unit = float(ml_dtypes.finfo(working).eps)
    reach = np.abs(exact)
    if "zero" in q.scales:  # rounded after the zero point was added, in units of the scale
        reach = reach + 16 * np.repeat(q.scales["inner"].astype(np.float64), format.group, axis=-1)
    assert (error <= possible + 2 * unit * reach).all()


def every_bf16():
    """All finite bfloat16 values."""
    values = np.arange(2**16, dtype=np.uint16).view(BF16)
    return values[np.isfinite(values.astype(np.float32))]


def normal(x):
    return (x == 0) | (np.abs(x) >= 2.0**-126)


def test_e2m1_is_the_ml_dtypes_cast():
    x = every_bf16().astype(np.float32)
    x = x[normal(x)]
    expected = x.astype(ml_dtypes.float4_e2m1fn)
    code = np.asarray(jax.jit(lambda x: numerics.e2m1(x, jnp.signbit(x)))(x))
    np.testing.assert_array_equal(code, expected.view(np.uint8) & 15)
    np.testing.assert_array_equal(np.asarray(numerics.e2m1_value(code)), expected.astype(np.float32))


def test_e2m1_ties_toward_zero():
    ties = np.array([0.25, 0.75, 1.25, 1.75, 2.5, 3.5, 5.0], np.float32)
    down = numerics.e2m1(ties, ties < 0, ())
    above = numerics.e2m1(np.nextafter(ties, np.float32(9)), ties < 0, ())
    np.testing.assert_array_equal(np.asarray(down), np.arange(7))
    np.testing.assert_array_equal(np.asarray(above), np.arange(1, 8))


def test_e4m3_is_the_ml_dtypes_cast_but_saturates():
    x = np.concatenate([every_bf16().astype(np.float32), gauss(100_000) * 0.02])
    x = x[normal(x)]
    expected = np.clip(x, -448, 448).astype(ml_dtypes.float8_e4m3fn)
    assert np.asarray(jax.jit(numerics.e4m3)(x)).tobytes() == expected.tobytes()


@pytest.mark.parametrize("dtype", [BF16, np.dtype(np.float16)], ids=str)
def test_narrow_is_a_cast_there_and_back(dtype):
    x = np.concatenate([gauss(100_000) * 2.0**e for e in (-30, -25, -20, -14, 0, 14)]).astype(np.float32)
    with np.errstate(over="ignore"):
        expected = x.astype(dtype).astype(np.float32)
    np.testing.assert_array_equal(np.asarray(jax.jit(lambda x: numerics.narrow(x, dtype))(x)), expected)


@pytest.mark.parametrize("jit", [jax.jit, lambda f: f], ids=["jit", "eager"])
def test_divide_rounds_once(jit):
    x, s = gauss((300, 64)), np.abs(gauss((300, 1), seed=1)) + np.float32(0.1)
    np.testing.assert_array_equal(np.asarray(jit(numerics.divide)(x, s)), x / s)
    np.testing.assert_array_equal(np.asarray(jit(numerics.divide)(x, s[7, 0])), x / s[7, 0])
    for constant in (6.0, 7.0, 7.5, 127.5, 448.0, 2688.0):
        expected = x / np.float32(constant)
        np.testing.assert_array_equal(
            np.asarray(jit(lambda x, c=constant: numerics.divide(x, c))(x)), expected
        )


@pytest.mark.parametrize(("name", "largest"), [("mxfp4", 6), ("mxfp8", 448)])
def test_exponents_round_up_exactly(name, largest):
    top = every_bf16()
    top = top[top.astype(np.float32) >= 2.0**-100]
    w = np.zeros((len(top), 32), BF16)
    w[:, 3] = top
    exponent = encoded(make(name), w).scales["inner"][:, 0].astype(np.int32) - 127
    scale = np.ldexp(1.0, exponent)
    reach = top.astype(np.float64) / largest
    assert ((reach <= scale) & (reach > scale / 2)).all()


def test_partial_blocks_have_their_own_scale():
    w = gauss((200, 300)) * np.exp(gauss((200, 300), seed=1))
    format = make("fp8", per="block")
    q = encoded(format, w)
    assert (q.codes.shape, q.scales["inner"].shape) == ((200, 300), (2, 3))
    for i, j in itertools.product(range(2), range(3)):
        block = np.s_[128 * i : 128 * (i + 1), 128 * j : 128 * (j + 1)]
        scale = np.abs(w[block]).max() / np.float32(448)
        assert q.scales["inner"][i, j] == scale
        codes = np.clip(w[block] / scale, -448, 448).astype(ml_dtypes.float8_e4m3fn)
        np.testing.assert_array_equal(q.codes[block], codes)
        np.testing.assert_array_equal(np.asarray(format.decode(q))[block], codes.astype(np.float32) * scale)


def test_stacked_weights_are_encoded_one_by_one():
    w = gauss((3, 130, 256), dtype=BF16)
    for format in (make("fp8", per="block"), make("int4"), make("mxfp4"), make("int8")):
        stacked = encoded(format, w)
        for i in range(3):
            one = encoded(format, w[i])
            assert stacked.codes[i].tobytes() == one.codes.tobytes()
            assert stacked.scales["inner"][i].tobytes() == one.scales["inner"].tobytes()


def test_inputs_per_block_may_end_in_a_partial_group():
    x = gauss((5, 300), dtype=BF16)
    format = make("fp8", "checkpoint", per="block")
    y = np.asarray(format.fake(x))
    token = make("fp8", "checkpoint", per="token")
    expected = [np.asarray(token.fake(x[:, i : i + 128])) for i in (0, 128, 256)]
    assert y.tobytes() == np.concatenate(expected, axis=1).tobytes()


def test_float16_weights_below_its_reciprocal_range_keep_their_precision():
    """2688 / amax overflows float16 from amax = 0.041 on; the error must not depend on the magnitude."""
    format = make("nvfp4", "checkpoint")
    w = (gauss((64, 256)) * 2.0**-9).astype(np.float16)
    error = np.asarray(format.decode(format.encode(w))) - w.astype(np.float32)
    assert np.linalg.norm(error) / np.linalg.norm(w.astype(np.float32)) < 0.1
