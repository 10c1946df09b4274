"""The examples with TRL run as they stand, in fewer steps."""

import runpy
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("trl", reason="needs trl: pip install 'reftnoise[trl]'")

import reftnoise as rn
from support.trl_runs import MARKS, base_model

pytestmark = MARKS

EXAMPLES = Path(__file__).parents[2] / "examples" / "trl"


def run(name: str, monkeypatch: pytest.MonkeyPatch, **settings: Any) -> None:
    monkeypatch.syspath_prepend(str(EXAMPLES))
    runpy.run_path(str(EXAMPLES / f"{name}.py"))["main"](**settings)


def test_supervised_training_then_preferences(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    first, second = str(tmp_path / "sft"), str(tmp_path / "dpo")
    run("sft", monkeypatch, steps=20, output=first)
    assert "🌲" in capsys.readouterr().out
    run("dpo", monkeypatch, steps=5, adapter=first, output=second)
    assert "margin" in capsys.readouterr().out
    rn.ReftModel.from_pretrained(base_model(), second)


@pytest.mark.parametrize(
    ("name", "steps", "said"),
    [("dpo", 5, "step   5"), ("grpo", 1, "reward"), ("reward", 2, "accuracy")],
)
def test_an_example(
    name: str,
    steps: int,
    said: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    run(name, monkeypatch, steps=steps, output=str(tmp_path / "adapter"))
    assert said in capsys.readouterr().out
    assert (tmp_path / "adapter" / "reft_config.json").is_file()
