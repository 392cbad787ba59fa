"""The blocks of a model in order: what the steps see of each, what they make of it, what the next one sees.

Two streams of activations run through the blocks. The source's is what the model computes; the other, kept
where a step asks for it, has gone through what was encoded before, with inputs rounded as a server rounds
them. Inside a block the weights that read one input are encoded together, in the order of the program, so
that a later one sees what became of an earlier one. Then steps that tune the block as a whole get it as a
function, with what reaches it in the other stream and what it should give.
"""

from __future__ import annotations

import dataclasses
import functools
import math
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import jax
import numpy as np

from mojax import beside, calibration, checkpoint, flat
from mojax.calibration import ENCODE, Stats, calibrate_block
from mojax.errors import InputError, NotFiniteError, nearest
from mojax.gradients import Gradients, gradients
from mojax.inputs import OWN, Held, bytes_held, observe, through
from mojax.kernels.hadamard import hadamard
from mojax.model import Lazy, Model
from mojax.models.layers import Block
from mojax.plans import READS, Plan
from mojax.program import INPUT, MEAN, Program, block_of, cache_scales, simulated
from mojax.threads import flow
from mojax.transforms.base import Context, Outcome, Passage
from mojax.transforms.rtn import static_maximum

LARGE = (
    "gram",
    "seen_gram",
    "drift",
    "sample",
    "output_gram",
)  # statistics that are not kept for blocks to come
Observe = Callable[[tuple[str, ...], Mapping[str, Any]], Mapping[str, Mapping[str, Any]]]


class Made(NamedTuple):
    """What became of one block: the leaves that the steps change or add, and what they saw."""

    leaves: dict[str, Any]
    stats: Stats


def transform(
    plan: Plan,
    block: Block | None,
    params: Mapping[str, Any],
    stats: Mapping[str, Mapping[str, Any]],
    log: Callable[[Outcome], None] = lambda outcome: None,
) -> dict[str, Any]:
    """The leaves of one block (None: of what is outside the blocks) that the plan's steps change or add.

    Args:
      params: the leaves of that block.
      stats: of its inputs, by weight.
      log: called with the outcomes of steps.
    """
    context = plan.context(block)._replace(log=log)
    changed = dict(plan.migration.apply(params, stats, context))
    return known(changed | encode(plan, block, {**params, **changed}, stats, log=log), params)


def known(changed: dict[str, Any], params: Mapping[str, Any]) -> dict[str, Any]:
    """`changed`, leaves of a block.

    Raises:
      InputError: there is no such leaf.
    """
    more = (INPUT, MEAN, *beside.LEAVES, *flat.LEAVES)
    if odd := next((n for n in changed if n not in params and not n.endswith(more)), None):
        raise InputError(
            f"{odd}: a step returned this leaf, which its block lacks{nearest(odd, params)}; return leaves "
            "under the names that they have in `params`"
        )
    return changed


def encode(
    plan: Plan,
    block: Block | None,
    params: Mapping[str, Any],
    stats: Mapping[str, Mapping[str, Any]],
    observe: Observe | None = None,
    log: Callable[[Outcome], None] = lambda outcome: None,
) -> dict[str, Any]:
    """The second half of `transform`: weights of rotated inputs are rotated, inputs get static scales, then
    the encoding steps come, input after input.

    Args:
      observe: the statistics that the encoding steps need of some weights, given the leaves so far; by
        default those in `stats`.
    """
    context = plan.context(block)._replace(log=log)
    changed = rotated(context, params)
    for module, scheme in context.schemes.items():
        if scheme.inputs is None or not scheme.inputs.static:
            continue
        if scheme.hadamard or scheme.flat:  # a migration that made the leaf did not see how inputs are turned
            changed[module + INPUT] = static_maximum(module + ".weight", calibration.encoding(stats))
        elif module + INPUT not in params:
            changed[module + INPUT] = static_maximum(module + ".weight", stats)
    for name in plan.observed(block) if block else ():
        if name.endswith("_cache") and plan.cache is not None:
            changed |= plan.cache.leaves(name, stats)
    for weights in plan.stages(block):
        now = {**params, **changed}
        seen = observe(weights, now) if observe else calibration.encoding(stats)
        changed |= plan.encoding.apply(now, seen, context.only(weights))
    return changed


def rotated(context: Context, params: Mapping[str, Any]) -> dict[str, Any]:
    """The weights `W H` of the linears whose inputs are rotated when they run, in their own dtype."""
    turns = {module + ".weight": scheme.hadamard for module, scheme in context.schemes.items()}
    return {n: np.asarray(hadamard(params[n], block=block)) for n, block in turns.items() if block}


def residuals(
    context: Context, targets: Mapping[str, Any], params: Mapping[str, Any]
) -> dict[str, np.ndarray]:
    """What the codes beside a branch stand for, W - B A, in the dtype of the target; see `mojax.beside`."""
    found = {}
    for module, scheme in context.schemes.items():
        if (low := beside.branch(params, module)) is not None:
            w = targets[module + ".weight"]
            found[module + ".weight"] = np.asarray(beside.residual(w, *low, scheme.hadamard).astype(w.dtype))
    return found


class Stream:
    """Both streams, at the input of the block that comes next.

    Args:
      tokens: int32 `[sequences, length]`.
      scratch: a folder for what migrations make of the blocks while gradients are taken; None: memory.
      say: called with a line for every block that a pass before the encoding has done.
    """

    def __init__(
        self,
        model: Model,
        plan: Plan,
        tokens: np.ndarray,
        scratch: Path | None = None,
        say: Callable[[str], None] = lambda line: None,
    ):
        self.model, self.plan = model, plan
        self.source: Sequence[jax.Array] = calibration.start(model, tokens)
        self.seen: Sequence[jax.Array] = self.source
        self._ready: dict[str, tuple[Mapping[str, Any], Stats, list[Outcome]]] = {}  # of migrated blocks
        self._gradients = Gradients({}, {})
        draws = plan.recipe.calibration.gradients
        if draws and "gram" in plan.encoding.needs:
            begin = self.source
            migrated = self._migrate_all(scratch, say)
            self.source = begin
            say(f"gradients: {draws} passes over {len(model.blocks)} blocks")
            weights = {b.prefix: [w for s in plan.stages(b) for w in s] for b in model.blocks}
            self._gradients = gradients(
                migrated, tokens, draws=draws, seed=plan.recipe.calibration.seed, weights=weights
            )

    def make(
        self, block: Block, log: Callable[[Outcome], None] = lambda outcome: None, large: bool = True
    ) -> Made:
        """Transform the next block, and go on to the one after it.

        Args:
          large: keep the statistics that are matrices too, for who asks for them.
        """
        params = {n: self.model.params[n] for n in self.model.params if n.startswith(block.prefix)}
        out = None
        if block.prefix in self._ready:
            migrated, stats, said = self._ready.pop(block.prefix)
            leaves = {n: np.asarray(w) for n, w in migrated.items()}
            for outcome in said:
                log(outcome)
        else:
            out, stats = self._watch(block)
            leaves, stats = self._migrated(block, params, stats, out, log)
        plain, taken = {**params, **leaves}, self._rotated_maxima(block, {**params, **leaves})
        stats, held = Stats((stats if large else _small(stats)) | taken), Held()

        def observe(weights: tuple[str, ...], now: Mapping[str, Any]) -> Mapping[str, Mapping[str, Any]]:
            seen = self._observe(block, stats, plain, weights, now, held)
            if self.plan.encoding.needs:
                taken.update({w + ENCODE: v for w, v in (seen if large else _small(seen)).items()})
            return seen

        leaves |= encode(self.plan, block, plain, stats, observe, log)
        if self.plan.tuning:
            out = out or self._source(block)
            leaves |= self._tune(block, plain, {**params, **leaves}, out, log)
            held = Held()  # of weights that were changed since
        self._advance(block, out, {**params, **leaves}, held)
        self._forget(block)
        return Made(known(leaves, params), Stats(stats | taken))

    def skip(self, block: Block, leaves: Mapping[str, Any]) -> None:
        """Go on past a block that was finished before: `leaves` as it was written."""
        self._advance(block, None, leaves, Held())
        self._forget(block)

    def _forget(self, block: Block) -> None:
        """Let go of what was kept for a block that is done."""
        self._ready.pop(block.prefix, None)
        for kept in (self._gradients.output_gram, self._gradients.tokens):
            for name in [n for n in kept if n.startswith(block.prefix)]:
                del kept[name]

    def _watch(self, block: Block) -> tuple[list[jax.Array] | None, Stats]:
        """The source's output of a block, and the statistics that are taken before any step; if any are."""
        plan = self.plan
        if not plan.watched:
            return self._source(block) if plan.learns else None, Stats()
        return calibrate_block(self.model, block, self.source, plan.observed(block), plan.watched)

    def _migrated(
        self,
        block: Block,
        params: Mapping[str, Any],
        stats: Stats,
        out: Sequence[jax.Array] | None,
        log: Callable[[Outcome], None],
    ) -> tuple[dict[str, Any], Stats]:
        """The leaves that change while the function of the block stays, and the statistics with what steps
        have learned for that."""
        context = self.plan.context(block)._replace(log=log)
        changed: dict[str, Any] = {}
        for step in (s for s in self.plan.steps if s.phase == "block"):
            if step.learn is not None:
                assert out is not None
                program = self._encoded().program(block)._replace(cache=None, grows=True)
                passage = Passage(Whole(program), block.prefix, self.source, out)
                stats = stats.merge(step.learn({**params, **changed}, passage, context))
            changed |= step.apply({**params, **changed}, stats, context)
        return changed, stats

    def _source(self, block: Block) -> list[jax.Array]:
        """The source's output of a block."""
        return through(self.model.program(block), self.model.local(block), self.source)

    def _migrate_all(self, scratch: Path | None, say: Callable[[str], None]) -> Model:
        """The model after the steps that leave its function as it is; blocks are kept for `make`."""
        made: dict[str, Callable[[], Any]] = {}
        for block in self.model.blocks if self.plan.watched or self.plan.learns else ():
            out, stats = self._watch(block)
            params = {n: self.model.params[n] for n in self.model.params if n.startswith(block.prefix)}
            said: list[Outcome] = []
            leaves, stats = self._migrated(block, params, stats, out, said.append)
            kept = _kept(scratch, block, leaves)
            if scratch is not None:  # in memory they are all returned
                stats = _small(stats)
            self._ready[block.prefix] = kept, stats, said
            made |= {n: functools.partial(kept.__getitem__, n) for n in kept}
            assert out is not None
            self.source = out
            say(f"moved: {block.prefix.rstrip('.')}")
        params = self.model.params
        rest = {n: functools.partial(params.__getitem__, n) for n in params}
        return dataclasses.replace(self.model, params=Lazy(rest | made))

    def _rotated_maxima(self, block: Block, plain: Mapping[str, Any]) -> Stats:
        """What static scales of rotated inputs need, under the names that the encoding steps see."""
        schemes = self.plan.context(block).schemes.items()
        turned = [(m, s) for m, s in schemes if s.hadamard or s.flat]
        static = [(m, s) for m, s in turned if s.inputs is not None and s.inputs.static]
        weights = tuple(m + ".weight" for m, _ in static)
        found = self._observe(block, Stats(), plain, weights, plain, None, ("absmax", "count"))
        return Stats({w + ENCODE: values for w, values in found.items()})

    def _observe(
        self,
        block: Block,
        stats: Stats,
        plain: Mapping[str, Any],
        weights: tuple[str, ...],
        params: Mapping[str, Any],
        held: Held | None = None,
        needs: tuple[str, ...] | None = None,
    ) -> dict[str, dict[str, Any]]:
        """What the encoding steps need of the inputs of `weights`.

        Args:
          stats: taken before any step; plain: the block's leaves after its migration; params: those now.
          held: what is known of the weights before them; these are added.
          needs: other statistics than those.
        """
        needs = self.plan.encoding.needs if needs is None else needs
        seen = calibration.encoding(stats)
        found = {w: dict(seen.get(w, {})) for w in weights}
        schemes = self.plan.schemes
        sites = {
            s.weight: (s.group, schemes[s.weight.removesuffix(".weight")].hadamard)
            for s in self.plan.context(block).sites
            if s.op in READS and s.weight in weights
        }
        watched = [w for w in weights if w in sites]
        if not needs or not watched:
            return found
        n = len(block.prefix)
        first: dict[tuple[int, int], str] = {}
        groups: dict[str, list[str]] = {}
        for w in watched:
            groups.setdefault(first.setdefault(sites[w], w), []).append(w)
        local = {name[n:]: leaf for name, leaf in params.items()}
        device = jax.device_put(local)
        whole = {m[n:]: w for m, w in plain.items() if not m.endswith(INPUT)}
        whole |= {m: device[m] for m, w in whole.items() if local[m] is w}  # held once
        programs = self.model.program(block), self._encoded().program(block)
        shape = tuple((leader[n:], tuple(w[n:] for w in members)) for leader, members in groups.items())
        tokens = {w[n:]: self._gradients.tokens[w] for w in watched if w in self._gradients.tokens}
        first_stage = held is None or set(weights) & set(self.plan.stages(block)[0])
        length = sum(math.prod(x.shape[:-1]) for x in self.source)
        kept = tuple(w for w, _ in shape if not first_stage and bytes_held(length, whole[w].shape[-1]))
        total, inputs = Stats(), []

        def run(i: int) -> tuple[Any, Any]:
            weighted = {w: v[i] for w, v in tokens.items()}
            known = held.of(i) if held else ({}, {})
            pair = self.source[i], self.seen[i]
            taken, xs = observe(*programs, needs, shape, kept, whole, device, *pair, weighted, known)
            return {w: {k: np.asarray(v) for k, v in values.items()} for w, values in taken.items()}, xs

        batches = range(len(self.source))
        for part in (batches[:1], batches[1:]):  # the first alone, so that it is compiled once
            for taken, xs in flow(run, part):  # a matrix a batch: not all of them at once
                total.add(taken)
                inputs.append(xs)
        for i, stream in enumerate((held.source, held.seen) if held else ()):
            for leader, members in shape:
                found_x = [xs[i][leader] for xs in inputs if leader in xs[i]]
                stream.update({w: found_x for w in members} if found_x else {})
        for leader, members in groups.items():
            for w in members:
                values = total[leader[n:]] | total.get(OWN + w[n:], {})
                _finite(w, values)
                found[w] |= values
                if w in self._gradients.output_gram:
                    found[w]["output_gram"] = self._gradients.output_gram[w]
        return found

    def _tune(
        self,
        block: Block,
        plain: Mapping[str, Any],
        params: Mapping[str, Any],
        out: Sequence[jax.Array],
        log: Callable[[Outcome], None],
    ) -> dict[str, Any]:
        """The leaves that steps of the "tune" phase change.

        Args:
          plain, params: as in `_observe`; out: what the block gives in the source's stream.
        """
        context = self.plan.context(block)
        targets = {m + ".weight": plain[m + ".weight"] for m in context.schemes} | rotated(context, plain)
        targets |= residuals(context, targets, params)
        # Rounding a cache has no gradient, and no weight can make up for it.
        program = self._encoded().program(block)._replace(cache=None)
        passage = Passage(Whole(program), block.prefix, self.seen, out)
        changed: dict[str, Any] = {}
        for step in self.plan.tuning:
            assert step.tune is not None
            now = {**params, **changed}
            changed |= step.tune(now, passage, context._replace(targets=targets, log=log))
        return changed

    def _encoded(self) -> Model:
        return dataclasses.replace(self.model, schemes=self.plan.schemes, cache=self.plan.cache)

    def _advance(
        self, block: Block, out: list[jax.Array] | None, leaves: Mapping[str, Any], held: Held
    ) -> None:
        """Both streams through the block; the other one with the leaves that it has now."""
        n = len(block.prefix)
        if out is None and self.plan.sourced:
            out = self._source(block)
        if self.plan.sequential:
            local = {name[n:]: leaf for name, leaf in leaves.items()}
            self.seen = through(self._encoded().program(block), local, self.seen, held.seen)
        self.source = self.seen if out is None else out


class Whole(NamedTuple):
    """A block as a function of its leaves and its input; `Passage.run`."""

    program: Program

    def __call__(self, params: Mapping[str, Any], x: jax.Array) -> jax.Array:
        return simulated(self.program, block_of(self.program))(params, x, cache_scales(params))


def _small(stats: Mapping[str, Mapping[str, Any]]) -> Stats:
    """Those that are no matrices."""
    return Stats({n: {k: v for k, v in values.items() if k not in LARGE} for n, values in stats.items()})


def _kept(scratch: Path | None, block: Block, leaves: Mapping[str, Any]) -> Mapping[str, Any]:
    """The leaves, in a file of `scratch` if there is one."""
    if scratch is None or not leaves:
        return leaves
    path = scratch / f"{block.prefix}safetensors"
    checkpoint.write_shard(path, {n: np.asarray(w) for n, w in leaves.items()})
    return checkpoint.read_shard(path)


def _finite(weight: str, values: Mapping[str, Any]) -> None:
    for statistic in ("gram", "seen_gram", "abssum", "sumsq", "sample"):
        if statistic in values and not np.isfinite(np.sum(values[statistic])):
            raise NotFiniteError(
                f"{weight}: its inputs are not finite during calibration; the model overflows in its own "
                "dtype on this text, check the checkpoint or the text"
            )
