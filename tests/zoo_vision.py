"""The networks of the zoo that see images: a vision transformer, a diffusion transformer, a U-Net."""

from __future__ import annotations

import jax
import jax.numpy as jnp
from jax import lax
from zoo import ANY, HIDDEN, INNER, KEPT, Program, build, dot, floats, linear, site

IMAGE, PATCH, HEADS, SIZE = 8, 4, 2, 8
NHWC = ("NHWC", "HWIO", "NHWC")


def networks() -> list[Program]:
    return [*convolutions(), vit(), dit(), unet()]


def conv(x: jax.Array, w: jax.Array, stride: int = 1, padding: str = "SAME", **more) -> jax.Array:
    return lax.conv_general_dilated(x, w, (stride,) * 2, padding, dimension_numbers=NHWC, **more)


def convolutions() -> list[Program]:
    image = floats(2, IMAGE, IMAGE, 6)

    def one(name, fn, shape, *contract, **fields):
        return build(name, fn, {"w": (shape, site("conv", *contract, **fields))}, image)

    def text(p, x):  # the layout of weights in PyTorch
        rows = x.reshape(2, -1, 6).swapaxes(1, 2)
        return lax.conv_general_dilated(rows, p["w"], (2,), "VALID")

    return [
        one("conv", lambda p, x: conv(x, p["w"]), (3, 3, 6, 10), 0, 1, 2),
        one("conv_dilated", lambda p, x: conv(x, p["w"], rhs_dilation=(2, 2)), (3, 3, 6, 10), 0, 1, 2),
        one(
            "conv_groups",
            lambda p, x: conv(x, p["w"], feature_group_count=2),
            (3, 3, 3, 8),
            0,
            1,
            2,
            batch=ANY,
        ),
        one(
            "conv_depthwise",
            lambda p, x: conv(x, p["w"], feature_group_count=6),
            (3, 3, 1, 6),
            0,
            1,
            2,
            batch=ANY,
        ),
        one(
            "conv_transpose",
            lambda p, x: lax.conv_transpose(x, p["w"], (2, 2), "SAME", dimension_numbers=NHWC),
            (2, 2, 6, 10),
            *(0, 1, 2),
        ),
        one("conv_out_in_width", text, (10, 6, 4), 1, 2),
        linear(
            "conv_of_matrix",
            lambda p, x: lax.conv_general_dilated(x.T[None], p["w"].T[:, :, None], (1,), "VALID")[0].T,
        )._replace(expected={"w": site("conv", 0)}),
    ]


def norm(x: jax.Array, g: jax.Array | None = None, b: jax.Array | None = None) -> jax.Array:
    x = x - x.mean(-1, keepdims=True)
    x = x * lax.rsqrt((x * x).mean(-1, keepdims=True) + 1e-6)
    return x if g is None or b is None else x * g[None, None] + b[None, None]


def attention(q: jax.Array, k: jax.Array, v: jax.Array) -> jax.Array:
    return jnp.einsum("bhqs,bshd->bqhd", jax.nn.softmax(jnp.einsum("bqhd,bshd->bhqs", q, k)), v)


def vit() -> Program:
    """arXiv:2010.11929: a class token, learned positions, heads on axes of their own, two layers."""
    d, patches = HIDDEN, (IMAGE // PATCH) ** 2

    def block(p, x):
        h = norm(x, p["ln1.g"], p["ln1.b"])
        q, k, v = (jnp.einsum("btd,dhk->bthk", h, p[n]) + p[f"{n}.b"][None, None] for n in "qkv")
        x = x + jnp.einsum("bthk,hkd->btd", attention(q, k, v), p["o"]) + p["o.b"][None, None]
        h = norm(x, p["ln2.g"], p["ln2.b"])
        h = jax.nn.gelu(h @ p["fc1"] + p["fc1.b"][None, None])
        return x + h @ p["fc2"] + p["fc2.b"][None, None]

    def fn(p, image):
        x = conv(image, p["patch"], PATCH, "VALID") + p["patch.b"][None, None, None]
        x = x.reshape(len(x), patches, d)
        x = jnp.concatenate([jnp.broadcast_to(p["cls"], (len(x), 1, d)), x], 1) + p["pos"]
        for i in range(2):
            x = block({n.removeprefix(f"{i}."): p[n] for n in p if n.startswith(f"{i}.")}, x)
        return norm(x, p["ln.g"], p["ln.b"])[:, 0] @ p["head"] + p["head.b"][None]

    after = dot(0, producer=ANY)  # of a norm with a bias, or of a value with one
    layer = {
        **{n: ((d, HEADS, SIZE), after) for n in "qkv"},
        **{f"{n}.b": ((HEADS, SIZE), KEPT) for n in "qkv"},
        "o": ((HEADS, SIZE, d), dot(0, 1, producer=ANY, channels=ANY)),
        "fc1": ((d, INNER), after),
        "fc1.b": ((INNER,), KEPT),
        "fc2": ((INNER, d), dot(0)),
        **{n: ((d,), KEPT) for n in ("o.b", "fc2.b", "ln1.g", "ln1.b", "ln2.g", "ln2.b")},
    }
    ends = {
        "patch": ((PATCH, PATCH, 3, d), site("conv", 0, 1, 2)),
        "cls": ((1, 1, d), KEPT),
        "pos": ((1, 1 + patches, d), KEPT),
        "head": ((d, 5), after),
        "head.b": ((5,), KEPT),
        **{n: ((d,), KEPT) for n in ("patch.b", "ln.g", "ln.b")},
    }
    layers = {f"{i}.{n}": leaf for i in range(2) for n, leaf in layer.items()}
    return build("vit", fn, ends | layers, floats(2, IMAGE, IMAGE, 3))


def waves(t: jax.Array, size: int) -> jax.Array:
    """The times [batch] as sines and cosines [batch, size]."""
    angle = t[:, None] * jnp.exp(-jnp.arange(size // 2, dtype=t.dtype))[None]
    return jnp.concatenate([jnp.sin(angle), jnp.cos(angle)], -1)


def dit() -> Program:
    """arXiv:2212.09748: shift, scale and gate of every sublayer come from the time."""
    d = HIDDEN

    def fn(p, x, t):
        c = jax.nn.silu(waves(t, d) @ p["t1"] + p["t1.b"][None]) @ p["t2"]
        mod = jax.nn.silu(c) @ p["mod"] + p["mod.b"][None]
        shift1, scale1, gate1, shift2, scale2, gate2 = jnp.split(mod[:, None], 6, -1)
        h = norm(x) * (1 + scale1) + shift1
        q, k, v = jnp.einsum("btd,dchk->cbthk", h, p["qkv"])
        x = x + gate1 * jnp.einsum("bthk,hkd->btd", attention(q, k, v), p["o"])
        h = norm(x) * (1 + scale2) + shift2
        return x + gate2 * (jax.nn.gelu(h @ p["fc1"]) @ p["fc2"])

    leaves = {
        "t1": ((d, d), dot(0)),
        "t1.b": ((d,), KEPT),
        "t2": ((d, d), dot(0)),
        "mod": ((d, 6 * d), dot(0)),
        "mod.b": ((6 * d,), KEPT),
        "qkv": ((d, 3, HEADS, SIZE), dot(0)),
        "o": ((HEADS, SIZE, d), dot(0, 1)),
        "fc1": ((d, INNER), dot(0)),
        "fc2": ((INNER, d), dot(0)),
    }
    return build("dit", fn, leaves, floats(2, 4, d), jnp.asarray([0.3, 2.0], jnp.float32))


def unet() -> Program:
    """One level down by a stride and up by a transposed convolution, another up by repeating pixels."""
    c = 8

    def group_norm(x, g, b):
        y = x.reshape(*x.shape[:3], 2, -1)
        y = y - y.mean((1, 2, 4), keepdims=True)
        y = y * lax.rsqrt((y * y).mean((1, 2, 4), keepdims=True) + 1e-6)
        return y.reshape(x.shape) * g[None, None, None] + b[None, None, None]

    def resnet(p, name, x, t):
        h = jax.nn.silu(group_norm(x, p[f"{name}.g"], p[f"{name}.b"]))
        h = conv(h, p[f"{name}.conv"]) + (jax.nn.silu(t) @ p[f"{name}.time"])[:, None, None]
        return (conv(x, p[f"{name}.skip"]) if f"{name}.skip" in p else x) + h

    def fn(p, x, t):
        t = waves(t, c) @ p["time"]
        a = resnet(p, "in", conv(x, p["conv_in"]) + p["conv_in.b"][None, None, None], t)
        b = resnet(p, "mid", conv(a, p["down1"], 2), t)
        m = resnet(p, "low", conv(b, p["down2"], 2), t)
        m = lax.conv_transpose(m, p["up2"], (2, 2), "SAME", dimension_numbers=NHWC)
        m = jnp.concatenate([m, b], -1)
        m = conv(jax.image.resize(m, (len(m), IMAGE, IMAGE, 2 * c), "nearest"), p["up1"])
        return conv(resnet(p, "out", jnp.concatenate([m, a], -1), t), p["conv_out"])

    kernel = site("conv", 0, 1, 2)
    leaves = {"time": ((c, c), dot(0)), "conv_in.b": ((c,), KEPT)}
    shapes = {"conv_in": (3, c), "down1": (c, c), "down2": (c, c), "up1": (2 * c, c), "conv_out": (c, 3)}
    leaves |= {n: ((3, 3, *channels), kernel) for n, channels in shapes.items()}
    leaves |= {"up2": ((2, 2, c, c), kernel), "out.skip": ((1, 1, 2 * c, c), kernel)}
    for name in ("in", "mid", "low", "out"):
        wide = 2 * c if name == "out" else c
        leaves[f"{name}.conv"] = (3, 3, wide, c), kernel
        leaves[f"{name}.time"] = (c, c), dot(0)
        leaves |= {f"{name}.{n}": ((wide,), KEPT) for n in "gb"}
    return build("unet", fn, leaves, floats(1, IMAGE, IMAGE, 3), jnp.asarray([0.7], jnp.float32))
