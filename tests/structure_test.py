"""The zoo: every program's sites, coverage, producers and routers are what is expected, and true."""

import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import scaling
import zoo
import zoo_blocks
import zoo_modules
from jax import lax
from jax.sharding import AbstractMesh, AxisType
from jax.sharding import PartitionSpec as P

from mojax.structure.coverage import coverage
from mojax.trace import graph, graph_sites, sites

PROGRAMS = {p.name: p for p in zoo.programs()}


def read(p):
    program = graph(p.fn, p.params, *p.args)
    return graph_sites(program), coverage(program)


@pytest.mark.parametrize("name", PROGRAMS)
def test_sites_and_coverage_are_as_expected(name):
    p = PROGRAMS[name]
    found, said = read(p)
    assert zoo.disagreements(p, found) == []
    assert set(said) == set(p.params)
    for leaf, e in p.expected.items():
        dots = [s for s in found if s.weight == leaf and s.op in ("dot", "ragged_dot", "conv")]
        lookups = [s for s in found if s.weight == leaf and s.op == "gather"]
        assert said[leaf].startswith("site") == bool(dots)
        assert not lookups or "looked up by index" in said[leaf]
        if e.status is not zoo.ANY and not lookups:
            assert said[leaf].startswith(e.status), said[leaf]


def test_absent_things_are_not_reported():
    assert not any(
        s.router for s in sites(PROGRAMS["llama"].fn, PROGRAMS["llama"].params, *PROGRAMS["llama"].args)
    )


PROVED = [n for n, p in PROGRAMS.items() if any(s.producer for s in sites(p.fn, p.params, *p.args))]


@pytest.mark.parametrize("name", PROVED)
def test_every_producer_absorbs_a_scale(name):
    p = PROGRAMS[name]
    scaling.check(p.fn, p.params, p.args, sites(p.fn, p.params, *p.args))


def test_enough_programs_are_proved():
    assert {"llama", "llama_heads", "llama_scan", "gpt2", "mla", "vit", "moe_einsum", "moe_ragged"} <= {
        *PROVED
    }


@pytest.mark.parametrize("name", ["gpt2", "vit"])
def test_the_proof_fails_without_the_bias(name):
    p = PROGRAMS[name]
    params = {n: np.asarray(w, np.float64) for n, w in p.params.items()}
    found = sites(p.fn, p.params, *p.args)
    biased = [[s._replace(also=()) for s in g] for g in scaling.grouped(found) if g[0].also]
    changed = [scaling.move(params, found, group) for group in biased]
    assert changed and min(scaling.differences(p.fn, params, p.args, changed)) > 1e-3


@pytest.mark.parametrize("name", ["moe_einsum", "moe_ragged", "moe_vmap"])
def test_experts_in_a_scan_over_layers(name):
    layer = PROGRAMS[name]
    stacks = {n: jnp.stack([w, jnp.roll(w, 1, 0), -w]) for n, w in layer.params.items()}

    def fn(p, x):
        return jax.lax.scan(lambda x, row: (jnp.tanh(layer.fn(row, x)), None), x, p)[0]

    found = {s.weight: s for s in sites(fn, stacks, *layer.args)}
    one = {s.weight: s for s in sites(layer.fn, layer.params, *layer.args)}
    for n, s in found.items():
        assert (s.producer, s.router) == (one[n].producer, one[n].router)
        assert s.batch == (0, *(i + 1 for i in one[n].batch)) and s.contract == (one[n].contract[0] + 1,)
    assert found["down"].producer == "up" and found["down"].batch == (0, 1)
    scaling.check(fn, stacks, layer.args, tuple(found.values()))


@pytest.mark.parametrize("model", ["nnx_model", "linen_model"])
def test_modules_of_flax(model):
    pytest.importorskip("flax")
    p = getattr(zoo_modules, model)().program
    found, said = read(p)
    assert zoo.disagreements(p, found) == []
    assert {n for n, words in said.items() if words.startswith("site")} == {
        s.weight for s in found if s.op == "dot"
    }
    scaling.check(p.fn, p.params, p.args, found)


@pytest.mark.parametrize(
    "up, down, producer",
    [
        (P(None, "x"), P("x", None), "up"),
        (P(), P(), "up"),
        (P("y", None), P(None, "y"), "up"),
        (P(None, "x"), P("y", None), None),
        (P(None, ("x", "y")), P(("x", "y"), None), "up"),
        (P(None, ("x", "y")), P(("y", "x"), None), None),
    ],
)
def test_a_producer_is_split_over_devices_as_its_group_is(up, down, producer):
    mesh = AbstractMesh((2, 2), ("x", "y"), axis_types=(AxisType.Auto,) * 2)
    rows = P(None, "y") if up == P("y", None) else P()
    out = P(None, down[1]) if len(down) > 1 else P()

    def fn(p, x):
        run = jax.shard_map(
            lambda x, up, down: x @ up @ down,
            mesh=mesh,
            in_specs=(rows, up, down),
            out_specs=out,
            check_vma=False,
        )
        return run(x, p["up"], p["down"])

    params = {"up": zoo.floats(16, 24), "down": zoo.floats(24, 16)}
    found = {s.weight: s.producer for s in sites(fn, params, zoo.floats(4, 16))}
    assert found == {"up": None, "down": producer}


# What coverage says of single uses

D = 8
X = zoo.floats(3, D)
SHAPES = {"w": (D, D), "v": (D, D), "g": (D,), "table": (5, D), "e": (4, D, D), "long": (1, D, 1)}
PARAMS = {n: zoo.floats(*s, seed=i) for i, (n, s) in enumerate(SHAPES.items())} | {
    "n": jnp.asarray([2, 0, 1])
}
SAID = {
    "sum with a product": (
        lambda p, x: x @ (p["w"] + p["v"] @ p["e"][0]),
        {"w": "unreachable: add at .* before dot at ", "v": "unreachable: dot at .* before dot at "},
    ),
    "a site and more": (
        lambda p, x: x @ p["w"] + x * p["w"][:1],
        {"w": "site; also multiplies an activation at structure_test.py:"},
    ),
    "a site, and arithmetic": (
        lambda p, x: x @ p["w"] + x @ (2 * p["w"]),
        {"w": "site; also mul at .* before dot at "},
    ),
    "an activation first": (
        lambda p, x: (x * p["w"][:3]) @ p["v"],
        {"w": "kept: multiplies an activation at ", "v": "site$"},
    ),
    "gain plus one": (
        lambda p, x: (x * (1 + p["g"])[None]) @ p["w"],
        {"g": "kept: one axis only, used through add at .*, multiplies an activation at "},
    ),
    "one long axis": (lambda p, x: x + p["long"][:, :, 0], {"long": "kept: one axis only, is added to "}),
    "carried by a loop": (
        lambda p, x: lax.fori_loop(0, 3, lambda i, s: (s[0], s[1] @ s[0]), (2 * p["w"], x))[1],
        {"w": "unreachable: mul at .* before dot at "},
    ),
    "changed in a loop": (
        lambda p, x: x @ lax.fori_loop(0, 3, lambda i, w: jnp.tanh(w), p["w"]),
        {"w": "unreachable: a loop or a branch before dot at "},
    ),
    "remat returns it": (
        lambda p, x: x @ jax.checkpoint(lambda w: w.T)(p["w"]),
        {"w": "unreachable: a loop or a branch before dot at "},
    ),
    "looked up": (
        lambda p, x: p["table"][p["n"]] + x,
        {"table": "kept: looked up by index|kept: used through"},
    ),
    "looked up matrices": (
        lambda p, x: jnp.einsum("td,tdf->tf", x, p["e"][jnp.argmax(x, 1)]),
        {"e": "kept: looked up by index at .*, then dot at "},
    ),
    "rows of a loop": (
        lambda p, x: lax.scan(lambda x, w: (x @ (w + 1), None), x, p["e"])[0],
        {"e": "unreachable: add at .* before dot at "},
    ),
    "returned": (lambda p, x: (x, p["w"] + 1), {"w": "kept: used through add at .*, returned"}),
    "decides a branch": (
        lambda p, x: lax.cond(p["w"][0, 0] > 0, lambda: x, lambda: -x),
        {"w": "kept: used through gt at .*, returned, or decides"},
    ),
    "convolved": (
        lambda p, x: lax.conv_general_dilated(
            x[None], 2 * p["w"][None], (1,), "SAME", dimension_numbers=("NWC", "WIO", "NWC")
        ),
        {"w": "unreachable: mul at .* before convolution at "},
    ),
    "never used": (lambda p, x: x, {n: "kept: never used$" for n in PARAMS}),
}


@pytest.mark.parametrize("name", SAID)
def test_coverage_says(name):
    fn, expected = SAID[name]
    said = coverage(graph(fn, PARAMS, X))
    for leaf, words in expected.items():
        assert re.match(words, said[leaf]), said[leaf]


ROUTERS = {
    "softmax, then top-k": (lambda p, x: lax.top_k(jax.nn.softmax(x @ p["w"]), 2)[1], True),
    "bias and groups": (
        lambda p, x: lax.top_k((jax.nn.sigmoid(x @ p["w"]) + p["g"][None]).reshape(3, 2, 4).sum(-1), 1)[1],
        True,
    ),
    "joined": (lambda p, x: lax.top_k(jnp.concatenate([x @ p["w"], x], 1), 2)[1], True),
    "argmax": (lambda p, x: jnp.argmax(x @ p["w"], -1), True),
    "approximate": (lambda p, x: lax.approx_max_k(x @ p["w"], 2)[1], True),
    "in a branch": (
        lambda p, x: lax.cond(
            x.sum() > 0, lambda: lax.top_k(x @ p["w"], 2)[1], lambda: jnp.zeros((3, 2), jnp.int32)
        ),
        True,
    ),
    "in a loop": (lambda p, x: lax.scan(lambda c, x: (c, lax.top_k(x @ p["w"], 2)[1]), 0, x)[1], True),
    "another site between": (lambda p, x: lax.top_k(x @ p["w"] @ p["v"], 2)[1], False),
    "no top-k": (lambda p, x: jax.nn.softmax(x @ p["w"]), False),
    "after the top-k": (lambda p, x: lax.top_k(x, 2)[0] @ p["w"][:2], False),
}


@pytest.mark.parametrize("name", ROUTERS)
def test_router(name):
    fn, expected = ROUTERS[name]
    assert [s.router for s in sites(fn, PARAMS, X) if s.weight == "w"] == [expected]


def test_48_layers_of_experts():
    p = PROGRAMS["moe_ragged"]
    attention = zoo.program("llama").params
    abstract = {n: jax.ShapeDtypeStruct(w.shape, w.dtype) for n, w in {**attention, **p.params}.items()}
    layers = {f"{i}.{n}": w for i in range(48) for n, w in abstract.items()}

    def deep(params, x):
        for i in range(48):
            layer = {n: params[f"{i}.{n}"] for n in abstract}
            x = zoo_blocks.llama(layer, x)
            x = zoo_blocks.moe_ragged(layer, x[0])[None]
        return x

    program = graph(deep, layers, jax.ShapeDtypeStruct((1, 5, zoo.HIDDEN), jnp.float32))
    found, said = graph_sites(program), coverage(program)
    assert len(program.ops) > 5000 and sum(s.router for s in found) == 48
    assert all(said[f"{i}.{n}"] == "site" for i in range(48) for n in ("q", "router"))
