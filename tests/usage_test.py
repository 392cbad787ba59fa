"""What people do with functions: training loops, recipes as mappings, parameters as they have them."""

import dataclasses

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


def test_saved_parameters_run_in_a_new_process(tmp_path):
    """From shapes alone: without the weights in full precision."""

    def fn(p, x):
        return jnp.tanh(x @ p["up"]) @ p["down"]

    params = {"up": jnp.asarray(np.random.default_rng(1).standard_normal((32, 64)), jnp.float32)}
    params["down"] = params["up"].T
    model = mojax.from_function(fn, params, X)
    small = mojax.quantize(model, "nvfp4", mojax.calibrate(model, "nvfp4", [X]))
    mojax.save_params(tmp_path / "small.safetensors", small.params)
    shapes = mojax.from_function(fn, jax.eval_shape(lambda: params), jax.ShapeDtypeStruct(X.shape, X.dtype))
    target = mojax.quantize(shapes, "nvfp4")
    loaded = mojax.load_params(tmp_path / "small.safetensors")
    same = jax.tree.map(lambda a, b: (a.shape, a.dtype) == (b.shape, b.dtype), target.params, loaded)
    assert all(jax.tree.leaves(same))
    again = dataclasses.replace(target, params=loaded)
    np.testing.assert_array_equal(again(X), small(X))
    with pytest.raises(
        InputError, match="params: down is packed already; make the function from arrays or shapes"
    ):
        mojax.from_function(fn, loaded, X)


def test_what_a_module_is_always_called_with_is_not_traced():
    from flax import linen

    class Block(linen.Module):
        @linen.compact
        def __call__(self, x, train):
            return linen.Dense(8)(linen.Dropout(0.5, deterministic=not train)(x))

    module = Block()
    variables = module.init(jax.random.key(0), X, train=False)
    model = mojax.from_flax(module, X, variables=variables, train=False)
    np.testing.assert_array_equal(model(X), module.apply(variables, X, train=False))


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
@pytest.mark.parametrize("recipe", ["int8", "int4", "fp8_dynamic", "nvfp4_weight_only", "mxfp8"])
def test_one_nan_in_a_weight_or_an_input_is_seen(recipe, dtype):
    """XLA's maximum on a CPU loses a NaN among many float32 numbers."""
    w = jnp.ones((256, 64), dtype).at[3, 5].set(jnp.nan)
    model = mojax.from_function(lambda p, x: x @ p["w"], {"w": w}, jnp.ones((2, 256), dtype))
    with pytest.raises(InputError, match="w: holds NaN or infinity"):
        mojax.quantize(model, recipe)


def test_one_nan_in_an_input_is_seen():
    model = mojax.from_function(lambda p, x: x @ p["w"], {"w": jnp.ones((256, 64))}, jnp.ones((64, 256)))
    stats = mojax.calibrate(model, "fp8", [jnp.ones((64, 256)).at[9, 7].set(jnp.nan)])
    with pytest.raises(InputError, match="w: its inputs are not finite"):
        mojax.quantize(model, "fp8", stats)


def test_an_option_that_evaluate_has_not_is_refused():
    model = mojax.from_function(lambda p, x: x @ p["up"], {"up": jnp.ones((32, 16))}, X)
    with pytest.raises(InputError, match="has no option los; it has loss"):
        mojax.evaluate(model, model, [X], los=None)
