"""FlatQuant: learned matrices before packed linears, as mathematics and in whole models."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from moe_models import tiny_qwen3_moe

import mojax
from mojax import flat
from mojax.calibration import Stats
from mojax.errors import InputError, PlanError
from mojax.formats import fp8, int8, mxfp4
from mojax.formats.base import QTensor
from mojax.gradients import gradients
from mojax.kernels.hadamard import hadamard
from mojax.recipe import load_recipe
from mojax.simulate import grown
from mojax.transforms import flatquant as step
from mojax.transforms.flatquant import Side, both, cayley, first, flatquant

LLAMA = "tests/golden/models/llama"


def recipe(*steps, inputs="mxfp4", weights="mxfp4", **rule):
    rules = [{"match": "*", "weights": weights, "inputs": inputs} | rule]
    return load_recipe(
        {"rules": rules, "steps": list(steps), "calibration": {"sequences": 4, "length": 16}, "name": "flat"}
    )


FAST = {"flatquant": {"steps": 10, "rate": 0.02}}


@functools.cache
def llama():
    return mojax.load(LLAMA)


@functools.cache
def tokens():
    return np.random.default_rng(0).integers(3, 512, (4, 16)).astype(np.int32)


def planned(*steps, **options):
    return mojax.plan(llama(), recipe(*steps, **options), target="mojax")


@functools.cache
def found(inputs="mxfp4", weights="mxfp4"):
    """Of a small model: the plan, what calibration gives, the model and what the steps said."""
    plan = planned(FAST, "rtn", inputs=inputs, weights=weights)
    said = []
    stats = mojax.calibrate(llama(), plan, tokens())
    return plan, stats, mojax.apply(llama(), plan, stats, log=said.append), said


def state(n, seed=0, size=0.3):
    rng = np.random.default_rng(seed)
    return Side(*(jnp.asarray(size * rng.standard_normal(s), jnp.float32) for s in ((n, n), (n,), (n, n))))


def logits(model):
    return np.asarray(model(tokens()), np.float64)


def distance(a, b):
    return float(np.abs(a - b).max() / np.abs(b).max())


# ---------------------------------------------------------------- mathematics


@pytest.mark.parametrize("n", [1, 12, 16, 20, 28, 64])
@pytest.mark.parametrize("kind", ["identity", "hadamard"])
def test_a_matrix_and_its_inverse(n, kind):
    begin = first(kind, 0, "m", n)
    p, inverse = both(state(n), begin)
    assert np.abs(np.asarray(p @ inverse) - np.eye(n)).max() < 1e-4
    assert np.abs(np.asarray(begin @ begin.T) - np.eye(n)).max() < 1e-5


def test_cayley_is_orthogonal_and_nothing_at_zero():
    q = np.asarray(cayley(state(24).a))
    assert np.abs(q @ q.T - np.eye(24)).max() < 1e-5
    assert np.abs(q - np.eye(24)).max() > 0.1
    assert np.array_equal(cayley(jnp.zeros((8, 8), jnp.float32)), np.eye(8))


@pytest.mark.parametrize("width, sides", [(64, (8, 8)), (768, (24, 32)), (14336, (112, 128)), (7, (1, 7))])
def test_sides_are_near_to_each_other(width, sides):
    assert flat.sides(width) == sides


def test_what_is_kept_is_the_kronecker_product():
    rng = np.random.default_rng(0)
    left, right = (
        rng.standard_normal((n, n)).astype(np.float32) + 3 * np.eye(n, dtype=np.float32) for n in (4, 6)
    )
    x, w = (rng.standard_normal(s).astype(np.float32) for s in ((3, 5, 24), (7, 24)))
    whole = np.kron(left, right).astype(np.float64)
    assert np.allclose(flat.turned(jnp.asarray(x), left, right), x @ whole, atol=1e-4)
    moved = flat.absorbed(w, flat.inverse(left), flat.inverse(right))
    assert np.allclose(moved, w @ np.linalg.inv(whole).T, atol=1e-5)
    y = flat.turned(jnp.asarray(x), left, right) @ moved.T
    assert np.abs(np.asarray(y) - x @ w.T).max() < 1e-4


def test_it_begins_with_a_rotation():
    """Hadamard matrices of both sides are the Hadamard matrix of the whole, for powers of two."""
    x = jnp.asarray(np.random.default_rng(0).standard_normal((3, 64)), jnp.float32)
    starts = [first("hadamard", 0, name, 8) for name in ("l", "r")]
    signs = [np.sign(np.asarray(s)[:, 0]) for s in starts]  # of rows, taken off again
    left, right = (np.asarray(s) * sign[:, None] for s, sign in zip(starts, signs, strict=True))
    assert np.allclose(flat.turned(x, left, right), hadamard(x, block=64), atol=1e-5)


def test_gradients_know_that_scales_follow():
    """Of q = fmt(x): as if every element kept its place on a grid that grows with the largest one."""
    format = mxfp4.FORMAT()
    x = jnp.asarray(np.random.default_rng(0).standard_normal((1, 32)), jnp.float32)
    slope = jax.grad(lambda x: jnp.sum(grown(format, x, jnp.asarray(format.fake(x)))))(x)
    at = int(jnp.argmax(jnp.abs(x)))
    error = float(jnp.sum(jnp.asarray(format.fake(x)) - x))
    expected = np.ones(32)
    expected[at] += error / float(x[0, at])
    assert np.allclose(slope[0], expected, atol=1e-5)
    assert np.array_equal(grown(format, x, jnp.asarray(format.fake(x))), np.asarray(format.fake(x)))


def test_a_gradient_through_rounding_to_a_static_scale_grows_with_the_tensor():
    x = jnp.asarray([[1.0, 2.0], [3.0, -7.0]], jnp.float32)
    format = int8.FORMAT(per="tensor")
    y = jnp.asarray(format.fake(x))
    slope = jax.grad(lambda x: jnp.sum(grown(format, x, y)))(x)
    expected = np.ones((2, 2))
    expected[1, 1] += float(jnp.sum(y - x)) / -7
    assert np.allclose(slope, expected, atol=1e-5)


# ---------------------------------------------------------------- models


def test_the_function_is_kept():
    """With any matrices: the source in float32, and what the step makes of it before it is encoded."""
    plan = planned("flatquant", "rtn")
    wide = {n: np.asarray(w).astype(np.float32) for n, w in llama().params.items()}
    config = dict(llama().config) | {"dtype": "float32", "torch_dtype": "float32"}
    model = dataclasses.replace(llama(), config=config, params=wide)
    stats = {
        m + ".weight": {
            end: np.asarray(both(state(n, i), first("hadamard", 0, m, n))[0])
            for i, (end, n) in enumerate(
                zip((flat.LEFT, flat.RIGHT), flat.sides(wide[m + ".weight"].shape[1]), strict=True)
            )
        }
        for m in plan.schemes
    }
    changed = {}
    for block in model.blocks:
        changed |= plan.migration.apply(wide, stats, plan.context(block))
    assert len(changed) == 3 * len(plan.schemes)
    turned = dataclasses.replace(model, params=wide | changed)
    assert distance(logits(turned), logits(model)) < 1e-5
    weights = {
        b.prefix: [m + ".weight" for m in plan.schemes if m.startswith(b.prefix)] for b in model.blocks
    }
    both_ways = [gradients(m, tokens(), draws=1, seed=0, weights=weights) for m in (turned, model)]
    for n, g in both_ways[1].output_gram.items():
        assert distance(both_ways[0].output_gram[n], g) < 1e-3, n
    name = next(iter(plan.schemes)) + ".weight"
    assert distance(np.asarray(changed[name]), wide[name]) > 0.1


def test_a_block_gets_better_and_says_so():
    plan, stats, model, said = found()
    said = [o for o in said if o.step == "flatquant"]
    assert len(said) == 0  # apply only applies
    for module in plan.schemes:
        left, right = (stats[module + ".weight"][end] for end in (flat.LEFT, flat.RIGHT))
        assert left.dtype == right.dtype == jnp.bfloat16
        assert flat.factors(model.params, module) is not None
        condition = np.linalg.cond(np.kron(np.asarray(left, np.float64), np.asarray(right, np.float64)))
        assert condition < 100
    rounded = mojax.apply(llama(), planned("rtn"), Stats())
    ours, theirs = (mojax.evaluate(m, llama(), tokens()).kl_mean for m in (model, rounded))
    assert ours < 0.9 * theirs


def test_linears_of_one_input_share_their_matrices():
    _, stats, _, _ = found()
    q, k, o = (f"model.layers.0.self_attn.{name}_proj.weight" for name in "qko")
    assert np.array_equal(stats[q][flat.LEFT], stats[k][flat.LEFT])
    assert not np.array_equal(stats[q][flat.RIGHT], stats[o][flat.RIGHT])


def outcomes(*steps, **options):
    """What the steps say of the first blocks while they learn."""
    from mojax.stream import Stream

    said = []
    stream = Stream(llama(), planned(*steps, **options), tokens())
    made = stream.make(llama().blocks[0], said.append)
    return made, [o for o in said if o.step == "flatquant"]


def test_the_best_iterate_is_never_worse_than_none():
    errors = []
    for options in ({"steps": 0, "start": "identity"}, {"steps": 0}, {"steps": 40}):
        _, (said,) = outcomes({"flatquant": options}, "rtn")
        assert said.after <= said.before and said.weight == "model.layers.0.self_attn.q_proj.weight"
        errors.append(said.after)
    assert errors[2] < errors[1] <= errors[0] * (1 + 1e-6)


def test_what_cannot_be_bettered_is_left_alone():
    """Far too long steps: with I to begin with, every iterate is worse than no matrices."""
    made, (said,) = outcomes({"flatquant": {"steps": 10, "rate": 50.0, "start": "identity"}}, "rtn")
    assert said.after == said.before and "left alone" in said.note
    assert not any(n.endswith(flat.LEAVES) for n in made.leaves)
    plain, _ = outcomes("rtn")
    for name, q in plain.leaves.items():
        assert np.array_equal(made.leaves[name].codes, q.codes)


def test_statistics_are_kept_in_a_file(tmp_path):
    plan, stats, model, _ = found()
    stats.save(tmp_path / "stats.safetensors")
    again = mojax.apply(llama(), plan, Stats.load(tmp_path / "stats.safetensors"))
    assert np.array_equal(logits(again), logits(model))


def test_the_steps_after_see_turned_inputs():
    from mojax.stream import Stream

    plan = planned(FAST, "gptq")
    stats = mojax.calibrate(llama(), plan, tokens())
    plain = mojax.calibrate(llama(), planned("gptq"), tokens())
    name = "model.layers.0.self_attn.q_proj.weight"
    p = np.kron(*(np.asarray(stats[name][end], np.float64) for end in (flat.LEFT, flat.RIGHT)))
    gram = np.asarray(plain[name + "@encode"]["gram"], np.float64)
    seen = np.asarray(stats[name + "@encode"]["gram"], np.float64)
    assert distance(seen, p.T @ gram @ p) < 0.2  # of rounded inputs, in both
    assert distance(seen, gram) > 0.5
    said = []
    model = mojax.apply(llama(), plan, stats, log=said.append)
    assert all(o.after <= o.before for o in said if o.step == "gptq")
    stream = Stream(llama(), plan, tokens())
    made = stream.make(llama().blocks[0])
    q = model.params[name]
    assert isinstance(q, QTensor) and np.array_equal(made.leaves[name].codes, q.codes)


def test_it_stacks():
    """Scaled channels before, and statistics of turned inputs, corrected for what was rounded, after."""
    plan = planned("quarot", "smoothquant", FAST, "mse", "qep", "gptq", "refine")
    said = []
    model = mojax.apply(llama(), plan, mojax.calibrate(llama(), plan, tokens()), log=said.append)
    report = mojax.evaluate(model, llama(), tokens())
    plain = mojax.evaluate(mojax.apply(llama(), planned("rtn"), Stats()), llama(), tokens())
    assert report.kl_mean < 0.8 * plain.kl_mean
    assert {o.step for o in said} >= {"gptq", "refine"}


def test_static_scales_are_those_of_turned_inputs():
    plan = planned("smoothquant", FAST, "rtn", weights="int8", inputs={"format": "int8", "per": "tensor"})
    stats = mojax.calibrate(llama(), plan, tokens())
    model = mojax.apply(llama(), plan, stats)
    module = "model.layers.0.self_attn.q_proj"
    top = float(model.params[module + ".input_scale"])
    assert top == pytest.approx(float(np.max(stats[module + ".weight@encode"]["absmax"])))
    assert flat.factors(model.params, module) is not None
    assert top != pytest.approx(float(np.max(stats[module + ".weight"]["absmax"])))
    assert mojax.evaluate(model, llama(), tokens()).kl_mean < 0.05


def test_it_runs_dequantized_and_generates():
    _, _, model, _ = found()
    report = mojax.evaluate(mojax.dequantize(model), model, tokens())
    assert report.kl_mean < 0.1 * mojax.evaluate(model, llama(), tokens()).kl_mean
    prompt = tokens()[:1, :5].tolist()
    greedy = mojax.run(model).generate(prompt, max_tokens=4)
    now = np.asarray(prompt, np.int32)
    for _ in range(4):
        following = np.asarray(model(now))[:, -1].argmax(-1)
        now = np.concatenate([now, following[:, None].astype(np.int32)], 1)
    assert list(greedy.texts[0].tokens) == now[0, 5:].tolist()


def test_bits_count_the_matrices():
    plan, _, model, _ = found()
    report = mojax.evaluate(model, llama(), tokens())
    assert report.bits_per_quantized_weight == pytest.approx(plan.bits_per_quantized_weight, abs=1e-6)
    assert plan.bits_per_quantized_weight > planned("rtn").bits_per_quantized_weight + 0.01


def test_experts_have_none(tmp_path):
    model = mojax.load(tiny_qwen3_moe(tmp_path))
    plan = mojax.plan(model, recipe(FAST, "rtn"), target="mojax")
    turned = {m for m, s in plan.schemes.items() if s.flat}
    assert turned and all("self_attn" in m for m in turned)
    assert any("experts" in m for m in plan.schemes)


# ---------------------------------------------------------------- bad input


@pytest.mark.parametrize(
    "options",
    [{"steps": -1}, {"batch": 0}, {"rate": 0.0}, {"seed": -1}, {"start": "random"}],
)
def test_numbers_out_of_range(options):
    with pytest.raises(InputError, match=r"flatquant: .*(needed|not possible)"):
        flatquant(**options)


def test_no_server_runs_it():
    with pytest.raises(PlanError, match=r"flatquant multiplies inputs by matrices that vllm does not know"):
        mojax.plan(llama(), recipe("flatquant", "rtn"))


def test_one_thing_turns_an_input():
    with pytest.raises(PlanError, match=r"flatquant and hadamard: 32 both turn its input; leave out one"):
        planned("flatquant", "rtn", hadamard=32)


def test_a_branch_reads_inputs_as_they_come():
    with pytest.raises(InputError, match=r"flatquant turns the inputs that a branch would read"):
        planned("flatquant", {"svdquant": {"rank": 4}}, "rtn")


@pytest.mark.parametrize("late", ["smoothquant", "awq"])
def test_channels_are_scaled_before_they_are_mixed(late):
    with pytest.raises(InputError, match=rf"flatquant before it has mixed; put {late} first"):
        planned("flatquant", late, "rtn")


def test_a_model_without_a_forward_function_has_nothing_to_learn_from():
    model = dataclasses.replace(llama(), family=None)
    with pytest.raises(PlanError, match=r"needs calibration"):
        mojax.plan(model, recipe("flatquant", "rtn", inputs="none"), target="mojax")


def test_widths_that_blocks_do_not_divide():
    x = jnp.asarray(np.random.default_rng(0).standard_normal((4, 192)), jnp.float32)
    format = fp8.FORMAT(per="block")
    y = jnp.asarray(format.fake(x))
    assert np.array_equal(grown(format, x, y), np.asarray(y))
    assert np.isfinite(jax.grad(lambda x: jnp.sum(grown(format, x, y)))(x)).all()


def test_codes_come_after():
    with pytest.raises(InputError, match=r"put flatquant first"):
        planned("rtn", "flatquant")


def test_matrices_must_be_learned():
    plan = planned("flatquant", "rtn")
    with pytest.raises(InputError, match=r"model\.layers\.0\.\S+\.weight: its matrices must be learned"):
        mojax.apply(llama(), plan, Stats())


def test_two_calibrations_are_not_one():
    _, stats, _, _ = found()
    with pytest.raises(InputError, match=r"flat_left: was learned"):
        stats.merge(stats)


def test_a_width_without_divisors_is_refused(monkeypatch):
    monkeypatch.setattr(flat, "LARGEST", 4)
    with pytest.raises(PlanError, match=r"input channels, which is no product of two numbers up to 4"):
        planned("flatquant", "rtn")


def test_optax_is_asked_for(monkeypatch):
    monkeypatch.setattr(step.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(InputError, match=r"pip install 'mojax\[train\]'"):
        flatquant()


def test_functions_have_no_such_blocks():
    def fn(params, x):
        return x @ params["w"]

    model = mojax.from_function(fn, {"w": jnp.ones((32, 32), jnp.float32)}, jnp.ones((2, 32), jnp.float32))
    with pytest.raises(PlanError, match=r"flatquant puts matrices before the linears"):
        mojax.quantize(model, recipe("flatquant", "rtn"))
