"""The order of things: load, plan; per block calibrate, transform, write; verify, evaluate, report."""

from __future__ import annotations

import dataclasses
import hashlib
import importlib.metadata
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np

import mojax
from mojax import (
    calibration,
    distance,
    document,
    evaluation,
    model_card,
    outcomes,
    rewrite,
    text,
    verify,
)
from mojax.calibration import Stats
from mojax.checkpoint import Checkpoint, read_json
from mojax.document import Calibration
from mojax.errors import InputError, NotFiniteError, nearest
from mojax.evaluation import Report
from mojax.model import Model, load
from mojax.models.layers import Block
from mojax.planner import plan
from mojax.plans import Plan
from mojax.recipe import Recipe, load_recipe, resolved
from mojax.sources import as_source, reference_for
from mojax.stream import Stream, transform
from mojax.transforms.base import Outcome, Transform
from mojax.writer import RECORD, Unit, Writer, refuse, unit_params

Say = Callable[[str], None]


class LimitError(Exception):
    """The result is farther from its source than the recipe allows; the folder is kept as OUT.rejected."""


class Interrupted(Exception):
    """Stopped between two blocks; the same command goes on from there."""


def calibrate(model: Model, plan: Plan, tokens: np.ndarray) -> Stats:
    """Statistics of every input that the plan's steps need, block by block.

    What the encoding steps see goes through what they encoded before, so they run here too.

    Args:
      tokens: int32 `[sequences, length]`.
    Raises:
      InputError: a step tunes whole blocks, which `apply` cannot do with statistics alone.
    """
    _usable(plan)
    _untuned(plan)
    model = as_source(model)
    learned, stats = rewrite.learned(model, plan, tokens), Stats()
    model = rewrite.rewritten(model, plan, learned)
    if plan.needs:
        stream = Stream(model, plan, tokens)
        for block in model.blocks:
            stats |= stream.make(block).stats
    return stats.merge(learned)


def apply(
    model: Model,
    plan: Plan,
    stats: Mapping[str, Mapping[str, Any]] | np.ndarray,
    log: Callable[[Outcome], None] = lambda outcome: None,
) -> Model:
    """The model with its weights encoded as the plan says. Pure: the given model is unchanged.

    Args:
      stats: of `calibrate`, for several uses; or tokens, int32 `[sequences, length]`: then calibration and
        steps run once, block by block, as in `optimize`.
      log: called with the outcome of every step for every weight.
    Raises:
      InputError: neither statistics nor tokens; a step that is no Transform, or needs an unknown statistic; a
        step tunes whole blocks, for which statistics are not enough: give tokens.
      NotFiniteError: NaN or infinity in a weight or an input; the message names it.
    """
    _usable(plan)
    model, seen = as_source(model), None
    if not isinstance(stats, Mapping):
        tokens = _ids(stats)
        stats = rewrite.learned(model, plan, tokens, log)
        model = rewrite.rewritten(model, plan, stats)
        seen = Stream(model, plan, tokens) if plan.needs else None
    else:
        _untuned(plan)
        model = rewrite.rewritten(model, plan, stats)
    params: dict[str, Any] = dict(model.params)
    for block in (None, *model.blocks):
        prefix = block.prefix if block else ""
        if block is not None and seen is not None:
            params |= seen.make(block, log, large=False).leaves
            continue
        mine = {r.name: params[r.name] for r in plan.rows if r.block == prefix}
        params |= transform(plan, block, mine, stats, log=log)
    return dataclasses.replace(model, params=params, schemes=plan.schemes, cache=plan.cache)


def _ids(found: Any) -> np.ndarray:
    """`found` as tokens, integers `[sequences, length]`."""
    found = np.asarray(found) if hasattr(found, "shape") else found  # of any library
    shape, dtype = getattr(found, "shape", ()), getattr(found, "dtype", object)
    if len(shape) != 2 or not np.issubdtype(dtype, np.integer):
        what = f"{np.dtype(dtype)} {list(shape)}" if shape else type(found).__name__
        raise InputError(
            f"apply: found {what}, needed what mojax.calibrate gives, or token ids, "
            "integers [sequences, length] (text.tokens(...).ids)"
        )
    return np.asarray(found)


def _usable(plan: Plan) -> None:
    """Raises InputError for a step of one's own that is none, or asks for what calibration does not know."""
    known = (*calibration.STATISTICS, *calibration.SUMS)
    for step in plan.steps:
        if not isinstance(step, Transform):
            raise InputError(
                f"steps: found {step!r:.60}, needed a Transform of mojax.transforms.base, such as "
                "Transform(fn, needs=(...))"
            )
        if odd := next((need for need in step.needs if need not in known), None):
            name = step.name or "a step"
            raise InputError(f"steps: {name} needs {odd!r}, an unknown statistic{nearest(odd, known)}")


def _untuned(plan: Plan) -> None:
    if tuning := [step.name or "a step" for step in plan.steps if step.tune]:
        raise InputError(
            f"steps: {tuning[0]} tunes whole blocks on their activations, which statistics do not hold; give "
            "the tokens to mojax.apply in their place, or use mojax.optimize or `mojax quantize`"
        )


def optimize(
    source: str | Path,
    recipe: str | Recipe = "nvfp4",
    out: str | Path = "quantized",
    *,
    format: str = "compressed-tensors",
    target: str = "vllm",
    calibration_text: str | None = None,
    evaluation_text: str = "builtin",
    revision: str | None = None,
    generic: bool = False,
    evaluate: bool = True,
    kl_limit: float | None = None,
    max_shard_size: int = 5 * 10**9,
    say: Say = lambda line: None,
    interrupted: Callable[[], bool] = lambda: False,
) -> Report:
    """Quantize a checkpoint into a new folder, streamed block by block, verified and evaluated.

    Args:
      source: a folder, a hub id, or "tiny".
      recipe: a name, a file or a Recipe.
      out: the new folder; `<out>.partial` while it is made, resumed by the same call.
      format: the checkpoint dialect; target: who must load it.
      calibration_text, evaluation_text: "builtin", or a txt, jsonl, parquet or npz file.
      evaluate: compare the written bytes with the source at the end.
      kl_limit: nats; overrides the recipe's limit.
      max_shard_size: bytes of a file.
      say: called with one line per block, and the preview of the calibration text.
      interrupted: asked between blocks.
    Raises:
      InputError, PlanError: before anything is written. verify.VerifyError: what was written is wrong.
      LimitError: too far from the source, or not finite at all. Interrupted: `interrupted` said so.
    """
    begun = time.monotonic()
    model = as_source(load(source, revision=revision, generic=generic))
    recipe = recipe if isinstance(recipe, Recipe) else load_recipe(recipe)
    todo = plan(model, recipe, format=format, target=target)
    assert model.checkpoint is not None
    limit = _limit(kl_limit, recipe, Path(out), evaluate and model.family is not None)
    seen = read_text(model, todo, recipe, calibration_text, "calibration") if todo.needs else None
    if seen is not None:
        say(f"calibration text ({seen.origin}): {seen.preview!r}")
    judged = (
        read_text(model, todo, recipe, evaluation_text, "evaluation") if evaluate and model.family else None
    )
    facts = fingerprint(model.checkpoint, todo, seen)
    writer = Writer(Path(out), todo, _rewritten(model, todo, seen, Path(out)), facts, max_shard_size)
    _write(writer, seen, say, interrupted)
    writer.finish()
    checked = verify.verify(writer.partial, reference=model.checkpoint.folder, plan=todo)
    broken = None
    try:
        report = _judge(writer.partial, model, judged, interrupted)
    except evaluation.BrokenError as error:
        broken, report = error, Report(notes=(str(error),))
    report = dataclasses.replace(
        report,
        bits_per_weight=todo.bits_per_weight,
        bits_per_quantized_weight=todo.bits_per_quantized_weight,
        worst=evaluation.worst(checked.errors),
        seconds=round(time.monotonic() - begun, 3),
        peak_rss_bytes=evaluation.peak_rss(),
        steps=outcomes.summary(writer.outcomes),
        notes=(
            *report.notes,
            *checked.notes,
            *calibration.coverage(writer.counts),
            *outcomes.notes(writer.outcomes),
        ),
    )
    model_card.write(writer.partial, model.checkpoint.folder, report, todo)
    if broken is not None:
        raise LimitError(f"{writer.rename('.rejected')}: {broken}") from broken
    if limit is not None and report.kl_mean is not None and report.kl_mean > limit:
        rejected = writer.rename(".rejected")
        raise LimitError(f"{rejected}: KL to the source is {report.kl_mean:.4f} nats, the limit is {limit}")
    writer.rename()
    return report


def _rewritten(model: Model, todo: Plan, seen: text.Tokens | None, out: Path) -> Model:
    """The model after steps that rewrite it as a whole, as an interrupted run found them if there is one."""
    refuse(out)
    found = rewrite.saved(out.with_name(out.name + ".partial"))
    if not found and seen is not None:
        found = rewrite.learned(model, todo, seen.ids)
    return rewrite.rewritten(model, todo, found)


def _limit(kl_limit: float | None, recipe: Recipe, out: Path, evaluated: bool) -> float | None:
    """The largest mean KL, checked before hours of work."""
    if kl_limit is not None and not kl_limit >= 0:
        raise InputError(f"--kl_limit={kl_limit}: needed nats per token, 0 or more")
    if kl_limit is not None and not evaluated:
        raise InputError(
            "--kl_limit needs the evaluation: leave out --noevaluate (--generic models have none)"
        )
    limit = kl_limit if kl_limit is not None else recipe.limits.get("kl_mean")
    if limit is not None and evaluated:
        refuse(out.with_name(out.name + ".rejected"))
    return limit


def _judge(folder: Path, model: Model, seen: text.Tokens | None, interrupted: Callable[[], bool]) -> Report:
    """The report of what was written, as far as there is text and a forward function."""
    if model.family is None:
        return Report(notes=("no forward function for this model_type, so nothing was evaluated",))
    if seen is None:
        return Report()
    if interrupted():
        raise Interrupted
    try:
        return evaluation.evaluate(load(folder), model, seen.ids, text=seen.origin, interrupted=interrupted)
    except NotFiniteError as error:
        raise _blame(error, model) from error


def _blame(error: NotFiniteError, model: Model) -> InputError:
    """The error, or a better one: NaN in a norm or an embedding shows only far behind it."""
    names = evaluation.not_finite(model)
    if not names or any(name in str(error) for name in names):
        return error
    listed = ", ".join(names[:10])
    return InputError(f"{listed}: holds NaN or infinity in the source; repair the checkpoint ({error})")


def _write(writer: Writer, seen: text.Tokens | None, say: Say, interrupted: Callable[[], bool]) -> None:
    """Every unit. A run that fails for its input leaves nothing that no command could go on from."""
    try:
        _write_units(writer, seen, say, interrupted)
    except InputError as error:
        if error.__cause__ is None:  # it can only fail again; a full disk has a cause
            writer.discard()
        if isinstance(error, NotFiniteError):
            raise _blame(error, writer.model) from error
        raise


def _write_units(writer: Writer, seen: text.Tokens | None, say: Say, interrupted: Callable[[], bool]) -> None:
    """Every unit, in order; those of an interrupted run are only run through."""
    model, todo = writer.model, writer.plan
    blocks = {b.prefix: b for b in model.blocks}
    left = any(not writer.done(u) for u in writer.units)
    stream = Stream(model, todo, seen.ids, writer.scratch, say) if seen is not None and left else None
    begun = time.monotonic()
    for i, unit in enumerate(writer.units):
        block = blocks.get(unit.prefix)
        did: list[Outcome] = []
        if writer.done(unit):
            if block is not None and stream is not None and any(not writer.done(u) for u in writer.units[i:]):
                stream.skip(block, writer.read(unit) if todo.sequential else {})
        else:
            did = _write_unit(writer, unit, block, stream)
        say(_progress(i + 1, len(writer.units), unit, time.monotonic() - begun, outcomes.line(did)))
        if interrupted():
            raise Interrupted


def _write_unit(writer: Writer, unit: Unit, block: Block | None, stream: Stream | None) -> list[Outcome]:
    """Transform and write one unit; nothing of it is held when this returns but what the steps said."""
    params = unit_params(writer.model, unit)
    did: list[Outcome] = []
    if block is not None and stream is not None:
        changed, stats = stream.make(block, did.append, large=False)
        counts = calibration.tokens_per_expert(stats)
    else:
        changed, counts = transform(writer.plan, block, params, {}, log=did.append), {}
    if counts or did:
        writer.remember(counts, did)
    writer.write(unit, params | changed)
    return did


def _progress(done: int, total: int, unit: Unit, seconds: float, did: str = "") -> str:
    name = unit.prefix.rstrip(".") or "embeddings, head"
    return f"[{done:3d}/{total}] {name}  {seconds:.1f} s  eta {seconds / done * (total - done):.0f} s" + (
        f"  {did}" if did else ""
    )


def read_text(model: Model, todo: Plan, recipe: Recipe, source: str | None, purpose: str) -> text.Tokens:
    """The tokens that a recipe asks for, checked against the model."""
    return _tokens(model, recipe.calibration._replace(text=source or recipe.calibration.text), purpose)


def read_texts(model: Model, todo: Plan, evaluation_text: str | None) -> dict[str, str | None]:
    """Where the texts of a run come from, read as the run would; None where there is no need of one.

    Args:
      evaluation_text: None: the built-in one; why it cannot be used is then said, not raised, since a run
        can do without.
    Raises:
      InputError: a text that cannot be used.
    """
    recipe = todo.recipe
    origins: dict[str, str | None] = {"calibration_text": None, "evaluation_text": None}
    if todo.needs:
        seen = read_text(model, todo, recipe, None, "calibration")
        origins["calibration_text"] = seen.origin
    if model.family is not None:
        try:
            seen = read_text(model, todo, recipe, evaluation_text or "builtin", "evaluation")
            origins["evaluation_text"] = seen.origin
        except InputError as error:
            if evaluation_text is not None:
                raise
            origins["evaluation_text"] = f"none ({error})"
    return origins


def _tokens(model: Model, c: Calibration, purpose: str) -> text.Tokens:
    assert model.checkpoint is not None
    if purpose == "evaluation" and c.length < 2:
        raise InputError(f"--length={c.length}: at least 2 tokens are needed to judge the next one")
    longest = model.config.get("max_position_embeddings")
    if longest and c.length > longest:
        raise InputError(
            f"--length={c.length}: the model has {longest} positions (max_position_embeddings); lower it"
        )
    return text.tokens(
        c.text,
        model.checkpoint.folder,
        sequences=c.sequences,
        length=c.length,
        seed=c.seed,
        purpose="calibration" if purpose == "calibration" else "evaluation",
        vocab=model.config.get("vocab_size"),
    )


def fingerprint(files: Checkpoint | None, todo: Plan, seen: text.Tokens | None) -> dict[str, Any]:
    """What the output depends on; two runs with the same fingerprint write the same bytes."""
    recipe = todo.recipe
    packages = ("jax", "numpy", "ml_dtypes", "tokenizers")
    names = [step.name or distance.UNNAMED for step in todo.steps]
    own = {} if names == [name for name, _ in recipe.steps] else {distance.OWN: names}
    return own | {
        "source": source_facts(files),
        "recipe": resolved(dataclasses.replace(recipe, menu=None)),
        "format": todo.dialect.DIALECT,
        "target": todo.target,
        "data": {"origin": seen.origin, "sha256": seen.digest} if seen else None,
        "seed": recipe.calibration.seed,
        "versions": {"mojax": mojax.__version__} | {p: importlib.metadata.version(p) for p in packages},
    }


def source_facts(files: Checkpoint | None) -> dict[str, Any]:
    """What tells one source from another without reading its weights."""
    if files is None:
        return {}
    tensors = [(e.name, e.dtype.name, e.shape, e.start, e.stop, e.file.name) for e in files.entries.values()]
    return {
        "config_sha256": hashlib.sha256((files.folder / "config.json").read_bytes()).hexdigest(),
        "headers_sha256": hashlib.sha256(repr(sorted(tensors)).encode()).hexdigest(),
    }


def evaluate_folder(folder: str, reference: str, source: str, **numbers: int) -> Report:
    """Compare a checkpoint that we can read with its source, both by folder, hub id or "tiny".

    Args:
      source: evaluation text, "builtin" or a file; tokenized with the reference's tokenizer.
      numbers: `sequences`, `length` and `seed`; by default as in the folder's mojax.json, so that the text is
        the one that its report.json tells of, and without one as in `mojax.document.Calibration`.
    """
    begun = time.monotonic()
    said: dict[str, Any] = document.calibration("--", numbers, separator="") | {"text": source}
    out = load(folder)
    base = reference_for(out, load(reference))
    assert out.checkpoint is not None
    seen = _tokens(base, Calibration(**_recorded(out.checkpoint.folder) | said), "evaluation")
    report = evaluation.evaluate(out, base, seen.ids, text=seen.origin)
    errors = distance.weight_errors(out, rewrite.as_recorded(out, base)) if out.schemes else {}
    return dataclasses.replace(
        report, worst=evaluation.worst(errors), seconds=round(time.monotonic() - begun, 3)
    )


def _recorded(folder: Path) -> dict[str, Any]:
    """What the recipe in mojax.json says of text, where a folder has one."""
    path = folder / RECORD
    recipe = read_json(path).get("recipe") if path.is_file() else None
    said = recipe.get("calibration") if isinstance(recipe, dict) else None
    return document.calibration(f"{path}: calibration", said or {})
