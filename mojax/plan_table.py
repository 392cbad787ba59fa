"""The plan as text and as plain data."""

from __future__ import annotations

from typing import Any

from mojax import memory
from mojax.plans import Plan, Row


def table(plan: Plan, *, every: bool = False) -> str:
    """The plan as text: equal rows of different blocks in one line, unless `every`."""
    lines: dict[tuple[str, ...], list[int]] = {}
    for r in plan.rows:
        name = r.name if every or not r.block else _star(r)
        how = (
            r.scheme.label
            if r.scheme
            else f"kept: {r.reason}"
            if r.role != "norm" or r.reason != "norm"
            else "kept"
        )
        shape = "x".join(map(str, r.shape))
        shared = r.shared.split(".", 3)[-1] if r.shared and r.shared != r.name else ""
        totals = lines.setdefault((name, r.role, shape, r.dtype.name, how, shared), [0, 0, 0])
        for i, value in enumerate((len(r.names), r.before, r.after)):
            totals[i] += value
    head = (
        "tensor",
        "role",
        "shape",
        "dtype",
        "becomes",
        "shares its scale with",
        "count",
        "before",
        "after",
    )
    body = [(*key, str(n), _size(b), _size(a)) for key, (n, b, a) in lines.items()]
    widths = [max(len(row[i]) for row in [head, *body]) for i in range(len(head))]
    return "\n".join(
        "  ".join(cell.ljust(w) for cell, w in zip(row, widths, strict=True)).rstrip()
        for row in [head, *body]
    )


def _star(row: Row) -> str:
    return row.block.rstrip(".").rsplit(".", 1)[0] + ".*." + row.name[len(row.block) :]


def _size(n: float) -> str:
    for unit in ("B", "kB", "MB", "GB"):
        if n < 1000 or unit == "GB":
            return f"{n:.0f} {unit}" if unit == "B" else f"{n:.1f} {unit}"
        n /= 1000
    return ""


def totals(plan: Plan) -> str:
    """The last lines of the printed plan: sizes, bits, memory, data."""
    c = plan.recipe.calibration
    tokens = c.sequences * c.length if plan.needs else 0
    data = f"{c.sequences} x {c.length} tokens of {c.text} text" if plan.needs else "no data needed"
    quantized = plan.bits_per_quantized_weight
    cache = f", key/value cache {plan.cache.label}" if plan.cache else ""
    return "\n".join(
        [
            f"\nrecipe {plan.recipe.name}, format {plan.dialect.DIALECT}, target {plan.target}{cache}; "
            f"{data}",
            f"disk {_size(plan.bytes_before)} -> {_size(plan.bytes_after)}; "
            f"{plan.bits_per_weight:.2f} bits per weight, {quantized or 0:.2f} of those quantized",
            f"memory, about: {_size(memory.expected(plan, tokens))} and what JAX itself needs "
            "(0.3 GB on a CPU)",
        ]
    )


def as_dict(plan: Plan) -> dict[str, Any]:
    """The plan as plain data, for --json."""
    rows = [
        {
            "tensor": r.name,
            "experts": r.shape[0] if len(r.names) > 1 else None,
            "role": r.role,
            "shape": list(r.shape),
            "dtype": r.dtype.name,
            "weights": r.scheme.weights.label if r.scheme else None,
            "inputs": r.scheme.inputs.label if r.scheme and r.scheme.inputs else None,
            "hadamard": r.scheme.hadamard or None if r.scheme else None,
            "rank": r.scheme.rank or None if r.scheme else None,
            "flat": r.scheme.flat or None if r.scheme else None,
            "shares_scale_with": r.shared or None,
            "bytes_before": r.before,
            "bytes_after": r.after,
            "kept": r.reason or None,
        }
        for r in plan.rows
    ]
    return {
        "recipe": plan.recipe.name,
        "format": plan.dialect.DIALECT,
        "target": plan.target,
        "bytes_before": plan.bytes_before,
        "bytes_after": plan.bytes_after,
        "bits_per_weight": plan.bits_per_weight,
        "needs": list(plan.needs),
        "kv_cache": plan.cache.label if plan.cache else None,
        "tensors": rows,
    }
