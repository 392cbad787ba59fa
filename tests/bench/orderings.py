"""Does what should be better come out better? Orders of recipes, said beforehand, each with its paired z.

    python tests/bench/orderings.py                 all experiments, on the built-in model and its twins
    python tests/bench/orderings.py --only=E1,E8 --model=FOLDER
    python tests/bench/orderings.py --dry           what was measured before

A claim is KL(left) < factor x KL(right). z is the mean of factor x right - left over sequences, over its
standard error: from 2 it holds, from -2 down the contrary does, between the two nothing is shown. Claims
are of the literature and of experiments with other models; none was chosen for what comes out, and none
that fails is left out. Calibration is 64 x 256 tokens, seed 0, unless the recipe says otherwise
(`stacks.py`). Results are files in --work, shared with quality.py.
"""

from __future__ import annotations

import argparse
import itertools
import json
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import numpy as np
import quality
import twins
from peers import quality_numbers as numbers
from train_tiny import cache


class Claim(NamedTuple):
    """KL of `left` below `factor` times that of `right`; both are (model, recipe)."""

    experiment: str
    left: tuple[str, str]
    right: tuple[str, str]
    factor: float = 1.0


def chain(experiment: str, model: str, *recipes: str) -> Iterator[Claim]:
    """Each recipe better than the one after it."""
    for left, right in itertools.pairwise(recipes):
        yield Claim(experiment, (model, left), (model, right))


def claims() -> list[Claim]:
    """All, by experiment. M is the model, C, S and R are its twins, P0 to P3 with outliers in one layer."""
    four = "nvfp4/four_over_six"
    found = [
        # error feedback, searched scales and small ones, W4A4
        *chain("E1", "M", "nvfp4/gptq+cd", "nvfp4/gptq", "nvfp4/gptq-in-order", "nvfp4/local_hessian"),
        *chain("E1", "M", "nvfp4/gptq-in-order", "nvfp4/wmse", "nvfp4/sweep", four, "nvfp4/rtn"),
        *chain("E1", "M", "nvfp4/local_hessian", "nvfp4/sweep"),
        *chain("E1", "M", "nvfp4/awq+rtn", "nvfp4/rtn", "nvfp4_hadamard/rtn"),
        *chain("E2", "M", *(f"nvfp4_weight_only/{s}" for s in ("sweep+gptq+cd", "sweep+gptq"))),
        *chain("E2", "M", *(f"nvfp4_weight_only/{s}" for s in ("sweep+gptq", "gptq+cd"))),
        *chain(
            "E2",
            "M",
            *(f"nvfp4_weight_only/{s}" for s in ("gptq+cd", "sweep+gptq-in-order", "gptq-in-order")),
            *(f"nvfp4_weight_only/{s}" for s in ("local_hessian", "sweep", "four_over_six", "rtn")),
        ),
        *chain("E3", "M", "mxfp4_hadamard/gptq+cd", "mxfp4_hadamard/gptq", "mxfp4_hadamard/gptq-in-order"),
        *chain("E3", "M", "mxfp4_hadamard/gptq-in-order", "mxfp4_hadamard/rtn", "mxfp4/mse", "mxfp4/rtn"),
        *chain("E3", "M", "mxfp4_hadamard/gptq-in-order", "mxfp4/gptq-in-order", "mxfp4/mse"),
        *chain("E4", "M", *(f"int4_g32/{s}" for s in ("gptq+cd", "gptq", "gptq-in-order"))),
        *chain("E4", "M", *(f"int4_g32/{s}" for s in ("gptq-in-order", "mse", "awq+rtn", "rtn"))),
        # bits
        *chain("E7", "M", "int8", "fp8_dynamic", "mxfp8", "int8_static/rtn", "nvfp4", "mxfp4"),
        *chain("E7", "M", "fp8_dynamic", "fp8", "int8_static/rtn"),
        *chain("E7", "M", "nvfp4_weight_only", "nvfp4"),
        Claim("E7", ("S", "fp8"), ("C", "fp8"), 1.1),
        Claim("E7", ("C", "int8"), ("S", "int8"), 1 / 10),
        # the cache
        *chain("E8", "M", "kv_fp8", "kv_fp8k_nvfp4v", "kv_nvfp4k_fp8v", "kv_nvfp4"),
        *chain("E8", "M", "kv_nvfp4_rotated", "kv_nvfp4"),
        *chain("E8", "M", "kv_nvfp4_affine", "kv_nvfp4"),
        *chain("E8", "M", "kv_nvfp4_skip_first", "kv_nvfp4"),
        *chain("E8", "M", "kv_nvfp4_skip_last", "kv_nvfp4"),
    ]
    # outliers that scaling undoes
    for scaled in ("nvfp4/smoothquant-all+rtn", "nvfp4/awq+rtn", "int4/awq+rtn", "mxfp4/awq+rtn"):
        found.append(Claim("E5", ("S", scaled), ("C", scaled), 1.25))
    for base in ("nvfp4", "mxfp4", "int4", "int8_static"):
        found.append(Claim("E5", ("C", f"{base}/rtn"), ("S", f"{base}/rtn"), 1 / 4))
    # outliers that a rotation of the whole stream undoes
    for turned in ("int4_hadamard256/rtn", "mxfp4_hadamard256/rtn", "mxfp4_hadamard256/gptq"):
        found.append(Claim("E6", ("R", turned), ("C", turned), 1.15))
    for plain in ("int4_g32/rtn", "int4_g32/awq+rtn", "mxfp4/rtn", "mxfp4/awq+rtn"):
        found.append(Claim("E6", ("C", plain), ("R", plain), 1 / 1.5))
    # the layer with planted outliers is the one that costs most
    for layer in range(LAYERS):
        for other in set(range(LAYERS)) - {layer}:
            pair = [(f"P{layer}", f"nvfp4/rtn@layer{i}") for i in (other, layer)]
            found.append(Claim("E14", pair[0], pair[1]))
    # few tokens: hardly damped error feedback overfits, and what is damped by the number of tokens does not
    for n in (64, 256):
        found.append(Claim("E15", ("M", "int4/rtn"), ("M", f"int4/gptq-d.001@n{n}")))
    for n in (64, 256, 1024, 4096):
        found.append(Claim("E15", ("M", f"int4/gptq@n{n}"), ("M", "int4/rtn")))
    for n, more in ((64, 256), (256, 1024), (1024, 4096), (4096, 16384)):
        found.append(Claim("E15", ("M", f"int4/gptq@n{more}"), ("M", f"int4/gptq@n{n}")))
    # nothing done is nothing changed; another draw of text changes little
    found.append(Claim("E16", ("M", "source"), ("M", "nvfp4/rtn"), 0.0))
    for name in ("nvfp4/gptq", "nvfp4_best", "int4_best"):
        for seed in (1, 2):
            found.append(Claim("E16", ("M", f"{name}@seed{seed}"), ("M", f"{name}@seed0"), 1.05))
            found.append(Claim("E16", ("M", f"{name}@seed0"), ("M", f"{name}@seed{seed}"), 1.05))
    # the best recipes on the twins
    for best in ("nvfp4_best", "nvfp4_weight_only_best", "int4_best", "mxfp4_best", "int8_static_best"):
        for twin in "SR":
            found.append(Claim("twins", (twin, best), ("C", best), 1.15))
    return found


LAYERS = 4  # of the built-in model and its sisters


def made(folder: Path, source: Path, kind: str) -> Path:
    """The folder of a twin, written if it is not there."""
    out = folder / f"{source.name}-{kind}"
    if not out.exists():
        layer = int(kind[1:]) if kind[1:] else None
        twins.make(str(source), out, kind if layer is None else "S", layer=layer)
    return out


def kl(work: Path, model: Path, recipe: str, version: str, dry: bool) -> np.ndarray | str:
    """Of every sequence; or why there is none."""
    seed = 0
    path = numbers.place(work, model, f"mojax/{version}", recipe, seed)
    if not dry and not path.exists():
        for purpose in ("evaluation", "calibration"):
            quality.write_tokens(work, model, purpose, seed)
        place = lambda *a: path  # noqa: E731
        quality.run_mojax(work, model, [recipe], seed, place)
    if not path.exists():
        return "not measured"
    facts = json.loads(path.read_text())
    return facts["failed"] if "failed" in facts else np.array(facts["kl"])


def judged(claim: Claim, left: np.ndarray, right: np.ndarray) -> list[str]:
    """The cells of a claim."""
    gap = claim.factor * right - left
    if not claim.factor:
        verdict, shown = "holds" if not left.any() else "**fails**", ""
    else:
        score = float(np.mean(gap)) / max(quality.error(gap), 1e-30)
        verdict = "holds" if score >= 2 else "**fails**" if score <= -2 else "open"
        shown = f"{score:.1f}"
    said = "0" if not claim.factor else f"{claim.factor:.3g} x" if claim.factor != 1 else ""
    names = [" ".join(p for p in pair if p != "M") for pair in (claim.left, claim.right)]
    ends = [f"{np.mean(k):.5f}" for k in (left, right)]
    right_end = [] if not claim.factor else [p for p in (said, names[1]) if p]
    sign = "= 0" if not claim.factor else "< " + " ".join(right_end)
    return [claim.experiment, f"{names[0]} {sign}", ends[0], ends[1] if claim.factor else "", shown, verdict]


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--model", default="tiny", help="a folder of four layers, or 'tiny'")
    parser.add_argument("--only", default="", help="experiments, comma between")
    parser.add_argument("--work", type=Path, default=cache() / "quality", help="results")
    parser.add_argument("--twins", type=Path, default=cache() / "models", help="folder of the twins")
    parser.add_argument("--of", help="the sources whose results count, as quality.py names them")
    parser.add_argument("--dry", action="store_true", help="measure nothing")
    arguments = parser.parse_args()
    work, version = arguments.work.resolve(), arguments.of or quality.sources()
    tiny = quality.PACKAGE / "mojax" / "data" / "tiny"
    source = tiny if arguments.model == "tiny" else Path(arguments.model).resolve()
    wanted = [c for c in claims() if not arguments.only or c.experiment in arguments.only.split(",")]
    arguments.twins.mkdir(parents=True, exist_ok=True)
    found: dict[tuple[str, str], np.ndarray | str] = {}
    for kind, recipe in dict.fromkeys(side for c in wanted for side in (c.left, c.right)):
        model = source if kind == "M" else made(arguments.twins, source, kind)
        found[kind, recipe] = kl(work, model, recipe, version, arguments.dry)
    print("| | claim | left | right | z | |\n" + "|---" * 6 + "|")
    count = {"holds": 0, "open": 0, "**fails**": 0}
    for claim in wanted:
        left, right = found[claim.left], found[claim.right]
        if isinstance(left, str) or isinstance(right, str):
            why = left if isinstance(left, str) else right
            print(f"| {claim.experiment} | {claim.left}, {claim.right}: {why} |")
            continue
        cells = judged(claim, left, right)
        count[cells[-1]] += 1
        print("| " + " | ".join(cells) + " |")
    print(f"\n{count['holds']} hold, {count['open']} are open, {count['**fails**']} fail ({source.name})")
    return 0


if __name__ == "__main__":
    sys.exit(main())
