"""Rows and parts of parameters: what is read of them is what is packed, calibrated and traced."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import lax

import mojax
from mojax.document import Rule
from mojax.errors import InputError
from mojax.formats.base import QTensor, encode_leaf
from mojax.formats.int8 import FORMAT as INT8
from mojax.interpret import intercept
from mojax.kernels.base import decoded
from mojax.recipe import load_recipe
from mojax.trace import sites

RNG = np.random.default_rng(0)
X = jnp.asarray(RNG.standard_normal((5, 16)), jnp.float32)
STATIC = load_recipe("fp8")
WEIGHTS = dataclasses.replace(load_recipe("int8"), rules=(Rule("*", weights={"format": "int8"}),))


def weight(*shape):
    return jnp.asarray(0.4 * RNG.standard_normal(shape), jnp.float32)


def layer(x, w):
    return jnp.tanh(x @ w), None


def scan(x, stack):
    return lax.scan(layer, x, stack)[0]


def over(w, x, first, second, scan_inner):
    def outer(i, x):
        if scan_inner:
            return scan(x, w[i])
        return lax.fori_loop(0, second, lambda j, x: layer(x, w[i, j])[0], x)

    return lax.fori_loop(0, first, outer, x)


def nested_transposed(p, x):
    return lax.scan(lambda x, w: (scan(x, w.swapaxes(1, 2)), None), x, p["w"])[0]


PARTS = {  # the function, the shape of w
    "a part of reshaped columns": (lambda p, x: x @ p["w"].reshape(16, 3, 8)[:, 1], (16, 24)),
    "a part of reshaped rows": (lambda p, x: x @ p["w"].reshape(3, 8, 16)[2].T, (24, 16)),
    "the first, then the others": (lambda p, x: scan(layer(x, p["w"][0])[0], p["w"][1:]), (4, 16, 16)),
    "two scans over parts": (lambda p, x: scan(scan(x, p["w"][::2]), p["w"][1::2]), (4, 16, 16)),
    "layers on the last axis": (lambda p, x: scan(x, p["w"].transpose(2, 0, 1)), (16, 16, 4)),
    "nested, transposed inside": (nested_transposed, (2, 3, 16, 16)),
    "two indices": (lambda p, x: layer(layer(x, p["w"][1, 0])[0], p["w"][0][2])[0], (2, 3, 16, 16)),
    "two indices of loops": (lambda p, x: over(p["w"], x, 2, 3, False), (2, 3, 16, 16)),
    "a scan inside of an index": (lambda p, x: over(p["w"], x, 2, 3, True), (2, 3, 16, 16)),
    "experts around layers": (lambda p, x: jax.vmap(lambda w: scan(x, w))(p["w"]), (2, 3, 16, 16)),
}


def fits(a, b):
    np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("name", PARTS)
def test_parts_run_packed(name):
    fn, shape = PARTS[name]
    model = mojax.from_function(fn, {"w": weight(*shape)}, X)
    packed = mojax.quantize(model, WEIGHTS)
    assert isinstance(packed.params["w"], QTensor)
    fits(packed(X), fn({"w": decoded(packed.params["w"])}, X))


@pytest.mark.parametrize("name", PARTS)
def test_parts_run_alike_under_static_scales(name):
    fn, shape = PARTS[name]
    model = mojax.from_function(fn, {"w": weight(*shape)}, X)
    stats = mojax.calibrate(model, STATIC, [X, 2 * X])
    assert stats["w"]["absmax"].shape == (*(shape[a] for a in model.sites[0].batch), 16)
    fits(mojax.quantize(model, STATIC, stats)(X), mojax.fake_quant(model, STATIC, stats)(X))


@pytest.mark.parametrize("name", ("the first, then the others", "two scans over parts"))
def test_every_layer_has_its_own_statistics_also_where_a_scan_takes_some(name):
    w = weight(4, 16, 16)
    x, seen = X, {}
    for i in (0, 1, 2, 3) if name.startswith("the") else (0, 2, 1, 3):
        seen[i] = jnp.max(jnp.abs(x), axis=0)
        x = layer(x, w[i])[0]
    stats = mojax.calibrate(mojax.from_function(PARTS[name][0], {"w": w}, X), STATIC, [X])
    fits(stats["w"]["absmax"], np.stack([seen[i] for i in range(4)]))


def test_experts_around_layers_never_swap_their_statistics():
    """As many experts as layers: the order of the axes shows in no shape."""
    w = weight(3, 3, 16, 16)
    model = mojax.from_function(PARTS["experts around layers"][0], {"w": w}, X)
    stats = mojax.calibrate(model, STATIC, [X])
    for e in range(3):
        x = X
        for i in range(3):
            assert np.all(stats["w"]["absmax"][e, i] >= jnp.max(jnp.abs(x), axis=0) - 1e-5)
            x = layer(x, w[e, i])[0]


def test_a_part_at_an_index_of_the_program_is_refused_and_not_guessed():
    def fn(p, x, i):
        return x @ p["w"].reshape(3, 8, 16)[i].T

    w = weight(24, 16)
    with pytest.raises(InputError, match=r"w: is packed .* and is read in parts"):
        intercept(fn, lambda place: (None, None))({"w": encode_leaf(INT8(), w)}, X, jnp.int32(2))


def test_a_reshape_in_another_order_is_followed():
    def fn(p, x):  # a vmap over kernels folds them into the channels of one
        numbers = ("NWC", "WIO", "NWC")
        one = lambda w: lax.conv_general_dilated(x, w, (1,), "SAME", dimension_numbers=numbers)  # noqa: E731
        return jax.vmap(one)(p["w"])

    (site,) = sites(fn, {"w": weight(2, 3, 6, 4)}, X[:, None, :6])
    assert (site.op, site.contract) == ("conv", (1, 2))


def test_parts_of_an_input_are_other_inputs():
    def fn(p, x):
        y = x.reshape(5, 2, 8)
        return y[:, 0] @ p["a"] + y[:, 1] @ p["b"]

    a, b = sites(fn, {"a": weight(8, 4), "b": weight(8, 4)}, X)
    assert a.group != b.group


def test_an_empty_leaf_that_is_reshaped_is_traced():
    model = mojax.from_function(
        lambda p, x: (x @ p["w"], p["none"].reshape(0, 3, 5)), {"w": weight(16, 4), "none": weight(0)}, X
    )
    assert model.sites[0].weight == "w"
    fits(mojax.quantize(model, WEIGHTS)(X)[0], mojax.fake_quant(model, WEIGHTS)(X)[0])


def test_groups_of_rows_in_float64_stay_so():
    with jax.enable_x64(True):
        w, x = jnp.asarray(RNG.standard_normal((3, 16, 8))), jnp.asarray(RNG.standard_normal((5, 16)))
        fn = lambda p, x: lax.ragged_dot(x, p["w"], jnp.asarray([2, 3, 0], jnp.int32))  # noqa: E731
        y, _ = intercept(fn, lambda place: (None, None))({"w": w}, x)
        np.testing.assert_allclose(y, fn({"w": w}, x), rtol=1e-14)
