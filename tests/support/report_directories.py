"""Directories of a run and of a study, as training and studies write them."""

import json
from pathlib import Path
from typing import Any

import numpy as np

import reftnoise as rn
from reftnoise.training.recipe import DataConfig, Recipe, TrainingConfig
from reftnoise.training.study.grid import Cell, Study, cells

LOREFT = {
    "layer": "all",
    "intervention": "loreft",
    "low_rank_dimension": 4,
    "positions": "f1+l1",
}
SYMNOISE = {"intervention": "symnoise", "alpha": 20.0}

Line = dict[str, Any]


def write_lines(path: Path, lines: list[Line]) -> None:
    text = "".join(json.dumps(line, ensure_ascii=False) + "\n" for line in lines)
    path.write_text(text, encoding="utf-8")


def make_run(directory: Path, units: list[Line] | None = None) -> Path:
    """A run on the embedded model, whose adapter is a fresh one, with a log that is made up."""
    units = [LOREFT, SYMNOISE] if units is None else units
    recipe = Recipe(
        dtype="float32",
        representations=units,
        data=DataConfig(train="tiny-chat", template="chat"),
        training=TrainingConfig(per_device_train_batch_size=4),
    )
    directory.mkdir(parents=True)
    (directory / "recipe.yaml").write_text(recipe.to_yaml(), encoding="utf-8")
    reft_model = rn.get_reft_model(rn.load_tiny_model()[0], rn.ReftConfig(units))
    reft_model.save_pretrained(directory / "adapter")
    log: list[Line] = []
    for step in range(10, 60, 10):
        log.append({"step": step, "loss": 30.0 / step**2, "learning_rate": 1e-3 * (60 - step) / 60,
                    "grad_norm": 1.0, "tokens_per_second": 1500.0 + step})  # fmt: skip
        log.append({"step": step, "eval_loss": 20.0 / step})
    write_lines(directory / "log.jsonl", log)
    units_count, _, total = reft_model.parameter_counts()
    summary = {
        "parameters": {"units": units_count, "base": 0, "total": total},
        "seconds": 754.0,
        "tokens": 123_456,
        "peak_memory_bytes": 3 * 2**30,
        "machine": {"date": "2026-11-21", "torch": "2.13.0", "processor": None},
    }
    (directory / "summary.json").write_text(json.dumps(summary), encoding="utf-8")
    questions = rn.load_tiny_examples("test")[:12]
    scores, predictions = [], []
    for is_adapted in (True, False):
        texts = [q.completion if is_adapted else f"<b>{q.words}</b>" for q in questions]
        scores.append({"task": "text", "data": "tiny-chat", "split": "test", "by": "generation",
                       "adapter": is_adapted, "scores": {"accuracy": float(is_adapted)},
                       "rows": len(texts), "right": "01"[is_adapted] * len(texts)})  # fmt: skip
        predictions += [
            {"adapter": is_adapted, "prompt": question.prompt, "text": text, "prediction": text,
             "answer": question.completion, "right": is_adapted}
            for question, text in zip(questions, texts, strict=True)
        ]  # fmt: skip
    scores.append({"task": "lm_eval/boolq", "adapter": True, "scores": {"acc": 0.5}})
    (directory / "scores.json").write_text(json.dumps(scores), encoding="utf-8")
    write_lines(directory / "predictions.jsonl", predictions)
    return directory


def make_study(
    directory: Path,
    axes: tuple[str, ...] = ("method", "noise", "data"),
    recipe: Recipe | None = None,
) -> Path:
    """2 methods × 2 noises × 2 datasets × 3 seeds; SymNoise is 20 points better than none."""
    levels: dict[str, dict[str, Line]] = {
        "method": {
            name: {"representations": [LOREFT | {"intervention": name}]}
            for name in ("loreft", "direft")
        },
        "noise": {
            "none": {},
            "symnoise": {"representations": [SYMNOISE]},
        },
        "data": {"trec": {"data": {"train": "trec"}}, "boolq": {"data": {"train": "boolq"}}},
    }
    study = Study(
        recipe=recipe or Recipe(),
        axes={axis: levels[axis] for axis in axes},
        seeds=[0, 1, 2],
        baseline={"noise": "none"} if "noise" in axes else {},
    )
    directory.mkdir(parents=True)
    (directory / "study.yaml").write_text(study.to_yaml(), encoding="utf-8")
    write_lines(directory / "results.jsonl", [_result(cell) for cell in cells(study)])
    return directory


def _result(cell: Cell) -> Line:
    """Half of the answers are right; with SymNoise, a fifth of all are right besides."""
    levels = {"method": "loreft", "noise": "none", "data": "trec", **cell.levels}
    seed = int(levels["seed"])
    items = {"trec": 50, "boolq": 40}[str(levels["data"])]
    right = np.random.default_rng(seed).permutation(items) < items // 2
    if levels["noise"] == "symnoise":
        right[np.flatnonzero(~right)[: items // 5]] = True
    return {
        "cell": cell.levels,
        "key": cell.key,
        "scores": {"accuracy": right.mean(), "f1": 0.25 + seed / 10},
        "right": "".join("01"[answer] for answer in right.astype(int)),
        "parameters": {"loreft": 8224, "direft": 16448}[str(levels["method"])],
        "seconds": 40.0 + seed,
        "peak_memory_bytes": 600 * 2**20,
        "train_loss": 0.3,
    }
