"""The notebooks: saved as they ran, fit to be shown, and, in the slow tests, run again."""

import ast
import os
import re
import sys
from pathlib import Path

import nbformat
import pytest

ROOT = Path(__file__).parents[1]
NOTEBOOKS = sorted((ROOT / "docs" / "notebooks").glob("*.ipynb"))
MACHINE = re.compile(r"/(?:home|root|tmp|opt|usr|work|Users)/|https?://(?!\w)|WARNING")
"""What an output has that tells of the machine, rather than of the notebook."""

each_notebook = pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)


def cells(path):
    return nbformat.read(path, as_version=4).cells


def python_of(cell):
    """The code of a cell without what only IPython reads."""
    lines = [line for line in cell.source.splitlines() if not line.startswith("%%")]
    return "\n".join(re.sub(r"^(\s*)[!%].*", r"\1pass", line) for line in lines)


def test_there_are_those_that_the_site_shows():
    shown = re.findall(r"notebooks/(\w+)\.md", (ROOT / "mkdocs.yml").read_text("utf-8"))
    assert shown == [path.stem for path in NOTEBOOKS] and len(shown) == 4


@each_notebook
def test_it_is_valid_and_was_saved_as_it_ran(path):
    notebook = nbformat.read(path, as_version=4)
    nbformat.validate(notebook)
    code = [cell for cell in notebook.cells if cell.cell_type == "code"]
    assert [cell.execution_count for cell in code] == list(range(1, len(code) + 1))
    outputs = [output for cell in code for output in cell.outputs]
    assert not [output for output in outputs if output.output_type == "error"]
    assert sum("image/png" in output.get("data", {}) for output in outputs) >= 1
    # one title, and a heading before each part
    assert sum(cell.source.startswith("# ") for cell in notebook.cells if cell.cell_type == "markdown") == 1


@each_notebook
def test_its_outputs_tell_nothing_of_the_machine(path):
    for cell in cells(path):
        for output in cell.get("outputs", []):
            text = output.get("text", "") + str(output.get("data", {}).get("text/plain", ""))
            assert not MACHINE.search(text), text


@each_notebook
def test_its_code_is_python_and_installs_the_library_where_it_is_missing(path):
    code = [cell for cell in cells(path) if cell.cell_type == "code"]
    for cell in code:
        ast.parse(python_of(cell))
    assert "%pip install --quiet dcjax" in code[0].source


@pytest.mark.slow
@pytest.mark.heavy
@each_notebook
def test_it_runs(path, tmp_path, monkeypatch):
    from nbclient import NotebookClient

    # as a reader has it: on the devices that are there, with the commands at hand
    monkeypatch.delenv("XLA_FLAGS")
    monkeypatch.setenv("PATH", f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}")
    notebook = nbformat.read(path, as_version=4)
    client = NotebookClient(notebook, timeout=900, kernel_name="python3", resources={"metadata": {"path": tmp_path}})
    client.execute()
    shown = [output for cell in notebook.cells for output in cell.get("outputs", [])]
    assert sum("image/png" in output.get("data", {}) for output in shown) >= 1
    runs = {path.parent.name for path in tmp_path.glob("runs/*/report.html")}
    assert runs == {"own_penalty": {"plain", "widening"}, "own_task": {"sorting"}}.get(path.stem, set())
