"""The example of images runs as it stands, in fewer steps."""

import runpy
from pathlib import Path
from typing import Any

import pytest

EXAMPLES = Path(__file__).parents[2] / "examples"
pytestmark = pytest.mark.filterwarnings("ignore:.*pin_memory.*:UserWarning")


def run(name: str, **settings: Any) -> Any:
    return runpy.run_path(str(EXAMPLES / f"{name}.py"))["main"](**settings)


def test_images(capsys: pytest.CaptureFixture[str]) -> None:
    found = run("papers/vit", base_steps=10, steps=10, images=64)
    assert list(found) == ["head", "head and LoReFT"]
    assert all(0 <= accuracy <= 1 for accuracy in found.values())
    assert "2,324" in capsys.readouterr().out  # 260 of the head, 516 of each of 4 layers


def test_drawn_shapes() -> None:
    drawn = runpy.run_path(str(EXAMPLES / "papers" / "vit.py"))["drawn"]
    filled, outlined = (drawn(40, 32, filled=f, seed=4) for f in (True, False))
    assert {row["labels"] for row in filled} == {0, 1, 2, 3}
    for one, other in zip(filled, outlined, strict=True):
        assert one["labels"] == other["labels"]
        bright, thin = ((row["pixel_values"].amax(0) > 0).sum() for row in (one, other))
        assert 0 < thin < bright
