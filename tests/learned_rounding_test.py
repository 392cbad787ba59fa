"""Learned rounding: AdaRound on a matrix; AutoRound and DiscQuant on the output of a block."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import mojax
from mojax import tuning
from mojax.errors import InputError
from mojax.formats.base import QTensor, Scheme, encode_leaf
from mojax.formats.fp8 import FP8
from mojax.formats.int4 import INT4
from mojax.formats.int8 import INT8
from mojax.formats.mxfp4 import MXFP4
from mojax.formats.nvfp4 import NVFP4
from mojax.kernels.base import decoded
from mojax.matrices import Matrix, error
from mojax.program import run_block
from mojax.recipe import load_recipe
from mojax.resolve import made_steps
from mojax.rounding.scales import encoded, grid
from mojax.rounding.soft import inside, levels, moved, neighbours, share
from mojax.stream import Whole, transform
from mojax.transforms import adaround, autoround, discquant
from mojax.transforms.base import Context, Passage

RNG = np.random.default_rng(0)
FORMATS = [NVFP4(), MXFP4(arithmetic="checkpoint"), INT4(group=32, symmetric=False), FP8(per="channel")]
FOUR = [f for f in FORMATS if f.bits == 4]
IDS = lambda f: f"{f.label} {f.arithmetic}"  # noqa: E731


@pytest.fixture(autouse=True)
def _same_numbers():
    """Whatever tests ran before on this worker."""
    RNG.bit_generator.state = np.random.default_rng(0).bit_generator.state


def normal(*shape):
    return jnp.asarray(RNG.standard_normal(shape), jnp.float32)


def on_grid(format, w):
    q = format.encode(w)
    return q, jnp.asarray(format.decode(q)), grid(format, dict(q.scales), w.shape)


def tokens(width, count=1024):
    """Correlated inputs."""
    mix = RNG.standard_normal((width, width)) * np.linspace(0.1, 1, width)
    return (RNG.standard_normal((count, width)) @ mix).astype(np.float32)


def matrix(format, w, x):
    return Matrix("w", 0, w, format, dict(format.encode(w).scales), None, {"gram": x.T @ x, "count": len(x)})


@pytest.mark.parametrize("format", FORMATS, ids=IDS)
def test_neighbours_enclose_a_weight_and_have_nothing_between_them(format):
    w = normal(8, 64)
    _, rounded, at = on_grid(format, w)
    low, high = neighbours(format, w, at)
    within = low < high
    assert np.mean(within) > 0.9
    np.testing.assert_array_less(np.asarray(low - 1e-6)[within], np.asarray(w)[within])
    np.testing.assert_array_less(np.asarray(w)[within], np.asarray(high + 1e-6)[within])
    assert np.all((rounded == low) | (rounded == high))
    known = levels(format)
    zero = 0 if at.zero is None else at.zero
    places = [np.searchsorted(known, np.asarray(e / at.step + zero) - 1e-4) for e in (low, high)]
    np.testing.assert_array_equal(places[1] - places[0], np.asarray(within, np.int32))


@pytest.mark.parametrize("format", FORMATS, ids=IDS)
def test_the_soft_weight_begins_as_the_weight(format):
    w = normal(8, 64)
    pair = neighbours(format, w, on_grid(format, w)[2])
    h = adaround.soft(adaround.hard(share(w, pair)))
    within = np.asarray(pair.low < pair.high)
    found = np.asarray(pair.low + h * (pair.high - pair.low))
    np.testing.assert_allclose(found[within], np.asarray(w)[within], rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("format", FORMATS, ids=IDS)
def test_given_codes_are_where_tuning_begins(format):
    w, other = normal(8, 64), normal(8, 64)
    q, rounded, at = on_grid(format, w)
    np.testing.assert_array_equal(
        moved(format, inside(format, w, rounded, at), jnp.zeros_like(w), at), rounded
    )
    given = encoded(format, other * 0.5 + w, dict(q.scales), w.dtype)  # codes that are not nearest to w
    for learner in learners():
        weight = tuning.given(given, w)
        found, scales = learner.final(format, weight, learner.start(format, weight))
        np.testing.assert_array_equal(found, format.decode(given))
        for level in scales:
            np.testing.assert_array_equal(scales[level], given.scales[level])


def learners():
    both = autoround.autoround(), discquant.discquant()
    return [step.tune.args[1] for step in both]


@pytest.mark.parametrize("format", FOUR, ids=IDS)
def test_adaround_takes_neighbours_and_lowers_the_error(format):
    w, x = normal(32, 64), tokens(64)
    m = matrix(format, w, x)
    h, g = m.objective(0.01)
    solved = adaround.solve(m, steps=200, rate=0.05, strength=10.0, damping=0.01)
    assert solved.before == error(m, m.values, h, g)
    assert solved.after == error(m, solved.values, h, g) < 0.8 * solved.before
    low, high = neighbours(format, w, grid(format, m.scales, w.shape))
    assert np.all((solved.values == low) | (solved.values == high))


def test_adaround_never_loses_what_it_was_given():
    w, x = normal(32, 64), tokens(64)
    m = matrix(INT4(group=32), w, x)
    good = adaround.solve(m, steps=300, rate=0.05, strength=10.0, damping=0.01)
    again = m._replace(q=encoded(m.format, good.values, m.scales, w.dtype))
    for steps in (1, 200):
        solved = adaround.solve(again, steps=steps, rate=0.05, strength=10.0, damping=0.01)
        assert solved.before == pytest.approx(good.after, rel=1e-5)
        assert solved.after <= solved.before


def test_adaround_drives_every_weight_to_one_side():
    w, x = normal(32, 64), tokens(64)
    m = matrix(NVFP4(), w, x)
    h, g = m.objective(0.01)
    pair = neighbours(m.format, w, grid(m.format, m.scales, w.shape))
    unit = error(m, m.values, h, g) / w.size
    up = adaround.learned(w, share(w, pair), pair, h, g, unit, adaround.Schedule(1000, 0.05, 10.0, 0.2))
    assert np.mean((up < 1e-3) | (up > 1 - 1e-3)) > 0.98


def test_adaround_leaves_a_matrix_that_no_token_reached():
    m = matrix(NVFP4(), normal(32, 64), np.zeros((4, 64), np.float32))
    solved = adaround.solve(m, steps=10, rate=0.05, strength=10.0, damping=0.01)
    assert solved.values is None and "no calibration token" in solved.note


# Blocks


def block(params, x):
    """Two linears and a gain."""
    y = jnp.tanh((x * params["gain"][None, None, :]) @ params["a.weight"].T)
    return x + y @ params["b.weight"].T


def experts(params, x):
    return jnp.einsum("beh,eoh->beo", x, params["a.weight"])


def passage(format, run=block, names=("a", "b"), shape=(64, 64), tilt=0.02):
    """A block on its way, with inputs that rounding before it has changed a little."""
    leaves = {f"layer.{n}.weight": normal(*shape) * 0.2 for n in names} | {"layer.gain": 1 + normal(64) * 0.1}
    xs = [normal(4, 6, 64) for _ in range(4)]
    ys = [run({n.removeprefix("layer."): w for n, w in leaves.items()}, x) for x in xs]
    batch = (0,) if len(shape) == 3 else ()
    params = {
        n: encode_leaf(format, w, (len(shape) - 1,), batch) if w.ndim > 1 else w for n, w in leaves.items()
    }
    schemes = {f"layer.{n}": Scheme(format) for n in names}
    outcomes = []
    context = Context((), schemes, targets={n: leaves[n + ".weight"] for n in ()}, log=outcomes.append)
    context = context._replace(targets={m + ".weight": leaves[m + ".weight"] for m in schemes})
    seen = [x + tilt * normal(*x.shape) for x in xs]
    return params, Passage(run, "layer.", seen, ys), context, outcomes


def block_error(params, way):
    leaves = {
        n.removeprefix("layer."): jnp.asarray(w.format.decode(w)) if isinstance(w, QTensor) else w
        for n, w in params.items()
    }
    pairs = zip(way.inputs, way.outputs, strict=True)
    return float(np.mean([jnp.mean(jnp.square(way.run(leaves, x) - y)) for x, y in pairs]))


STEPS = [
    pytest.param(autoround.autoround(steps=60, batch=4), 0.9, id="autoround"),
    pytest.param(autoround.autoround(steps=60, batch=4, scales=False), 0.85, id="autoround, codes"),
    pytest.param(discquant.discquant(steps=60, batch=4), 0.75, id="discquant"),
]


@pytest.mark.parametrize("step, least", STEPS)
@pytest.mark.parametrize("format", [NVFP4(), INT4(group=32, symmetric=False)], ids=IDS)
def test_a_tuned_block_is_closer_to_its_source(step, least, format):
    params, way, context, outcomes = passage(format)
    changed = step.tune(params, way, context)
    assert set(changed) == {"layer.a.weight", "layer.b.weight"}
    (said,) = outcomes
    assert said.before == pytest.approx(block_error(params, way), rel=1e-3)
    assert said.after == pytest.approx(block_error({**params, **changed}, way), rel=1e-3)
    assert said.after < least * said.before


@pytest.mark.parametrize("make", [autoround.autoround, discquant.discquant])
def test_without_steps_nothing_changes(make):
    params, way, context, _ = passage(NVFP4())
    assert make(steps=0).tune(params, way, context) == {}


def test_what_is_not_better_is_not_taken():
    params, way, context, outcomes = passage(NVFP4(), tilt=0.0)
    same = {n: jnp.asarray(w.format.decode(w)) if isinstance(w, QTensor) else w for n, w in params.items()}
    context = context._replace(targets={n: same[n] for n in context.targets})
    ys = [block({n.removeprefix("layer."): w for n, w in same.items()}, x) for x in way.inputs]
    assert autoround.autoround(steps=5).tune(params, way._replace(outputs=ys), context) == {}
    assert outcomes[0].before == outcomes[0].after


def test_offsets_reach_neighbours_only():
    params, way, context, _ = passage(NVFP4())
    changed = autoround.autoround(steps=30, batch=4, scales=False).tune(params, way, context)
    for name, q in changed.items():
        low, high = neighbours(q.format, context.targets[name], grid(q.format, q.scales, q.shape))
        values = q.format.decode(q)
        assert np.all((values == low) | (values == high))
        assert np.any(values != params[name].format.decode(params[name]))


@pytest.mark.parametrize("steps", [1, 7, 200])
def test_steps_sum_to_half_a_gap(steps):
    rates = autoround.rates(steps)
    assert sum(rates) == pytest.approx(0.5)
    assert list(rates) == sorted(rates, reverse=True) and len(rates) == steps


def test_only_the_sign_of_a_slope_counts():
    format, w, slope = INT4(group=32), normal(8, 64), normal(8, 64)
    weight = tuning.given(format.encode(w), w)
    knobs = autoround.start(True, format, weight)
    one, many = (autoround.move(format, weight, knobs, slope * k, jnp.float32(0.1)) for k in (1.0, 1000.0))
    np.testing.assert_array_equal(one.offset, many.offset)
    np.testing.assert_array_equal(one.factor, many.factor)
    np.testing.assert_allclose(jnp.abs(one.offset), 0.1, rtol=1e-6)


def test_the_slope_of_a_scale_is_that_of_the_rounded_weight():
    format, w = INT8(), normal(4, 32)
    weight = tuning.given(format.encode(w), w)
    knobs = autoround.start(True, format, weight)
    slope = normal(4, 32)
    moved_by = autoround.move(format, weight, knobs, slope, jnp.float32(0.1)).factor - 1
    residual = jnp.sum(slope * (jnp.asarray(format.decode(format.encode(w))) - w), -1, keepdims=True)
    np.testing.assert_array_equal(jnp.sign(moved_by), -jnp.sign(residual))


def test_weights_slide_from_full_precision():
    format, w = NVFP4(), normal(8, 64)
    weight = tuning.given(format.encode(w), w)
    slide = discquant.start(format, weight)
    low, high = discquant.pair_of(format, weight)
    kept = np.asarray(low < high)
    np.testing.assert_allclose(
        np.asarray(discquant.used(format, weight, slide))[kept], np.asarray(w)[kept], rtol=1e-4, atol=1e-5
    )
    for _ in range(40):
        slide = discquant.move(2.0, format, weight, slide, jnp.zeros_like(w), jnp.float32(0.1))
    assert np.all((slide.x >= 0) & (slide.x <= 1))
    np.testing.assert_array_equal(  # with no error to hold them they end at the nearest
        discquant.final(format, weight, slide)[0], format.decode(format.encode(w))
    )
    assert np.mean((slide.x == 0) | (slide.x == 1)) > 0.9


@pytest.mark.parametrize("format", [INT4(group=32), NVFP4()], ids=IDS)
def test_every_expert_is_tuned(format):
    params, way, context, outcomes = passage(format, experts, ("a",), (6, 32, 64))
    way = way._replace(
        outputs=[experts({"a.weight": context.targets["layer.a.weight"]}, x) for x in way.inputs]
    )
    changed = autoround.autoround(steps=30, batch=4).tune(params, way, context)
    q = changed["layer.a.weight"]
    assert q.shape == (6, 32, 64) and q.batch == (0,)
    assert jax.tree.structure(q) == jax.tree.structure(params["layer.a.weight"])
    assert outcomes[0].after == pytest.approx(block_error({**params, **changed}, way), rel=1e-3)
    assert outcomes[0].after < outcomes[0].before
    for i in range(6):
        assert np.any(np.asarray(q.row(i).codes) != np.asarray(params["layer.a.weight"].row(i).codes))


# Recipes


def recipe(*steps, name="int4", **calibration):
    found = load_recipe(name)
    said = {"sequences": 16, "length": 64, **calibration}
    return dataclasses.replace(found, steps=steps, calibration=found.calibration._replace(**said))


@pytest.fixture(scope="module")
def nearest_kl(tmp_path_factory):
    out = tmp_path_factory.mktemp("rtn") / "out"
    return mojax.optimize("tiny", recipe(("rtn", {})), out).kl_mean


@pytest.mark.parametrize(
    "steps",
    [
        pytest.param([("autoround", {"steps": 20, "batch": 8})], id="autoround"),
        pytest.param([("adaround", {"steps": 100}), ("discquant", {"steps": 10, "batch": 8})], id="both"),
    ],
)
def test_a_whole_model_is_closer_than_with_rounding_to_nearest(steps, nearest_kl, tmp_path):
    report = mojax.optimize("tiny", recipe(*steps), tmp_path / "out")
    assert report.kl_mean < 0.75 * nearest_kl


def test_a_block_in_between_computes_what_a_packed_one_does():
    model = mojax.load("tiny")
    plan = mojax.plan(model, recipe(("rtn", {}), name="mxfp4"))
    first = model.blocks[0]
    params = {n: model.params[n] for n in model.params if n.startswith(first.prefix)}
    params |= transform(plan, first, params, {})
    local = {n.removeprefix(first.prefix): leaf for n, leaf in params.items()}
    plain = {n: decoded(w) if isinstance(w, QTensor) else jnp.asarray(w) for n, w in local.items()}
    program = dataclasses.replace(model, schemes=plan.schemes).program(first)
    x = normal(1, 16, 256).astype(jnp.bfloat16)
    run, loose = Whole(program), Whole(model.program(first))
    y, packed, unrounded = (
        v.astype(jnp.float32) for v in (run(plain, x), run_block(program, local, x), loose(plain, x))
    )
    assert jnp.linalg.norm(y - packed) < 0.2 * jnp.linalg.norm(y - unrounded)
    assert run == Whole(program) and hash(run) == hash(Whole(program))  # blocks of one kind compile once
    slopes = jax.grad(lambda plain: jnp.sum(jnp.square(run(plain, x))))(plain)
    assert all(jnp.any(slopes[n] != 0) for n, w in local.items() if isinstance(w, QTensor))


def test_tokens_tune_in_memory_as_in_files(tmp_path):
    small, out = "tests/golden/models/llama", tmp_path / "out"
    seen = np.random.default_rng(0).integers(3, 512, (16, 64)).astype(np.int32)
    np.savez(tmp_path / "seen.npz", tokens=seen)
    said = recipe(("smoothquant", {}), ("gptq", {}), ("autoround", {"steps": 2}))
    model = mojax.load(small)
    told = []
    made = mojax.apply(model, mojax.plan(model, said), seen, log=told.append)
    mojax.optimize(small, said, out, calibration_text=str(tmp_path / "seen.npz"), evaluate=False)
    written = mojax.load(out)
    assert {o.step for o in told} == {"gptq", "autoround"}
    assert set(written.schemes) == set(made.schemes) and set(written.params) == set(made.params)
    for name, leaf in made.params.items():
        pairs = zip(jax.tree.leaves(leaf), jax.tree.leaves(written.params[name]), strict=True)
        assert all(np.array_equal(np.asarray(a), np.asarray(b)) for a, b in pairs), name


def test_statistics_alone_cannot_tune():
    model = mojax.load("tiny")
    plan = mojax.plan(model, recipe(("autoround", {})))
    assert plan.needs == ("activations",)
    with pytest.raises(InputError, match=r"autoround tunes whole blocks.*mojax\.optimize"):
        mojax.calibrate(model, plan, np.zeros((2, 8), np.int32))
    with pytest.raises(InputError, match=r"autoround tunes whole blocks.*mojax\.optimize"):
        mojax.apply(model, plan, {})
    function = mojax.from_function(lambda p, x: x @ p["w"], {"w": normal(128, 128)}, normal(2, 128))
    with pytest.raises(InputError, match="a function has none"):
        mojax.quantize(function, recipe(("autoround", {})))


@pytest.mark.parametrize(
    "steps, said",
    [
        ([("autoround", {}), ("gptq", {})], "put gptq first"),
        ([("autoround", {"steps": -1})], "autoround: steps is -1"),
        ([("autoround", {"batch": 0})], "batch is 0"),
        ([("adaround", {"strength": 0})], "strength 0"),
        ([("discquant", {"rho": 0})], "rho 0"),
    ],
)
def test_what_cannot_be_right_is_refused(steps, said):
    with pytest.raises(InputError, match=said):
        made_steps(recipe(*steps))
