"""A model with its residual stream and value heads turned by orthogonal matrices, tensor by tensor.

Every axis of a space (`mojax.structure.spaces`) becomes `x Q`, in blocks of the size of Q; before that,
weights absorb the norm gain in front of them, and the gain becomes 1. A head that is tied to the embedding
gets a tensor of its own, since only one of the two has a gain in front of it.
"""

from __future__ import annotations

import dataclasses
import functools
import os
import threading
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from types import MappingProxyType, ModuleType
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from mojax import calibration, experts, trace
from mojax.calibration import ROTATION, Stats, calibrate_block
from mojax.checkpoint import Derived, Spec
from mojax.distance import recorded
from mojax.errors import InputError
from mojax.formats.base import Scheme
from mojax.model import Lazy, Model
from mojax.plans import Plan
from mojax.reads import reads
from mojax.recipe import Recipe
from mojax.resolve import made_steps
from mojax.rotation import turn
from mojax.rules import RULES
from mojax.structure.spaces import BrokenError, Space, followed
from mojax.transforms.base import Context, Outcome, Transform

TIED = "tie_word_embeddings"  # of config.json
SAVED = "rotations.npz"  # the matrices that cannot be made anew, in an output
LEARNED = 4096  # tokens that rotations are learned from, at most
EMPTY: Mapping[str, np.ndarray] = MappingProxyType({})

Matrices = Callable[[], Mapping[str, np.ndarray]]


def rewritten(model: Model, plan: Plan, stats: Mapping[str, Mapping[str, Any]]) -> Model:
    """The model after the steps of the plan that rewrite it as a whole; itself if there are none.

    Reads no weight, and reads them as they come: a tensor is turned at each access, none is kept.

    Args:
      model: in full precision, as the plan was made for.
      stats: what `learned` found.
    Raises:
      InputError: `stats` lacks a matrix that must be learned.
    """
    return _rewritten(model, plan.steps, plan.schemes, stats)


def outlined(model: Model, steps: Sequence[Transform]) -> Model:
    """The same for a plan that is not made yet: names, shapes and dtypes are right.

    Raises:
      InputError: the model does not keep its function when it is turned; the message names the tensor.
    """
    return _rewritten(model, steps, {}, {})


def reasons(model: Model, recipe: Recipe, steps: Sequence[Transform]) -> dict[str, str]:
    """What becomes of the tensors that the steps rewrite, in words, by name in `params`."""
    found: dict[str, str] = {}
    named = [(name, step) for (name, _), step in zip(recipe.steps, steps, strict=True)]
    for name, step in (pair for pair in named if pair[1].phase == "model"):
        _, _, spaces = _turnable(model, step)
        for leaf in (leaf for s in spaces for leaf, _ in s.axes):
            found[leaf] = f"turned by {name}" if leaf in model.shapes else f"untied by {name}"
        found |= {gain: f"becomes 1, by {name}" for s in spaces for gain, _ in s.gains}
    return found


def as_recorded(out: Model, source: Model) -> Model:
    """The source as the steps that an output of ours records have rewritten it; itself for any other."""
    recipe = recorded(out)
    steps = made_steps(recipe) if recipe is not None else ()
    found = saved(out.checkpoint.folder) if out.checkpoint else {}
    return _rewritten(source, steps, out.schemes, found)


def remade(before: Model, after: Model) -> frozenset[str]:
    """The tensors of the files that are made otherwise in a rewritten model."""
    files, old = after.checkpoint, before.checkpoint
    known = old.weights if isinstance(old, Derived) else {}
    made = files.weights if isinstance(files, Derived) else {}
    return frozenset(n for n, how in made.items() if known.get(n) is not how)


def turned_elsewhere(out: Model, source: Model) -> bool:
    """Whether others have turned the residual stream of `out`: its norm gains are all 1, the source's not."""
    if recorded(out) is not None or source.family is None or out.family is not source.family:
        return False
    try:
        config, blocks = _untied(source)[0].hyper, source.blocks
        (space,) = found_spaces(source.family, config, blocks, source.dtype.name, ("residual",))
    except InputError:
        return False
    gains = [g for g, _ in space.gains if g in out.params]
    ones = [all(np.all(np.asarray(m.params[g]) == 1) for g in gains) for m in (out, source)]
    return bool(gains) and ones == [True, False]


def learned(
    model: Model,
    plan: Plan,
    tokens: np.ndarray,
    log: Callable[[Outcome], None] = lambda outcome: None,
) -> Stats:
    """The matrices that steps find with data, `stats[space]["rotation"]`.

    Args:
      tokens: int32 `[sequences, length]`; some of them are used.
      log: called with the outcome of a step.
    """
    found, done = Stats(), []
    for step in (s for s in plan.steps if s.phase == "model"):
        if step.needs:
            before = _rewritten(model, done, plan.schemes, found)
            made, _, spaces = _turnable(before, step)
            plain = _turned(made, spaces, dict)
            some = tokens[: max(1, LEARNED // tokens.shape[1])]
            stats, xs = Stats(), calibration.start(plain, some)
            for block in plain.blocks:
                xs, seen = calibrate_block(plain, block, xs, plan.observed(block), step.needs)
                stats |= seen
            context = Context((), plan.schemes, log=log, spaces=spaces)
            matrices = step.apply(plain.params, stats, context)
            found |= {name: {ROTATION: np.asarray(matrix)} for name, matrix in matrices.items()}
        done.append(step)
    return found


def save(folder: Path, model: Model) -> None:
    """Keep what `learned` found for a model in a folder, if it found anything."""
    found = model.checkpoint.learned if isinstance(model.checkpoint, Derived) else {}
    if found:
        part = folder / (SAVED + ".tmp")
        with open(part, "wb") as file:
            np.savez(file, **found)  # pyright: ignore[reportArgumentType]
        os.replace(part, folder / SAVED)


def saved(folder: Path) -> Stats:
    """What `save` kept in a folder.

    Raises:
      InputError: the file is broken.
    """
    path = folder / SAVED
    if not path.is_file():
        return Stats()
    try:
        with np.load(path, allow_pickle=False) as file:
            return Stats({name: {ROTATION: file[name]} for name in file.files})
    except (OSError, ValueError) as error:
        raise InputError(f"{path} cannot be read: {error}; quantize the model again") from error


def _rewritten(
    model: Model,
    steps: Sequence[Transform],
    schemes: Mapping[str, Scheme],
    stats: Mapping[str, Mapping[str, Any]],
) -> Model:
    for step in (s for s in steps if s.phase == "model"):
        untied, tied, spaces = _turnable(model, step)
        context = Context((), schemes, spaces=spaces)

        def solve(step: Transform = step, context: Context = context) -> Mapping[str, np.ndarray]:
            missing = [s.name for s in context.spaces if ROTATION not in stats.get(s.name, {})]
            if step.needs and missing:
                raise InputError(
                    f"{missing[0]}: its rotation must be learned from data first; give apply the statistics "
                    "of mojax.calibrate with the same plan"
                )
            if step.needs:
                return {s.name: np.asarray(stats[s.name][ROTATION]) for s in context.spaces}
            return {n: np.asarray(q) for n, q in step.apply({}, {}, context).items()}

        changed = {leaf for s in spaces for leaf, _ in s.axes}
        names = [s.name for s in spaces if ROTATION in stats.get(s.name, {})] if step.needs else []
        found = {name: np.asarray(stats[name][ROTATION]) for name in names}
        model = _turned(untied if tied & changed else model, spaces, solve, found)
    return model


# What may be turned


def _turnable(model: Model, step: Transform) -> tuple[Model, frozenset[str], tuple[Space, ...]]:
    """The model with a head of its own, the tensors that this needs, and the spaces that a step turns."""
    if model.family is None:
        raise InputError(
            f"model_type {model.config.get('model_type')!r} has no forward function here, so nothing says "
            "which weights a rotation must turn; leave out --generic, or the step"
        )
    untied, tied = _untied(model)
    found = found_spaces(model.family, untied.hyper, untied.blocks, model.dtype.name, step.turns)
    for leaf in (leaf for s in found for leaf, _ in s.axes):
        dtype = untied.tensors.spec(leaf).dtype
        if not jnp.issubdtype(dtype, jnp.floating) or np.dtype(dtype).itemsize < 2:
            raise InputError(f"{leaf}: is {np.dtype(dtype).name}, and only float tensors can be turned")
    return untied, tied, found


def _untied(model: Model) -> tuple[Model, frozenset[str]]:
    """The model with a head of its own, a copy of the embedding; and the two names, if it was tied."""
    assert model.family is not None
    parted = Model(dict(model.config) | {TIED: False}, model.params, model.family, model.checkpoint)
    new = [n for n in parted.shapes if n not in model.shapes]
    if not new:
        return model, frozenset()
    embedding = set(reads(model.family, model.hyper, "embed")) & set(reads(model.family, model.hyper, "head"))
    (head,), (table,) = new, embedding
    made = {head: Change(table, lambda w: w)}
    return _changed(parted, made), frozenset((head, table))


@functools.lru_cache(maxsize=8)
def found_spaces(
    family: ModuleType, config: Any, blocks: tuple[Any, ...], dtype: str, turns: tuple[str, ...]
) -> tuple[Space, ...]:
    """The spaces of a model of these kinds, from the traces of its parts.

    Raises:
      InputError: a part that would not compute the same; the message names the operation and the tensor.
    """
    shapes = {n: jax.ShapeDtypeStruct(s, jnp.dtype(dtype)) for n, s in family.shapes(config).items()}
    tokens = jax.ShapeDtypeStruct((1, 8), jnp.int32)
    outside = {n: s for n, s in shapes.items() if not n.startswith(tuple(b.prefix for b in blocks))}
    x = jax.eval_shape(functools.partial(family.embed, config), outside, tokens)
    first = {b.kind: b for b in reversed(blocks)}
    graphs = {}
    for kind, b in first.items():
        local = {n[len(b.prefix) :]: s for n, s in shapes.items() if n.startswith(b.prefix)}
        fn = functools.partial(family.block, config, kind)
        graphs[kind] = trace.graph(fn, local, x, jax.ShapeDtypeStruct((8,), jnp.int32))
    found: list[Space] = []
    if "residual" in turns:
        embed = trace.graph(functools.partial(family.embed, config), outside, tokens)
        head = trace.graph(functools.partial(family.head, config), outside, x)
        ends = [_space("residual", embed, [], embed.outputs, "")]
        kinds = {k: _space("residual", g, g.args[:1], g.outputs, first[k].prefix) for k, g in graphs.items()}
        parts = [s.placed(b.prefix) for b in blocks for s in [kinds[b.kind]]]
        parts = [*ends, *parts, _space("residual", head, head.args[:1], [], "")]
        axes = tuple(dict.fromkeys(axis for part in parts for axis in part.axes))
        gains = tuple(gain for part in parts for gain in part.gains)
        found.append(parts[0]._replace(axes=axes, gains=gains))
    if "heads" in turns:
        heads = {k: _heads(g, first[k].prefix) for k, g in graphs.items()}
        found += [s.placed(b.prefix) for b in blocks for s in heads[b.kind]]
    return tuple(found)


def _heads(graph: trace.Graph, prefix: str) -> list[Space]:
    """The values of attention: what a weight reads through sums over keys from another one."""
    sites = {s.weight: s for s in trace.graph_sites(graph)}
    through = [s for s in sites.values() if s.op == "dot" and s.producer and s.channels]
    found = []
    for site in through:
        op = next(op for op in graph.ops if any(x.view.root.leaf == site.weight for x in op.inputs))
        x = next(x for x in op.inputs if x.view.root.leaf != site.weight)
        found.append(_space("heads", graph, [], [x], prefix))
    return found


def _space(kind: str, graph: trace.Graph, seeds: Sequence, wanted: Sequence, prefix: str) -> Space:
    what = {"residual": "the residual stream", "heads": "values of attention"}[kind]
    try:
        size, axes, gains = followed(graph, RULES, seeds, wanted)
    except BrokenError as error:
        where = f"{prefix}{error.leaf}: " if error.leaf else ""
        raise InputError(
            f"{where}{error}: {what} cannot be turned in this model; give the step {kind}: false"
        ) from error
    name = next((leaf for leaf, axis in axes if axis == -2), next(iter(axes), ("", 0))[0])
    return Space(name, kind, size, tuple(axes), tuple((g, tuple(readers)) for g, readers in gains.items()))


# Tensors


class Change(NamedTuple):
    """How a tensor is made: `make` of the tensor `source`."""

    source: str
    make: Callable[[np.ndarray], np.ndarray]


def _turned(
    model: Model, spaces: Sequence[Space], matrices: Matrices, learned: Mapping[str, np.ndarray] = EMPTY
) -> Model:
    """The model with its spaces turned; one without a matrix only gives its gains away."""
    lock, memo = threading.Lock(), []

    def solved() -> Mapping[str, np.ndarray]:
        with lock:
            if not memo:
                memo.append(matrices())
            return memo[0]

    turns: dict[str, list[tuple[Space, int]]] = {}
    gains: dict[tuple[str, int], str] = {}
    changes: dict[str, Change] = {}
    for space in spaces:
        for leaf, axis in space.axes:
            turns.setdefault(leaf, []).append((space, axis))
        for gain, readers in space.gains:
            changes[gain] = Change(gain, np.ones_like)
            gains |= dict.fromkeys(readers, gain)
    for leaf, mine in turns.items():

        def make(w: np.ndarray, leaf: str = leaf, mine: Sequence[tuple[Space, int]] = mine) -> np.ndarray:
            dtype = w.dtype
            for space, axis in mine:
                name = gains.get((leaf, axis))
                gain = np.asarray(model.params[name], np.float32) if name else None
                w = turn(w, axis, solved().get(space.name), space.size, gain)
            return w.astype(dtype, copy=False)

        changes[leaf] = Change(leaf, make)
    return _changed(model, changes, learned)


def _changed(model: Model, changes: Mapping[str, Change], learned: Mapping[str, np.ndarray] = EMPTY) -> Model:
    """The model with some tensors made from others whenever they are read."""
    files, params = model.checkpoint, model.params
    assert files is not None

    def leaf(name: str) -> Any:
        change = changes.get(name)
        return change.make(np.asarray(params[change.source])) if change else params[name]

    leaves = {n: functools.partial(leaf, n) for n in dict.fromkeys((*params, *changes))}
    weights: dict[str, tuple[Spec, Callable[[], np.ndarray]]] = {}
    for name, change in changes.items():
        count = model.shapes[name][0] if experts.starred(name) else 1
        for mine, source in zip(
            experts.expand(name, count), experts.expand(change.source, count), strict=True
        ):
            make = functools.partial(lambda source, make: make(files[source]), source, change.make)
            weights[mine] = files.spec(source), make
    fields = {f.name: getattr(files, f.name) for f in dataclasses.fields(files)}
    fields |= {"config": dict(model.config), "names": tuple(dict.fromkeys((*files, *weights)))}
    fields["weights"] = {**fields.get("weights", {}), **weights}
    fields["learned"] = {**fields.get("learned", {}), **learned}
    derived = (type(files) if isinstance(files, Derived) else Derived)(**fields)
    return Model(model.config, Lazy(leaves), model.family, derived)
