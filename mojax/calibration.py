"""What calibration saw of every site's input: sums, maxima and counts, which merge by `+` and `max`."""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from mojax import attention, checkpoint, flat, interpret
from mojax.compile import jit
from mojax.errors import InputError, nearest
from mojax.experts import listed
from mojax.model import Model
from mojax.models.layers import Block
from mojax.program import Program, embed
from mojax.threads import flow


class Statistic(NamedTuple):
    """What calibration keeps of the inputs of a site.

    Attributes:
      of: what each token adds, from inputs float32 `[tokens, in]`: `[tokens, ...]`; None where that would
        be too much to hold.
      reduce: how tokens, batches and devices become one; "join" keeps rows, at most `ROWS`.
      whole: of all tokens at once in the dtype that they have, where `of` is None.
    """

    of: Callable[[jax.Array], jax.Array] | None
    reduce: Literal["max", "sum", "join"]
    whole: Callable[[jax.Array], jax.Array] | None = None

    def take(self, x: jax.Array) -> jax.Array:
        """Over all tokens of `x [tokens, in]`."""
        if self.of is None:
            assert self.whole is not None
            return self.whole(x)
        return {"max": jnp.max, "sum": jnp.sum}[self.reduce](self.of(x.astype(jnp.float32)), axis=0)

    def take_groups(self, x: jax.Array, sizes: jax.Array) -> jax.Array:
        """Over each group of the rows of `x [tokens, in]`: `[groups, ...]`, zero for an empty one.

        Args:
          sizes: int32 `[groups]`; rows after the last group belong to none.
        """
        ids = jnp.searchsorted(jnp.cumsum(sizes), jnp.arange(len(x)), side="right")
        if self.of is None:
            none = jnp.zeros((), x.dtype)
            return lax.map(
                lambda g: self.take(jnp.where((ids == g)[:, None], x, none)), jnp.arange(len(sizes))
            )
        x = x.astype(jnp.float32)
        if self.reduce == "sum":
            return jax.ops.segment_sum(self.of(x), ids, len(sizes))
        return jnp.maximum(jax.ops.segment_max(self.of(x), ids, len(sizes)), 0)

    def merge(self, a: Any, b: Any) -> Any:
        """Two of them as one, in int64 where they count."""
        if self.reduce == "join":
            rows = np.concatenate([np.asarray(a), np.asarray(b)], axis=-2)
            return rows[..., :: -(-rows.shape[-2] // ROWS), :]
        if isinstance(a, jax.Array) or isinstance(b, jax.Array):
            return (jnp.maximum if self.reduce == "max" else jnp.add)(a, b)
        wide = np.int64 if np.issubdtype(np.asarray(a).dtype, np.integer) else None
        return (np.maximum if self.reduce == "max" else np.add)(np.asarray(a, wide), np.asarray(b, wide))


ROWS = 4096  # of a "sample"
OCTAVES, BINS = 64, 64  # of a "histogram": from 2^-40 up, bins per octave


def product(x: jax.Array, y: jax.Array) -> jax.Array:
    """sum over tokens of `x y^T`, float32 `[in, in]` of float32 `[tokens, in]`."""
    dims = (((0,), (0,)), ((), ()))
    return lax.dot_general(x, y, dims, precision="highest", preferred_element_type=jnp.float32)


def second_moments(x: jax.Array) -> jax.Array:
    """sum over tokens of `x x^T`, float32 `[in, in]` of `[tokens, in]`; the upper half is mirrored.

    Products of bfloat16 are exact in float32, and CPUs that have them add them up faster than float32's.
    """
    x = x if x.dtype == jnp.bfloat16 else x.astype(jnp.float32)
    turned = lax.optimization_barrier(x.T)  # XLA would fold it into a product over first axes, which is slow
    size = max(256, -(-x.shape[1] // 4))  # of a piece
    starts = range(0, x.shape[1], size)
    rows = [
        jnp.matmul(
            turned[c : c + size], x[:, : c + size], precision="highest", preferred_element_type=jnp.float32
        )
        for c in starts
    ]
    columns = [[below[:, c : c + size].T for below in rows[i + 1 :]] for i, c in enumerate(starts)]
    return jnp.concatenate([jnp.concatenate([r, *c], 1) for r, c in zip(rows, columns, strict=True)])


def _histogram(x: jax.Array) -> jax.Array:
    """Counts of |x| by size, int32 `[OCTAVES * BINS]`; zeros and what is smaller go to the first bin."""
    place = (jnp.log2(jnp.abs(x.astype(jnp.float32))) + 40) * BINS
    i = jnp.clip(jnp.nan_to_num(place, nan=0), 0, OCTAVES * BINS - 1).astype(jnp.int32)
    return jnp.zeros(OCTAVES * BINS, jnp.int32).at[i.reshape(-1)].add(1)


STATISTICS: Mapping[str, Statistic] = {
    # a maximum on a CPU may lose a NaN, never an infinity
    "absmax": Statistic(lambda x: jnp.where(jnp.isnan(x), jnp.inf, jnp.abs(x)), "max"),  # [in]
    "sumsq": Statistic(jnp.square, "sum"),  # [in]
    "abssum": Statistic(jnp.abs, "sum"),  # [in]
    "count": Statistic(lambda x: jnp.ones(len(x), jnp.int32), "sum"),  # [], tokens
    "histogram": Statistic(None, "sum", _histogram),  # [OCTAVES * BINS], by size
    "sample": Statistic(
        None, "join", lambda x: x[:: max(1, min(4, len(x) // 64))].astype(jnp.float32)
    ),  # [rows, in]
    "gram": Statistic(None, "sum", second_moments),  # [in, in]
    # of caches, `[2, kv_heads, head_dim]`: see `mojax.attention.statistics`
    "high": Statistic(lambda x: x, "max"),
    "low": Statistic(jnp.negative, "max"),
    "sum": Statistic(lambda x: x, "sum"),
}
# Sums that need more than the inputs of one place: see `mojax.stream` and `mojax.gradients`.
SEQUENTIAL = ("gram", "seen_gram", "drift")  # of inputs as what was encoded before makes them, [in, in]
ROTATION = "rotation"  # under the name of a space: its orthogonal matrix, learned (see `mojax.rewrite`)
LEARNED = (ROTATION, flat.LEFT, flat.RIGHT)  # the last two under the name of a weight (see `mojax.flat`)
SUMS = (*SEQUENTIAL[1:], "output_gram")
ENCODE = "@encode"  # ends the name of a weight whose statistics are those that the encoding steps see


def rows_of(place: interpret.Place, x: jax.Array) -> jax.Array:
    """`x`, the input of a place or something of its shape, as `[*paired, tokens, in]` in its own dtype."""
    n = x.ndim
    axes = place.axes or (n - 1,)
    order = [*place.paired, *(d for d in range(n) if d not in (*place.paired, *axes)), *axes]
    width = math.prod(x.shape[d] for d in axes)
    return x.transpose(order).reshape(*(x.shape[d] for d in place.paired), -1, width)


def statistics(place: interpret.Place, needs: Iterable[str]) -> dict[str, jax.Array]:
    """The statistics of the input of one place; where a matrix per expert reads it, `[experts, ...]`."""
    rows = rows_of(place, place.x)
    found = {}
    for need in needs:
        take = STATISTICS[need].take
        if place.groups is not None:
            take = functools.partial(STATISTICS[need].take_groups, sizes=place.groups)
        for _ in place.paired:
            take = jax.vmap(take)
        found[need] = take(rows)
    return found


def merge(statistic: str, a: Any, b: Any) -> Any:
    """Two of the statistics of this name as one.

    Raises:
      InputError: it is no statistic, but a matrix that a step has learned.
    """
    if statistic in LEARNED:
        raise InputError(
            f"{statistic}: was learned, and two of them are not one; calibrate on all tokens at once"
        )
    return a + b if statistic in SUMS else STATISTICS[statistic].merge(a, b)


def merged(a: Mapping[str, jax.Array], b: Mapping[str, jax.Array]) -> dict[str, jax.Array]:
    """The statistics of two inputs of one place, together."""
    return {need: merge(need, a[need], b[need]) for need in a}


class Stats(dict[str, dict[str, Any]]):
    """`stats[weight][statistic]`, by checkpoint name; see `STATISTICS` for shapes."""

    def merge(self, other: Mapping[str, Mapping[str, Any]]) -> Stats:
        """Both together, as if one calibration had seen all the tokens."""
        out = Stats({name: dict(values) for name, values in self.items()})
        for name, values in other.items():
            mine = out.setdefault(name, {})
            for key, value in values.items():
                mine[key] = merge(key, mine[key], value) if key in mine else value
        return out

    def add(self, other: Mapping[str, Mapping[str, Any]]) -> None:
        """The same in place, array by array: for sums that are as large as a batch's."""
        for name, values in other.items():
            mine = self.setdefault(name, {})
            for key, value in values.items():
                if key not in mine:
                    mine[key] = np.array(value)
                elif key in (*SUMS, "gram"):
                    np.add(mine[key], np.asarray(value), out=mine[key])
                else:
                    mine[key] = merge(key, mine[key], value)

    def save(self, path: str | Path) -> None:
        """One safetensors file; tensor names are `<weight>.<statistic>`."""
        flat = {f"{n}.{k}": np.asarray(v) for n, values in self.items() for k, v in values.items()}
        checkpoint.write_shard(Path(path), flat)

    @staticmethod
    def load(path: str | Path) -> Stats:
        """Read what `save` wrote.

        Raises:
          InputError: not such a file, or an unknown statistic.
        """
        stats = Stats()
        for key, value in checkpoint.read_shard(Path(path)).items():
            name, _, statistic = key.rpartition(".")
            if statistic not in (known := (*STATISTICS, *SUMS, *LEARNED)):
                raise InputError(f"{path}: {key}: unknown statistic{nearest(statistic, known)}")
            stats.setdefault(name, {})[statistic] = np.array(value)
        return stats


def encoding(stats: Mapping[str, Mapping[str, Any]]) -> dict[str, dict[str, Any]]:
    """By weight, what the encoding steps see: what was kept for them, over what was taken before any step."""
    whole = {name: dict(values) for name, values in stats.items() if not name.endswith(ENCODE)}
    for name, values in stats.items():
        if name.endswith(ENCODE):
            whole.setdefault(name.removesuffix(ENCODE), {}).update(values)
    return whole


@jit(static_argnums=(0, 1, 2))
def observe(
    program: Program, needs: tuple[str, ...], leaders: tuple[str, ...], params: Mapping[str, Any], x: Any
) -> tuple[jax.Array, dict[str, dict[str, jax.Array]]]:
    """One block on `x [batch, length, hidden]`, and the statistics of the inputs of the weights `leaders`."""

    def tap(place: interpret.Place) -> tuple[None, Any]:
        seen = place.name in leaders and place.op != "gather"
        if not seen:
            return None, None
        more = attention.statistics(place.x) if place.op == "cache" else {}
        return None, statistics(place, needs) | more

    def block(params: Mapping[str, Any], x: Any) -> jax.Array:
        return program.family.block(program.config, program.kind, params, x, jnp.arange(x.shape[1]))

    return interpret.intercept(block, tap)(params, x)


def tokens_per_expert(stats: Mapping[str, Mapping[str, Any]]) -> dict[str, list[int]]:
    """By layer of experts (`model.layers.5.mlp.experts`), how many tokens each expert saw."""
    counts = {name: values["count"] for name, values in stats.items() if "*" in name and "count" in values}
    return {name.split(".*")[0]: [int(n) for n in count] for name, count in counts.items()}


def coverage(counts: Mapping[str, Sequence[int]]) -> tuple[str, ...]:
    """Notes for a report on `tokens_per_expert` of all layers: who saw none, the fewest and the median."""
    unseen = {layer: [i for i, n in enumerate(seen) if n == 0] for layer, seen in counts.items()}
    missed = [
        f"{len(idle)} of {len(counts[layer])} experts of {layer} saw no calibration token: {listed(idle)}"
        for layer, idle in unseen.items()
        if idle
    ]
    every = [n for seen in counts.values() for n in seen]
    if not every:
        return ()
    said = f"calibration tokens per expert: {min(every)} at least, {np.median(every):.0f} in the median"
    if missed:
        how = "their scales are from the weights alone, those of inputs are the layer's"
        said = f"{'; '.join(missed)}; {how}; {said}"
    return (said,)


def batches(tokens: np.ndarray, size: int | None = None) -> list[np.ndarray]:
    """`tokens [sequences, length]` in batches of equal shape, of about `size` tokens each.

    By default 1024 on a CPU, where a batch should stay in the cache, and 16384 on an accelerator.
    """
    size = size or (1024 if jax.default_backend() == "cpu" else 16384)
    rows = max(1, min(len(tokens), size // tokens.shape[1]))
    while len(tokens) % rows:
        rows -= 1  # one shape: one compilation
    return [tokens[i : i + rows] for i in range(0, len(tokens), rows)]


def start(model: Model, tokens: np.ndarray) -> list[jax.Array]:
    """The input of the first block, in batches."""
    outside = model.outside("embed")
    return [embed(model._family, model.hyper, outside, t) for t in batches(tokens)]


def calibrate_block(
    model: Model, block: Block, xs: Sequence[jax.Array], groups: Mapping[str, str], needs: tuple[str, ...]
) -> tuple[list[jax.Array], Stats]:
    """Run one block and take statistics.

    Args:
      xs: batches of the block's input.
      groups: weight (or cache) name -> the name whose input it shares; only those are observed.
      needs: statistics to take.
    Returns:
      batches of the block's output, and the statistics under every name of `groups`.
    """
    n = len(block.prefix)
    leaders = tuple(sorted({leader[n:] for leader in groups.values()}))
    params = jax.device_put(model.local(block))
    program = model.program(block)

    def run(x: jax.Array) -> tuple[jax.Array, dict[str, dict[str, np.ndarray]]]:
        y, taps = observe(program, needs, leaders, params, x)
        return y, {name: {k: np.asarray(v) for k, v in values.items()} for name, values in taps.items()}

    out, merged = [], Stats()
    for part in (xs[:1], xs[1:]):  # the first alone, so that it is compiled once
        for y, taps in flow(run, part):
            out.append(y)
            merged.add(taps)
    return out, Stats({name: dict(merged[leader[n:]]) for name, leader in groups.items()})
