"""report.json, and the section that is appended to the model card (README.md)."""

from __future__ import annotations

import json
from pathlib import Path

from mojax.evaluation import Report
from mojax.plans import Plan


def write(folder: Path, source: Path, report: Report, plan: Plan) -> None:
    """Write report.json and README.md into `folder`; the source's README.md comes first, unchanged."""
    (folder / "report.json").write_text(json.dumps(report.as_dict(), indent=2) + "\n")
    card = source / "README.md"
    before = card.read_bytes() if card.exists() else b""  # in whatever encoding
    gap = b"\n" * (2 - before.endswith(b"\n")) if before else b""
    (folder / "README.md").write_bytes(before + gap + section(report, plan).encode())


def section(report: Report, plan: Plan) -> str:
    """The model card section, markdown."""
    formats = sorted({s.weights.label for s in plan.schemes.values()})
    lines = [
        "## Quantization",
        "",
        f"Made with mojax: recipe `{plan.recipe.name}`, weights "
        f"{', '.join(formats)}, checkpoint format `{plan.dialect.DIALECT}`.",
        "",
        "| measure | value |",
        "|---|---|",
        *(f"| {name} | {value} |" for name, value in summary(report)),
        "",
    ]
    return "\n".join(lines)


def summary(report: Report) -> list[tuple[str, str]]:
    """The report as (measure, value) rows; what was not measured is left out."""
    rows = [
        ("KL to the source, mean (nats/token)", _number(report.kl_mean, ".5f")),
        ("KL to the source, 99th percentile", _number(report.kl_p99, ".4f")),
        ("top-1 agreement with the source", _number(report.top1_agreement, ".2%")),
        ("perplexity", _number(report.perplexity, ".3f")),
        ("perplexity of the source", _number(report.perplexity_source, ".3f")),
        ("bits per weight, all tensors", _number(report.bits_per_weight, ".2f")),
        ("bits per weight, quantized tensors", _number(report.bits_per_quantized_weight, ".2f")),
    ]
    if report.tokens:
        rows.append(("evaluated on", f"{report.tokens} tokens, {report.text}"))
    for step in report.steps:
        if step["objective"] is not None:
            alone = f", {step['left_alone']} left alone" if step["left_alone"] else ""
            rows.append(
                (
                    f"objective of {step['step']}",
                    f"x {step['objective']:.3f}, {step['weights']} weights{alone}",
                )
            )
    rows += [("note", note) for note in report.notes]
    return [(name, value) for name, value in rows if value]


def _number(value: float | None, spec: str) -> str:
    return "" if value is None else format(value, spec)
