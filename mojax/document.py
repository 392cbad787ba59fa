"""A file of plain data that a person wrote: read strictly, and every complaint says the place.

YAML is taken as data only: no tags, no `<<`, a key once. `at` is the place in the words of the
message, such as `my.yaml: rules[2]`.
"""

from __future__ import annotations

import runpy
from pathlib import Path
from typing import Any

import yaml

from mojax.errors import InputError, nearest

LARGEST = 1_000_000  # bytes; such a file is a page, and YAML aliases can make a small file a huge tree
LONGEST = 1_000  # characters of one text


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
