"""Who must never know what: the imports of every room, read from the source, and the size of its files."""

import ast
import importlib
import importlib.util
import subprocess
import sys
from pathlib import Path
from typing import NamedTuple

import pytest

import mojax

ROOT = Path(__file__).parents[1]
SIBLINGS = ("transforms", "kernels", "converters", "recipes")
LONGEST = 450  # lines of a file
LAZY = {"transformers", "huggingface_hub", "pyarrow", "matplotlib", "flax", "optax", "orbax"}
JAXPR = {"jaxpr", "eqns", "invars", "outvars", "constvars", "outvar_names"}


def files():
    """Name as it is imported -> path, of every file of the package."""
    found = {}
    for room in ("mojax", *SIBLINGS):
        for path in sorted((ROOT / room).rglob("*.py")):
            parts = path.relative_to(ROOT).with_suffix("").parts
            parts = parts if room == "mojax" else ("mojax", *parts)
            found[".".join(p for p in parts if p != "__init__")] = path
    return found


class Import(NamedTuple):
    name: str  # the module, and for `from a import b` also `a.b`
    at_top: bool  # runs when the file is imported


def imports(tree):
    """Every import of a file; those under `if TYPE_CHECKING` never run."""

    def walk(node, at_top):
        if isinstance(node, ast.Import):
            yield from (Import(alias.name, at_top) for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            module = "." * node.level + (node.module or "")
            yield Import(module, at_top)
            yield from (Import(f"{module}.{alias.name}", at_top) for alias in node.names)
        typing_only = isinstance(node, ast.If) and "TYPE_CHECKING" in ast.unparse(node.test)
        inside = isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.Lambda)
        for child in ast.iter_child_nodes(node):
            yield from walk(child, at_top and not inside and not typing_only)

    return list(walk(tree, True))


def within(name, *packages):
    return any(name == p or name.startswith(p + ".") for p in packages)


ROOMS = ("formats", "models", "transforms", "kernels", "converters")
EVERY_ROOM = tuple(f"mojax.{room}" for room in ROOMS)
TRACING = ("mojax.trace", "mojax.interpret")
FLOW = ("mojax.pipeline", "mojax.cli")
FILES = ("mojax.checkpoint", "mojax.writer", "mojax.header", "safetensors")
TEXT = ("mojax.text", "mojax.tokenizer", "tokenizers", "transformers")
PLAN = ("mojax.planner", "mojax.recipe", "mojax.document")

INTERPRETER = (
    *("mojax.errors", "mojax.trace", "mojax.structure.graph", "mojax.rules", "mojax.view", "mojax.leaf"),
    *("mojax.formats.base", "mojax.kernels"),
)

# Of `mojax`, a file of this kind imports only these.
MAY = {
    "mojax.errors": (),
    "mojax.find": ("mojax.errors",),
    "mojax.document": ("mojax.errors", "mojax.find"),
    "mojax.recipe": ("mojax.errors", "mojax.find", "mojax.document"),
    "mojax.formats": ("mojax.errors", "mojax.formats"),
    "mojax.models": ("mojax.errors", "mojax.models"),
    "mojax.kernels": ("mojax.errors", "mojax.kernels", "mojax.formats"),
    "mojax.rounding": ("mojax.errors", "mojax.compile", "mojax.formats"),
    "mojax.view": (),
    "mojax.rules": ("mojax.errors", "mojax.view"),
    "mojax.structure": ("mojax.errors", "mojax.structure", "mojax.rules", "mojax.view"),
    "mojax.trace": ("mojax.errors", "mojax.structure", "mojax.rules", "mojax.view"),
    "mojax.leaf": ("mojax.formats.base", "mojax.view"),
    "mojax.interpret": (*INTERPRETER, "mojax.loops", "mojax.packed"),
    "mojax.loops": (*INTERPRETER, "mojax.interpret"),
    "mojax.packed": (*INTERPRETER, "mojax.formats.leaf"),
}
# And these never import those.
NEVER = {
    "mojax.errors": ("jax", "numpy"),
    "mojax.find": ("jax", "numpy"),
    "mojax.document": ("jax", "numpy"),
    "mojax.recipe": ("jax", "numpy"),
    "mojax.formats": ("safetensors",),
    "mojax.models": ("safetensors",),
    "mojax.transforms": ("mojax.models", "mojax.converters", *FILES, *TEXT, *FLOW, *PLAN),
    "mojax.converters": ("mojax.transforms", "mojax.kernels", "mojax.models", *TRACING, *TEXT, *FLOW),
    "mojax.pipeline": ("jax.numpy", *TRACING),
    "mojax.cli": ("jax", "numpy", *EVERY_ROOM, *TRACING),
    "mojax.arguments": ("jax", "numpy", *EVERY_ROOM, *TRACING),
}
ORDERS = "mojax.kernels.hadamard_matrices"  # numbers, not a kernel


def complaints(module, source):
    """What a file of this name must not do, one sentence each."""
    tree = ast.parse(source)
    found = imports(tree)
    names = {i.name for i in found}
    said = []
    for room, allowed in MAY.items():
        if within(module, room):
            allowed = (room, *allowed)
            said += [
                f"imports {n}"
                for n in names
                if within(n, "mojax") and not within(n, *allowed) and not any(within(a, n) for a in allowed)
            ]
    for room, banned in NEVER.items():
        if within(module, room):
            said += [f"imports {n}" for n in names if within(n, *banned) and not within(n, ORDERS)]
    if within(module, "mojax.transforms"):
        others = {n for n in names if within(n, "mojax.transforms") and n != "mojax.transforms"}
        said += [f"imports {n}" for n in others if not within(n, "mojax.transforms.base", module)]
        if "model_type" in source:
            said.append("knows model_type")
    if not within(module, *TRACING):
        said += [
            f"imports {n}"
            for n in names
            if within(n, "jax.extend", "jax.core", "jax._src", "jax.interpreters")
        ]
        reads = {node.attr for node in ast.walk(tree) if isinstance(node, ast.Attribute)} & JAXPR
        said += [f"reads .{attribute} of a jaxpr" for attribute in sorted(reads)]
    elif "_proj" in source:
        said.append("knows the name of a layer")
    said += [f"imports {n}" for n in names if within(n, "torch", *SIBLINGS) or n.startswith(".")]
    said += [f"imports {i.name} when imported" for i in found if i.at_top and i.name.split(".")[0] in LAZY]
    if module in EVERY_ROOM or module == "mojax.recipes":
        said += [f"imports {n} in __init__.py" for n in names]
    if not ast.get_docstring(tree):
        said.append("does not say what it is")
    if source.count("\n") > LONGEST:
        said.append(f"has more than {LONGEST} lines")
    if module.rpartition(".")[2] in {"utils", "helpers", "common", "misc", "manager"}:
        said.append("is named for nothing")
    return sorted(set(said))


@pytest.mark.parametrize("module", files())
def test_a_file_knows_only_what_its_room_may(module):
    assert complaints(module, files()[module].read_text()) == []


@pytest.mark.parametrize(
    "module, line, complaint",
    [
        ("mojax.errors", "import mojax.find", "imports mojax.find"),
        ("mojax.errors", "import numpy as np", "imports numpy"),
        ("mojax.recipe", "from mojax.formats import base", "imports mojax.formats.base"),
        ("mojax.recipe", "def f():\n    import jax.numpy", "imports jax.numpy"),
        ("mojax.formats.x", "import mojax.models", "imports mojax.models"),
        ("mojax.formats.x", "from mojax import checkpoint", "imports mojax.checkpoint"),
        (
            "mojax.formats.x",
            "from mojax.converters.modelopt import write",
            "imports mojax.converters.modelopt",
        ),
        ("mojax.models.x", "from mojax.formats.base import QTensor", "imports mojax.formats.base"),
        ("mojax.kernels.x", "from mojax.trace import Site", "imports mojax.trace"),
        ("mojax.trace", "from mojax.models import llama", "imports mojax.models"),
        ("mojax.trace", 'x = "q_proj"', "knows the name of a layer"),
        ("mojax.interpret", "from mojax.formats import nvfp4", "imports mojax.formats.nvfp4"),
        ("mojax.transforms.gptq", "from mojax.transforms.rtn import rtn", "imports mojax.transforms.rtn"),
        ("mojax.transforms.gptq", "from mojax.transforms import awq", "imports mojax.transforms.awq"),
        ("mojax.transforms.gptq", "from mojax.checkpoint import open", "imports mojax.checkpoint"),
        ("mojax.transforms.gptq", "import tokenizers", "imports tokenizers"),
        ("mojax.transforms.gptq", 'x = "model_type"', "knows model_type"),
        ("mojax.converters.x", "from mojax.transforms import rtn", "imports mojax.transforms.rtn"),
        ("mojax.converters.x", "import mojax.interpret", "imports mojax.interpret"),
        ("mojax.pipeline", "import jax.numpy as jnp", "imports jax.numpy"),
        ("mojax.pipeline", "from jax import numpy", "imports jax.numpy"),
        ("mojax.cli", "from mojax.formats import fp8", "imports mojax.formats.fp8"),
        ("mojax.cli", "import jax", "imports jax"),
        ("mojax.model", "from jax.extend import core", "imports jax.extend"),
        ("mojax.model", "x = f.jaxpr", "reads .jaxpr of a jaxpr"),
        ("mojax.model", "def f():\n    import torch", "imports torch"),
        ("mojax.model", "import transforms", "imports transforms"),
        ("mojax.model", "from . import find", "imports ."),
        ("mojax.model", "import transformers", "imports transformers when imported"),
        ("mojax.model", "class A:\n    from matplotlib import pyplot", "imports matplotlib when imported"),
        ("mojax.kernels", "import jax", "imports jax in __init__.py"),
        ("mojax.model", "\n" * 451, "has more than 450 lines"),
        ("mojax.utils", "", "is named for nothing"),
    ],
)
def test_each_rule_catches(module, line, complaint):
    assert complaint in complaints(module, f'"""A file."""\n{line}\n')


def test_a_file_must_open_with_a_sentence():
    assert complaints("mojax.model", "x = 1") == ["does not say what it is"]


@pytest.mark.parametrize(
    "module, line",
    [
        ("mojax.model", "def f():\n    import transformers"),
        ("mojax.model", "from typing import TYPE_CHECKING\nif TYPE_CHECKING:\n    import pyarrow"),
        ("mojax.trace", "from jax.extend import core\nx = f.jaxpr"),
        (
            "mojax.transforms.gptq",
            "from mojax.transforms.base import Transform\nfrom mojax.transforms import base",
        ),
        ("mojax.interpret", "from mojax.formats.base import QTensor\nfrom mojax import errors"),
    ],
)
def test_no_rule_catches_what_is_allowed(module, line):
    assert complaints(module, f'"""A file."""\n{line}\n') == []


def test_importing_mojax_imports_nothing_heavy():
    code = "import sys, mojax, mojax.recipe, mojax.kernels, mojax.find; print(*sys.modules)"
    loaded = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=True
    ).stdout.split()
    assert "mojax.recipe" in loaded
    assert not {"jax", "numpy", "ml_dtypes", "safetensors", "tokenizers", "transformers"} & set(loaded)


def test_every_public_name_can_be_fetched():
    for name, home in mojax._HOME.items():
        assert getattr(mojax, name) is getattr(importlib.import_module(home), name)
        assert name in dir(mojax)
    with pytest.raises(AttributeError, match="quantise"):
        _ = mojax.quantise


def test_no_module_is_named_like_a_public_name():
    """`import mojax.plan` would put the module where the function was."""
    for name in mojax._HOME:
        assert importlib.util.find_spec(f"mojax.{name}") is None


@pytest.mark.parametrize("room", SIBLINGS)
def test_a_sibling_room_is_inside_the_package(room):
    assert (ROOT / "mojax" / room).samefile(ROOT / room)
    assert importlib.import_module(f"mojax.{room}").__name__ == f"mojax.{room}"
