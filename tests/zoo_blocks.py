"""The networks of the zoo: decoders, attention variants and mixtures of experts."""

from __future__ import annotations

import jax
import jax.numpy as jnp
from jax import lax
from zoo import (
    ANY,
    EXPERTS,
    HIDDEN,
    INNER,
    KEPT,
    TOKENS,
    VOCAB,
    Expected,
    Program,
    build,
    dot,
    floats,
    site,
    tokens,
)

KV, GROUP, SIZE = 2, 2, 4  # key heads, query heads for each, size of a head
HEADS, LENGTH, LAYERS = KV * GROUP, 5, 2
GROUPED = ((KV, True), (GROUP, False), (SIZE, True))
GAIN, BIAS = ((HIDDEN,), KEPT), ((HIDDEN,), KEPT)


def networks() -> list[Program]:
    return [*decoders(), *recurrent(), *mixtures()]


def along(g: jax.Array, x: jax.Array) -> jax.Array:
    """`g` with leading axes, so that it multiplies the last axes of `x`."""
    return lax.expand_dims(g, range(x.ndim - g.ndim))


def rms(x: jax.Array, g: jax.Array) -> jax.Array:
    return x * lax.rsqrt((x * x).mean(-1, keepdims=True) + 1e-6) * along(g, x)


def layer_norm(x: jax.Array, g: jax.Array | None = None, b: jax.Array | None = None) -> jax.Array:
    x = x - x.mean(-1, keepdims=True)
    x = x * lax.rsqrt((x * x).mean(-1, keepdims=True) + 1e-6)
    return x if g is None or b is None else x * along(g, x) + along(b, x)


def rope(x: jax.Array) -> jax.Array:
    """Rotary embedding of [batch, length, heads, size]."""
    a, b = jnp.split(x, 2, -1)
    angle = jnp.arange(x.shape[1], dtype=x.dtype)[None, :, None, None] / 10
    return jnp.concatenate(
        [a * jnp.cos(angle) - b * jnp.sin(angle), b * jnp.cos(angle) + a * jnp.sin(angle)], -1
    )


def attend(q: jax.Array, k: jax.Array, v: jax.Array) -> jax.Array:
    """Causal attention of [batch, length, heads, size]."""
    mask = jnp.where(jnp.tri(q.shape[1], dtype=bool), 0.0, -1e9)[None, None]
    return jnp.einsum("bhqs,bshd->bqhd", jax.nn.softmax(jnp.einsum("bqhd,bshd->bhqs", q, k) + mask), v)


def gated(p, h, activation=jax.nn.silu):
    return (activation(h @ p["gate"]) * (h @ p["up"])) @ p["down"]


def llama(p, x):
    """Projections with one axis for all heads; every key head repeated for its group."""
    h = rms(x, p["ln1"])
    q, k, v = ((h @ p[n]).reshape(*x.shape[:2], -1, SIZE) for n in "qkv")
    k, v = (jnp.repeat(t, GROUP, 2) for t in (rope(k), v))
    x = x + attend(rope(q), k, v).reshape(*x.shape[:2], -1) @ p["o"]
    return x + gated(p, rms(x, p["ln2"]))


def llama_heads(p, x):
    """Projections with axes [hidden, heads, size]; queries grouped in the einsum; gains on query and key."""
    h = rms(x, p["ln1"])
    q, k, v = (jnp.einsum("btd,dhk->bthk", h, p[n]) for n in "qkv")
    q = rope(rms(q, p["q_norm"])).reshape(*x.shape[:2], KV, GROUP, SIZE)
    a = jax.nn.softmax(jnp.einsum("btkgd,bskd->bkgts", q, rope(rms(k, p["k_norm"]))))
    o = jnp.einsum("bkgts,bskd->btkgd", a, v).reshape(*x.shape[:2], HEADS, SIZE)
    x = x + jnp.einsum("bthk,hkd->btd", o, p["o"])
    return x + gated(p, rms(x, p["ln2"]))


def gemma(p, ids):
    """Gains stored as g of 1 + g, norms after the sublayers, one table for both ends, capped logits."""
    x = p["table"][ids] * HIDDEN**0.5
    h = rms(x, 1 + p["ln1"])
    q, k, v = ((h @ p[n]).reshape(*x.shape[:2], -1, SIZE) for n in "qkv")
    k, v = (jnp.repeat(t, GROUP, 2) for t in (rope(k), v))
    x = x + rms(attend(rope(q), k, v).reshape(*x.shape[:2], -1) @ p["o"], 1 + p["post1"])
    x = x + rms(gated(p, rms(x, 1 + p["ln2"]), jax.nn.gelu), 1 + p["post2"])
    return 5 * jnp.tanh(rms(x, 1 + p["norm"]) @ p["table"].T / 5)


def gpt2(p, ids):
    """LayerNorm and biases everywhere; queries, keys and values in one weight, split after the dot."""
    x = p["wte"][ids] + p["wpe"][None, : ids.shape[1]]
    h = layer_norm(x, p["ln1.g"], p["ln1.b"])
    qkv = h @ p["c_attn.w"] + along(p["c_attn.b"], h)
    q, k, v = (t.reshape(*x.shape[:2], HEADS, SIZE) for t in jnp.split(qkv, 3, -1))
    x = x + attend(q, k, v).reshape(x.shape) @ p["c_proj.w"] + along(p["c_proj.b"], x)
    h = layer_norm(x, p["ln2.g"], p["ln2.b"])
    h = jax.nn.gelu(h @ p["fc.w"] + along(p["fc.b"], h))
    x = x + h @ p["proj.w"] + along(p["proj.b"], x)
    return layer_norm(x, p["lnf.g"], p["lnf.b"]) @ p["wte"].T


def llama_scan(p, ids):
    """A decoder: lookup, a scan over rematerialised layers, norm, head."""
    names = [n for n in p if n.startswith("layers.")]
    layers = {n.removeprefix("layers."): p[n] for n in names}
    step = jax.checkpoint(lambda x, layer: (llama(layer, x), None))
    x, _ = lax.scan(step, p["embed"][ids], layers)
    return rms(x, p["norm"]) @ p["head"]


def decode_step(p, x, keys, values, at):
    """One token against a cache, which is returned with it."""
    h = rms(x, p["ln1"])
    q, k, v = ((h @ p[n]).reshape(*x.shape[:2], -1, SIZE) for n in "qkv")
    keys = lax.dynamic_update_slice_in_dim(keys, k, at, 1)
    values = lax.dynamic_update_slice_in_dim(values, v, at, 1)
    q = q.reshape(x.shape[0], KV, GROUP, SIZE)
    seen = jnp.where(jnp.arange(keys.shape[1]) <= at, 0.0, -1e9)[None, None, None]
    a = jax.nn.softmax(jnp.einsum("bkgd,bskd->bkgs", q, keys) + seen)
    o = jnp.einsum("bkgs,bskd->bkgd", a, values).reshape(*x.shape[:2], -1)
    return o @ p["o"], keys, values


RANK, NOPE, ROTARY = 6, 4, 2


def mla(p, x):
    """Latent attention (arXiv:2405.04434): low-rank queries, keys and values; a rotary part of its own."""
    h = rms(x, p["ln"])
    q = jnp.einsum("btr,rhk->bthk", rms(h @ p["q_a"], p["q_a_norm"]), p["q_b"])
    q, q_rope = jnp.split(q, [NOPE], -1)
    latent, k_rope = jnp.split(h @ p["kv_a"], [RANK], -1)
    kv = jnp.einsum("btr,rhk->bthk", rms(latent, p["kv_a_norm"]), p["kv_b"])
    k, v = jnp.split(kv, [NOPE], -1)
    k_rope = jnp.broadcast_to(rope(k_rope[:, :, None]), (*k.shape[:3], ROTARY))
    q, k = jnp.concatenate([q, rope(q_rope)], -1), jnp.concatenate([k, k_rope], -1)
    return x + jnp.einsum("bthk,hkd->btd", attend(q, k, v), p["o"])


def flat_layer(prefix: str = "", layers: int = 0) -> dict:
    """The leaves of `llama`, stacked if there are layers."""
    stack, axis, batch = ((layers,), 1, (0,)) if layers else ((), 0, ())
    wide = {n: ((*stack, HIDDEN, HIDDEN if n == "q" else KV * SIZE), "ln1") for n in "qkv"}
    wide |= {n: ((*stack, HIDDEN, INNER), "ln2") for n in ("gate", "up")}
    leaves = {n: (shape, dot(axis, batch=batch, producer=prefix + by)) for n, (shape, by) in wide.items()}
    leaves |= {n: ((*stack, HIDDEN), KEPT) for n in ("ln1", "ln2")}
    out = dot(axis, batch=batch, producer=prefix + "v", channels=GROUPED)
    leaves["o"] = (*stack, HIDDEN, HIDDEN), out
    leaves["down"] = (*stack, INNER, HIDDEN), dot(axis, batch=batch, producer=prefix + "up")
    return {prefix + n: leaf for n, leaf in leaves.items()}


def decoders() -> list[Program]:
    x, ids, d = floats(2, LENGTH, HIDDEN), tokens(2, LENGTH), HIDDEN
    flat = flat_layer()
    heads = flat | {n: ((d, KV, SIZE), dot(0, producer="ln1")) for n in "kv"}
    heads |= {"q": ((d, HEADS, SIZE), dot(0, producer="ln1"))}
    heads |= {"o": ((HEADS, SIZE, d), dot(0, 1, producer="v", channels=GROUPED))}
    heads |= {n: ((SIZE,), KEPT) for n in ("q_norm", "k_norm")}
    plus = {
        n: (shape, e if n in ("o", "down") else e._replace(producer=None)) for n, (shape, e) in flat.items()
    }
    plus |= {n: GAIN for n in ("norm", "post1", "post2")}
    ends = {
        "embed": ((VOCAB, d), site("gather", 0)),
        "norm": GAIN,
        "head": ((d, VOCAB), dot(0, producer="norm")),
    }
    tied = {"table": ((VOCAB, d), dot(1, also=("gather",)))}
    after = dot(0, producer=ANY)  # of a norm with a bias, which has to be scaled too
    biased = {
        "wte": ((VOCAB, d), dot(1, also=("gather",))),
        "wpe": ((8, d), KEPT),
        "c_attn.w": ((d, 3 * d), after),
        "c_attn.b": ((3 * d,), KEPT),
        "c_proj.w": ((d, d), dot(0)),
        "fc.w": ((d, INNER), after),
        "fc.b": ((INNER,), KEPT),
        "proj.w": ((INNER, d), dot(0)),
        **{n: BIAS for n in ("ln1.g", "ln1.b", "ln2.g", "ln2.b", "lnf.g", "lnf.b", "c_proj.b", "proj.b")},
    }
    latent = {
        "ln": GAIN,
        "q_a": ((d, RANK), dot(0, producer="ln")),
        "q_a_norm": ((RANK,), KEPT),
        "q_b": ((RANK, 2, NOPE + ROTARY), dot(0, producer="q_a_norm")),
        "kv_a": ((d, RANK + ROTARY), dot(0, producer="ln")),
        "kv_a_norm": ((RANK,), KEPT),
        "kv_b": ((RANK, 2, NOPE + SIZE), dot(0, producer="kv_a_norm")),
        "o": ((2, SIZE, d), dot(0, 1)),
    }
    cache = floats(2, 2, 7, KV, SIZE, seed=5)
    step = {n: flat[n] for n in ("ln1", "q", "k", "v")} | {"o": ((d, d), dot(0))}
    return [
        build("llama", llama, flat, x),
        build("llama_heads", llama_heads, heads, x),
        build("llama_scan", llama_scan, ends | flat_layer("layers.", LAYERS), ids),
        build("gemma", gemma, plus | tied, ids),
        build("gpt2", gpt2, biased, ids),
        build("mla", mla, latent, x),
        build("decode_step", decode_step, step, x[:, :1], *cache, jnp.asarray(3, jnp.int32)),
    ]


# Recurrent networks


STATE, TIME_RANK, WIDTH = 3, 2, 3


def mamba(recur):
    """A selective state space block (arXiv:2312.00752) with the given recurrence."""

    def block(p, x):
        y, z = jnp.split(rms(x, p["norm"]) @ p["in_proj"], 2, -1)
        numbers = ("NWC", "WIO", "NWC")
        groups = y.shape[-1]
        y = lax.conv_general_dilated(
            y, p["conv"], (1,), [(WIDTH - 1, 0)], dimension_numbers=numbers, feature_group_count=groups
        )
        y = jax.nn.silu(y + along(p["conv.b"], y))
        dt, b, c = jnp.split(y @ p["x_proj"], [TIME_RANK, TIME_RANK + STATE], -1)
        dt = jax.nn.softplus(dt @ p["dt_proj"] + along(p["dt.b"], y))[..., None]
        decay = jnp.exp(-dt * along(jnp.exp(p["A_log"]), dt))
        h = recur(decay, dt * y[..., None] * b[:, :, None])
        out = jnp.einsum("btdn,btn->btd", h, c) + y * along(p["D"], y)
        return x + (out * jax.nn.silu(z)) @ p["out_proj"]

    return block


def associative(decay, add):
    return lax.associative_scan(lambda a, b: (a[0] * b[0], b[0] * a[1] + b[1]), (decay, add), axis=1)[1]


def sequential(decay, add):
    def step(h, now):
        h = now[0] * h + now[1]
        return h, h

    steps = decay.swapaxes(0, 1), add.swapaxes(0, 1)
    return lax.scan(step, jnp.zeros_like(add[:, 0]), steps)[1].swapaxes(0, 1)


def delta_net(p, x):
    """Gated delta rule (arXiv:2412.06464), one token at a time."""
    heads = lambda t: t.reshape(*x.shape[:2], 2, SIZE)  # noqa: E731
    unit = lambda t: t * lax.rsqrt((t * t).sum(-1, keepdims=True) + 1e-6)  # noqa: E731
    h = rms(x, p["norm"])
    q, k, v = unit(heads(h @ p["q"])), unit(heads(h @ p["k"])), heads(h @ p["v"])
    beta = jax.nn.sigmoid(h @ p["b"])[..., None]
    a = h @ p["a"]
    decay = jnp.exp(-along(jnp.exp(p["A_log"]), a) * jax.nn.softplus(a + along(p["dt.b"], a)))[
        ..., None, None
    ]

    def step(s, now):
        q, k, v, beta, decay = now
        s = s * decay
        s = s + jnp.einsum("bhv,bhk->bhvk", beta * (v - jnp.einsum("bhvk,bhk->bhv", s, k)), k)
        return s, jnp.einsum("bhvk,bhk->bhv", s, q)

    now = tuple(t.swapaxes(0, 1) for t in (q, k, v, beta, decay))
    _, out = lax.scan(step, jnp.zeros((x.shape[0], 2, SIZE, SIZE)), now)
    out = rms(out.swapaxes(0, 1), p["out_norm"]) * jax.nn.silu(heads(h @ p["z"]))
    return x + out.reshape(*x.shape[:2], -1) @ p["o"]


def lstm(p, x):
    def step(state, x):
        h, c = state
        i, f, g, o = jnp.split(x @ p["wx"] + h @ p["wh"] + p["b"][None], 4, -1)
        c = jax.nn.sigmoid(f) * c + jax.nn.sigmoid(i) * jnp.tanh(g)
        h = jax.nn.sigmoid(o) * jnp.tanh(c)
        return (h, c), h

    zero = jnp.zeros((x.shape[0], HIDDEN))
    return lax.scan(step, (zero, zero), x.swapaxes(0, 1))[1].swapaxes(0, 1) @ p["head"]


def recurrent() -> list[Program]:
    x, d = floats(2, LENGTH, HIDDEN), HIDDEN
    selective = {
        "norm": GAIN,
        "in_proj": ((d, 2 * INNER), dot(0, producer="norm")),
        "conv": ((WIDTH, 1, INNER), site("conv", 0, 1, batch=ANY)),
        "x_proj": ((INNER, TIME_RANK + 2 * STATE), dot(0)),
        "dt_proj": ((TIME_RANK, INNER), dot(0)),
        "out_proj": ((INNER, d), dot(0)),
        "A_log": ((INNER, STATE), KEPT),
        **{n: ((INNER,), KEPT) for n in ("conv.b", "dt.b", "D")},
    }
    delta = {n: ((d, 2 * SIZE if n in "qkvz" else 2), dot(0, producer="norm")) for n in "qkvzab"}
    delta |= {"norm": GAIN, "A_log": ((2,), KEPT), "dt.b": ((2,), KEPT), "out_norm": ((SIZE,), KEPT)}
    delta |= {"o": ((2 * SIZE, d), dot(0, producer=ANY, channels=ANY))}  # out_norm, the same for every head
    cell = {"wx": ((d, 4 * d), dot(0)), "wh": ((d, 4 * d), dot(0)), "b": ((4 * d,), KEPT)}
    return [
        build("mamba_associative", mamba(associative), selective, x),
        build("mamba_scan", mamba(sequential), selective, x),
        build("delta_net", delta_net, delta, x),
        build("lstm", lstm, cell | {"head": ((d, VOCAB), dot(0))}, x),
    ]


# Mixtures of experts: [tokens, hidden], two experts for every token


def route(p, h):
    """Weights [tokens, 2] and experts [tokens, 2]."""
    weights, chosen = lax.top_k(jax.nn.softmax(h @ p["router"]), 2)
    return weights / weights.sum(-1, keepdims=True), chosen


def combine(p, h, out):
    """The chosen ones of the outputs [experts, tokens, hidden] of all experts."""
    weights, chosen = route(p, h)
    dense = (jax.nn.one_hot(chosen, EXPERTS) * weights[..., None]).sum(1)
    return jnp.einsum("etd,te->td", out, dense)


def moe_einsum(p, x):
    h = rms(x, p["norm"])
    a = jax.nn.silu(jnp.einsum("td,edf->etf", h, p["gate"])) * jnp.einsum("td,edf->etf", h, p["up"])
    return x + combine(p, h, jnp.einsum("etf,efd->etd", a, p["down"]))


def moe_vmap(p, x):
    h = rms(x, p["norm"])
    one = lambda gate, up, down: (jax.nn.silu(h @ gate) * (h @ up)) @ down  # noqa: E731
    return x + combine(p, h, jax.vmap(one)(p["gate"], p["up"], p["down"]))


def moe_ragged(p, x):
    h = rms(x, p["norm"])
    weights, chosen = route(p, h)
    order = jnp.argsort(chosen.reshape(-1))
    sizes = jnp.bincount(chosen.reshape(-1), length=EXPERTS)
    rows = h[order // 2]
    a = jax.nn.silu(lax.ragged_dot(rows, p["gate"], sizes)) * lax.ragged_dot(rows, p["up"], sizes)
    out = lax.ragged_dot(a, p["down"], sizes)[jnp.argsort(order)].reshape(*chosen.shape, HIDDEN)
    return x + (out * weights[..., None]).sum(1)


def moe_lookup(p, x):
    """The matrices of the chosen experts looked up, as is done for a few tokens."""
    h = rms(x, p["norm"])
    weights, chosen = route(p, h)
    a = jax.nn.silu(jnp.einsum("td,tkdf->tkf", h, p["up"][chosen]))
    return x + jnp.einsum("tkf,tkfd,tk->td", a, p["down"][chosen], weights)


def mixtures() -> list[Program]:
    up, down, d = (EXPERTS, HIDDEN, INNER), (EXPERTS, INNER, HIDDEN), HIDDEN
    router = (d, EXPERTS), dot(0, router=True, producer="norm")
    dense = {
        "norm": GAIN,
        "router": router,
        "gate": (up, dot(1, producer="norm")),
        "up": (up, dot(1, producer="norm")),
        "down": (down, dot(1, batch=(0,), producer="up")),
    }
    rows = site("ragged_dot", 1, batch=(0,), producer=ANY)  # the norm, with the router, through a lookup
    ragged = dense | {
        "router": (router[0], dot(0, router=True, producer=ANY)),
        "gate": (up, rows),
        "up": (up, rows),
        "down": (down, rows._replace(producer="up")),
    }
    found = Expected("site", op=ANY, contract=ANY, batch=ANY, producer=ANY)
    lookup = {"norm": GAIN, "router": ragged["router"], "up": (up, found), "down": (down, found)}
    x = floats(TOKENS, d)
    return [
        build("moe_einsum", moe_einsum, dense, x),
        build("moe_vmap", moe_vmap, dense, x),
        build("moe_ragged", moe_ragged, ragged, x),
        build("moe_lookup", moe_lookup, lookup, x),
    ]
