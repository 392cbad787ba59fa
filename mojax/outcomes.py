"""What the steps of a recipe did, in few words: how far each lowered its objective, and where it did not."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

from mojax.transforms.base import Outcome

NAMED = 3  # weights that a note names


def ratios(outcomes: Iterable[Outcome]) -> dict[str, float]:
    """By step, the mean over weights of its objective after / before."""
    found: dict[str, list[float]] = {}
    for o in outcomes:
        if o.before > 0:
            found.setdefault(o.step, []).append(o.after / o.before)
    return {step: sum(values) / len(values) for step, values in found.items()}


def line(outcomes: Iterable[Outcome]) -> str:
    """For the progress of one block: `gptq x0.41, refine x0.77`; "" where no step knows its objective."""
    return ", ".join(f"{step} x{ratio:.2f}" for step, ratio in ratios(outcomes).items())


def summary(outcomes: Sequence[Outcome]) -> tuple[dict[str, Any], ...]:
    """For report.json, a mapping for each step: how many weights, how many it left alone, the mean ratio."""
    mean = ratios(outcomes)
    rows = []
    for step in dict.fromkeys(o.step for o in outcomes):
        mine = [o for o in outcomes if o.step == step]
        left = sum(not o.after < o.before for o in mine)
        rows.append({"step": step, "weights": len(mine), "left_alone": left, "objective": mean.get(step)})
    return tuple(rows)


def notes(outcomes: Iterable[Outcome]) -> tuple[str, ...]:
    """For a report: every note once, with the weights that it is about."""
    about: dict[tuple[str, str], list[str]] = {}
    for o in outcomes:
        for note in filter(None, o.note.split("; ")):
            about.setdefault((o.step, note), []).append(o.weight)
    said = []
    for (step, note), weights in about.items():
        more = f" and {len(weights) - NAMED} more" if len(weights) > NAMED else ""
        said.append(f"{step}: {', '.join(weights[:NAMED])}{more}: {note}")
    return tuple(said)
