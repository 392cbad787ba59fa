"""Products inside calls, loops, branches and maps."""

from __future__ import annotations

import jax
import jax.numpy as jnp
from jax import lax
from zoo import ANY, EXPERTS, HIDDEN, KEPT, Expected, Program, W, build, dot, linear


def calls_and_loops() -> list[Program]:
    return [*calls(), *loops(), *branches(), *maps()]


@jax.custom_vjp
def custom_linear(x, w):
    return x @ w


custom_linear.defvjp(lambda x, w: (x @ w, (x, w)), lambda saved, t: (t @ saved[1].T, saved[0].T @ t))


@jax.custom_jvp
def custom_product(x, w):
    return x @ w


@custom_product.defjvp
def _(primals, tangents):
    (x, w), (dx, dw) = primals, tangents
    return x @ w, dx @ w + x @ dw


def calls(d: int = HIDDEN) -> list[Program]:
    """Products inside calls."""

    def remat(p, x):
        layer = lambda x, w: jnp.tanh(x @ w)  # noqa: E731
        once = jax.checkpoint(layer, policy=jax.checkpoint_policies.dots_saveable)
        return jax.checkpoint(once)(once(x, p["w"]), p["w"])

    def mlp(activation):
        return lambda p, x: activation(x @ p["up"]) @ p["down"]

    def both(producer):
        return {"up": (W, dot(0)), "down": (W[::-1], dot(0, producer=producer))}

    return [
        linear("jit", lambda p, x: jax.jit(lambda w: jnp.tanh(x @ w))(p["w"])),
        linear("jit_of_jit", lambda p, x: jax.jit(lambda p: jax.jit(jnp.matmul)(x, p["w"]))(p)),
        linear("checkpoint", remat, (d, d)),
        linear("custom_vjp", lambda p, x: jnp.tanh(custom_linear(x, p["w"]))),
        linear("custom_jvp", lambda p, x: jnp.tanh(custom_product(x, p["w"]))),
        build("silu_mlp", mlp(jax.nn.silu), both(None)),
        build("relu_mlp", mlp(jax.nn.relu), both(ANY)),  # relu commutes with a positive scale
        build("gelu_mlp", mlp(jax.nn.gelu), both(None)),
    ]


def loops(d: int = HIDDEN) -> list[Program]:
    """Products in loops, over stacked weights and over one weight."""

    def nested(p, x):
        outer = lambda x, ws: (lax.scan(lambda x, w: (jnp.tanh(x @ w), None), x, ws)[0], None)  # noqa: E731
        return lax.scan(outer, x, p["w"])[0]

    def layer(x, p):
        h = x * lax.rsqrt((x * x).mean(-1, keepdims=True) + 1e-6) * p["norm"][None]
        return x + (jax.nn.silu(h @ p["gate"]) * (h @ p["up"])) @ p["down"], None

    def indexed(p, x):
        at = lambda i: lax.dynamic_index_in_dim(p["w"], i, 0, keepdims=False)  # noqa: E731
        return lax.fori_loop(0, 3, lambda i, x: jnp.tanh(x @ at(i)), x)

    def indexed_last(p, x):
        at = lambda i: lax.dynamic_index_in_dim(p["w"], i, 2, keepdims=False)  # noqa: E731
        return lax.fori_loop(0, 3, lambda i, x: jnp.tanh(x @ at(i)), x)

    def until(p, x):
        go = lambda s: (s[0] < 5) & (jnp.abs(s[1]).sum() > 1)  # noqa: E731
        return lax.while_loop(go, lambda s: (s[0] + 1, jnp.tanh(s[1] @ p["w"])), (0, x))[1]

    stack = {
        "norm": ((3, d), KEPT),
        "gate": ((3, *W), dot(1, batch=(0,), producer="norm")),
        "up": ((3, *W), dot(1, batch=(0,), producer="norm")),
        "down": ((3, *W[::-1]), dot(1, batch=(0,), producer="up")),
    }
    step = lambda i, x, w: jnp.tanh(x @ w)  # noqa: E731
    return [
        linear("nested_scan", nested, (2, 3, d, d), 2, batch=(0, 1)),
        build("scan_layers", lambda p, x: lax.scan(layer, x, p)[0], stack),
        build("scan_layers_remat", lambda p, x: lax.scan(jax.checkpoint(layer), x, p)[0], stack),
        build("scan_layers_reverse", lambda p, x: lax.scan(layer, x, p, reverse=True, unroll=3)[0], stack),
        linear("scan_rows", lambda p, x: lax.map(lambda row: row @ p["w"], x)),
        linear("scan_shared", lambda p, x: lax.fori_loop(0, 3, lambda i, x: step(i, x, p["w"]), x), (d, d)),
        linear("fori_indexed", indexed, (3, d, d), 1, batch=(0,)),
        linear("fori_indexed_last", indexed_last, (d, d, 3), 0, batch=(2,)),
        build("while_loop", until, {"w": ((d, d), dot(0))}, forward_only=True),
    ]


def branches() -> list[Program]:
    """Products in branches."""

    def cond(p, x):
        return lax.cond(x.sum() > 0, lambda: jnp.tanh(x @ p["a"]), lambda: x @ p["b"].T)

    def switch(p, x):
        arms = [lambda x: x @ p["a"], lambda x: x @ p["b"].T, lambda x: -(x @ p["a"])]
        return lax.switch(jnp.argmax(x[0, :3]), arms, x)

    def chosen(p, x):
        w = lax.cond(x.sum() > 0, lambda: p["a"], lambda: p["b"].T)
        return x @ w

    two = {"a": (W, dot(0)), "b": (W[::-1], dot(1))}
    either = Expected(ANY, op=ANY, contract=ANY)
    return [
        build("cond", cond, two),
        build("switch", switch, two),
        build("cond_chooses_weight", chosen, {"a": (W, either), "b": (W[::-1], either)}),
    ]


def maps() -> list[Program]:
    """Products under vmap. An expert axis that the input lacks is one more output axis, no batch."""
    stack = (EXPERTS, *W)
    own = lambda x: x.reshape(3, 2, HIDDEN)  # noqa: E731

    def batched(p, x):
        return jax.vmap(jnp.matmul)(jnp.broadcast_to(x, (EXPERTS, *x.shape)) + 0.5, p["w"])

    def two_maps(p, x):
        each = jax.vmap(lambda x, w: x @ w)  # pairs
        return jax.vmap(each, in_axes=(None, 0))(own(x), p["w"])

    def mlp(p, x):
        one = lambda gate, up, down: (jax.nn.silu(x @ gate) * (x @ up)) @ down  # noqa: E731
        return jax.vmap(one)(p["gate"], p["up"], p["down"]).mean(0)

    experts = {
        "gate": (stack, dot(1)),
        "up": (stack, dot(1)),
        "down": ((EXPERTS, *W[::-1]), dot(1, batch=(0,), producer="up")),
    }
    return [
        linear("vmap_weights", lambda p, x: jax.vmap(lambda w: x @ w)(p["w"]), stack, 1),
        linear("vmap_both", batched, stack, 1, batch=(0,)),
        linear("vmap_input", lambda p, x: jax.vmap(lambda x: jnp.tanh(x @ p["w"]))(own(x))),
        linear("vmap_of_vmap", two_maps, (2, 3, *W), 2, batch=(1,)),
        linear("vmap_last_axis", lambda p, x: jax.vmap(lambda w: x @ w, 2)(p["w"]), (*W, EXPERTS)),
        build("vmap_mlp", mlp, experts),
    ]
