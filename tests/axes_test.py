"""Coupled axes, proved by cutting: a cut unit is worth as much as one whose entries are all zero."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import zoo
from axes_cases import CASES, FLAT, HEADS, HIDDEN, INNER, X, attention, floats, rotary, unit_norm
from jax import lax

from mojax.structure.axes import Group, Member, coupled
from mojax.structure.dims import Dim, Part, cut, factor, find, places, unify
from mojax.trace import graph


def leaves(**shapes):
    return {name: floats(*shape, seed=i + 1) for i, (name, shape) in enumerate(shapes.items())}


def groups(fn, params, *args):
    return coupled(graph(fn, params, *args, views=False))


def of(found, *axes):
    """The one group of exactly these axes, ("down", 0)."""
    (group,) = [g for g in found if g.axes == tuple(sorted(axes))]
    return group


def without(params, members, unit):
    out = dict(params)
    for m in members:
        out[m.leaf] = np.delete(out[m.leaf], m.indices(unit), m.axis)
    return {n: jnp.asarray(w) for n, w in out.items()}


def zeroed(params, members, unit):
    out = {n: np.array(w) for n, w in params.items()}
    for m in members:
        np.moveaxis(out[m.leaf], m.axis, 0)[m.indices(unit)] = 0
    return {n: jnp.asarray(w) for n, w in out.items()}


@pytest.mark.parametrize("case", CASES)
def test_every_prunable_group_and_no_other(case):
    fn, shapes, x, expected = CASES[case]
    found = [(g.size, *sorted(g.axes)) for g in groups(fn, leaves(**shapes), x) if g.prunable]
    assert sorted(found) == sorted((size, *sorted(axes)) for size, *axes in expected)


@pytest.mark.parametrize("case", CASES)
def test_a_cut_unit_is_worth_as_much_as_a_zero_one(case):
    fn, shapes, x, _ = CASES[case]
    fn, params = jax.jit(fn), leaves(**shapes)
    whole = fn(params, x)
    for group in groups(fn, params, x):
        if group.prunable:
            unit = group.size - 2
            small = fn(without(params, group.members, unit), x)
            expected = fn(zeroed(params, group.members, unit), x)
            np.testing.assert_allclose(small, expected, atol=1e-5, err_msg=str(group.axes))
            assert np.abs(np.asarray(small - whole)).max() > 1e-4, group.axes


@pytest.mark.parametrize("case", CASES)
def test_a_member_that_is_left_out_is_missed(case):
    fn, shapes, x, _ = CASES[case]
    fn, params = jax.jit(fn), leaves(**shapes)
    for group in groups(fn, params, x):
        for i in range(len(group.members) if group.prunable and len(group.members) > 1 else 0):
            others = group.members[:i] + group.members[i + 1 :]
            expected = fn(zeroed(params, group.members, 0), x)
            try:
                got = fn(without(params, others, 0), x)
            except (TypeError, ValueError):
                continue
            assert got.shape != expected.shape or not np.allclose(got, expected, atol=1e-5), group.members[i]


def mixture(p, x):
    chosen = lax.top_k(x @ p["router"], 2)
    weights, ids = jax.nn.softmax(chosen[0]), chosen[1]
    dense = jnp.zeros((len(x), p["router"].shape[1])).at[jnp.arange(len(x))[:, None], ids].set(weights)
    out = jnp.einsum("etf,efd->etd", jnp.tanh(jnp.einsum("td,edf->etf", x, p["up"])), p["down"])
    return jnp.einsum("etd,te->td", out, dense)


def mixture_looked_up(p, x):
    scores, ids = lax.top_k(x @ p["router"], 2)
    h = jnp.tanh(jnp.einsum("td,tkdf->tkf", x, p["up"][ids]))
    return jnp.einsum("tkf,tkfd,tk->td", h, p["down"][ids], jax.nn.softmax(scores))


def mixture_ragged(p, x):
    scores, ids = lax.top_k(x @ p["router"], 2)
    order = jnp.argsort(ids.reshape(-1))
    sizes = jnp.bincount(ids.reshape(-1), length=p["router"].shape[1])
    h = lax.ragged_dot(jnp.tanh(lax.ragged_dot(x[order // 2], p["up"], sizes)), p["down"], sizes)
    h = h[jnp.argsort(order)].reshape(len(x), 2, -1)
    return (h * jax.nn.softmax(scores)[..., None]).sum(1)


@pytest.mark.parametrize("fn", [mixture, mixture_looked_up, mixture_ragged])
def test_an_expert_that_is_never_chosen_can_be_cut(fn):
    params = leaves(router=(HIDDEN, 5), up=(5, HIDDEN, INNER), down=(5, INNER, HIDDEN))
    params["router"] = params["router"].at[0, 3].set(-1e6)
    x = FLAT.at[:, 0].set(1.0)
    found = groups(fn, params, x)
    group = of(found, ("down", 0), ("router", 1), ("up", 0))
    assert group.prunable and group.least == 2
    np.testing.assert_allclose(fn(without(params, group.members, 3), x), fn(params, x), atol=1e-5)
    small = without(params, group.members, [0, 3])
    assert fn(small, x).shape == x.shape
    assert of(found, ("down", 1), ("up", 2)).prunable
    two = without(params, group.members, [0, 1, 3])
    assert not of(groups(fn, two, x), ("down", 0), ("router", 1), ("up", 0)).prunable


def frozen(fn, params, *args):
    return {g.axes[0]: g.frozen for g in groups(fn, params, *args) if g.frozen}


def test_what_is_frozen_says_why():
    fn, shapes, x, _ = CASES["attention_rotary"]
    (reason,) = frozen(fn, leaves(**shapes), x)["k", 1]
    assert reason.startswith("position used by") and "axes_cases.py:" in reason
    fn, shapes, ids, _ = CASES["language"]
    said = frozen(fn, leaves(**shapes), ids)
    assert "output" in said["table", 0] and "input" in said["places", 0]
    assert any(r.startswith("indexed by gather at axes_cases.py:") for r in said["table", 0])


@pytest.mark.parametrize(
    "fn, reason",
    [
        (lambda h: jnp.sort(h), "sort"),
        (lambda h: jnp.cumsum(h, -1), "cumsum"),
        (lambda h: h[:, ::-1], "rev"),
        (lambda h: jnp.fft.fft(h).real, "fft"),
        (lambda h: h * jnp.arange(h.shape[1], dtype=h.dtype)[None], "position used by"),
        (lambda h: h * np.ones(INNER, np.float32)[None], "constant"),
        (lambda h: h[:, jnp.asarray([3, 1])], "indexed by gather"),
        (lambda h: lax.dynamic_slice_in_dim(h, h.sum().astype(int), 4, 1), "dynamic_slice"),
        (lambda h: jnp.linalg.qr(h)[0], "qr"),
        (lambda h: (h + jnp.roll(h, 1, 1)).reshape(h.shape[0], 2, -1).sum(1), ""),
        (lambda h: jnp.where(jnp.arange(h.shape[1])[None] < 3, h, 0.0), "position used by"),
        (lambda h: h * lax.top_k(h, 3)[1][:, :1].astype(h.dtype), "position used by"),
        (lambda h: h.at[:, jnp.asarray(2)].add(1.0), "indexed by scatter"),
    ],
)
def test_an_axis_whose_order_matters_is_frozen(fn, reason):
    params = leaves(a=(HIDDEN, INNER))
    found = groups(lambda p, x: fn(x @ p["a"]).sum(), params, FLAT)
    hit = [g for g in found if ("a", 1) in g.axes]
    assert not any(g.prunable for g in hit)
    assert all(any(r.startswith(reason) for r in g.frozen) for g in hit)


def test_factors_that_do_not_fit_freeze_and_do_not_raise():
    def fn(p, x):
        h = x @ p["a"]  # [tokens, 12]
        a, b = jnp.split(h, [5], -1)
        return (h.reshape(-1, 3, 4) * p["b"][None]).sum() + a.sum() * b.sum()

    params = leaves(a=(HIDDEN, 12), b=(3, 4))
    assert not any(g.prunable for g in groups(fn, params, FLAT))


def test_loops_of_one_length_have_layers_of_their_own():
    def stack(x, w):
        return lax.scan(lambda x, w: (jnp.tanh(x @ w), None), x, w)[0]

    params = leaves(a=(3, HIDDEN, HIDDEN), b=(3, HIDDEN, HIDDEN))
    found = groups(lambda p, x: stack(stack(x, p["a"]), p["b"]), params, FLAT)
    assert of(found, ("a", 0)).prunable and of(found, ("b", 0)).prunable


def test_entries_of_a_unit():
    member = Member("w", 0, (Part(4, 3, ((2, 12),)), Part(40, 1)))
    np.testing.assert_array_equal(member.indices(1), [7, 19, 41])
    np.testing.assert_array_equal(member.indices([0, 2]), [4, 10, 16, 22, 40, 42])
    assert not Group(2, (member,), ("output",)).prunable
    assert not Group(2, (member,), least=2).prunable
    assert Group(3, (member,), least=2).prunable


def test_a_cut_through_factors():
    heads = Dim(24)
    found = factor(heads, 6, "")
    assert found is not None
    left, right = cut(heads, 8, "") or (heads, heads)
    unify(right, Dim(16), "")
    assert (left.size, right.size, [d.size for d, _ in places(heads)]) == (8, 16, [2, 4, 4])
    assert cut(heads, 10, "") is None
    assert find(found[1]) in [d for d, _ in places(left)]


def test_the_zoo_runs_after_cutting():
    """Functions with sizes of their own (a constant number of heads) cannot; all others keep their shape."""
    ran = 0
    for program in zoo.programs():
        expected = jax.eval_shape(program.fn, program.params, *program.args)
        for group in groups(program.fn, program.params, *program.args):
            if not group.prunable:
                continue
            small = without(program.params, group.members, group.size - 1)
            try:
                got = jax.eval_shape(program.fn, small, *program.args)
            except (TypeError, ValueError):
                continue
            ran += 1
            shapes = [x.shape for x in jax.tree.leaves(expected)]
            assert [x.shape for x in jax.tree.leaves(got)] == shapes, (program.name, group.axes)
    assert ran > 40


def test_forty_eight_layers():
    fn = attention(rotary)
    shapes = HEADS | {"up": (HIDDEN, INNER), "down": (INNER, HIDDEN)}
    params = leaves(**{f"{i:02}.{n}": s for i in range(48) for n, s in shapes.items()})

    def decoder(p, x):
        for i in range(48):
            layer = {n: p[f"{i:02}.{n}"] for n in shapes}
            x = x + fn(layer, unit_norm(x))
            x = x + jnp.tanh(unit_norm(x) @ layer["up"]) @ layer["down"]
        return x.sum()

    program = graph(decoder, params, X, views=False)
    found = coupled(program)
    assert sum(g.prunable for g in found) == 48 * 4
