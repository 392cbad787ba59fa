"""AWQ and SmoothQuant: the function stays, the objective falls, planted outliers are undone."""

import dataclasses
import functools

import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest

import mojax
from mojax import pipeline
from mojax.document import Rule
from mojax.errors import InputError
from mojax.formats.base import Scheme
from mojax.formats.fp8 import FP8
from mojax.formats.int4 import INT4
from mojax.formats.nvfp4 import NVFP4
from mojax.recipe import load_recipe
from mojax.transforms.awq import Reader, awq, candidates, errors, solve
from mojax.transforms.base import Context, Fold, folds
from mojax.transforms.smoothquant import smoothquant

RNG = np.random.default_rng(0)
QKV, OUTPUT = ("q_proj", "k_proj", "v_proj"), "self_attn.o_proj.weight"


@functools.cache
def tiny():
    return mojax.load("tiny")


@functools.cache
def tokens(purpose):
    model, recipe = tiny(), load_recipe("nvfp4")
    found = pipeline.read_text(model, None, recipe, "builtin", purpose)
    return np.asarray(found.ids)[:8, :128]


def recipe(*steps, **rule):
    rule = {"weights": {"format": "nvfp4"}, "inputs": {"format": "nvfp4"}} | rule
    rules = (Rule("*", **rule),)
    return dataclasses.replace(load_recipe("nvfp4"), rules=rules, steps=tuple((n, o) for n, o in steps))


@functools.cache
def block():
    """A block with planted outliers in float32, what AWQ makes of it, and its outcomes."""
    model = planted(tiny())
    plan = mojax.plan(model, recipe(("awq", {}), ("rtn", {})))
    stats = mojax.calibrate(model, plan, tokens("calibration")[:4])
    first = model.blocks[0]
    params = {n: jnp.asarray(w, jnp.float32) for n, w in model.params.items() if n.startswith(first.prefix)}
    outcomes = []
    context = plan.context(first)._replace(log=outcomes.append)
    moved = params | dict(awq().apply(params, stats, context))
    return first, params, moved, context, stats, outcomes


def run(params):
    model, first = tiny(), block()[0]
    x = jnp.asarray(np.random.default_rng(1).standard_normal((2, 9, model.hyper.hidden_size)), jnp.float32)
    local = {n.removeprefix(first.prefix): w for n, w in params.items() if not n.endswith(".input_scale")}
    family = model.family
    return np.asarray(family.block(model.hyper, first.kind, local, x, jnp.arange(x.shape[1])))


def ratio(name):
    first, params, moved, *_ = block()
    a, b = params[first.prefix + name], moved[first.prefix + name]
    return np.asarray(jnp.sum(b * a, 0) / jnp.sum(a * a, 0))


def test_the_function_of_a_block_stays():
    _, params, moved, *_ = block()
    before, after = run(params), run(moved)
    assert np.abs(after - before).max() < 1e-5 * np.abs(before).max()


def test_every_input_of_a_llama_block_is_scaled_and_none_gets_worse():
    first, *_, context, _, outcomes = block()
    assert {f.producer.removeprefix(first.prefix) for f in folds(context, "all")} == {
        "input_layernorm.weight",
        "self_attn.v_proj.weight",
        "post_attention_layernorm.weight",
        "mlp.up_proj.weight",
    }
    assert [o.weight.removeprefix(first.prefix) for o in outcomes] == [
        "self_attn.q_proj.weight",
        OUTPUT,
        "mlp.gate_proj.weight",
        "mlp.down_proj.weight",
    ]
    assert all(0 < o.after <= o.before for o in outcomes)
    assert sum(o.after < 0.99 * o.before for o in outcomes) >= 2


def test_weights_that_read_the_same_input_have_the_same_scales():
    q, k = (ratio(f"self_attn.{n}.weight") for n in QKV[:2])  # v has its rows scaled as well
    gate = ratio("mlp.gate_proj.weight")
    assert np.abs(q - 1).max() > 1 and np.abs(gate - 1).max() > 1
    np.testing.assert_allclose(q, k, rtol=1e-4)
    first, params, moved, *_ = block()
    up = first.prefix + "mlp.up_proj.weight"  # so has this one: any row shows the columns' scales
    row = int(jnp.argmax(jnp.min(jnp.abs(params[up]), axis=1)))
    shown = np.asarray(moved[up][row] / params[up][row])
    np.testing.assert_allclose(shown / shown[0], gate / gate[0], rtol=1e-4)


def test_query_heads_that_share_values_share_their_scales():
    c = tiny().hyper
    s = ratio(OUTPUT).reshape(c.num_key_value_heads, -1, c.head_dim)
    assert s.shape[1] > 1 and np.abs(s - 1).max() > 0.01
    np.testing.assert_allclose(s, np.broadcast_to(s[:, :1], s.shape), rtol=1e-4)


def test_sites_choose_what_is_scaled():
    *_, context, _, _ = block()
    producers = {n: {f.producer.split(".", 3)[3] for f in folds(context, n)} for n in ("norms", "mlp", "all")}
    assert producers["mlp"] - producers["norms"] == {"mlp.up_proj.weight"}
    assert producers["all"] - producers["mlp"] == {"self_attn.v_proj.weight"}
    with pytest.raises(InputError, match="smoothquant: sites: 'nroms' is not possible; did you mean 'norms'"):
        smoothquant(sites="nroms")


def test_values_do_not_move_under_the_scales_of_their_cache():
    made = dataclasses.replace(recipe(("rtn", {})), rules=(*recipe().rules, Rule("*", kv_cache="fp8")))
    context = mojax.plan(tiny(), made).context(tiny().blocks[0])
    assert not any("v_proj" in f.producer for f in folds(context, "all"))
    assert any("up_proj" in f.producer for f in folds(context, "all"))


def test_candidates_have_mean_one_and_leave_dead_channels():
    x, w = jnp.asarray([0.5, 0.0, 8.0, 2.0]), jnp.asarray([1.0, 1.0, 0.25, 0.0])
    s = np.asarray(candidates(x, w, 5))
    assert s.shape == (12, 4) and (s[0] == 1).all() and (s[:, [1, 3]] == 1).all()
    np.testing.assert_allclose(np.prod(s[:, [0, 2]], axis=1), 1, rtol=1e-5)
    np.testing.assert_allclose(s[10, 2] / s[10, 0], 16, rtol=1e-5)  # x^1
    np.testing.assert_allclose(s[11, 2] / s[11, 0], 64, rtol=1e-5)  # x^1 / w^1


def test_the_weights_objective_is_the_error_of_the_outputs_under_one_outer_scale():
    format, inputs = NVFP4(arithmetic="checkpoint"), FP8("token")
    w = [jnp.asarray(RNG.standard_normal((8, 32)) * k, jnp.bfloat16) for k in (1, 3)]
    x = jnp.asarray(RNG.standard_normal((50, 32)), jnp.float32)
    s = jnp.asarray(np.exp(RNG.standard_normal(32)), jnp.float32)
    h = x.T @ x / 50
    readers = tuple(Reader(Scheme(format, inputs), 0, False, True) for _ in w)
    found = np.asarray(errors(readers, False, w, jnp.stack([jnp.ones(32), s]), x, jnp.max(jnp.abs(x), 0), h))
    for i, scale in enumerate((np.ones(32, np.float32), np.asarray(s))):
        moved = [(np.asarray(v, np.float32) * scale).astype(ml_dtypes.bfloat16) for v in w]
        outer = format.outer(
            np.float32(max(np.abs(np.float32(m)).max() for m in moved)), np.dtype(ml_dtypes.bfloat16)
        )
        want = sum(
            np.sum(
                np.square(x @ (np.asarray(format.decode(format.encode(m, outer))) / scale - np.float32(v)).T)
            )
            for m, v in zip(moved, w, strict=True)
        )
        np.testing.assert_allclose(found[i], want / 50, rtol=1e-4)


def test_the_inputs_objective_is_the_error_of_the_outputs_under_a_static_scale():
    format = FP8("tensor")
    w, x = (
        jnp.asarray(RNG.standard_normal((8, 32)), jnp.float32),
        jnp.asarray(RNG.standard_normal((50, 32)), jnp.float32),
    )
    s = jnp.asarray(np.exp(RNG.standard_normal(32)), jnp.float32)
    top = jnp.max(jnp.abs(x), 0)
    readers = (Reader(Scheme(INT4(), format), 0, True, False),)
    (found,) = np.asarray(errors(readers, False, [w], s[None], x, top, jnp.eye(32)))
    q = np.asarray(format.fake(x / s[None], format.outer(jnp.max(top / s), np.dtype(np.float32))))
    np.testing.assert_allclose(
        found, np.sum(np.square((q * np.asarray(s) - np.asarray(x)) @ np.asarray(w).T)) / 50, rtol=1e-3
    )


def test_a_first_look_takes_a_part_of_the_rows_under_the_outer_scale_of_all():
    w = jnp.repeat(jnp.asarray(RNG.standard_normal((256, 32)), jnp.bfloat16), 4, axis=0)
    x = jnp.repeat(jnp.asarray(RNG.standard_normal((256, 32)), jnp.float32), 4, axis=0)
    scales = jnp.asarray(np.exp(RNG.standard_normal((3, 32))), jnp.float32)
    readers = (Reader(Scheme(NVFP4(), NVFP4()), 0, True, True),)
    args = (scales, x, jnp.max(jnp.abs(x), 0), x.T @ x / len(x))
    rough, exact = (np.asarray(errors(readers, roughly, [w], *args)) for roughly in (True, False))
    np.testing.assert_allclose(rough, exact, rtol=1e-5)  # every fourth row of fours is all there is

    readers = (readers[0]._replace(inputs=False),)
    rough = np.asarray(errors(readers, True, [w], *args))
    other = [w.at[1::4].multiply(3)]  # rows that the first look has in the outer scale alone
    again, exact = (np.asarray(errors(readers, roughly, other, *args)) for roughly in (True, False))
    assert (again != rough).any()
    np.testing.assert_allclose(again, rough, rtol=0.1)
    assert (exact > 2 * again).all()


@pytest.mark.parametrize("scheme", [Scheme(INT4(group=32)), Scheme(NVFP4(), NVFP4())], ids=["int4", "nvfp4"])
def test_the_best_of_a_first_look_are_judged_by_everything(scheme, monkeypatch):
    monkeypatch.setattr("mojax.transforms.awq.LARGE", 2**20)
    rng = np.random.default_rng(0)
    w = (jnp.asarray(rng.standard_normal((1024, 64)), jnp.bfloat16),)
    x = (rng.standard_normal((2048, 64)) * np.exp(rng.standard_normal(64))).astype(np.float32)
    gram, top = x.T @ x, np.abs(x).max(0)
    stats = {"count": 2048, "abssum": np.abs(x).sum(0), "absmax": top, "sample": x, "gram": gram}
    fold = Fold("up.weight", ("down.weight",))
    readers = (Reader(scheme, 0, scheme.inputs is not None, True),)
    s, before, after = solve(fold, readers, w, stats, 11, 2048)

    def exact(scales):
        return np.asarray(errors(readers, False, w, scales, x, top, gram / 2048))

    square = jnp.sqrt(jnp.mean(jnp.square(w[0].astype(jnp.float32)), 0))
    every = exact(candidates(jnp.asarray(np.abs(x).mean(0)), square, 11))
    np.testing.assert_allclose([before, after], [every[0], exact(s[None])[0]], rtol=1e-5)
    assert after <= every[0] and after < 1.01 * every.min()
    assert every.min() < 0.98 * every[0]


def test_an_input_that_nobody_saw_is_not_scaled():
    x = np.zeros((64, 16), np.float32)
    stats = {"w.weight": {"absmax": x[0], "abssum": x[0], "count": np.int64(0), "sample": x, "gram": x[:16]}}
    site = block()[3].sites[0]._replace(weight="w.weight", producer="g", also=(), group=0, channels=())
    context = Context((site,), {"w": Scheme(NVFP4(), NVFP4())})
    params = {"w.weight": jnp.asarray(RNG.standard_normal((16, 16)), jnp.float32), "g": jnp.ones(16)}
    moved = awq().apply(params, stats, context)
    np.testing.assert_array_equal(moved["w.weight"], params["w.weight"])
    np.testing.assert_array_equal(moved["g"], params["g"])


def test_scales_of_tied_channels_go_both_ways():
    fold = Fold("v", ("o",), (), ((2, True), (3, False), (2, True)))
    s = jnp.asarray([1.0, 2.0, 3.0, 4.0])
    wide = fold.spread(s)
    np.testing.assert_array_equal(wide, [1, 2, 1, 2, 1, 2, 3, 4, 3, 4, 3, 4])
    np.testing.assert_array_equal(fold.tied(wide, jnp.max), s)


def planted(model):
    """The same function, exactly, with outliers in a few channels of every input: powers of two."""
    params, rng, c = (
        {n: np.asarray(model.params[n]) for n in model.params},
        np.random.default_rng(3),
        model.hyper,
    )
    rep = c.num_attention_heads // c.num_key_value_heads
    for b in model.blocks:
        p = b.prefix

        def scaled(producer, readers, size, spread=lambda s: s, p=p):
            s = np.ones(size, np.float32)
            s[rng.choice(size, max(2, size // 50), replace=False)] = 2.0 ** rng.integers(
                3, 7, max(2, size // 50)
            )
            w = params[p + producer]
            rows = s if w.ndim == 1 else s[:, None]
            params[p + producer] = (w.astype(np.float32) * rows).astype(w.dtype)
            for name in readers:
                w = params[p + name]
                params[p + name] = (w.astype(np.float32) / spread(s)[None]).astype(w.dtype)

        def heads(s):
            return np.repeat(s.reshape(-1, 1, c.head_dim), rep, 1).reshape(-1)

        scaled("input_layernorm.weight", [f"self_attn.{n}.weight" for n in QKV], c.hidden_size)
        scaled("self_attn.v_proj.weight", [OUTPUT], c.num_key_value_heads * c.head_dim, heads)
        scaled(
            "post_attention_layernorm.weight", ["mlp.gate_proj.weight", "mlp.up_proj.weight"], c.hidden_size
        )
        scaled("mlp.up_proj.weight", ["mlp.down_proj.weight"], c.intermediate_size)
    return dataclasses.replace(model, params=params)


def kl(model, *steps):
    plan = mojax.plan(model, recipe(*steps, ("rtn", {})))
    stats = mojax.calibrate(model, plan, tokens("calibration"))
    return mojax.evaluate(mojax.apply(model, plan, stats), model, tokens("evaluation")[:4]).kl_mean


def test_planted_outliers_are_undone():
    clean, worse = tiny(), planted(tiny())
    floor = kl(clean)
    assert kl(worse) > 4 * floor
    assert kl(worse, ("awq", {})) < 1.25 * floor
    assert kl(worse, ("smoothquant", {"sites": "all"})) < 1.25 * floor


def test_the_steps_say_what_they_refuse():
    with pytest.raises(InputError, match="awq: objective: 'input' is not possible"):
        awq(objective="input")
    with pytest.raises(InputError, match="awq: grid is 1"):
        awq(grid=1)
    _, params, _, context, *_ = block()
    with pytest.raises(InputError, match=r"q_proj\.weight: awq needs statistics of its inputs"):
        awq().apply(params, {}, context)
