"""What the kernels reach on the device that is there, beside bfloat16 in the same run and the limits.

    python tests/bench/kernels.py [--only=matmul,attention] [--quick] [--report=kernels.json]

One row per operation and shape:

  ran           the implementation that was chosen
  µs, ±         per call, and the spread over rounds. Weights take turns, so that caches do not hold them;
                what is done once where a weight is loaded is not counted
  in kernels    what of it a GPU spent in kernels, by CUPTI
  limit, share  the larger of bytes (each read or written once) over the bandwidth of a copy or a sum, and
                operations over the rate of a square product, all measured first; its part of the time
  bf16 / it     the time of bfloat16 with float32 sums, rounded afterwards, over this one's
  plain / it    that of bfloat16 as `x @ w.T` has it

Without a GPU shapes are smaller and XLA runs everything. Whatever cannot run says why in its row.
"""

from __future__ import annotations

import argparse
import gc
import importlib.metadata
import json
import math
import os
import platform
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import jax
from contests import SECTIONS, Contest, Scale, Work, device
from timing import Timing, first_line, on_gpu, race

HEADS = ("what", "shape", "ran", "µs", "±", "in kernels", "rate", "limit", "share", "bf16 / it", "plain / it")


class Row(NamedTuple):
    """A line of the table; times in seconds.

    Attributes:
      rate: per second, of bytes or operations, whichever is the limit ("1.2 TB/s").
      limit: seconds that the device needs at least.
      against: seconds of bfloat16 with float32 sums and of plain bfloat16, by their names.
      failed: why there is no time.
    """

    section: str
    what: str
    shape: str
    work: Work
    timing: Timing | None
    rate: str
    limit: float | None
    against: dict[str, float]
    failed: str | None

    def cells(self) -> list[str]:
        if self.timing is None:
            return [self.what, self.shape, self.failed or "", *[""] * (len(HEADS) - 3)]
        t, micro = self.timing, 1e6
        kernels = "" if t.kernels is None else f"{t.kernels * micro:.1f}"
        limit = "" if self.limit is None else f"{self.limit * micro:.1f}"
        share = "" if self.limit is None else f"{self.limit / t.seconds:.0%}"
        ratios = [
            f"{s / t.seconds:.2f}" if (s := self.against.get(n)) else "" for n in ("bf16", "bf16 plain")
        ]
        said = [self.what, self.shape, t.ran, f"{t.seconds * micro:.1f}", f"{t.spread:.0%}"]
        return [*said, kernels, self.rate, limit, share, *ratios]


def measured(section: str, contest: Contest | str, ceiling: dict[str, float], arguments: Any) -> list[Row]:
    """Run the cases of a contest against each other; one row without a time where that fails."""
    shape = ""
    try:
        if isinstance(contest, Contest):
            shape = contest.shape
            found = contest.found or race(contest.cases, arguments.quick, arguments.cupti)
            return compared(section, contest, found, ceiling)
        reason = contest
    except Exception as error:  # the other contests go on
        reason = first_line(error)
    return [Row(section, section, shape, Work(0), None, "", None, {}, reason)]


def compared(
    section: str, contest: Contest, found: Mapping[str, Timing | str], ceiling: dict[str, float]
) -> list[Row]:
    """The rows of a contest."""
    against = {
        n: t.seconds for n, t in found.items() if n in ("bf16", "bf16 plain") and isinstance(t, Timing)
    }
    rows = []
    for what, t in found.items():
        work, limit, rate = contest.works[what], None, ""
        if isinstance(t, Timing):
            moving, computing = work.nbytes / ceiling["bytes"], work.operations / ceiling[work.unit]
            limit = max(moving, computing) or None
            bound = moving >= computing if limit else not work.operations
            amount, unit = (work.nbytes, "B/s") if bound else (work.operations, "op/s")
            rate = shown(amount / t.seconds, unit)
        timing, failed = (t, None) if isinstance(t, Timing) else (None, t)
        rows.append(Row(section, what, contest.shape, work, timing, rate, limit, against, failed))
    return rows


def ceilings(rows: list[Row]) -> dict[str, float]:
    """Bytes per second ("bytes") and operations per second by dtype: the most that `device` reached."""
    best = {"bytes": 0.0, "bf16": 0.0, "fp8": 0.0, "int8": 0.0}
    for row in rows:
        if row.timing is not None:
            of = row.work.unit if row.work.operations else "bytes"
            best[of] = max(best[of], (row.work.operations or row.work.nbytes) / row.timing.seconds)
    # Narrow numbers are no slower than wide ones, whatever XLA made of the square product.
    fewer = {dtype: max(best[dtype], best["bf16"]) for dtype in ("fp8", "int8")}
    return {of: rate or math.inf for of, rate in (best | fewer).items()}


def shown(rate: float, unit: str) -> str:
    return f"{rate / 1e12:.3g} T{unit}" if rate >= 1e12 else f"{rate / 1e9:.3g} G{unit}"


def line(cells: list[str] | tuple[str, ...]) -> str:
    widths = (34, 26, 20)
    return "| " + " | ".join(c.ljust(w) for c, w in zip(cells, (*widths, *[0] * 8), strict=True)) + " |"


def facts(arguments: Any) -> dict[str, Any]:
    """What a reader needs to know of the run."""
    d = jax.devices()[0]
    said = {
        "device": f"{d.device_kind} ({d.platform})",
        "compute capability": getattr(d, "compute_capability", None),
        "jax": jax.__version__,
        "jaxlib": importlib.metadata.version("jaxlib"),
        "python": platform.python_version(),
        "quick": arguments.quick,
    }
    if not on_gpu():
        said |= {"cores": len(os.sched_getaffinity(0)), "load before": round(os.getloadavg()[0], 1)}
    return said


def write(report: Path, said: dict[str, Any], rows: list[Row]) -> None:
    """The rows as JSON, and beside it the table in Markdown."""

    def plain(row: Row) -> dict[str, Any]:
        return row._asdict() | {"work": row.work._asdict(), "timing": row.timing and row.timing._asdict()}

    report.write_text(json.dumps({"facts": said, "rows": [plain(r) for r in rows]}, indent=1) + "\n")
    lines = [f"{key}: {value}  " for key, value in said.items() if value is not None]
    lines += ["", line(HEADS), "|---" * len(HEADS) + "|", *(line(r.cells()) for r in rows)]
    report.with_suffix(".md").write_text("\n".join(lines) + "\n")


def contests(section: Callable[[Scale], Iterator[Contest]], scale: Scale) -> Iterator[Contest | str]:
    """Those of a section; if making one fails, why, and no more of them."""
    try:
        yield from section(scale)
    except Exception as error:  # the other sections go on
        yield first_line(error)


def main() -> int:
    parser = argparse.ArgumentParser(description="Times of the kernels on this device, and its limits.")
    parser.add_argument("--only", default=",".join(SECTIONS), help=f"of {', '.join(SECTIONS)}, device")
    parser.add_argument("--quick", action="store_true", help="few shapes, short rounds")
    parser.add_argument("--nocupti", dest="cupti", action="store_false", help="no column of time in kernels")
    parser.add_argument("--report", type=Path, help="file for the rows (JSON) and, as .md, the table")
    arguments = parser.parse_args()
    chosen = [name for name in arguments.only.split(",") if name != "device"]
    if unknown := sorted(set(chosen) - set(SECTIONS)):
        parser.error(f"--only: {', '.join(unknown)} is not one of device, {', '.join(SECTIONS)}")
    if arguments.report and arguments.report.suffix == ".md":
        parser.error(f"--report: {arguments.report} is for JSON; the table goes beside it, with .md")
    said, scale = facts(arguments), Scale(on_gpu(), arguments.quick)
    print("\n".join(f"{key}: {value}" for key, value in said.items() if value is not None))
    print("\n" + line(HEADS) + "\n" + "|---" * len(HEADS) + "|")
    rows: list[Row] = []
    ceiling = ceilings(rows)
    for name in ("device", *chosen):
        for contest in contests(device if name == "device" else SECTIONS[name], scale):
            new = measured(name, contest, ceiling, arguments)
            print("\n".join(line(r.cells()) for r in new), flush=True)
            rows += new
            del contest
        gc.collect()
        if name == "device":
            ceiling = ceilings(rows)
        if arguments.report:
            write(arguments.report, said, rows)
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
