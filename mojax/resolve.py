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
from mojax.transforms.base import Transform, chain


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
    if said.inputs is None or said.inputs == "none":
        return Scheme(weights), ""
    return Scheme(weights, resolve_format(said.inputs, f"rules: {rule.match}: inputs", arithmetic)), ""


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


def resolve_steps(recipe: Recipe) -> Transform:
    """The steps of a recipe as one transform.

    Raises:
      InputError: as `made_steps`.
    """
    return chain(*made_steps(recipe))


def made_steps(recipe: Recipe) -> tuple[Transform, ...]:
    """The steps of a recipe, each a transform; the last one encodes.

    Raises:
      InputError: an unknown step or option, a value of the wrong type, or no order in which weights end up
        encoded.
    """
    steps = []
    for name, options in recipe.steps:
        make = getattr(find.find("transforms", name), name)
        known = make.__kwdefaults__ or {}
        for key in options:
            if key not in known:
                raise InputError(f"steps: {name} has no option {key!r}{nearest(key, known)}")
        try:
            steps.append(make(**options))
        except TypeError as error:
            said = ", ".join(f"{key}: {value!r}" for key, value in options.items())
            raise InputError(f"steps: {name} cannot use {said}; a value is of the wrong type") from error
    if [step.encodes for step in steps] != [False] * (len(steps) - 1) + [True]:
        said = ", ".join(name for name, _ in recipe.steps)
        raise InputError(
            f"steps: found [{said}]; exactly one step must encode the weights (rtn), and it must be the last"
        )
    return tuple(steps)
