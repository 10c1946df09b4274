"""A recipe is resolved once, whatever is done with it."""

from collections import Counter
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

import reftnoise as rn
from reftnoise._util.options import read_file
from reftnoise.data import sources
from reftnoise.data.tasks.text import TextTask
from reftnoise.training import resolved_run
from reftnoise.training.recipe import EvaluationConfig, Recipe, TrainingConfig
from reftnoise.training.resolved_run import ResolvedRun, scored_by, with_default_edit
from reftnoise.training.study.grid import Study, cells
from reftnoise.training.study.space import Tuning
from support.command_line import command, quick

LOREFT = {"layer": "all", "intervention": "loreft", "low_rank_dimension": 4}


def test_task_and_rows_are_read_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    calls = Counter[str]()
    get_task, load_rows, question = resolved_run.get_task, sources.load_rows, TextTask.question

    def counted_task(spec: Any) -> Any:
        calls["task"] += 1
        return get_task(spec)

    def counted_rows(source: Any, **options: Any) -> Any:
        if isinstance(source, str):  # and not rows
            calls[f"{source} {options['split']}"] += 1
        return load_rows(source, **options)

    def counted_question(self: TextTask, row: Mapping[str, Any]) -> Any:
        calls[f"question {row['prompt']}"] += 1
        return question(self, row)

    monkeypatch.setattr(resolved_run, "get_task", counted_task)
    monkeypatch.setattr(sources, "load_rows", counted_rows)
    monkeypatch.setattr(TextTask, "question", counted_question)
    assert command(*quick(tmp_path / "run"), "--quiet") == 0
    scored = list(load_rows("tiny-chat", split="test[:8]"))
    expected = {"task": 1, "tiny-chat train": 1, "tiny-chat test[:8]": 1}
    expected |= {f"question {row['prompt']}": 1 for row in scored}
    assert {name: calls[name] for name in expected} == expected
    assert {name for name in calls if "question" not in name} == set(list(expected)[:3])
    calls.clear()
    assert command("eval", tmp_path / "run", "--base", "--quiet") == 0
    del expected["tiny-chat train"]
    assert calls == expected


@pytest.mark.parametrize(
    ("task", "edit"),
    [
        ("text", LOREFT | {"positions": "l1"}),
        ({"name": "classification", "labels": ["good", "bad"]}, LOREFT | {"positions": "l1"}),
        ({"name": "glue", "subset": "sst2"}, LOREFT | {"positions": "all"}),
        ("raw_text", LOREFT | {"positions": "all+decode"}),
        ("preference", {"layer": "all", "intervention": "bias", "positions": "all+decode"}),
    ],
)
def test_a_recipe_that_names_no_units_has_those_of_its_task(task: Any, edit: Any) -> None:
    units = [edit]
    recipe = Recipe(task=task)
    assert ResolvedRun(recipe).recipe.representations == units
    study = Study(recipe=recipe, axes={"rate": {"high": {"training": {"learning_rate": 0.1}}}})
    assert [cell.recipe.representations for cell in cells(study)] == [units]
    assert Tuning(recipe=recipe).searched_recipe().representations == units
    others: list[dict[str, Any]] = [
        {"representations": [{"intervention": "neftune"}]},
        {"peft": {"peft_type": "lora"}},
        {"modules_to_save": ["lm_head"]},
    ]
    for other in others:
        named = replace(recipe, **other)
        assert with_default_edit(named) is named


def test_a_run_says_what_it_trained_by_default(tmp_path: Path) -> None:
    run = tmp_path / "run"
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text("data: {train: tiny-chat, template: chat}\ntraining: {max_steps: 2}\n")
    assert command("train", recipe, "--output_dir", run, "--device", "cpu", "--quiet") == 0
    written = read_file(Recipe, run / "recipe.yaml")
    assert written == ResolvedRun(written).recipe
    assert [entry["positions"] for entry in written.representations] == ["l1"]
    base = rn.load_tiny_model()[0]
    reft_model = rn.ReftModel.from_pretrained(base, run / "adapter")
    assert len(reft_model.engine.units) == base.config.num_hidden_layers
    assert command("train", "--output_dir", run, "--resume", "--quiet") == 2  # it is finished


def test_raw_texts_are_scored_by_loss() -> None:
    run = ResolvedRun(Recipe(task="raw_text"))
    assert scored_by(run.recipe, run.task) == "loss"


@pytest.mark.parametrize("task", ["raw_text", "preference", "gsm8k"])
@pytest.mark.parametrize("by", ["generation", "loss", "likelihood"])
def test_a_way_that_a_recipe_names_is_not_replaced(task: str, by: Any) -> None:
    run = ResolvedRun(Recipe(task=task, evaluation=EvaluationConfig(by=by)))
    assert scored_by(run.recipe, run.task) == by


def test_bf16_needs_no_gpu() -> None:
    """transformers refuses it on a processor unless it is told that this is meant."""
    arguments = ResolvedRun(Recipe(training=TrainingConfig(bf16=True))).arguments
    assert arguments.bf16
    assert arguments.use_cpu is not torch.accelerator.is_available()
