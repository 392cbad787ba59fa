"""Smoothing inside a function: its producers, static scales after it, and training after it."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.experimental import pallas

import mojax
from mojax.document import Rule
from mojax.errors import InputError
from mojax.interpret import intercept
from mojax.recipe import load_recipe

RNG = np.random.default_rng(0)
X = jnp.asarray(RNG.standard_normal((5, 16)), jnp.float32).at[:, 3].mul(50)
FP8 = {"format": "fp8", "per": "tensor"}
STEPS = (("smoothquant", {"alpha": 0.8}), ("rtn", {}))
SMOOTH = dataclasses.replace(load_recipe("int8"), rules=(Rule("*", weights=FP8, inputs=FP8),), steps=STEPS)


def weight(*shape):
    return jnp.asarray(0.4 * RNG.standard_normal(shape), jnp.float32)


def mlp(p, x):
    return jnp.tanh((x * p["g"]) @ p["a"]) @ p["b"]


def smoothed():
    model = mojax.from_function(mlp, {"g": 1 + weight(1, 16), "a": weight(16, 16), "b": weight(16, 16)}, X)
    return model, mojax.calibrate(model, SMOOTH, [X])


def test_static_scales_are_those_of_smoothed_inputs():
    model, stats = smoothed()
    packed, fake = mojax.quantize(model, SMOOTH, stats), mojax.fake_quant(model, SMOOTH, stats)
    look = intercept(mlp, lambda place: (None, jnp.max(jnp.abs(place.x))))
    taps = look({n: fake.params[n] for n in model.names}, X)[1]
    np.testing.assert_allclose(packed.params["a.input_scale"], taps["a"], rtol=1e-5)
    np.testing.assert_allclose(fake(X), packed(X), rtol=1e-3, atol=1e-3)


def test_a_trained_function_is_not_smoothed_again():
    model, stats = smoothed()
    fake = mojax.fake_quant(model, SMOOTH, stats)
    packed = mojax.quantize(fake, SMOOTH)
    np.testing.assert_array_equal(packed.params["g"], fake.params["g"])
    np.testing.assert_allclose(fake(X), packed(X), rtol=1e-3, atol=1e-3)


def test_names_that_differ_in_weight_alone_are_not_mixed_up():
    def fn(p, x):
        return (x * p["g"]) @ p["w"] + p["g.weight"]

    leaves = {"w": weight(16, 16), "g": 1 + weight(1, 16), "g.weight": weight(1, 16)}
    model = mojax.from_function(fn, leaves, X)
    packed = mojax.quantize(model, "int8_smoothquant", mojax.calibrate(model, "int8_smoothquant", [X]))
    np.testing.assert_array_equal(packed.params["g.weight"], leaves["g.weight"])
    assert float(jnp.max(jnp.abs(packed.params["g"] - leaves["g"]))) > 0.1
    np.testing.assert_allclose(packed(X), fn(leaves, X), rtol=0.05, atol=0.5)


def test_an_integer_gain_stays():
    gain = jnp.arange(1, 17, dtype=jnp.int32)[None]
    model = mojax.from_function(
        lambda p, x: (x * p["g"].astype(jnp.float32)) @ p["w"], {"w": weight(16, 16), "g": gain}, X
    )
    packed = mojax.quantize(model, "int8_smoothquant", mojax.calibrate(model, "int8_smoothquant", [X]))
    np.testing.assert_array_equal(packed.params["g"], gain)


def test_a_kernel_of_pallas_is_named_and_no_side_effect():
    def kernel(x, w, out):
        out[...] = x[...] @ w[...]

    def fn(p, x):
        spec = jax.ShapeDtypeStruct((5, 16), jnp.float32)
        return pallas.pallas_call(kernel, out_shape=spec, interpret=True)(x, p["w"]) @ p["v"]

    model = mojax.from_function(fn, {"w": weight(16, 16), "v": weight(16, 16)}, X)
    assert mojax.coverage(model)["w"].startswith("unreachable: inside pallas_call at smoothing_test.py:")
    assert mojax.coverage(model)["v"] == "site"


def test_an_argument_that_is_no_array_is_named():
    with pytest.raises(InputError, match=r"argument 2 of the example holds str \('mean'\)"):
        mojax.from_function(lambda p, x, how: x @ p["w"], {"w": weight(16, 16)}, X, "mean")


def scanned(p, x):
    def layer(c, row):
        h = (c * jax.lax.rsqrt(jnp.mean(c * c, -1, keepdims=True))) * row["g"][None] + row["b"][None]
        return c + jnp.tanh(h @ row["a"]) @ row["c"], None

    return jax.lax.scan(layer, x, p)[0]


def test_layers_of_a_scan_are_smoothed_one_by_one_and_biases_with_their_gains():
    p = {"g": 1 + weight(3, 16), "b": weight(3, 16), "a": weight(3, 16, 16), "c": weight(3, 16, 16)}
    p["g"] = p["g"].at[1, 5].mul(40)
    model = mojax.from_function(scanned, p, X)
    (site,) = (s for s in mojax.sites(model) if s.weight == "a")
    assert (site.producer, site.also, site.batch) == ("g", ("b",), (0,))
    stats = mojax.calibrate(model, SMOOTH, [X])
    fake = mojax.fake_quant(model, SMOOTH, stats)
    moved = {n: fake.params[n] for n in model.names}
    assert np.abs(moved["g"] / p["g"] - 1).max() > 0.1 and np.abs(moved["b"] / p["b"] - 1).max() > 0.1
    np.testing.assert_allclose(model.flat(moved, X), model(X), rtol=1e-3, atol=1e-3)
    ratio = np.asarray(moved["g"] / p["g"])
    assert np.abs(ratio[0] - ratio[1]).max() > 0.1  # scales of their own
    look = intercept(scanned, lambda place: (None, jnp.max(jnp.abs(place.x))))
    np.testing.assert_allclose(fake.maxima["a"], look(moved, X)[1]["a"], rtol=1e-3)
