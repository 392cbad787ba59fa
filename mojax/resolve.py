"""From the words of a recipe to values: a format, the steps, what becomes of one tensor."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from fnmatch import fnmatchcase
from typing import Any

from mojax import find
from mojax.errors import InputError, nearest
from mojax.formats.base import Format, Scheme
from mojax.recipe import Recipe, choose
from mojax.transforms.base import Transform


def decide(
    recipe: Recipe, name: str, role: str, keep: Sequence[str], arithmetic: str
) -> tuple[Scheme | None, str]:
    """The formats of the tensor `name`, or None and why it is kept.

    Args:
      role: as in a plan's row; only "linear" and "head" can be encoded.
      keep: globs of weights that are kept by default. A user's rule that gives the full name overrides them.
      arithmetic: of the dialect.
    Raises:
      InputError: a format or option that does not exist.
    """
    said = choose(recipe, name)
    if role not in ("linear", "head") and said.weights != "keep":
        return None, role
    if said.weights is None:
        return None, "no rule"
    rule = [r for r in recipe.rules if r.weights is not None and fnmatchcase(name, r.match)][-1]
    if said.weights == "keep":
        return None, "the recipe keeps it" if rule.shipped else f"rule {rule.match}"
    by_full_name = not rule.shipped and rule.match == name
    if not by_full_name and (role == "head" or any(fnmatchcase(name, glob) for glob in keep)):
        return None, "head: servers want it in full precision" if role == "head" else "by default"
    weights = resolve_format(said.weights, f"rules: {rule.match}: weights", arithmetic)
    inputs = None
    if said.inputs is not None and said.inputs != "none":
        inputs = resolve_format(said.inputs, f"rules: {rule.match}: inputs", arithmetic)
    return Scheme(weights, inputs, said.hadamard or 0), ""


def resolve_format(spec: Mapping[str, Any] | str, where: str, arithmetic: str) -> Format:
    """The Format of `{format: name, **options}`.

    Raises:
      InputError: unknown format, unknown option (with the nearest), or a value that the format refuses.
    """
    spec = {"format": spec} if isinstance(spec, str) else spec
    options = {k: v for k, v in spec.items() if k != "format"}
    kind = find.find("formats", str(spec["format"])).FORMAT
    known = [f.name for f in dataclasses.fields(kind) if not f.kw_only]
    for key in options:
        if key not in known:
            raise InputError(f"{where}: {spec['format']} has no option {key!r}{nearest(key, known)}")
    return kind(**options, arithmetic=arithmetic)


def made_steps(recipe: Recipe) -> tuple[Transform, ...]:
    """The steps of a recipe, each a transform; the last one encodes.

    Raises:
      InputError: an unknown step or option, a value of the wrong type, or an order that cannot be right: a
        rewrite after what it would undo, a step twice, a last step that does not encode.
    """
    steps = []
    for name, options in recipe.steps:
        make = getattr(find.find("transforms", name), name)
        known = make.__kwdefaults__ or {}
        for key in options:
            if key not in known:
                raise InputError(f"steps: {name} has no option {key!r}{nearest(key, known)}")
        try:
            steps.append(make(**options)._replace(name=name))
        except TypeError as error:
            said = ", ".join(f"{key}: {value!r}" for key, value in options.items())
            raise InputError(f"steps: {name} cannot use {said}; a value is of the wrong type") from error
    _ordered([name for name, _ in recipe.steps], steps)
    return tuple(steps)


PHASES = ("model", "block", "encode", "tune")
DOES = {
    "model": "rewrites the whole model",
    "block": "moves what is hard to round between weights",
    "encode": "chooses scales, codes, or what they stand for",
    "tune": "tunes whole blocks",
}


def _ordered(names: Sequence[str], steps: Sequence[Transform]) -> None:
    """Raises InputError for an order that cannot be right."""
    for i in range(1, len(steps)):
        before, after = steps[i - 1].phase, steps[i].phase
        if PHASES.index(after) < PHASES.index(before):
            raise InputError(
                f"steps: {names[i]} {DOES[after]} and stands after {names[i - 1]}, which {DOES[before]} for "
                f"the weights as they were; put {names[i]} first"
            )
    twice = [name for i, name in enumerate(names) if name in names[:i] and steps[i].phase != "encode"]
    if twice:
        raise InputError(f"steps: {twice[0]} stands twice; remove one")
    if len(ranks := {step.rank for step in steps if step.rank}) > 1:
        raise InputError(f"steps: branches of ranks {sorted(ranks)}, and a linear has one; give all one rank")
    flat = [step.name for step in steps if step.flattens]
    late = [n for n, step in zip(names, steps, strict=True) if step.phase == "block" and n not in flat]
    if flat and late and names.index(late[-1]) > names.index(flat[0]):
        raise InputError(
            f"steps: {late[-1]} scales channels, which {flat[0]} before it has mixed; put {late[-1]} first"
        )
    if flat and ranks:
        raise InputError(
            f"steps: {flat[0]} turns the inputs that a branch would read as they come; leave out one of them"
        )
    _lost(names, steps)
    if not steps[-1].encodes:
        said = ", ".join(names)
        raise InputError(
            f"steps: found [{said}]; the last step must encode the weights (rtn rounds to nearest), and "
            f"{names[-1]} does not"
        )


def _lost(names: Sequence[str], steps: Sequence[Transform]) -> None:
    """Raises InputError where a step throws away what one before has chosen; new targets are a reason to."""
    for j, later in enumerate(steps):
        for i in range(j - 1, -1, -1):
            before = steps[i]
            if before.phase == "encode" and (before.rank or not before.encodes):
                break
            if before.encodes and later.anew and (later.anew == "scales" or before.chooses):
                after, first = names[j], names[i]
                do = f"leave out {after}" if later.anew == "scales" else f"put {after} before {first}"
                raise InputError(
                    f"steps: {after} chooses {later.anew} anew, and what {first} has found before would be "
                    f"lost; {do}, or leave out {first}"
                )
