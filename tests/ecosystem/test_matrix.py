"""Every cell of the guide's table of architectures is run, and gives what stands there."""

import re
from importlib.metadata import version
from pathlib import Path

import pytest
from packaging.version import Version

from support.matrix import CELLS, REASONS
from support.models.tiny_models import MODELS

GUIDE = Path(__file__).parents[2] / "examples" / "guides" / "architectures.md"
SECTION = GUIDE.read_text(encoding="utf-8").partition("\n## The matrix\n")[2].partition("\n## ")[0]
HEADING, _, *ROWS = [
    [cell.strip() for cell in line.strip("|").split("|")]
    for line in re.findall(r"(?:^\|.*\n)+", SECTION, re.MULTILINE)[0].splitlines()
]
TABLE = {name: dict(zip(HEADING[1:], cells, strict=True)) for name, *cells in ROWS}


def test_the_table_has_every_architecture_and_explains_every_reason() -> None:
    assert HEADING[1:] == list(CELLS)
    assert list(TABLE) == list(MODELS)
    words = {word for cells in TABLE.values() for word in cells.values()} - {"ok"}
    assert set(REASONS) <= words
    assert [word for word in words if f"`{word}`" not in SECTION] == []


@pytest.mark.skipif(
    Version(version("transformers")) < Version("5.23"), reason="the table is of transformers 5.23"
)
@pytest.mark.filterwarnings("ignore:.*gradient_checkpointing.*deprecated:FutureWarning")
# Pixels and sounds need no gradient, and neither does what a frozen first layer makes of them.
@pytest.mark.filterwarnings("ignore:None of the inputs have requires_grad=True:UserWarning")
@pytest.mark.parametrize("column", CELLS)
@pytest.mark.parametrize("architecture", MODELS)
def test_a_cell_says_what_happens(architecture: str, column: str) -> None:
    assert CELLS[column](architecture) == TABLE[architecture][column]
