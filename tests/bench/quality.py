"""What each tool's algorithms cost a model: KL to the source with mojax, llm-compressor and ModelOpt.

    python tests/bench/quality.py                        built-in model, all recipes, calibration seed 0
    python tests/bench/quality.py --models=tiny,FOLDER --recipes=mojax:nvfp4,modelopt:nvfp4/gptq --seeds=0,1
    python tests/bench/quality.py --dry                  tables of what was measured before
    python tests/bench/quality.py --dry --book=docs/recipe-book.md      the same, into the recipe book

Every tool calibrates on the same 64 x 256 tokens (mojax's choice with that seed) and is judged on the same
64 x 256 held-out tokens: KL(source || quantized) in nats per token, inputs rounded as a server rounds them,
logits in float32. Peers run in environments of their own (make_envs.sh fills --peers where --python names
none) and are judged there by the same formula; `rtn` of all tools agrees to a few percent. Each result is a
JSON file in --work, so that a run goes on where it was; one of mojax counts for the sources that made it. A
recipe that failed is tried again.

In a table z is the paired difference to the row above over its standard error (over sequences, within one
model and its calibration draws), `like` the rung of llama.cpp's ladder that is just worse.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
import traceback
from pathlib import Path
from typing import Any, Literal, NamedTuple

import numpy as np
import stacks
from peers import quality_numbers as numbers
from peers.quality_numbers import sources
from train_tiny import cache

HERE = Path(__file__).resolve().parent
PACKAGE = HERE.parents[1]
SCRIPTS = {"llm-compressor": "quality_llmcompressor.py", "modelopt": "quality_modelopt.py"}
ENVIRONMENTS = {"llm-compressor": "llmcompressor", "modelopt": "modelopt"}
FORMATS = {
    "nvfp4_weight_only": "NVFP4 weights",
    "nvfp4": "NVFP4 weights and inputs",
    "mxfp4_weight_only": "MXFP4 weights",
    "mxfp4": "MXFP4 weights and inputs",
    "int4_asymmetric": "INT4 weights, group 128, zero points",
    "int4_g32": "INT4 weights, group 32",
    "int4": "INT4 weights, group 128",
    "int8_static": "INT8, static inputs",
    "int8": "INT8, inputs per token",
    "fp8": "FP8",
    "mxfp8": "MXFP8",
}
BOTH = ("rtn", "mse", "imatrix", "awq", "gptq", "mse+gptq", "awq+gptq", "spinquant+gptq", "autoround")
INT8 = ("rtn", "mse", "smoothquant", "smoothquant8", "gptq", "smoothquant8+gptq", "spinquant4+gptq")
MODELOPT = ("max", "mse", "sweep", "four_over_six", "local_hessian")
MODELOPT = (*MODELOPT, "awq_lite", "awq_clip", "awq_full", "svdquant", "gptq")
ONE = "local_hessian+gptq+refine"  # error feedback without the backward pass
SIGNED = "local_hessian-signed+gptq+refine-signed"
ALL = {
    "mojax": (
        *("nvfp4_weight_only", "nvfp4_weight_only_best", "nvfp4", "nvfp4_gptq", "nvfp4_best"),
        "nvfp4_svdquant",
        *("mxfp4_weight_only", "mxfp4_weight_only_best", "mxfp4", "mxfp4_two_sided", "mxfp4_best"),
        *("int4", "int4_gptq", "int4_best", "int8_static", "int8_static_best", "int8", "int8_smoothquant"),
        *(f"nvfp4_weight_only/{s}" for s in ("mse", "local_hessian+gptq", ONE, f"qep1+{ONE}")),
        *(f"nvfp4/{s}" for s in ("awq+rtn", "mse", ONE, f"awq+{ONE}", f"awq+qep+{ONE}")),
        *(f"mxfp4_weight_only/{s}" for s in (ONE, f"qep1+{ONE}")),
        *(f"mxfp4/{s}" for s in (ONE, f"awq+{ONE}")),
        f"mxfp4_hadamard/awq+{ONE}",
        *(f"{base}/{s}" for base in ("int4", "int4_g32") for s in (SIGNED, f"qep1+{SIGNED}")),
        *("int4_g32/rtn", f"int4_g32/gradients+qep+{SIGNED}"),
        "int8_static/rtn",
        *("nvfp4/flatquant+rtn", "mxfp4/flatquant+rtn", "int8_static/flatquant+rtn"),
        *(f"mxfp4/{s}" for s in (f"flatquant+{ONE}", f"gradients+awq+flatquant+qep+{ONE}")),
        f"nvfp4/gradients+awq+flatquant+qep+{ONE}",
    ),
    "llm-compressor": (
        *(f"nvfp4_weight_only/{s}" for s in (*BOTH, "expanded", "expanded+gptq")),
        *(f"nvfp4/{s}" for s in (*BOTH, "expanded", "expanded+gptq", "smoothquant+gptq", "spinquant4+gptq")),
        *(f"mxfp4_weight_only/{s}" for s in BOTH),
        *(f"mxfp4/{s}" for s in (*BOTH, "smoothquant+gptq", "spinquant4+gptq")),
        *(f"{form}/{s}" for form in ("int4", "int4_g32") for s in BOTH),
        *(f"int8_static/{s}" for s in INT8),
        *(f"int8/{s}" for s in ("rtn", "smoothquant8", "gptq")),
    ),
    "modelopt": (
        *(f"{form}/{algorithm}" for form in ("nvfp4_weight_only", "nvfp4") for algorithm in MODELOPT),
        *(f"int4/{algorithm}" for algorithm in ("max", "mse", "awq_lite", "awq_clip", "awq_full", "gptq")),
        *("mxfp4_weight_only/max", "mxfp4/max", "int8_static/max", "int8_static/smoothquant"),
    ),
}
# llama.cpp's quantizations of Llama-3-8B on wikitext2: KL in nats per token, tools/perplexity/README.md
BEGIN, END = "<!-- measured -->", "<!-- /measured -->"  # in the recipe book
LADDER = (
    ("q8_0", 0.00136),
    ("q6_K", 0.00545),
    ("q5_K_M", 0.0108),
    ("q4_K_M", 0.0313),
    ("q4_0", 0.0719),
    ("q3_K_M", 0.1019),
    ("q2_K", 0.4451),
)


class Row(NamedTuple):
    """One tool and recipe on one model; per sequence, the mean over calibration seeds."""

    model: str
    form: str
    tool: str
    recipe: str
    bits: float
    kl: np.ndarray
    ratio: np.ndarray  # log of the perplexity ratio
    same: np.ndarray
    p99: tuple[float, float]
    seeds: int
    spread: float  # standard deviation of the KL over seeds
    seconds: float


def form(recipe: str) -> str:
    """The format that a recipe's name begins with."""
    fits = [name for name in FORMATS if recipe.split("/")[0].startswith(name)]
    return max(fits, key=len, default=recipe)


def write_tokens(work: Path, model: Path, purpose: Literal["calibration", "evaluation"], seed: int) -> Path:
    """The tokens of a purpose, 64 x 256, as a file that every tool reads."""
    from mojax import text

    path = numbers.folder(work, model) / f"{purpose}-{seed}.npz"
    if not path.exists():
        ids = text.tokens("builtin", model, sequences=64, length=256, seed=seed, purpose=purpose).ids
        path.parent.mkdir(parents=True, exist_ok=True)
        np.savez(path, tokens=ids)
    return path


def measure(work: Path, model: Path, recipe: str, seed: int) -> dict[str, Any]:
    """One recipe of mojax: what is written is read back and compared, as `mojax evaluate` does."""
    import mojax
    from mojax import evaluation

    start, reference = time.perf_counter(), mojax.load(str(model))
    with tempfile.TemporaryDirectory() as scratch:
        if recipe == "source":
            quantized = mojax.load(str(model))
        elif stacks.kept_here(recipe):
            plan = mojax.plan(reference, mojax.load_recipe(stacks.recipe(recipe)), target="mojax")
            ids = numbers.tokens(work, model, "calibration", seed).astype(np.int32)
            quantized = mojax.apply(reference, plan, ids)
        else:
            said = mojax.load_recipe(stacks.recipe(recipe))
            own = "@" in recipe  # it says itself how much text calibrates
            seen = None if own else str(write_tokens(work, model, "calibration", seed))
            mojax.optimize(str(model), said, Path(scratch) / "out", calibration_text=seen, evaluate=False)
            quantized = mojax.load(Path(scratch) / "out")
        seconds = time.perf_counter() - start
        tokens = numbers.tokens(work, model, "evaluation", 0).astype(np.int32)
        facts = numbers.summary(*evaluation.per_token(quantized, reference, tokens))
        return facts | {"bits": evaluation.quantized_bits(quantized), "seconds": seconds}


def run_mojax(work: Path, model: Path, recipes: list[str], seed: int, place: Any) -> None:
    for recipe in recipes:
        path = place(work, model, "mojax", recipe, seed)
        if path.exists() and "failed" not in json.loads(path.read_text()):
            continue
        facts = {"tool": "mojax", "recipe": recipe, "model": model.name, "seed": seed}
        try:
            facts |= measure(work, model, recipe, seed)
            said = f"KL {np.mean(facts['kl']):.5f}, {facts['seconds']:.0f} s"
        except Exception as error:
            traceback.print_exc()
            said = facts["failed"] = f"{type(error).__name__}: {error}"[:500]
        numbers.write(path, facts)
        print(f"mojax {model.name} {recipe} seed {seed}: {said}", file=sys.stderr, flush=True)


def run_peer(work: Path, model: Path, tool: str, recipes: list[str], seed: int, python: Path) -> None:
    """All recipes of a tool in one process; its talk goes to a log."""
    log = numbers.folder(work, model) / f"{tool}-{seed}.log"
    line = [
        python,
        HERE / "peers" / SCRIPTS[tool],
        "--work",
        work,
        "--model",
        model,
        "--seed",
        seed,
        *recipes,
    ]
    environment = {**os.environ, "HF_HUB_OFFLINE": "1", "TOKENIZERS_PARALLELISM": "false"}
    environment.pop("PYTHONPATH", None)
    with log.open("a") as output:
        status = subprocess.run([str(part) for part in line], stdout=output, stderr=output, env=environment)
    if status.returncode:
        print(f"{tool} {model.name} seed {seed}: exit {status.returncode}, see {log}", file=sys.stderr)


def gather(work: Path, model: Path, tool: str, recipe: str, seeds: list[int], place: Any) -> Row | str:
    """The row of a recipe, or why there is none."""
    found = []
    for seed in seeds:
        path = place(work, model, tool, recipe, seed)
        if not path.exists():
            return "not measured"
        found.append(json.loads(path.read_text()))
        if "failed" in found[-1]:
            return found[-1]["failed"]
    several = {key: np.mean([f[key] for f in found], axis=0) for key in ("kl", "same", "nll", "nll_source")}
    means = [float(np.mean(f["kl"])) for f in found]
    return Row(
        *(model.name, form(recipe), tool, recipe),
        bits=found[0]["bits"],
        kl=several["kl"],
        ratio=several["nll"] - several["nll_source"],
        same=several["same"],
        p99=(float(np.mean([f["p99"] for f in found])), float(np.mean([f["p99_error"] for f in found]))),
        seeds=len(seeds),
        spread=float(np.std(means, ddof=1)) if len(means) > 1 else 0.0,
        seconds=float(np.mean([f["seconds"] for f in found])),
    )


def error(values: np.ndarray) -> float:
    """Standard error of the mean over sequences."""
    return float(np.std(values, ddof=1) / len(values) ** 0.5)


def z(row: Row, above: Row) -> float:
    """Paired: mean difference of the KL of each sequence over its standard error."""
    gap = row.kl - above.kl
    return float(np.mean(gap) / max(error(gap), 1e-30))


def like(kl: float) -> str:
    return next((name for name, rung in LADDER if kl <= rung), "worse than q2_K")


def table(rows: list[Row]) -> str:
    """Markdown, best first."""
    head = "tool | recipe | bits | KL (SE) | z | p99 (SE) | perplexity (SE) | top-1 | like | seeds | s"
    lines = [f"| {head} |", "|---" * 11 + "|"]
    for above, row in zip([None, *rows], rows, strict=False):
        ratio = float(np.exp(np.mean(row.ratio)))
        cells = (
            row.tool,
            row.recipe,
            f"{row.bits:.3f}",
            f"{np.mean(row.kl):.5f} ({error(row.kl):.5f})",
            "" if above is None else f"{z(row, above):.1f}",
            f"{row.p99[0]:.4f} ({row.p99[1]:.4f})",
            f"{ratio:.4f} ({ratio * error(row.ratio):.4f})",
            f"{np.mean(row.same):.2%}",
            like(float(np.mean(row.kl))),
            f"{row.seeds}" + (f" ({row.spread:.5f})" if row.seeds > 1 else ""),
            f"{row.seconds:.0f}",
        )
        lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines)


def summary(rows: list[Row]) -> str:
    """Of one model: the best of each side at every format, at its bits; of ours what a file can hold."""
    import mojax

    def streamed(row: Row) -> bool:
        return mojax.load_recipe(stacks.recipe(row.recipe)).calibration.gradients > 0

    def said(found: list[Row]) -> str:
        best = min(found, key=lambda r: np.mean(r.kl), default=None)
        return f"{np.mean(best.kl):.5f} `{best.recipe}`" if best else ""

    head = "format | nearest | the others' best | ours without gradients | ours | less than theirs by"
    lines = [f"| {head} |", "|---" * 6 + "|"]
    for name, words in FORMATS.items():
        mine = [r for r in rows if r.form == name and r.tool == "mojax" and not stacks.kept_here(r.recipe)]
        others = [r for r in rows if r.form == name and r.tool != "mojax"]
        nearest = [r for r in mine if r.recipe in (name, f"{name}/rtn")]
        budget = min((r.bits for r in (*mine, *others)), default=0) + 0.25
        mine, others = ([r for r in side if r.bits <= budget] for side in (mine, others))
        nearest = sorted(nearest, key=lambda r: len(r.recipe))[
            -1:
        ]  # int8_static itself is not round to nearest
        if not mine or not others:
            continue
        least = [min(float(np.mean(r.kl)) for r in side) for side in (mine, others)]
        best = min(others, key=lambda r: np.mean(r.kl))
        cells = (
            words,
            f"{np.mean(nearest[0].kl):.5f}" if nearest else "",
            f"{least[1]:.5f} {best.tool} `{best.recipe}`",
            said([r for r in mine if not streamed(r)]),
            said(mine),
            f"{1 - least[0] / least[1]:.0%}",
        )
        lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines)


def across(rows: list[Row]) -> str:
    """KL of each recipe on each model, best geometric mean first; only recipes that all models have."""
    models = list(dict.fromkeys(row.model for row in rows))
    found: dict[tuple[str, str], dict[str, float]] = {}
    for row in rows:
        found.setdefault((row.tool, row.recipe), {})[row.model] = float(np.mean(row.kl))
    whole = {key: kls for key, kls in found.items() if len(kls) == len(models)}
    order = sorted(whole, key=lambda key: sum(np.log(kl) for kl in whole[key].values()))
    lines = [f"| tool | recipe | {' | '.join(models)} |", "|---" * (2 + len(models)) + "|"]
    lines += [f"| {k[0]} | {k[1]} | {' | '.join(f'{whole[k][m]:.5f}' for m in models)} |" for k in order]
    return "\n".join(lines)


def plot(rows: list[Row], path: Path) -> None:
    """One panel per format of one model: KL on a logarithmic axis, two standard errors, llama.cpp's rungs."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    forms = [name for name in FORMATS if any(row.form == name for row in rows)]
    counts = [sum(row.form == name for row in rows) for name in forms]
    figure, panels = plt.subplots(
        len(forms),
        figsize=(9, 0.2 * sum(counts) + 0.7 * len(forms) + 0.5),
        squeeze=False,
        sharex=True,
        layout="constrained",
        gridspec_kw={"height_ratios": [n + 2 for n in counts]},
    )
    low, high = (end(float(np.mean(r.kl)) for r in rows if r.form in forms) for end in (min, max))
    low, high = low / 1.3, high * 1.3
    colors = {"mojax": "tab:red", "llm-compressor": "tab:blue", "modelopt": "tab:green"}
    for panel, name in zip(panels[:, 0], forms, strict=True):
        chosen = sorted((r for r in rows if r.form == name), key=lambda r: np.mean(r.kl))
        for i, row in enumerate(chosen):
            bar = {"xerr": 2 * error(row.kl), "fmt": "o", "ms": 4, "color": colors[row.tool]}
            panel.errorbar(float(np.mean(row.kl)), i, **bar)
        for rung, kl in LADDER:
            if low < kl < high:
                panel.axvline(kl, color="0.7", lw=0.8, zorder=0)
                panel.text(kl, -0.9, rung, fontsize=6, color="0.4", ha="center", va="top")
        panel.set(xscale="log", xlim=(low, high), ylim=(len(chosen) - 0.5, -1))
        panel.set_title(FORMATS[name], fontsize=9)
        panel.set_yticks(range(len(chosen)), [f"{r.tool} {r.recipe}" for r in chosen], fontsize=7)
    panels[-1, 0].set_xlabel("KL to the source, nats per token")
    figure.savefig(path, dpi=120)
    plt.close(figure)


def environment(tool: str, given: dict[str, Path], peers: Path) -> Path:
    """The python of a peer, which make_envs.sh installs if it was not given."""
    if tool in given:
        return given[tool]
    python = peers / ENVIRONMENTS[tool] / "bin" / "python"
    if not python.exists():
        subprocess.run(["sh", str(HERE / "make_envs.sh"), str(peers), sys.executable], check=True)
    return python


def asked(parser: argparse.ArgumentParser, words: list[str]) -> dict[str, list[str]]:
    """Recipes by tool, from TOOL:RECIPE and TOOL, which is all of its."""
    found: dict[str, list[str]] = {}
    for word in words:
        tool, _, recipe = word.partition(":")
        if tool not in ALL:
            parser.error(f"--recipes: {tool} is not one of {', '.join(ALL)}; write TOOL:RECIPE or TOOL")
        found.setdefault(tool, []).extend([recipe] if recipe else ALL[tool])
    return found


def print_tables(rows: list[Row], work: Path) -> None:
    models = list(dict.fromkeys(row.model for row in rows))
    for model in models:
        mine = [row for row in rows if row.model == model]
        for name in dict.fromkeys([*FORMATS, *(row.form for row in mine)]):
            chosen = sorted((r for r in mine if r.form == name), key=lambda r: np.mean(r.kl))
            if chosen:
                print(f"\n## {model}: {FORMATS.get(name, name)}\n\n{table(chosen)}")
        print(f"\n## {model}: the best of each side\n\n{summary(mine)}")
        plot([row for row in mine if row.form in FORMATS], work / f"{model}.png")
        print(f"\nplot: {work / f'{model}.png'}")
    if len(models) > 1:
        for name in FORMATS:
            if any(row.form == name for row in rows):
                print(f"\n## {FORMATS[name]}\n\n{across([row for row in rows if row.form == name])}")
    print("\nllama.cpp, Llama-3-8B on wikitext2: " + ", ".join(f"{n} {kl:.4f}" for n, kl in LADDER))


def write_book(rows: list[Row], path: Path) -> None:
    """Put the tables of the first model between the marks of the recipe book, and its plot beside it."""
    model = rows[0].model
    mine = [row for row in rows if row.model == model]
    parts = [summary(mine)]
    for name in FORMATS:
        chosen = sorted((r for r in mine if r.form == name), key=lambda r: np.mean(r.kl))
        if chosen:
            parts.append(f"### {FORMATS[name]}\n\n{table(chosen)}")
    picture = path.with_name("recipe-book.png")
    plot([row for row in mine if row.form in FORMATS], picture)
    parts.append(f"![KL of every recipe, with two standard errors]({picture.name})")
    before, rest = path.read_text().split(BEGIN)
    path.write_text(before + BEGIN + "\n" + "\n\n".join(parts) + "\n" + END + rest.split(END)[1])


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--models", default="tiny", help="folders, or 'tiny'; comma between")
    parser.add_argument("--recipes", default="mojax,llm-compressor,modelopt", help="TOOL:RECIPE or TOOL, ...")
    parser.add_argument("--seeds", default="0", help="of the choice of calibration text")
    parser.add_argument("--work", type=Path, default=cache() / "quality", help="results, logs and plots")
    parser.add_argument("--peers", type=Path, default=cache() / "peers", help="folder of make_envs.sh")
    parser.add_argument("--python", action="append", default=[], help="TOOL=PATH of a peer's python")
    parser.add_argument("--of", help="the sources of mojax whose results count; default: those that lie here")
    parser.add_argument("--dry", action="store_true", help="measure nothing")
    parser.add_argument("--book", type=Path, help="write the tables and the plot into this recipe book too")
    arguments = parser.parse_args()
    recipes = asked(parser, arguments.recipes.split(","))
    seeds = [int(seed) for seed in arguments.seeds.split(",")]
    given = {tool: Path(path) for tool, _, path in (word.partition("=") for word in arguments.python)}
    tiny = PACKAGE / "mojax" / "data" / "tiny"
    models = [tiny if name == "tiny" else Path(name).resolve() for name in arguments.models.split(",")]
    work, version = arguments.work.resolve(), arguments.of or sources()

    def place(work: Path, model: Path, tool: str, recipe: str, seed: int) -> Path:
        name = f"mojax/{version}" if tool == "mojax" else tool
        return numbers.place(work, model, name, recipe, seed)

    for model in models if not arguments.dry else []:
        write_tokens(work, model, "evaluation", 0)
        for seed in seeds:
            write_tokens(work, model, "calibration", seed)
            for tool, names in recipes.items():
                if tool == "mojax":
                    run_mojax(work, model, names, seed, place)
                else:
                    run_peer(work, model, tool, names, seed, environment(tool, given, arguments.peers))
    jobs = [(model, tool, recipe) for model in models for tool, names in recipes.items() for recipe in names]
    found = {job: gather(work, *job, seeds, place) for job in jobs}
    for (model, tool, recipe), row in found.items():
        if isinstance(row, str):
            print(f"{model.name}: {tool} {recipe}: {row}")
    rows = [row for row in found.values() if isinstance(row, Row)]
    print_tables(rows, work)
    if arguments.book and rows:
        write_book(rows, arguments.book)
    return 0 if rows else 1


if __name__ == "__main__":
    sys.exit(main())
