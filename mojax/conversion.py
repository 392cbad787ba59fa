"""From one checkpoint dialect to another without quantizing again: the codes stay as they are."""

from __future__ import annotations

import shutil
from pathlib import Path
from types import ModuleType
from typing import NamedTuple

import numpy as np

from mojax import find, pipeline, verify
from mojax.converters import base as dialects
from mojax.errors import InputError, PlanError
from mojax.model import INPUT, Model, linears, load
from mojax.planner import TARGETS, Plan, Row
from mojax.recipe import Calibration, Recipe
from mojax.transforms.base import chain
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
    """
    model = load(source)
    files = model.checkpoint
    assert files is not None
    target = find.find("converters", format)
    if not model.schemes:
        raise InputError(f"{source}: is not quantized, there is nothing to convert; use mojax quantize")
    if not target.WRITES:
        raise InputError(
            f"--format={format}: this dialect is read, not written; write compressed-tensors or modelopt"
        )
    if dialects.section(model.config).get("quant_method") in target.METHODS:
        raise InputError(f"{source}: is in {target.DIALECT} already")
    plan = as_plan(model, target)
    method = dialects.section(model.config).get("quant_method", "modelopt")
    facts = {"converted_from": method} | pipeline.fingerprint(files, plan, None)
    writer = Writer(Path(out), plan, model, facts, max_shard_size)
    writer.write_all()
    writer.finish()
    if (files.folder / "README.md").exists():
        shutil.copyfile(files.folder / "README.md", writer.partial / "README.md")
    verify.verify(writer.partial, plan=plan)
    return Converted(writer.rename(), plan.target)


def as_plan(model: Model, target: ModuleType) -> Plan:
    """The plan that keeps every code of an encoded model and writes it in another dialect.

    Raises:
      PlanError: what the dialect cannot say, or no server would load.
    """
    problems, rows = [], []
    servers = list(TARGETS)
    for name in model.params:
        if name.endswith(INPUT):
            continue
        scheme = model.schemes.get(name.removesuffix(".weight")) if name.endswith(".weight") else None
        leaf = model.params[name]
        size = sum(a.nbytes for a in ([leaf.codes, *leaf.scales.values()] if scheme else [leaf]))
        if scheme is not None:
            refusals = {server: target.check(scheme, server) for server in TARGETS}
            servers = [server for server in servers if refusals[server] is None]
            if all(refusals.values()):
                problems.append(refusals[TARGETS[0]])
        block = next((b.prefix for b in model.blocks if name.startswith(b.prefix)), "")
        role = role_of(model, name, scheme is not None)
        rows.append(
            Row(name, role, tuple(leaf.shape), np.dtype(leaf.dtype), block, scheme, "", size, size, "kept")
        )
    if problems or not servers:
        raise PlanError(
            list(dict.fromkeys(problems)) or ["no server loads all the formats of this checkpoint together"]
        )
    count = sum(int(np.prod(r.shape)) for r in rows)
    recipe = Recipe("converted", "the codes of the source", (), (), Calibration(), {})
    return Plan(tuple(rows), recipe, target, servers[0], chain(), {}, model.cache, count)


def role_of(model: Model, name: str, encoded: bool) -> str:
    """linear, or head, for what belongs in an ignore list; else other."""
    if encoded or name.removesuffix(".weight") in linears(model, model.params):
        return "head" if name == "lm_head.weight" else "linear"
    return "embedding" if "embed" in name else "other"
