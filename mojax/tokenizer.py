"""The tokenizer and the chat template of a model folder, as functions."""

from __future__ import annotations

import datetime
import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from mojax.errors import InputError

Encode = Callable[[Sequence[str]], list[list[int]]]
Render = Callable[[list[dict[str, Any]]], str]

_PLAIN = ("fp8_dynamic", "fp8_block", "int8", "int4", "mxfp4", "mxfp8", "nvfp4_weight_only")
NO_TEXT = (
    "give tokens as an npz file (--calibration=FILE.npz, --text=FILE.npz), or use a recipe that needs no "
    f"text ({', '.join(_PLAIN)}) with --noevaluate"
)
_OTHERS = ("*.model", "vocab.json", "vocab.txt", "tekken.json", "*.tiktoken", "tokenizer_config.json")


class Tokenizer(NamedTuple):
    """The functions of a tokenizer.

    Attributes:
      encode: texts to token ids, without special tokens.
      prompt: a text to token ids, with the special tokens that the tokenizer adds to one.
      decode: token ids to text, without special tokens.
    """

    encode: Encode
    prompt: Callable[[str], list[int]]
    decode: Callable[[Sequence[int]], str]


def load_tokenizer(folder: Path, advice: str = NO_TEXT) -> Tokenizer:
    """The tokenizer of a model folder.

    Args:
      advice: what to do without one, for the error.
    Raises:
      InputError: no tokenizer in the folder, or one that needs another package.
    """
    file = folder / "tokenizer.json"
    if file.exists():
        return _fast(file)
    others = sorted(f.name for pattern in _OTHERS for f in folder.glob(pattern))
    if not others:
        raise InputError(f"{folder}: no tokenizer; {advice}")
    try:
        from transformers import AutoTokenizer
    except ImportError as error:
        raise InputError(
            f"{folder}: no tokenizer.json, and {others[0]} needs transformers: pip install 'mojax[hf]'"
        ) from error
    try:
        slow = AutoTokenizer.from_pretrained(str(folder), local_files_only=True)
    except Exception as error:  # whatever a tokenizer class raises on files that do not suit it
        raise InputError(f"{folder}: transformers cannot load the tokenizer {others[0]}: {error}") from error
    return Tokenizer(
        lambda texts: slow(list(texts), add_special_tokens=False, verbose=False)["input_ids"],
        lambda text: slow(text, verbose=False)["input_ids"],
        lambda ids: slow.decode(list(ids), skip_special_tokens=True),
    )


def _fast(file: Path) -> Tokenizer:
    from tokenizers import Tokenizer as Fast

    try:
        fast = Fast.from_file(str(file))
    except Exception as error:  # the library raises plain Exception
        raise InputError(f"{file} cannot be read: {error}") from error
    fast.no_truncation()
    fast.no_padding()
    return Tokenizer(
        lambda texts: [e.ids for e in fast.encode_batch_fast(list(texts), add_special_tokens=False)],
        lambda text: fast.encode(text).ids,
        lambda ids: fast.decode(list(ids), skip_special_tokens=True),
    )


def load_template(folder: Path) -> Render | None:
    """The chat template of a model folder as a function from messages to text, or None.

    `strftime_now` gives a fixed day: the same command must give the same tokens tomorrow.

    Raises:
      InputError: a template that is not valid; the function raises it for messages that the template refuses.
    """
    names = _read_settings(folder / "special_tokens_map.json")
    names |= _read_settings(folder / "tokenizer_config.json")
    file, template = folder / "chat_template.jinja", names.get("chat_template")
    if file.exists():
        template = file.read_text(encoding="utf-8")
    elif isinstance(template, list):
        named = [t for t in template if isinstance(t, dict) and t.get("name") == "default"]
        template = named[0].get("template") if named else None
    if not isinstance(template, str) or not template:
        return None
    from jinja2 import TemplateError

    special = {
        k: v["content"] if isinstance(v, dict) else v for k, v in names.items() if k.endswith("_token")
    }
    try:
        compiled = _environment().from_string(template)
    except TemplateError as error:
        raise InputError(f"{folder}: the chat template is not valid: {error}") from error

    def render(messages: list[dict[str, Any]]) -> str:
        try:
            return compiled.render(
                messages=messages, tools=None, documents=None, add_generation_prompt=False, **special
            )
        except (TemplateError, TypeError, ValueError, KeyError) as error:
            raise InputError(f"the chat template refuses the messages: {error}") from error

    return render


def _environment() -> Any:
    """Jinja as chat templates expect it (transformers' documentation, "Writing a chat template")."""
    import jinja2.ext
    from jinja2.sandbox import ImmutableSandboxedEnvironment

    class Generation(jinja2.ext.Extension):
        """`{% generation %}` marks what a model said; the text is its body."""

        tags = {"generation"}  # noqa: RUF012

        def parse(self, parser: Any) -> Any:
            next(parser.stream)
            return parser.parse_statements(("name:endgeneration",), drop_needle=True)

    def tojson(x: Any, ensure_ascii=False, indent=None, separators=None, sort_keys=False) -> str:
        return json.dumps(
            x, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys
        )

    def raise_exception(message: str) -> None:
        raise jinja2.TemplateError(message)

    environment = ImmutableSandboxedEnvironment(
        trim_blocks=True, lstrip_blocks=True, extensions=[Generation, jinja2.ext.loopcontrols]
    )
    environment.filters["tojson"] = tojson
    environment.globals["raise_exception"] = raise_exception
    environment.globals["strftime_now"] = datetime.datetime(2024, 7, 26).strftime
    return environment


def _read_settings(file: Path) -> dict[str, Any]:
    if not file.exists():
        return {}
    try:
        found = json.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise InputError(f"{file} cannot be read as JSON: {error}") from error
    if not isinstance(found, dict):
        raise InputError(f"{file}: needed a JSON object")
    return found
