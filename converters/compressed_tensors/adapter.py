"""The low-rank branches of a compressed-tensors checkpoint: a LoRA adapter of PEFT in its folder `adapter/`.

    adapter/adapter_config.json         r = lora_alpha, so that the factor lora_alpha / r is 1
    adapter/adapter_model.safetensors   base_model.model.<module>.lora_A.weight [r, in], lora_B [out, r]

The dialect itself has no word for a branch; vLLM, SGLang and PEFT load such a folder over the model.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Collection, Mapping
from typing import Any

from mojax.checkpoint import Checkpoint, join_shards, read_json
from mojax.errors import InputError
from mojax.header import read_header

FOLDER, CONFIG, TENSORS = "adapter", "adapter_config.json", "adapter_model.safetensors"
PREFIX = "base_model.model."
LARGEST = 512  # the largest rank that vLLM serves
LOADS = ("vllm", "sglang", "transformers")
NOTE = (
    f"the folder {FOLDER}/ is part of this checkpoint: without this LoRA adapter the weights lack their "
    "low-rank branch; serve both, as in vllm serve OUT --enable-lora --max-lora-rank RANK --lora-modules "
    "svd=OUT/adapter, and ask for the model svd"
)


def branch(module: str) -> tuple[str, str]:
    """The names of the tensors A and B of a module."""
    return f"{PREFIX}{module}.lora_A.weight", f"{PREFIX}{module}.lora_B.weight"


def refusal(target: str, rank: int) -> str | None:
    """Why `target` cannot run branches of this rank; None when it can, or there are none."""
    if not rank:
        return None
    if target not in LOADS:
        return (
            f"{target} cannot load a branch of rank {rank} in the compressed-tensors dialect, where it is a "
            "LoRA adapter; use --format=modelopt, or --target=vllm"
        )
    if target == "vllm" and rank > LARGEST:
        return f"vllm cannot load a branch of rank {rank}: it serves adapters up to rank {LARGEST}; use that"
    return None


def settings(modules: Mapping[str, int], others: Collection[str]) -> dict[str, Any]:
    """adapter_config.json.

    Args:
      modules: those with a branch, and its rank.
      others: Linear modules without. The last parts of names do where they tell the two apart.
    """
    ends = {m.rpartition(".")[2] for m in modules}
    apart = ends.isdisjoint(m.rpartition(".")[2] for m in others)
    rank = max(modules.values())
    return {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
        "base_model_name_or_path": None,
        "inference_mode": True,
        "r": rank,
        "lora_alpha": rank,
        "lora_dropout": 0.0,
        "bias": "none",
        "fan_in_fan_out": False,
        "use_rslora": False,
        "use_dora": False,
        "modules_to_save": None,
        "target_modules": sorted(ends if apart else modules),
    }


def joined(files: Checkpoint) -> Checkpoint:
    """The checkpoint with the tensors of its adapter, if it has one.

    Raises:
      InputError: an adapter that is not one of plain branches with the factor 1.
    """
    folder = files.folder / FOLDER
    if not (folder / CONFIG).is_file():
        return files
    found = read_json(folder / CONFIG)
    odd = [key for key in ("use_rslora", "use_dora", "rank_pattern", "alpha_pattern", "modules_to_save")]
    odd = [key for key in odd if found.get(key)]
    if found.get("peft_type") != "LORA" or found.get("r") != found.get("lora_alpha") or odd:
        raise InputError(
            f"{folder / CONFIG}: needed a LORA adapter with r = lora_alpha, found peft_type "
            f"{found.get('peft_type')!r}, r {found.get('r')!r}, lora_alpha {found.get('lora_alpha')!r}"
            f"{''.join(f', {key} {found[key]!r}' for key in odd)}; others are not read: move it away"
        )
    if any(n.startswith(PREFIX) for n in files.entries):  # of the hub, which gives headers alone
        return files
    if not (folder / TENSORS).is_file():
        raise InputError(f"{folder / TENSORS}: is missing, {CONFIG} beside it says there is an adapter")
    entries = join_shards({folder / TENSORS: read_header(folder / TENSORS)}, None, folder / TENSORS)
    if strange := [n for n in entries if not n.startswith(PREFIX)]:
        raise InputError(f"{folder / TENSORS}: {strange[0]!r} is not a tensor of a LoRA adapter")
    return dataclasses.replace(files, entries=files.entries | entries)
