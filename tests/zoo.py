"""Small programs that many tests share, each with what a tracer must say about every parameter.

`programs()` is all of them: products here, calls and loops in `zoo_control`, networks in `zoo_blocks` and
`zoo_vision`. `zoo_modules` has what needs more than JAX on one device: Flax modules and a mesh.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax


class _Any:
    """Equal to everything: what an expectation leaves open. Ask `is ANY`, never `== ANY`."""

    def __eq__(self, other: object) -> bool:
        return True

    def __hash__(self) -> int:
        return 0

    def __repr__(self) -> str:
        return "ANY"


ANY: Any = _Any()


class Expected(NamedTuple):
    """What a tracer must say about one parameter; ANY in a field leaves that field open.

    Attributes:
      status: "site": it meets an activation in an operation that mixes channels, or is looked up. "kept": it
        does not (gains, biases, tables that are added, buffers, unused). "unreachable": it does, but only
        after arithmetic with constants or with other parameters.
      op: "dot", "ragged_dot", "conv" or "gather"; "" without a site.
      contract: axes of the parameter that are summed over (looked up for a gather), ascending.
      batch: axes with a matrix per entry: batch dimensions of a dot, ragged groups, layers of a loop.
      router: the output decides a top_k.
      producer: the parameter that absorbs a scale of every input channel, None where nothing can.
      channels: how the input channels meet the rows of the producer, as factors (size, producer has it);
        () is one to one.
      also: other operations the parameter is used in.
    """

    status: str
    op: str = ""
    contract: tuple[int, ...] = ()
    batch: tuple[int, ...] = ()
    router: bool = False
    producer: str | None = None
    channels: tuple[tuple[int, bool], ...] = ()
    also: tuple[str, ...] = ()


class Program(NamedTuple):
    """`fn(params, *args)` is an array or a tuple of arrays, differentiable in every float parameter."""

    name: str
    fn: Callable
    params: dict[str, jax.Array]
    args: tuple[Any, ...]
    expected: dict[str, Expected]
    forward_only: bool = False  # a while loop has a forward derivative only


KEPT = Expected("kept")
UNREACHABLE = Expected("unreachable")
Leaves = Mapping[str, tuple[Any, Expected]]

FIELDS = ("contract", "batch", "router", "producer", "channels")
TOKENS, HIDDEN, INNER, VOCAB, HEADS, EXPERTS = 6, 16, 24, 20, 2, 4


def site(op: str, *contract: int, **fields: Any) -> Expected:
    return Expected("site", op, contract, **fields)


def dot(*contract: int, **fields: Any) -> Expected:
    return site("dot", *contract, **fields)


def floats(*shape: int, seed: int = 0, scale: float = 1.0, about: float = 0.0) -> jax.Array:
    return jnp.asarray(about + scale * np.random.default_rng(seed).standard_normal(shape), jnp.float32)


def tokens(*shape: int, below: int = VOCAB) -> jax.Array:
    return jnp.asarray(np.random.default_rng(7).integers(0, below, shape), jnp.int32)


def build(name: str, fn: Callable, leaves: Leaves, *args: Any, forward_only: bool = False) -> Program:
    """A program from `leaves`, name -> (shape or array, expectation); no `args`: one [TOKENS, HIDDEN].

    Weights are normal with deviation 0.3, those of one axis (gains, biases) lie around 1.
    """
    params = {}
    for i, (leaf, (value, _)) in enumerate(leaves.items()):
        if isinstance(value, tuple):
            value = floats(*value, seed=i + 1, scale=0.3, about=float(len(value) == 1))
        params[leaf] = value
    expected = {leaf: e for leaf, (_, e) in leaves.items()}
    return Program(name, fn, params, args or (floats(TOKENS, HIDDEN),), expected, forward_only)


def programs() -> tuple[Program, ...]:
    """Every program, names unique, the same values at every call."""
    import zoo_blocks  # these build on this module
    import zoo_control
    import zoo_vision

    here = (*products(), *views(), *arithmetic(), *others())
    return (*here, *zoo_control.calls_and_loops(), *zoo_blocks.networks(), *zoo_vision.networks())


def program(name: str) -> Program:
    return {p.name: p for p in programs()}[name]


def disagreements(p: Program, sites: Iterable[Any], fields: Sequence[str] = FIELDS) -> list[str]:
    """Where the sites that a tracer found in a program differ from what is expected, one line each."""
    out = []
    sites = list(sites)
    for name, e in p.expected.items():
        found = [s for s in sites if s.weight == name]
        if e.status is ANY:
            continue
        if e.status != "site":
            out += [f"{p.name}: {name}: a {s.op} was found, but it is {e.status}" for s in found]
        elif not any(s.op == e.op for s in found):
            out.append(f"{p.name}: {name}: no {e.op} was found, only {sorted(s.op for s in found)}")
        else:
            out += [f"{p.name}: {name}: {s.op} was found" for s in found if s.op not in (e.op, *e.also)]
            for s, field in itertools.product([s for s in found if s.op == e.op], fields):
                got, want = getattr(s, field), getattr(e, field)
                if got != want and e.op is not ANY:
                    out.append(f"{p.name}: {name}: {field} is {got}, not {want}")
    return out


W = (HIDDEN, INNER)
SQUARE = (HIDDEN, HIDDEN)


def linear(name: str, fn: Callable, shape: tuple[int, ...] = W, *contract: int, **fields: Any) -> Program:
    """A program with the one parameter "w", axis 0 of which is summed over unless said."""
    return build(name, fn, {"w": (shape, dot(*(contract or (0,)), **fields))})


def products() -> list[Program]:
    """Ways to write one product."""
    heads = (HEADS, HIDDEN // HEADS, INNER)
    split = lambda x: x.reshape(TOKENS, *heads[:2])  # noqa: E731
    return [
        linear("matmul", lambda p, x: x @ p["w"]),
        linear("jnp_dot", lambda p, x: jnp.dot(x, p["w"])),
        linear("transposed", lambda p, x: x @ p["w"].T, (INNER, HIDDEN), 1),
        linear("einsum_right", lambda p, x: jnp.einsum("td,df->tf", x, p["w"])),
        linear("einsum_left", lambda p, x: jnp.einsum("df,td->tf", p["w"], x)),
        linear("weight_times_column", lambda p, x: (p["w"] @ x.T).T, (INNER, HIDDEN), 1),
        linear("precise", lambda p, x: lax.dot(x, p["w"], preferred_element_type=jnp.float32)),
        linear("o_proj", lambda p, x: jnp.einsum("thd,hdo->to", split(x), p["w"]), heads, 0, 1),
        linear("o_proj_tensordot", lambda p, x: jnp.tensordot(split(x), p["w"], 2), heads, 0, 1),
        linear("o_proj_reshaped", lambda p, x: x @ p["w"].reshape(HIDDEN, INNER), heads, 0, 1),
        linear(
            "o_proj_reversed", lambda p, x: jnp.einsum("thd,odh->to", split(x), p["w"]), heads[::-1], 1, 2
        ),
        linear("q_proj", lambda p, x: jnp.einsum("td,dhk->thk", x, p["w"]), (HIDDEN, HEADS, 8)),
        linear(
            "q_proj_heads_first", lambda p, x: jnp.einsum("td,hdk->thk", x, p["w"]), (HEADS, HIDDEN, 8), 1
        ),
        linear(
            "block_diagonal", lambda p, x: jnp.einsum("thd,hdo->tho", split(x), p["w"]), heads, 1, batch=(0,)
        ),
        build(
            "chain",
            lambda p, x: x @ p["a"] @ p["b"],
            {"a": (W, dot(0)), "b": (W[::-1], dot(0, producer="a"))},
        ),
    ]


def views(d: int = HIDDEN) -> list[Program]:
    """A weight read through slices, casts and lookups, and one that is read twice."""

    def weight_slices(p, x):
        return tuple(x @ p["w"][:, i * d : (i + 1) * d] for i in range(3))

    def gate_up(p, x):
        gate, up = jnp.split(x @ p["gate_up"], 2, -1)
        return (jax.nn.silu(gate) * up) @ p["down"]

    ids, table = tokens(TOKENS), (VOCAB, HIDDEN)
    lookup = site("gather", 0)
    return [
        linear("qkv_weight_slices", weight_slices, (d, 3 * d)),
        linear("qkv_weight_split", lambda p, x: tuple(x @ w for w in jnp.split(p["w"], 3, 1)), (d, 3 * d)),
        linear("qkv_output_split", lambda p, x: tuple(jnp.split(x @ p["w"], 3, -1)), (d, 3 * d)),
        linear("contracted_halves", lambda p, x: x[:, :8] @ p["w"][:8] + jnp.tanh(x[:, 8:] @ p["w"][8:])),
        build("gate_up_split", gate_up, {"gate_up": ((d, 2 * INNER), dot(0)), "down": (W[::-1], dot(0))}),
        linear("cast", lambda p, x: x.astype(jnp.bfloat16) @ p["w"].astype(jnp.bfloat16)),
        linear("stopped", lambda p, x: x @ lax.stop_gradient(p["w"])),
        linear("static_index", lambda p, x: jnp.tanh(x @ p["w"][0]) @ p["w"][1], (3, d, d), 1, batch=ANY),
        linear("used_twice", lambda p, x: jnp.tanh(x @ p["w"]) @ p["w"], SQUARE),
        build(
            "used_twice_transposed",
            lambda p, x: jnp.tanh(x @ p["w"]) @ p["w"].T,
            {"w": (W, Expected("site", "dot", contract=ANY))},
        ),
        build(
            "tied",
            lambda p, ids: jnp.tanh(p["table"][ids]) @ p["table"].T,
            {"table": (table, dot(1, also=("gather",)))},
            ids,
        ),
        build(
            "untied",
            lambda p, ids: jnp.tanh(p["table"][ids]) @ p["head"],
            {"table": (table, lookup), "head": ((d, VOCAB), dot(0))},
            ids,
        ),
        build("take", lambda p, ids: jnp.take(p["table"], ids, axis=0), {"table": (table, lookup)}, ids),
        build(
            "one_hot_lookup",
            lambda p, ids: jax.nn.one_hot(ids, VOCAB) @ p["table"],
            {"table": (table, dot(0))},
            ids,
        ),
    ]


def arithmetic(d: int = HIDDEN, r: int = 4) -> list[Program]:
    """Weights that meet arithmetic before their product."""

    def normalised(p, x):
        v = p["v"]
        return x @ (v / jnp.sqrt((v * v).sum(0, keepdims=True)) * p["g"][None]) + p["b"][None]

    def lora(p, x):
        return x @ p["w"] + (x @ p["a"]) @ p["b"]

    low = {"a": ((d, r), dot(0)), "b": ((r, INNER), dot(0, producer="a"))}
    lost, factor = (W, UNREACHABLE), Expected(ANY)
    return [
        build(
            "lora_arithmetic",
            lambda p, x: x @ (p["w"] + p["a"] @ p["b"]),
            {"w": lost, "a": ((d, r), UNREACHABLE), "b": ((r, INNER), UNREACHABLE)},
        ),
        build("lora_dots", lora, {"w": (W, dot(0)), **low}),
        build("weight_norm", normalised, {"v": lost, "g": ((INNER,), factor), "b": ((INNER,), KEPT)}),
        build(
            "concatenated",
            lambda p, x: x @ jnp.concatenate([p["a"], p["b"]], 1),
            {"a": lost, "b": ((d, 8), UNREACHABLE)},
        ),
        build("folded_gain", lambda p, x: x @ (p["g"][:, None] * p["w"]), {"g": ((d,), factor), "w": lost}),
        build("scaled_weight", lambda p, x: x @ (p["w"] * 0.5), {"w": lost}),
        build("masked_weight", lambda p, x: x @ (p["w"] * p["mask"]), {"w": lost, "mask": (W, UNREACHABLE)}),
        build("weight_squared", lambda p, x: x @ (p["w"] @ p["w"].T), {"w": lost}),
        build("hard_weight", lambda p, x: x @ jnp.tanh(p["w"]), {"w": lost}),
    ]


def others(d: int = HIDDEN) -> list[Program]:
    """Parameters that are no weight, and uses that are hard to name."""

    def buffers(p, x):
        return jnp.where(p["mask"][None], x, 0.0)[p["order"]] @ p["w"]

    def energy(p, x):
        return jax.grad(lambda x: (jnp.tanh(x @ p["w"]) ** 2).sum())(x)

    def latents(p, x):
        q = p["latents"] @ p["q"]
        return jax.nn.softmax(q @ (x @ p["k"]).T) @ (x @ p["v"])

    unsure = Expected(ANY, op=ANY, contract=ANY, batch=ANY, producer=ANY)
    buffer = {
        "w": (W, dot(0)),
        "mask": (jnp.arange(d) % 3 > 0, KEPT),
        "order": (jnp.asarray([5, 4, 3, 2, 1, 0], jnp.int32), KEPT),
        "step": (jnp.asarray(3, jnp.int32), KEPT),
    }
    queries = {
        "latents": ((3, d), unsure),
        "q": (SQUARE, unsure),
        "k": (SQUARE, dot(0)),
        "v": (SQUARE, dot(0)),
    }
    return [
        build("unused", lambda p, x: x @ p["w"], {"w": (W, dot(0)), "spare": (W, KEPT), "b": ((d,), KEPT)}),
        build("buffers", buffers, buffer),
        build("outer_product", lambda p, x: jnp.einsum("td,df->tdf", x, p["w"]), {"w": (W, KEPT)}),
        build("vector", lambda p, x: x @ p["w"], {"w": ((d,), Expected(ANY, ANY, ANY))}),
        build("gradient_inside", energy, {"w": (W, Expected("site", "dot", contract=ANY))}),
        build("latent_queries", latents, queries),
        build(
            "returned",
            lambda p, x: (x @ p["w"], p["w"] * 1.0),
            {"w": (W, dot(0))},
        ),
    ]
