"""Every tutorial runs from top to bottom, and is stored as it ran."""

from __future__ import annotations

import os
from pathlib import Path

import nbformat
import pytest
from nbclient import NotebookClient

FOLDER = Path(__file__).resolve().parents[1] / "tutorials"
NOTEBOOKS = sorted(path.name for path in FOLDER.glob("*.ipynb"))


def code_cells(name: str) -> list[nbformat.NotebookNode]:
    notebook = nbformat.read(FOLDER / name, as_version=4)
    return [cell for cell in notebook.cells if cell.cell_type == "code"]


def test_there_are_tutorials() -> None:
    assert "01_first_patch.ipynb" in NOTEBOOKS


@pytest.mark.slow
@pytest.mark.parametrize("name", NOTEBOOKS)
def test_a_tutorial_runs_from_top_to_bottom(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TSTLENS_NO_IMAGES", "1")  # the figures are made, not drawn as images
    side_by_side = "PYTEST_XDIST_WORKER" in os.environ
    monkeypatch.setenv("OMP_NUM_THREADS", "1" if side_by_side else "2")
    if "TSTLENS_REFERENCE" not in os.environ:  # as tests/conftest.py finds it
        monkeypatch.setenv("TSTLENS_REFERENCE", str(FOLDER.parents[1] / "shared" / "reference"))
    notebook = nbformat.read(FOLDER / name, as_version=4)
    for cell in notebook.cells if side_by_side else []:  # threads would wait for other processes
        cell.source = cell.source.replace("set_num_threads(2)", "set_num_threads(1)")
    client = NotebookClient(
        notebook, timeout=1800, kernel_name="python3", resources={"metadata": {"path": FOLDER}}
    )
    client.execute()  # raises CellExecutionError with the traceback of the cell that failed


@pytest.mark.parametrize("name", NOTEBOOKS)
def test_a_tutorial_is_stored_with_its_outputs(name: str) -> None:
    cells = code_cells(name)
    assert all(cell.execution_count for cell in cells), "a cell was never run"
    kinds = [kind for cell in cells for out in cell.outputs for kind in out.get("data", {})]
    assert not any(out.output_type == "error" for cell in cells for out in cell.outputs)
    assert kinds.count("image/png") >= 3, "code hosts show images, not plotly"
    assert kinds.count("image/png") == kinds.count("application/vnd.plotly.v1+json")
