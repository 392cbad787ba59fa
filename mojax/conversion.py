"""From one checkpoint dialect to another without quantizing again: the codes stay as they are."""

from __future__ import annotations

from pathlib import Path
from types import ModuleType
from typing import Any, NamedTuple

import numpy as np

from mojax import beside, experts, find, pipeline, verify
from mojax.converters import base as dialects
from mojax.errors import InputError, PlanError
from mojax.formats.base import QTensor
from mojax.model import Model, linears, load
from mojax.planner import TARGETS
from mojax.plans import Plan, Row
from mojax.program import INPUT
from mojax.recipe import Calibration, Recipe
from mojax.writer import Writer


class Converted(NamedTuple):
    """The new folder, and the first of `mojax.planner.TARGETS` that loads it."""

    folder: Path
    target: str


def convert(
    source: str | Path, format: str, out: str | Path, *, max_shard_size: int = 5 * 10**9
) -> Converted:
    """Rewrite a quantized checkpoint in another dialect.

    Codes and block scales stay the same bytes; a reciprocal outer scale is right within one unit.

    Raises:
      InputError: the source is not quantized, or in that dialect already; `out` exists; a scale does not
        fit.
      PlanError: what the dialect cannot say.
      VerifyError: what was written reads back as something else; `<out>.partial` is left for a look.
    """
    model = load(source)
    files = model.checkpoint
    assert files is not None
    target = find.find("converters", format)
    if not model.schemes and model.cache is None:
        raise InputError(f"{source}: is not quantized, there is nothing to convert; use mojax quantize")
    if not target.WRITES:
        raise InputError(
            f"--format={format}: this dialect is read, not written; write compressed-tensors or modelopt"
        )
    if dialects.section(model.config).get("quant_method") in target.METHODS:
        raise InputError(f"{source}: is in {target.DIALECT} already")
    if changed := verify.changed_files(files.folder):
        raise InputError(f"{source}: {'; '.join(changed)}; quantize it again, or fetch an intact copy")
    plan = as_plan(model, target)
    method = dialects.section(model.config).get("quant_method", "modelopt")
    facts = {"converted_from": method} | pipeline.fingerprint(files, plan, None)
    writer = Writer(Path(out), plan, model, facts, max_shard_size)
    writer.write_all()
    writer.finish()
    card = files.folder / "README.md"
    note = f"\nConverted by mojax from {method} to {target.DIALECT}; the codes are the same.\n"
    (writer.partial / "README.md").write_bytes((card.read_bytes() if card.exists() else b"") + note.encode())
    verify.verify(writer.partial, plan=plan)
    if found := differences(model, load(writer.partial)):
        raise verify.VerifyError(found)
    return Converted(writer.rename(), plan.target)


def as_plan(model: Model, target: ModuleType) -> Plan:
    """The plan that keeps every code of an encoded model and writes it in another dialect.

    Raises:
      PlanError: what the dialect cannot say, or no server would load.
    """
    problems, rows = [], []
    servers = list(TARGETS)
    encodable = set(linears(model, model.params))
    for name in model.params:
        if name.endswith((INPUT, *beside.LEAVES)):
            continue
        scheme = model.schemes.get(name.removesuffix(".weight")) if name.endswith(".weight") else None
        leaf = model.params[name]
        size = sum(a.nbytes for a in ([leaf.codes, *leaf.scales.values()] if scheme else [leaf]))
        if scheme is not None and scheme.rank:
            size += sum(model.params[n].nbytes for n in beside.leaves(name.removesuffix(".weight")))
        if scheme is not None:
            refusals = {
                server: target.check(scheme, server, None, experts.starred(name)) for server in TARGETS
            }
            servers = [server for server in servers if refusals[server] is None]
            if all(refusals.values()):
                problems.append(refusals[TARGETS[0]])
        role = role_of(name, scheme is not None or name.removesuffix(".weight") in encodable)
        facts = name, role, tuple(leaf.shape), np.dtype(leaf.dtype), model.prefix(name)
        rows.append(Row(*facts, scheme, "", size, size, "kept"))
    if model.cache is not None:
        said = {server: target.check_cache(model.cache, server, bool(model.schemes)) for server in TARGETS}
        servers = [server for server in servers if said[server] is None]
        if all(said.values()):
            problems.append(said[TARGETS[0]])
    try:
        target.config(experts.spread(model.schemes, model.shapes), (), model.cache)
    except PlanError as error:
        problems += error.problems
    except InputError as error:
        problems.append(str(error))
    if problems or not servers:
        raise PlanError(
            list(dict.fromkeys(problems)) or ["no server loads all the formats of this checkpoint together"]
        )
    count = sum(int(np.prod(r.shape)) for r in rows)
    recipe = Recipe("converted", "the codes of the source", (), (), Calibration(), {})
    return Plan(tuple(rows), recipe, target, servers[0], (), {}, model.cache, count)


def role_of(name: str, encodable: bool) -> str:
    """linear, or head, for what belongs in an ignore list; else other."""
    if encodable:
        return "head" if name == "lm_head.weight" else "linear"
    return "embedding" if "embed" in name else "other"


def differences(source: Model, out: Model) -> list[str]:
    """What a conversion must not change, and did: one message per tensor."""
    found = []
    for name in source.params:
        if name not in out.params:
            found.append(f"{name}: is in the source, but was not written")
            continue
        a, b = source.params[name], out.params[name]
        if isinstance(a, QTensor):
            wrong = _all_levels(a, b)
            same, what = not wrong, f"{', '.join(wrong)} of the encoded weight"
        elif name.endswith(INPUT):
            same, what = _near(a, b), "calibrated maximum"
        else:
            same, what = verify.same_bytes(a, b), "bytes"
        if not same:
            found.append(f"{name}: {what} read back as something else than the source's")
    return found


def _all_levels(a: QTensor, b: Any) -> list[str]:
    """`_levels`, of experts over all of them."""
    if not isinstance(b, QTensor) or a.shape != b.shape or a.batch != b.batch:
        return ["kind"]
    found = [_levels(x, y) for x, y in zip(experts.rows(a), experts.rows(b), strict=True)]
    return list(dict.fromkeys(level for wrong in found for level in wrong))


def _levels(a: QTensor, b: Any) -> list[str]:
    """Which parts of two encodings differ; scales may rest in another dtype, an outer one as a reciprocal."""
    if not isinstance(b, QTensor) or a.scales.keys() != b.scales.keys():
        return ["kind"]
    wrong = [] if verify.same_bytes(np.asarray(a.codes), np.asarray(b.codes)) else ["codes"]
    for level in a.scales:
        x, y = (np.asarray(q.scales[level]) for q in (a, b))
        if level == "outer":
            if a.format.name == "nvfp4":  # as divisors: a zero multiplier has no other reciprocal
                x, y = (dialects.outer_as(v, q.format.arithmetic, "checkpoint") for v, q in ((x, a), (y, b)))
            same = _near(x, y)
        else:
            same = np.array_equal(x.astype(np.float32), y.astype(np.float32))
        wrong += [] if same else [f"{level} scale"]
    return wrong


def _near(a: Any, b: Any) -> bool:
    """Whether two float32 numbers are the same, or neighbours."""
    a, b = (np.asarray(v, np.float32).reshape(()) for v in (a, b))
    return bool(np.abs(a - b) <= np.spacing(np.maximum(np.abs(a), np.abs(b))))
