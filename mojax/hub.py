"""Models of the Hugging Face hub: a whole snapshot, or only what a plan needs (small files and headers)."""

from __future__ import annotations

import contextlib
from collections.abc import Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

from mojax.checkpoint import (
    INDEX,
    WEIGHTS,
    Checkpoint,
    choose_shards,
    join_shards,
    open_checkpoint,
    read_config,
    read_index,
)
from mojax.errors import InputError
from mojax.header import Entry, header_length, parse_header

_SMALL = ["*.json", "*.jinja", "*.model", "*.txt", "*.py", "*.tiktoken"]
_OTHER = ["*/*.safetensors", "original/*", ".git/*", ".cache/*"]
_ADAPTER = "adapter/adapter_model.safetensors"  # the branches of a checkpoint of ours
_UNUSED = [w for w in WEIGHTS if w != "*.safetensors"] + _OTHER
_FIRST = 1 << 17  # bytes; holds most headers, so that most shards take one request


def download(source: str, *, revision: str | None = None) -> Path:
    """The snapshot folder of a hub id: everything but weights in formats other than safetensors.

    Args:
      source: `org/name`.
      revision: branch, tag or commit; `main` by default.
    Raises:
      InputError: `huggingface_hub` is not installed, or the hub cannot give the model.
    """
    hub = _client(source)
    with _explained(source, revision):
        names = _list_files(hub, source, revision)
        top = _top(names or ())
        if names is not None and not any(n.endswith(".safetensors") for n in top):
            choose_shards(source, top, None)  # raises before anything is downloaded
        folder = Path(hub.snapshot_download(source, revision=revision, ignore_patterns=_UNUSED))
        if _ADAPTER in (names or ()):
            hub.hf_hub_download(source, _ADAPTER, revision=folder.name)
        return folder


def open_headers(source: str, *, revision: str | None = None) -> Checkpoint:
    """The checkpoint of a hub id with entries and config but no data; fetches headers by range.

    Raises:
      InputError: as `download`; or a header that does not describe its file.
    """
    hub = _client(source)
    with _explained(source, revision):
        names = _list_files(hub, source, revision)
        folder = Path(
            hub.snapshot_download(source, revision=revision, allow_patterns=_SMALL, ignore_patterns=_UNUSED)
        )
    if names is None:
        return open_checkpoint(folder)  # what the cache has
    config = read_config(folder)
    index = folder / INDEX
    indexed = read_index(index) if index.exists() else None
    files = [folder / n for n in choose_shards(source, _top(names), indexed)]
    adapter = [folder / _ADAPTER] if _ADAPTER in names and "quantization_config" in config else []
    with _explained(source, revision), ThreadPoolExecutor(8) as pool:
        headers = list(pool.map(lambda file: _fetch_header(hub, source, folder, file), files + adapter))
    count = len(files)
    entries = join_shards(dict(zip(files, headers[:count], strict=True)), indexed, index)
    for file, header in zip(adapter, headers[count:], strict=True):
        entries = entries | join_shards({file: header}, None, file)
    return Checkpoint(folder, config, entries, headers_only=True)


def _client(source: str) -> Any:
    try:
        import huggingface_hub.constants
        import huggingface_hub.errors
        import huggingface_hub.utils
    except ImportError as error:
        raise InputError(
            f"{source!r}: no such folder; to read it from the hub: pip install 'mojax[hf]'"
        ) from error
    return huggingface_hub


def _list_files(hub: Any, source: str, revision: str | None) -> list[str] | None:
    """The names of all files; None when the hub cannot be reached."""
    if hub.constants.HF_HUB_OFFLINE:
        return None
    try:
        info = hub.HfApi().model_info(source, revision=revision)
    except Exception as error:
        if isinstance(error, hub.errors.HfHubHTTPError) or not _of_transport(error):
            raise
        return None  # the cache may have the model; the download that follows says if not
    return sorted(s.rfilename for s in info.siblings or ())


def _top(names: Iterable[str]) -> list[str]:
    return [n for n in names if "/" not in n]


def _fetch_header(hub: Any, source: str, folder: Path, file: Path) -> list[Entry]:
    name = file.relative_to(folder).as_posix()
    url = hub.hf_hub_url(source, name, revision=folder.name)  # a snapshot's folder is named by its commit
    data, size = _fetch(hub, url, 0, _FIRST)
    length = header_length(data[:8], size, file)
    if len(data) < 8 + length:
        data += _fetch(hub, url, len(data), 8 + length)[0]
    return parse_header(data[8 : 8 + length], size, file)


def _fetch(hub: Any, url: str, start: int, stop: int) -> tuple[bytes, int]:
    """Bytes `start` to `stop` of a file on the hub, and the size of the whole file."""
    wanted = {"Range": f"bytes={start}-{stop - 1}", "Accept-Encoding": "identity"}
    reply = hub.utils.get_session().get(url, headers={**hub.utils.build_hf_headers(), **wanted}, timeout=60)
    hub.utils.hf_raise_for_status(reply)
    if reply.status_code == 206:
        return reply.content, int(reply.headers["Content-Range"].rpartition("/")[2])
    return reply.content[start:stop], len(reply.content)  # a server without ranges sent all of it


@contextlib.contextmanager
def _explained(source: str, revision: str | None) -> Iterator[None]:
    """Turns what the hub's client raises into an InputError that says what to do."""
    from huggingface_hub import errors

    try:
        yield
    except InputError:
        raise
    except errors.GatedRepoError as error:
        raise InputError(
            f"{source}: access is gated; accept the terms on its page on the hub, then `hf auth login`"
        ) from error
    except errors.RevisionNotFoundError as error:
        raise InputError(f"{source}: the hub has no revision {revision!r} of it") from error
    except errors.RepositoryNotFoundError as error:
        raise InputError(
            f"{source!r}: no such folder, and no such model on the hub (if it is private: `hf auth login`)"
        ) from error
    except errors.LocalEntryNotFoundError as error:
        raise InputError(
            f"{source!r}: no such folder, not in the cache, and the hub is not reachable (or HF_HUB_OFFLINE)"
        ) from error
    except Exception as error:
        if not _of_transport(error) and not isinstance(error, errors.HFValidationError):
            raise
        raise InputError(f"{source}: the hub could not be read: {type(error).__name__}: {error}") from error


def _of_transport(error: Exception) -> bool:
    """Whether the client's HTTP library raised this: httpx or its successor, whose errors are no OSError."""
    return isinstance(error, OSError) or type(error).__module__.partition(".")[0].startswith("httpx")
