"""How far a fake-quantized transformers model is from its source, per token; run by a peer's environment.

The decoder runs as the tool left it, hooks and simulated inputs included; logits are float32, not rounded to
the dtype of the model, for both sides: what mojax's own evaluation does, so that the figures compare.
"""

# pyright: reportMissingImports=false

from __future__ import annotations

import argparse
import gc
import json
import sys
import time
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any

import quality_numbers
import torch
import transformers


def load(folder: Path) -> Any:
    """The source in its own dtype, for inference."""
    return transformers.AutoModelForCausalLM.from_pretrained(str(folder), dtype="auto").eval()


@torch.inference_mode()
def log_probabilities(model: Any, ids: Any) -> Any:
    """float32 `[length, vocabulary]` for int64 `[length]`."""
    hidden = model.model(input_ids=ids[None], use_cache=False).last_hidden_state[0]
    return torch.log_softmax(hidden.float() @ model.lm_head.weight.float().T, dim=-1)


@torch.inference_mode()
def per_token(model: Any, source: Any, tokens: Any) -> list[Any]:
    """KL(source || model), agreement, and the two negative log-likelihoods, `[sequences, length]` each."""
    parts: list[list[Any]] = [[], [], [], []]
    for ids in torch.from_numpy(tokens):
        p, q = (log_probabilities(m, ids) for m in (source, model))
        following = torch.roll(ids, -1)[:, None]
        values = (
            (p.exp() * (p - q)).sum(-1).clamp(min=0),
            p.argmax(-1) == q.argmax(-1),
            -p.gather(1, following)[:, 0],
            -q.gather(1, following)[:, 0],
        )
        for part, value in zip(parts, values, strict=True):
            part.append(value)
    return [torch.stack(part).numpy() for part in parts]


def linears(model: Any) -> dict[str, Any]:
    """The modules that are quantized: linear layers in the blocks, routers excepted."""
    found = {n: m for n, m in model.named_modules() if isinstance(m, torch.nn.Linear) and ".layers." in n}
    return {n: m for n, m in found.items() if not n.endswith("mlp.gate")}


def bits(model: Any, each: Callable[[Any], float]) -> float:
    """Bits per quantized weight; `each` gives those of one linear layer in all."""
    found = linears(model).values()
    return sum(each(m) for m in found) / sum(m.weight.numel() for m in found)


def run(tool: str, quantize: Callable[[Any, Any, str], float], versions: dict[str, str]) -> None:
    """The main program of a peer: quantize, compare, write a file, for each recipe that has none.

    Args:
      quantize: `(model, tokens, recipe)` changes the model and returns the bits per quantized weight.
    """
    parser = argparse.ArgumentParser(description=f"Quantize with {tool} and compare with the source.")
    parser.add_argument("--work", type=Path, required=True)
    parser.add_argument("--model", type=Path, required=True)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("recipes", nargs="+")
    arguments = parser.parse_args()
    work, model, seed = arguments.work, arguments.model, arguments.seed
    source, evaluation = load(model), quality_numbers.tokens(work, model, "evaluation", 0)
    for recipe in arguments.recipes:
        path = quality_numbers.place(work, model, tool, recipe, seed)
        if path.exists() and "failed" not in json.loads(path.read_text()):
            continue
        facts = {"tool": tool, "recipe": recipe, "model": model.name, "seed": seed, "versions": versions}
        start = time.perf_counter()
        torch.manual_seed(seed)
        try:
            quantized = load(model)
            facts["bits"] = quantize(
                quantized, quality_numbers.tokens(work, model, "calibration", seed), recipe
            )
            facts["seconds"] = time.perf_counter() - start
            facts |= quality_numbers.summary(*per_token(quantized.eval(), source, evaluation))
            said = f"KL {sum(facts['kl']) / len(facts['kl']):.5f}, {facts['seconds']:.0f} s"
        except Exception as error:
            traceback.print_exc()
            said = facts["failed"] = f"{type(error).__name__}: {error}"[:500]
        quality_numbers.write(path, facts)
        print(f"{tool} {model.name} {recipe} seed {seed}: {said}", file=sys.stderr, flush=True)
        quantized = None
        gc.collect()
