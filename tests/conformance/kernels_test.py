"""Every kernel computes what the decoded weight computes, jitted or not, and says which shapes do not fit."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from formats_test import BF16, each_format, encoded, gauss, make
from hypothesis import given, settings
from hypothesis import strategies as st
from jax import lax

from mojax.compile import jit
from mojax.errors import InputError
from mojax.find import names
from mojax.formats.base import encode_leaf
from mojax.kernels.base import in_file_order, prepared
from mojax.kernels.conv import conv
from mojax.kernels.grouped_matmul import grouped_matmul
from mojax.kernels.matmul import matmul
from mojax.kernels.take import take

FORMAT = make("nvfp4")
KERNELS = tuple("attention conv dequantize grouped_matmul hadamard matmul quantize scaled take".split())


def value(q):
    """What a kernel multiplies with, in float64: the decoded weight, rounded only where a server rounds it.

    Integers of groups, NF4 and FP8 of blocks are rounded to the weight's dtype; of the other formats codes
    and inner scales are multiplied exactly, and what is left of the scales meets the sum.
    """
    w = np.asarray(q.format.decode(q))
    rounds = q.format.name in ("int4", "nf4") or getattr(q.format, "per", "") == "block"
    return (w.astype(q.dtype) if rounds else w).astype(np.float64)


def decoded(q):
    """The decoded weight, rounded to the weight's dtype, in float64."""
    return np.asarray(q.format.decode(q)).astype(q.dtype).astype(np.float64)


def close(y, expected, dtype=np.float32):
    """Equal up to sums in float32 and one rounding to `dtype`; sums in bfloat16 would be far off."""
    y = np.asarray(y)
    assert (y.shape, y.dtype) == (expected.shape, dtype)
    unit = float(jnp.finfo(dtype).eps)
    np.testing.assert_allclose(
        y.astype(np.float64), expected, rtol=unit, atol=2e-6 * max(1, np.abs(expected).max())
    )


def test_these_are_all_kernels():
    assert names("kernels") == KERNELS


@each_format
def test_matmul_is_the_product_with_the_decoded_weight(format):
    q, x = encoded(format, gauss((130, 256), dtype=BF16)), gauss((2, 3, 256), seed=1, dtype=BF16)
    expected = x.astype(np.float64) @ value(q).T
    close(jit()(lambda x, q: matmul(x, q, dtype=jnp.float32))(x, q), expected)
    close(matmul(x, q, dtype=BF16), expected, BF16)


@pytest.mark.parametrize("dtypes", [(BF16, np.float32), (np.float32, BF16)], ids=str)
def test_inputs_and_weight_of_two_dtypes_meet_in_float32(dtypes):
    w, x = (gauss(shape, dtype=d) for shape, d in zip(((8, 64), (5, 64)), dtypes, strict=True))
    q = encoded(FORMAT, w)
    close(matmul(x, q, dtype=np.float32), x.astype(np.float64) @ value(q).T)


INPUTS = [("nvfp4", {}), ("int8", {"per": "token"}), ("int8", {"per": "tensor"}), ("fp8", {"per": "block"})]


@pytest.mark.parametrize(("name", "options"), INPUTS, ids=str)
def test_gradients_pass_through_the_rounding_of_inputs(name, options):
    inputs, q = make(name, **options), encoded(FORMAT, gauss((8, 64), dtype=BF16))
    x, dy, bias = gauss((5, 64), seed=1, dtype=BF16), gauss((5, 8), seed=2), gauss((8,), seed=3)

    def run(x, bias):
        return jnp.vdot(matmul(x, q, dtype=jnp.float32, bias=bias, inputs=inputs), dy)

    dx, dbias = jax.jit(jax.grad(run, (0, 1)))(x, bias)
    close(dx, dy.astype(np.float64) @ value(q), BF16)
    close(dbias, dy.sum(0, dtype=np.float64))
    tangent = jax.jvp(functools.partial(run, bias=bias), (x,), (x,))[1]
    np.testing.assert_allclose(tangent, (x.astype(np.float64) @ value(q).T * dy).sum(), rtol=1e-4)


@pytest.mark.parametrize(("name", "options"), INPUTS, ids=str)
def test_gradients_of_groups_pass_through_the_rounding_of_inputs(name, options):
    inputs, sizes = make(name, **options), np.array([4, 0, 3], np.int32)
    x, w, dy = gauss((9, 64), seed=1), gauss((3, 8, 64)), gauss((9, 8), seed=2)

    def run(x, w):
        return jnp.vdot(grouped_matmul(x, w, sizes, dtype=jnp.float32, inputs=inputs), dy)

    seen = np.asarray(inputs.fake(x)).astype(np.float64)
    groups = ((np.s_[0:4], 0), (np.s_[4:7], 2))
    dx, dw = np.zeros(x.shape), np.zeros(w.shape)
    for rows, i in groups:
        dx[rows], dw[i] = dy[rows].astype(np.float64) @ w[i], dy[rows].T.astype(np.float64) @ seen[rows]
    got = jax.jit(jax.grad(run, (0, 1)))(x, w)
    close(got[0], dx)
    close(got[1], dw)
    q = encode_leaf(FORMAT, w, (2,), (0,))
    for rows, i in groups:
        dx[rows] = dy[rows].astype(np.float64) @ decoded(q)[i]
    close(jax.jit(jax.grad(lambda x: run(x, q)))(x), dx)


@pytest.mark.parametrize(("name", "options"), INPUTS, ids=str)
def test_no_inputs_are_no_outputs(name, options):
    how = {"dtype": jnp.float32, "inputs": make(name, **options)}
    assert matmul(jnp.zeros((0, 32)), plain(), **how).shape == (0, 4)
    assert matmul(jnp.zeros((3, 0, 32)), experts(), **how).shape == (3, 0, 4)
    assert grouped_matmul(jnp.zeros((0, 32)), experts(), jnp.zeros(3, jnp.int32), **how).shape == (0, 4)


@each_format
@pytest.mark.parametrize("major", [9, 10])
@pytest.mark.parametrize("shape", [(128, 256), (96, 256), (2, 128, 256)], ids=str)
def test_a_prepared_weight_goes_back_to_the_order_of_files(format, major, shape):
    """Whatever a recipe encodes can be prepared for any device, also what its kernel does not take."""
    q = encode_leaf(format, gauss(shape, dtype=BF16), (len(shape) - 1,), tuple(range(len(shape) - 2)))
    for inputs in (None, format):
        back = in_file_order(prepared(q, inputs, major))
        assert jax.tree.structure(back) == jax.tree.structure(q)
        for a, b in zip(jax.tree.leaves(back), jax.tree.leaves(q), strict=True):
            assert np.asarray(a).tobytes() == np.asarray(b).tobytes()


@settings(max_examples=15, deadline=None, derandomize=True, database=None)
@given(batch=st.lists(st.integers(1, 3), max_size=2), rest=st.lists(st.integers(1, 3), max_size=2))
def test_matmul_in_batches(batch, rest):
    w, x = gauss((*batch, 5, 32)), gauss((*batch, *rest, 32), seed=1)
    q = encode_leaf(FORMAT, w, (len(batch) + 1,), tuple(range(len(batch))))
    expected = np.empty((*batch, *rest, 5))
    for i in np.ndindex(*batch):
        expected[i] = x[i].astype(np.float64) @ value(q)[i].T
    close(matmul(x, q, dtype=np.float32), expected)


def test_a_leaf_of_another_layout_is_its_matrices():
    w, x = gauss((4, 8, 3, 2)), gauss((5, 32))  # [in, in, out, out]
    q = encode_leaf(FORMAT, w, (0, 1))
    expected = np.einsum("bij,ijop->bop", x.reshape(5, 4, 8).astype(np.float64), value(q))
    close(matmul(x, q, dtype=np.float32), expected.reshape(5, 6))


@each_format
def test_grouped_matmul_gives_each_group_its_matrix(format):
    q = encode_leaf(format, gauss((3, 130, 256), dtype=BF16), (2,), (0,))
    x, sizes = gauss((9, 256), seed=1, dtype=BF16), np.array([4, 0, 3], np.int32)
    expected = np.zeros((9, 130))
    for rows, i in ((np.s_[0:4], 0), (np.s_[4:7], 2)):  # no row for group 1; rows 7 and 8 have no group
        expected[rows] = x[rows].astype(np.float64) @ value(q)[i].T
    run = jit()(lambda *args: grouped_matmul(*args, dtype=jnp.float32))
    close(run(x, q, sizes), expected)


@each_format
@pytest.mark.parametrize("jitted", [True, False], ids=["jit", "eager"])
def test_take_reads_the_rows_of_the_decoded_table(format, jitted):
    w = gauss((300, 256), dtype=BF16) * np.exp(gauss((300, 1), seed=1)).astype(BF16)
    q = encoded(format, w)
    indices = np.array([[0, 127, 128], [255, 256, 299], [7, 7, 130]], np.int32)
    run = functools.partial(take, dtype=BF16)
    y = np.asarray((jit()(run) if jitted else run)(q, indices))
    expected = np.asarray(format.decode(q))[indices].astype(BF16)
    assert (y.dtype, y.tobytes()) == (BF16, expected.tobytes())


def test_take_decodes_only_what_is_looked_up():
    q = jax.eval_shape(FORMAT.encode, jax.ShapeDtypeStruct((1 << 16, 1024), BF16))
    compiled = jax.jit(functools.partial(take, dtype=BF16)).lower(q, jnp.zeros(8, jnp.int32)).compile()
    analysis = compiled.memory_analysis()
    assert analysis is not None
    assert analysis.temp_size_in_bytes < 1 << 20  # the table has 2^26 elements


def test_take_at_the_edges():
    q = encoded(FORMAT, gauss((6, 32)))
    table = np.asarray(FORMAT.decode(q))
    np.testing.assert_array_equal(np.asarray(take(q, np.int32(4), dtype=np.float32)), table[4])
    assert take(q, np.zeros((0, 2), np.int32), dtype=np.float32).shape == (0, 2, 32)
    outside = np.array([-3, 6, 1000], np.int32)
    np.testing.assert_array_equal(np.asarray(take(q, outside, dtype=np.float32)), table[[0, 5, 5]])


@pytest.mark.parametrize("dtype", [BF16, np.dtype(np.float32)], ids=str)
def test_conv_is_that_of_the_decoded_kernel(dtype):
    w, x = gauss((3, 3, 32, 8), dtype=dtype), gauss((2, 7, 9, 64), seed=1, dtype=dtype)  # HWIO, NHWC
    q = encode_leaf(make("mxfp8"), w, (0, 1, 2))
    how = {
        "window_strides": (2, 1),
        "padding": ((1, 0), (2, 1)),
        "lhs_dilation": (1, 2),
        "rhs_dilation": (2, 1),
        "dimension_numbers": ("NHWC", "HWIO", "NHWC"),
        "feature_group_count": 2,
    }
    y = jit()(lambda x, q: conv(x, q, **how, dtype=np.float32))(x, q)
    expected = lax.conv_general_dilated(
        x.astype(np.float32), decoded(q).astype(np.float32), **how, precision="highest"
    )
    close(y, np.asarray(expected).astype(np.float64))
    same = conv(x, q, window_strides=(1, 1), padding="SAME", dimension_numbers=("NHWC", "HWIO", "NHWC"),
                feature_group_count=2, dtype=dtype)  # fmt: skip
    assert (same.shape, same.dtype) == ((2, 7, 9, 8), dtype)


X, PLAIN = gauss((2, 64)), (4, 32)


def plain():
    return encoded(FORMAT, gauss(PLAIN))


def experts():
    return encode_leaf(FORMAT, gauss((3, *PLAIN)), (2,), (0,))


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: matmul(X, plain(), dtype=X.dtype), r"matmul: inputs \(2, 64\) and weight \(4, 32\) differ"),
        (
            lambda: matmul(X[:, :32], plain(), bias=X[0, :1], dtype=X.dtype),
            r"matmul: bias \(1,\) is not \[out\]; weight \(4, 32\) needs \(4,\)",
        ),
        (
            lambda: matmul(gauss((2, 5, 32)), experts(), dtype=X.dtype),
            r"matmul: inputs \(2, 5, 32\) do not begin with the batch \(3,\) of weight \(3, 4, 32\)",
        ),
        (
            lambda: matmul(gauss((32,)), experts(), dtype=X.dtype),
            r"inputs \(32,\) do not begin with the batch",
        ),
        (
            lambda: grouped_matmul(X, experts(), np.zeros(3, np.int32), dtype=X.dtype),
            r"grouped_matmul: inputs \(2, 64\) and weight \(3, 4, 32\) differ",
        ),
        (
            lambda: grouped_matmul(X, plain(), np.zeros(3, np.int32), dtype=X.dtype),
            r"grouped_matmul: the weight has shape \(4, 32\) with batch axes \(\); needed: 1",
        ),
        (
            lambda: grouped_matmul(X[None], experts(), np.zeros(3, np.int32), dtype=X.dtype),
            r"grouped_matmul: inputs have shape \(1, 2, 64\); \[rows, in\] is needed",
        ),
        (
            lambda: grouped_matmul(X[:, :32], experts(), np.zeros(2, np.int32), dtype=X.dtype),
            r"sizes are int32 \(2,\); weight \(3, 4, 32\) needs int32 \(3,\)",
        ),
        (
            lambda: grouped_matmul(X[:, :32], experts(), np.zeros(3, np.float32), dtype=X.dtype),
            r"sizes are float32 \(3,\)",
        ),
        (lambda: take(experts(), np.int32(0), dtype=X.dtype), r"take: the weight has shape \(3, 4, 32\)"),
        (lambda: take(plain(), np.float32(0), dtype=X.dtype), r"take: indices are float32 \(\); integers"),
        (
            lambda: conv(X, experts(), window_strides=(1,), padding="SAME", dtype=X.dtype),
            r"conv: inputs \(2, 64\) and kernel \(3, 4, 32\) have 2 and 3 axes",
        ),
        (
            lambda: conv(X[None], experts(), window_strides=(1,), padding="SAME", dtype=X.dtype),
            r"conv: inputs \(1, 2, 64\) have 2 features; kernel \(3, 4, 32\) with 1 feature groups needs 4",
        ),
    ],
)
def test_shapes_that_do_not_fit_are_said(call, message):
    with pytest.raises(InputError, match=message):
        call()


@pytest.mark.parametrize("sizes", [(10, 0, 20, 3, 0), (0, 0, 0, 0, 0), (0, 0, 37, 0, 0), (1, 1, 1, 1, 33)])
@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
def test_groups_of_arrays_and_their_gradients_are_those_of_ragged_dot(sizes, dtype):
    rng = np.random.default_rng(3)
    x = jnp.asarray(rng.standard_normal((37, 16)), dtype)
    w = jnp.asarray(rng.standard_normal((5, 8, 16)), dtype)
    counts = jnp.asarray(sizes, jnp.int32)

    def ours(x, w):
        return grouped_matmul(x, w, counts, dtype=jnp.float32)

    def theirs(x, w):
        return lax.ragged_dot(x, w.swapaxes(1, 2), counts, preferred_element_type=jnp.float32)

    np.testing.assert_allclose(ours(x, w), theirs(x, w), rtol=1e-5, atol=1e-5)
    got, want = (jax.grad(lambda x, w, f=f: jnp.sin(f(x, w)).sum(), (0, 1))(x, w) for f in (ours, theirs))
    tolerance = 1e-5 if dtype == jnp.float32 else 2e-2
    for a, b in zip(got, want, strict=True):
        np.testing.assert_allclose(
            a.astype(jnp.float32), b.astype(jnp.float32), rtol=tolerance, atol=tolerance
        )


def test_a_group_without_rows_is_not_read():
    """NaN in the weights of an expert that no token reaches stays there."""
    w = jnp.ones((3, 8, 16)).at[1].set(jnp.nan)
    y = grouped_matmul(jnp.ones((4, 16)), w, jnp.asarray([2, 0, 2], jnp.int32), dtype=jnp.float32)
    assert (np.asarray(y) == 16).all()
