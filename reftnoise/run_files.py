"""The files of runs and studies: their names, and how JSON is written and read in them."""

import json
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

RECIPE, ADAPTER, CHECKPOINTS = "recipe.yaml", "adapter", "checkpoints"
LOG, SUMMARY, SCORES, PREDICTIONS = "log.jsonl", "summary.json", "scores.json", "predictions.jsonl"
STUDY, RESULTS, CELLS = "study.yaml", "results.jsonl", "cells"
LOCK = ".lock"  # of a run or study that is being written


def json_text(value: Any, *, indent: int | None = None) -> str:
    """A value as JSON that any reader takes: what is no finite number becomes null."""
    finite = json.loads(json.dumps(value), parse_constant=lambda _: None)
    return json.dumps(finite, indent=indent, ensure_ascii=False)


def json_lines(rows: Iterable[Mapping[str, Any]]) -> bytes:
    """Mappings as the content of a file of JSON lines."""
    return "".join(json_text(row) + "\n" for row in rows).encode()


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
