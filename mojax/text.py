"""Tokens for calibration and evaluation, from the built-in text or a txt, jsonl, parquet or npz file.

Text is one stream: documents follow each other (plain ones with an empty line between). It is tokenised
without the special tokens a tokenizer would add, and cut into pieces of `length` tokens. Evaluation with seed
0 takes the first pieces; with another seed, as calibration always, a seeded choice. Both keep the order.
"""

from __future__ import annotations

import hashlib
import itertools
import json
import os
import re
import zipfile
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any, Literal, NamedTuple

import numpy as np

from mojax.errors import InputError
from mojax.tokenizer import Encode, Render, load_template, load_tokenizer

Purpose = Literal["calibration", "evaluation"]

_CHOICE = 8  # a seed chooses among so many times the pieces it needs; a long file is not read to its end
_TURN = 2000  # characters; paragraphs of a txt file are gathered to user turns of at least this size


class Tokens(NamedTuple):
    """Token ids and where they come from.

    Attributes:
      ids: int32 `[sequences, length]`.
      preview: the first 200 characters of the text that was tokenised, chat template included.
      digest: sha256 of the ids as little-endian int32, in hexadecimal.
      origin: the source in words.
    """

    ids: np.ndarray
    preview: str
    digest: str
    origin: str


class Row(NamedTuple):
    """One document: as plain text, and as a chat. `chat` says that the source itself is a chat."""

    where: str
    text: str
    messages: list[dict[str, Any]]
    chat: bool


def tokens(
    source: str | Path,
    folder: Path,
    *,
    sequences: int,
    length: int,
    seed: int = 0,
    purpose: Purpose,
    vocab: int | None = None,
) -> Tokens:
    """`sequences` pieces of `length` tokens.

    The model's chat template, if it has one, wraps every document for calibration (a plain document is one
    user turn; a txt file becomes turns of paragraphs), and for evaluation only rows with `messages`.
    A choice with `seed` is among the first `8 * sequences` pieces; an npz file is read in order.

    Args:
      source: "builtin", or a file: txt; jsonl or parquet with `text`, `messages`, or `prompt` and
        `completion`; npz with an integer array `tokens` `[sequences, length]`.
      folder: of the model, for its tokenizer and chat template.
      seed: of the choice; 0 makes evaluation take the first pieces instead.
      vocab: ids must be below it.
    Raises:
      InputError: no such file, a row that cannot be read, no tokenizer, too little text, ids outside `vocab`.
    """
    if sequences < 1 or length < 1:
        raise InputError(f"--sequences={sequences} --length={length}: both must be at least 1")
    origin = str(source)
    if source == "builtin":
        source = Path(__file__).parent / "data" / "text" / f"{purpose}.txt"
        origin = f"built-in {purpose} text"
    path, folder = Path(source), Path(folder)
    if not path.is_file() or not os.access(path, os.R_OK):
        raise InputError(
            f"{path}: no such file, or not readable; give 'builtin' or a txt, jsonl, parquet or npz file"
        )
    if path.suffix == ".npz":
        ids, preview = _read_npz(path, sequences, length), ""
    else:
        encode, render = load_tokenizer(folder).encode, load_template(folder)
        rows = read_rows(path, turns=purpose == "calibration" and render is not None)
        texts = _texts(rows, render, purpose)
        chosen = purpose == "calibration" or seed != 0
        pieces = sequences * (_CHOICE if chosen else 1)
        stream, preview = _encode_stream(texts, encode, pieces * length)
        ids = _cut(stream, sequences, length, seed if chosen else None, origin)
        if render is not None and purpose == "calibration":
            origin += ", with the chat template"
    _check_ids(ids, vocab, origin)
    ids = np.ascontiguousarray(ids, np.int32)
    preview = preview or "token ids " + " ".join(map(str, ids[0, :32]))
    return Tokens(ids, preview[:200], hashlib.sha256(ids.astype("<i4").tobytes()).hexdigest(), origin)


def _check_ids(ids: np.ndarray, vocab: int | None, origin: str) -> None:
    low, high = int(ids.min()), int(ids.max())
    if low < 0 or high >= (1 << 31 if vocab is None else vocab):
        need = "32 bits" if vocab is None else f"the model's vocabulary of {vocab}"
        wrong = low if low < 0 else high
        raise InputError(f"{origin}: token id {wrong} is outside {need}; are they from another tokenizer?")


def _read_npz(path: Path, sequences: int, length: int) -> np.ndarray:
    try:
        with open(path, "rb") as f, np.load(f) as file:
            if "tokens" not in file.files:
                raise InputError(f"{path}: no array 'tokens'; found {', '.join(file.files) or 'none'}")
            ids = file["tokens"]
    except (OSError, ValueError, EOFError, zipfile.BadZipFile) as error:
        if isinstance(error, InputError):
            raise
        raise InputError(f"{path} cannot be read as npz: {error}") from error
    if not np.issubdtype(ids.dtype, np.integer) or ids.ndim != 2:
        found = f"{ids.dtype} {list(ids.shape)}"
        raise InputError(f"{path}: 'tokens' is {found}; needed integers [sequences, length]")
    if ids.shape[0] < sequences or ids.shape[1] < length:
        raise InputError(
            f"{path}: 'tokens' is {list(ids.shape)}, needed [{sequences}, {length}]; "
            f"pass --sequences={ids.shape[0]} --length={ids.shape[1]}"
        )
    return ids[:sequences, :length]


def _cut(stream: np.ndarray, sequences: int, length: int, seed: int | None, origin: str) -> np.ndarray:
    """`[sequences, length]` of a stream: its first pieces, or with `seed` a choice, in order."""
    found = len(stream) // length
    if not len(stream):
        raise InputError(f"{origin} holds no text")
    if found < sequences:
        fit = f"--sequences={found}" if found else f"--sequences=1 --length={len(stream)}"
        raise InputError(
            f"{origin}: {len(stream)} tokens, needed {sequences} x {length} = {sequences * length}; "
            f"pass {fit} or give more text"
        )
    pieces = stream[: found * length].reshape(found, length)
    if seed is None:
        return pieces[:sequences]
    return pieces[np.sort(np.random.default_rng(seed).choice(found, sequences, replace=False))]


def _texts(rows: Iterable[Row], render: Render | None, purpose: Purpose) -> Iterator[str]:
    """The documents as they are tokenised."""
    between = ""
    for row in rows:
        if not row.chat and not row.text.strip():
            continue
        if render is not None and (row.chat or purpose == "calibration"):
            try:
                yield render(row.messages)
            except InputError as error:
                raise InputError(f"{row.where}: {error}") from error
        else:
            yield between + row.text
        between = "\n\n"


def _encode_stream(texts: Iterable[str], encode: Encode, wanted: int) -> tuple[np.ndarray, str]:
    """At least `wanted` tokens if the texts have them, else all; and the beginning of the text."""
    ids: list[int] = []
    preview, batch, size = "", [], 0
    for text in itertools.chain(texts, [None]):
        if text is not None:
            preview += text[: 200 - len(preview)]
            batch.append(text)
            size += len(text)
            if size < 4 * (wanted - len(ids)):
                continue
        if not batch:
            break
        found = [_encode_start(batch[0], encode, wanted - len(ids))] if len(batch) == 1 else encode(batch)
        ids.extend(itertools.chain.from_iterable(found))
        batch, size = [], 0
        if len(ids) >= wanted:
            break
    return np.asarray(ids[:wanted], np.int64), preview


def _encode_start(text: str, encode: Encode, wanted: int) -> list[int]:
    """The first `wanted` tokens of a text, without tokenising much more of it."""
    size = 6 * wanted + 4096
    while size < len(text):
        ids = encode([text[:size]])[0][:-64]  # the last tokens may depend on what was cut off
        if len(ids) >= wanted:
            return ids
        size *= 2
    return encode([text])[0]


def read_rows(path: Path, *, turns: bool = False) -> Iterator[Row]:
    """The documents of a txt, jsonl or parquet file; with `turns` a txt file is split between paragraphs.

    Raises:
      InputError: names the row that cannot be read.
    """
    if path.suffix == ".txt":
        try:
            text = path.read_text(encoding="utf-8-sig")
        except UnicodeDecodeError as error:
            raise InputError(f"{path}: not UTF-8 at byte {error.start}") from error
        for part in _split_turns(text) if turns else [text]:
            yield Row(str(path), part, [{"role": "user", "content": part}], False)
    elif path.suffix == ".jsonl":
        with open(path, "rb") as f:
            for number, line in enumerate(f, 1):
                if line.strip():
                    yield _parse_row(f"{path}, row {number}", line)
    elif path.suffix == ".parquet":
        yield from _read_parquet(path)
    else:
        raise InputError(f"{path}: needs to end in .txt, .jsonl, .parquet or .npz")


def _split_turns(text: str) -> Iterator[str]:
    turn = ""
    for paragraph in re.split(r"\n{2,}", text):
        turn = f"{turn}\n\n{paragraph}" if turn else paragraph
        if len(turn) >= _TURN:
            yield turn
            turn = ""
    if turn.strip():
        yield turn


def _parse_row(where: str, line: bytes) -> Row:
    try:
        row = json.loads(line.decode("utf-8-sig"))
    except (ValueError, RecursionError) as error:
        raise InputError(f"{where}: not JSON: {error}") from error
    return _as_row(where, row)


def _as_row(where: str, row: Any) -> Row:
    if isinstance(row, dict):
        text, prompt, completion = row.get("text"), row.get("prompt"), row.get("completion")
        if row.get("messages") is not None:
            return _as_chat(where, row["messages"])
        if isinstance(text, str):
            return Row(where, text, [{"role": "user", "content": text}], False)
        if isinstance(prompt, list) and isinstance(completion, list):
            return _as_chat(where, prompt + completion)
        if isinstance(prompt, str) and isinstance(completion, str):
            chat = [{"role": "user", "content": prompt}, {"role": "assistant", "content": completion}]
            return Row(where, prompt + completion, chat, False)
    found = f"keys {', '.join(map(str, row)) or 'none'}" if isinstance(row, dict) else type(row).__name__
    raise InputError(f"{where}: found {found}; needed text, messages, or prompt and completion")


def _as_chat(where: str, messages: Any) -> Row:
    if not isinstance(messages, list) or not messages:
        raise InputError(f"{where}: messages is {str(messages)[:80]!r}; needed a list of messages")
    plain = []
    for message in messages:
        content = message.get("content") if isinstance(message, dict) else None
        if not isinstance(message, dict) or not isinstance(message.get("role"), str):
            raise InputError(f"{where}: a message is {str(message)[:80]!r}; needed role and content")
        if isinstance(content, list):
            plain += [p["text"] for p in content if isinstance(p, dict) and isinstance(p.get("text"), str)]
        elif isinstance(content, str):
            plain.append(content)
    return Row(where, "\n\n".join(plain), messages, True)


def _read_parquet(path: Path) -> Iterator[Row]:
    try:
        import pyarrow
        import pyarrow.parquet
    except ImportError as error:
        raise InputError(f"{path}: reading parquet needs pyarrow: pip install 'mojax[parquet]'") from error
    try:
        file = pyarrow.parquet.ParquetFile(path)
        names = [n for n in ("text", "messages", "prompt", "completion") if n in file.schema_arrow.names]
        if not names:
            raise InputError(f"{path}: columns {', '.join(file.schema_arrow.names)}; needed text or messages")
        with file:
            number = 0
            for batch in file.iter_batches(batch_size=256, columns=names):
                for row in batch.to_pylist():
                    number += 1
                    yield _as_row(f"{path}, row {number}", row)
    except (pyarrow.ArrowException, OSError) as error:
        raise InputError(f"{path} cannot be read as parquet: {error}") from error
