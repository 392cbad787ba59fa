"""Sites: which parameters read the same input, and which parameter can absorb a scale of it."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import scaling
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
    x32 = x.astype(jnp.promote_types(x.dtype, jnp.float32))
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
        if s.op in ("dot", "ragged_dot"):
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
        "self_attn.o_proj.weight": "self_attn.v_proj.weight",
        "mlp.gate_proj.weight": "post_attention_layernorm.weight",
        "mlp.up_proj.weight": "post_attention_layernorm.weight",
        "mlp.down_proj.weight": "mlp.up_proj.weight",
    }
    assert all(s.contract == (1,) for s in found if s.op == "dot")
    grouped = {"self_attn.o_proj.weight": ((KV, True), (HEADS // KV, False), (SIZE, True))}
    assert {s.weight: s.channels for s in found if s.channels} == grouped
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
    "bias": (6,),
    "shift": (4,),
    "gains": (3, 4),
    "up": (3, 4, 6),
    "down": (3, 6, 4),
    "wide": (8, 4),
    "square": (4, 4),
    "narrow": (4, 2),
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
        {"a": "pair"},
    ),
    "heads repeated": (lambda p, x: jnp.repeat(x @ p["c"][:, :2], 3, 1) @ p["b"], {"c": None, "b": None}),
}


def scanned(step):
    """A scan over all stacks."""

    def fn(p, x):
        stacks = {n: p[n] for n in ("gains", "up", "down", "stack")}
        return lax.scan(lambda x, row: (jnp.tanh(x + step({**p, **row}, x)), None), x, stacks)[0]

    return fn


def attend(query, v):
    """Attention weights that depend on query [5, heads, n] times v [5, heads, 2]."""
    a = jax.nn.softmax(jnp.einsum("qhd,khd->hqk", query, query))
    return jnp.einsum("hqk,khd->qhd", a, v)


GROUPED = ((2, True), (3, False), (2, True))
CHANNELS = {
    "attention": {"a": ((4, True),)},
    "attention, gains": {"a": ((4, True),)},
    "attention, queries and values": {"b": ((6, True),)},
    "gain per head": {"a": ((2, False), (2, True))},
    "attention, value heads repeated": {"fused": GROUPED},
    "attention, value heads tiled": {"fused": ((3, False), (4, True))},
    "attention, one value head": {"fused": ((6, False), (2, True))},
}
ALSO = {
    "bias": {"b": ("bias",)},
    "bias taken away": {"b": ("bias",)},
    "gain, then bias": {"a": ("shift",)},
}


def heads(t):
    return t.reshape(5, -1, 2)


def latent(p, x):
    """Keys and values in one weight, [heads, (key, value)]."""
    k, v = jnp.split((x @ p["wide"].T).reshape(5, 2, 4), 2, -1)
    return attend(k, v).reshape(5, 4) @ p["c"]


def ragged(p, x, permute=lambda t: t):
    sizes = jnp.asarray([2, 1, 2], jnp.int32)
    return lax.ragged_dot(permute(lax.ragged_dot(gain(p, x), p["up"], sizes)), p["down"], sizes)


def experts(p, x, order=lambda t: t):
    u = jnp.einsum("td,edf->etf", x, p["up"])
    return jnp.einsum("etf,efd->etd", order(u) * jnp.tanh(x.mean()), p["down"])


def many(p, v):
    """Six heads."""
    return attend(heads(jnp.tile(V, (1, 3))), v).reshape(5, 12) @ p["fused"]


PRODUCERS |= {
    "bias": (lambda p, x: (x @ p["a"].T + p["bias"][None]) @ p["b"], {"a": None, "b": "a"}),
    "bias taken away": (lambda p, x: (p["bias"][None] - x @ p["a"].T) @ p["b"], {"a": None, "b": "a"}),
    "bias, then gain": (lambda p, x: gain(p, x + p["shift"][None]) @ p["a"].T, {"a": "g"}),
    "gain, then bias": (lambda p, x: (gain(p, x) + p["shift"][None]) @ p["a"].T, {"a": "g"}),
    "bias for all channels": (lambda p, x: (gain(p, x) + p["g"][:1, None]) @ p["a"].T, {"a": None}),
    "bias of another shape": (
        lambda p, x: (heads(gain(p, x)) + p["pair"][None, None]).reshape(5, 4) @ p["a"].T,
        {"a": None},
    ),
    "bias used twice": (
        lambda p, x: ((gain(p, x) + p["shift"][None]) @ p["a"].T, x + p["shift"][None]),
        {"a": None},
    ),
    "activation added": (lambda p, x: (gain(p, x) + x) @ p["a"].T, {"a": None}),
    "number for all channels": (lambda p, x: (x * p["pair"][:1, None]) @ p["a"].T, {"a": None}),
    "gain of a row": (scanned(lambda p, x: x * p["gains"][None] @ p["stack"]), {"stack": "gains"}),
    "weight of a row": (scanned(lambda p, x: x @ p["up"] @ p["down"]), {"up": None, "down": "up"}),
    "gain of a row, weight of all": (
        scanned(lambda p, x: (x * p["gains"][None]) @ p["c"][:, :4] + gain(p, x) @ p["stack"]),
        {"c": None, "stack": "g"},
    ),
    "gain of the row before": (
        lambda p, x: lax.scan(
            lambda x, i: (jnp.tanh((x * p["gains"][i - 1][None]) @ p["stack"][i]), None), x, jnp.arange(3)
        )[0],
        {"stack": None},
    ),
    "gain of the last row": (
        lambda p, x: lax.scan(
            lambda x, row: (jnp.tanh((x * row[0][None]) @ row[1]), None), x, (p["gains"][::-1], p["stack"])
        )[0],
        {"stack": None},
    ),
    "one row": (lambda p, x: (x * p["gains"][0][None]) @ p["stack"][1], {"stack": None}),
    "gain for rows": (
        lambda p, x: gain(p, x) @ p["stack"][0] + gain(p, jnp.tanh(x)) @ p["stack"][1],
        {"stack": None},
    ),
    "same input for rows": (
        lambda p, x: (lambda h: (h @ p["stack"][0], h @ p["stack"][1]))(gain(p, x)),
        {"stack": "g"},
    ),
    "loops of their own": (
        lambda p, x: lax.scan(
            lambda x, g: (lax.scan(lambda x, w: (jnp.tanh((x * g[None]) @ w), None), x, p["stack"])[0], None),
            x,
            p["gains"],
        )[0],
        {"stack": None},
    ),
    "attention": (
        lambda p, x: attend(heads(x), heads(x @ p["square"])).reshape(5, 4) @ p["a"].T,
        {"square": None, "a": "square"},
    ),
    "attention, part of the values": (
        lambda p, x: attend(heads(x), heads(x @ p["c"][:, :4])).reshape(5, 4) @ p["a"].T,
        {"c": None, "a": None},
    ),
    "attention, gains": (
        lambda p, x: attend(heads(x), heads(gain(p, x))).reshape(5, 4) @ p["a"].T,
        {"a": "g"},
    ),
    "attention, queries and values": (
        lambda p, x: attend(heads(x @ p["a"].T), heads(x @ p["c"])).reshape(5, 6) @ p["b"],
        {"a": None, "c": None, "b": "c"},
    ),
    "attention, value heads repeated": (
        lambda p, x: many(p, jnp.repeat(heads(x @ p["square"]), 3, 1)),
        {"square": None, "fused": "square"},
    ),
    "attention, value heads tiled": (
        lambda p, x: many(
            p, jnp.broadcast_to(heads(x @ p["square"])[:, None], (5, 3, 2, 2)).reshape(5, 6, 2)
        ),
        {"square": None, "fused": "square"},
    ),
    "attention, values looked up": (
        lambda p, x: many(p, heads(x @ p["square"])[:, jnp.asarray([0, 0, 0, 1, 1, 1])]),
        {"square": None, "fused": None},
    ),
    "attention, one value head": (
        lambda p, x: many(p, jnp.broadcast_to(heads(x @ p["narrow"]), (5, 6, 2))),
        {"narrow": None, "fused": "narrow"},
    ),
    "attention, row of a stack": (
        lambda p, x: attend(heads(x), heads(x @ p["stack"][0])).reshape(5, 4) @ p["a"].T,
        {"stack": None, "a": None},
    ),
    "attention, sizes before heads": (
        lambda p, x: attend(heads(x), heads(x @ p["square"])).swapaxes(1, 2).reshape(5, 4) @ p["a"].T,
        {"square": None, "a": None},
    ),
    "attention, latent": (latent, {"wide": None, "c": None}),
    "experts": (experts, {"up": None, "down": "up"}),
    "experts, in another order": (
        lambda p, x: experts(p, x, lambda t: t[::-1]),
        {"up": None, "down": None},
    ),
    "experts of one input": (
        lambda p, x: jnp.einsum("td,edf->etf", gain(p, x), p["up"]),
        {"up": "g"},
    ),
    "experts, one up for all": (
        lambda p, x: jnp.einsum("etf,efd->etd", jnp.broadcast_to(x @ p["a"].T, (3, 5, 6)), p["down"]),
        {"a": None, "down": "a"},
    ),
    "ragged": (ragged, {"up": "g", "down": "up"}),
    "ragged, rows moved": (lambda p, x: ragged(p, x, lambda t: t[::-1]), {"up": "g", "down": None}),
    "ragged, rows moved by a view": (
        lambda p, x: ragged(
            p, jnp.tile(x, (2, 1))[:6], lambda t: t.reshape(2, 3, 6).swapaxes(0, 1).reshape(6, 6)
        ),
        {"up": "g", "down": None},
    ),
}


@pytest.mark.parametrize("name", PRODUCERS)
def test_producers(name):
    fn, expected = PRODUCERS[name]
    found = sites(fn, P, V)
    assert {s.weight: s.producer for s in found} == expected
    assert {s.weight: s.channels for s in found if s.channels} == CHANNELS.get(name, {})
    assert {s.weight: s.also for s in found if s.also} == ALSO.get(name, {})
    scaling.check(fn, P, (V,), found)


def test_scaling_every_producer_preserves_a_model():
    p = weights(MODEL)
    found = sites(model, p, TOKENS)
    assert len({s.group for s in found if s.producer}) == 8
    scaling.check(model, p, (TOKENS,), found)


def test_48_layers():
    shapes = {
        f"layers.{i}.{n}": jax.ShapeDtypeStruct(s, jnp.float32) for i in range(48) for n, s in SHAPES.items()
    }

    def deep(p, x):
        for i in range(48):
            x = block({n: p[f"layers.{i}.{n}"] for n in SHAPES}, x)
        return x

    assert len([s for s in sites(deep, shapes, X) if s.op == "dot"]) == 48 * 7


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
    present = [fused for fused in module.FUSED if f"{fused[0]}.weight" in local]
    assert len(present) == 2
    for fused in present:
        assert any({f"{m}.weight" for m in fused} <= group for group in groups(found)), fused
