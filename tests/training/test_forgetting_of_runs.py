"""What a run forgets: evaluations on neutral texts, in its scores, its report and a study."""

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import reftnoise as rn
from reftnoise.evaluation.forgetting import forgetting, neutral_texts
from reftnoise.inference.loading import load_adapted
from reftnoise.training.recipe import EvaluationConfig, Recipe
from reftnoise.training.study.cell import run_cell
from reftnoise.training.study.grid import Cell
from reftnoise.training.study.statistics import mean_interval
from support.command_line import command, quick

KEY_BEFORE = "76a903ae8c33e4cf"
TEXTS = [
    {"prompt": "Where does a bear live?"},
    {"prompt": "Can a bee fly?", "completion": "Yes, it can."},
    {"text": "A cow eats grass in the field, and a bee sits on a flower near the house."},
]


@pytest.fixture(scope="module")
def texts(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("texts") / "texts.jsonl"
    path.write_text("\n".join(map(json.dumps, TEXTS)), encoding="utf-8")
    return path


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = tmp_path_factory.mktemp("runs") / "run"
    assert command(*quick(directory), "--quiet") == 0
    return directory


def entries_of(run: Path) -> list[dict[str, Any]]:
    entries = json.loads((run / "scores.json").read_text(encoding="utf-8"))
    return [entry for entry in entries if entry["task"] == "forgetting"]


def test_the_command_measures_what_the_function_does(
    run: Path, texts: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert command("eval", run, "--forgetting", texts, "--data", "null", "--device", "cpu") == 0
    printed = capsys.readouterr().out
    assert "Forgetting, in nats per token" in printed
    assert "Scores" not in printed
    entries = {(e["data"], e["adapter"]): e for e in entries_of(run)}
    assert len(entries) == 4
    reft_model, tokenizer = load_adapted(run, device="cpu")
    for kind, rows in neutral_texts(tokenizer, texts).items():
        measured = forgetting(reft_model, tokenizer, rows)
        adapted, base = (entries[f"{texts} {kind}", is_on] for is_on in (True, False))
        assert adapted["rows"] == base["rows"] == len(rows)
        expected = {"kl": measured.kl, "change": measured.loss_change}
        expected["loss"] = measured.adapted_loss
        for name, values in expected.items():
            mean, low, high = mean_interval(np.array([values]))
            assert adapted["scores"][name] == pytest.approx(mean, rel=1e-4, abs=1e-6)
            if name == "loss":
                continue
            assert adapted["intervals"][name] == pytest.approx([low, high], rel=1e-4, abs=1e-6)
        assert base["scores"] == pytest.approx({"loss": np.mean(measured.base_loss)}, rel=1e-4)


def test_a_trained_base_is_compared_with_what_it_was(texts: Path, tmp_path: Path) -> None:
    run = tmp_path / "run"
    trained = ("--representations", "[]", "--modules_to_save", "[layers]", "--lr", "1e-4")
    asked = ("--evaluation.forgetting", texts, "--evaluation.data", "null")
    assert command(*quick(run), *trained, *asked, "--quiet") == 0
    entries = {(entry["data"], entry["adapter"]): entry["scores"] for entry in entries_of(run)}
    reft_model, tokenizer = load_adapted(run, device="cpu")
    base, _ = rn.load_base("tiny-chat", device="cpu")
    for kind, rows in neutral_texts(tokenizer, texts).items():
        with pytest.raises(ValueError, match=r"base: .*modules_to_save \['layers'\]"):
            forgetting(reft_model, tokenizer, rows)
        measured = forgetting(reft_model, tokenizer, rows, base=base, batch_size=16)
        assert min(measured.kl) > 0
        adapted, untrained = (entries[f"{texts} {kind}", is_on] for is_on in (True, False))
        assert adapted["kl"] == pytest.approx(np.mean(measured.kl), rel=1e-4, abs=1e-5)
        assert untrained["loss"] == pytest.approx(np.mean(measured.base_loss), rel=1e-4)


def test_the_report_has_a_part_on_it(run: Path) -> None:
    pytest.importorskip("matplotlib", reason="needs matplotlib: pip install 'reftnoise[plots]'")
    from reftnoise.analysis.report.files import read_run
    from reftnoise.analysis.report.run import forgetting as section_of
    from reftnoise.analysis.report.run import scores

    read = read_run(run)
    assert section_of(replace(read, scores=[])).blocks == []
    others = [entry for entry in read.scores if entry["task"] != "forgetting"]
    measured = [
        {"task": "forgetting", "data": "neutral texts", "by": "loss", "adapter": True, "rows": 24,
         "scores": {"kl": 0.5}, "intervals": {"kl": [0.25, 0.75]}}
    ]  # fmt: skip
    both = replace(read, scores=[*others, *measured])
    _, table = section_of(both).blocks
    assert [cell.text for cell in table.rows[0]][1:] == [
        "neutral texts", "loss", "adapted", "24", "0.500 (0.25 to 0.75)",
    ]  # fmt: skip
    assert len(scores(both).blocks[0].rows) == len(others)


def test_a_study_shows_it_next_to_scores(run: Path, texts: Path, tmp_path: Path) -> None:
    from reftnoise._util.options import read_file

    recipe = read_file(Recipe, run / "recipe.yaml")
    evaluation = replace(recipe.evaluation, forgetting=str(texts))
    wanted = replace(recipe, evaluation=evaluation, output_dir=str(tmp_path / "cell"))
    outcome = run_cell(wanted, 1, None, False)
    assert list(outcome["scores"]) == ["exact_match"] + [
        f"{name} on {texts} {kind}" for kind in ("prompts", "texts") for name in ("kl", "change")
    ]


def test_results_of_studies_without_it_keep_their_keys() -> None:
    """The key of a recipe that has only defaults, as it was before there was such an option."""
    assert Cell({}, Recipe()).key == KEY_BEFORE
    assert Cell({}, Recipe(evaluation=EvaluationConfig(forgetting=True))).key != KEY_BEFORE


@pytest.mark.parametrize(
    ("options", "said"),
    [
        (("--forgetting", "nowhere.jsonl"), "evaluation.forgetting nowhere.jsonl: no such file"),
        (("--forgetting", "--task", '{"name": "glue", "subset": "rte"}'), "predicts no texts"),
        (("--data", "null"), "expected evaluation.data, evaluation.lm_eval or evaluation.forg"),
    ],
)
def test_mistakes(
    run: Path, options: tuple[str, ...], said: str, capsys: pytest.CaptureFixture[str]
) -> None:
    more = () if "--task" not in options else ("--data.template", "plain")
    assert command("eval", run, *options, *more) == 2
    [line] = capsys.readouterr().err.splitlines()
    assert said in line
