"""Rotated inputs in compressed-tensors: the `transform_config` of config.json, and the matrices it needs.

    x -> x H / sqrt(n)    in blocks of n = head_dim channels, summed in float32, in the dtype of x

Specification: compressed-tensors 0.20. A group is a kind of rotation with the modules that it is applied to:
at "input" when a linear runs; what was at "weight_input" and "weight_output" is folded into the tensors, and
only a record. H is Sylvester's for the type "hadamard"; for "random-hadamard" servers read it from
`<module>.<group>_input.weight`.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np

from mojax.errors import InputError
from mojax.formats.base import Scheme
from mojax.kernels.hadamard_matrices import factors, matrix

ROTATES = ("vllm",)  # SGLang, TensorRT-LLM and transformers 5.23 do not look at transform_config
LARGEST = 1024  # of a matrix that a file holds with every linear
FUSED = (16, 32, 64, 128)  # orders for which vLLM's kernel for NVFP4 reads the matrix


def matches(module: str, entry: str) -> bool:
    """Whether a target or an ignored entry means a Linear module."""
    if entry.startswith("re:"):
        return re.match(entry.removeprefix("re:"), module) is not None
    return entry == module or entry == "Linear"


def power_of_two(n: int) -> bool:
    return n & (n - 1) == 0


def config(blocks: Mapping[str, int], ignore: Sequence[str]) -> dict[str, Any]:
    """The `transform_config` of modules with the orders of their blocks, 0 for none; empty if none rotates.

    One order for all: a group for every "Linear" that is not in `ignore`; else groups by full names.
    """
    members: dict[int, list[str]] = {}
    for module, block in blocks.items():
        members.setdefault(block, []).append(module)
    whole = len(members) == 1
    groups = {
        group(block): {
            "type": "hadamard" if power_of_two(block) else "random-hadamard",
            "head_dim": block,
            "apply": [
                {
                    "targets": ["Linear"] if whole else modules,
                    "location": "input",
                    "ignore": list(ignore) if whole else [],
                }
            ],
        }
        for block, modules in members.items()
        if block
    }
    return {"config_groups": groups} if groups else {}


def group(block: int) -> str:
    """The name of our group, which is also part of the names of tensors."""
    return f"hadamard_{block}"


def parse(found: Mapping[str, Any] | None) -> Callable[[str], int]:
    """The order of the blocks that rotate the input of a module; 0 for none.

    Raises:
      InputError: a rotation that is not one of inputs by Hadamard blocks of a known order.
    """
    where = "quantization_config.transform_config"
    online: list[tuple[int, Mapping[str, Any]]] = []
    groups = _object(where, found or {}).get("config_groups") or {}
    for name, scheme in _object(f"{where}.config_groups", groups).items():
        where = f"quantization_config.transform_config.config_groups.{name}"
        for args in _object(where, scheme).get("apply") or ():
            location = _object(f"{where}.apply", args).get("location")
            if location in ("weight_input", "weight_output"):
                continue
            if location != "input":
                raise InputError(
                    f"{where}: is applied at {location!r}; only rotations of the inputs of linears are read"
                )
            online.append((_block(where, name, scheme), args))

    def block(module: str) -> int:
        hits = [
            n
            for n, args in online
            if any(matches(module, t) for t in _listed(args.get("targets")))
            and not any(matches(module, t) for t in _listed(args.get("ignore")))
        ]
        if len(hits) > 1:
            raise InputError(
                f"quantization_config.transform_config: rotates the input of {module} {len(hits)} times; "
                "such checkpoints are not read"
            )
        return hits[0] if hits else 0

    return block


def _object(where: str, found: Any) -> Mapping[str, Any]:
    if not isinstance(found, Mapping):
        raise InputError(f"{where} is {found!r:.80}, needed an object")
    return found


def _listed(entries: Any) -> Sequence[str]:
    return [entries] if isinstance(entries, str) else entries or ()


def _block(where: str, name: str, scheme: Mapping[str, Any]) -> int:
    """The order of the blocks of a group whose rotation we know."""
    kind, block = scheme.get("type"), scheme.get("head_dim")
    if not isinstance(block, int) or block < 2:
        raise InputError(f"{where}.head_dim is {block!r}; only blocks of a given number of channels are read")
    if kind == "hadamard" and power_of_two(block) and not scheme.get("randomize"):
        return block
    if kind == "random-hadamard" and name == group(block) and factors(block) is not None:
        return block
    raise InputError(
        f"{where}: is a {kind!r} of {block} channels; only Sylvester's matrices (type 'hadamard', a power of "
        "two, not randomized) are read, and those that mojax wrote; start from the unquantized checkpoint"
    )


def stored(scheme: Scheme) -> bool:
    """Whether a file holds the matrix: where a server reads it, as it does not know it or has a kernel that
    wants it."""
    nvfp4 = scheme.weights.name == "nvfp4" and scheme.inputs is not None
    known = power_of_two(scheme.hadamard) and not (nvfp4 and scheme.hadamard in FUSED)
    return bool(scheme.hadamard) and not known


def leaf(block: int) -> str:
    """The name of the matrix beside a module."""
    return f"{group(block)}_input.weight"


def known(block: int) -> np.ndarray:
    """H, int8 `[block, block]` of +1 and -1, symmetric."""
    found = matrix(block)
    assert found is not None  # the plan, or `parse`, has looked
    return found


def check(module: str, block: int, get: Callable[[str], np.ndarray]) -> None:
    """The matrix in a file is the one that is multiplied by here.

    Raises:
      InputError: it is not, or is missing where it has to be there.
    """
    name = f"{module}.{leaf(block)}"
    try:
        found = np.asarray(get(name))
    except KeyError:
        if power_of_two(block):
            return  # every reader knows it
        raise InputError(f"{name} is missing, transform_config says it rotates the input") from None
    if found.shape != (block, block) or not np.array_equal(found.astype(np.float32), known(block)):
        raise InputError(f"{name} is not the matrix that mojax rotates with; such checkpoints are not read")
