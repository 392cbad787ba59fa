"""One recipe file: read strictly, and every complaint says the place.

YAML is taken as data only: no tags, no `<<`, a key once. `at` is the place in the words of the message, such
as `my.yaml: rules[2]`. Names of formats and steps are checked against the files of their room, none imported;
whether they know an option is checked when the plan is made.
"""

from __future__ import annotations

import dataclasses
import functools
import runpy
from pathlib import Path
from typing import Any, Literal, NamedTuple

import yaml

from mojax import find
from mojax.errors import InputError, nearest

LARGEST = 1_000_000  # bytes; a recipe is a page, and YAML aliases can make a small file a huge tree
LONGEST = 1_000  # characters of one text
SAYS = ("weights", "inputs", "hadamard", "kv_cache", "attention", "share_scale")  # what a rule can say
CACHE = ("format", "k", "v", "per", "cast", "affine", "rotate", "skip_first", "skip_last")  # of a kv_cache


@dataclasses.dataclass(frozen=True)
class Rule:
    """What becomes of the tensors whose name fits `match`; None: this rule does not say.

    Attributes:
      match: a glob on the tensor's full name, which ends in `.weight`; `*` crosses dots.
      weights: `{"format": name, **options}`, or "keep" for as they are.
      inputs: `{"format": name, **options}`, or "none" for as they are.
      hadamard: the order of the Hadamard blocks that rotate the input when the linear runs; 0 for none.
      kv_cache: a format name, "none", or a mapping of `CACHE`: `{"format": name}` or `{"k": name, "v": name}`
        with options of `mojax.cache.Cache`.
      share_scale: linears that a server fuses share one per-tensor scale.
      attention: "fp8": the operands of its products, or "none".
      optional: the rule may match nothing; always True in a shipped recipe.
      shipped: the rule comes from a shipped recipe, not from a user's.
    """

    match: str
    weights: dict[str, Any] | Literal["keep"] | None = None
    inputs: dict[str, Any] | Literal["none"] | None = None
    hadamard: int | None = None
    kv_cache: dict[str, Any] | str | None = None
    share_scale: bool | None = None
    attention: str | None = None
    optional: bool = False
    shipped: bool = dataclasses.field(default=False, compare=False)


class Calibration(NamedTuple):
    """Which text calibrates: `builtin` or a file, and how many sequences of how many tokens.

    `gradients`: how many times the loss is differentiated, each time with labels drawn anew from the model's
    own predictions; 0 for never. Steps then weigh errors by what they do to the predictions.
    """

    text: str = "builtin"
    sequences: int = 64
    length: int = 256
    seed: int = 0
    gradients: int = 0


class Menu(NamedTuple):
    """What `mojax recipes` says of a shipped recipe; None where nothing was measured."""

    hardware: str
    needs_data: bool
    bits_per_weight: float | None = None  # all tensors of the built-in model
    kl_tiny: float | None = None  # nats per token, on the built-in model and text


class Document(NamedTuple):
    """What one file says, checked, its parents not looked at yet. None or empty: nothing said."""

    name: str
    extends: tuple[str, ...]
    description: str | None
    rules: tuple[Rule, ...]
    steps: tuple[tuple[str, dict[str, Any]], ...] | None
    calibration: dict[str, Any]
    limits: dict[str, float | None]
    menu: Menu | None


# ---------------------------------------------------------------- reading


def read(path: Path, at: str, trust_python: bool) -> Any:
    """The data of a YAML file, or what the Python file defines as `recipe`; unchecked.

    Raises:
      InputError: it cannot be read, is not plain YAML (with the line), or is Python and not trusted.
    """
    if path.suffix == ".py":
        return _run(path, at, trust_python)
    try:
        with open(path, "rb") as file:
            raw = file.read(LARGEST + 1)
    except (OSError, ValueError) as error:  # ValueError: a NUL in the name
        raise InputError(f"{at}: cannot be read: {getattr(error, 'strerror', None) or error}") from None
    if len(raw) > LARGEST:
        raise InputError(f"{at}: larger than {LARGEST:,} bytes, which no recipe is")
    try:
        return yaml.load(raw.decode("utf-8-sig"), _Loader)
    except UnicodeDecodeError as error:
        raise InputError(f"{at}: not UTF-8 text (byte {error.start})") from None
    except RecursionError:
        raise InputError(f"{at}: nested too deeply for a recipe") from None
    except yaml.MarkedYAMLError as error:
        mark = error.problem_mark or error.context_mark
        line = f" line {mark.line + 1}:" if mark else ""
        raise InputError(f"{at}:{line} not YAML: {error.problem or error.context}") from None
    except Exception as error:  # PyYAML lets ValueError, KeyError ... out of a bad date or `!!int`
        raise InputError(f"{at}: not YAML: {str(error).splitlines()[0] if str(error) else error!r}") from None


def _run(path: Path, at: str, trust: bool) -> Any:
    """The mapping that a Python recipe defines."""
    if not trust:
        raise InputError(f"{at}: a Python recipe runs code on this machine; --trust_remote_code allows it")
    if not path.is_file():
        raise InputError(f"{at}: cannot be read: no such file")
    try:
        made = runpy.run_path(str(path)).get("recipe")
        made = made() if callable(made) else made
    except Exception as error:
        raise InputError(f"{at}: running it failed: {type(error).__name__}: {error}") from error
    if made is None:
        raise InputError(f"{at}: defines no `recipe`; it must be a mapping, or a function that returns one")
    return made


class _Loader(yaml.SafeLoader):
    """YAML of plain data, where a key may stand only once; PyYAML would let the last one win."""

    def flatten_mapping(self, node: yaml.MappingNode) -> None:
        """Refuses `<<`, the one YAML feature whose cost is exponential in the length of the file."""
        for key, _ in node.value:
            if key.tag == "tag:yaml.org,2002:merge":
                raise yaml.constructor.ConstructorError(None, None, "`<<` is not supported", key.start_mark)

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        seen = set()
        for key, _ in node.value:
            if isinstance(key, yaml.ScalarNode):
                if key.value in seen:
                    raise yaml.constructor.ConstructorError(
                        None, None, f"the key {key.value!r} stands twice", key.start_mark
                    )
                seen.add(key.value)
        return super().construct_mapping(node, deep)


# ---------------------------------------------------------------- checking what a file says


def check(at: str, data: Any, stem: str, *, shipped: bool) -> Document:
    """What the data of a file says, for a file called `stem`; the first thing wrong raises InputError."""
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
    return Document(
        text(f"{at}: name", data.get("name", stem)),
        tuple(text(f"{at}: extends[{i}]", e) for i, e in enumerate(extends)),
        description,
        tuple(_rule(f"{at}: rules[{i}]", rule, shipped) for i, rule in enumerate(rules)),
        steps,
        calibration(f"{at}: calibration", data.get("calibration", {})),
        _limits(f"{at}: limits", data.get("limits", {})),
        _menu(f"{at}: menu", data["menu"]) if "menu" in data else None,
    )


def _rule(at: str, value: Any, shipped: bool) -> Rule:
    value = mapping(at, value, ("match", *SAYS, "optional"))
    if "match" not in value:
        raise InputError(f'{at}: no `match`; it is a glob on tensor names, `match: "*.down_proj.weight"`')
    if not any(key in value for key in SAYS):
        raise InputError(f"{at}: says nothing; it needs one of {', '.join(SAYS)}")
    checks = {
        "weights": functools.partial(_choice, "keep"),
        "inputs": functools.partial(_choice, "none"),
        "hadamard": _hadamard,
        "kv_cache": _cache,
        "attention": _attention,
        "share_scale": flag,
    }
    return Rule(
        match=text(f"{at}.match", value["match"]),
        **{key: check(f"{at}.{key}", value[key]) for key, check in checks.items() if key in value},
        optional=flag(f"{at}.optional", value.get("optional", False)) or shipped,
        shipped=shipped,
    )


def _hadamard(at: str, value: Any) -> int:
    """The order of a block, or 0, also said as `none`."""
    if value == "none":
        return 0
    if isinstance(value, bool) or not isinstance(value, int) or not (value == 0 or 2 <= value < 2**31):
        raise InputError(
            f"{at}: found {show(value)}, needed none, or how many input channels a block has, such as 32"
        )
    return value


def _cache(at: str, value: Any) -> dict[str, Any] | str:
    """A format's name, `none`, or a mapping with that of both, or of keys and of values, and options."""
    if isinstance(value, str):
        return "none" if value == "none" else _format(at, text(at, value), "none")
    if not isinstance(value, dict):
        raise InputError(f"{at}: found {show(value)}, needed a format's name, {{format: name}}, or none")
    value = mapping(at, value, CACHE)
    named = [key for key in ("format", "k", "v") if key in value]
    if named not in (["format"], ["k", "v"]):
        raise InputError(
            f"{at}: names {' and '.join(named) or 'no format'}; it is a mapping like {{format: fp8}}, or "
            "{k: fp8, v: nvfp4}"
        )
    for key in named:
        if value[key] != "none":
            _format(f"{at}.{key}", text(f"{at}.{key}", value[key]), "none")
    for key in {"cast", "affine", "rotate"} & value.keys():
        flag(f"{at}.{key}", value[key])
    for key in {"skip_first", "skip_last"} & value.keys():
        whole(f"{at}.{key}", value[key], 0)
    if value.get("per", "tensor") not in ("tensor", "head"):
        raise InputError(f"{at}.per: found {show(value['per'])}, needed tensor or head")
    return dict(value)


def _attention(at: str, value: Any) -> str:
    if value not in ("fp8", "none"):
        raise InputError(f"{at}: found {show(value)}, needed fp8 or none")
    return value


def _choice(word: str, at: str, value: Any) -> dict[str, Any] | str:
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


def calibration(at: str, value: Any, separator: str = ".") -> dict[str, Any]:
    """Some fields of a Calibration."""
    least = {"sequences": 1, "length": 1, "seed": 0, "gradients": 0}
    checked = {}
    for key, v in mapping(at, value, Calibration._fields).items():
        place = f"{at}{separator}{key}"
        checked[key] = text(place, v) if key == "text" else whole(place, v, least[key])
    return checked


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


# ---------------------------------------------------------------- values


def mapping(at: str, value: Any, known: tuple[str, ...] | None, separator: str = ".") -> dict[str, Any]:
    """A mapping from words, all of them among `known`, if given."""
    if not isinstance(value, dict):
        raise InputError(f"{at}: found {show(value)}, needed a mapping (`key: value` lines)")
    for key in value:
        if not isinstance(key, str):
            raise InputError(f"{at}: the key {show(key)} is not a word")
        if known is not None and key not in known:
            name = key if key.isprintable() and len(key) <= 60 else show(key)
            raise InputError(f"{at}{separator}{name}: unknown key{nearest(key[:60], known)}")
    return value


def sequence(at: str, value: Any) -> list[Any]:
    """A list, or a tuple of a Python file."""
    if not isinstance(value, list | tuple):
        raise InputError(f"{at}: found {show(value)}, needed a list (`- ` lines)")
    return list(value)


def text(at: str, value: Any, *, empty: bool = False) -> str:
    """Text of at most `LONGEST` characters."""
    if not isinstance(value, str) or not (value.strip() or empty):
        raise InputError(f"{at}: found {show(value)}, needed text")
    if len(value) > LONGEST:
        raise InputError(f"{at}: longer than {LONGEST} characters")
    return value


def flag(at: str, value: Any) -> bool:
    """true or false."""
    if not isinstance(value, bool):
        raise InputError(f"{at}: found {show(value)}, needed true or false")
    return value


def whole(at: str, value: Any, least: int) -> int:
    """A whole number from `least` to 2^31 - 1."""
    if isinstance(value, bool) or not isinstance(value, int) or not least <= value < 2**31:
        raise InputError(f"{at}: found {show(value)}, needed a whole number of at least {least}")
    return value


def positive(at: str, value: Any) -> float:
    """A number above 0."""
    if isinstance(value, bool) or not isinstance(value, int | float) or not 0 < value < 1e300:
        raise InputError(f"{at}: found {show(value)}, needed a number above 0")
    return float(value)


def show(value: Any) -> str:
    """A value for a message: short, and never the whole of a tree."""
    if value is None or isinstance(value, bool):
        return {None: "nothing", True: "true", False: "false"}[value]
    if isinstance(value, dict | list | tuple):
        return "a mapping" if isinstance(value, dict) else "a list"
    if isinstance(value, int) and abs(value) >= 2**63:
        return "a huge number"  # Python refuses to print one of more than 4300 digits
    shown = repr(value)
    return shown if len(shown) <= 60 else shown[:57] + "..."
