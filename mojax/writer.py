"""Writing a checkpoint: shards as blocks finish, everything in OUT.partial, the rename to OUT last of all."""

from __future__ import annotations

import hashlib
import json
import math
import os
import shutil
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from mojax import beside, checkpoint, experts
from mojax.cache import LARGEST
from mojax.errors import InputError
from mojax.formats.base import QTensor, Scheme
from mojax.model import Model
from mojax.planner import HERE, OUTPUTS, TARGETS
from mojax.plans import Plan, Row
from mojax.program import INPUT
from mojax.rewrite import save
from mojax.transforms.base import Outcome

RECORD = "mojax.json"  # the facts; older than anything else in OUT.partial, so its time is when the run began
COUNTS = "tokens_per_expert"  # in the record, by layer
OUTCOMES = "outcomes"  # in the record, of the steps
APART = "adapter-"  # begins the name of a file in the scratch folder: what a shard has for the adapter
SCRATCH = "scratch"  # folder in OUT.partial, gone when the output is finished
OURS = (RECORD, "report.json", "README.md")  # not among the files whose digests are recorded


class Unit(NamedTuple):
    """What is written together: the tensors outside the blocks, or one block, in one or more files."""

    prefix: str
    files: tuple[tuple[str, tuple[Row, ...]], ...]  # (file name, rows)


def units(plan: Plan, model: Model, max_shard_size: int = 5 * 10**9) -> tuple[Unit, ...]:
    """The files of the output, numbered by the plan: what is outside the blocks, then each block."""
    groups = [(p, [r for r in plan.rows if r.block == p]) for p in ("", *(b.prefix for b in model.blocks))]
    pieces: list[tuple[str, list[list[Row]]]] = []
    for prefix, rows in groups:
        parts: list[list[Row]] = [[]]
        size = 0
        for row in rows:
            if parts[-1] and size + row.after > max_shard_size:
                parts.append([])
                size = 0
            parts[-1].append(row)
            size += row.after
        pieces.append((prefix, [part for part in parts if part]))
    total = sum(len(parts) for _, parts in pieces)
    names = (f"model-{i + 1:05d}-of-{total:05d}.safetensors" for i in range(total))
    return tuple(Unit(prefix, tuple((next(names), tuple(p)) for p in parts)) for prefix, parts in pieces)


class Writer:
    """An output folder under construction.

    Args:
      out: must not exist; `<out>.partial` is made, or resumed if its fingerprint is the same.
      facts: what the output depends on (source, recipe, data, versions); written as mojax.json.
    Raises:
      InputError: `out` exists or lies in the source; `<out>.partial` belongs to another run (the message says
        what differs); too little disk.
    """

    def __init__(
        self, out: Path, plan: Plan, model: Model, facts: Mapping[str, Any], max_shard_size: int = 5 * 10**9
    ):
        self.out, self.plan, self.model = out, plan, model
        self.partial = out.with_name(out.name + ".partial")
        self.units = units(plan, model, max_shard_size)
        self.source = model.checkpoint
        refuse(out)
        if plan.target == HERE:
            raise InputError(
                f"{out}: the plan is for this process alone (target {HERE}), and may hold what no server "
                f"loads; plan with one of {', '.join(TARGETS)} to write it"
            )
        if self.source is not None:
            _outside(out, self.source.folder)
        self.facts = json.loads(json.dumps(dict(facts) | {"max_shard_size": max_shard_size}))
        self.counts: dict[str, list[int]] = {}
        self.outcomes: list[Outcome] = []
        if self.partial.exists():
            found = _same(self.partial, self.facts, self.source)
            self.counts = found.get(COUNTS, {})
            self.outcomes = [Outcome(*o) for o in found.get(OUTCOMES, ())]
            self.facts |= found
        _room(out, plan.bytes_after, self.partial)
        self.partial.mkdir(parents=True, exist_ok=True)
        self._record(self.facts)
        save(self.partial, model)

    def _record(self, facts: Mapping[str, Any]) -> None:
        path = self.partial / RECORD
        if not path.exists() or checkpoint.read_json(path) != facts:
            checkpoint.write_text(path, json.dumps(facts, indent=2, sort_keys=True) + "\n")

    def remember(self, counts: Mapping[str, list[int]], outcomes: Sequence[Outcome] = ()) -> None:
        """Keep what the report will tell of some layers, for a run that goes on from here.

        Args:
          counts: how many tokens the experts saw; outcomes: of the steps.
        """
        self.counts = self.counts | dict(counts)
        again = {(o.step, o.weight) for o in outcomes}  # of a block that was interrupted while it was written
        self.outcomes = [o for o in self.outcomes if (o.step, o.weight) not in again] + list(outcomes)
        self.facts |= {COUNTS: self.counts} if self.counts else {}
        self.facts |= {OUTCOMES: [list(o) for o in self.outcomes]} if self.outcomes else {}
        self._update()

    @property
    def scratch(self) -> Path:
        """A folder for what a run must put down meanwhile."""
        folder = self.partial / SCRATCH
        folder.mkdir(exist_ok=True)
        return folder

    def read(self, unit: Unit) -> dict[str, Any]:
        """The leaves of a unit that was written before."""
        tensors: dict[str, Any] = {}
        for name, _ in unit.files:
            tensors |= dict(checkpoint.read_shard(self.partial / name))
            if (apart := self.scratch / (APART + name)).exists():
                tensors |= checkpoint.read_shard(apart)
        leaves: dict[str, Any] = {}
        for row in (r for _, rows in unit.files for r in rows):
            if row.scheme is None:
                kept = [np.asarray(tensors[n]) for n in row.names]
                leaves[row.name] = np.stack(kept) if experts.starred(row.name) else kept[0]
                continue
            module, count = row.name.removesuffix(".weight"), len(row.names)

            def one(name: str, scheme: Scheme = row.scheme) -> tuple[QTensor, np.float32 | None]:
                return self.plan.dialect.read(name, tensors.__getitem__, scheme, self.model.dtype)

            leaves[row.name] = experts.read(module, count, one)
            if row.scheme.inputs is not None and row.scheme.inputs.static:
                leaves[module + INPUT] = experts.maximum(module, count, one)
            if row.scheme.rank:
                pair = zip(beside.leaves(module), self.plan.dialect.branch(module), strict=True)
                leaves |= {leaf: tensors[n] for leaf, n in pair}
        if unit.prefix and self.plan.cache is not None:
            attention = f"{unit.prefix}self_attn"
            maxima = self.plan.dialect.read_cache(attention, tensors.__getitem__)
            leaves |= {f"{attention}.{kv}_cache{INPUT}": top for kv, top in zip("kv", maxima, strict=True)}
        return leaves

    def _update(self) -> None:
        """Write the facts without a change of the time when the run began."""
        times = (self.partial / RECORD).stat()
        self._record(self.facts)
        os.utime(self.partial / RECORD, ns=(times.st_atime_ns, times.st_mtime_ns))

    def discard(self) -> None:
        """Remove OUT.partial: the same command could not go on from it."""
        shutil.rmtree(self.partial)

    def done(self, unit: Unit) -> bool:
        """Whether a run has finished this unit: files are renamed into place when complete."""
        return all((self.partial / name).exists() for name, _ in unit.files)

    def write(self, unit: Unit, params: Mapping[str, Any]) -> None:
        """Write one unit: encoded leaves in the plan's dialect, the others as their bytes are."""
        for i, (name, rows) in enumerate(unit.files):
            tensors: dict[str, np.ndarray] = {}
            for row in rows:
                tensors |= self._tensors(row, params)
            if i == 0 and unit.prefix and self.plan.cache is not None:
                tensors |= self._cache(unit.prefix, params)
            adapter = getattr(self.plan.dialect, "ADAPTER", None)
            if apart := {n: t for n, t in tensors.items() if adapter and n.startswith(adapter.PREFIX)}:
                checkpoint.write_shard(self.scratch / (APART + name), apart)  # `done` looks at the other one
            checkpoint.write_shard(self.partial / name, {n: t for n, t in tensors.items() if n not in apart})

    def write_all(self) -> None:
        """Every unit of a model that is encoded already; nothing is left where one cannot be written."""
        try:
            for unit in self.units:
                self.write(unit, unit_params(self.model, unit))
        except InputError:
            self.discard()
            raise

    def _tensors(self, row: Row, params: Mapping[str, Any]) -> dict[str, np.ndarray]:
        leaf = params[row.name]
        if row.scheme is None:
            tensors = experts.entries(np.asarray(leaf), row.name)
            return dict(zip(row.names, tensors, strict=True))
        assert isinstance(leaf, QTensor)
        amax = params.get(row.name.removesuffix(".weight") + INPUT)
        amax = None if amax is None else np.float32(amax)
        tensors = {}
        for name, q in zip(row.names, experts.entries(leaf, row.name), strict=True):
            tensors |= self.plan.dialect.write(name.removesuffix(".weight"), q, row.scheme, amax)
        if row.scheme.rank:
            module = row.name.removesuffix(".weight")
            pair = zip(self.plan.dialect.branch(module), beside.leaves(module), strict=True)
            tensors |= {n: np.asarray(params[leaf]) for n, leaf in pair}
        return tensors

    def _cache(self, prefix: str, params: Mapping[str, Any]) -> dict[str, np.ndarray]:
        """Its scales; those of a cache without calibration too, so that no server has to guess."""
        assert self.plan.cache is not None
        attention = f"{prefix}self_attn"
        k, v = (np.float32(params.get(f"{attention}.{kv}_cache{INPUT}", LARGEST)) for kv in "kv")
        dtype = np.dtype(np.float32) if self.plan.cache.as_read else self.model.dtype
        return self.plan.dialect.write_cache(attention, k, v, dtype)

    def finish(self) -> None:
        """The config, the copied files, and the index last."""
        assert self.source is not None
        self._adapter()
        shutil.rmtree(self.partial / SCRATCH, ignore_errors=True)
        for path in checkpoint.side_files(self.source.folder):
            if path.parent == self.source.folder and path.name in OUTPUTS:
                continue  # of the conversion that this is made from
            target = self.partial / path.relative_to(self.source.folder)
            target.parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(path, target)
        files = self.plan.dialect.config(self.plan.modules, ignored(self.plan), self.plan.cache)
        config = dict(self.model.config) | {"quantization_config": files["quantization_config"]}
        checkpoint.write_text(self.partial / "config.json", json.dumps(config, indent=2) + "\n")
        for name, content in files.items():
            if name.endswith(".json"):
                checkpoint.write_text(self.partial / name, json.dumps(content, indent=4) + "\n")
        weight_map, total = {}, 0
        for unit in self.units:
            for name, _ in unit.files:
                for tensor, entry in checkpoint.read_entries(self.partial / name).items():
                    weight_map[tensor] = name
                    total += entry.stop - entry.start
        checkpoint.write_index(self.partial, weight_map, total)
        self.facts["sha256"] = digests(self.partial)
        self._update()

    def _adapter(self) -> None:
        """The branches of all units as one LoRA adapter, in a dialect that keeps them so; once."""
        modules = {m: s.rank for m, s in self.plan.modules.items() if s.rank}
        if not modules or (adapter := getattr(self.plan.dialect, "ADAPTER", None)) is None:
            return
        folder = self.partial / adapter.FOLDER
        if (folder / adapter.CONFIG).exists():  # its last file: of a run that was interrupted later
            return
        tensors: dict[str, np.ndarray] = {}
        for piece in sorted(self.scratch.glob(APART + "*")):
            tensors |= checkpoint.read_shard(piece)
        others = [n for r in self.plan.rows if r.role == "linear" for n in r.names]
        others = [m for m in (n.removesuffix(".weight") for n in others) if m not in modules]
        folder.mkdir(exist_ok=True)
        said = json.dumps(adapter.settings(modules, others), indent=2) + "\n"
        checkpoint.write_shard(folder / adapter.TENSORS, tensors)
        checkpoint.write_text(folder / adapter.CONFIG, said)

    def rename(self, suffix: str = "") -> Path:
        """The last act: OUT.partial becomes OUT, or OUT.rejected."""
        target = self.out.with_name(self.out.name + suffix)
        refuse(target)
        os.rename(self.partial, target)
        return target


def ignored(plan: Plan) -> list[str]:
    """What the config must name as not encoded, in full names.

    Every such Linear module, and the head always: a tied one is a Linear to servers, whether it has a tensor
    or not. The embeddings too, in a dialect that lists them.
    """
    kept = [r for r in plan.rows if r.scheme is None and r.name.endswith(".weight")]
    names = [n.removesuffix(".weight") for r in kept if r.role in ("linear", "head") for n in r.names]
    if "lm_head" not in plan.schemes:
        names.append("lm_head")
    embeddings = [r.name.removesuffix(".weight") for r in kept if r.role == "embedding"]
    return [
        n for n in dict.fromkeys(names) if n not in embeddings
    ] + embeddings * plan.dialect.LISTS_EMBEDDINGS


def refuse(out: Path) -> None:
    """An existing output is never touched."""
    if os.path.lexists(out):
        raise InputError(f"{out}: exists already; choose another --out, or remove it first")


def digests(folder: Path) -> dict[str, str]:
    """SHA-256 of an output's files, by name; not of those written after it or made to be edited."""
    found = {}
    for path in sorted(p for p in folder.rglob("*") if p.is_file()):
        name = path.relative_to(folder).as_posix()
        if name not in OURS and not name.endswith(".tmp"):
            with open(path, "rb") as file:
                found[name] = hashlib.file_digest(file, "sha256").hexdigest()
    return found


def _outside(out: Path, source: Path) -> None:
    if out.resolve().is_relative_to(source.resolve()):
        raise InputError(
            f"{out}: lies in the source {source}, which is never written to; choose another --out"
        )


def _same(partial: Path, wanted: Mapping[str, Any], source: checkpoint.Checkpoint | None) -> dict[str, Any]:
    """Raises InputError where an earlier run differs; else what it remembered."""
    record = partial / RECORD
    if not record.exists():
        raise InputError(f"{partial}: exists, but was not begun by mojax; choose another --out, or remove it")
    found = checkpoint.read_json(record)
    found.pop("sha256", None)
    remembered = {key: found.pop(key) for key in (COUNTS, OUTCOMES) if key in found}
    differing = [k for k in sorted({*found, *wanted}) if found.get(k) != wanted.get(k)]
    if source is not None and not differing:
        begun = record.stat().st_mtime_ns
        changed = {e.file for e in source.entries.values() if e.file.stat().st_ctime_ns > begun}
        differing = [f"{file.name} (changed since)" for file in sorted(changed)]
    if differing:
        raise InputError(
            f"{partial}: was begun with another {', '.join(differing)}; run the same command as "
            "then to go on, "
            "choose another --out, or remove it to begin again"
        )
    return remembered


def _room(out: Path, needed: int, partial: Path) -> None:
    folder = next(p for p in (out.absolute(), *out.absolute().parents) if p.exists())
    free = shutil.disk_usage(folder).free + sum(p.stat().st_size for p in partial.glob("*.safetensors"))
    if free < needed * 1.05:
        raise InputError(
            f"{out}: needs {math.ceil(needed * 1.05 / 1e6)} MB of disk, {free // 10**6} MB are free; "
            "free some, or choose an --out on another disk"
        )


def export(model: Model, out: str | Path, *, plan: Plan, max_shard_size: int = 5 * 10**9) -> Path:
    """Write a model whose weights are encoded (from `apply`) as a checkpoint folder.

    Args:
      out: a new folder.
      plan: the plan that the model was made with.
    Returns:
      the folder, after it was read back and verified.
    Raises:
      InputError: `out` exists, or too little disk.
      VerifyError: what was written is not what was meant; `<out>.partial` is left for a look.
    """
    from mojax import pipeline, verify

    facts = pipeline.fingerprint(model.checkpoint, plan, None)
    writer = Writer(Path(out), plan, model, facts, max_shard_size)
    writer.write_all()
    writer.finish()
    verify.verify(writer.partial, reference=model.checkpoint.folder if model.checkpoint else None, plan=plan)
    return writer.rename()


def unit_params(model: Model, unit: Unit) -> dict[str, Any]:
    """The leaves of one unit, statistics of inputs included."""
    names = [r.name for _, rows in unit.files for r in rows]
    if unit.prefix:
        names = [n for n in model.params if n.startswith(unit.prefix)]
    else:  # of a model whose blocks are not known
        low = (n for name in names for n in beside.leaves(name.removesuffix(".weight")))
        names = [*names, *(n for n in low if n in model.params)]
    return {n: model.params[n] for n in names}
