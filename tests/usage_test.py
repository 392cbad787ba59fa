"""What people do with functions: training loops, recipes as mappings, parameters as they have them."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import mojax
from mojax.errors import InputError

X = jnp.asarray(np.random.default_rng(0).standard_normal((8, 32)), jnp.float32)


def test_what_a_training_loop_gets_is_what_it_gave():
    """Calibrated maxima are no parameters, so that weight decay cannot change them; quantize knows them."""
    model = mojax.from_function(lambda p, x: x @ p["mlp"]["up"], {"mlp": {"up": jnp.ones((32, 16))}}, X)
    stats = mojax.calibrate(model, "nvfp4", [X])
    student = mojax.fake_quant(model, "nvfp4", stats)
    assert list(student.params) == ["mlp.up"]
    np.testing.assert_array_equal(student.maxima["mlp.up"], jnp.abs(X).max())
    packed, straight = mojax.quantize(student, "nvfp4"), mojax.quantize(model, "nvfp4", stats)
    np.testing.assert_array_equal(packed(X), straight(X))
    assert repr(packed.params["mlp.up"]) == "QTensor(nvfp4, [32, 16])"


def test_parameters_are_taken_as_the_user_has_them():
    tree = {"mlp": {"up": jnp.ones((32, 16)), "bias": jnp.ones(16)}}
    model = mojax.from_function(lambda p, x: x @ p["mlp"]["up"] + p["mlp"]["bias"][None], tree, X)
    np.testing.assert_array_equal(model.apply(tree, X), model.apply(model.params, X))
    assert jax.tree.structure(model.nested(model.params)) == jax.tree.structure(tree)


def test_a_recipe_can_be_a_mapping_and_what_is_kept_one_glob():
    tree = {"up": jnp.ones((32, 16)), "down": jnp.ones((16, 32))}
    model = mojax.from_function(lambda p, x: x @ p["up"] @ p["down"], tree, X)
    recipe = {"extends": "int8", "rules": [{"match": "up", "weights": {"format": "int4", "group": 16}}]}
    small = mojax.quantize(model, recipe | {"rules": [recipe["rules"][0] | {"inputs": "none"}]}, keep="down")
    assert {n: s.label for n, s in small.schemes.items()} == {"up": "int4 group=16, inputs as they are"}
    with pytest.raises(InputError, match="recipe: rule: unknown key; did you mean 'rules'"):
        mojax.quantize(model, {"rule": []})


def test_one_array_is_not_a_list_of_batches():
    model = mojax.from_function(lambda p, x: x @ p["up"], {"up": jnp.ones((32, 16))}, X)
    for verb in (lambda: mojax.calibrate(model, "nvfp4", X), lambda: mojax.evaluate(model, model, X)):
        with pytest.raises(
            InputError, match=r"batches: found one array \[.*\]; give a list of batches, \[x\]"
        ):
            verb()
