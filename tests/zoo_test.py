"""The zoo itself: every program runs, is differentiable, and says something true about every parameter."""

import math
import os
import subprocess
import sys
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import zoo
import zoo_modules
from jax.sharding import AxisType

DEVICES = 8
PROGRAMS = {p.name: p for p in zoo.programs()}
OPS = ("dot", "ragged_dot", "conv", "gather")
STATUS = ("site", "kept", "unreachable")


FAST = {"xla_backend_optimization_level": 0, "xla_llvm_disable_expensive_passes": True}  # to compile
NO_GRADIENT = {"stopped", "cond", "switch", "cond_chooses_weight"}  # of some weights: stopped, not taken


def leaves(tree):
    """The arrays as float32."""
    return [np.asarray(x, np.float32) for x in jax.tree.leaves(tree)]


def check_runs(p):
    """Finite outputs and gradients under jit; the gradients."""
    floats = {n: w for n, w in p.params.items() if jnp.issubdtype(w.dtype, jnp.floating)}

    def loss(floats):
        out = p.fn({**p.params, **floats}, *p.args)
        return sum((x.astype(jnp.float32) ** 2).mean() for x in jax.tree.leaves(out)), out

    derivative = jax.jacfwd if p.forward_only else jax.grad
    gradients, out = jax.jit(derivative(loss, has_aux=True), compiler_options=FAST)(floats)
    assert leaves(out) and all(np.isfinite(x).all() for x in leaves((out, gradients)))
    return gradients


def check_expected(p):
    """An expectation for every parameter, whose axes exist and whose producer is a parameter."""
    assert set(p.expected) == set(p.params)
    for name, e in p.expected.items():
        axes = set(range(p.params[name].ndim))
        assert e.status in STATUS
        assert e.producer is zoo.ANY or e.producer is None or e.producer in p.params
        assert all(op in OPS for op in e.also)
        if e.status is zoo.ANY:
            continue
        assert e.op in (OPS if e.status == "site" else ("",))
        contract = set() if e.contract is zoo.ANY else set(e.contract)
        batch = set() if e.batch is zoo.ANY else set(e.batch)
        assert contract | batch <= axes and not contract & batch
        assert bool(contract) == (e.status == "site") or e.contract is zoo.ANY


@pytest.mark.parametrize("name", PROGRAMS)
def test_runs_and_has_gradients(name):
    p = PROGRAMS[name]
    check_expected(p)
    gradients = check_runs(p)
    used = {n for n, g in gradients.items() if np.any(np.asarray(g) != 0)}
    sites = {n for n, e in p.expected.items() if e.status in ("site", "unreachable")}
    assert sites & set(gradients) <= used or name in NO_GRADIENT


def test_every_status_and_operation_occurs_and_names_are_unique():
    found = [e for p in PROGRAMS.values() for e in p.expected.values()]
    assert {e.status for e in found if e.status is not zoo.ANY} == set(STATUS)
    assert {e.op for e in found if e.op is not zoo.ANY} == {*OPS, ""}
    assert any(e.router for e in found) and any(e.channels for e in found)
    assert len(PROGRAMS) == len(zoo.programs()) > 80


def test_values_are_the_same_at_every_call():
    again = zoo.program("llama")
    assert all((again.params[n] == w).all() for n, w in PROGRAMS["llama"].params.items())


class Found(NamedTuple):
    """What a tracer reports; `mojax.trace.Site` has these fields and more."""

    weight: str
    op: str
    contract: tuple = ()
    batch: tuple = ()
    router: bool = False
    producer: str | None = None
    channels: tuple = ()


def told(p):
    """The sites of a tracer that says what is expected, with any value for what is left open."""
    sites = {n: e for n, e in p.expected.items() if e.status == "site" and e.op}
    return [Found(n, e.op, *(getattr(e, f) for f in zoo.FIELDS)) for n, e in sites.items()]


@pytest.mark.parametrize(
    "name, weight, wrong, says",
    [
        ("matmul", "w", {"contract": (1,)}, "contract is (1,), not (0,)"),
        ("vmap_both", "w", {"batch": ()}, "batch is (), not (0,)"),
        ("moe_einsum", "router", {"router": False}, "router is False, not True"),
        ("chain", "b", {"producer": None}, "producer is None, not a"),
        ("llama", "o", {"channels": ()}, "channels is (), not ((2, True), (2, False), (4, True))"),
        ("llama", "ln1", None, "a dot was found, but it is kept"),
        ("weight_squared", "w", None, "a dot was found, but it is unreachable"),
        ("conv", "w", {"op": "dot"}, "no conv was found, only ['dot']"),
    ],
)
def test_a_wrong_tracer_disagrees(name, weight, wrong, says):
    p = PROGRAMS[name]
    right = told(p)
    assert zoo.disagreements(p, right) == []
    sites = [s._replace(**wrong) if wrong and s.weight == weight else s for s in right]
    sites += [] if wrong else [Found(weight, "dot")]
    assert zoo.disagreements(p, sites) == [f"{name}: {weight}: {says}"]


def test_a_parameter_without_its_site_is_a_disagreement():
    p = PROGRAMS["tied"]
    right = [*told(p), Found("table", "gather", (0,))]
    assert zoo.disagreements(p, right) == []
    assert zoo.disagreements(p, right[1:]) == ["tied: table: no dot was found, only ['gather']"]


# What is said about sites is true: a program is the same when the scale of a channel moves


def scaled(w, axes, batch, s):
    """`w` times s [*batch, channels], the channels being the axes `axes` flattened."""
    kept = sorted({*axes, *batch})
    order = [*batch, *axes]
    s = s.reshape([w.shape[i] for i in order]).transpose([order.index(i) for i in kept])
    return w * jnp.expand_dims(s, [i for i in range(w.ndim) if i not in kept])


def producers(p):
    """Each producer and the parameters whose input it scales."""
    found = {}
    for name, e in p.expected.items():
        if e.producer is not zoo.ANY and e.producer is not None:
            found.setdefault(e.producer, []).append(name)
    return found


@pytest.mark.parametrize("name", [n for n, p in PROGRAMS.items() if producers(p)])
def test_producers_absorb_a_scale_of_every_channel(name):
    p = PROGRAMS[name]
    run = jax.jit(lambda params: p.fn(params, *p.args), compiler_options=FAST)

    def error(changed):
        pairs = zip(leaves(run(p.params)), leaves(run({**p.params, **changed})), strict=True)
        return max(np.abs(a - b).max() / np.abs(a).max() for a, b in pairs)

    for producer, group in producers(p).items():
        changed = moved(p, producer, group)
        assert error(changed) < 1e-4
        for one in changed:  # every one of them is needed
            assert error({n: w for n, w in changed.items() if n != one}) > 1e-3


def moved(p, producer, group):
    """The producer divided by a scale of its rows, and the group multiplied by it."""
    gain, e = p.params[producer], p.expected[producer]
    taken = e.contract if e.status == "site" else ()
    layers = p.expected[group[0]].batch if len(p.expected[group[0]].batch) == 1 else ()
    layers = layers if e.batch == layers or (e.status == "kept" and gain.ndim == 2) else ()
    rows = [i for i in range(gain.ndim) if i not in (*taken, *layers)]
    shape = [gain.shape[i] for i in (*layers, *rows)]
    s = jnp.exp(zoo.floats(*shape, seed=99, scale=0.5))
    out = {producer: scaled(gain, rows, layers, 1 / s)}
    for name in group:
        other = p.expected[name]
        channels = s
        if other.channels:
            factors = [n if has else 1 for n, has in other.channels]
            channels = s.reshape(*s.shape[: len(layers)], *factors)
            channels = jnp.broadcast_to(channels, (*s.shape[: len(layers)], *(n for n, _ in other.channels)))
        axes = (
            other.batch if channels.size > math.prod(p.params[name].shape[i] for i in other.contract) else ()
        )
        out[name] = scaled(p.params[name], other.contract, axes, channels)
    return out


# Modules and meshes


@pytest.mark.parametrize("model", ["nnx_model", "linen_model"])
def test_flax_module(model):
    pytest.importorskip("flax")
    found = getattr(zoo_modules, model)()
    check_expected(found.program)
    check_runs(found.program)


def test_sharded():
    if len(jax.devices()) < DEVICES:  # how many there are is settled before JAX starts
        env = {**os.environ, "XLA_FLAGS": f"--xla_force_host_platform_device_count={DEVICES}"}
        command = [sys.executable, "-m", "pytest", "-q", f"{__file__}::test_sharded"]
        done = subprocess.run(command, env=env, capture_output=True, text=True)
        assert done.returncode == 0, done.stdout + done.stderr
        return
    p = zoo_modules.sharded(jax.make_mesh((DEVICES,), ("model",), axis_types=(AxisType.Auto,)))
    check_expected(p)
    check_runs(p)
    h = jax.nn.silu(p.args[0] @ p.params["gate"]) * (p.args[0] @ p.params["up"])
    np.testing.assert_allclose(jax.jit(p.fn)(p.params, *p.args), h @ p.params["down"], 1e-4, 1e-5)
