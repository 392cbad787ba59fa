"""Programs that need more than JAX on one device: a mesh, and modules of Flax (NNX and Linen)."""

from __future__ import annotations

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jax.sharding import Mesh, PartitionSpec
from zoo import ANY, HIDDEN, INNER, KEPT, VOCAB, Expected, Program, build, dot, floats, site, tokens

LENGTH, HEADS, LAYERS = 5, 2, 3


def sharded(mesh: Mesh) -> Program:
    """A gated MLP under shard_map, columns then rows, over the first axis of `mesh`; its size divides 48."""
    axis, width = mesh.axis_names[0], 2 * INNER

    def local(x, gate, up, down):
        return lax.psum((jax.nn.silu(x @ gate) * (x @ up)) @ down, axis)

    columns, rows = PartitionSpec(None, axis), PartitionSpec(axis, None)
    run = jax.shard_map(
        local, mesh=mesh, in_specs=(PartitionSpec(), columns, columns, rows), out_specs=PartitionSpec()
    )
    leaves = {
        "gate": ((HIDDEN, width), dot(0)),
        "up": ((HIDDEN, width), dot(0)),
        "down": ((width, HIDDEN), dot(0, producer="up")),
    }
    return build("sharded", lambda p, x: run(x, p["gate"], p["up"], p["down"]), leaves, floats(8, HIDDEN))


class Modular(NamedTuple):
    """A module, and the function that runs it on a flat dict of its parameters, names joined by dots."""

    module: Any
    program: Program


def attention(query: str, out: str, prefix: str, batch: tuple[int, ...] = ()) -> dict[str, Expected]:
    """What is expected of q, k, v [hidden, heads, size] and the output [heads, size, hidden], with biases."""
    first = len(batch)
    found = {f"{prefix}.{n}.kernel": dot(first, batch=batch, producer=ANY) for n in (query, "key", "value")}
    found[f"{prefix}.{out}.kernel"] = dot(first, first + 1, batch=batch, producer=ANY, channels=ANY)
    return found | {n.replace("kernel", "bias"): KEPT for n in found}


def nnx_model() -> Modular:
    """An embedding, a block with MultiHeadAttention and LinearGeneral, a head; `module` is an nnx.Module."""
    from flax import nnx

    class Block(nnx.Module):
        def __init__(self, rngs: nnx.Rngs):
            self.norm1 = nnx.LayerNorm(HIDDEN, rngs=rngs)
            self.attention = nnx.MultiHeadAttention(HEADS, HIDDEN, decode=False, rngs=rngs)
            self.norm2 = nnx.RMSNorm(HIDDEN, rngs=rngs)
            self.up = nnx.LinearGeneral(HIDDEN, (2, INNER), use_bias=False, rngs=rngs)
            self.down = nnx.LinearGeneral((2, INNER), HIDDEN, axis=(-2, -1), rngs=rngs)

        def __call__(self, x):
            x = x + self.attention(self.norm1(x))
            return x + self.down(jax.nn.gelu(self.up(self.norm2(x))))

    class Model(nnx.Module):
        def __init__(self, rngs: nnx.Rngs):
            self.embed = nnx.Embed(VOCAB, HIDDEN, rngs=rngs)
            self.block = Block(rngs)
            self.head = nnx.Linear(HIDDEN, VOCAB, rngs=rngs)

        def __call__(self, ids):
            return self.head(self.block(self.embed(ids)))

    module = Model(nnx.Rngs(0))
    graph, state = nnx.split(module)
    pure = nnx.to_pure_dict(state)
    expected = {
        "embed.embedding": site("gather", 0),
        "block.up.kernel": dot(0, producer="block.norm2.scale"),
        "block.down.kernel": dot(0, 1),
        "head.kernel": dot(0, producer=ANY),
        **attention("query", "out", "block.attention"),
    }

    def fn(p, ids):
        new = jax.tree.map(lambda w: w, state)  # a copy: the next line changes it in place
        nnx.replace_by_pure_dict(new, nested(p))
        return nnx.merge(graph, new)(ids)

    return Modular(module, modular("nnx", fn, pure, expected))


def linen_model() -> Modular:
    """A tied embedding and nn.scan over nn.remat of a block; `module` is a linen.Module."""
    from flax import linen as nn

    class Block(nn.Module):
        @nn.compact
        def __call__(self, x, _):
            h = nn.LayerNorm(name="norm1")(x)
            x = x + nn.MultiHeadDotProductAttention(HEADS, name="attention")(h)
            h = nn.DenseGeneral((2, INNER), use_bias=False, name="up")(nn.RMSNorm(name="norm2")(x))
            return x + nn.DenseGeneral(HIDDEN, axis=(-2, -1), name="down")(nn.gelu(h)), None

    class Model(nn.Module):
        @nn.compact
        def __call__(self, ids):
            embed = nn.Embed(VOCAB, HIDDEN, name="embed")
            stack = nn.scan(
                nn.remat(Block, prevent_cse=False),
                variable_axes={"params": 0},
                split_rngs={"params": True},
                length=LAYERS,
            )
            x, _ = stack(name="layers")(embed(ids), None)
            return embed.attend(nn.LayerNorm(name="norm")(x))

    module = Model()
    pure = jax.jit(module.init)(jax.random.key(0), tokens(2, LENGTH))["params"]
    expected = {
        "embed.embedding": dot(1, also=("gather",)),
        "layers.up.kernel": dot(1, batch=(0,), producer="layers.norm2.scale"),
        "layers.down.kernel": dot(1, 2, batch=(0,)),
        **attention("query", "out", "layers.attention", (0,)),
    }
    return Modular(
        module, modular("linen", lambda p, ids: module.apply({"params": nested(p)}, ids), pure, expected)
    )


def modular(name: str, fn: Any, pure: Any, expected: dict[str, Expected]) -> Program:
    """A program of tokens; parameters without an expectation are kept."""
    flat = jax.tree_util.tree_flatten_with_path(pure)[0]
    params = {".".join(str(key.key) for key in path): jnp.asarray(w) for path, w in flat}
    return build(name, fn, {n: (w, expected.get(n, KEPT)) for n, w in params.items()}, tokens(2, LENGTH))


def nested(flat: dict[str, jax.Array]) -> dict:
    """{"a.b": x} -> {"a": {"b": x}}"""
    out: dict = {}
    for name, w in flat.items():
        *path, last = name.split(".")
        at = out
        for key in path:
            at = at.setdefault(key, {})
        at[last] = w
    return out
