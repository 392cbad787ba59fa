"""Reading a checkpoint back and checking everything that a server relies on."""

from __future__ import annotations

import filecmp
import hashlib
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import NamedTuple

import jax
import numpy as np

from mojax import beside, checkpoint, experts, model, rewrite
from mojax.converters import base as dialects
from mojax.distance import exact_blocks, folded, recorded, weight_errors
from mojax.errors import InputError
from mojax.formats.base import Format, QTensor
from mojax.model import Model
from mojax.planner import OUTPUTS
from mojax.plans import Plan
from mojax.resolve import made_steps
from mojax.sources import as_source

PIECE = 2**24  # bytes compared at a time
NEAR = 2.0**-7  # relative: another machine adds in another order, and rounds a few entries otherwise
ELSEWHERE = (
    "its norm gains are 1 and the source's are not: they were folded into the weights, as rotations need, "
    "and no mojax.json says which rotation; weights were not compared with the source's"
)
LARGEST_ERROR = 0.5  # relative: a wrong nibble order or scale gives 1 or more, the coarsest format 0.2
FED_BACK = 1.25  # where errors went to directions that hardly matter; unrelated numbers give 1.4


class VerifyError(Exception):
    """What was read back is not what a server needs; one message per difference."""

    def __init__(self, differences: list[str]):
        self.differences = tuple(differences)
        super().__init__("\n".join(differences))


class Verified(NamedTuple):
    """What verification found.

    Attributes:
      tensors: how many tensors were read.
      errors: by weight, the relative error |W - decoded| / |W| (Frobenius), if there was a reference.
      notes: what is right but worth knowing.
    """

    tensors: int
    errors: dict[str, float]
    notes: tuple[str, ...]


def verify(folder: str | Path, reference: str | Path | None = None, *, plan: Plan | None = None) -> Verified:
    """Check a quantized checkpoint from its bytes alone.

    Args:
      folder: the checkpoint.
      reference: its source; then kept tensors and side files must be the same bytes, and decoded
        weights near.
      plan: what was meant; then the formats and the set of tensors must be the plan's.
    Raises:
      InputError: not a readable or not a quantized checkpoint.
      VerifyError: every difference found.
    """
    out = model.load(folder, generic=True)
    if not out.schemes and out.cache is None:
        raise InputError(f"{folder}: is not quantized (config.json has no quantization_config)")
    source = as_source(model.load(reference, generic=True)) if reference is not None else None
    turned = rewrite.as_recorded(out, source) if source is not None else None
    check = _Check(out, turned, plan)
    if plan is None:  # else it was written a moment ago
        assert out.checkpoint is not None
        check.differences += changed_files(out.checkpoint.folder)
    check.layout()
    check.branches()
    check.ignored()
    if not check.broken:
        check.fused()
    errors: dict[str, float] = {}
    if source is not None and turned is not None:
        check.decoded()
        check.files()
        if rewrite.turned_elsewhere(out, source):
            check.notes.append(ELSEWHERE)
        else:
            check.kept(rewrite.remade(source, turned))
            errors = {} if check.broken else check.errors()
    if check.differences:
        raise VerifyError(check.differences)
    assert out.checkpoint is not None
    return Verified(len(out.checkpoint), errors, tuple(check.notes))


def changed_files(folder: Path) -> list[str]:
    """The files that mojax.json records with a SHA-256 and that are missing, or not what they were."""
    path = folder / "mojax.json"
    recorded = checkpoint.read_json(path).get("sha256", {}) if path.exists() else {}
    found = []
    for name, digest in recorded.items():
        if not (folder / name).is_file():
            found.append(f"{name}: is missing, mojax.json lists it")
            continue
        with open(folder / name, "rb") as file:
            if hashlib.file_digest(file, "sha256").hexdigest() != digest:
                found.append(f"{name}: was changed after it was written (SHA-256 in mojax.json)")
    return found


class _Check:
    """One verification; differences and notes collect here."""

    def __init__(self, out: Model, source: Model | None, plan: Plan | None):
        assert out.checkpoint is not None
        self.out, self.source, self.plan, self.files_out = out, source, plan, out.checkpoint
        dialect = dialects.dialect(out.config, model.file_names(out.checkpoint))
        assert dialect is not None  # it has schemes
        self.dialect = dialect
        self.differences: list[str] = []
        self.notes: list[str] = []
        self.encoded = frozenset(experts.spread(out.schemes, out.shapes))  # by the names in the files
        self.broken = False  # a tensor is missing or misshapen: its weight cannot be decoded
        if plan is not None and set(plan.schemes) != set(out.schemes):
            odd = sorted(set(plan.schemes) ^ set(out.schemes))
            self.differences.append(
                f"config.json and the plan disagree on what is encoded: {', '.join(odd[:10])}"
            )
        said, meant = (
            c and (c.kinds, c.per) for c in (out.cache, plan.cache if plan is not None else out.cache)
        )
        if said != meant:
            self.differences.append(f"config.json says a key/value cache of {said}, the plan {meant}")
        for module, scheme in (plan.schemes if plan is not None else {}).items():
            found = out.schemes.get(module, scheme)
            if dialects.plain_scheme(found) != dialects.plain_scheme(scheme):
                said, meant = dialects.label(found), dialects.label(scheme)
                self.differences.append(f"{module}: config.json says {said}, the plan {meant}")

    def layout(self) -> None:
        """Every tensor of an encoded module is there, as its dialect has it; scales are sane."""
        for module, scheme in self.out.schemes.items():
            try:
                q = self.out.params[module + ".weight"]
                want = self._layout(module)
                low = {n: self.out.params[n] for n in beside.leaves(module) if scheme.rank}
            except (InputError, KeyError) as error:
                self.differences.append(f"{module}: cannot be read back: {error}")
                self.broken = True
                continue
            for name, spec in want.items():
                if name not in self.files_out:
                    if not name.endswith(model.MATRIX):  # `read` says which of these must be there
                        self.differences.append(f"{name}: missing; {scheme.weights.label} needs it")
                    continue
                if name.endswith(dialects.varies(self.dialect)):
                    continue
                dtype, shape = self.files_out.spec(name)
                if tuple(shape) != tuple(spec.shape):
                    self.differences.append(
                        f"{name}: shape is {list(shape)}, {scheme.weights.label} needs {list(spec.shape)}"
                    )
                elif np.dtype(dtype).itemsize != np.dtype(spec.dtype).itemsize and not name.endswith("scale"):
                    self.differences.append(
                        f"{name}: dtype is {np.dtype(dtype).name}, needs {np.dtype(spec.dtype).name}"
                    )
            self._scales(module, q)
            for leaf in low:
                if not np.isfinite(np.asarray(low[leaf]).astype(np.float32)).all():
                    self.differences.append(f"{leaf}: the branch holds NaN or infinity")
        for block in self.out.blocks if self.out.cache is not None else ():
            for name in self.dialect.cache_names(f"{block.prefix}self_attn"):
                if name not in self.files_out:
                    self.differences.append(
                        f"{name}: missing; config.json says that the key/value cache is quantized"
                    )

    def _layout(self, module: str) -> Mapping[str, jax.ShapeDtypeStruct]:
        if not self.dialect.WRITES:
            return {}
        shape = self.out.params[module + ".weight"].shape
        names = experts.expand(module, shape[0])
        parts = [
            self.dialect.layout(name, shape[-2:], self.out.dtype, self.out.schemes[module]) for name in names
        ]
        return {name: spec for part in parts for name, spec in part.items()}

    def _scales(self, module: str, q: QTensor) -> None:
        signed = getattr(q.format, "symmetric", False)  # integers may stand under a negative scale
        for level, scale in q.scales.items():
            if scale.dtype == np.uint8 or level == "zero":  # an exponent or a zero point: every value counts
                continue
            values = np.asarray(scale).astype(np.float32)
            if not np.all(np.isfinite(values)) or (np.any(values < 0) and not signed):
                self.differences.append(
                    f"{module}: the {level} scale holds NaN, infinity or a negative value"
                )

    def branches(self) -> None:
        """Every tensor of an adapter is beside a weight; and a server must be told of the adapter."""
        adapter = getattr(self.dialect, "ADAPTER", None)
        found = {n for n in self.files_out if adapter and n.startswith(adapter.PREFIX)}
        for name in sorted(found - model.branches(self.dialect, self.out.schemes)):
            self.differences.append(f"{name}: is in the adapter, and no encoded weight is beside it")
        if adapter and found:
            self.notes.append(adapter.NOTE)

    def ignored(self) -> None:
        """Every linear is encoded or in the ignore list; a tied head has no tensor but must be there too."""
        known = self.out.family is not None
        linears = model.linears(self.out, self.files_out) if known else []
        linears = list(experts.spread(dict.fromkeys(linears), self.out.shapes))
        tied = self.out.config.get("tie_word_embeddings", True) or "lm_head.weight" in self.files_out
        if "lm_head" not in linears and (known or tied):
            linears = [*linears, "lm_head"]
        parsed = self.dialect.parse(dict(self.out.config), model.extra(self.files_out.folder), linears)
        for module in linears:
            has = module + ".weight" in self.files_out and not _narrow(self.files_out, module + ".weight")
            if module in parsed.schemes and (
                has
                or (
                    module == "lm_head"
                    and "lm_head.weight" not in self.files_out
                    and "lm_head.weight_packed" not in self.files_out
                )
            ):
                self.differences.append(
                    f"{module}: is in full precision, but the config's ignore list lacks it; "
                    "servers would read it as encoded"
                )

    def fused(self) -> None:
        """NVFP4's outer scale is one value in a fused group; other per-tensor scales may differ, but lose.

        Only weights of one format: servers do not fuse others.
        """
        apart = []
        for format, names in _fused(self.out):
            scales = {n: self.out.params[n].scales for n in names}
            outer = {n: np.float32(s["outer"]).reshape(-1) for n, s in scales.items() if "outer" in s}
            every = np.stack(list(outer.values())) if outer else np.zeros((1, 1), np.float32)
            differ = np.flatnonzero((every != every[:1]).any(axis=0))
            if not differ.size:
                continue
            i = int(differ[0])
            said = ", ".join(f"{n.replace('*', str(i))} {v[i]:.6g}" for n, v in outer.items())
            said += f" (and {len(differ) - 1} more experts)" if len(differ) > 1 else ""
            if format.fused:
                self.differences.append(
                    f"a server fuses these and reads one outer scale for all, they differ: {said}"
                )
            else:
                apart.append(said)
        if apart:
            self.notes.append(
                f"per-tensor scales differ in {len(apart)} fused groups, such as {apart[0]}; vLLM "
                "requantizes to the largest, which costs accuracy: share_scale: true avoids it"
            )

    def decoded(self) -> None:
        """A source that is quantized itself is worth a note."""
        assert self.source is not None
        if isinstance(files := self.source.checkpoint, checkpoint.Decoded):
            self.notes.append(
                f"the source is quantized itself: {files.said}; it was decoded to {self.source.dtype.name}, "
                "and KL and errors are to the decoded weights with inputs as they are"
            )

    def kept(self, remade: frozenset[str]) -> None:
        """What was not encoded is there, byte for byte, unless the plan rewrote it.

        Args:
          remade: tensors of the source that were turned, which must be near.
        """
        assert self.source is not None and self.source.checkpoint is not None
        files = self.source.checkpoint
        moved = (f for found in folded(self.out, self.source).values() for f in found)
        rewritten = {name for f in moved for name in (f.producer, *f.also)}
        if (plan := self.plan) is not None and self.out.family is not None:
            rewritten |= {n for b in self.out.blocks for n in plan.migration.rewrites(plan.context(b))}
        known = set(files)
        for name in files:
            if name.removesuffix(".weight") in self.encoded and name.endswith(".weight"):
                known.discard(name)
                continue
            if name not in self.files_out:
                self.differences.append(f"{name}: is in the source, but was not written")
                self.broken = True
            elif name in remade and name not in rewritten and near(files[name], self.files_out[name]):
                continue
            elif name not in rewritten and not same_bytes(files[name], self.files_out[name]):
                self.differences.append(f"{name}: was to be kept, but its bytes differ from the source's")
        endings = (*self.dialect.SUFFIXES, ".weight")
        branches = model.branches(self.dialect, self.out.schemes)
        for name in self.files_out:
            module = next((name.removesuffix(e) for e in endings if name.endswith(e)), name)
            if (
                name not in known
                and module not in self.encoded
                and not name.endswith((".k_scale", ".v_scale"))
                and not model.turns(name, self.encoded)
                and name not in branches
            ):
                self.differences.append(f"{name}: is neither in the source nor part of an encoded tensor")

    def files(self) -> None:
        """Every other file of the source is there, byte for byte."""
        assert self.source is not None and self.source.checkpoint is not None
        folder = self.source.checkpoint.folder
        old = OUTPUTS if isinstance(self.source.checkpoint, checkpoint.Decoded) else ()
        for path in checkpoint.side_files(folder):
            if path.parent == folder and path.name in old:
                continue  # the output has its own
            copy = self.files_out.folder / path.relative_to(folder)
            if not copy.exists() or not filecmp.cmp(path, copy, shallow=False):
                self.differences.append(
                    f"{path.relative_to(folder)}: differs from the source's, or is missing"
                )

    def errors(self) -> dict[str, float]:
        """Relative error of every encoded weight against the source."""
        assert self.source is not None
        found = weight_errors(self.out, self.source)
        recipe = self.plan.recipe if self.plan is not None else recorded(self.out)
        if recipe is not None and "cast" in {name for name, _ in recipe.steps}:
            exact, total = exact_blocks(self.out, self.source)
            self.notes.append(f"cast: {exact} of {total} blocks decode to exactly the numbers of the source")
        steps = made_steps(recipe) if recipe is not None else ()
        feeds = any("gram" in step.needs or step.tune for step in steps)
        limit = FED_BACK if feeds else LARGEST_ERROR
        for name, error in found.items():
            if not error < limit:
                self.differences.append(
                    f"{name}: decodes to something else than the source (relative error {error:.3g}, "
                    f"at most {limit} is plausible)"
                )
        return found


def _fused(m: Model) -> Iterator[tuple[Format, list[str]]]:
    """The encoded weights that a server fuses, by format."""
    for block in m.blocks:
        for fused in getattr(m.family, "FUSED", ()):
            groups: dict[Format, list[str]] = {}
            for module in (block.prefix + local for local in fused):
                if module in m.schemes:
                    groups.setdefault(m.schemes[module].weights, []).append(module + ".weight")
            yield from groups.items()


def _narrow(files: checkpoint.Checkpoint, name: str) -> bool:
    return np.dtype(files.spec(name).dtype).itemsize < 2


def near(a: np.ndarray, b: np.ndarray) -> bool:
    """Whether two tensors differ by roundings: |a - b| / |a| (Frobenius) is at most `NEAR`."""
    if a.shape != b.shape or a.dtype != b.dtype:
        return False
    if same_bytes(a, b):
        return True
    x, y = (np.asarray(v, np.float32) for v in (a, b))
    return bool(np.linalg.norm(x - y) <= NEAR * np.linalg.norm(x))


def same_bytes(a: np.ndarray, b: np.ndarray) -> bool:
    """Whether two arrays hold the same bytes; compared in pieces, without a copy of either."""
    if a.nbytes != b.nbytes:
        return False
    x, y = (np.ascontiguousarray(v).reshape(-1).view(np.uint8) for v in (a, b))
    return all(np.array_equal(x[i : i + PIECE], y[i : i + PIECE]) for i in range(0, x.size, PIECE))
