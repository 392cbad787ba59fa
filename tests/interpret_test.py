"""The interpreter: nothing hooked changes nothing; taps and replaced inputs are what a hand would write."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from jax import lax
from jax.ad_checkpoint import checkpoint_name
from jax.extend import core

from mojax.errors import InputError
from mojax.interpret import intercept as intercept_places
from mojax.trace import sites

SIZE = 8


def weights():
    rng = np.random.default_rng(0)
    shapes = {"a": (8, 8), "b": (8, 8), "c": (8, 8), "g": (8,), "stack": (3, 8, 8), "heads": (2, 4, 8)}
    return {n: jnp.asarray(0.4 * rng.standard_normal(s), jnp.float32) for n, s in shapes.items()}


P = weights()
X = jnp.asarray(np.random.default_rng(1).standard_normal((5, SIZE)), jnp.float32)


def intercept(fn, inputs, **options):
    """With a hook on inputs: `inputs(name, x, axes) -> (new x | None, tap | None)`."""

    def hook(place):
        if place.op == "gather":
            return None, None
        x, tap = inputs(place.name, place.x, place.axes)
        return None if x is None else place.run(x=x), tap

    return intercept_places(fn, hook, **options)


def nothing(name, x, axes):
    return None, None


def absmax_and_gram(name, x, axes):
    rest = [i for i in range(x.ndim) if i not in axes]
    flat = x.transpose(*rest, *axes).reshape(-1, int(np.prod([x.shape[i] for i in axes])))
    return None, {"absmax": jnp.abs(flat).max(), "gram": flat.T @ flat}


def rms_norm(x, g):
    return x * lax.rsqrt((x * x).mean(-1, keepdims=True) + 1e-6) * g[None]


@jax.custom_vjp
def linear(x, w):
    return x @ w


linear.defvjp(lambda x, w: (linear(x, w), (x, w)), lambda r, t: (t @ r[1].T, r[0].T @ t))


@jax.custom_jvp
def passed(w):
    return w.T


passed.defjvp(lambda w, t: (passed(*w), passed(*t)))


def attention(p, x):
    q, k, v = (rms_norm(x, p["g"]) @ p[n].T for n in "abc")
    k, v = checkpoint_name(k, "k_cache"), checkpoint_name(v, "v_cache")
    return x + jax.nn.softmax(q @ k.T) @ v


def heads(p, x):
    y = jnp.einsum("ti,hdi->thd", x, p["heads"])
    return jnp.einsum("hdi,thd->ti", p["heads"], y)


def loop(p, x):
    def step(s):
        return s[0] + 1, jnp.tanh(s[1] @ p["a"]), s[2] * jnp.bfloat16(2)

    return lax.while_loop(lambda s: s[0] < 3, step, (0, x, jnp.bfloat16(1)))


PROGRAMS = {
    "attention": attention,
    "einsum": heads,
    "lookup and tied head": lambda p, x: p["a"][jnp.arange(5) % 8] @ p["a"].T,
    "jit": lambda p, x: jax.jit(lambda w, x: jnp.tanh(x @ w))(p["a"], x),
    "custom_jvp": lambda p, x: jax.nn.silu(x @ p["a"]) * jax.nn.relu(p["g"])[None],
    "custom_vjp": lambda p, x: linear(x, p["a"]),
    "remat": lambda p, x: jax.checkpoint(attention)(p, x),
    "scan": lambda p, x: lax.scan(lambda c, w: (jnp.tanh(c @ w) + c @ p["a"], c.sum()), x, p["stack"]),
    "scan of remat": lambda p, x: lax.scan(jax.checkpoint(lambda c, w: (c @ w.T, None)), x, p["stack"])[0],
    "reverse scan": lambda p, x: lax.scan(lambda c, w: (c @ w, c), x, p["stack"], reverse=True, unroll=3),
    "leaf as carry": lambda p, x: lax.scan(lambda c, t: (c @ p["a"], t @ c), p["b"], X),
    "cond": lambda p, x: lax.cond(x.sum() > 0, lambda x: x @ p["a"].T, lambda x: jnp.tanh(x @ p["b"]), x),
    "switch": lambda p, x: lax.switch(2, [lambda x: x, lambda x: x @ p["a"], lambda x: x @ p["b"]], x),
    "while": loop,
    "fori": lambda p, x: lax.fori_loop(0, 3, lambda i, s: jnp.tanh(s @ p["stack"][i]), x),
    "map": lambda p, x: lax.map(lambda r: r @ p["a"], x),
    "vmap": lambda p, x: jax.vmap(lambda w: x @ w)(p["stack"]),
    "split": lambda p, x: [x @ w for w in jnp.split(p["a"], 2, 1)] + jnp.split(x @ p["b"], 2, -1),
    "weights meet": lambda p, x: x @ (p["a"] @ p["b"]) + x @ (p["g"][:, None] * p["c"]),
    "unknown primitives": lambda p, x: (lax.sort(p["a"]), lax.cumsum(x @ p["b"]), lax.linalg.qr(p["c"])[1]),
    "parameter out of remat": lambda p, x: x @ jax.checkpoint(lambda w: w.T)(p["a"]) @ p["b"],
    "parameter out of a custom rule": lambda p, x: x @ jax.nn.relu(p["a"]) @ passed(p["b"]),
    "gradient inside": lambda p, x: jax.grad(lambda x: jnp.tanh(x @ p["a"]).sum())(x),
    "outputs that are parameters": lambda p, x: {"w": p["a"].T, "x": x, "none": None},
    "integers": lambda p, x: jnp.arange(5)[:, None] + jnp.argmax(x @ p["a"], 1)[:, None],
    "constants": lambda p, x: x @ jnp.asarray(np.eye(8, dtype=np.float32)) @ p["a"],
}


def assert_identical(a, b):
    assert jax.tree.structure(a) == jax.tree.structure(b)
    for x, y in zip(jax.tree.leaves(a), jax.tree.leaves(b), strict=True):
        assert x.dtype == y.dtype
        np.testing.assert_array_equal(x, y)


@pytest.mark.parametrize("name", PROGRAMS)
def test_nothing_hooked_is_the_function_bit_for_bit(name):
    fn = PROGRAMS[name]
    out, taps = jax.jit(intercept(fn, nothing))(P, X)
    assert_identical(out, jax.jit(fn)(P, X))
    assert taps == {}


@pytest.mark.parametrize("name", sorted(set(PROGRAMS) - {"while"}))
def test_taps_change_nothing_and_are_those_of_the_sites(name):
    fn = PROGRAMS[name]
    out, taps = jax.jit(intercept(fn, absmax_and_gram))(P, X)
    jax.tree.map(functools.partial(np.testing.assert_allclose, rtol=1e-5, atol=1e-5), out, jax.jit(fn)(P, X))
    keys, seen = [], {}
    for site in sites(fn, P, X):
        if site.op != "gather":
            n = seen[site.weight] = seen.get(site.weight, -1) + 1
            keys.append(f"{site.weight}#{n}" if n else site.weight)
    assert sorted(taps) == sorted(keys)


def test_taps_of_attention():
    _, taps = jax.jit(intercept(attention, absmax_and_gram))(P, X)
    h = rms_norm(X, P["g"])
    for name in "abc":
        np.testing.assert_allclose(taps[name]["gram"], h.T @ h, rtol=1e-5, atol=1e-5)
        np.testing.assert_allclose(taps[name]["absmax"], jnp.abs(h).max(), rtol=1e-6)
    np.testing.assert_allclose(taps["v_cache"]["absmax"], jnp.abs(h @ P["c"].T).max(), rtol=1e-5)


def test_taps_of_two_contracted_axes_follow_the_axes_of_the_weight():
    _, taps = jax.jit(intercept(heads, absmax_and_gram))(P, X)
    y = jnp.einsum("ti,hdi->thd", X, P["heads"]).reshape(5, 8)
    np.testing.assert_allclose(taps["heads"]["gram"], X.T @ X, rtol=1e-5, atol=1e-5)
    np.testing.assert_allclose(taps["heads#1"]["gram"], y.T @ y, rtol=1e-5, atol=1e-5)


def test_taps_of_a_scan_are_stacked():
    _, taps = jax.jit(intercept(PROGRAMS["scan"], absmax_and_gram))(P, X)
    x, expected = X, []
    for w in P["stack"]:
        expected.append(x.T @ x)
        x = jnp.tanh(x @ w) + x @ P["a"]
    np.testing.assert_allclose(taps["stack"]["gram"], jnp.stack(expected), rtol=1e-4, atol=1e-4)
    np.testing.assert_array_equal(taps["a"]["gram"], taps["stack"]["gram"])


def test_taps_of_a_branch_not_taken_are_zeros():
    g = jax.jit(intercept(PROGRAMS["cond"], absmax_and_gram))
    for x in (jnp.abs(X), -jnp.abs(X)):
        _, taps = g(P, x)
        read, other = ("a", "b") if x.sum() > 0 else ("b", "a")
        np.testing.assert_allclose(taps[read]["gram"], x.T @ x, rtol=1e-5, atol=1e-5)
        assert not taps[other]["gram"].any()


def halve(name, x, axes):
    return {"a": x / 2, "v_cache": x + 1}.get(name), None


def test_a_replaced_input_is_read_by_that_dot_only():
    def by_hand(p, x):
        h = rms_norm(x, p["g"])
        q, k, v = (h / 2) @ p["a"].T, h @ p["b"].T, h @ p["c"].T + 1
        return x + jax.nn.softmax(q @ k.T) @ v

    out, taps = jax.jit(intercept(attention, halve))(P, X)
    np.testing.assert_allclose(out, by_hand(P, X), rtol=1e-5, atol=1e-6)
    assert taps == {}
    assert np.abs(out - attention(P, X)).max() > 0.01


@pytest.mark.parametrize("name", ["jit", "custom_vjp", "remat", "scan", "while", "map", "einsum"])
def test_a_replaced_input_is_found_inside(name):
    fn = PROGRAMS[name]
    out, _ = jax.jit(intercept(fn, lambda n, x, axes: (x * 0, None)))(P, X)
    assert np.abs(jax.tree.leaves(out)[-1] - jax.tree.leaves(fn(P, X))[-1]).max() > 1e-3 or name == "while"
    if name in ("jit", "custom_vjp", "map", "einsum"):
        assert not np.asarray(out).any()
    if name == "while":
        assert not np.asarray(out[1]).any()


def rounded(name, x, axes):
    return x + lax.stop_gradient(jnp.round(8 * x) / 8 - x), jnp.abs(x).max()


@pytest.mark.parametrize(
    "name", ["attention", "custom_jvp", "custom_vjp", "remat", "scan", "scan of remat", "cond"]
)
def test_straight_through_gradients(name):
    def loss(fn):
        return lambda p: sum((t**2).sum() for t in jax.tree.leaves(fn(p)))

    g = intercept(PROGRAMS[name], rounded)
    grads = jax.jit(jax.grad(loss(lambda p: g(p, X)[0])))(P)
    exact = jax.jit(jax.grad(loss(lambda p: PROGRAMS[name](p, X))))(P)
    for n in P:
        assert np.isfinite(grads[n]).all()
        assert np.any(np.asarray(exact[n])) == np.any(np.asarray(grads[n])), n


def test_gradients_of_the_identity_are_those_of_the_function():
    for name in ("attention", "custom_jvp", "remat", "scan"):
        fn = PROGRAMS[name]
        f = jax.jit(jax.grad(lambda p, fn=fn: sum(t.sum() for t in jax.tree.leaves(fn(p, X)))))
        g = jax.jit(
            jax.grad(lambda p, fn=fn: sum(t.sum() for t in jax.tree.leaves(intercept(fn, nothing)(p, X)[0])))
        )
        jax.tree.map(functools.partial(np.testing.assert_allclose, rtol=1e-4, atol=1e-5), g(P), f(P))


def names(jaxpr):
    inner = [j for e in jaxpr.eqns for j in core.jaxprs_in_params(e.params)]
    return {e.primitive.name for e in jaxpr.eqns}.union(*(names(getattr(j, "jaxpr", j)) for j in inner))


def test_remat_and_custom_rules_without_a_site_stay():
    g = intercept(lambda p, x: jax.nn.relu(p["g"]) * jax.checkpoint(attention)(p, x).sum(), nothing)
    found = names(jax.make_jaxpr(g)(P, X).jaxpr)
    assert {"custom_jvp_call"} < found and found & {"remat2", "checkpoint", "remat"}


def test_bfloat16_and_a_traced_transformation_on_top():
    p, x = jax.tree.map(lambda t: t.astype(jnp.bfloat16), (P, X))
    g = intercept(attention, absmax_and_gram)
    out, taps = jax.jit(jax.vmap(g, in_axes=(None, 0)))(p, jnp.stack([x, 2 * x]))
    assert out.dtype == jnp.bfloat16
    assert taps["a"]["gram"].shape == (2, 8, 8)


def test_taps_in_a_while_loop_are_refused():
    with pytest.raises(InputError, match="a: tapped inside a while_loop"):
        intercept(loop, absmax_and_gram)(P, X)


def test_a_replacement_must_fit():
    with pytest.raises(InputError, match=r"a: .* float32\[5, 8\] by float32\[5, 4\]"):
        intercept(PROGRAMS["jit"], lambda n, x, axes: (x[:, :4], None))(P, X)


def experts(p, x):
    """Three experts; rows sorted by the one that a router chooses."""
    chosen = jnp.argmax(x @ p["a"][:, :3], axis=1)
    order = jnp.argsort(chosen)
    y = lax.ragged_dot(x[order], p["stack"], jnp.bincount(chosen, length=3))
    return jnp.zeros_like(x).at[order].set(y)


def convolution(p, x):
    kernel = p["stack"].reshape(3, 8, 8)
    return lax.conv_general_dilated(x[None], kernel, (1,), "SAME", dimension_numbers=("NHC", "HIO", "NHC"))[0]


STEPS = {
    "dot": lambda p, x: x @ p["a"].T,
    "left": lambda p, x: (p["b"] @ x.T).T,
    "scan": lambda p, x: lax.scan(lambda c, w: (jnp.tanh(c @ w), None), x, p["stack"])[0],
    "jit": lambda p, x: jax.jit(lambda w, x: jnp.sin(x @ w))(p["c"], x),
    "remat": lambda p, x: jax.checkpoint(lambda w, x: jnp.tanh(x @ w))(p["b"], x),
    "cond": lambda p, x: lax.cond(x[0, 0] > 0, lambda: x @ p["a"], lambda: x * p["g"][None]),
    "silu": lambda p, x: jax.nn.silu(x),
    "gain": lambda p, x: rms_norm(x, p["g"]),
    "name": lambda p, x: checkpoint_name(x, "hidden"),
    "residual": lambda p, x: x + jnp.einsum("hdi,ti->thd", p["heads"], x).reshape(5, 8),
    "view": lambda p, x: x @ p["stack"][1].reshape(4, 2, 8).reshape(8, 8).T,
    "experts": experts,
    "convolution": convolution,
    "vmap": lambda p, x: jax.vmap(lambda w: x @ w)(p["stack"]).mean(0),
    "batched vmap": lambda p, x: jax.vmap(lambda w, x: x @ w)(p["stack"], jnp.stack([x, 2 * x, -x])).sum(0),
    "fori": lambda p, x: lax.fori_loop(0, 3, lambda i, x: jnp.sin(x @ p["stack"][i]), x),
    "while": lambda p, x: lax.while_loop(
        lambda s: s[0] < 2, lambda s: (s[0] + 1, jnp.tanh(s[1] @ p["b"])), (0, x)
    )[1],
    "remat scan": lambda p, x: lax.scan(
        jax.checkpoint(lambda c, w: (jnp.tanh(c @ w + c @ p["a"]), None)), x, p["stack"]
    )[0],
    "lookup": lambda p, x: x + p["a"][jnp.arange(5) % 3],
    "split": lambda p, x: jnp.concatenate([x @ w for w in jnp.split(p["c"], 2, 1)], 1),
    "arithmetic": lambda p, x: x @ (p["a"] + p["b"] @ p["c"]),
    "custom rule": lambda p, x: linear(x, p["c"]),
}
OPS = st.lists(st.sampled_from(sorted(STEPS)), min_size=1, max_size=5)
INPUTS = ("dot", "left", "jit", "experts", "vmap", "fori", "remat scan", "split", "custom rule")


def program(ops):
    """A random composition; every step keeps [5, 8]."""
    return lambda p, x: functools.reduce(lambda x, op: STEPS[op](p, x), ops, x)


@settings(max_examples=30, deadline=None, database=None)
@given(OPS)
def test_random_programs_are_unchanged(ops):
    """By a hook that does nothing, and by one that does every operation anew."""
    fn = program(ops)
    expected = jax.jit(fn)(P, X)
    for hook in (lambda place: (None, None), lambda place: (place.run(), None)):
        out = jax.jit(intercept_places(fn, hook))(P, X)[0]
        np.testing.assert_allclose(out, expected, rtol=1e-5, atol=1e-5)


@settings(max_examples=20, deadline=None, database=None)
@given(st.lists(st.sampled_from(INPUTS), min_size=1, max_size=4))
def test_every_site_of_a_random_program_is_a_place(ops):
    """The tracer and the interpreter agree on where parameters are read, and how."""
    fn, met = program(ops), []

    def hook(place):
        met.append((place.name, place.op, len(place.axes)))
        return None, None

    jax.make_jaxpr(intercept_places(fn, hook))(P, X)
    found = [(s.weight, s.op, len(s.contract)) for s in sites(fn, P, X)]
    assert found
    assert set(met) == set(found)


def test_a_hook_that_does_nothing_adds_no_operation():
    """Calls apart, which are inlined."""

    def count(jaxpr):
        inner = [j for e in jaxpr.eqns for j in core.jaxprs_in_params(e.params)]
        own = sum(e.primitive.name not in ("jit", "pjit") for e in jaxpr.eqns)
        return own + sum(count(getattr(j, "jaxpr", j)) for j in inner)

    for name in ("attention", "scan of remat", "cond", "custom_jvp"):
        plain, through = (
            count(jax.make_jaxpr(f)(P, X).jaxpr) for f in (PROGRAMS[name], intercept(PROGRAMS[name], nothing))
        )
        assert through <= plain + 1, name
