"""Rounding of one matrix: searches of scales, error feedback, descent, against plain loops and identities."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from mojax.errors import InputError
from mojax.formats import numerics
from mojax.formats.fp8 import FP8
from mojax.formats.int4 import INT4
from mojax.formats.int8 import INT8
from mojax.formats.mxfp4 import MXFP4
from mojax.formats.mxfp8 import MXFP8
from mojax.formats.nvfp4 import NVFP4
from mojax.rounding import descent, feedback, objective, scales

FORMATS = [
    format(arithmetic=arithmetic, **options)
    for arithmetic in ("checkpoint", "float32")
    for format, options in (
        (NVFP4, {}),
        (MXFP4, {}),
        (MXFP8, {}),
        (INT4, {"group": 32}),
        (INT4, {"group": 32, "symmetric": False}),
        (INT8, {}),
        (INT8, {"per": "tensor"}),
        (FP8, {}),
        (FP8, {"per": "channel"}),
        (FP8, {"per": "block"}),
    )
]
SEARCHED = [f for f in FORMATS if f.arithmetic == "checkpoint" and "per=t" not in f.label and f.name != "fp8"]
every = pytest.mark.parametrize("format", FORMATS, ids=lambda f: f"{f.label} {f.arithmetic}")
of_blocks = pytest.mark.parametrize(
    "format", [NVFP4(), MXFP4(), INT4(group=32, symmetric=False)], ids=lambda f: f.label
)
SOLVED = [f for f in FORMATS if f.arithmetic == "float32" and f.label != "fp8"]
solved = pytest.mark.parametrize("format", SOLVED, ids=lambda f: f"{f.label} {f.arithmetic}")
searched = pytest.mark.parametrize("format", SEARCHED, ids=lambda f: f.label)
NV = NVFP4(arithmetic="float32")
OUT, IN = 48, 64


@functools.cache
def weight(out=OUT, width=IN, seed=0):
    w = np.random.default_rng(seed).standard_t(5, (out, width)).astype(np.float32) * 0.02
    w[3] *= 0.01
    w[5, :32] = 0  # a block of zeros
    return w


@functools.cache
def covariance(n, count=None, seed=1):
    """Correlated: sum x x^T of 4 n vectors, `[count, n, n]` or one."""
    random = np.random.default_rng(seed)
    mix = random.standard_normal((n, n)) / np.sqrt(n) + np.diag(random.uniform(0.3, 2, n))
    x = random.standard_normal((count or 1, 4 * n, n)) @ mix
    whole = (np.swapaxes(x, 1, 2) @ x).astype(np.float32)
    return np.asarray(objective.damped(whole if count else whole[0]))


@functools.cache
def fitted(format, out=OUT, width=IN, seed=0):
    """The scales of `weight`."""
    return jax.jit(format.fit)(jnp.asarray(weight(out, width, seed)))


def rounded(format, w, found):
    """To nearest, in the format's own way."""
    return np.asarray(format.decode(format.encode_as(jnp.asarray(w), found)))


def error(w, q, h, g=None):
    d = np.asarray(q, np.float64) - w
    a = d @ h.astype(np.float64)
    if g is not None:
        a = (g.astype(np.float64) @ a.reshape(len(g), -1, a.shape[1])).reshape(a.shape)
    return float(np.sum(a * d))


def babai(w, step, h, g):
    """A plain double loop over E2M1, float64: columns outside, rows inside, both by falling diagonal."""
    grid = np.array([0, 0.5, 1, 1.5, 2, 3, 4, 6])

    def nearest(y):
        return np.sign(y) * grid[np.argmin(np.abs(abs(y) - grid))]

    size = g.shape[-1]
    columns = np.argsort(-np.diag(h), kind="stable")
    u = np.linalg.cholesky(np.linalg.inv(h[np.ix_(columns, columns)].astype(np.float64))).T
    found = np.zeros(w.shape)
    for k in range(len(g)):
        rows = np.argsort(-np.diag(g[k]), kind="stable")
        v = np.linalg.cholesky(np.linalg.inv(g[k][np.ix_(rows, rows)].astype(np.float64))).T
        place = np.ix_(rows + k * size, columns)
        target, s, e, q = (
            w[place].astype(np.float64),
            step[place],
            np.zeros((size, len(h))),
            np.zeros((size, len(h))),
        )
        for j in range(len(h)):
            for i in range(size):
                t = target[i, j] - v[: i + 1, i] @ (e[: i + 1] @ u[:, j])
                q[i, j] = nearest(t / s[i, j]) * s[i, j]
                e[i, j] = (t - q[i, j]) / (v[i, i] * u[j, j])
        found[place] = q
    return found


# Formats


@every
def test_elements_times_steps_are_what_a_format_rounds_to(format):
    w = weight()
    found = fitted(format)
    q = scales.nearest(format, jnp.asarray(w), scales.grid(format, found, w.shape))
    np.testing.assert_array_equal(q, rounded(format, w, found))


@every
def test_values_on_the_grid_encode_exactly(format):
    w = jnp.asarray(weight(), jnp.bfloat16)
    found = format.fit(w)
    other = jnp.asarray(weight(seed=9)) * 1.3 + 0.01
    q = scales.nearest(format, other, scales.grid(format, found, w.shape))
    encoded = scales.encoded(format, q, found, w.dtype)
    np.testing.assert_array_equal(np.asarray(format.decode(encoded)), q)
    assert encoded.dtype == jnp.bfloat16
    assert jax.tree.structure(encoded) == jax.tree.structure(format.encode(w))


@every
def test_candidates_are_legal_and_the_first_is_given(format):
    found = fitted(format)
    near = format.candidates(found, 0.5, 1.75, 24)
    now = found.get("inner", found.get("outer")).reshape(near.shape[:-1])
    assert near.dtype == now.dtype
    np.testing.assert_array_equal(near[..., 0].astype(jnp.float32), now.astype(jnp.float32))
    ratio = np.asarray(near.astype(jnp.float32) / now.astype(jnp.float32)[..., None])
    if not format.name.startswith("mx"):
        assert ratio.min() >= 0.49 and ratio.max() <= 1.76
    if "inner" in found:
        same = format.rescaled(found, jnp.ones(now.shape))
        np.testing.assert_array_equal(same.astype(jnp.float32), now.astype(jnp.float32))


def test_nvfp4_candidates_are_all_numbers_of_the_window():
    found = fitted(NV)
    now = np.asarray(found["inner"].astype(jnp.float32))
    near = np.asarray(NV.candidates(found, 0.8, 1.75, 24).astype(jnp.float32))
    numbers = np.arange(1, 127, dtype=np.uint8).view(found["inner"].dtype).astype(np.float32)
    for s, around in zip(now.ravel(), near.reshape(now.size, -1), strict=True):
        assert set(around) == {s} | {n for n in numbers if 0.8 * s <= n <= 1.75 * s}
    few = np.asarray(NV.candidates(found, 0.2, 4.0, 5).astype(jnp.float32))
    assert few.shape[-1] == 5 and (few[..., -1] > 3.5 * now)[now < 100].all()  # taken evenly


def test_a_power_of_two_stays_one():
    found = {"inner": jnp.asarray([[0, 1, 120, 253]], jnp.uint8)}
    near = np.asarray(MXFP4().candidates(found, 0.5, 2.0, 9))
    np.testing.assert_array_equal(near, [[[0, 0, 0], [1, 1, 2], [120, 119, 121], [253, 252, 253]]])
    moved = MXFP4().rescaled(found, jnp.asarray([[4.0, 0.25, 1.5, 2.0]]))
    np.testing.assert_array_equal(moved, [[0, 1, 121, 253]])


# Scales


def block_error(format, w, found, importance=None):
    e = (rounded(format, w, found) - w).astype(np.float64).reshape(*found["inner"].shape, -1)
    if importance is None:
        return np.sum(e * e, -1)
    if importance.ndim == 1:
        return np.sum(e * e * importance.reshape(1, *e.shape[1:]), -1)
    return np.einsum("rbi,bij,rbj->rb", e, importance, e)


@searched
def test_no_block_is_worse_after_a_search(format):
    w = weight()
    start = fitted(format)
    blocks = start["inner"].shape[1]
    h = covariance(IN)
    for importance in (None, np.diag(h), np.asarray(scales.local(h, blocks))):
        found = scales.search(format, w, start, format.candidates(start, 0.4, 1.75, 24), importance)
        before, after = (block_error(format, w, s, importance) for s in (start, found))
        assert (after <= before * (1 + 1e-5)).all()
        assert after.sum() < before.sum() or format.name == "mxfp8"  # a smaller exponent only clips there
        assert found["inner"].dtype == start["inner"].dtype


@searched
def test_a_search_weighs_errors_one_way(format):
    w = weight()
    start = fitted(format)
    blocks = start["inner"].shape[1]
    near = format.candidates(start, 0.4, 1.75, 16)
    importance = np.diag(covariance(IN))

    def inner(weights, rows=None):
        found = scales.search(format, w, start, near, weights, rows)
        return np.asarray(found["inner"].astype(jnp.float32))

    size = IN // blocks
    diagonal = np.stack([np.diag(p) for p in importance.reshape(blocks, size)])
    np.testing.assert_array_equal(
        inner(np.broadcast_to(np.eye(size, dtype=np.float32), diagonal.shape)), inner(None)
    )
    np.testing.assert_array_equal(inner(diagonal), inner(importance))
    np.testing.assert_array_equal(inner(importance, 7), inner(importance))


def test_the_window_holds_the_best_of_all_e4m3_numbers():
    w = np.random.default_rng(3).standard_t(4, (32, 64)).astype(np.float32)
    start = NV.fit(jnp.asarray(w))
    numbers = np.arange(1, 127, dtype=np.uint8).view(start["inner"].dtype)
    everything = jnp.broadcast_to(jnp.asarray(numbers), (*start["inner"].shape, 126))
    window = scales.search(NV, w, start, NV.candidates(start, 0.8, 1.75, 24))
    brute = scales.search(NV, w, start, everything)
    np.testing.assert_array_equal(block_error(NV, w, window), block_error(NV, w, brute))


@pytest.mark.parametrize("arithmetic", ["checkpoint", "float32"])
def test_four_over_six(arithmetic):
    format = NVFP4(arithmetic=arithmetic)
    w = weight().copy()
    w[0, :16] = np.tile([8, 6, -4, 2], 4) * 0.01  # exact as 6, 4.5, 3, 1.5 of 4/6 only as 4, 3, 2, 1
    outer = format.outer(np.float32(scales.ROOM * np.abs(w).max()), np.dtype(np.float32))
    start = format.fit(jnp.asarray(w), outer)
    found = scales.four_over_six(format, w, start)
    before, after = block_error(format, w, start), block_error(format, w, found)
    assert (after <= before).all() and after[0, 0] < before[0, 0] / 3
    ratio = np.asarray(found["inner"].astype(jnp.float32) / start["inner"].astype(jnp.float32))
    assert set(np.round(ratio.ravel() * 2) / 2) == {1.0, 1.5}
    with pytest.raises(InputError, match="use nvfp4"):
        scales.four_over_six(INT4(), w, start)


def test_scales_without_a_choice_come_back():
    for format in (FP8(), FP8(per="block"), INT8(per="tensor")):
        found = fitted(format)
        assert scales.search(format, weight(), found, format.candidates(found, 0.5, 1.5, 8)) is found
    with pytest.raises(InputError, match=r"importance \(3,\)"):
        found = fitted(NV)
        scales.search(NV, weight(), found, NV.candidates(found, 0.5, 1.5, 8), np.ones(3, np.float32))


# Objective


def test_damping():
    m = covariance(8).copy()
    m[2] = m[:, 2] = 0
    mean = np.diag(m).sum() / 7
    damped = np.asarray(objective.damped(m, fraction=0.05))
    live = np.arange(8) != 2
    np.testing.assert_allclose(np.diag(damped)[live], np.diag(m)[live] + 0.05 * mean, rtol=1e-6)
    np.testing.assert_allclose(damped[2], np.eye(8)[2] * mean, rtol=1e-6)
    few = np.asarray(objective.damped(m, 16, 0.05))
    np.testing.assert_allclose(few[0, 0], m[0, 0] + 0.05 * 4 * mean, rtol=1e-6)
    np.testing.assert_array_equal(objective.damped(m, 1000, 0.05), damped)
    np.testing.assert_array_equal(objective.damped(np.zeros((4, 4), np.float32)), np.eye(4))


@pytest.mark.parametrize("falling", [True, False])
def test_factors(falling):
    m = covariance(12, 3)
    upper, order, raised = objective.factor(m, falling)
    for k in range(3):
        inside = m[k][np.ix_(order[k], order[k])]
        np.testing.assert_allclose(upper[k].T @ upper[k] @ inside, np.eye(12), atol=2e-4)
        np.testing.assert_array_equal(np.tril(upper[k], -1), 0)
        assert (np.diff(np.diag(inside)) <= 0).all() == falling
    np.testing.assert_array_equal(raised, 0)


def test_a_matrix_that_is_not_positive_definite_is_damped_and_said_so():
    good = covariance(6)
    bad = good - np.eye(6, dtype=np.float32) * 0.3 * np.trace(good) / 6
    _, _, raised = objective.factor(np.stack([good, bad, good * np.nan]))
    assert raised[0] == 0 and 0 < raised[1] < 4 and raised[2] == 4
    upper = objective.factor(good * np.nan).upper
    np.testing.assert_array_equal(upper, np.eye(6))


def test_the_value_is_the_trace():
    w = weight()
    h, g = covariance(IN), covariance(16, 3)
    q = np.round(w * 50) / 50
    np.testing.assert_allclose(objective.value(q - w, h, g), error(w, q, h, g), rtol=1e-5)
    np.testing.assert_allclose(objective.value(q - w, h), error(w, q, h), rtol=1e-5)


# Feedback


@pytest.mark.parametrize("size", [1, 16, 48])
def test_feedback_is_the_double_loop(size):
    w, h = weight(seed=5), covariance(IN)
    g = covariance(size, OUT // size) if size > 1 else np.ones((OUT, 1, 1), np.float32)
    found = NV.fit(jnp.asarray(w))
    step = np.asarray(scales.grid(NV, found, w.shape).step, np.float64)
    q = feedback.solve(NV, w, found, h, g)
    np.testing.assert_allclose(q, babai(w, step, h, g), atol=1e-6)
    if size == 1:
        np.testing.assert_array_equal(q, feedback.solve(NV, w, found, h))


@pytest.mark.parametrize("size", [None, 24])
def test_feedback_identities(size):
    w, h = weight(), covariance(IN)
    g = size and covariance(size, OUT // size)
    found = fitted(NV)
    rows = None if g is None else objective.factor(g)
    columns = objective.factor(h)
    first = feedback.solve_factored(NV, w, found, columns, rows)
    for lazy, panel in ((16, 8), (7, 5)):
        again = feedback.solve_factored(NV, w, found, columns, rows, lazy, panel)
        np.testing.assert_array_equal(again.q, first.q)
    e = np.asarray(first.errors, np.float64)
    np.testing.assert_allclose(np.sum(e * e), error(w, first.q, h, g), rtol=1e-4)
    left = e if rows is None else np.swapaxes(rows.upper, 1, 2) @ e
    d = left @ np.asarray(columns.upper)
    expected = (w - np.asarray(first.q)).reshape(e.shape)[:, :, columns.order]
    if rows is not None:
        expected = np.take_along_axis(expected, np.asarray(rows.order)[..., None], 1)
    np.testing.assert_allclose(d, expected, atol=1e-6)


@solved
def test_a_diagonal_error_is_rounded_to_nearest(format):
    w = weight()
    found = fitted(format)
    h = np.diag(np.diag(covariance(IN)))
    g = np.stack([np.diag(np.diag(m)) for m in covariance(16, 3)])
    np.testing.assert_array_equal(feedback.solve(format, w, found, h, g), rounded(format, w, found))


@of_blocks
def test_feedback_lowers_the_error(format):
    w, h, g = weight(), covariance(IN), covariance(16, 3)
    found = fitted(format)
    for side in (None, g):
        q = feedback.solve(format, w, found, h, side)
        assert error(w, q, h, side) < 0.9 * error(w, rounded(format, w, found), h, side)


def test_the_order_of_equal_columns_stays():
    h = covariance(IN)
    scale = 1 / np.sqrt(np.diag(h))
    h = h * scale[:, None] * scale
    np.fill_diagonal(h, 1)
    w = weight()
    found = fitted(NV)
    np.testing.assert_array_equal(
        feedback.solve(NV, w, found, h), feedback.solve(NV, w, found, h, act_order=False)
    )


def test_inputs_that_nobody_used_touch_nothing():
    w, h = weight(), covariance(IN).copy()
    dead = [3, 20, 21]
    h[dead] = h[:, dead] = 0
    h = np.asarray(objective.damped(h))
    found = fitted(NV)
    q = np.asarray(feedback.solve(NV, w, found, h))
    other = w.copy()
    other[:, dead] *= -0.5
    changed = np.asarray(feedback.solve(NV, other, found, h))
    live = np.setdiff1d(np.arange(IN), dead)
    np.testing.assert_array_equal(q[:, live], changed[:, live])
    np.testing.assert_array_equal(q[:, dead], rounded(NV, w, found)[:, dead])


def test_shapes_that_do_not_fit_are_named():
    found = fitted(NV)
    with pytest.raises(InputError, match=r"needs \(64, 64\)"):
        feedback.solve(NV, weight(), found, covariance(32))
    with pytest.raises(InputError, match="must cover the 48 rows"):
        feedback.solve(NV, weight(), found, covariance(IN), covariance(16, 2))


# Descent


@of_blocks
@pytest.mark.parametrize("size", [None, 16])
def test_descent_never_rises(format, size):
    w, h = weight(), covariance(IN)
    g = size and covariance(size, OUT // size)
    found = fitted(format)
    q = feedback.solve(format, w, found, h, g)
    swept = descent.sweep(format, w, q, found, h, g, 2)
    np.testing.assert_array_equal(rounded(format, swept, found), swept)
    near = format.candidates(found, 0.6, 1.6, 6)
    moved, chosen = descent.move_blocks(format, w, q, found, near, h, g)
    np.testing.assert_array_equal(rounded(format, moved, chosen), moved)
    refitted, refit = descent.refit(format, w, q, found, h, g)
    np.testing.assert_array_equal(rounded(format, refitted, refit), refitted)
    start = error(w, q, h, g)
    assert error(w, swept, h, g) < start
    assert error(w, moved, h, g) < start
    assert error(w, refitted, h, g) <= start * (1 + 1e-6)
    if not format.name.startswith("mx"):
        assert error(w, refitted, h, g) < start
    assert chosen["inner"].dtype == refit["inner"].dtype == found["inner"].dtype


@pytest.mark.parametrize("size", [None, 16])
def test_a_sweep_ends_where_no_entry_can_improve(size):
    w, h = weight(), covariance(IN)
    g = size and covariance(size, OUT // size)
    found = fitted(NV)
    q = np.asarray(descent.sweep(NV, w, rounded(NV, w, found), found, h, g, 40))
    d = (q - w).astype(np.float64) @ h
    own = np.ones(OUT)
    if g is not None:
        d = (g.astype(np.float64) @ d.reshape(len(g), size, -1)).reshape(d.shape)
        own = np.concatenate([np.diag(m) for m in g])
    square = own[:, None] * np.diag(h)
    best = rounded(NV, (q - d / square).astype(np.float32), found) - q
    gain = best * (2 * d + square * best)
    assert gain.min() > -1e-4 * (square * np.square(w).mean()).max()


def test_blocks_whose_scale_is_the_row_keep_it():
    w = weight(8, 512)
    h = covariance(512)
    format = INT8()
    found = fitted(format, 8, 512)
    q = feedback.solve(format, w, found, h)
    assert descent.move_blocks(format, w, q, found, format.candidates(found, 0.6, 1.6, 6), h) == (q, found)


@pytest.mark.parametrize("size", [None, 16])
def test_refinement_is_never_worse(size):
    w, h = weight(), covariance(IN)
    g = size and covariance(size, OUT // size)
    found = fitted(NV)
    q = feedback.solve(NV, w, found, h, g)
    last = error(w, q, h, g)
    for rounds in (1, 3):
        better, chosen = descent.refine(NV, w, q, found, h, g, rounds)
        np.testing.assert_array_equal(rounded(NV, better, chosen), better)
        assert error(w, better, h, g) < last
        last = error(w, better, h, g)
    exact = rounded(NV, w, found)
    same, kept = descent.refine(NV, exact, exact, found, h, g)  # nothing to gain
    np.testing.assert_array_equal(same, exact)
    assert kept is found


def test_the_right_scales_are_found_again():
    """Blocks that do not see each other and lie on the grid of other scales: one move, no error left."""
    right = fitted(NV)
    target = rounded(NV, weight(), right)
    wrong = {**right, "inner": NV.rescaled(right, jnp.full(right["inner"].shape, 1.25))}
    q = rounded(NV, target, wrong)
    h = covariance(IN) * np.kron(np.eye(IN // 16, dtype=np.float32), np.ones((16, 16), np.float32))
    moved, _ = descent.move_blocks(NV, target, q, wrong, NV.candidates(wrong, 0.6, 1.6, 24), h)
    assert error(target, q, h) > 1
    assert error(target, moved, h) < 1e-6


def test_values_of_e2m1_without_codes_are_those_of_the_codes():
    ties = np.array([0, 0.25, 0.75, 1.25, 1.75, 2.5, 3.5, 5, 6, 7, 1e-40, np.inf, np.nan], np.float32)
    near = np.concatenate([np.nextafter(ties, np.float32(9)), np.nextafter(ties, np.float32(-9)), ties])
    y = jnp.asarray(np.concatenate([near, -near, np.random.default_rng(0).normal(0, 3, 9999)]), jnp.float32)
    for negative in (y < 0, ~(y > 0)):
        found, codes = numerics.e2m1_near(y, negative), numerics.e2m1(y, negative)
        assert np.asarray(found).tobytes() == np.asarray(numerics.e2m1_value(codes)).tobytes()
