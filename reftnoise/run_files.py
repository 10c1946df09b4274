"""The files of runs and studies: their names, and how lines of JSON are read."""

import json
from pathlib import Path
from typing import Any

RECIPE, ADAPTER, CHECKPOINTS = "recipe.yaml", "adapter", "checkpoints"
LOG, SUMMARY, SCORES, PREDICTIONS = "log.jsonl", "summary.json", "scores.json", "predictions.jsonl"
STUDY, RESULTS, CELLS = "study.yaml", "results.jsonl", "cells"


def read_lines(path: Path) -> list[dict[str, Any]]:
    """The mappings in a file of JSON lines; none without a file.

    A line that is no mapping counts for none: it was cut off when its writer was killed.
    """
    if not path.is_file():
        return []
    found = []
    for line in path.read_text(encoding="utf-8").split("\n"):
        try:
            value = json.loads(line)
        except ValueError:
            continue
        if isinstance(value, dict):
            found.append(value)
    return found
