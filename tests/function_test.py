"""Functions from any pytree and from Flax modules: names, sites, coverage, and what is refused."""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import zoo
import zoo_modules
from jax import lax
from jax.extend.core import Primitive
from jax.interpreters import mlir

import mojax
from mojax.errors import InputError
from mojax.kernels.matmul import matmul
from mojax.rules import Dims, Dot, Move
from mojax.trace import Site, graph
from mojax.trace import sites as traced
from mojax.view import follow

X = zoo.floats(5, 16)


@jax.tree_util.register_dataclass
@dataclasses.dataclass
class Linear:
    kernel: Any
    bias: Any


@jax.tree_util.register_dataclass
@dataclasses.dataclass
class Net:
    layers: list
    head: Linear


def net():
    def layer(i):
        return Linear(zoo.floats(16, 16, seed=i, scale=0.3), zoo.floats(16, seed=i))

    return Net([layer(1), layer(2)], layer(3))


def run(net, x):
    for layer in net.layers:
        x = jax.nn.relu(x @ layer.kernel + layer.bias[None])
    return {"logits": x @ net.head.kernel}


def test_any_pytree_has_names_and_comes_back():
    with pytest.raises(
        InputError, match=r"params: head.bias: never used by the function \(function_test.py:\d+\)"
    ):
        mojax.from_function(run, net(), X)
    model = mojax.from_function(run, net(), X, unused=True)
    assert list(model.params) == [
        *(f"layers.{i}.{leaf}" for i in range(2) for leaf in ("kernel", "bias")),
        "head.kernel",
        "head.bias",
    ]
    wanted = run(net(), X)["logits"]
    np.testing.assert_allclose(model(X)["logits"], wanted, rtol=1e-6, atol=1e-6)
    np.testing.assert_allclose(jax.jit(model)(X)["logits"], wanted, rtol=1e-6, atol=1e-6)
    twice = {**model.params, "head.kernel": 2 * model.params["head.kernel"]}
    np.testing.assert_allclose(model.apply(twice, X)["logits"], 2 * wanted, rtol=1e-5, atol=1e-5)
    assert mojax.coverage(model)["head.bias"] == "kept: never used"


def test_one_array_and_shapes_do():
    fn = lambda w, x: x @ w  # noqa: E731
    model = mojax.from_function(fn, jnp.ones((16, 4)), X)
    assert list(model.params) == ["params"]
    spec = jax.ShapeDtypeStruct((16, 4), jnp.float32)
    shapes = mojax.from_function(fn, spec, jax.ShapeDtypeStruct(X.shape, X.dtype))
    assert mojax.sites(shapes) == mojax.sites(model)
    with pytest.raises(InputError, match=r"params: is only a shape; call model.apply\(params"):
        shapes(X)
    assert shapes.apply({"params": jnp.ones((16, 4))}, X).shape == (5, 4)


@pytest.mark.parametrize("name", ["llama_scan", "moe_ragged", "conv_groups", "tied", "while_loop"])
def test_a_function_and_its_sites_are_those_of_the_program(name):
    p = zoo.program(name)
    model = mojax.from_function(p.fn, p.params, *p.args)
    assert mojax.sites(model) == traced(p.fn, p.params, *p.args)
    assert zoo.disagreements(p, mojax.sites(model)) == []
    for a, b in zip(jax.tree.leaves(model(*p.args)), jax.tree.leaves(p.fn(p.params, *p.args)), strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-6)


def test_coupled_axes_are_cut_together():
    p = zoo.program("silu_mlp")
    model = mojax.from_function(p.fn, p.params, *p.args)
    assert [list(group) for group in mojax.coupled_axes(model)] == [[("down", 0), ("up", 1)]]
    assert any("output" in group.frozen for group in mojax.coupled_axes(model, frozen=True))
    assert isinstance(graph(model.flat, model.specs, *model.example).ops, tuple)


def test_bad_parameters_are_named():
    def fn(p, x):
        return x @ p["w"]

    w = jnp.ones((16, 4))
    with pytest.raises(InputError, match=r"params: rate is float \(0.1\), not an array; .*equinox.partition"):
        mojax.from_function(fn, {"w": w, "rate": 0.1}, X)
    with pytest.raises(InputError, match="params: act is PjitFunction"):
        mojax.from_function(fn, {"w": w, "act": jnp.tanh}, X)
    with pytest.raises(InputError, match=r"two leaves are called a\.b"):
        mojax.from_function(fn, {"w": w, "a": {"b": w}, "a.b": w}, X)
    with pytest.raises(InputError, match=r"function_test.py:\d+: cannot be traced"):
        mojax.from_function(lambda p, x: x @ p["w"] if x.sum() > 0 else x, {"w": w}, X)
    model = mojax.from_function(fn, {"w": w}, X)
    with pytest.raises(InputError, match="w: is missing from params"):
        model.apply({}, X)
    for verb in (mojax.coverage, mojax.coupled_axes, mojax.sites):
        with pytest.raises(InputError, match=f"{verb.__name__}: found function"):
            verb(fn)


def test_a_primitive_of_the_users_own():
    times = Primitive("times_for_test")
    times.def_impl(lambda x, w: x @ w)
    times.def_abstract_eval(lambda x, w: x.update(shape=(x.shape[0], w.shape[1])))
    mlir.register_lowering(times, mlir.lower_fun(lambda x, w: x @ w, multiple_results=False))
    fn, p = lambda p, x: times.bind(x, p["w"]), {"w": zoo.floats(16, 8)}
    dims = lambda params, shapes, side: Dims((0,), (1,)) if side else None  # noqa: E731
    rule = Dot("dot", dims, kernel=lambda x, q, params: matmul(x, q, dtype=x.dtype))
    assert mojax.sites(mojax.from_function(fn, p, X)) == ()
    model = mojax.from_function(fn, p, X, rules={"times_for_test": rule})
    assert [s.weight for s in mojax.sites(model)] == ["w"]
    fake = mojax.fake_quant(model, "int8")
    assert 0 < np.abs(fake(X) - model(X)).max() < 0.1
    np.testing.assert_allclose(mojax.quantize(model, "int8")(X), fake(X), rtol=1e-5, atol=1e-5)
    rounded = mojax.quantize(model, "fp8_dynamic")(X)  # inputs are rounded before they meet that kernel
    np.testing.assert_allclose(rounded, mojax.fake_quant(model, "fp8_dynamic")(X), rtol=1e-5, atol=1e-5)
    without = mojax.from_function(fn, p, X, rules={"times_for_test": Dot("dot", dims)})
    with pytest.raises(
        mojax.PlanError, match=r"w: is packed .* meets times_for_test, whose rule has no kernel"
    ):
        mojax.quantize(without, "int8")


def test_rules_are_checked():
    def made(rules, x=X):
        return mojax.from_function(lambda p, x: x @ p["w"], {"w": jnp.ones((16, 4))}, x, rules=rules)

    cases = {
        "the function has no operation 'dot_genral'; did you mean 'dot_general'": {
            "dot_genral": Move(follow)
        },
        "dot_general is int, needed a Dot, Call or Move": {"dot_general": 3},
        "op is 'matmul', needed one of dot": {"dot_general": Dot("matmul", lambda p, s, side: None)},
        "dims returned tuple, needed Dims": {"dot_general": Dot("dot", lambda p, s, side: ((0,), (1,)))},
        r"axis 7 .*lacks|names an axis": {"dot_general": Dot("dot", lambda p, s, side: Dims((7,), (1,)))},
        r"axis 1 of \[16, 4\] and axis 1 of": {
            "dot_general": Dot("dot", lambda p, s, side: Dims((1,), (1,)))
        },
    }
    for message, rules in cases.items():
        with pytest.raises(InputError, match=message):
            mojax.sites(made(rules))
    assert made({"dot_general": Move(follow)}).sites == ()  # which knows nothing of a product


def test_sites_of_a_checkpoint_are_those_of_its_blocks():
    model = mojax.load("tiny")
    found = mojax.sites(model)
    first, second = (b.prefix for b in model.blocks[:2])
    names = [s.weight for s in found]
    assert f"{first}mlp.down_proj.weight" in names and f"{second}mlp.down_proj.weight" in names
    by_name: dict[str, Site] = {s.weight: s for s in found}
    q, k = (by_name[f"{second}self_attn.{n}_proj.weight"] for n in "qk")
    assert q.group == k.group != by_name[f"{first}self_attn.q_proj.weight"].group
    assert q.producer == f"{second}input_layernorm.weight"
    with pytest.raises(InputError, match="coverage: found Model, needed a Function"):
        mojax.coverage(model)


# Flax


@pytest.mark.parametrize("kind", ["nnx", "linen"])
def test_flax_modules_are_their_function(kind):
    pytest.importorskip("flax")
    module, p = getattr(zoo_modules, f"{kind}_model")()
    given = {} if kind == "nnx" else {"variables": {"params": zoo_modules.nested(p.params)}}
    model = mojax.from_flax(module, *p.args, **given)
    assert set(model.params) == set(p.params)
    assert zoo.disagreements(p, mojax.sites(model)) == []
    np.testing.assert_allclose(model(*p.args), p.fn(p.params, *p.args), rtol=1e-4, atol=1e-5)
    packed, fake = mojax.quantize(model, "int8"), mojax.fake_quant(model, "int8")
    np.testing.assert_allclose(packed(*p.args), fake(*p.args), rtol=1e-4, atol=1e-5)
    assert np.abs(packed(*p.args) - model(*p.args)).max() > 1e-4


def test_a_bound_linen_module_keeps_its_other_collections():
    linen = pytest.importorskip("flax.linen")

    class Normed(linen.Module):
        @linen.compact
        def __call__(self, x):
            return linen.BatchNorm(use_running_average=True)(linen.Dense(4)(x))

    module = Normed()
    variables = module.init(jax.random.key(0), X)
    variables = {**variables, "batch_stats": jax.tree.map(lambda s: s + 2.0, variables["batch_stats"])}
    model = mojax.from_flax(module.bind(variables), X)
    assert set(model.params) == {
        f"{m}.{n}"
        for m, n in [
            ("Dense_0", "kernel"),
            ("Dense_0", "bias"),
            ("BatchNorm_0", "scale"),
            ("BatchNorm_0", "bias"),
        ]
    }
    np.testing.assert_allclose(model(X), module.apply(variables, X), rtol=1e-5, atol=1e-5)
    with pytest.raises(InputError, match=r"Normed: a linen\.Module holds no parameters; call from_flax"):
        mojax.from_flax(module, X)
    with pytest.raises(InputError, match=r"Normed: variables hold \['batch_stats'\], needed"):
        mojax.from_flax(module, X, variables={"batch_stats": variables["batch_stats"]})
    with pytest.raises(InputError, match="Normed: cannot be called with this example"):
        mojax.from_flax(module, X, variables={"params": variables["params"]})
    with pytest.raises(InputError, match="from_flax: found dict"):
        mojax.from_flax({}, X)


def test_an_nnx_module_runs_in_its_mode_and_is_not_changed():
    nnx = pytest.importorskip("flax.nnx")

    class Net(nnx.Module):
        def __init__(self, rngs):
            self.layers = nnx.List([nnx.Linear(16, 16, rngs=rngs) for _ in range(2)])
            self.norm = nnx.BatchNorm(16, rngs=rngs)

        def __call__(self, x):
            for layer in self.layers:
                x = layer(x)
            return self.norm(x)

    module = Net(nnx.Rngs(0))
    model = mojax.from_flax(module, X)
    before = np.asarray(module.norm.mean[...])
    for _ in range(2):  # the first call wrote to no statistics
        np.testing.assert_allclose(model(X).mean(0), 0, atol=1e-5)
    np.testing.assert_array_equal(module.norm.mean[...], before)
    module.eval()
    still = mojax.from_flax(module, X)
    np.testing.assert_allclose(still(X), module(X), rtol=1e-5, atol=1e-5)
    assert "layers.1.kernel" in still.params and "norm.mean" not in still.params


def test_a_loop_over_layers_that_is_a_closure():
    w = zoo.floats(3, 16, 16, scale=0.3)
    model = mojax.from_function(lambda p, x: lax.scan(lambda x, w: (x @ w, None), x, p)[0], w, X)
    assert [(s.weight, s.contract, s.batch) for s in mojax.sites(model)] == [("params", (1,), (0,))]
