"""The notebooks run from top to bottom, and the outputs that they show are those of the run."""

import re
from pathlib import Path

import nbclient
import nbformat
import pytest

DOCS = Path(__file__).parents[1] / "docs"
NOTEBOOKS = {"quickstart.ipynb": 2, "any-function.ipynb": 2, "compose.ipynb": 2}  # pictures in each

pytestmark = pytest.mark.filterwarnings("default")  # of Jupyter's own packages


def shown(notebook):
    """What each code cell shows: what it prints, every number as `#`, and the kinds of its pictures."""
    cells = []
    for cell in notebook.cells:
        if cell.cell_type == "code":
            printed = "".join(o.get("text", "") for o in cell.outputs)
            pictures = [kind for o in cell.outputs for kind in o.get("data", {}) if kind.startswith("image/")]
            text = re.sub(r"\d+(\.\d+)?(e-?\d+)?", "#", printed)
            cells.append((re.sub(r"[ #]*#[ #]*", " # ", text), pictures))
    return cells


def committed(name):
    return nbformat.read(DOCS / name, as_version=4)


def test_every_notebook_is_tested():
    assert {path.name for path in DOCS.glob("*.ipynb")} == set(NOTEBOOKS)


@pytest.mark.parametrize("name", NOTEBOOKS)
def test_a_notebook_runs_and_shows_what_is_committed(name, tmp_path, monkeypatch):
    monkeypatch.setenv("IPYTHONDIR", str(tmp_path / "ipython"))
    work = tmp_path / "work"
    work.mkdir()
    notebook = committed(name)
    options = {"timeout": 300, "kernel_name": "python3", "resources": {"metadata": {"path": str(work)}}}
    nbclient.NotebookClient(notebook, **options).execute()  # raises when a cell does
    assert shown(notebook) == shown(committed(name))
    assert not list(work.iterdir()), "the notebook leaves files behind"


@pytest.mark.parametrize("name, pictures", NOTEBOOKS.items())
def test_committed_outputs_are_whole_and_name_no_machine(name, pictures):
    notebook = committed(name)
    nbformat.validate(notebook)
    code = [cell for cell in notebook.cells if cell.cell_type == "code"]
    assert [cell.execution_count for cell in code] == list(range(1, len(code) + 1))
    outputs = [output for cell in code for output in cell.outputs]
    assert {output.output_type for output in outputs} <= {"stream", "display_data", "execute_result"}
    assert not [o for o in outputs if o.output_type == "stream" and o.name == "stderr"]
    assert sum("image/png" in output.get("data", {}) for output in outputs) == pictures
    text = (DOCS / name).read_text()
    assert not re.findall(r"/(?:tmp|home|root|Users|var|work|private)/", text)
    assert len(text) < 200_000
