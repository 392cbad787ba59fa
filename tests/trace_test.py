"""Sites: which parameters read the same input, and which parameter can absorb a scale of it."""

import time

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import lax
from jax.ad_checkpoint import checkpoint_name

from mojax import find
from mojax.errors import InputError
from mojax.trace import sites

HIDDEN, INNER, HEADS, KV, SIZE, VOCAB = 16, 24, 4, 2, 4, 20
SHAPES = {
    "input_layernorm.weight": (HIDDEN,),
    "self_attn.q_proj.weight": (HEADS * SIZE, HIDDEN),
    "self_attn.k_proj.weight": (KV * SIZE, HIDDEN),
    "self_attn.v_proj.weight": (KV * SIZE, HIDDEN),
    "self_attn.o_proj.weight": (HIDDEN, HEADS * SIZE),
    "post_attention_layernorm.weight": (HIDDEN,),
    "mlp.gate_proj.weight": (INNER, HIDDEN),
    "mlp.up_proj.weight": (INNER, HIDDEN),
    "mlp.down_proj.weight": (HIDDEN, INNER),
}
MODEL = {"embed.weight": (VOCAB, HIDDEN), "norm.weight": (HIDDEN,)} | {
    f"layers.{i}.{name}": shape for i in (0, 1) for name, shape in SHAPES.items()
}


def weights(shapes, seed=0):
    rng = np.random.default_rng(seed)
    return {
        n: jnp.asarray(0.3 * rng.standard_normal(s) + (len(s) == 1), jnp.float32) for n, s in shapes.items()
    }


def rms_norm(x, gain):
    x32 = x.astype(jnp.float32)
    return (x32 * lax.rsqrt((x32 * x32).mean(-1, keepdims=True) + 1e-6)).astype(x.dtype) * gain[None, None]


def rotate(x):
    a, b = jnp.split(x, 2, -1)
    angle = jnp.arange(x.shape[1], dtype=x.dtype)[None, :, None, None] / 10
    return jnp.concatenate(
        [a * jnp.cos(angle) - b * jnp.sin(angle), b * jnp.cos(angle) + a * jnp.sin(angle)], -1
    )


def block(p, x):
    """A Llama decoder layer: rotary embedding, grouped heads, SwiGLU."""
    batch, length, _ = x.shape
    h = rms_norm(x, p["input_layernorm.weight"])
    q, k, v = ((h @ p[f"self_attn.{n}_proj.weight"].T).reshape(batch, length, -1, SIZE) for n in "qkv")
    k = checkpoint_name(rotate(k), "self_attn.k_cache")
    v = checkpoint_name(v, "self_attn.v_cache")
    k, v = (jnp.repeat(t, HEADS // KV, 2) for t in (k, v))
    a = jax.nn.softmax(jnp.einsum("bqhd,bshd->bhqs", rotate(q), k))
    o = jnp.einsum("bhqs,bshd->bqhd", a, v).reshape(batch, length, -1)
    x = x + o @ p["self_attn.o_proj.weight"].T
    h = rms_norm(x, p["post_attention_layernorm.weight"])
    gate, up = (h @ p[f"mlp.{n}_proj.weight"].T for n in ("gate", "up"))
    return x + (jax.nn.silu(gate) * up) @ p["mlp.down_proj.weight"].T


def model(p, tokens):
    x = p["embed.weight"][tokens]
    for i in (0, 1):
        x = block({n: p[f"layers.{i}.{n}"] for n in SHAPES}, x)
    return rms_norm(x, p["norm.weight"]) @ p["embed.weight"].T  # tied


TOKENS = jnp.asarray(np.random.default_rng(1).integers(0, VOCAB, (2, 5)))
X = jnp.asarray(np.random.default_rng(2).standard_normal((2, 5, HIDDEN)), jnp.float32)


def groups(found):
    """The weights of each group of dots, in order."""
    by = {}
    for s in found:
        if s.op == "dot":
            by.setdefault(s.group, set()).add(s.weight)
    return list(by.values())


def test_block_has_the_groups_and_producers_of_a_decoder_layer():
    found = sites(block, weights(SHAPES), X)
    assert groups(found) == [
        {"self_attn.q_proj.weight", "self_attn.k_proj.weight", "self_attn.v_proj.weight"},
        {"self_attn.o_proj.weight"},
        {"mlp.gate_proj.weight", "mlp.up_proj.weight"},
        {"mlp.down_proj.weight"},
    ]
    assert {s.weight: s.producer for s in found if s.op == "dot"} == {
        **{f"self_attn.{n}_proj.weight": "input_layernorm.weight" for n in "qkv"},
        "self_attn.o_proj.weight": None,
        "mlp.gate_proj.weight": "post_attention_layernorm.weight",
        "mlp.up_proj.weight": "post_attention_layernorm.weight",
        "mlp.down_proj.weight": "mlp.up_proj.weight",
    }
    assert all(s.contract == (1,) for s in found if s.op == "dot")
    assert [s.weight for s in found if s.op == "cache"] == ["self_attn.k_cache", "self_attn.v_cache"]


def test_shapes_alone_are_enough():
    abstract = {n: jax.ShapeDtypeStruct(s, jnp.float32) for n, s in SHAPES.items()}
    assert sites(block, abstract, jax.ShapeDtypeStruct(X.shape, X.dtype)) == sites(block, weights(SHAPES), X)


def test_tied_embedding_is_a_lookup_and_a_dot_that_no_norm_may_scale():
    found = [s for s in sites(model, weights(MODEL), TOKENS) if s.weight == "embed.weight"]
    assert [(s.op, s.contract) for s in found] == [("gather", (0,)), ("dot", (1,))]
    assert found[1].producer is None


def test_groups_of_different_layers_differ():
    assert len(groups(sites(model, weights(MODEL), TOKENS))) == 2 * 4 + 1


W = {
    "a": (6, 4),
    "b": (6, 4),
    "c": (4, 6),
    "g": (4,),
    "pair": (2,),
    "stack": (3, 4, 4),
    "fused": (12, 4),
    "heads": (4, 2, 3),
}
P = weights(W)
V = jnp.asarray(np.random.default_rng(3).standard_normal((5, 4)), jnp.float32)


def einsum_either_side(p, x):
    return jnp.einsum("ti,oi->to", x, p["a"]), jnp.einsum("oi,ti->to", p["b"], x)


def through_reshape_and_cast(p, x):
    return x.reshape(5, 2, 2).astype(jnp.bfloat16).reshape(1, 5, 4) @ p["a"].T.astype(jnp.bfloat16), x @ p[
        "b"
    ].T


def two_contracted_axes(p, x):
    y = (x @ p["a"].T).reshape(5, 2, 3)
    return jnp.einsum("thd,ohd->to", y, p["heads"]), y.reshape(5, 6) @ p["b"]


def fused_rows(p, x):
    return [x @ w.T for w in jnp.split(p["fused"], 3)]


def inner_jit(p, x):
    return jax.jit(lambda w, x: x @ w.T)(p["a"], x), x @ p["b"].T


def remat(p, x):
    return jax.checkpoint(lambda a, x: x @ a.T)(p["a"], x), x @ p["b"].T


def branches(p, x):
    return lax.cond(x.sum() > 0, lambda x: x @ p["a"].T, lambda x: x @ p["b"].T, x)


@jax.custom_vjp
def linear(x, w):
    return x @ w.T


linear.defvjp(lambda x, w: (linear(x, w), (x, w)), lambda r, t: (t @ r[1], t.T @ r[0]))


def custom_rule(p, x):
    return linear(x, p["a"]), x @ p["b"].T


def while_body(p, x):
    return lax.while_loop(lambda x: x.sum() < 9, lambda x: (x @ p["a"].T + x @ p["b"].T)[:, :4] + 1, x)


@pytest.mark.parametrize(
    ("fn", "expected"),
    [
        (einsum_either_side, [{"a", "b"}]),
        (through_reshape_and_cast, [{"a", "b"}]),
        (two_contracted_axes, [{"a"}, {"heads", "b"}]),
        (fused_rows, [{"fused"}]),
        (inner_jit, [{"a", "b"}]),
        (remat, [{"a", "b"}]),
        (branches, [{"a", "b"}]),
        (custom_rule, [{"a", "b"}]),
        (while_body, [{"a", "b"}]),
        (lambda p, x: lax.scan(lambda c, w: (jnp.tanh(c @ w), None), x, p["stack"])[0], [{"stack"}]),
        (lambda p, x: (x @ p["a"].T, jnp.tanh(x) @ p["b"].T), [{"a"}, {"b"}]),
        (lambda p, x: (x[:, :2] @ p["a"].T[:2], x[:, 2:] @ p["b"].T[2:]), [{"a"}, {"b"}]),
        (lambda p, x: (x[:3] @ p["a"].T, x @ p["b"].T), [{"a", "b"}]),
        (lambda p, x: x @ (p["c"] @ p["a"]), []),
        (lambda p, x: x @ (2 * p["c"]), []),
        (lambda p, x: x @ jax.checkpoint(lambda w: w.T)(p["a"]), []),
    ],
)
def test_groups(fn, expected):
    assert groups(sites(fn, P, V)) == expected


def test_contract_names_the_axes_of_the_leaf():
    found = sites(lambda p, x: (two_contracted_axes(p, x), x @ p["c"], x @ p["stack"][1]), P, V)
    assert {s.weight: s.contract for s in found} == {
        "a": (1,),
        "heads": (1, 2),
        "b": (0,),
        "c": (0,),
        "stack": (1,),
    }


def gain(p, x):
    return x * p["g"][None]


PRODUCERS = {
    "gain": (lambda p, x: gain(p, jnp.tanh(x)) @ p["a"].T, {"a": "g"}),
    "gain, cast and reshaped": (
        lambda p, x: (x[None] * p["g"].astype(x.dtype)[None, None]).reshape(5, 2, 2).reshape(5, 4) @ p["a"].T,
        {"a": "g"},
    ),
    "gain, then divided": (lambda p, x: gain(p, x) / (1 + jnp.abs(x)) @ p["a"].T, {"a": "g"}),
    "gain of a scan's constant": (
        lambda p, x: lax.scan(lambda c, w: (jnp.tanh(c + gain(p, x) @ w), None), x, p["stack"])[0],
        {"stack": "g"},
    ),
    "linear": (lambda p, x: (x @ p["a"].T) @ p["b"], {"a": None, "b": "a"}),
    "linear, many free axes": (
        lambda p, x: jnp.einsum("ti,ihd->thd", x, p["heads"]).reshape(5, 6) @ p["b"],
        {"heads": None, "b": "heads"},
    ),
    "linear, weight first": (
        lambda p, x: jnp.einsum("ot,oi->ti", p["a"] @ x.T, p["b"]),
        {"a": None, "b": "a"},
    ),
    "gated": (
        lambda p, x: (jax.nn.silu(x @ p["a"].T) * (x @ p["b"].T)) @ p["c"].T,
        {"a": None, "b": None, "c": "b"},
    ),
    "gain used by two groups": (
        lambda p, x: (gain(p, x) @ p["a"].T, gain(p, 2 * x) @ p["b"].T),
        {"a": None, "b": None},
    ),
    "product used elsewhere": (lambda p, x: (gain(p, x) @ p["a"].T, gain(p, x)), {"a": None}),
    "residual": (lambda p, x: (lambda h: h + h @ p["a"].T @ p["b"])(gain(p, x)), {"a": None, "b": "a"}),
    "weight used elsewhere": (lambda p, x: (gain(p, x) @ p["a"].T, p["a"].sum()), {"a": None}),
    "bias between": (lambda p, x: (x @ p["a"].T + 1) @ p["b"], {"a": None, "b": None}),
    "activation between": (lambda p, x: jnp.tanh(x @ p["a"].T) @ p["b"], {"a": None, "b": None}),
    "square": (lambda p, x: (lambda y: y * y)(x @ p["a"].T) @ p["b"], {"a": None, "b": None}),
    "divisor": (lambda p, x: (1 / (x @ p["a"].T)) @ p["b"], {"a": None, "b": None}),
    "linear used elsewhere": (lambda p, x: (x @ p["a"].T @ p["b"], p["a"].sum()), {"a": None, "b": None}),
    "linear, weight first in a batch": (
        lambda p, x: (jnp.broadcast_to(p["a"][None], (5, 6, 4)) @ x[:, :, None]).reshape(5, 6) @ p["b"],
        {"a": None, "b": "a"},
    ),
    "linear in remat": (
        lambda p, x: jax.checkpoint(lambda a, x: x @ a.T)(p["a"], x) @ p["b"],
        {"a": None, "b": "a"},
    ),
    "gain plus one": (lambda p, x: x * (1 + p["g"])[None] @ p["a"].T, {"a": None}),
    "gain along tokens": (lambda p, x: (x[:4] * p["g"][:, None]) @ p["a"].T, {"a": None}),
    "part of the channels": (lambda p, x: gain(p, x)[:, :2] @ p["a"].T[:2], {"a": None}),
    "gain per head": (
        lambda p, x: (x.reshape(5, 2, 2) * p["pair"][None, None]).reshape(5, 4) @ p["a"].T,
        {"a": None},
    ),
    "heads repeated": (lambda p, x: jnp.repeat(x @ p["c"][:, :2], 3, 1) @ p["b"], {"c": None, "b": None}),
}


@pytest.mark.parametrize("name", PRODUCERS)
def test_producers(name):
    fn, expected = PRODUCERS[name]
    found = sites(fn, P, V)
    assert {s.weight: s.producer for s in found} == expected
    check_scaling(fn, P, V, found)


def check_scaling(fn, p, x, found):
    """Dividing every producer by s and multiplying its consumers by s leaves the function as it was."""
    rng, new = np.random.default_rng(4), dict(p)
    for group in {s.group for s in found if s.producer}:
        readers = {s.weight: s for s in found if s.group == group}
        first = next(iter(readers.values()))
        n = [p[first.weight].shape[i] for i in first.contract]
        s = jnp.asarray(np.exp(rng.standard_normal(int(np.prod(n)))), jnp.float32)
        for w, r in readers.items():
            scale = s.reshape([k if i in r.contract else 1 for i, k in enumerate(p[w].shape)])
            new[w] = new[w] * jnp.broadcast_to(scale, new[w].shape)
        made, summed = p[first.producer], [r.contract for r in found if r.weight == first.producer]
        rows = [1 if summed and i in summed[0] else k for i, k in enumerate(made.shape)]
        new[first.producer] = new[first.producer] / jnp.broadcast_to(s.reshape(rows), made.shape)
    for a, b in zip(jax.tree.leaves(fn(p, x)), jax.tree.leaves(fn(new, x)), strict=True):
        np.testing.assert_allclose(a, b, rtol=2e-4, atol=2e-5)


def test_scaling_every_producer_preserves_a_model():
    p = weights(MODEL)
    found = sites(model, p, TOKENS)
    assert len({s.group for s in found if s.producer}) == 6
    check_scaling(model, p, TOKENS, found)


def test_48_layers_trace_in_seconds():
    shapes = {
        f"layers.{i}.{n}": jax.ShapeDtypeStruct(s, jnp.float32) for i in range(48) for n, s in SHAPES.items()
    }

    def deep(p, x):
        for i in range(48):
            x = block({n: p[f"layers.{i}.{n}"] for n in SHAPES}, x)
        return x

    start = time.perf_counter()
    assert len([s for s in sites(deep, shapes, X) if s.op == "dot"]) == 48 * 7
    assert time.perf_counter() - start < 20


def test_params_must_be_a_flat_dict_of_arrays():
    with pytest.raises(InputError, match="params\\['layer'\\] is dict"):
        sites(lambda p, x: x, {"layer": {"w": V}}, V)


@pytest.mark.parametrize("family", find.names("models"))
def test_what_a_server_fuses_reads_one_input(family):
    module = find.find("models", family)
    config = {
        "model_type": family,
        "vocab_size": 32,
        "hidden_size": 16,
        "intermediate_size": 32,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "head_dim": 4,
        "num_hidden_layers": 2,
        "hidden_act": "silu",
        "rms_norm_eps": 1e-5,
        "max_position_embeddings": 64,
        "tie_word_embeddings": False,
    }
    c = module.configure(config)
    first = module.blocks(c)[0]
    local = {
        n.removeprefix(first.prefix): jax.ShapeDtypeStruct(s, jnp.bfloat16)
        for n, s in module.shapes(c).items()
        if n.startswith(first.prefix)
    }
    x = jax.ShapeDtypeStruct((1, 6, 16), jnp.bfloat16)
    found = sites(
        lambda p, x, positions: module.block(c, first.kind, p, x, positions),
        local,
        x,
        jax.ShapeDtypeStruct((6,), jnp.int32),
    )
    for fused in module.FUSED:
        assert any({f"{m}.weight" for m in fused} <= group for group in groups(found)), fused
