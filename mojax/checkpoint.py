"""A checkpoint folder as a mapping from tensor name to read-only array: headers now, data when asked for."""

from __future__ import annotations

import dataclasses
import fnmatch
import functools
import json
import os
import re
from collections.abc import Callable, Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from mojax.errors import InputError
from mojax.header import DTYPES, Entry, read_header

INDEX = "model.safetensors.index.json"
WEIGHTS = ("*.safetensors", "*.bin", "*.pt", "*.pth", "*.gguf", "*.h5", "*.msgpack", "consolidated*")
_MAPPED = 1 << 16  # bytes; smaller tensors are read: a system gives a process some 65,000 mappings


class Spec(NamedTuple):
    """A tensor without its data."""

    dtype: np.dtype
    shape: tuple[int, ...]


@dataclasses.dataclass(frozen=True, eq=False)
class Checkpoint(Mapping[str, np.ndarray]):
    """Tensors of a folder by name. Each access maps the tensor anew, so memory is given back with the array.

    Attributes:
      folder: where `config.json` and the other files are.
      config: `config.json`.
      entries: by name, in the order of the data on disk.
      headers_only: the data are not on this machine; indexing raises InputError.
    """

    folder: Path
    config: dict[str, Any]
    entries: dict[str, Entry]
    headers_only: bool = False

    def __getitem__(self, name: str) -> np.ndarray:
        """The tensor, read-only, in its own dtype: a view of the mapped file (a copy under 64 KiB).

        Raises:
          KeyError: no such tensor.
          InputError: only headers were fetched, or the file changed since it was opened.
        """
        entry = self.entries[name]
        if self.headers_only:
            raise InputError(f"{name}: only headers were fetched, not the data; download the model first")
        return _read(entry)

    def __iter__(self) -> Iterator[str]:
        return iter(self.entries)

    def __len__(self) -> int:
        return len(self.entries)

    def __contains__(self, name: object) -> bool:
        return name in self.entries

    def spec(self, name: str) -> Spec:
        """Dtype and shape from the header."""
        return Spec(self.entries[name].dtype, self.entries[name].shape)


@dataclasses.dataclass(frozen=True, eq=False, kw_only=True)
class Derived(Checkpoint):
    """A checkpoint of which some tensors are made from others whenever they are read.

    Attributes:
      entries: what the files hold.
      names: the tensors as they read, in the order of the files.
      weights: of a tensor that is made, its spec, and what makes it anew at each access.
      learned: what was found with data to make them from, by name.
    """

    names: tuple[str, ...]
    weights: Mapping[str, tuple[Spec, Callable[[], np.ndarray]]]
    learned: Mapping[str, np.ndarray] = dataclasses.field(default_factory=dict)

    def __getitem__(self, name: str) -> np.ndarray:
        """The tensor; raises as in `Checkpoint`, or InputError when codes and scales do not fit."""
        if name in self.weights:
            return self.weights[name][1]()
        if name not in self:
            raise KeyError(name)
        return super().__getitem__(name)

    def __iter__(self) -> Iterator[str]:
        return iter(self.names)

    def __len__(self) -> int:
        return len(self.names)

    def __contains__(self, name: object) -> bool:
        return name in self._known

    def spec(self, name: str) -> Spec:
        """Dtype and shape, those of what is made."""
        return self.weights[name][0] if name in self.weights else super().spec(name)

    @functools.cached_property
    def _known(self) -> frozenset[str]:
        return frozenset(self.names)


@dataclasses.dataclass(frozen=True, eq=False, kw_only=True)
class Decoded(Derived):
    """A checkpoint of encoded weights, read as if it were in full precision.

    Attributes:
      said: what the weights are encoded as, in words.
    """

    said: str


def _read(entry: Entry) -> np.ndarray:
    count = entry.stop - entry.start
    try:
        if count >= _MAPPED:
            mapped = np.memmap(entry.file, entry.dtype, mode="r", offset=entry.start, shape=entry.shape)
            return np.asarray(mapped)
        with open(entry.file, "rb") as f:
            f.seek(entry.start)
            data = f.read(count)
    except (OSError, ValueError) as error:
        raise InputError(f"{entry.file}: {entry.name!r} cannot be read: {error}") from error
    if len(data) != count:
        raise InputError(f"{entry.file}: {entry.name!r}: the file became shorter after it was opened")
    return np.frombuffer(data, entry.dtype).reshape(entry.shape)


def open_checkpoint(folder: Path) -> Checkpoint:
    """Open a folder with `config.json` and one safetensors file, shards with an index, or shards without.

    Raises:
      InputError: no such folder, no or broken `config.json`, no safetensors, missing or contradictory shards,
        a header that does not describe its file. The message names file and tensor.
    """
    folder = Path(folder)
    if not folder.exists():
        raise InputError(f"{folder}: no such folder")
    if not folder.is_dir():
        raise InputError(f"{folder} is a file; give the folder that holds it and its config.json")
    index = folder / INDEX
    indexed = read_index(index) if index.exists() else None
    names = sorted(f.name for f in folder.iterdir() if f.is_file())
    files = [folder / n for n in choose_shards(str(folder), names, indexed)]
    config = read_config(folder)
    return Checkpoint(folder, config, join_shards({f: read_header(f) for f in files}, indexed, index))


def read_config(folder: Path) -> dict[str, Any]:
    """`config.json` of a folder.

    Raises:
      InputError: it is not there, or not a JSON object.
    """
    file = folder / "config.json"
    if not file.exists():
        if (folder / "adapter_config.json").exists():
            raise InputError(f"{folder} holds an adapter, not a model: merge it into its base model first")
        raise InputError(f"{folder}: no config.json; it says which architecture the tensors are for")
    return read_json(file)


def read_index(file: Path) -> dict[str, str]:
    """The weight map of a safetensors index: tensor name to file name.

    Raises:
      InputError: not an index, or a file name that leaves the folder.
    """
    found = read_json(file).get("weight_map")
    if not isinstance(found, dict) or not found:
        raise InputError(f"{file}: no weight_map; delete the file if the shards beside it are complete")
    for name, shard in found.items():
        if not isinstance(shard, str) or Path(shard).name != shard or not shard.endswith(".safetensors"):
            raise InputError(f"{file}: {name!r}: {shard!r} is not a safetensors file of this folder")
    return found


def read_json(file: Path) -> dict[str, Any]:
    """A JSON object from a file.

    Raises:
      InputError: not readable, not JSON, or not an object.
    """
    try:
        found = json.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        raise InputError(f"{file} cannot be read as JSON: {error}") from error
    if not isinstance(found, dict):
        raise InputError(f"{file}: found a JSON {type(found).__name__}, needed an object")
    return found


def choose_shards(where: str, names: Iterable[str], indexed: Mapping[str, str] | None) -> list[str]:
    """The safetensors files that make up the model, from the names of all files of the folder `where`.

    Raises:
      InputError: shards are missing, or it is not clear which files are the model.
    """
    present = sorted(n for n in names if n.endswith(".safetensors"))
    if indexed is not None:
        named = sorted(set(indexed.values()))
        missing = [n for n in named if n not in present]
        if missing:
            raise InputError(f"{where}: {INDEX} names missing files: {', '.join(missing)}; download them")
        if "model.safetensors" in present and "model.safetensors" not in named:
            raise InputError(f"{where}: holds model.safetensors and {INDEX} with other files; remove one")
        return named
    if not present:
        raise InputError(_no_safetensors(where, sorted(names)))
    if "model.safetensors" in present:
        return ["model.safetensors"]
    chosen = [n for n in present if not n.startswith(("consolidated", "adapter_"))] or present
    _check_numbers(where, chosen)
    return chosen


def _check_numbers(where: str, names: Iterable[str]) -> None:
    """Shards without an index must number themselves completely (`x-00002-of-00005.safetensors`)."""
    sets: dict[tuple[str, str], set[int]] = {}
    for name in names:
        if m := re.fullmatch(r"(.*)-(\d{1,5})-of-(\d{1,5})\.safetensors", name, re.ASCII):
            sets.setdefault((m[1], m[3]), set()).add(int(m[2]))
    if len(sets) > 1:
        found = ", ".join(f"{stem}-*-of-{total}" for stem, total in sorted(sets))
        raise InputError(f"{where}: no {INDEX}, and shards of more than one set: {found}; keep one set")
    for (stem, total), seen in sets.items():
        gaps = [i for i in range(1, int(total) + 1) if i not in seen]
        if gaps:
            missing = ", ".join(f"{stem}-{i:0{len(total)}d}-of-{total}.safetensors" for i in gaps)
            raise InputError(f"{where}: missing files: {missing}; download them")


def _no_safetensors(where: str, names: list[str]) -> str:
    if not names:
        return f"{where}: the folder is empty"
    for suffix in (".gguf", ".bin", ".pt", ".pth", ".h5", ".msgpack"):
        other = [n for n in names if n.endswith(suffix)]
        if other:
            source = f"'{where}', gguf_file='{other[0]}'" if suffix == ".gguf" else f"'{where}'"
            code = (
                f"from transformers import AutoModelForCausalLM as M; "
                f"M.from_pretrained({source}).save_pretrained('NEW_FOLDER')"
            )
            return f'{where}: needs safetensors, found only {other[0]}; convert with: python -c "{code}"'
    return f"{where}: no *.safetensors, found {', '.join(names[:10])}"


def join_shards(
    headers: Mapping[Path, Iterable[Entry]], indexed: Mapping[str, str] | None, index: Path
) -> dict[str, Entry]:
    """The entries of all shards by name, checked against the index.

    Raises:
      InputError: a tensor in two shards, or tensors that are not in the shard the index names.
    """
    entries: dict[str, Entry] = {}
    for file, found in headers.items():
        for entry in found:
            if entry.name in entries:
                raise InputError(f"{entry.name!r} is in two files: {entries[entry.name].file} and {file}")
            entries[entry.name] = entry
    wrong = [n for n, shard in (indexed or {}).items() if n not in entries or entries[n].file.name != shard]
    if indexed and wrong:
        listed = ", ".join(f"{n!r} in {indexed[n]}" for n in sorted(wrong)[:10])
        more = f" and {len(wrong) - 10} more" if len(wrong) > 10 else ""
        raise InputError(f"{index} names tensors that their files lack: {listed}{more}; download both again")
    return entries


def write_shard(
    path: Path, tensors: Mapping[str, np.ndarray], metadata: Mapping[str, str] | None = None
) -> None:
    """Write one safetensors file through `path + ".tmp"`, so that `path` is complete or absent.

    The same tensors give the same bytes (metadata of one key at most). Contiguous arrays (mapped ones too)
    are not copied.

    Raises:
      InputError: a dtype that safetensors files cannot hold, or a disk that refuses.
    """
    from safetensors import SafetensorError
    from safetensors.numpy import save_file

    path, known = Path(path), set(DTYPES.values())
    for name, x in tensors.items():
        if x.dtype.newbyteorder("=") not in known:
            raise InputError(f"{path}: {name!r} is {x.dtype}, which a safetensors file cannot hold; pack it")
    part = path.with_name(path.name + ".tmp")
    try:
        part.write_bytes(b"")
        mode = part.stat().st_mode  # what the umask gives; the library's files are for the owner only
        said = dict(metadata or {"format": "pt"})
        save_file({n: np.asarray(x, order="C") for n, x in tensors.items()}, part, metadata=said)
        part.chmod(mode)
        os.replace(part, path)
    except (OSError, SafetensorError) as error:
        part.unlink(missing_ok=True)
        raise InputError(f"{path} cannot be written: {error}") from error


def read_entries(file: Path) -> dict[str, Entry]:
    """The entries of one safetensors file by name.

    Raises:
      InputError: the header does not describe the file.
    """
    return {e.name: e for e in read_header(Path(file))}


def read_shard(file: Path) -> dict[str, np.ndarray]:
    """The tensors of one safetensors file, read-only, as `Checkpoint` gives them.

    Raises:
      InputError: the header does not describe the file.
    """
    return {name: _read(e) for name, e in read_entries(file).items()}


def write_text(path: Path, text: str) -> None:
    """Write a UTF-8 file through `path + ".tmp"`, so that `path` is complete or absent.

    Raises:
      InputError: the disk refuses.
    """
    path = Path(path)
    part = path.with_name(path.name + ".tmp")
    try:
        part.write_text(text, encoding="utf-8")
        os.replace(part, path)
    except OSError as error:
        raise InputError(f"{path} cannot be written: {error}") from error


def write_index(folder: Path, weight_map: Mapping[str, str], total_size: int) -> None:
    """Write the index that Hugging Face libraries read; `total_size` is the bytes of all tensors."""
    index = {"metadata": {"total_size": total_size}, "weight_map": dict(weight_map)}
    write_text(Path(folder, INDEX), json.dumps(index, indent=2, sort_keys=True) + "\n")


def side_files(folder: Path) -> list[Path]:
    """Every file of a model folder that an output must hold byte for byte, sorted; links are followed.

    Not among them: weights in any format and their indexes, adapters, `.git`, `.cache`, `original`, and the
    top-level `config.json` and `README.md`, which an output has of its own.

    Raises:
      InputError: a link that leads nowhere.
    """
    folder, found, seen = Path(folder), [], set()
    for here, inner, names in os.walk(folder, followlinks=True):
        seen.add(os.path.realpath(here))
        inner[:] = [
            d
            for d in sorted(inner)
            if d not in (".git", ".cache", "original")
            and not Path(here, d, "adapter_config.json").exists()
            and os.path.realpath(Path(here, d)) not in seen
        ]
        top = Path(here) == folder
        for name in names:
            weights = any(fnmatch.fnmatchcase(name.removesuffix(".index.json"), w) for w in WEIGHTS)
            if weights or (top and name in ("config.json", "README.md")):
                continue
            if not Path(here, name).exists():
                raise InputError(f"{Path(here, name)} is a link to a missing file; download it again")
            found.append(Path(here, name))
    return sorted(found)


def locate(source: str | Path, *, revision: str | None = None, headers_only: bool = False) -> Checkpoint:
    """Open a model: the built-in `tiny`, an existing folder, or a hub id, which is downloaded.

    Args:
      revision: branch, tag or commit of a hub id.
      headers_only: of a hub id, fetch only headers and small files.
    Raises:
      InputError: no such folder, the hub cannot give the model, or as `open_checkpoint`.
    """
    if (folder := find_folder(str(source))) is not None:
        return open_checkpoint(folder)
    from mojax import hub

    if headers_only:
        return hub.open_headers(str(source), revision=revision)
    return open_checkpoint(hub.download(str(source), revision=revision))


def find_folder(source: str) -> Path | None:
    """The local folder that `source` means, or None when it can only be a hub id (`org/name`).

    Raises:
      InputError: no such folder, and not the form of a hub id.
    """
    folder = Path(source).expanduser()
    if source and folder.exists():
        return folder
    if source == "tiny":
        return Path(__file__).parent / "data" / "tiny"
    parts = source.split("/")
    shaped = len(parts) == 2 and all(re.fullmatch(r"[A-Za-z0-9_][\w.-]*", p, re.ASCII) for p in parts)
    if shaped:
        return None
    raise InputError(f"{source!r}: no such folder (a hub id is org/name; 'tiny' is the built-in model)")
