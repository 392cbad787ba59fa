"""Compressing functions: what is rounded, packed, kept, gradients and statistics, on the zoo's programs."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import zoo
from jax import lax

import mojax
from mojax.document import Rule
from mojax.errors import InputError, NotFiniteError, PlanError
from mojax.formats.base import QTensor, encode_leaf
from mojax.formats.fp8 import FORMAT as FP8
from mojax.formats.int4 import FORMAT as INT4
from mojax.formats.int8 import FORMAT as INT8
from mojax.kernels.base import decoded
from mojax.recipe import load_recipe

PROGRAMS = {p.name: p for p in zoo.programs()}
FAST = {"xla_backend_optimization_level": 0, "xla_llvm_disable_expensive_passes": True}


def recipe(*rules, steps=(("rtn", {}),)):
    """A recipe of a user's rules: (match, weights, inputs)."""
    made = tuple(Rule(match, weights=w, inputs=x) for match, w, x in rules)
    return dataclasses.replace(load_recipe("int8"), rules=made, steps=tuple(steps))


def everything(weights, inputs=None):
    return recipe(("*", weights, inputs))


INT8_WEIGHTS = everything({"format": "int8"})
INT4_BLOCKS = everything({"format": "int4", "group": 4}, {"format": "int8", "per": "token"})
STATIC = everything({"format": "int8"}, {"format": "fp8", "per": "tensor"})


def model_of(name):
    p = PROGRAMS[name]
    return mojax.from_function(p.fn, p.params, *p.args, unused=True)


def close(a, b, tolerance):
    for x, y in zip(jax.tree.leaves(a), jax.tree.leaves(b), strict=True):
        x, y = (np.asarray(v, np.float64) for v in (x, y))
        assert np.abs(x - y).max() <= tolerance * np.abs(y).max()


# The same function, rounded by hand, packed, unpacked

SEEN = """
matmul weight_times_column o_proj_reversed q_proj_heads_first block_diagonal chain qkv_weight_split
gate_up_split cast static_index used_twice untied one_hot_lookup lora_dots buffers checkpoint
custom_vjp custom_jvp nested_scan scan_layers_remat scan_layers_reverse scan_shared fori_indexed
while_loop switch vmap_both vmap_of_vmap vmap_mlp vmap_last_axis llama llama_scan mamba_scan
lstm moe_einsum moe_ragged conv conv_depthwise conv_transpose
""".split()


@pytest.mark.parametrize("name", SEEN)
def test_fake_packed_and_by_hand_are_one_function(name):
    p, model = PROGRAMS[name], model_of(name)
    fake, packed = mojax.fake_quant(model, INT8_WEIGHTS), mojax.quantize(model, INT8_WEIGHTS)
    assert set(fake.schemes) == {n for n, leaf in packed.params.items() if isinstance(leaf, QTensor)}
    by_hand = {
        n: decoded(encode_leaf(INT8(), p.params[n], *fake.layouts[n])) if n in fake.schemes else p.params[n]
        for n in p.params
    }

    @functools.partial(jax.jit, compiler_options=FAST)
    def run(params, codes, plain, args):
        dense = mojax.dequantize(packed).apply(plain, *args)
        outputs = model.apply(params, *args), fake.apply(params, *args), packed.apply(codes, *args)
        return (*outputs, dense, model.apply(by_hand, *args), p.fn(params, *args))

    plain = mojax.dequantize(packed).params
    same, faked, ran, dense, hand, original = run(p.params, packed.params, plain, p.args)
    close(same, original, 1e-6)
    close(faked, hand, 1e-6)
    # A product in bfloat16 is one in float32 when it is packed.
    close(ran, dense, 1e-2 if name == "cast" else 1e-5)
    close(dense, hand, 1e-5)
    assert any(
        np.any(np.asarray(a) != b) for a, b in zip(*map(jax.tree.leaves, (faked, original)), strict=True)
    )


@pytest.mark.parametrize("name", ["block_diagonal", "scan_layers_remat", "moe_ragged", "conv_transpose"])
def test_inputs_are_rounded_alike_packed_and_unpacked(name):
    p, model = PROGRAMS[name], model_of(name)
    packed = mojax.quantize(model, INT4_BLOCKS)
    dense = mojax.dequantize(packed)
    close(packed(*p.args), dense(*p.args), 1e-5)
    close(mojax.fake_quant(model, INT4_BLOCKS)(*p.args), dense(*p.args), 1e-5)
    only_weights = dataclasses.replace(dense, schemes={})
    assert np.abs(np.asarray(only_weights(*p.args)) - np.asarray(dense(*p.args))).max() > 1e-4


def test_blocks_of_inputs_run_along_all_contracted_axes():
    p, model = PROGRAMS["o_proj_reversed"], model_of("o_proj_reversed")  # w [out, head size, heads]
    packed = mojax.quantize(model, everything(*[{"format": "int4", "group": 4}] * 2))
    x = p.args[0].reshape(zoo.TOKENS, zoo.HEADS, -1).swapaxes(1, 2).reshape(zoo.TOKENS, -1)
    w = INT4(group=4).decode(INT4(group=4).encode(p.params["w"].reshape(zoo.INNER, -1)))
    fake = packed.schemes["w"].inputs.fake(x)
    close(packed(*p.args), fake @ w.T, 1e-5)


# Gradients


def mlp(p, x):
    return jnp.tanh(x @ p["a"]) @ p["b"].T


def by_hand(format, x, w, axis):
    """A weight and an input rounded, with straight-through gradients."""

    def through(v, rounded):
        return v + lax.stop_gradient(rounded - v)

    q = decoded(encode_leaf(format, w, (axis,), ()))
    return through(x, INT8(per="token").fake(x)), through(w, q)


def mlp_by_hand(p, x):
    x, a = by_hand(INT4(group=4), x, p["a"], 0)
    h, b = by_hand(INT4(group=4), jnp.tanh(x @ a), p["b"], 1)
    return h @ b.T


def scanned(p, x):
    return lax.scan(jax.checkpoint(lambda x, w: (jnp.tanh(x @ w), None)), x, p["w"])[0]


def scanned_by_hand(p, x):
    for w in p["w"]:
        x, w = by_hand(INT4(group=4), x, w, 0)
        x = jnp.tanh(x @ w)
    return x


@pytest.mark.parametrize(
    "fn, hand, shapes",
    [
        (mlp, mlp_by_hand, {"a": (16, 24), "b": (8, 24)}),
        (scanned, scanned_by_hand, {"w": (3, 16, 16)}),
    ],
)
def test_gradients_are_straight_through(fn, hand, shapes):
    p = {n: zoo.floats(*s, seed=i, scale=0.4) for i, (n, s) in enumerate(shapes.items())}
    x = zoo.floats(5, 16, seed=9)
    fake = mojax.fake_quant(mojax.from_function(fn, p, x), INT4_BLOCKS)
    loss = lambda f: jax.jit(jax.value_and_grad(lambda p, x: (f(p, x) ** 2).sum(), (0, 1)))  # noqa: E731
    (value, grads), (wanted, by_hand) = loss(fake.apply)(p, x), loss(hand)(p, x)
    close(value, wanted, 1e-5)
    close(grads, by_hand, 2e-5)
    packed = mojax.quantize(mojax.from_function(fn, p, x), INT4_BLOCKS)
    close(jax.jit(jax.grad(lambda x: (packed(x) ** 2).sum()))(x), by_hand[1], 2e-5)
    exact = loss(fn)(p, x)[1]
    assert all(np.abs(a - b).max() > 1e-3 for a, b in zip(*map(jax.tree.leaves, (grads, exact)), strict=True))


def test_layers_of_a_scan_multiply_codes_under_static_scales_of_their_own():
    p, x = {"w": zoo.floats(3, 16, 16, scale=0.4)}, zoo.floats(5, 16, seed=9)
    model = mojax.from_function(scanned, p, x)
    static = everything({"format": "int8"}, {"format": "int8", "per": "tensor"})
    stats = mojax.calibrate(model, static, [x])
    packed, fake = (make(model, static, stats=stats) for make in (mojax.quantize, mojax.fake_quant))
    close(packed(x), fake(x), 1e-5)
    (product,) = (line for line in str(jax.make_jaxpr(packed)(x)).splitlines() if " dot_general[" in line)
    assert product.strip().split(":")[1].startswith("i32")


def test_rematerialised_layers_stay_so_and_train():
    p, model = PROGRAMS["scan_layers_remat"], model_of("scan_layers_remat")
    fake = mojax.fake_quant(model, INT4_BLOCKS)

    def loss(params):
        return (fake.apply(params, *p.args) ** 2).mean()

    assert "prevent_cse" in str(jax.make_jaxpr(fake.apply)(fake.params, *p.args))
    step = jax.jit(jax.value_and_grad(loss))
    first, grads = step(fake.params)
    assert all(np.isfinite(g).all() and np.any(np.asarray(g)) for g in grads.values())
    params = jax.tree.map(lambda w, g: w - 0.05 * g, dict(fake.params), dict(grads))
    assert step(params)[0] < first
    trained = mojax.quantize(dataclasses.replace(fake, params=params), INT4_BLOCKS)
    close(trained(*p.args), fake.apply(params, *p.args), 1e-5)


# Statistics


def test_statistics_of_layers():
    p, model = PROGRAMS["scan_layers"], model_of("scan_layers")
    stats = mojax.calibrate(model, STATIC, [p.args[0], (2 * p.args[0],)])
    seen = []
    for x in (p.args[0], 2 * p.args[0]):
        for i in range(3):
            w = {n: v[i] for n, v in p.params.items()}
            h = x * lax.rsqrt((x * x).mean(-1, keepdims=True) + 1e-6) * w["norm"][None]
            y = jax.nn.silu(h @ w["gate"]) * (h @ w["up"])
            seen.append((np.abs(h).max(0), np.abs(y).max(0)))
            x = x + y @ w["down"]
    for i in range(3):
        for name, k in (("gate", 0), ("up", 0), ("down", 1)):
            both = np.maximum(seen[i][k], seen[3 + i][k])
            np.testing.assert_allclose(stats[name]["absmax"][i], both, rtol=1e-5)


def test_every_layer_has_its_own_static_scale():
    p = {"w": zoo.floats(3, 16, 16, scale=1.5)}
    x = zoo.floats(5, 16)
    fn = lambda p, x: lax.scan(lambda x, w: (5 * (x @ w), None), x, p["w"])[0]  # noqa: E731
    model = mojax.from_function(fn, p, x)
    stats = mojax.calibrate(model, STATIC, [x])
    packed = mojax.quantize(model, STATIC, stats)
    tops = packed.params["w.input_scale"]
    assert tops.shape == (3,) and tops[2] > 10 * tops[0]
    format = FP8(per="tensor")
    y = x
    for i in range(3):
        w = decoded(encode_leaf(INT8(), p["w"][i], (0,)))
        y = 5 * (format.fake(y, format.outer(tops[i], y.dtype)) @ w)
    close(packed(x), y, 1e-5)
    close(mojax.fake_quant(model, STATIC, stats)(x), y, 1e-5)


def test_statistics_and_static_scales_of_experts():
    experts, rows = 4, 6
    p = {"w": zoo.floats(experts, 16, 24)}
    x, sizes = zoo.floats(rows, 16) * jnp.arange(1.0, 7.0)[:, None], jnp.asarray([2, 0, 3, 1], jnp.int32)
    fn = lambda p, x, n: lax.ragged_dot(x, p["w"], n)  # noqa: E731
    model = mojax.from_function(fn, p, x, sizes)
    stats = mojax.calibrate(model, STATIC, [(x, sizes)])["w"]
    rows = [x[0:2], x[2:2], x[2:5], x[5:6]]
    for i, mine in enumerate(rows):
        np.testing.assert_array_equal(stats["absmax"][i], np.abs(mine).max(0, initial=0))
    packed = mojax.quantize(model, STATIC, {"w": stats})
    tops, format = packed.params["w.input_scale"], FP8(per="tensor")
    np.testing.assert_allclose(tops, [np.abs(rows[i]).max() for i in (0, 2, 2, 3)])  # the unseen: of all
    w = decoded(encode_leaf(INT8(), p["w"], (1,), (0,)))
    pairs = [(r, format.outer(t, r.dtype), v) for r, t, v in zip(rows, tops, w, strict=True) if len(r)]
    fake = [format.fake(r, outer) @ v for r, outer, v in pairs]
    close(packed(x, sizes), jnp.concatenate(fake), 1e-5)


def test_statistics_of_a_batched_product():
    p, model = PROGRAMS["block_diagonal"], model_of("block_diagonal")
    stats = mojax.calibrate(model, STATIC, [p.args])["w"]
    x = np.asarray(p.args[0]).reshape(zoo.TOKENS, zoo.HEADS, -1)
    np.testing.assert_array_equal(stats["absmax"], np.abs(x).max(0))
    packed = mojax.quantize(model, STATIC, {"w": stats})
    tops, format = packed.params["w.input_scale"], FP8(per="tensor")
    w = decoded(encode_leaf(INT8(), p.params["w"], (1,), (0,)))
    fake = [
        format.fake(x[:, h], format.outer(tops[h], np.dtype(np.float32))) @ w[h] for h in range(zoo.HEADS)
    ]
    close(packed(*p.args), np.stack(fake, 1), 1e-5)


def test_statistics_of_two_places_and_of_rows_out_of_sight_are_joined():
    p, model = PROGRAMS["used_twice"], model_of("used_twice")
    h = np.tanh(p.args[0] @ p.params["w"])
    stats = mojax.calibrate(model, STATIC, [p.args])
    both = np.maximum(np.abs(p.args[0]).max(0), np.abs(h).max(0))
    np.testing.assert_allclose(stats["w"]["absmax"], both, rtol=1e-6)
    hidden = model_of("fori_indexed_last")
    absmax = mojax.calibrate(hidden, STATIC, [PROGRAMS["fori_indexed_last"].args])["w"]["absmax"]
    assert absmax.shape == (3, 16) and (absmax == absmax[0]).all()


def test_smoothing_moves_scales_and_not_the_function():
    p, model = PROGRAMS["chain"], model_of("chain")
    x = p.args[0] * jnp.where(jnp.arange(16) == 3, 50.0, 1.0)[None]
    int8 = ("*", {"format": "int8"}, {"format": "int8", "per": "token"})
    smooth = recipe(int8, steps=[("smoothquant", {}), ("rtn", {})])
    stats = mojax.calibrate(model, smooth, [x])
    fake = mojax.fake_quant(model, smooth, stats)
    close(model.apply(fake.params, x), model(x), 1e-5)
    assert np.abs(fake.params["b"] / p.params["b"] - 1).max() > 0.1
    with pytest.raises(PlanError, match="a: the recipe's steps need absmax"):
        mojax.quantize(model, smooth)


# What is kept, and what is refused


def test_every_leaf_is_accounted_for():
    found = mojax.coverage(mojax.quantize(model_of("gemma"), INT8_WEIGHTS, keep=["q", "k*"]))
    assert found["v"] == "site: int8, inputs as they are"
    assert found["q"] == "kept: rule q"
    assert found["table"].startswith("kept: tied: looked up as well at zoo_blocks.py:")
    assert found["ln1"].startswith("kept: one axis only")
    moe = mojax.fake_quant(model_of("moe_vmap"), INT8_WEIGHTS)
    assert mojax.coverage(moe)["router"] == "kept: router"


@pytest.mark.parametrize(
    "name, why",
    [
        ("used_twice_transposed", r"w: summed over different axes: \[0\] at zoo.py:\d+ and \[1\] at"),
        ("contracted_halves", "w: its channels are read in parts"),
        ("vector", "w: one axis only"),
        ("tied", "table: tied: looked up as well at zoo.py"),
        ("lora_arithmetic", r"a: unreachable: dot at zoo.py:\d+ before dot at"),
    ],
)
def test_what_is_kept_by_default_says_why(name, why):
    with pytest.raises(PlanError, match=r"nothing would be quantized \(" + why):
        mojax.quantize(model_of(name), INT8_WEIGHTS)


def test_a_full_name_overrides_what_is_kept_by_default():
    p, model = PROGRAMS["tied"], model_of("tied")
    named = recipe(("table", {"format": "int8"}, None))
    packed = mojax.quantize(model, named)
    close(packed(*p.args), mojax.dequantize(packed)(*p.args), 1e-5)
    for match in ("*", "tab*", "*.weight"):
        with pytest.raises(PlanError, match="nothing would be quantized"):
            mojax.quantize(model, recipe((match, {"format": "int8"}, None)))


def test_rules_match_names_with_and_without_weight():
    model = mojax.from_function(
        lambda p, x: x @ p["a"]["weight"].T + x @ p["b"],
        {"a": {"weight": zoo.floats(8, 16)}, "b": zoo.floats(16, 8)},
        zoo.floats(5, 16),
    )
    rules = [("*.weight", {"format": "int8"}, None), ("b.weight", {"format": "int4", "group": 4}, None)]
    made = mojax.quantize(model, recipe(*rules))
    assert {n: s.weights.label for n, s in made.schemes.items()} == {"a.weight": "int8", "b": "int4 group=4"}


def test_all_problems_come_together():
    p = {"a": zoo.floats(15, 6), "b": zoo.floats(6, 7), "c": zoo.floats(7, 8)}
    model = mojax.from_function(lambda p, x: x @ p["a"] @ p["b"] @ p["c"], p, zoo.floats(3, 15))
    rules = [
        ("*", {"format": "int4", "group": 4}, None),
        ("c", {"format": "int8"}, {"format": "fp8", "per": "tensor"}),
        ("d", "keep", None),
    ]
    with pytest.raises(PlanError) as error:
        mojax.quantize(model, recipe(*rules))
    assert [m.split(",")[0] for m in error.value.problems] == [
        "a: seen as [out",
        "b: seen as [out",
        "d: this rule matches no leaf; known: a",
        "c: its inputs need a static scale; pass stats=mojax.calibrate(model",
    ]
    blocks = recipe(("*", {"format": "int8"}, {"format": "mxfp8"}))
    with pytest.raises(PlanError, match=r"a: its inputs: .*15 is not divisible by 32"):
        mojax.quantize(model, blocks)


def test_what_cannot_be_packed_or_run_is_said():
    p, model = PROGRAMS["returned"], model_of("returned")
    with pytest.raises(PlanError, match=r"nothing would be quantized \(w: also used through mul at zoo.py"):
        mojax.quantize(model, INT8_WEIGHTS)
    with pytest.raises(PlanError, match=r"w: is packed \(int8\) and meets mul at zoo.py:\d+, .*keep=\['w'\]"):
        mojax.quantize(model, recipe(("w", {"format": "int8"}, "none")))
    packed = mojax.quantize(model_of("matmul"), INT8_WEIGHTS)
    with pytest.raises(InputError, match="w: is packed already"):
        mojax.quantize(packed, INT8_WEIGHTS)
    m = PROGRAMS["matmul"]
    shapes = mojax.from_function(m.fn, jax.eval_shape(lambda: m.params), *m.args)
    with pytest.raises(InputError, match="w: is only a shape"):
        mojax.calibrate(shapes, STATIC, [m.args])
    with pytest.raises(InputError, match="quantize: found function, needed a Function"):
        mojax.quantize(p.fn, INT8_WEIGHTS)
    model = model_of("matmul")
    with pytest.raises(InputError, match="batches: there are none"):
        mojax.calibrate(model, STATIC, [])
    broken = dataclasses.replace(model, params={"w": model.params["w"].at[0, 0].set(jnp.nan)})
    with pytest.raises(NotFiniteError, match=r"^w: holds NaN or infinity; repair it, or pass keep=\[.w.\]"):
        mojax.quantize(broken, INT8_WEIGHTS)
    ints = {"w": jnp.ones((16, 4), jnp.int32)}
    odd = mojax.from_function(lambda p, x: x @ p["w"].astype(jnp.float32), ints, *p.args)
    with pytest.raises(PlanError, match="w: is int32, only float leaves"):
        mojax.quantize(odd, INT8_WEIGHTS)


# Evaluation


def test_evaluation_of_a_function():
    p, model = PROGRAMS["matmul"], model_of("matmul")
    packed = mojax.quantize(model, INT8_WEIGHTS)
    loss = lambda y, x: (y**2).mean()  # noqa: E731
    report = mojax.evaluate(packed, model, [p.args, (2 * p.args[0],)], loss)
    y, z = (np.asarray(f(*p.args), np.float64) for f in (model, packed))
    assert report.rel_error == pytest.approx(np.linalg.norm(y - z) / np.linalg.norm(y), rel=1e-4)
    assert report.loss == pytest.approx(2.5 * (z**2).mean(), rel=1e-4)
    assert report.loss_reference == pytest.approx(2.5 * (y**2).mean(), rel=1e-4)
    q = packed.params["w"]
    assert report.bits_per_weight == 8 * q.nbytes / p.params["w"].size
    w = np.asarray(p.params["w"], np.float64)
    error = np.linalg.norm(decoded(q) - w) / np.linalg.norm(w)
    assert report.worst == ({"tensor": "w", "rel_error": pytest.approx(error, abs=1e-6)},)
    assert mojax.evaluate(model, model, p.args).rel_error == 0
    with pytest.raises(InputError, match="batches"):
        mojax.evaluate(packed, model, [])


def test_sharded_parameters_run_and_are_quantized():
    mesh = jax.make_mesh((1,), ("d",), axis_types=(jax.sharding.AxisType.Auto,))
    there = jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec("d"))
    p = PROGRAMS["scan_layers_remat"]
    params = {n: jax.device_put(w, there) for n, w in p.params.items()}
    model = mojax.from_function(p.fn, params, *p.args)
    close(mojax.quantize(model, INT8_WEIGHTS)(*p.args), mojax.fake_quant(model, INT8_WEIGHTS)(*p.args), 1e-5)
