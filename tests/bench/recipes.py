"""Measure every shipped recipe on the built-in model: KL to the source, bits per weight, seconds.

python tests/bench/recipes.py            prints a table
python tests/bench/recipes.py --write    also writes the two figures of the menu into recipes/*.yaml
"""

from __future__ import annotations

import argparse
import re
import tempfile
from pathlib import Path

import mojax
from mojax import recipe

RECIPES = Path(__file__).resolve().parents[2] / "recipes"


def write(name: str, facts: dict[str, str]) -> None:
    """Replace the figures in the recipe's file, leaving everything else as it is."""
    path = RECIPES / f"{name}.yaml"
    text = path.read_text()
    for key, value in facts.items():
        text, count = re.subn(rf"(\b{key}: )[^\s,}}]+", rf"\g<1>{value}", text)
        if count != 1:
            raise SystemExit(f"{path}: has {count} lines for {key}, needed one")
    path.write_text(text)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--write", action="store_true", help="write the figures into recipes/*.yaml")
    parser.add_argument("names", nargs="*", help="recipes to measure (default: all)")
    args = parser.parse_args()
    print(f"{'recipe':20s} {'KL':>8s} {'p99':>8s} {'top-1':>7s} {'bits':>6s} {'seconds':>8s}")
    for name in args.names or recipe.names():
        with tempfile.TemporaryDirectory() as folder:
            own = {"format": "bitsandbytes", "target": "transformers"} if name == "nf4" else {}
            r = mojax.optimize("tiny", name, Path(folder) / "out", kl_limit=float("inf"), **own)
        print(
            f"{name:20s} {r.kl_mean:8.5f} {r.kl_p99:8.4f} {r.top1_agreement:7.2%} {r.bits_per_weight:6.2f} "
            f"{r.seconds:8.1f}",
            flush=True,
        )
        if args.write:
            write(name, {"bits_per_weight": f"{r.bits_per_weight:.2f}", "kl_tiny": f"{r.kl_mean:.5f}"})


if __name__ == "__main__":
    main()
