"""The weights that an encoding step works on, as matrices `[out, in]`, one by one.

Weights that a server fuses share their outer scale; it is taken over all of them before anything is encoded.
The experts or layers of a leaf are matrices of their own.
"""

from __future__ import annotations

import collections
import math
import threading
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from mojax.compile import jit
from mojax.errors import NotFiniteError
from mojax.formats.base import Format, QTensor
from mojax.formats.leaf import canonical
from mojax.formats.rows import common_rows, cut
from mojax.rounding.objective import Factor, damped, factor, value
from mojax.rounding.scales import Scales, encoded
from mojax.threads import each
from mojax.transforms.base import Context, Outcome, Params, Stats


class Leaf(NamedTuple):
    """A weight as its matrices `[out, in]` in turn: one, or one for every entry of its batch axes."""

    name: str
    matrices: Sequence[Any]  # views where the leaf lies so
    contract: tuple[int, ...]
    batch: tuple[int, ...]
    shape: tuple[int, ...]

    def whole(self, parts: Sequence[QTensor]) -> QTensor:
        """The encoded leaf, from its encoded matrices."""
        if not self.batch and not self.contract:
            return parts[0]
        sizes = tuple(self.shape[a] for a in self.batch)

        def stack(*arrays: Any) -> np.ndarray:
            return np.stack([np.asarray(a) for a in arrays]).reshape(*sizes, *arrays[0].shape)

        codes = stack(*(q.codes for q in parts))
        scales = {level: stack(*(q.scales[level] for q in parts)) for level in parts[0].scales}
        q = parts[0]
        return QTensor(codes, scales, q.format, self.shape, q.dtype, self.contract, self.batch)


class Shared:
    """What matrices that read one input have in common, made once, by whoever needs it first."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._made: dict[Any, Any] = {}

    def once(self, key: Any, make: Callable[[], Any]) -> Any:
        """`make()`, or what it was the first time."""
        with self._lock:
            if key not in self._made:
                self._made[key] = make()
            return self._made[key]


class Matrix(NamedTuple):
    """One matrix of an encoding step.

    Attributes:
      name: of its leaf; number: which matrix of the leaf.
      w: `[out, in]` in the dtype of the checkpoint, what the codes stand for.
      format: of the weight.
      scales: of the step before, else the format's own.
      q: what the step before made of it, `[out, in]`; None where this is the first.
      stats: of this matrix's inputs.
      shared: with the matrices whose "gram" is the same array; None: with none.
    """

    name: str
    number: int
    w: Any
    format: Format
    scales: Scales
    q: QTensor | None
    stats: Mapping[str, Any]
    shared: Shared | None = None

    @property
    def values(self) -> jax.Array:
        """What the codes at hand decode to, float32; the nearest ones where there are none yet."""
        q = self.format.encode_as(jnp.asarray(self.w), self.scales) if self.q is None else self.q
        return jnp.asarray(q.format.decode(q))

    @property
    def tokens(self) -> int:
        """How many tokens its inputs were seen of."""
        return int(np.asarray(self.stats.get("count", 0)))

    def objective(self, damping: float) -> tuple[jax.Array, jax.Array | None]:
        """H `[in, in]` and G `[out / b, b, b]` (None: the identity), damped, of tr(G D H D^T).

        Args:
          damping: share of the mean diagonal that is added, more for few tokens.
        """
        h = self._once(
            ("damped", damping),
            lambda: damped(jnp.asarray(self.stats["gram"]), self.tokens or None, damping),
        )
        g = self.stats.get("output_gram")
        return h, None if g is None else damped(jnp.asarray(g), None, damping)

    def columns(self, damping: float, falling: bool = True) -> Factor:
        """The factor of H of `objective(damping)`; see `mojax.rounding.objective.factor`."""
        h = self.objective(damping)[0]
        return self._once(("factor", damping, falling), lambda: factor(h, falling))

    def _once(self, key: Any, make: Callable[[], Any]) -> Any:
        return make() if self.shared is None else self.shared.once(key, make)

    @property
    def seen(self) -> bool:
        """Whether calibration has seen inputs of it."""
        return "gram" in self.stats and bool(np.any(np.diagonal(np.asarray(self.stats["gram"]))))


class Solved(NamedTuple):
    """What a step made of a matrix.

    Attributes:
      scales: as `Matrix.scales`.
      values: float32 `[out, in]` on the grid of the scales; None for those nearest to the matrix.
      before, after: the step's objective; equal where it left the matrix alone.
      note: for the report, "" for nothing.
    """

    scales: Scales
    values: Any
    before: float
    after: float
    note: str = ""


def unchanged(m: Matrix, note: str = "") -> Solved:
    """The matrix as the step before left it."""
    return Solved(m.scales, None if m.q is None else m.values, 0.0, 0.0, note)


def unchanged_scales(m: Matrix) -> Solved:
    """The codes nearest to the matrix under the scales of the step before."""
    return Solved(m.scales, None, 0.0, 0.0)


Fit = Callable[[Format, np.float32, np.dtype], Any]


def own_outer(format: Format, amax: np.float32, dtype: np.dtype) -> Any:
    """The outer scale for a largest magnitude, None where the format has none."""
    return format.outer(np.asarray(amax), dtype) if format.static else None


def encode(
    step: str,
    params: Params,
    stats: Stats,
    context: Context,
    solve: Callable[[Matrix], Solved],
    outer: Fit | None = None,
) -> dict[str, Any]:
    """Every encoded weight, solved as matrices side by side.

    Args:
      step: its name, for outcomes.
      solve: what the step does.
      outer: the outer scale of a group for its largest magnitude; given by a step that sets scales anew.
    Returns:
      QTensors, by name.
    Raises:
      NotFiniteError: a weight holds NaN or infinity.
    """
    found = leaves(context.targets, context)
    work = [(g, i) for g in groups(context) for i in range(len(found[g[0]].matrices))]
    same = {n: id(stats[n]["gram"]) if "gram" in stats.get(n, {}) else n for n in found}
    left = collections.Counter((same[n], i) for group, i in work for n in group)
    shared, lock = {key: Shared() for key in left}, threading.Lock()

    def run(item: tuple[tuple[str, ...], int]) -> dict[str, tuple[QTensor, Solved]]:
        group, i = item
        made = {}
        for m in _matrices(found, group, i, params, stats, context, outer):
            key = same[m.name], i
            solved = solve(m._replace(shared=shared[key]))
            with lock:
                left[key] -= 1
                if not left[key]:
                    del shared[key]
            if solved.values is None:
                q = m.format.encode_as(jnp.asarray(m.w), solved.scales)
            else:
                q = encoded(m.format, solved.values, solved.scales, m.w.dtype)
            made[m.name] = jax.tree.map(np.asarray, q), solved
        return made

    parts: dict[str, list[tuple[QTensor, Solved]]] = {}
    for made in each(run, work):
        for name, part in made.items():
            parts.setdefault(name, []).append(part)
    for name, pairs in parts.items():
        before, after = (math.fsum(getattr(s, k) for _, s in pairs) for k in ("before", "after"))
        notes = dict.fromkeys(s.note for _, s in pairs if s.note)
        context.log(Outcome(step, name, before, after, "; ".join(notes)))
    return {name: found[name].whole([q for q, _ in pairs]) for name, pairs in parts.items()}


def groups(context: Context) -> list[tuple[str, ...]]:
    """The weights to encode, those that share an outer scale together."""
    names = [module + ".weight" for module in context.schemes]
    shared = [group for group in context.shared if set(group) <= set(names)]
    grouped = {name for group in shared for name in group}
    return [*shared, *((n,) for n in names if n not in grouped)]


def leaves(params: Params, context: Context) -> dict[str, Leaf]:
    """What is to be encoded; a leaf `[out, in]` where no site says otherwise."""
    axes = {site.weight: (site.contract, site.batch) for site in context.sites if site.op != "gather"}
    found = {}
    for name in (module + ".weight" for module in context.schemes):
        w = params[name]
        contract, batch = axes.get(name, ((), ()))
        if not batch and len(w.shape) == 2 and contract in ((), (1,)):
            found[name] = Leaf(name, [w], (), (), tuple(w.shape))
            continue
        whole = canonical(np.asarray(w), contract, batch)
        found[name] = Leaf(name, whole.reshape(-1, *whole.shape[-2:]), contract, batch, tuple(w.shape))
    return found


def maxima(found: Mapping[str, Leaf], group: Sequence[str], i: int) -> np.float32:
    """The largest magnitude in matrix `i` of the weights of a group.

    Raises:
      NotFiniteError: one holds NaN or infinity.
    """
    rows = common_rows([leaf.matrices[0].shape for leaf in found.values()])
    amax = {name: largest(found[name].matrices[i], rows) for name in group}
    for name, top in amax.items():
        if not np.isfinite(top):
            raise NotFiniteError(
                f"{name.replace('*', str(i))}: holds NaN or infinity, which no format can hold; repair the "
                f"checkpoint, or add --keep={name} --noevaluate to leave this tensor as it is, NaN and all"
            )
    return np.float32(max(amax.values()))


def _matrices(
    found: Mapping[str, Leaf],
    group: tuple[str, ...],
    i: int,
    params: Params,
    stats: Stats,
    context: Context,
    outer: Fit | None,
) -> list[Matrix]:
    """Matrix `i` of the weights of a group, under the scales that they have so far."""
    top = None
    made = []
    for name in group:
        leaf, format = found[name], context.schemes[name.removesuffix(".weight")].weights
        w, now = leaf.matrices[i], params[name]
        mine = {k: entry(v, leaf, i) for k, v in stats.get(name, {}).items()}
        if isinstance(now, QTensor) and outer is None:
            q = _row(now, leaf, i)
            made.append(Matrix(name, i, w, format, dict(q.scales), q, mine))
            continue
        top = maxima(found, group, i) if top is None else top
        scale = (outer or own_outer)(format, top, np.dtype(w.dtype))
        made.append(Matrix(name, i, w, format, _fit(format, jnp.asarray(w), scale), None, mine))
    return made


def _row(q: QTensor, leaf: Leaf, i: int) -> QTensor:
    """Matrix `i` of an encoded leaf."""
    sizes = tuple(leaf.shape[a] for a in leaf.batch)
    for index in np.unravel_index(i, sizes) if sizes else ():
        q = q.row(int(index))
    return q if not q.contract else QTensor(q.codes, q.scales, q.format, leaf.matrices[0].shape, q.dtype)


def entry(statistic: Any, leaf: Leaf, i: int) -> Any:
    """A statistic of matrix `i`, of one that may be of all matrices `[*batch, ...]`."""
    sizes = tuple(leaf.shape[a] for a in leaf.batch)
    value = np.asarray(statistic)
    if not sizes or value.shape[: len(sizes)] != sizes:
        return value
    return value.reshape(-1, *value.shape[len(sizes) :])[i]


@jit(static_argnums=(0,))
def _fit(format: Format, w: jax.Array, outer: Any) -> Scales:
    return format.fit(w, outer)


@jit()
def _largest(w: Any) -> jax.Array:
    top = jnp.max(jnp.abs(w)).astype(jnp.float32)
    return jnp.where(jnp.all(jnp.isfinite(w)), top, jnp.inf)  # XLA's maximum on a CPU may lose a NaN


def largest(w: Any, rows: int) -> np.float32:
    """The largest magnitude of a weight, `rows` at a time; NaN and infinity show."""
    return np.max([np.float32(_largest(part)) for part in cut(w, rows)])


def error(m: Matrix, values: Any, h: jax.Array, g: jax.Array | None) -> float:
    """tr(G D H D^T) of values for a matrix."""
    return float(value(jnp.asarray(values) - jnp.asarray(m.w).astype(jnp.float32), h, g))
