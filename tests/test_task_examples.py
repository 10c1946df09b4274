"""The examples of other tasks run as they stand, in fewer steps."""

import json
import math
import runpy
from pathlib import Path
from typing import Any

import numpy as np
import pytest

EXAMPLES = Path(__file__).parents[1] / "examples"
pytestmark = pytest.mark.filterwarnings("ignore:.*pin_memory.*:UserWarning")


def run(name: str, **settings: Any) -> Any:
    return runpy.run_path(str(EXAMPLES / f"{name}.py"))["main"](**settings)


def lines(path: Path, rows: list[dict[str, Any]]) -> str:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return str(path)


def test_glue_learns_made_up_reviews(capsys: pytest.CaptureFixture[str]) -> None:
    scores = run("glue", seeds=(42,), epochs=10)
    assert scores[0] > 0.65
    shown = capsys.readouterr().out
    assert f"{scores[0]:.4f} ± 0.0000" in shown


def test_glue_on_files_of_pairs(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    rows = [{"a": f"word {n}", "b": f"word {n // 2}", "score": n / 4} for n in range(16)]
    scores = run(
        "glue",
        task="stsb",
        train=lines(tmp_path / "train.jsonl", rows),
        validation=lines(tmp_path / "dev.jsonl", rows),
        texts=("a", "b"),
        label="score",
        seeds=(1, 2),
        epochs=1,
    )
    assert len(scores) == 2
    mean, spread = sum(scores) / 2, abs(scores[0] - scores[1]) / math.sqrt(2)
    assert f"{mean:.4f} ± {spread:.4f}" in capsys.readouterr().out


def test_glue_on_names_of_classes(tmp_path: Path) -> None:
    rows = [{"prompt": f"it is {word}", "output": word} for word in ["good", "bad"] * 6]
    path = lines(tmp_path / "rows.jsonl", rows)
    files = {"train": path, "validation": path, "texts": ("prompt",), "label": "output"}
    (score,) = run("glue", **files, seeds=(0,), epochs=15)
    assert score == 1.0
    with pytest.raises(SystemExit, match="--train and --validation go together"):
        run("glue", train=path)


def test_glues_scores_are_their_formulas() -> None:
    score = runpy.run_path(str(EXAMPLES / "glue.py"))["score"]
    labels = np.array([1, 1, 1, 0, 0, 0, 0, 1])
    logits = np.eye(2)[[1, 1, 0, 0, 0, 1, 0, 1]]
    assert score("accuracy", logits, labels) == 6 / 8
    assert score("matthews", logits, labels) == pytest.approx((3 * 3 - 1 * 1) / 16)
    assert score("matthews", np.eye(2)[[0] * 8], labels) == 0.0
    numbers = np.array([[1.0], [2.0], [4.0]])
    pearson = (-4 / 3 * -1 + 5 / 3 * 1) / math.sqrt((16 + 1 + 25) / 9 * 2)
    assert score("pearson", numbers, np.array([0.0, 1.0, 2.0])) == pytest.approx(pearson)


def test_images(capsys: pytest.CaptureFixture[str]) -> None:
    found = run("vit", base_steps=10, steps=10, images=64)
    assert list(found) == ["head", "head and LoReFT"]
    assert all(0 <= accuracy <= 1 for accuracy in found.values())
    assert "2,324" in capsys.readouterr().out  # 260 of the head, 516 of each of 4 layers


def test_drawn_shapes() -> None:
    drawn = runpy.run_path(str(EXAMPLES / "vit.py"))["drawn"]
    filled, outlined = (drawn(40, 32, filled=f, seed=4) for f in (True, False))
    assert {row["labels"] for row in filled} == {0, 1, 2, 3}
    for one, other in zip(filled, outlined, strict=True):
        assert one["labels"] == other["labels"]
        bright, thin = ((row["pixel_values"].amax(0) > 0).sum() for row in (one, other))
        assert 0 < thin < bright
