"""The inputs of a block's linears in two streams: statistics, and runs that go on from known ones."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp

from mojax import flat, interpret
from mojax.calibration import SEQUENTIAL, STATISTICS, product, rows_of
from mojax.compile import jit
from mojax.kernels.hadamard import hadamard
from mojax.plans import READS
from mojax.program import Program, block_of, cache_scales, run_block, watched
from mojax.threads import each

OWN = "own "  # before the name of a weight: statistics that weights of one input do not share
HELD = 2**30  # bytes, in float32: inputs that are more are not kept in a stream, but computed anew
Known = tuple[Mapping[str, Any], Mapping[str, Any]]


class Held:
    """Inputs of a block's linears that are known since the ones before were encoded, a batch each, by name.

    What comes after them need not run the block from its beginning. Those of the first stage are not kept:
    only a norm is before them; nor those that would take much memory.
    """

    def __init__(self) -> None:
        self.source: dict[str, list[jax.Array]] = {}
        self.seen: dict[str, list[jax.Array]] = {}

    def of(self, i: int) -> tuple[dict[str, jax.Array], dict[str, jax.Array]]:
        """Those of batch `i`, in both streams."""
        source, seen = ({n: xs[i] for n, xs in held.items()} for held in (self.source, self.seen))
        return source, seen


def bytes_held(tokens: int, width: int) -> int:
    """What keeping the inputs of a linear takes in a stream, in float32; 0 where they are not kept."""
    size = 4 * tokens * width
    return size if size <= HELD else 0


@jit(static_argnums=(0, 1, 2, 3, 4))
def observe(
    source: Program,
    encoded: Program,
    needs: tuple[str, ...],
    groups: tuple[tuple[str, tuple[str, ...]], ...],
    kept: tuple[str, ...],
    plain: Mapping[str, Any],
    params: Mapping[str, Any],
    x: Any,
    seen: Any,
    tokens: Mapping[str, Any],
    known: Known,
) -> tuple[dict[str, dict[str, jax.Array]], Known]:
    """Statistics of the inputs of some weights of a block, in both streams; rotated where they are to be.

    Args:
      source, encoded: the block as it is, and with encoded weights and rounded inputs.
      groups: a weight whose input is observed, and the weights that read the same; names in the block.
      kept: of those first weights, whose inputs are returned.
      plain, params: leaves for the two programs; those of `plain` are in full precision.
      x, seen: the block's input in the two streams, `[batch, length, hidden]`.
      tokens: by weight, what every token's error counts ("gram" is then of the source's inputs); else empty.
      known: inputs of weights that were encoded before, in the two streams.
    Returns:
      by first weight, statistics for its whole group, and under OWN those of a weight alone; inputs in both
      streams, where each is looked at.
    """
    leaders = tuple(leader for leader, _ in groups)
    later = [need for need in needs if need in SEQUENTIAL and not (need == "gram" and tokens)]
    of_source = [need for need in needs if need not in ("gram", "seen_gram", "count")]
    b, after_x = _inputs(encoded, leaders, params, seen, known[1]) if later else ({}, {})
    a, x_of = _inputs(source, leaders, plain, x, known[0]) if of_source or tokens or not later else (b, {})
    for module, block in encoded.rotated if a is not b else ():
        if (leader := module + ".weight") in a:
            rows, sizes = a[leader]
            a[leader] = hadamard(rows.astype(jnp.float32), block=block, implementation="xla"), sizes
    b = b or a
    found: dict[str, dict[str, jax.Array]] = {}
    for leader, weights in groups:
        (rows, sizes), (after, after_sizes) = a[leader], b[leader]
        values = {n: _take(n, rows, sizes) for n in needs if n in STATISTICS and n != "gram"}
        if "gram" in needs and not tokens:
            values["gram"] = _take("gram", after, after_sizes)
            if "count" in needs:  # of the tokens in it: the streams may route differently
                values["count"] = _take("count", after, after_sizes)
        if "seen_gram" in needs:
            values["seen_gram"] = _take("gram", after, after_sizes)
        if "drift" in needs and sizes is None and rows.ndim == 2:
            after = after.astype(jnp.float32)
            values["drift"] = product(rows.astype(jnp.float32) - after, after)
        found[leader] = values
        for w in weights if "gram" in needs and tokens else ():
            # Rows of experts were sorted in another arithmetic there, so their tokens count alike.
            weighed = rows.astype(jnp.float32) * jnp.sqrt(tokens[w])[:, None] if sizes is None else rows
            found[OWN + w] = {"gram": _take("gram", weighed, sizes)}
    of_both = ({n: v for n, v in xs.items() if n in kept} for xs in (x_of, after_x))
    return found, (next(of_both), next(of_both))


def _inputs(
    program: Program,
    leaders: Sequence[str],
    params: Mapping[str, Any],
    x: Any,
    known: Mapping[str, jax.Array],
) -> tuple[dict[str, tuple[jax.Array, jax.Array | None]], dict[str, jax.Array]]:
    """The inputs of some weights of a block, `[tokens, in]`, and the sizes of groups, if any; and
    as they are, where another run can go on from them."""
    turned = [module + ".weight" for module, _ in program.rotated]
    turned += [
        name.removesuffix(flat.LEAVES[0]) + ".weight" for name in params if name.endswith(flat.LEAVES[0])
    ]

    def look(place: interpret.Place, rounded: Callable[[], Any]) -> Any:
        if place.name not in leaders or place.op not in READS:
            return None
        known = {} if place.op != "dot" or place.name in turned else {place.name: place.x}
        return (rows_of(place, rounded()), place.groups), known

    found = watched(program, block_of(program), look, known)(params, x, cache_scales(params))[1]
    rows, kept = {n: rows for n, (rows, _) in found.items()}, [xs for _, xs in found.values()]
    return rows, {n: x for xs in kept for n, x in xs.items()}


def _take(need: str, rows: jax.Array, sizes: jax.Array | None) -> jax.Array:
    statistic = STATISTICS[need]
    if sizes is None:
        return statistic.take(rows)
    return statistic.take_groups(rows, sizes)


def through(
    program: Program, params: Mapping[str, Any], xs: Sequence[Any], held: Mapping[str, Sequence[Any]] = {}
) -> list[jax.Array]:
    """A block on every batch, from inputs of its linears on that are known."""
    params = jax.device_put(params)

    def run(i: int) -> jax.Array:
        if not held:
            return run_block(program, params, xs[i])
        return _resumed(program, params, xs[i], {n: found[i] for n, found in held.items()})

    return jax.block_until_ready([run(0), *each(run, range(1, len(xs)))])


@jit(static_argnums=(0,))
def _resumed(program: Program, params: Mapping[str, Any], x: Any, known: Mapping[str, Any]) -> jax.Array:
    return watched(program, block_of(program), None, known)(params, x, cache_scales(params))[0]
