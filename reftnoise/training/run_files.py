"""The names of the files of runs and studies."""

from pathlib import Path

RECIPE, CHECKPOINTS = "recipe.yaml", "checkpoints"
LOG, SUMMARY, SCORES, PREDICTIONS = "log.jsonl", "summary.json", "scores.json", "predictions.jsonl"
STUDY, RESULTS, CELLS = "study.yaml", "results.jsonl", "cells"
TUNING, TRIALS, BEST = "tuning.yaml", "trials.journal", "best.yaml"
LOCK = ".lock"  # of a run or study that is being written


def is_study(directory: Path, **options: object) -> bool:
    """Whether a directory is a study's and not a run's.

    Raises:
        FileNotFoundError: it is neither.
        ValueError: it is a study's, and there are options, which only a run has.
    """
    if (directory / STUDY).is_file():
        for name, value in options.items():
            if value is not None:
                raise ValueError(f"{name}: {directory} is a study; expected a run's directory")
        return True
    if (directory / RECIPE).is_file():
        return False
    raise FileNotFoundError(
        f"{directory}: expected a run (recipe.yaml) or a study (study.yaml), found neither"
    )
