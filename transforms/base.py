"""What a transform is: a pure function from the parameters of a block to new ones, and `chain`."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from types import MappingProxyType
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from mojax.compile import jit
from mojax.formats.base import QTensor, Scheme
from mojax.structure.spaces import Space
from mojax.trace import Site

Params = Mapping[str, Any]
Stats = Mapping[str, Mapping[str, Any]]
Phase = Literal["model", "block", "encode", "tune"]
Sites = Literal["norms", "mlp", "all"]


class Outcome(NamedTuple):
    """What a step did for one weight (or one group of weights, by its first) on its own objective.

    Attributes:
      step: the step's name.
      weight: the checkpoint's name.
      before, after: the objective without and with the step; equal where the step left the weight alone.
      note: what a user should know of this weight, "" for nothing.
    """

    step: str
    weight: str
    before: float
    after: float
    note: str = ""


def _forget(outcome: Outcome) -> None:
    """Nobody asked for outcomes."""


class Context(NamedTuple):
    """What a transform may look at. Names are checkpoint names.

    Attributes:
      sites: the places of this block where a weight meets an activation.
      schemes: by module, how each linear that must be encoded will run.
      shared: weights that a server fuses and that must share their outer scale, as tuples of names.
      kept: tensors that a rule of the recipe keeps; nothing may be folded into them.
      targets: in the "encode" phase, the matrices in full precision that encoded weights stand for, as
        migrations and corrections have made them.
      log: called with the outcome of a step for every weight whose objective it knows.
      spaces: in the "model" phase, what may be turned.
    """

    sites: tuple[Site, ...]
    schemes: Mapping[str, Scheme]
    shared: tuple[tuple[str, ...], ...] = ()
    kept: frozenset[str] = frozenset()
    targets: Params = MappingProxyType({})
    log: Callable[[Outcome], None] = _forget
    spaces: tuple[Space, ...] = ()

    def only(self, weights: Iterable[str]) -> Context:
        """The same of some weights alone."""
        names = frozenset(weights)
        return self._replace(
            sites=tuple(s for s in self.sites if s.weight in names),
            schemes={m: scheme for m, scheme in self.schemes.items() if m + ".weight" in names},
            shared=tuple(group for group in self.shared if names.issuperset(group)),
        )


Apply = Callable[[Params, Stats, Context], Params]


class Passage(NamedTuple):
    """A whole block on its way from source to result, for a step that tunes it.

    Attributes:
      run: `run(params, x) -> y`, `[batch, length, hidden]`: the block as a pure function of its leaves, which
        are arrays under their names without `prefix`. Inputs of linears are rounded as a server rounds them,
        and gradients pass straight through. Hashable, and equal for blocks of one kind: a static argument.
      prefix: of the block's names.
      inputs: batches of what reaches the block through what was encoded before it.
      outputs: batches of what the source's block gives for the source's inputs.
    """

    run: Callable[[Params, jax.Array], jax.Array]
    prefix: str
    inputs: Sequence[jax.Array]
    outputs: Sequence[jax.Array]


Tune = Callable[[Params, Passage, Context], Params]
Learn = Callable[[Params, Passage, Context], Stats]


class Transform(NamedTuple):
    """One step of a recipe.

    Attributes:
      apply: `(params, stats, context) -> params`; returns only the leaves it changes or adds.
        `stats[weight][statistic]` is what calibration saw of that weight's input.
      needs: the statistics it reads (`mojax.calibration.STATISTICS`); none means no data is needed.
      rewrites: which leaves that are not encoded it changes (norm gains that absorb a scale).
      encodes: whether its leaves are `QTensor`s; the last step of a recipe does.
      anew: what earlier steps have chosen and this one does not look at: "codes" (it finds its own, under
        their scales), or "scales", and so codes too; "" where it goes on from both.
      chooses: whether its codes are other than the nearest.
      phase: "block", called once per block, leaves the function of the block as it is; "encode" chooses
        scales and codes (or corrects what they stand for), and is called once per input of a block where it
        needs data, in the order of the program, so that it sees inputs as earlier encoded weights make them;
        "model" is called once, and chooses how the spaces of the whole model are turned: it returns by the
        name of a space an orthogonal matrix float32 `[size, size]`, or signs int8 `[size]` for the random
        Hadamard matrix diag(signs) H (`mojax.rotation`). `params` are the model's with norm gains folded,
        and `stats` those of its inputs; both are empty for a step that needs none.
      turns: the kinds of spaces (`mojax.structure.spaces.Space`) that a step of the "model" phase turns.
      tune: `(params, passage, context) -> params` of a step of the "tune" phase, called once per block after
        its last "encode" step with every leaf of it, encoded ones as `QTensor`s, and with their matrices of
        full precision as `context.targets`; returns the leaves it changes. Such a step's `apply` encodes what
        no step before it has.
      learn: `(params, passage, context) -> stats` of a step of the "block" phase, called with every leaf of a
        block, as the steps before have made them: what its `apply` finds in `stats` from then on. `passage`
        is of the source, with inputs rounded; its gradients know that scales follow what is rounded.
      flattens: whether it puts learned matrices before the linears of blocks, as leaves (`mojax.flat`).
      rank: of the branch that it puts beside the linears of blocks, as leaves (`mojax.beside`); 0 for none.
      name: that of its file, where it comes from a recipe.
    """

    apply: Apply
    needs: tuple[str, ...] = ()
    rewrites: Callable[[Context], frozenset[str]] = lambda context: frozenset()
    encodes: bool = False
    anew: Literal["", "codes", "scales"] = ""
    chooses: bool = False
    phase: Phase = "block"
    turns: tuple[str, ...] = ()
    tune: Tune | None = None
    learn: Learn | None = None
    flattens: bool = False
    rank: int = 0
    name: str = ""


class Fold(NamedTuple):
    """A producer that is divided by s, the weights that read what it produces, multiplied by s, and the bias
    beside the producer, if any, divided too; `channels` as those of a `Site`."""

    producer: str
    readers: tuple[str, ...]
    also: tuple[str, ...] = ()
    channels: tuple[tuple[int, bool], ...] = ()

    def tied(self, x: jax.Array, reduce: Callable[..., jax.Array]) -> jax.Array:
        """What input channels `[*batch, in]` have, reduced over those that share a scale: that of `s`."""
        if not self.channels:
            return x
        apart = tuple(i for i, (_, has) in enumerate(self.channels) if not has)
        x = x.reshape([n for n, _ in self.channels])
        return (reduce(x, axis=apart) if apart else x).reshape(-1)

    def spread(self, s: jax.Array) -> jax.Array:
        """Scales of the producer's channels `[*batch, channels]` as those of inputs, `[*batch, in]`."""
        if not self.channels:
            return s
        s = s.reshape([n if has else 1 for n, has in self.channels])
        return jnp.broadcast_to(s, [n for n, _ in self.channels]).reshape(-1)


def folds(context: Context, sites: Sites = "mlp") -> tuple[Fold, ...]:
    """Where scales can move without touching what is kept.

    Every reader is encoded, and the producer too, unless it is a norm gain that no rule keeps. The layers
    of a scanned stack have scales of their own; what is between the linears of experts stays.

    Args:
      sites: "norms": what a norm produces; "mlp": also what a linear does, as up for down; "all": also the
        values of attention, where query heads that share a head of values share its scales.
    """
    encoded = {module + ".weight" for module in context.schemes}
    # More than one scale a row, or a stack of matrices to divide.
    others = {
        s.group
        for s in context.sites
        if s.op != "dot"
        or (s.channels and (s.batch or sites != "all"))
        or (s.producer in encoded and (s.batch or sites == "norms"))
    }
    found: dict[tuple[Any, ...], list[str]] = {}
    for site in context.sites:
        if site.producer is not None and site.group not in others:
            key = (site.group, site.producer, site.also, site.channels)
            found.setdefault(key, []).append(site.weight)
    fixed = context.kept | {site.weight for site in context.sites if site.weight not in encoded}
    return tuple(
        Fold(producer, tuple(readers), also, channels)
        for (_, producer, also, channels), readers in found.items()
        if fixed.isdisjoint((producer, *also)) and encoded.issuperset(readers)
    )


def rewrites(context: Context, sites: Sites = "mlp") -> frozenset[str]:
    """The norm gains, and the biases beside what absorbs a scale, that change with `folds`."""
    moved = {name for f in folds(context, sites) for name in (f.producer, *f.also)}
    return frozenset(moved) - {m + ".weight" for m in context.schemes}


def movable(fold: Fold, params: Params) -> bool:
    """Whether what is divided can hold the quotient."""
    return all(jnp.issubdtype(params[n].dtype, jnp.floating) for n in (fold.producer, *fold.also))


def move(fold: Fold, params: Params, s: jax.Array, context: Context, absmax: jax.Array | None) -> Params:
    """The leaves of a fold with scales `s`, float32 `[*batch, channels]`, moved from input to weights.

    Args:
      absmax: float32 `[*batch, in]`, the largest magnitude of every channel before; where a static scale of
        the input is needed, its leaf is max(absmax / s).
    """
    changed: dict[str, Any] = {n: _rows(params[n], s) for n in (fold.producer, *fold.also)}
    s = fold.spread(s)
    for w in fold.readers:
        changed[w] = _columns(params[w], s)
        module = w.removesuffix(".weight")
        inputs = context.schemes[module].inputs
        if inputs is not None and inputs.static and absmax is not None:
            changed[module + ".input_scale"] = np.asarray(jnp.max(absmax / s, axis=-1), np.float32)
    return changed


@jit()
def _columns(w: jax.Array, s: jax.Array) -> jax.Array:
    return (w.astype(jnp.float32) * jnp.expand_dims(s, -2)).astype(w.dtype)


@jit()
def _rows(w: jax.Array, s: jax.Array) -> jax.Array:
    return (w.astype(jnp.float32) / (s.reshape(w.shape) if w.size == s.size else s[:, None])).astype(w.dtype)


def placed(sites: Iterable[Site], prefix: str) -> tuple[Site, ...]:
    """The sites of a block under their checkpoint names."""
    return tuple(
        s._replace(
            weight=prefix + s.weight,
            producer=s.producer and prefix + s.producer,
            also=tuple(prefix + name for name in s.also),
        )
        for s in sites
    )


def chain(*transforms: Transform) -> Transform:
    """The transforms one after another, as one.

    In the "encode" phase an array that a step returns for a weight is its new target; a QTensor sets its
    scales and codes, and stays when a later step changes the target.
    """

    def apply(params: Params, stats: Stats, context: Context) -> Params:
        changed: dict[str, Any] = {}
        weights = [module + ".weight" for module in context.schemes]
        for t in transforms:
            now = {**params, **changed}
            plain = {n: now[n] for n in weights if n in now and not isinstance(now[n], QTensor)}
            targets = {**context.targets, **plain}
            new = dict(t.apply(now, stats, context._replace(targets=targets)))
            moved = {n: w for n, w in new.items() if n in targets and not isinstance(w, QTensor)}
            context = context._replace(targets={**targets, **moved})
            changed |= {n: w for n, w in new.items() if n not in moved or not isinstance(now.get(n), QTensor)}
        return changed

    return Transform(
        apply,
        tuple(dict.fromkeys(need for t in transforms for need in t.needs)),
        lambda context: frozenset().union(*(t.rewrites(context) for t in transforms)),
        any(t.encodes for t in transforms),
        phase=transforms[-1].phase if transforms else "block",
    )
