"""Programs that take all their sizes from shapes, and which axes of theirs can be cut together."""

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

HIDDEN, INNER, KV, REPEAT, SIZE, VOCAB, TOKENS = 12, 10, 3, 3, 8, 20, 5


def floats(*shape, seed=0):
    return jnp.asarray(0.5 * np.random.default_rng(seed).standard_normal(shape), jnp.float32)


def unit_norm(x):
    """A norm without a mean, so that a zero more or less does not matter."""
    return x * lax.rsqrt((x * x).sum(-1, keepdims=True) + 1e-3)


def swiglu(p, x):
    return (jax.nn.silu(x @ p["gate"] + p["gate.b"][None]) * (x @ p["up"])) @ p["down"]


def fused_output(p, x):
    gate, up = jnp.split(x @ p["gate_up"] + p["b"][None], 2, -1)
    return (jax.nn.silu(gate) * up) @ p["down"]


def fused_weight(p, x):
    n = p["gate_up"].shape[1] // 2
    return (jnp.tanh(x @ p["gate_up"][:, :n]) * (x @ p["gate_up"][:, n:])) @ p["down"]


def interleaved(p, x):
    h = x @ p["gate_up"]
    return (jnp.tanh(h[:, ::2]) * h[:, 1::2]) @ p["down"]


def turn(x, angle):
    a, b = jnp.split(x, 2, -1)
    return jnp.concatenate(
        [a * jnp.cos(angle) - b * jnp.sin(angle), b * jnp.cos(angle) + a * jnp.sin(angle)], -1
    )


def attend(q, k, v):
    a = jax.nn.softmax(jnp.einsum("bqhd,bshd->bhqs", q, k))
    return jnp.einsum("bhqs,bshd->bqhd", a, v)


def attention(angle):
    """Flat projections; the sizes of heads are those of the gains [size] and the bias [heads, size]."""

    def fn(p, x):
        size, (kv, _) = p["scale"].shape[0], p["v.b"].shape
        q, k = ((x @ p[n]).reshape(*x.shape[:2], -1, size) for n in "qk")
        v = (x @ p["v"]).reshape(*x.shape[:2], kv, -1) + p["v.b"][None, None]
        q, k = turn(q * p["scale"][None, None, None], angle(x, size)), turn(k, angle(x, size))
        k, v = (jnp.repeat(t, q.shape[2] // kv, 2) for t in (k, v))
        return attend(q, k, v).reshape(*x.shape[:2], -1) @ p["o"]

    return fn


def by_place(x, size):
    """The same angle for all pairs."""
    return jnp.arange(x.shape[1], dtype=x.dtype)[None, :, None, None]


def rotary(x, size):
    speed = 10.0 ** -jnp.arange(size // 2, dtype=x.dtype)
    return by_place(x, size) * speed[None, None, None]


def fused_qkv(p, x):
    """Queries of three heads for each of the key heads, then the keys, then the values, on one axis."""
    kv, size = p["sink"].shape
    t = (x @ p["qkv"]).reshape(*x.shape[:2], -1, size)
    q, k, v = jnp.split(t, [t.shape[2] - 2 * kv, t.shape[2] - kv], 2)
    k, v = (jnp.repeat(t, q.shape[2] // kv, 2) for t in (k + p["sink"][None, None], v))
    return attend(q, k, v).reshape(*x.shape[:2], -1) @ p["o"]


def latent(p, x):
    rank = p["norm"].shape[0]
    kv_a = x @ p["kv_a"]
    kv = jnp.einsum("btr,rhk->bthk", unit_norm(kv_a[..., :rank]) * p["norm"][None, None], p["kv_b"])
    nope = kv.shape[-1] - p["o"].shape[1]
    q = jnp.einsum("btd,dhk->bthk", x, p["q"])
    shared = jnp.broadcast_to(kv_a[:, :, None, rank:], (*kv.shape[:3], kv_a.shape[-1] - rank))
    k = jnp.concatenate([kv[..., :nope], shared], -1)
    return jnp.einsum("bthk,hkd->btd", attend(q, k, kv[..., nope:]), p["o"])


def language(p, ids):
    """Tied embeddings, learned positions, a residual stream with gains, a stack of layers in a scan."""

    def layer(x, p):
        h = unit_norm(x) * p["norm"][None, None] + p["norm.b"][None, None]
        return x + jnp.tanh(h @ p["up"]) @ p["down"], None

    names = ("norm", "norm.b", "up", "down")
    x = p["table"][ids] + p["places"][None, : ids.shape[1]]
    x, _ = lax.scan(layer, x, {n: p[n] for n in names})
    return unit_norm(x) @ p["table"].T


NHWC = ("NHWC", "HWIO", "NHWC")


def conv(x, w, groups=1):
    return lax.conv_general_dilated(x, w, (1, 1), "SAME", dimension_numbers=NHWC, feature_group_count=groups)


def pictures(p, x):
    """A group norm, a depthwise convolution, pooling, channels of two branches side by side."""
    h = conv(x, p["in"])
    n = h.reshape(*h.shape[:3], *p["gain"].shape)
    n = n * lax.rsqrt((n * n).sum((1, 2, 4), keepdims=True) + 1e-3) * p["gain"][None, None, None]
    a = conv(jax.nn.relu(n.reshape(h.shape)), p["depth"], h.shape[-1])
    b = lax.reduce_window(conv(a, p["mid"]), -jnp.inf, lax.max, (1, 3, 3, 1), (1, 1, 1, 1), "SAME")
    return conv(jnp.concatenate([b, h], -1), p["out"]).mean((1, 2))


def selective(p, x):
    y, z = jnp.split(x @ p["in"], 2, -1)
    numbers = ("NWC", "WIO", "NWC")
    y = lax.conv_general_dilated(
        y, p["conv"], (1,), [(2, 0)], dimension_numbers=numbers, feature_group_count=y.shape[-1]
    )
    b, c = jnp.split(y @ p["bc"], 2, -1)
    new = y[..., None] * b[:, :, None]
    decay = jnp.exp(-jnp.exp(p["A"])[None, None] * jax.nn.softplus(y)[..., None])

    def mix(left, right):
        return left[0] * right[0], right[0] * left[1] + right[1]

    h = lax.associative_scan(mix, (decay, new), axis=1)[1]
    return (jnp.einsum("btdn,btn->btd", h, c) * jnp.tanh(z)) @ p["out"]


def lstm(p, x):
    def step(state, x):
        h, c = state
        i, f, g, o = jnp.split(x @ p["wx"] + h @ p["wh"] + p["b"][None], 4, -1)
        c = jax.nn.sigmoid(f) * c + jax.nn.sigmoid(i) * jnp.tanh(g)
        h = jax.nn.sigmoid(o) * jnp.tanh(c)
        return (h, c), h

    zero = jnp.zeros((x.shape[0], p["wh"].shape[0]))
    return lax.scan(step, (zero, zero), x.swapaxes(0, 1))[1].swapaxes(0, 1) @ p["head"]


def vision(p, x):
    """Patches, a class token, scales and shifts from a condition, cut in six."""
    x = x @ p["patch"]
    x = jnp.concatenate([jnp.broadcast_to(p["cls"], (len(x), 1, x.shape[-1])), x], 1) + p["places"]
    parts = jnp.split(jnp.tanh(x[:, :1] @ p["mod"]), 6, -1)
    x = x + parts[2] * (jnp.tanh(unit_norm(x) * parts[0] + parts[1]) @ p["mix"])
    x = x + parts[5] * jnp.tanh(unit_norm(x) * parts[3] + parts[4])
    return unit_norm(x)[:, 0] @ p["head"]


X = floats(2, TOKENS, HIDDEN)
FLAT = floats(7, HIDDEN)
IDS = jnp.asarray(np.random.default_rng(3).integers(0, VOCAB, (2, TOKENS)))
HEADS = {
    "q": (HIDDEN, KV * REPEAT * SIZE),
    "k": (HIDDEN, KV * SIZE),
    "v": (HIDDEN, KV * 5),
    "v.b": (KV, 5),
    "scale": (SIZE,),
    "o": (KV * REPEAT * 5, HIDDEN),
}
KV_HEADS = (3, ("k", 1), ("o", 0), ("q", 1), ("v", 1), ("v.b", 0))
VALUES = (5, ("o", 0), ("v", 1), ("v.b", 1))
FUSED = {"gate_up": (HIDDEN, 2 * INNER), "down": (INNER, HIDDEN)}
LANGUAGE = {
    "table": (VOCAB, HIDDEN),
    "places": (TOKENS, HIDDEN),
    "norm": (3, HIDDEN),
    "norm.b": (3, HIDDEN),
    "up": (3, HIDDEN, INNER),
    "down": (3, INNER, HIDDEN),
}
PICTURES = {
    "in": (3, 3, 3, 12),
    "gain": (3, 4),
    "depth": (3, 3, 1, 12),
    "mid": (3, 3, 12, 5),
    "out": (1, 1, 17, 4),
}
INNER_SSM = (6, ("A", 0), ("bc", 0), ("conv", 2), ("in", 1), ("out", 0))
CHANNELS = (("depth", 3), ("in", 3), ("mid", 2), ("out", 2))
VISION = {
    "patch": (9, HIDDEN),
    "cls": (1, 1, HIDDEN),
    "places": (1, TOKENS + 1, HIDDEN),
    "mod": (HIDDEN, 6 * HIDDEN),
    "mix": (HIDDEN, HIDDEN),
    "head": (HIDDEN, 4),
}
# name: function, parameters, argument, every prunable group as (size, *axes)
CASES = {
    "swiglu": (
        swiglu,
        {"gate": (HIDDEN, INNER), "gate.b": (INNER,), "up": (HIDDEN, INNER), "down": (INNER, HIDDEN)},
        FLAT,
        [(INNER, ("down", 0), ("gate", 1), ("gate.b", 0), ("up", 1))],
    ),
    "fused_output": (
        fused_output,
        FUSED | {"b": (2 * INNER,)},
        FLAT,
        [(INNER, ("b", 0), ("down", 0), ("gate_up", 1))],
    ),
    "fused_weight": (fused_weight, FUSED, FLAT, [(INNER, ("down", 0), ("gate_up", 1))]),
    "interleaved": (interleaved, FUSED, FLAT, [(INNER, ("down", 0), ("gate_up", 1))]),
    "attention_pairs": (
        attention(by_place),
        HEADS,
        X,
        [KV_HEADS, (3, ("o", 0), ("q", 1)), (4, ("k", 1), ("q", 1), ("scale", 0)), VALUES],
    ),
    "attention_rotary": (attention(rotary), HEADS, X, [KV_HEADS, (3, ("o", 0), ("q", 1)), VALUES]),
    "fused_qkv": (
        fused_qkv,
        {"qkv": (HIDDEN, (3 * 3 + 6) * 4), "sink": (3, 4), "o": (3 * 3 * 4, HIDDEN)},
        X,
        [
            (3, ("o", 0), ("qkv", 1), ("sink", 0)),
            (3, ("o", 0), ("qkv", 1)),
            (4, ("o", 0), ("qkv", 1), ("sink", 1)),
        ],
    ),
    "latent": (
        latent,
        {"kv_a": (HIDDEN, 9), "norm": (6,), "kv_b": (6, 4, 9), "q": (HIDDEN, 4, 7), "o": (4, 5, HIDDEN)},
        X,
        [
            (6, ("kv_a", 1), ("kv_b", 0), ("norm", 0)),
            (3, ("kv_a", 1), ("q", 2)),
            (4, ("kv_b", 1), ("o", 0), ("q", 1)),
            (4, ("kv_b", 2), ("q", 2)),
            (5, ("kv_b", 2), ("o", 1)),
        ],
    ),
    "language": (
        language,
        LANGUAGE,
        IDS,
        [
            (3, ("down", 0), ("norm", 0), ("norm.b", 0), ("up", 0)),
            (INNER, ("down", 1), ("up", 2)),
            (HIDDEN, ("down", 2), ("norm", 1), ("norm.b", 1), ("places", 1), ("table", 1), ("up", 1)),
        ],
    ),
    "pictures": (
        pictures,
        PICTURES,
        floats(2, 6, 6, 3),
        [(3, ("gain", 0), *CHANNELS), (4, ("gain", 1), *CHANNELS), (5, ("mid", 3), ("out", 2))],
    ),
    "selective": (
        selective,
        {"in": (HIDDEN, 12), "conv": (3, 1, 6), "bc": (6, 8), "A": (6, 4), "out": (6, HIDDEN)},
        X,
        [INNER_SSM, (4, ("A", 1), ("bc", 1))],
    ),
    "lstm": (
        lstm,
        {"wx": (HIDDEN, 24), "wh": (6, 24), "b": (24,), "head": (6, 4)},
        X,
        [(6, ("b", 0), ("head", 0), ("wh", 0), ("wh", 1), ("wx", 1))],
    ),
    "vision": (
        vision,
        VISION,
        floats(2, TOKENS, 9),
        [
            (
                HIDDEN,
                *((n, len(s) - 1) for n, s in VISION.items() if n != "head"),
                ("head", 0),
                ("mix", 0),
                ("mod", 0),
            )
        ],
    ),
}
