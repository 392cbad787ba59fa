"""What linears that a server fuses into one matrix must have in common: format, shapes, outer scale."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import TYPE_CHECKING

from mojax import experts
from mojax.formats.base import Format
from mojax.model import Model
from mojax.recipe import Recipe, choose

if TYPE_CHECKING:
    from mojax.plans import Row

FUSING = ("vllm", "sglang", "trtllm")  # servers that load q/k/v and gate/up as one matrix
ALIGNED = ("vllm", "sglang")  # of those, the ones that cut a fused matrix at whole blocks
BLOCK = 128  # rows of a block of fp8 per block


def share(
    rows: Sequence[Row], model: Model, recipe: Recipe, target: str, problem: Callable[[str], None]
) -> dict[str, str]:
    """By weight, an id for those that share one outer scale (the name of the first); others are absent.

    Args:
      problem: called with each reason why `target` cannot fuse what it fuses.
    """
    if model.family is None:
        return _siblings(rows)
    shared: dict[str, str] = {}
    if target in FUSING:
        for layer in _layers(rows):
            if len({r.scheme for r in layer}) > 1:
                problem(f"{target} runs all experts of a layer alike, give these one format: {_said(layer)}")
    for members in _fused(rows, model):
        if target in FUSING and len({r.scheme for r in members}) > 1:
            if not experts.starred(members[0].name):
                problem(f"{target} fuses these into one matrix, give them one format: {_said(members)}")
            continue
        if target in ALIGNED:
            _aligned(members, target, problem)
        by_format: dict[Format, list[Row]] = {}
        for r in members:
            if r.scheme is not None:
                by_format.setdefault(r.scheme.weights, []).append(r)
        for format, group in by_format.items():
            asked = {r.name: bool(choose(recipe, r.name).share_scale) for r in group}
            if not format.fused and format.static and len(set(asked.values())) > 1:
                said = ", ".join(f"{name} {str(value).lower()}" for name, value in asked.items())
                problem(f"share_scale: give these, which servers fuse, one answer: {said}")
            elif len(group) > 1 and (format.fused or (format.static and any(asked.values()))):
                shared |= dict.fromkeys(asked, group[0].name)
    return shared


def _said(rows: Sequence[Row]) -> str:
    return ", ".join(f"{r.name} {r.scheme.label if r.scheme else 'kept'}" for r in rows)


def _layers(rows: Sequence[Row]) -> list[list[Row]]:
    """The weights of experts, by layer."""
    layers: dict[str, list[Row]] = {}
    for r in rows:
        if experts.starred(r.name) and r.role == "linear":
            layers.setdefault(r.name.split("*")[0], []).append(r)
    return list(layers.values())


def _fused(rows: Sequence[Row], model: Model) -> Iterator[list[Row]]:
    by_name = {r.name: r for r in rows}
    for block in model.blocks:
        for modules in getattr(model.family, "FUSED", ()):
            names = [f"{block.prefix}{module}.weight" for module in modules]
            yield [by_name[n] for n in names if n in by_name]


def _aligned(members: Sequence[Row], target: str, problem: Callable[[str], None]) -> None:
    """Blocks of fp8 must not cross from one member into the next."""
    for r in members[:-1]:
        if r.scheme and getattr(r.scheme.weights, "per", None) == "block" and r.matrix[0] % BLOCK:
            keep = " ".join(f"--keep={m.name}" for m in members)
            problem(
                f"{r.name}: has {r.matrix[0]} rows, which blocks of {BLOCK} rows do not divide, and {target} "
                f"fuses it with what follows; use another format (--recipe=fp8_dynamic), or add {keep}"
            )


def _siblings(rows: Sequence[Row]) -> dict[str, str]:
    """Without a trace: siblings with one format and input width share, a superset of what servers fuse."""
    groups: dict[tuple[str, int, Format], list[str]] = {}
    for r in rows:
        if r.scheme is not None and r.scheme.weights.fused:
            key = (r.name.rsplit(".", 2)[0], r.shape[-1], r.scheme.weights)
            groups.setdefault(key, []).append(r.name)
    return {name: group[0] for group in groups.values() if len(group) > 1 for name in group}
