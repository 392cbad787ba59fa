"""A recipe is ordered rules and steps, as data: what becomes of a weight, said before any weight is read.

The last rule whose `match` fits a tensor's name wins, key by key; `*` crosses dots. `extends` puts the
parents' rules first, each parent once. A child's `steps` and `description` replace its parents'; its
`calibration` and `limits` are laid over theirs key by key.

A single file and its checks are in `mojax.document`. Nothing here imports jax.
"""

from __future__ import annotations

import dataclasses
import fnmatch
import importlib.resources
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from mojax import document
from mojax.document import SAYS, Calibration, Document, Menu, Rule
from mojax.errors import InputError, nearest

LAYERS = "layers"  # folder of what is no recipe by itself

# What others call the same thing: compressed-tensors' presets, then ModelOpt's constants without `_CFG`.
CALLED = {
    "FP8": "fp8",
    "FP8_DYNAMIC": "fp8_dynamic",
    "FP8_BLOCK": "fp8_block",
    "W8A8": "int8",
    "W4A16": "int4",
    "W4A16_ASYM": "int4_asymmetric",
    "NVFP4": "nvfp4",
    "NVFP4A16": "nvfp4_weight_only",
    "MXFP4": "mxfp4",
    "MXFP4A16": "mxfp4_weight_only",
    "MXFP8": "mxfp8",
    "FP8_DEFAULT": "fp8",
    "FP8_PER_CHANNEL_PER_TOKEN": "fp8_dynamic",
    "FP8_2D_BLOCKWISE_WEIGHT_ONLY": "fp8_block",
    "INT4_BLOCKWISE_WEIGHT_ONLY": "int4",
    "MXFP4_DEFAULT": "mxfp4",
    "MXFP8_DEFAULT": "mxfp8",
    "NVFP4_DEFAULT": "nvfp4",
    "W4A16_NVFP4": "nvfp4_weight_only",
}


@dataclasses.dataclass(frozen=True)
class Recipe:
    """Rules and steps, parents included. `limits`: `{"kl_mean": nats per token}`, empty for none."""

    name: str
    description: str
    rules: tuple[Rule, ...]
    steps: tuple[tuple[str, dict[str, Any]], ...]
    calibration: Calibration
    limits: dict[str, float]
    menu: Menu | None = None


# ---------------------------------------------------------------- using a recipe


def names() -> tuple[str, ...]:
    """The shipped recipes."""
    files = importlib.resources.files("mojax.recipes").iterdir()
    return tuple(sorted(f.name.removesuffix(".yaml") for f in files if f.name.endswith(".yaml")))


def layers() -> tuple[str, ...]:
    """The shipped parts of recipes, such as steps alone, that a recipe can extend beside one with rules."""
    files = importlib.resources.files("mojax.recipes").joinpath(LAYERS).iterdir()
    return tuple(sorted(f.name.removesuffix(".yaml") for f in files if f.name.endswith(".yaml")))


def load_recipe(source: str | os.PathLike[str] | Mapping[str, Any], trust_python: bool = False) -> Recipe:
    """A shipped recipe by name, one from a file (`.yaml`, `.yml`, or `.py` if `trust_python`), or a mapping.

    A `.py` file defines `recipe`, a mapping of the same schema or a function that returns one.

    Raises:
      InputError: no such recipe, or the first thing in it that cannot be used, with the place.
    """
    if isinstance(source, Mapping):
        where, said = "recipe", document.check("recipe", dict(source), "recipe", shipped=False)
        documents = _with_parents("recipe", said, Path(), trust_python, ())
    elif not isinstance(source, str | os.PathLike):
        raise InputError(f"recipe: found {type(source).__name__}, needed a name, a file or a mapping")
    else:
        where = os.fspath(source)
        documents = _lineage(where, Path(), trust_python, ())
    last = list(documents.values())[-1]
    rules = tuple(rule for d in documents.values() for rule in d.rules)
    if not rules:
        raise InputError(f"{where}: no rules; add one, or `extends: nvfp4` for a start")
    calibration: dict[str, Any] = {}
    limits: dict[str, float | None] = {}
    steps, description = (("rtn", {}),), ""
    for d in documents.values():
        calibration |= d.calibration
        limits |= d.limits
        steps = steps if d.steps is None else d.steps
        description = description if d.description is None else d.description
    return Recipe(
        last.name,
        description,
        rules,
        steps,
        Calibration(**calibration),
        {k: v for k, v in limits.items() if v is not None},
        last.menu,  # measured on that very recipe, so a child does not inherit it
    )


def choose(recipe: Recipe, name: str) -> Rule:
    """What the recipe says of the tensor `name`: its matching rules, laid over each other key by key."""
    said: dict[str, Any] = {}
    for rule in recipe.rules:
        if fnmatch.fnmatchcase(name, rule.match):
            for key in SAYS:
                if (value := getattr(rule, key)) is not None:
                    said[key] = value
    return Rule(name, **said)


def resolved(recipe: Recipe) -> dict[str, Any]:
    """Plain data of the recipe's own schema, parents laid in: dumped to YAML it loads to an equal Recipe."""
    rules = [
        {k: v for k, v in vars(rule).items() if v is not None and k != "shipped"} for rule in recipe.rules
    ]
    data: dict[str, Any] = {
        "name": recipe.name,
        "description": recipe.description,
        "rules": rules,
        "steps": [{name: options} if options else name for name, options in recipe.steps],
        "calibration": recipe.calibration._asdict(),
        "limits": dict(recipe.limits),
    }
    return data | ({"menu": recipe.menu._asdict()} if recipe.menu else {})


def restored(data: Mapping[str, Any]) -> Recipe:
    """The recipe whose `resolved` is `data`."""
    steps = tuple(next(iter(s.items())) if isinstance(s, Mapping) else (s, {}) for s in data["steps"])
    rules = tuple(Rule(**rule) for rule in data["rules"])
    calibration = Calibration(**data["calibration"])
    return Recipe(data["name"], data["description"], rules, steps, calibration, dict(data["limits"]))


def adjusted(
    recipe: Recipe,
    *,
    keep: Sequence[str] = (),
    text: str | None = None,
    sequences: int | None = None,
    length: int | None = None,
    seed: int | None = None,
) -> Recipe:
    """The recipe with what a command line says on top; None: as the recipe has it.

    Raises:
      InputError: an empty glob, or a number out of range.
    """
    said = {"text": text, "sequences": sequences, "length": length, "seed": seed}
    said = document.calibration("--", {k: v for k, v in said.items() if v is not None}, separator="")
    rules = tuple(Rule(document.text("--keep", glob), weights="keep") for glob in keep)
    calibration = recipe.calibration._replace(**said)
    return dataclasses.replace(recipe, rules=recipe.rules + rules, calibration=calibration)


def menu_rows() -> list[dict[str, Any]]:
    """What `mojax recipes --json` prints: a mapping for each shipped recipe, formats in words."""
    rows = []
    for name in names():
        recipe = load_recipe(name)
        every = choose(recipe, "*")
        facts = recipe.menu._asdict() if recipe.menu else {}
        words = {"weights": _words(every.weights), "inputs": _words(every.inputs)}
        rows.append({"name": name, **words, **facts, "description": recipe.description})
    return rows


def menu() -> str:
    """The shipped recipes as a table, one line each."""
    heads = {
        "name": "recipe",
        "bits_per_weight": "bits",
        "weights": "weights",
        "inputs": "inputs",
        "needs_data": "needs",
        "kl_tiny": "KL",
        "hardware": "runs on",
        "description": "what it is",
    }
    show_as = {"bits_per_weight": "{:.2f}", "kl_tiny": "{:.4f}", "needs_data": "data"}
    rows = [list(heads.values())]
    for row in menu_rows():
        rows.append([show_as.get(k, "{}").format(row[k]) if row.get(k) else "-" for k in heads])
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    lines = ["  ".join(cell.ljust(w) for cell, w in zip(row, widths, strict=True)).rstrip() for row in rows]
    note = "bits: per weight, all tensors; KL: mean nats per token; both on the built-in model (--model=tiny)"
    return "\n".join([*lines, note])


def _words(choice: dict[str, Any] | str | None) -> str:
    """`{"format": "fp8", "per": "token"}` as `fp8 per token`."""
    if not isinstance(choice, dict):
        return ""
    options = [
        (key if value else f"not {key}") if isinstance(value, bool) else f"{key} {value}"
        for key, value in choice.items()
        if key != "format"
    ]
    return " ".join([choice["format"], *options])


# ---------------------------------------------------------------- finding and reading files


def _lineage(wanted: str, folder: Path, trust: bool, trail: tuple[str, ...]) -> dict[str, Document]:
    """A recipe and all it extends, parents first, each once, by where it lies."""
    is_file = wanted.endswith((".yaml", ".yml", ".py")) or "/" in wanted or os.sep in wanted
    if is_file:
        path = folder / wanted
        at = str(path)
        try:
            key = os.path.realpath(path)
        except ValueError:
            raise InputError(f"{wanted!r} is not the name of a file") from None
    else:
        at = key = _shipped(wanted)
        folder = Path(str(importlib.resources.files("mojax.recipes")))
        path = folder / (LAYERS if key in layers() else "") / f"{key}.yaml"
    if key in trail:
        raise InputError(f"{at}: extends itself: {' -> '.join((*trail, key))}")
    said = document.check(at, document.read(path, at, trust), path.stem, shipped=not is_file)
    return _with_parents(key, said, path.parent, trust, trail)


def _with_parents(
    key: str, said: Document, folder: Path, trust: bool, trail: tuple[str, ...]
) -> dict[str, Document]:
    """A document, and before it what it extends."""
    documents: dict[str, Document] = {}
    for parent in said.extends:
        for k, d in _lineage(parent, folder, trust, (*trail, key)).items():
            documents.setdefault(k, d)
    return documents | {key: said}


def _shipped(wanted: str) -> str:
    """The shipped recipe of this name (`-` and `_` are the same), or the reason why there is none."""
    name = wanted.replace("-", "_")
    if name in names() or name in layers():
        return name
    upper = name.upper().removesuffix("_CFG")
    ours = CALLED.get(upper, name.lower())
    if ours in names():
        raise InputError(f"{wanted} is called {ours} here")
    if os.path.isfile(f"{wanted}.yaml"):
        raise InputError(f"no shipped recipe is called {wanted!r}; for the file say {wanted}.yaml")
    near = nearest(name, (*names(), *layers()))
    raise InputError(f"no shipped recipe is called {wanted!r}{near} (a file ends in .yaml)")
