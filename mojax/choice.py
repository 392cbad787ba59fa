"""What a recipe makes of every leaf of a function: its formats, or why it is kept, or a problem."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping, Sequence
from fnmatch import fnmatchcase
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from mojax import interpret
from mojax.calibration import STATISTICS, encoding
from mojax.errors import InputError, PlanError, nearest
from mojax.formats.base import Scheme
from mojax.formats.leaf import check_leaf
from mojax.function import Function, Layout, module_name, scale_name
from mojax.recipe import Recipe, adjusted, load_recipe
from mojax.resolve import decide, made_steps
from mojax.structure.coverage import coverage
from mojax.trace import Site
from mojax.transforms.base import Transform, chain

PRODUCTS = ("dot", "ragged_dot", "conv")
Given = Mapping[str, Mapping[str, Any]]  # statistics by leaf


class Choice(NamedTuple):
    """A recipe resolved for one function.

    Attributes:
      schemes, layouts, notes: as in `Function`.
      steps: the transforms; the last one encodes.
      problems: why it cannot be done, one message each.
    """

    schemes: dict[str, Scheme]
    layouts: dict[str, Layout]
    notes: dict[str, str]
    steps: tuple[Transform, ...]
    problems: list[str]

    @property
    def static(self) -> list[str]:
        """The leaves whose inputs need a calibrated maximum."""
        return [n for n, s in self.schemes.items() if s.inputs is not None and s.inputs.static]

    @property
    def migration(self) -> Transform:
        """The steps that leave the function as it is, as one."""
        return chain(*(t for t in self.steps if t.phase == "block"))

    @property
    def encoding(self) -> Transform:
        """The steps that choose scales and codes, as one."""
        return chain(*(t for t in self.steps if t.phase == "encode"))

    @property
    def needs(self) -> tuple[str, ...]:
        """The statistics that must be calibrated."""
        named = [*self.migration.needs, *self.encoding.needs]
        return tuple(dict.fromkeys([*named, *["absmax"] * bool(self.static)]))


def resolve(model: Function, recipe: str | Recipe, keep: Sequence[str] = ()) -> Choice:
    """Decide what becomes of every leaf that a product reads.

    Rules match a leaf's name, and the name with `.weight`. Kept unless a rule gives the full name: routers,
    leaves that are looked up or used in arithmetic as well, that are summed over different axes at two
    places, or have one axis.

    Args:
      keep: globs of leaves to leave as they are.
    Raises:
      InputError: no such recipe, or steps that cannot be used.
    """
    recipe = recipe if isinstance(recipe, Recipe) else load_recipe(recipe)
    recipe = adjusted(recipe, keep=(keep,) if isinstance(keep, str) else tuple(keep or ()))
    choice = Choice({}, {}, {}, made_steps(recipe), [])
    if tuning := [step.name for step in choice.steps if step.tune]:
        raise InputError(
            f"steps: {tuning[0]} tunes the blocks of a checkpoint's model, and a function has none; leave it "
            "out, or use mojax.optimize on a checkpoint"
        )
    for step in choice.steps:
        if step.rank or step.flattens:
            what = "a branch beside" if step.rank else "matrices before"
            choice.problems.append(
                f"steps: {step.name} puts {what} the linears of a checkpoint's model (mojax.load), "
                "and functions run as they are; leave it out"
            )
        if lost := [need for need in step.needs if need not in STATISTICS] or step.phase == "model":
            what = "rewrites" if lost is True else "looks at what was encoded before in"
            choice.problems.append(
                f"steps: {step.name} {what} the blocks of a checkpoint's model, and a function has none; "
                "leave it out"
            )
    places: dict[str, list[Site]] = {}
    for site in model.sites:
        if site.op != "cache":
            places.setdefault(site.weight, []).append(site)
    widths, said = _widths(model), coverage(model.graph, model.rules)
    for name, sites in places.items():
        if any(s.op in PRODUCTS for s in sites):
            why = _reason(sites, len(model.specs[name].shape)) or said[name].partition("site; ")[2]
            _decide(choice, recipe, model, name, sites, widths.get(name, set()), why)
    choice.problems.extend(_general_problems(choice, recipe, model, said))
    return choice


def _widths(model: Function) -> dict[str, set[int]]:
    """By leaf, how many channels the inputs of its products have."""
    seen: dict[str, set[int]] = {}

    def look(place: interpret.Place) -> tuple[None, None]:
        if place.op in PRODUCTS:
            seen.setdefault(place.name, set()).add(math.prod(place.x.shape[a] for a in place.axes))
        return None, None

    jax.eval_shape(interpret.intercept(model.flat, look, rules=model.rules), model.specs, *model.example)
    return seen


def _decide(
    choice: Choice,
    recipe: Recipe,
    model: Function,
    name: str,
    sites: list[Site],
    widths: set[int],
    why: str,
) -> None:
    """Enter one leaf into the choice: its scheme and layout, or why it is kept, or a problem.

    Args:
      why: it is kept by default, or "".
    """
    products = [s for s in sites if s.op in PRODUCTS]
    first, spec = products[0], model.specs[name]
    parts = first.op != "conv" and widths != {math.prod(spec.shape[a] for a in first.contract)}
    rules = [r for r in recipe.rules if any(fnmatchcase(n, r.match) for n in _aliases(name))]
    presented = module_name(name) + ".weight"
    fitted = [
        dataclasses.replace(r, match=presented if r.match in _aliases(name) else "*") for r in rules
    ]  # `decide` knows the presented name alone
    why = why or ("its channels are read in parts" if parts else "")
    try:
        keep = ("*",) if why else ()
        scheme, reason = decide(
            dataclasses.replace(recipe, rules=tuple(fitted)), presented, "linear", keep, "float32"
        )
    except InputError as error:
        choice.problems.append(f"{name}: {error}")
        return
    if scheme is None:
        by = [r for r in rules if r.weights is not None]
        kept = by and by[-1].weights == "keep" and not by[-1].shipped
        choice.notes[name] = f"rule {by[-1].match}" if kept else why if reason == "by default" else reason
        return
    if scheme.hadamard:
        choice.problems.append(
            f"{name}: hadamard: {scheme.hadamard} rotates linears of a checkpoint's model (mojax.load), and "
            "functions run as they are; leave it out"
        )
        return
    choice.schemes[name] = scheme
    choice.layouts[name] = (first.contract, first.batch)
    if parts:
        choice.problems.append(f"{name}: its channels are read in parts; remove the rule that names it")
    elif trouble := _trouble(name, spec, scheme, choice.layouts[name], widths):
        choice.problems.append(trouble)


def _aliases(name: str) -> tuple[str, str]:
    return name, module_name(name) + ".weight"


def _reason(sites: list[Site], ndim: int) -> str:
    """Why a leaf is kept by default, or ""."""
    products = [s for s in sites if s.op in PRODUCTS]
    if any(s.router for s in sites):
        return "router"
    if looked := [s for s in sites if s.op == "gather"]:
        return "tied: looked up as well" + f" at {looked[0].line}" * bool(looked[0].line)
    if len({(s.contract, s.batch) for s in products}) > 1:
        return "summed over different axes: " + " and ".join(
            dict.fromkeys(f"{list(s.contract)}" + f" at {s.line}" * bool(s.line) for s in products)
        )
    return "one axis only" if ndim < 2 else ""


def _trouble(
    name: str, spec: jax.ShapeDtypeStruct, scheme: Scheme, layout: Layout, widths: set[int]
) -> str | None:
    """Why a leaf cannot be encoded so, or None."""
    advice = f"pass keep=[{name!r}], or use a format that fits"
    if not jnp.issubdtype(spec.dtype, jnp.floating) or np.dtype(spec.dtype).itemsize < 2:
        return f"{name}: is {spec.dtype}, only float leaves can be quantized; pass keep=[{name!r}]"
    if said := check_leaf(scheme.weights, tuple(spec.shape), *layout):
        return f"{name}: seen as [out, in], {said} ({scheme.weights.label}); {advice}"
    for width in sorted(widths) if scheme.inputs else ():
        assert scheme.inputs is not None
        if said := scheme.inputs.check((1, width)):
            return f"{name}: its inputs: {said} ({scheme.inputs.label}); {advice}"
    return None


def _general_problems(choice: Choice, recipe: Recipe, model: Function, said: Mapping[str, str]) -> list[str]:
    """Problems of the recipe as a whole, and of names."""
    found = []
    every = [n for name in model.names for n in _aliases(name)]
    for rule in recipe.rules:
        if not (rule.shipped or rule.optional or any(fnmatchcase(n, rule.match) for n in every)):
            found.append(f"{rule.match}: this rule matches no leaf{nearest(rule.match, model.names)}")
    if any(rule.kv_cache not in (None, "none") for rule in recipe.rules):
        found.append("kv_cache: is for checkpoints; remove it from the recipe of a function")
    if any(rule.attention not in (None, "none") for rule in recipe.rules):
        found.append("attention: is for checkpoints; remove it from the recipe of a function")
    for name in choice.schemes:
        twin = [n for n in model.names if n != name and module_name(n) == module_name(name)]
        taken = [n for n in model.names if n == scale_name(name)]
        if twin or taken:
            found.append(f"{name}: cannot be quantized beside a leaf called {(*twin, *taken)[0]}; rename one")
    if not choice.schemes and not choice.problems:
        lost = {n: line for n, line in said.items() if line.startswith("unreachable")}
        why = [f"{name}: {reason}" for name, reason in (*choice.notes.items(), *lost.items())][:5]
        found.append(f"nothing would be quantized ({'; '.join(why) or 'no product reads a leaf'})")
    return found


def missing(choice: Choice, stats: Given, optional: bool = False) -> list[str]:
    """Problems with statistics that were not given."""
    advice = "pass stats=mojax.calibrate(model, recipe, batches)"
    needs = {need for step in choice.steps for need in step.needs}
    seen = encoding(stats)
    found = []
    for name in choice.schemes:
        lacks = sorted(needs - set(seen.get(name, ())))
        if lacks:
            found.append(f"{name}: the recipe's steps need {', '.join(lacks)} of its inputs; {advice}")
        elif name in choice.static and "absmax" not in stats.get(name, ()) and not optional:
            found.append(f"{name}: its inputs need a static scale; {advice}")
    return found


def solved(choice: Choice) -> Choice:
    """The choice, if it has no problems.

    Raises:
      PlanError: it has; all of them.
    """
    if choice.problems:
        raise PlanError(list(dict.fromkeys(choice.problems)))
    return choice
