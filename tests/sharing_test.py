"""What is done once for the weights of one input, what is not run again, and what a plan says of memory."""

import threading

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import mojax
from mojax import calibration, inputs, matrices, memory, stream
from mojax.planner import plan
from mojax.recipe import load_recipe
from mojax.threads import cores, flow
from mojax.transforms.base import Context

DOWN, OUT = "mlp.down_proj.weight", "self_attn.o_proj.weight"


@pytest.fixture(scope="module")
def model():
    return mojax.load("tiny")


def planned(model, form, steps, draws=0):
    return plan(model, load_recipe({"extends": form, "steps": steps, "calibration": {"gradients": draws}}))


def test_h_is_factored_once_for_the_weights_of_one_input(model):
    scheme = planned(model, "int4", ["gptq"]).schemes["model.layers.0.self_attn.q_proj"]
    rng = np.random.default_rng(0)
    x = rng.standard_normal((300, 128), np.float32)
    grams = {"q.weight": x.T @ x, "d.weight": x.T @ x}
    stats = {n: {"gram": g, "count": np.int64(300)} for n, g in grams.items()}
    stats |= {n: dict(stats["q.weight"]) for n in ("k.weight", "v.weight")}
    targets = {n: rng.standard_normal((8, 128), np.float32) for n in stats}
    context = Context((), {n.removesuffix(".weight"): scheme for n in stats}, targets=targets)
    factors = {}

    def solve(m):
        factors[m.name] = m.columns(0.01), m.objective(0.01)[0]
        return matrices.unchanged_scales(m)

    matrices.encode("step", targets, stats, context, solve)
    q, k, v, d = (factors[n + ".weight"] for n in "qkvd")
    assert q[0] is k[0] is v[0] and q[1] is k[1] is v[1]
    assert d[0] is not q[0]
    np.testing.assert_array_equal(d[0].upper, q[0].upper)


def test_a_block_goes_on_from_known_inputs_to_the_same_output(model):
    block = model.blocks[0]
    tokens = np.random.default_rng(0).integers(0, 4096, (1, 32), dtype=np.int32)
    xs = calibration.start(model, tokens)
    program, local = model.program(block), jax.device_put(model.local(block))
    groups = ((OUT, (OUT,)), (DOWN, (DOWN,)))
    taken, (_, known) = inputs.observe(
        program, program, ("gram",), groups, (OUT, DOWN), local, local, xs[0], xs[0], {}, ({}, {})
    )
    assert set(known) == {OUT, DOWN}
    whole = inputs.through(program, local, xs)[0]
    held = {name: [x] for name, x in known.items()}
    np.testing.assert_array_equal(inputs.through(program, local, xs, held)[0], whole)
    moved = {**held, DOWN: [2 * known[DOWN]]}  # they are what the block goes on from
    assert np.abs(np.asarray(inputs.through(program, local, xs, moved)[0] - whole, np.float32)).max() > 0
    x = np.asarray(known[DOWN], np.float32).reshape(-1, known[DOWN].shape[-1])
    np.testing.assert_allclose(taken[DOWN]["gram"], x.T @ x, rtol=1e-4, atol=1e-3 * np.abs(x.T @ x).max())


def test_inputs_that_take_much_memory_are_computed_anew(model, monkeypatch):
    todo = planned(model, "int4", ["qep", "gptq"])
    ids = np.random.default_rng(0).integers(0, 4096, (2, 64), dtype=np.int32)
    block, looked = model.blocks[0], []
    observe = inputs.observe

    def look(*args):
        looked.append(args[4])
        return observe(*args)

    monkeypatch.setattr(stream, "observe", look)
    kept = stream.Stream(model, todo, ids).make(block).leaves
    assert {"self_attn.o_proj.weight", "mlp.down_proj.weight"} <= {w for names in looked for w in names}
    looked.clear()
    monkeypatch.setattr(inputs, "HELD", 4 * 128 * 256)  # down's inputs are wider than o's
    anew = stream.Stream(model, todo, ids).make(block).leaves
    names = {w for names in looked for w in names}
    assert "self_attn.o_proj.weight" in names and "mlp.down_proj.weight" not in names
    for name, leaf in kept.items():
        jax.tree.map(np.testing.assert_array_equal, leaf, anew[name])
    assert inputs.bytes_held(128, 768) == 0 < inputs.bytes_held(128, 256)


def test_the_source_runs_only_where_something_looks_at_it(model):
    assert not planned(model, "int4", ["gptq"]).sourced
    assert planned(model, "int4", ["qep", "gptq"]).sourced  # drift
    assert planned(model, "int4", ["gptq"], draws=1).sourced
    assert planned(model, "nvfp4", ["gptq"]).sourced  # static scales of inputs
    assert planned(model, "int4", ["awq", "awq_clip"]).sourced


def test_a_plan_counts_what_statistics_need(model):
    widest = max(r.shape[-1] for r in planned(model, "int4", ["rtn"]).rows if r.scheme)
    found = [
        memory.statistics(planned(model, "int4", steps, draws), 1000)
        for steps, draws in ((["rtn"], 0), (["gptq"], 0), (["qep", "gptq"], 0), (["qep", "gptq"], 2))
    ]
    assert found[0] == 0
    assert found[1] >= 4 * widest**2 * (2 + cores())
    assert found[2] >= found[1] + 2 * 4 * widest**2 * (1 + cores())
    rows = [r for r in planned(model, "int4", ["rtn"]).rows if r.scheme and r.block]
    assert found[3] >= found[2] + sum(4 * r.shape[0] ** 2 for r in rows)  # G of all of them
    todo = planned(model, "int4", ["gptq"])
    assert memory.expected(todo, 1000) > found[1]
    plain, tuned = (planned(model, "int4", steps) for steps in (["rtn"], ["autoround"]))
    block = [r for r in rows if r.block == rows[0].block]
    more = sum(4 * 4 * np.prod(r.shape) for r in block)
    assert memory.expected(tuned, 1000) >= memory.expected(plain, 1000) + more


def test_sums_are_added_in_place_and_in_order():
    a, b = (np.random.default_rng(i).standard_normal((3, 3)).astype(np.float32) for i in (0, 1))
    total = calibration.Stats()
    total.add({"w": {"gram": a, "absmax": a[0], "count": np.int32(3)}})
    first = total["w"]["gram"]
    total.add({"w": {"gram": b, "absmax": b[0], "count": np.int32(4)}})
    merged = calibration.Stats({"w": {"gram": a, "absmax": a[0], "count": np.int32(3)}}).merge(
        {"w": {"gram": b, "absmax": b[0], "count": np.int32(4)}}
    )
    assert total["w"]["gram"] is first and first is not a
    for key, value in merged["w"].items():
        np.testing.assert_array_equal(total["w"][key], value)


def test_few_results_wait():
    begun, lock = [], threading.Lock()

    def work(i):
        with lock:
            begun.append(i)
        return jnp.square(i)

    results = flow(work, range(20))
    assert next(results) == 0
    assert len(begun) <= cores() + 2
    assert [int(r) for r in results] == [i * i for i in range(1, 20)]
