"""The names of the files of runs and studies."""

from pathlib import Path

RECIPE, ADAPTER, CHECKPOINTS = "recipe.yaml", "adapter", "checkpoints"
LOG, SUMMARY, SCORES, PREDICTIONS = "log.jsonl", "summary.json", "scores.json", "predictions.jsonl"
STUDY, RESULTS, CELLS = "study.yaml", "results.jsonl", "cells"
LOCK = ".lock"  # of a run or study that is being written


def is_study(directory: Path) -> bool:
    """Whether a directory is a study's and not a run's.

    Raises:
        FileNotFoundError: it is neither.
    """
    if (directory / STUDY).is_file():
        return True
    if (directory / RECIPE).is_file():
        return False
    raise FileNotFoundError(
        f"{directory}: expected a run (recipe.yaml) or a study (study.yaml), found neither"
    )
