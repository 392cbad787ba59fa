"""The Hadamard transform: matrices, the reference, and the Hopper kernel against it."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from kernel_checks import INTERPRET, gpu, lowered

from mojax.errors import InputError
from mojax.kernels.gpu import hadamard as hopper
from mojax.kernels.hadamard import hadamard
from mojax.kernels.hadamard_matrices import factors, matrix, paley

# Widths of real models: hidden and MLP of Llama 2 and 3, Qwen 2.5 and 3, gpt-oss, DeepSeek.
WIDTHS = (
    4096,
    14336,
    11008,
    13824,
    5120,
    896,
    4864,
    8960,
    18944,
    27648,
    29568,
    2880,
    9728,
    17408,
    1408,
    10944,
)


def sylvester(order):
    return np.ones((1, 1)) if order == 1 else np.kron([[1, 1], [1, -1]], sylvester(order // 2))


def normal(seed, shape, dtype=jnp.float32):
    return jnp.asarray(np.random.default_rng(seed).standard_normal(shape), dtype)


def exact(x, block, signs=None):
    """float64 of the same, by the whole matrix."""
    x = np.asarray(x, np.float64) * (1 if signs is None else np.asarray(signs, np.float64))
    h = matrix(block).astype(np.float64)
    return (x.reshape(*x.shape[:-1], -1, block) @ h / np.sqrt(block)).reshape(x.shape)


@pytest.mark.parametrize("order", [1, 2, 4, 64, 256])
def test_powers_of_two_are_sylvesters(order):
    np.testing.assert_array_equal(matrix(order), sylvester(order))


@pytest.mark.parametrize(
    "order", [12, 20, 24, 28, 36, 40, 44, 52, 60, 68, 76, 100, 108, 112, 140, 148, 180, 344]
)
def test_other_orders_are_symmetric_hadamard_matrices(order):
    h = matrix(order).astype(np.int64)
    assert set(np.unique(h)) == {-1, 1}
    np.testing.assert_array_equal(h, h.T)
    np.testing.assert_array_equal(h @ h, order * np.eye(order))


def test_orders_without_a_matrix():
    assert [n for n in range(1, 61) if factors(n) is not None] == [1, 2, *range(4, 61, 4)]
    assert factors(92) is None and paley(92) is None  # 91 and 45 are no powers of primes
    assert factors(0) is None


def test_widths_of_models_have_one():
    assert [n for n in WIDTHS if factors(n) is None] == []


@pytest.mark.parametrize(
    "n, block", [(64, None), (24, None), (56, 28), (96, 8), (512, 256), (60, 1), (140, None)]
)
def test_reference_is_the_matrix(n, block):
    x = normal(0, (3, 2, n))
    signs = np.where(np.random.default_rng(1).random(n) < 0.5, -1.0, 1.0).astype(np.float32)
    for s in (None, signs):
        y = hadamard(x, block=block, signs=s)
        np.testing.assert_allclose(np.asarray(y), exact(x, block or n, s), rtol=0, atol=2e-6)


@pytest.mark.parametrize("n", [256, 896, 1376])
def test_twice_is_the_identity(n):
    x = normal(1, (5, n))
    np.testing.assert_allclose(np.asarray(hadamard(hadamard(x))), np.asarray(x), rtol=0, atol=5e-6)


def test_signs_come_first_and_are_undone_last():
    x, signs = normal(2, (4, 48)), jnp.asarray([[1.0, -1.0, -1.0] * 16] * 4)
    back = hadamard(hadamard(x, signs=signs[0])) * signs
    np.testing.assert_allclose(np.asarray(back), np.asarray(x), rtol=0, atol=2e-6)


def test_it_is_linear_and_keeps_lengths():
    x, y = normal(3, (2, 7, 128))
    left, right = hadamard(2 * x + y), 2 * hadamard(x) + hadamard(y)
    np.testing.assert_allclose(np.asarray(left), np.asarray(right), rtol=0, atol=1e-5)
    lengths = np.linalg.norm(np.asarray(hadamard(x)), axis=-1)
    np.testing.assert_allclose(lengths, np.linalg.norm(np.asarray(x), axis=-1), rtol=1e-6)


def test_bfloat16_is_rounded_once():
    x = normal(4, (64, 896), jnp.bfloat16)
    wide = hadamard(x.astype(jnp.float32)).astype(jnp.bfloat16).astype(jnp.float32)
    found = hadamard(x).astype(jnp.float32)
    # Sums in another order may fall to the other side of a tie, rarely.
    assert (np.asarray(wide) != np.asarray(found)).mean() < 1e-3
    assert np.abs(np.asarray(found) - exact(x, 896)).max() < 2.0**-8 * np.abs(np.asarray(wide)).max()


def test_the_gradient_is_the_transform_of_the_gradient():
    x, g = normal(5, (2, 3, 24))
    pulled = jax.vjp(lambda x: hadamard(x, block=12), x)[1](g)[0]
    np.testing.assert_allclose(np.asarray(pulled), np.asarray(hadamard(g, block=12)), rtol=0, atol=2e-6)


def test_bad_input_is_named():
    x = jnp.ones((2, 92))
    with pytest.raises(InputError, match=r"order 92 .* multiples of 23: 368.* such as 4"):
        hadamard(x)
    assert hadamard(x, block=4).shape == x.shape
    for changes, said in (
        ({"block": 8}, "block is 8; needed: a divisor"),
        ({"block": 0}, "block is 0"),
        ({"block": 4, "signs": jnp.ones(4)}, r"needed: \(92,\)"),
        ({"block": 4, "implementation": "hopper"}, "hopper: x is float32"),
    ):
        with pytest.raises(InputError, match=said):
            hadamard(x, **changes)
    with pytest.raises(InputError, match="x is int32"):
        hadamard(jnp.ones((2, 4), jnp.int32))
    assert (
        hopper.why_not(jnp.ones((2, 96), jnp.bfloat16), block=32) == "the last axis is 96, no multiple of 64"
    )


@pytest.mark.parametrize(
    "rows, n, block, signed",
    [
        (70, 128, 16, False),
        (130, 256, 128, True),
        (5, 192, 64, True),
        (3, 448, 448, True),
        (2, 512, 256, False),
    ],
)
def test_hopper_is_the_reference(rows, n, block, signed):
    x = normal(6, (rows, n), jnp.bfloat16)
    signs = jnp.where(normal(7, (n,)) < 0, -1.0, 1.0) if signed else None
    assert hopper.why_not(x, block=block, signs=signs) is None
    found = jax.jit(lambda x: hopper.hadamard(x, block=block, signs=signs, interpret=INTERPRET))(x)
    wanted = hadamard(x, block=block, signs=signs, implementation="xla")
    assert found.dtype == wanted.dtype
    near = np.abs(np.asarray(found, np.float64) - exact(x, block, signs))
    assert near.max() <= 2.0**-8 * np.abs(np.asarray(wanted, np.float64)).max()
    assert (np.asarray(found, np.float32) != np.asarray(wanted, np.float32)).mean() < 1e-2


@pytest.mark.parametrize("shape", hopper.SHAPES, ids=str)
@pytest.mark.parametrize("signed", [False, True])
def test_hopper_lowers(shape, signed):
    rows, n, block = shape
    x = jax.ShapeDtypeStruct((rows, n), jnp.bfloat16)
    signs = [jax.ShapeDtypeStruct((n,), jnp.bfloat16)] if signed else []
    lowered(lambda x, *s: hopper.hadamard(x, block=block, signs=s[0] if s else None), x, *signs)


@gpu
@pytest.mark.parametrize("dtype", [jnp.bfloat16, jnp.float16])
@pytest.mark.parametrize("shape", [*hopper.SHAPES, (65, 64, 1), (200, 896, 896), (1000, 192, 8)], ids=str)
@pytest.mark.parametrize("signed", [False, True])
def test_hopper_on_a_gpu_against_float64(shape, dtype, signed):
    rows, n, block = shape
    x = normal(8, (rows, n), dtype)
    signs = jnp.where(normal(9, (n,)) < 0, -1.0, 1.0) if signed else None
    found = np.asarray(hadamard(x, block=block, signs=signs, implementation="hopper"), np.float64)
    error = float(jnp.finfo(dtype).eps) / 2 + 1e-5
    wanted = exact(x, block, signs)
    assert (np.abs(found - wanted) <= error * np.abs(wanted) + 1e-5 * np.abs(wanted).max()).all()


@gpu
def test_hopper_on_a_gpu_keeps_nan_to_its_block():
    x = normal(10, (100, 512), jnp.bfloat16).at[70, 130].set(jnp.nan)
    lost = np.isnan(np.asarray(hadamard(x, block=128, implementation="hopper"), np.float32))
    assert lost[70, 128:256].all() and lost.sum() == 128
