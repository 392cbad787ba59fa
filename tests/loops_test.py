"""Hooks inside loops, branches, rematerialised and sharded functions; parameters that are packed."""

import os
import subprocess
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import zoo
from jax import lax
from jax.extend import core
from jax.sharding import AxisType
from jax.sharding import PartitionSpec as P

from mojax.errors import InputError
from mojax.formats import fp8, int4, int8
from mojax.formats.base import encode_leaf
from mojax.interpret import intercept
from mojax.rules import RULES, Dims, Dot
from mojax.trace import sites

RNG = np.random.default_rng(0)
W = {
    "a": jnp.asarray(0.3 * RNG.standard_normal((8, 8)), jnp.float32),
    "b": jnp.asarray(0.3 * RNG.standard_normal((8, 8)), jnp.float32),
    "stack": jnp.asarray(0.3 * RNG.standard_normal((3, 8, 8)), jnp.float32),
}
X = jnp.asarray(RNG.standard_normal((5, 8)), jnp.float32)


def gram(place):
    rows = place.x.reshape(-1, place.x.shape[-1])
    return None, {"max": jnp.abs(rows).max(0), "gram": rows.T @ rows}


def merge(a, b):
    return {"max": jnp.maximum(a["max"], b["max"]), "gram": a["gram"] + b["gram"]}


def nothing(place):
    return None, None


def scanned(p, x):
    return lax.scan(lambda c, w: (jnp.tanh(c @ w) + c @ p["a"], None), x, p["stack"])[0]


def indexed(p, x):
    def step(i, c):
        return jnp.tanh(c @ lax.dynamic_index_in_dim(p["stack"], i, 0, keepdims=False)) + c @ p["a"]

    return lax.fori_loop(0, 3, step, x)


def unrolled(p, x):
    for i in range(3):
        x = jnp.tanh(x @ p["stack"][i]) + x @ p["a"]
    return x


def remat(p, x):
    step = jax.checkpoint(lambda c, w: (jnp.tanh(c @ w) + c @ p["a"], None))
    return lax.scan(step, x, p["stack"])[0]


def endless(p, x):
    def step(s):
        return s[0] + 1, jnp.tanh(s[1] @ p["a"])

    return lax.while_loop(lambda s: s[0] < 3, step, (0, x))[1]


LAYERED = [scanned, indexed, unrolled, remat]


@pytest.mark.parametrize("fn", LAYERED)
def test_taps_are_stacked_over_the_rows_of_a_parameter_and_merged_otherwise(fn):
    out, taps = jax.jit(intercept(fn, gram, merge=merge, stacks={"stack": 1}))(W, X)
    x, expected = X, []
    for w in W["stack"]:
        expected.append(x.T @ x)
        x = jnp.tanh(x @ w) + x @ W["a"]
    np.testing.assert_allclose(out, x, rtol=1e-5, atol=1e-5)
    if fn is unrolled:  # three places with one row each
        total = {k: sum(taps[n][k] for n in ("stack", "stack#1", "stack#2")) for k in ("gram",)}
        np.testing.assert_allclose(total["gram"], jnp.stack(expected), rtol=1e-4, atol=1e-4)
        return
    np.testing.assert_allclose(taps["stack"]["gram"], jnp.stack(expected), rtol=1e-4, atol=1e-4)
    np.testing.assert_allclose(taps["a"]["gram"], sum(expected), rtol=1e-4, atol=1e-4)


def test_taps_of_a_while_loop_are_merged():
    out, taps = jax.jit(intercept(endless, gram, merge=merge))(W, X)
    x, expected, top = X, 0, 0
    for _ in range(3):
        expected, top = expected + x.T @ x, jnp.maximum(top, jnp.abs(x).max(0))
        x = jnp.tanh(x @ W["a"])
    np.testing.assert_allclose(out, x, rtol=1e-5, atol=1e-5)
    np.testing.assert_allclose(taps["a"]["gram"], expected, rtol=1e-4, atol=1e-4)
    np.testing.assert_allclose(taps["a"]["max"], top, rtol=1e-5)


def test_a_tap_in_the_condition_of_a_while_loop_is_refused():
    def fn(p, x):
        return lax.while_loop(lambda x: (x @ p["a"]).sum() > 0, lambda x: x - 1, x)

    with pytest.raises(InputError, match="a: tapped inside a while_loop"):
        intercept(fn, gram, merge=merge)(W, X)


def rounded(name, value):
    return jnp.round(4 * value) / 4


@pytest.mark.parametrize("fn", [*LAYERED, endless])
def test_parameters_are_read_by_the_way_they_are_used(fn):
    out, _ = jax.jit(intercept(fn, nothing, read=rounded, stacks={"stack": 1}))(W, X)
    expected = fn({n: rounded(n, w) for n, w in W.items()}, X)
    np.testing.assert_allclose(out, expected, rtol=1e-5, atol=1e-5)


def shapes_of(jaxpr, primitive):
    """The shapes that `primitive` gives in a jaxpr, at any depth."""
    for eqn in getattr(jaxpr, "jaxpr", jaxpr).eqns:
        if eqn.primitive.name == primitive:
            yield tuple(eqn.outvars[0].aval.shape)
        for inner in core.jaxprs_in_params(eqn.params):
            yield from shapes_of(inner, primitive)


@pytest.mark.parametrize("fn", LAYERED)
def test_a_stack_is_read_row_by_row_and_what_all_steps_share_only_once(fn):
    jaxpr = jax.make_jaxpr(intercept(fn, nothing, read=rounded, stacks={"stack": 1}))(W, X)
    found = set(shapes_of(jaxpr, "round"))
    assert found == {(8, 8)}
    whole = jax.make_jaxpr(intercept(fn, nothing, read=rounded))(W, X)
    assert (3, 8, 8) in set(shapes_of(whole, "round"))


def test_a_rewrite_takes_the_place_of_the_operation():
    def hook(place):
        return (2 * place.run(), None) if place.name == "b" else (None, None)

    out, _ = intercept(lambda p, x: (x @ p["a"]) @ p["b"], hook)(W, X)
    np.testing.assert_allclose(out, 2 * ((X @ W["a"]) @ W["b"]), rtol=1e-5)
    with pytest.raises(InputError, match=r"b: the hook replaced float32\[5, 8\] by bfloat16\[5, 8\]"):
        intercept(lambda p, x: x @ p["b"], lambda place: (place.run().astype(jnp.bfloat16), None))(W, X)


def test_another_parameter_at_one_place_only():
    def hook(place):
        return (place.run(w=W["b"]), None) if place.op == "dot" else (None, None)

    out, _ = intercept(lambda p, x: x @ p["a"].T + p["a"][0][None], hook)(W, X)
    np.testing.assert_allclose(out, X @ W["b"].T + W["a"][0][None], rtol=1e-5, atol=1e-6)


FORMATS = [int8.FORMAT(), fp8.FORMAT(per="channel"), int4.FORMAT(group=4)]


@pytest.mark.parametrize("format", FORMATS, ids=lambda f: f.label)
@pytest.mark.parametrize("fn", [*LAYERED, endless])
def test_packed_parameters_run_through_loops(fn, format):
    packed = {n: encode_leaf(format, w, (w.ndim - 2,), (0,) * (w.ndim == 3)) for n, w in W.items()}
    plain = {n: q.format.decode(q) for n, q in packed.items()}
    out, _ = jax.jit(intercept(fn, nothing))(packed, X)
    np.testing.assert_allclose(out, fn(plain, X), rtol=1e-5, atol=1e-5)


def test_what_no_kernel_takes_is_an_error_that_names_it():
    packed = W | {"a": encode_leaf(int8.FORMAT(), W["a"], (0,))}
    cases = {
        "meets mul at loops_test": lambda p, x: x @ (2 * p["a"]),
        "other axes": lambda p, x: x @ p["a"].T,
        "summed over other axes than it was packed for": lambda p, x: x[:, :4] @ p["a"][:4],
        "leaves the function": lambda p, x: p["a"],
    }
    for message, fn in cases.items():
        with pytest.raises(InputError, match=rf"^a: is packed \(int8\) and .*{message}"):
            intercept(fn, nothing)(packed, X)
    out, _ = intercept(cases["other axes"], nothing, read=_decoded)(packed, X)
    np.testing.assert_allclose(out, X @ _decoded("a", packed["a"]).T, rtol=1e-5)


def _decoded(name, value):
    return value.format.decode(value) if name == "a" else value


def test_columns_of_a_packed_parameter_are_cut_without_unpacking():
    packed = {"a": encode_leaf(int8.FORMAT(), W["a"], (0,))}
    out, _ = intercept(lambda p, x: [x @ w for w in jnp.split(p["a"], 2, 1)], nothing)(packed, X)
    whole = X @ _decoded("a", packed["a"])
    np.testing.assert_allclose(jnp.concatenate(out, 1), whole, rtol=1e-5, atol=1e-6)


def test_a_user_teaches_a_primitive():
    scaled = core.Primitive("scaled_matmul")
    scaled.def_impl(lambda x, w: 2 * (x @ w))
    scaled.def_abstract_eval(lambda x, w: jax.core.ShapedArray((x.shape[0], w.shape[1]), x.dtype))

    def fn(p, x):
        return scaled.bind(x, p["a"])

    assert sites(fn, W, X) == ()
    rules = {**RULES, "scaled_matmul": Dot("dot", lambda p, shapes, side: Dims((1 - side,), (side,)))}
    found = [(s.weight, s.op, s.contract) for s in sites(fn, W, X, rules=rules)]
    assert found == [("a", "dot", (0,))]
    out, taps = intercept(fn, gram, rules=rules)(W, X)
    np.testing.assert_allclose(taps["a"]["gram"], X.T @ X, rtol=1e-5)
    np.testing.assert_allclose(out, 2 * (X @ W["a"]), rtol=1e-5)


def identical(name):
    p = zoo.program(name)
    expected = jax.jit(p.fn)(p.params, *p.args)
    out, _ = jax.jit(intercept(p.fn, lambda place: (place.run(), None), rules=RULES))(p.params, *p.args)
    for a, b in zip(jax.tree.leaves(out), jax.tree.leaves(expected), strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("name", [p.name for p in zoo.programs()])
def test_an_architecture_is_unchanged_by_the_identity(name):
    identical(name)


DEVICES = 8


def mlp(mesh, check=True):
    def body(x, up, down):
        return lax.psum(jnp.maximum(x @ up, 0) @ down.T, "model")

    specs = {"in_specs": (P("data"), P(None, "model"), P(None, "model")), "out_specs": P("data")}

    def fn(p, x):
        return jax.shard_map(body, mesh=mesh, check_vma=check, **specs)(x, p["up"], p["down"])

    return fn


def test_sharded():
    """Taps, replaced inputs and parameters, and gradients on two by four devices."""
    if jax.device_count() < DEVICES:
        flags = f"{os.environ.get('XLA_FLAGS', '')} --xla_force_host_platform_device_count={DEVICES}"
        command = [sys.executable, "-m", "pytest", "-q", f"{__file__}::test_sharded"]
        done = subprocess.run(command, env=os.environ | {"XLA_FLAGS": flags}, capture_output=True, text=True)
        assert done.returncode == 0, done.stdout + done.stderr
        return
    mesh = jax.make_mesh((2, 4), ("data", "model"), axis_types=(AxisType.Auto,) * 2)
    fn = mlp(mesh)
    p = {n: jnp.asarray(RNG.standard_normal((16, 32)), jnp.float32) for n in ("up", "down")}
    x = jnp.asarray(RNG.standard_normal((4, 16)), jnp.float32)
    hidden = jnp.maximum(x @ p["up"], 0)
    out, taps = jax.jit(intercept(fn, gram, merge=merge))(p, x)
    np.testing.assert_allclose(out, hidden @ p["down"].T, rtol=1e-4, atol=1e-3)
    np.testing.assert_allclose(taps["up"]["gram"], x.T @ x, rtol=1e-4, atol=1e-4)
    np.testing.assert_allclose(taps["down"]["gram"], hidden.T @ hidden, rtol=1e-4, atol=1e-3)
    np.testing.assert_allclose(taps["down"]["max"], hidden.max(0), rtol=1e-5)
    _, taps = jax.jit(intercept(mlp(mesh, check=False), gram, merge=merge))(p, x)
    np.testing.assert_allclose(taps["down"]["max"], hidden.max(0), rtol=1e-5)
    with pytest.raises(InputError, match="tapped inside a shard_map; say how the taps of two devices merge"):
        intercept(fn, gram)(p, x)

    def hook(place):
        return place.run(x=rounded(None, place.x)), None

    out, _ = jax.jit(intercept(fn, hook, read=rounded))(p, x)
    up, down = (rounded(None, p[n]) for n in ("up", "down"))
    hidden = jnp.maximum(rounded(None, x) @ up, 0)
    np.testing.assert_allclose(out, rounded(None, hidden) @ down.T, rtol=1e-4, atol=1e-3)
    grads = jax.grad(lambda p: intercept(fn, nothing)(p, x)[0].sum())(p)
    exact = jax.grad(lambda p: fn(p, x).sum())(p)
    np.testing.assert_allclose(grads["up"], exact["up"], rtol=1e-4, atol=1e-4)
    packed = {n: encode_leaf(int8.FORMAT(), w, (n == "down",)) for n, w in p.items()}
    with pytest.raises(InputError, match=r"up: is packed \(int8\) and meets shard_map"):
        intercept(fn, nothing)(packed, x)


def test_a_hook_must_return_a_pair():
    with pytest.raises(InputError, match="a: the hook returned NoneType, needed a pair"):
        intercept(lambda p, x: x @ p["a"], lambda place: None)(W, X)


def test_a_packed_product_of_two_parameters_says_so():
    packed = W | {"a": encode_leaf(int8.FORMAT(), W["a"], (0,))}
    with pytest.raises(
        InputError, match=r"a: is packed .* meets dot_general with another parameter at loops_test"
    ):
        intercept(lambda p, x: x @ (p["a"] @ p["b"]), nothing)(packed, X)
