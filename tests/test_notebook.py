"""The notebooks in examples/ run from the first cell to the last, and are kept without what they printed."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import nbformat
import pytest
from nbclient import NotebookClient

NOTEBOOKS = sorted((Path(__file__).resolve().parents[1] / "examples").glob("*.ipynb"))


def read(path: Path) -> Any:
    return nbformat.read(path, as_version=4)  # type: ignore[no-untyped-call]


def said(cell: Any) -> str:
    """What a cell printed, and the text of what it gave."""
    outputs = cell.get("outputs", [])
    return "".join(str(o.get("text", "")) + str(o.get("data", {}).get("text/plain", "")) for o in outputs)


def test_there_is_one() -> None:
    assert [path.name for path in NOTEBOOKS] == ["front.ipynb"]


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.name)
def test_it_is_kept_without_its_outputs(path: Path) -> None:
    for cell in read(path).cells:
        assert not cell.get("outputs") and cell.get("execution_count") is None


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.name)
def test_it_runs(path: Path, tmp_path: Path) -> None:
    notebook = read(path)
    where = {"metadata": {"path": str(tmp_path)}}
    NotebookClient(notebook, kernel_name="python3", timeout=120, resources=where).execute()
    printed = "\n".join(said(cell) for cell in notebook.cells if cell.cell_type == "code")
    assert "6/6 trials" in printed and "of the prunable weights are gone" in printed and "Sequential(" in printed
