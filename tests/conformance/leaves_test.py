"""Leaves of any shape: their bytes are those of their matrices, and parts decode to parts."""

import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from formats_test import BF16, assert_same, each_format, encoded, gauss, make
from hypothesis import given, settings
from hypothesis import strategies as st

from mojax.errors import InputError
from mojax.formats import leaf
from mojax.formats.base import QTensor, encode_leaf, outer_leaf, stack_rows

DTYPES = [BF16, np.dtype(np.float32)]


def stacked(shape, dtype, seed=0):
    """`[..., out, in]` whose matrices differ in magnitude; a zero row and a zero matrix among them."""
    w = gauss(shape, seed) * np.exp(2 * gauss((*shape[:-1], 1), seed + 1))
    w *= np.arange(math.prod(shape[:-2]), dtype=np.float32).reshape(*shape[:-2], 1, 1)
    w[..., 0, :] = 0
    return w.astype(dtype)


def numpy(q):
    return jax.tree.map(np.asarray, q)


@each_format
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_every_matrix_of_a_batch_has_the_bytes_it_has_alone(format, dtype):
    w = stacked((3, 130, 256), dtype)
    own = numpy(encode_leaf(format, w, (2,), (0,)))
    outer = None
    if "outer" in own.scales:
        np.testing.assert_array_equal(np.asarray(outer_leaf(format, w, (2,), (0,))), own.scales["outer"])
        outer = np.asarray(outer_leaf(format, w, (2,), (0,)))[[2, 0, 1]]
    given = numpy(jax.jit(lambda w, outer: encode_leaf(format, w * 1, (2,), (0,), outer))(w, outer))
    values = np.asarray(format.decode(given))
    assert (values.shape, values.dtype) == (w.shape, np.float32)
    for i in range(3):
        assert_same(own.row(i), encoded(format, w[i]))
        alone = encoded(format, w[i], None if outer is None else outer[i])
        assert_same(given.row(i), alone)
        assert values[i].tobytes() == np.asarray(format.decode(alone)).tobytes()
    assert_same(stack_rows([given.row(i) for i in range(3)]), given)


@each_format
def test_a_spec_is_what_encoding_gives(format):
    w = stacked((2, 256, 4), np.dtype(np.float32))
    q, spec = encode_leaf(format, w, (1,), (0,)), format.spec(w.shape, w.dtype, (1,), (0,))
    assert jax.tree.structure(q) == jax.tree.structure(spec)
    for array, s in zip(jax.tree.leaves(q), jax.tree.leaves(spec), strict=True):
        assert (array.shape, array.dtype) == (s.shape, s.dtype)
    assert q.nbytes == spec.nbytes
    one = jax.eval_shape(lambda q: q.row(0), spec)
    assert jax.tree.structure(one) == jax.tree.structure(q.row(0))


@st.composite
def layouts(draw):
    """A shape of two to five axes with its contracted axes (together 32) and its batch axes."""
    kinds = draw(
        st.permutations(
            ["in", *draw(st.lists(st.sampled_from(["in", "out", "batch"]), min_size=1, max_size=4))]
        )
    )
    contract = tuple(i for i, kind in enumerate(kinds) if kind == "in")
    sizes = {a: 2 for a in contract} | {
        contract[draw(st.integers(0, len(contract) - 1))]: 64 >> len(contract)
    }
    shape = tuple(sizes.get(i) or draw(st.integers(1, 3)) for i in range(len(kinds)))
    return shape, contract, tuple(i for i, kind in enumerate(kinds) if kind == "batch")


@settings(max_examples=30, deadline=None, derandomize=True, database=None)
@given(layout=layouts(), format=st.sampled_from([make("nvfp4"), make("fp8", per="block")]))
def test_any_layout_is_its_matrices(layout, format):
    shape, contract, batch = layout
    w = gauss(shape)
    matrices = leaf.canonical(w, contract, batch)
    assert matrices.shape == leaf.canonical_shape(shape, contract, batch)
    np.testing.assert_array_equal(leaf.restore(matrices, shape, contract, batch), w)
    q = numpy(encode_leaf(format, w, contract, batch))
    values = np.asarray(format.decode(q))
    assert (q.shape, values.shape) == (shape, shape)
    values = leaf.canonical(values, contract, batch)
    for i in np.ndindex(matrices.shape[:-2]):
        alone = encoded(format, matrices[i])
        assert q.codes[i].tobytes() == alone.codes.tobytes()
        assert all(q.scales[level][i].tobytes() == alone.scales[level].tobytes() for level in alone.scales)
        assert values[i].tobytes() == np.asarray(format.decode(alone)).tobytes()


def test_axes_are_flattened_in_ascending_order():
    w = np.arange(2 * 3 * 5 * 7).reshape(2, 3, 5, 7)
    np.testing.assert_array_equal(
        leaf.canonical(w, (3, 1), (2,)), np.einsum("abcd->cabd", w).reshape(5, 2, 21)
    )
    np.testing.assert_array_equal(leaf.canonical(w, (), ()), w.reshape(30, 7))


def test_a_weight_out_in_is_plain_however_it_is_said():
    format, w = make("nvfp4"), gauss((4, 32))
    plain = encoded(format, w)
    for contract in ((), (1,), (-1,)):
        assert_same(numpy(encode_leaf(format, w, contract)), plain)
        assert jax.tree.structure(encode_leaf(format, w, contract)) == jax.tree.structure(plain)
    said = QTensor(plain.codes, plain.scales, format, (4, 32), plain.dtype, contract=(1,))
    assert jax.tree.structure(said) == jax.tree.structure(plain)
    q = encode_leaf(format, gauss((2, 4, 32)), (), (0,))
    assert (q.contract, q.batch) == ((2,), (0,))
    assert jax.tree.structure(q.row(1)) == jax.tree.structure(plain)


def test_rows_are_the_entries_of_the_first_batch_axis():
    format, w = make("nvfp4"), stacked((3, 2, 4, 32), BF16).transpose(2, 0, 3, 1)  # [out, 3, in, 2]
    q = numpy(encode_leaf(format, w, (2,), (1, 3)))
    value = np.asarray(format.decode(q))
    for i in range(3):
        one = q.row(i)
        assert (one.shape, one.contract, one.batch) == ((4, 32, 2), (1,), (2,))
        assert all(isinstance(a, np.ndarray) for a in jax.tree.leaves(one))
        assert np.shares_memory(one.codes, q.codes)
        np.testing.assert_array_equal(np.asarray(format.decode(one)), value[:, i])
        two = one.row(1)
        assert (two.shape, two.contract, two.batch) == ((4, 32), (), ())
        np.testing.assert_array_equal(np.asarray(format.decode(two)), value[:, i, :, 1])
    assert_same(q.row(-1), q.row(2))


@pytest.mark.parametrize("place", [lambda q: q, lambda q: jax.tree.map(jnp.asarray, q)], ids=["numpy", "jax"])
def test_a_traced_row_is_that_row(place):
    format = make("nvfp4")
    q = numpy(encode_leaf(format, stacked((3, 4, 32), BF16), (2,), (0,)))
    rows = jax.jit(lambda i: place(q).row(i))
    looped = jax.lax.map(lambda i: format.decode(place(q).row(i)), jnp.arange(3))
    for i in range(3):
        assert_same(numpy(rows(jnp.int32(i))), q.row(i))
    np.testing.assert_array_equal(np.asarray(looped), np.asarray(format.decode(q)))


@each_format
def test_ranges_of_rows_decode_to_ranges(format):
    q = encoded(format, stacked((1, 300, 256), BF16)[0] + BF16.type(1))
    value = np.asarray(format.decode(q))
    for start, size in ((0, 128), (128, 128), (256, 44), (128, 172)):
        part = leaf.rows(q, start, size)
        assert (part.shape, part.dtype) == ((size, 256), BF16)
        assert np.asarray(format.decode(part)).tobytes() == value[start : start + size].tobytes()
    if format.block_rows > 1:
        for start, size in ((64, 128), (0, 100)):
            with pytest.raises(InputError, match=r"per=block has one scale per 128 rows.*multiples of 128"):
                leaf.rows(q, start, size)
    else:
        assert np.asarray(format.decode(leaf.rows(q, 7, 3))).tobytes() == value[7:10].tobytes()


def test_a_view_as_matrices_decodes_to_the_matrices():
    format, w = make("nvfp4"), gauss((2, 16, 3, 2))
    q = encode_leaf(format, w, (1, 3), (0,))
    view = leaf.matrices(q)
    assert (view.shape, view.contract, view.batch) == ((2, 3, 32), (2,), (0,))
    np.testing.assert_array_equal(
        np.asarray(format.decode(view)), leaf.canonical(np.asarray(format.decode(q)), (1, 3), (0,))
    )
    plain = encoded(format, gauss((3, 32)))
    assert leaf.matrices(plain) is plain


def test_a_conv_kernel_can_be_encoded_where_its_flattened_axes_divide():
    shape = (3, 3, 32, 8)  # [height, width, in, out]
    assert leaf.check_leaf(make("mxfp4"), shape, (0, 1, 2), ()) is None
    assert leaf.check_leaf(make("mxfp4"), shape, (), ()) == "last axis 8 is not divisible by 32"
    said = leaf.check_leaf(make("int4"), shape, (0, 1, 2), ())
    assert said == "last axis 288 is not divisible by 128"
    assert leaf.check_leaf(make("fp8", per="block"), (4, 300), (1,), (0,)) is None


@pytest.mark.parametrize(
    ("contract", "batch"), [((0,), (0,)), ((3,), ()), ((1,), (-2,)), ((), (2,)), ((1, 1), ())]
)
def test_axes_that_do_not_exist_or_meet_are_said(contract, batch):
    with pytest.raises(InputError, match=r"shape \(2, 4, 32\): contract=.*must name different axes"):
        encode_leaf(make("int8"), gauss((2, 4, 32)), contract, batch)


def test_what_cannot_be_taken_apart_is_said():
    format, w = make("nvfp4"), gauss((2, 4, 32))
    q = encode_leaf(format, w, (2,), (0,))
    with pytest.raises(
        InputError, match=r"outer has shape \(\); batch axes \(0,\) of \(2, 4, 32\) need \(2,\)"
    ):
        encode_leaf(format, w, (2,), (0,), np.float32(1))
    with pytest.raises(TypeError, match="int8 has no outer scale"):
        outer_leaf(make("int8"), w, (2,), (0,))
    with pytest.raises(InputError, match=r"row 2 of a QTensor of shape \(2, 4, 32\) with 2 rows"):
        q.row(2)
    with pytest.raises(InputError, match=r"shape \(4, 32\) without batch axes has no rows"):
        q.row(0).row(0)
    with pytest.raises(
        InputError, match=r"rows of a QTensor \[out, in\] can be taken, not of shape \(2, 4, 32\)"
    ):
        leaf.rows(q, 0, 2)
    with pytest.raises(InputError, match="rows 2 to 5 of a QTensor"):
        leaf.rows(q.row(0), 2, 3)
    with pytest.raises(InputError, match="no rows to stack"):
        stack_rows([])
    with pytest.raises(InputError, match=r"row 1 has shape \(2, 4, 32\), row 0 has \(4, 32\)"):
        stack_rows([q.row(0), q])
    with pytest.raises(InputError, match=r"rows of shape \(32,\): matrices"):
        stack_rows([format.encode(w[0, 0])])
