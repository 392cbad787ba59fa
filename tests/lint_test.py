"""ruff and pyright find nothing, and would find it: an error planted in every room is seen in every room."""

import json
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
SIBLINGS = ("transforms", "kernels", "converters", "recipes")
TYPED = ["mojax", *(f"mojax/{room}" for room in SIBLINGS)]  # pyright does not walk into links by itself
ROOMS = ("mojax", "mojax/formats", "mojax/models", "kernels/gpu", *SIBLINGS)

PLANTED = '''"""Wrong in two ways."""

count: int = "three"
print(undefined_name)
'''


@pytest.fixture
def planted(tmp_path):
    """A copy of the package with one wrong file in every room."""
    for room in ("mojax", *SIBLINGS):
        shutil.copytree(
            ROOT / room, tmp_path / room, symlinks=True, ignore=shutil.ignore_patterns("__pycache__")
        )
    shutil.copy(ROOT / "pyproject.toml", tmp_path)
    for room in ROOMS:
        (tmp_path / room / "planted.py").write_text(PLANTED)
    return tmp_path


def lines(run, at, *command):
    """What a tool prints, run in the folder `at`."""
    done = subprocess.run([sys.executable, "-m", *command], cwd=at, capture_output=True, text=True)
    assert done.returncode == run, done.stdout + done.stderr
    return done.stdout


def test_ruff_finds_nothing():
    lines(0, ROOT, "ruff", "check", "--no-cache", ".")


def test_ruff_looks_in_every_room(planted):
    found = json.loads(lines(1, planted, "ruff", "check", "--no-cache", "--output-format=json", "."))
    seen = {(Path(f["filename"]).resolve(), f["code"]) for f in found}
    assert {(planted.resolve() / room / "planted.py", "F821") for room in ROOMS} <= seen


def test_pyright_finds_what_is_planted_in_every_room_and_nothing_else(planted):
    """One run for both questions; it takes longer than all other tests of this file."""
    command = ("pyright", "--outputjson", "--pythonpath", sys.executable, *TYPED)
    found = json.loads(lines(1, planted, *command))["generalDiagnostics"]
    seen = {(Path(f["file"]).resolve(), f["rule"]) for f in found}
    wrong = ("reportAssignmentType", "reportUndefinedVariable")
    assert {(planted.resolve() / room / "planted.py", rule) for room in ROOMS for rule in wrong} <= seen
    others = [f for f in found if Path(f["file"]).name != "planted.py"]
    report = (f"{f['file']}:{f['range']['start']['line'] + 1}: {f['message']}" for f in others)
    assert not others, "\n".join(report)
