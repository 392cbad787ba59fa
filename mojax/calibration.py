"""What calibration saw of every site's input: sums, maxima and counts, which merge by `+` and `max`."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from mojax import checkpoint, interpret
from mojax.compile import jit
from mojax.errors import InputError, nearest
from mojax.model import Model, Program, embed
from mojax.models.layers import Block
from mojax.threads import each


class Statistic(NamedTuple):
    """One number per channel or site: how to take it from inputs float32 `[tokens, in]`, how two merge."""

    take: Callable[[jax.Array], jax.Array]
    merge: Callable[[Any, Any], Any]


STATISTICS: Mapping[str, Statistic] = {
    "absmax": Statistic(lambda x: jnp.max(jnp.abs(x), axis=0), np.maximum),  # [in]
    "sumsq": Statistic(lambda x: jnp.sum(x * x, axis=0), np.add),  # [in]
    "count": Statistic(
        lambda x: jnp.asarray(x.shape[0], jnp.int32), lambda a, b: np.int64(a) + np.int64(b)
    ),  # [], tokens
}


class Stats(dict[str, dict[str, Any]]):
    """`stats[weight][statistic]`, by checkpoint name; see `STATISTICS` for shapes."""

    def merge(self, other: Mapping[str, Mapping[str, Any]]) -> Stats:
        """Both together, as if one calibration had seen all the tokens."""
        out = Stats({name: dict(values) for name, values in self.items()})
        for name, values in other.items():
            mine = out.setdefault(name, {})
            for key, value in values.items():
                mine[key] = STATISTICS[key].merge(mine[key], value) if key in mine else value
        return out

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
            if statistic not in STATISTICS:
                raise InputError(f"{path}: {key}: unknown statistic{nearest(statistic, STATISTICS)}")
            stats.setdefault(name, {})[statistic] = np.array(value)
        return stats


@jit(static_argnums=(0, 1, 2))
def observe(
    program: Program, needs: tuple[str, ...], leaders: tuple[str, ...], params: Mapping[str, Any], x: Any
) -> tuple[jax.Array, dict[str, dict[str, jax.Array]]]:
    """One block on `x [batch, length, hidden]`, and the statistics of the inputs of the weights `leaders`."""

    def tap(name: str, value: jax.Array, axes: tuple[int, ...]) -> tuple[None, Any]:
        if name not in leaders:
            return None, None
        rows = value if not axes else jnp.moveaxis(value, axes, range(value.ndim - len(axes), value.ndim))
        width = int(np.prod(rows.shape[rows.ndim - max(len(axes), 1) :]))
        rows = rows.reshape(-1, width).astype(jnp.float32)
        return None, {need: STATISTICS[need].take(rows) for need in needs}

    def block(params: Mapping[str, Any], x: Any) -> jax.Array:
        return program.family.block(program.config, program.kind, params, x, jnp.arange(x.shape[1]))

    return interpret.intercept(block, tap)(params, x)


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
    for y, taps in [run(xs[0]), *each(run, xs[1:])]:  # the first alone, so that it is compiled once
        out.append(y)
        merged = merged.merge(taps)
    return out, Stats({name: dict(merged[leader[n:]]) for name, leader in groups.items()})
