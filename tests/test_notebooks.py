"""The notebooks run from a clean kernel, and what is stored in them is what ran, with nothing of the machine in it.

    python tests/test_notebooks.py      runs every notebook and stores its outputs anew
"""

from __future__ import annotations

import os
import re
from itertools import groupby
from pathlib import Path

import nbformat
import pytest
from nbclient import NotebookClient
from nbclient.exceptions import CellExecutionError

ROOT = Path(__file__).resolve().parents[1]
NOTEBOOKS = sorted((ROOT / "notebooks").glob("*.ipynb"))
ABSOLUTE = re.compile(r"""(?:^|[\s"'(=:])/[A-Za-z_][\w.-]*/|[A-Za-z]:\\\\|file://""")  # a path from the root of some machine
MACHINE = {"LF_TTY", "FORCE_COLOR", "COLUMNS", "MPLBACKEND"}  # would change what a notebook shows


def executed(path: Path, first: str = "") -> nbformat.NotebookNode:
    """The notebook, run in a new kernel on one thread, after a cell with `first`. Raises with the failing cell."""
    env = {k: v for k, v in os.environ.items() if k not in MACHINE}
    env |= {"OMP_NUM_THREADS": "1", "PYTHONPATH": os.pathsep.join(filter(None, [str(ROOT), env.get("PYTHONPATH")]))}
    notebook = nbformat.read(path, as_version=4)
    if first:
        notebook.cells.insert(0, nbformat.v4.new_code_cell(first))
    client = NotebookClient(notebook, timeout=120, kernel_name="python3", record_timing=False, resources={"metadata": {"path": str(path.parent)}})
    client.execute(env=env)
    return notebook


def texts(notebook: nbformat.NotebookNode) -> list[str]:
    """All that a reader can read in the outputs."""
    outputs = [out for cell in notebook.cells if cell.cell_type == "code" for out in cell.outputs]
    shown = [out.get("text", "") for out in outputs]
    return shown + [value for out in outputs for kind, value in out.get("data", {}).items() if kind.startswith("text/")]


def kinds(notebook: nbformat.NotebookNode) -> list[list[str]]:
    """What kinds of outputs each cell has: these do not depend on the machine. A warning may: matplotlib says so when it first looks for fonts.

    What is printed in one go or in several is one output or several, as the kernel's clock will have it.
    """
    code = [cell for cell in notebook.cells if cell.cell_type == "code"]
    return [[kind for kind, _ in groupby(out.output_type for out in cell.outputs if out.get("name") != "stderr")] for cell in code]


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda p: p.stem)
def test_a_notebook_runs_and_is_stored_as_it_ran(path: Path):
    stored = nbformat.read(path, as_version=4)
    assert kinds(executed(path)) == kinds(stored), f"{path.name} is not stored as it runs; python tests/test_notebooks.py stores it anew"


BROKEN = """
import attrs
from lf.parallel.redistribute import EDGES, _nothing
EDGES["I→R"] = attrs.evolve(EDGES["I→R"], backward=_nothing)
"""


def test_a_wrong_number_fails_the_notebook():
    """Its cells assert what the text says, so it is no picture of a success."""
    with pytest.raises(CellExecutionError, match="AssertionError"):
        executed(ROOT / "notebooks/first.ipynb", BROKEN)


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda p: p.stem)
def test_what_is_stored_names_no_machine_and_holds_no_error(path: Path):
    notebook = nbformat.read(path, as_version=4)
    nbformat.validate(notebook)
    assert notebook.metadata.kernelspec.name == "python3"
    for cell in notebook.cells:
        assert "execution" not in cell.metadata  # time stamps
        if cell.cell_type == "code":
            assert cell.execution_count, "a cell that was never run"
            assert not [out for out in cell.outputs if out.output_type == "error" or out.get("name") == "stderr"]
    for text in texts(notebook):
        assert not ABSOLUTE.search(text), text
    assert path.stat().st_size < 300_000


@pytest.mark.parametrize("text", ["/tmp/x/y.py:3 f", "at (/home/me/a)", "file:///a", 'open("/etc/x")'])
def test_a_path_of_a_machine_is_recognised(text: str):
    assert ABSOLUTE.search(text)
    assert not ABSOLUTE.search("layers.0.attn/norm 2/3 a / b embed/weight </span>")


if __name__ == "__main__":
    for each in NOTEBOOKS:
        result = executed(each)
        result.metadata = {"kernelspec": result.metadata.kernelspec, "language_info": {"name": "python"}}
        nbformat.write(result, each)
        print(each.name)
