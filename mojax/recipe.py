"""A recipe is ordered rules and steps, as data: what becomes of a weight, said before any weight is read.

The last rule whose `match` fits a tensor's name wins, key by key; `*` crosses dots. `extends` puts the parents'
rules first, each parent once. A child's `steps` and `description` replace its parents'; its `calibration` and
`limits` are laid over theirs key by key.

Nothing here imports jax or a format: names are checked against the files of a room, options by the plan.
"""

from __future__ import annotations

import dataclasses
import fnmatch
import importlib.resources
import os
from pathlib import Path
from typing import Any, Literal, NamedTuple

from mojax import find
from mojax.document import flag, mapping, positive, read, sequence, show, text, whole
from mojax.errors import InputError, nearest

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
class Rule:
    """What becomes of the tensors whose name fits `match`; None: this rule does not say.

    Attributes:
      match: a glob on the tensor's full name, which ends in `.weight`; `*` crosses dots.
      weights: `{"format": name, **options}`, or "keep" for as they are.
      inputs: `{"format": name, **options}`, or "none" for as they are.
      kv_cache: a format name, or "none".
      share_scale: linears that a server fuses share one per-tensor scale.
      optional: the rule may match nothing; always True in a shipped recipe.
      shipped: the rule comes from a shipped recipe, not from a user's.
    """

    match: str
    weights: dict[str, Any] | Literal["keep"] | None = None
    inputs: dict[str, Any] | Literal["none"] | None = None
    kv_cache: str | None = None
    share_scale: bool | None = None
    optional: bool = False
    shipped: bool = dataclasses.field(default=False, compare=False)


class Calibration(NamedTuple):
    """Which text calibrates: `builtin` or a file, and how many sequences of how many tokens."""

    text: str = "builtin"
    sequences: int = 64
    length: int = 256
    seed: int = 0


class Menu(NamedTuple):
    """What `mojax recipes` says of a shipped recipe; None where nothing was measured."""

    hardware: str
    needs_data: bool
    bits_per_weight: float | None = None  # all tensors of the built-in model
    kl_tiny: float | None = None  # nats per token, on the built-in model and text


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


class _Document(NamedTuple):
    """What one file says, checked, its parents not looked at yet. None or empty: nothing said."""

    name: str
    extends: tuple[str, ...]
    description: str | None
    rules: tuple[Rule, ...]
    steps: tuple[tuple[str, dict[str, Any]], ...] | None
    calibration: dict[str, Any]
    limits: dict[str, float | None]
    menu: Menu | None


# ---------------------------------------------------------------- using a recipe


def names() -> tuple[str, ...]:
    """The shipped recipes."""
    files = importlib.resources.files("mojax.recipes").iterdir()
    return tuple(sorted(f.name.removesuffix(".yaml") for f in files if f.name.endswith(".yaml")))


def load_recipe(name_or_path: str | os.PathLike[str], trust_python: bool = False) -> Recipe:
    """A shipped recipe by name, or one from a file: `.yaml`, `.yml`, or `.py` if `trust_python`.

    A `.py` file defines `recipe`, a mapping of the same schema or a function that returns one.

    Raises:
      InputError: no such recipe, or the first thing in it that cannot be used, with the place.
    """
    documents = _lineage(os.fspath(name_or_path), Path(), trust_python, ())
    last = list(documents.values())[-1]
    rules = tuple(rule for d in documents.values() for rule in d.rules)
    if not rules:
        raise InputError(f"{os.fspath(name_or_path)}: no rules; start from a recipe (`extends: nvfp4`) or add a rule")
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
            for key in ("weights", "inputs", "kv_cache", "share_scale"):
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


def menu() -> str:
    """The shipped recipes as a table, one line each."""
    rows = [("recipe", "bits", "weights", "inputs", "needs", "KL", "runs on", "what it is")]
    for name in names():
        recipe = load_recipe(name)
        every, facts = choose(recipe, "*"), recipe.menu or Menu("", False)
        rows.append(
            (
                name,
                _number_or_dash(facts.bits_per_weight, ".2f"),
                _words(every.weights),
                _words(every.inputs),
                "data" if facts.needs_data else "-",
                _number_or_dash(facts.kl_tiny, ".4f"),
                facts.hardware,
                recipe.description,
            )
        )
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    lines = ["  ".join(cell.ljust(w) for cell, w in zip(row, widths, strict=True)).rstrip() for row in rows]
    note = "bits: per weight, all tensors; KL: mean nats per token; both on the built-in model (--model=tiny)"
    return "\n".join([*lines, note])


def _words(choice: dict[str, Any] | str | None) -> str:
    """`{"format": "fp8", "per": "token"}` as `fp8 per token`."""
    if not isinstance(choice, dict):
        return "-"
    options = [
        (key if value else f"not {key}") if isinstance(value, bool) else f"{key} {value}"
        for key, value in choice.items()
        if key != "format"
    ]
    return " ".join([choice["format"], *options])


def _number_or_dash(value: float | None, spec: str) -> str:
    return "-" if value is None else format(value, spec)


# ---------------------------------------------------------------- finding and reading files


def _lineage(wanted: str, folder: Path, trust: bool, trail: tuple[str, ...]) -> dict[str, _Document]:
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
        path = Path(str(importlib.resources.files("mojax.recipes"))) / f"{key}.yaml"
    if key in trail:
        raise InputError(f"{at}: extends itself: {' -> '.join((*trail, key))}")
    document = _check(at, read(path, at, trust), path.stem, shipped=not is_file)
    documents: dict[str, _Document] = {}
    for parent in document.extends:
        for k, d in _lineage(parent, path.parent, trust, (*trail, key)).items():
            documents.setdefault(k, d)
    return documents | {key: document}


def _shipped(wanted: str) -> str:
    """The shipped recipe of this name (`-` and `_` are the same), or the reason why there is none."""
    name = wanted.replace("-", "_")
    if name in names():
        return name
    upper = name.upper().removesuffix("_CFG")
    ours = CALLED.get(upper, name.lower())
    if ours in names():
        raise InputError(f"{wanted} is called {ours} here")
    if os.path.isfile(f"{wanted}.yaml"):
        raise InputError(f"no shipped recipe is called {wanted!r}; for the file say {wanted}.yaml")
    raise InputError(f"no shipped recipe is called {wanted!r}{nearest(name, names())} (a file ends in .yaml)")


# ---------------------------------------------------------------- checking what a file says


def _check(at: str, data: Any, stem: str, *, shipped: bool) -> _Document:
    if data is None:
        raise InputError(f"{at}: empty; a recipe is a mapping with `rules` or `extends`")
    known = ("name", "extends", "description", "rules", "steps", "calibration", "limits", "menu")
    data = mapping(at, data, known, separator=": ")
    extends = data.get("extends", [])
    extends = sequence(f"{at}: extends", [extends] if isinstance(extends, str) else extends)
    description = data.get("description")
    if "description" in data:
        description = text(f"{at}: description", description, empty=True).strip()
        if len(description.splitlines()) > 1:
            raise InputError(f"{at}: description: more than one line; it is one line of the menu")
    rules = sequence(f"{at}: rules", data.get("rules", []))
    steps = None
    if "steps" in data:
        named = sequence(f"{at}: steps", data["steps"])
        steps = tuple(_step(f"{at}: steps[{i}]", step) for i, step in enumerate(named))
        if not steps:
            raise InputError(f"{at}: steps: empty; rounding to nearest is `steps: [rtn]`")
    return _Document(
        text(f"{at}: name", data.get("name", stem)),
        tuple(text(f"{at}: extends[{i}]", e) for i, e in enumerate(extends)),
        description,
        tuple(_rule(f"{at}: rules[{i}]", rule, shipped) for i, rule in enumerate(rules)),
        steps,
        _calibration(f"{at}: calibration", data.get("calibration", {})),
        _limits(f"{at}: limits", data.get("limits", {})),
        _menu(f"{at}: menu", data["menu"]) if "menu" in data else None,
    )


def _rule(at: str, value: Any, shipped: bool) -> Rule:
    says = ("weights", "inputs", "kv_cache", "share_scale")
    value = mapping(at, value, ("match", *says, "optional"))
    if "match" not in value:
        raise InputError(f'{at}: no `match`; it is a glob on tensor names, `match: "*.down_proj.weight"`')
    if not any(key in value for key in says):
        raise InputError(f"{at}: says nothing; it needs one of {', '.join(says)}")
    checks = {"weights": _weights, "inputs": _inputs, "kv_cache": _cache, "share_scale": flag}
    return Rule(
        match=text(f"{at}.match", value["match"]),
        **{key: check(f"{at}.{key}", value[key]) for key, check in checks.items() if key in value},
        optional=flag(f"{at}.optional", value.get("optional", False)) or shipped,
        shipped=shipped,
    )


def _weights(at: str, value: Any) -> dict[str, Any] | str:
    return _choice(at, value, "keep")


def _inputs(at: str, value: Any) -> dict[str, Any] | str:
    return _choice(at, value, "none")


def _cache(at: str, value: Any) -> str:
    return "none" if value == "none" else _format(at, text(at, value), "none")


def _choice(at: str, value: Any, word: str) -> dict[str, Any] | str:
    """A format with its options, or `word`."""
    if isinstance(value, str):
        return word if value == word else {"format": _format(at, value, word)}
    if not isinstance(value, dict):
        raise InputError(f"{at}: found {show(value)}, needed a format's name, {{format: name}}, or {word}")
    if "format" not in value:
        raise InputError(f"{at}: no `format`; it is a mapping like {{format: nvfp4}}")
    name = _format(f"{at}.format", text(f"{at}.format", value["format"]), word)
    return {"format": name} | _options(at, {k: v for k, v in value.items() if k != "format"}, lists=False)


def _format(at: str, name: str, word: str) -> str:
    known = find.names("formats")
    if (wanted := name.replace("-", "_")) in known:
        return wanted
    if wanted in names():
        raise InputError(f"{at}: {name!r} is a recipe, not a format{nearest(wanted, known)}")
    raise InputError(f"{at}: unknown format {show(name)}{nearest(wanted, (*known, word))}")


def _step(at: str, value: Any) -> tuple[str, dict[str, Any]]:
    """`rtn` or `{gptq: {damping: 0.01}}`."""
    if isinstance(value, dict) and len(value) == 1:
        name, options = next(iter(value.items()))
    elif isinstance(value, str):
        name, options = value, {}
    else:
        raise InputError(f"{at}: found {show(value)}; a step is a name, or one name with its options")
    known = find.names("transforms")
    wanted = text(at, name).replace("-", "_")
    if wanted not in known:
        raise InputError(f"{at}: unknown step {show(name)}{nearest(wanted, known)}")
    return wanted, _options(f"{at}.{wanted}", options, lists=True)


def _options(at: str, value: Any, *, lists: bool) -> dict[str, Any]:
    """Names and plain values; which of them a format or step knows is checked when the plan is made."""
    for key, v in mapping(at, value, None).items():
        for each in v if lists and isinstance(v, list) else [v]:
            number = isinstance(each, int | float) and abs(each) < 2.0**63  # NaN is not
            if not number and not isinstance(each, str):
                raise InputError(f"{at}.{key}: found {show(each)}, needed a number, a word, true or false")
    return dict(value)


def _calibration(at: str, value: Any) -> dict[str, Any]:
    least = {"sequences": 1, "length": 1, "seed": 0}
    return {
        key: text(f"{at}.{key}", v) if key == "text" else whole(f"{at}.{key}", v, least[key])
        for key, v in mapping(at, value, Calibration._fields).items()
    }


def _limits(at: str, value: Any) -> dict[str, float | None]:
    """`kl_mean` in nats per token; null takes a parent's limit away."""
    return {
        key: None if v is None else positive(f"{at}.{key}", v)
        for key, v in mapping(at, value, ("kl_mean",)).items()
    }


def _menu(at: str, value: Any) -> Menu:
    value = mapping(at, value, Menu._fields)
    measured = {
        key: None if value.get(key) is None else positive(f"{at}.{key}", value[key])
        for key in ("bits_per_weight", "kl_tiny")
    }
    hardware = text(f"{at}.hardware", value.get("hardware"))
    return Menu(hardware, flag(f"{at}.needs_data", value.get("needs_data")), **measured)
