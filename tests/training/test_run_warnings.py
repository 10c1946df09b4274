"""What a run says at its end: a loss that has not fallen, and answers that are all one."""

import json
import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from reftnoise.training.run_scores import one_answer
from reftnoise.training.steps.watching import unfallen
from support.command_line import command, quick


@pytest.mark.parametrize(("slope", "is_flat"), [(0.0, True), (0.02, True), (-0.05, False)])
def test_a_trend_is_told_from_noise(slope: float, is_flat: bool) -> None:
    """In most of many runs: with k = 10 of 100 losses, σ 1, the error is √0.2."""
    runs = np.random.default_rng(0).normal(size=(200, 100)) + slope * np.arange(100)
    share = np.mean([unfallen(list(run)) is not None for run in runs])
    assert share > 0.75 if is_flat else share < 0.01


def test_the_means_and_their_error() -> None:
    losses = [2.0, 4.0] * 10
    assert unfallen(losses) == (
        "the loss did not fall: it was 3 in the first tenth of the steps and 3 in the last, "
        f"± {math.sqrt(4 / 2):.2g}"
    )
    assert unfallen([1.0] * 20) is not None
    assert unfallen(list(np.linspace(2, 1, 20))) is None
    assert unfallen([1.0, 2.0, 3.0]) is None  # too few
    assert unfallen([1.0] * 19 + [math.nan]) is None  # which is said elsewhere


def rows(predictions: str, answers: str, adapter: bool = True) -> list[dict[str, Any]]:
    pairs = zip(predictions, answers, strict=True)
    return [{"adapter": adapter, "prediction": p, "answer": a, "right": p == a} for p, a in pairs]


def test_answers_that_are_all_one() -> None:
    assert one_answer(rows("b" * 10, "ab" * 5)) == "all 10 answers are 'b', of which 5 are right"
    of_base = rows("ab" * 5, "ab" * 5, adapter=False)
    assert one_answer([*rows("b" * 10, "ab" * 5), *of_base]) is not None
    assert one_answer(rows("b" * 9 + "a", "ab" * 5)) is None
    assert one_answer(rows("b" * 10, "b" * 10)) is None
    assert one_answer(rows("b" * 9, "ababababa")) is None
    assert (
        one_answer([{"adapter": True, "prompt": "", "answer": a, "loss": 1.0} for a in "ab" * 5])
        is None
    )


def test_a_run_says_so_and_keeps_it(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """With a rate of almost 0, the embedded model stays as it was, and answers in words."""
    path = tmp_path / "rows.jsonl"
    questions = ["Can a bee fly?", "Can a cow fly?"] * 6
    labels = ["no", "yes"] * 6
    lines = [{"prompt": q, "completion": a} for q, a in zip(questions, labels, strict=True)]
    path.write_text("\n".join(map(json.dumps, lines)), encoding="utf-8")
    more = {
        "task": '{"name": "classification", "labels": ["yes", "no", "none"]}',
        "data": path, "evaluation.data": path, "split": "test", "lr": 1e-12,
        "max_steps": 20, "logging_steps": 1, "batch_size": 12, "device": "cpu",
    }  # fmt: skip
    options = [part for name, value in more.items() for part in (f"--{name}", value)]
    directory = tmp_path / "run"
    assert command(*quick(directory), "--quiet", *options) == 0
    said = capsys.readouterr().err
    warnings = json.loads((directory / "summary.json").read_text(encoding="utf-8"))["warnings"]
    assert "the loss did not fall" in warnings[0]
    assert all(f"{directory}: {warning}" in said for warning in warnings)
    assert "try a smaller training.learning_rate than 1e-12" in warnings[0]
    predictions = (directory / "predictions.jsonl").read_text(encoding="utf-8").splitlines()
    problem = one_answer([json.loads(line) for line in predictions])
    assert warnings[1:] == ([] if problem is None else [f"{problem}; {warnings[0].split('; ')[1]}"])


def test_a_run_that_learns_says_nothing(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    options = ("--max_steps", 30, "--logging_steps", 1, "--split", "test[:12]")
    assert command(*quick(tmp_path / "run"), "--quiet", *options) == 0
    assert json.loads((tmp_path / "run" / "summary.json").read_text())["warnings"] == []
    assert [r for r in caplog.records if r.name == "reftnoise.training.run"] == []
