"""The examples of other tasks run as they stand, in fewer steps."""

import runpy
from pathlib import Path
from typing import Any

import pytest

EXAMPLES = Path(__file__).parents[1] / "examples"
pytestmark = pytest.mark.filterwarnings("ignore:.*pin_memory.*:UserWarning")


def run(name: str, **settings: Any) -> Any:
    return runpy.run_path(str(EXAMPLES / f"{name}.py"))["main"](**settings)


def test_glue(capsys: pytest.CaptureFixture[str]) -> None:
    scores = run("glue", seeds=(42, 43), epochs=1)
    assert len(scores) == 2
    assert all(0 <= score <= 1 for score in scores)
    assert "mean ± sd" in capsys.readouterr().out


def test_images(capsys: pytest.CaptureFixture[str]) -> None:
    accuracies = run("vit", steps=40, images=256)
    assert len(accuracies) > 1
    assert all(0 <= accuracy <= 1 for accuracy in accuracies.values())
    assert capsys.readouterr().out
