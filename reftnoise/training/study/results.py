"""The results file of a study: one line per finished cell."""

import os
from pathlib import Path
from typing import TypedDict, cast

from typing_extensions import NotRequired

from ..._util.files import json_text, local_path, read_lines, writing
from ..run_files import RESULTS


class Outcome(TypedDict):
    """What a cell's run measured."""

    scores: dict[str, float]
    right: NotRequired[str]
    """0 and 1 for the rows in their order."""
    losses: NotRequired[list[float]]
    """Of rows that were scored by loss, nats per token, in their order."""
    parameters: int
    seconds: float
    peak_memory_bytes: int | None
    train_loss: float | None


class Result(Outcome):
    """A finished cell: a line of the results file."""

    cell: dict[str, str | int]
    """Its levels, and its seed."""
    key: str


def read_results(directory: str | Path) -> list[Result]:
    """The finished cells of a study's directory; lines that were cut off are ignored."""
    lines = read_lines(local_path(directory) / RESULTS)
    return [cast(Result, line) for line in lines if line.keys() >= {"cell", "key"}]


def append_result(directory: Path, result: Result) -> None:
    """Add a finished cell, on a new line even where the last line was cut off."""
    path = directory / RESULTS
    with writing(path), path.open("a+b") as file:
        text = json_text(result) + "\n"
        if file.tell():
            file.seek(-1, os.SEEK_END)
            text = text if file.read(1) == b"\n" else "\n" + text
        file.write(text.encode())
        file.flush()
        os.fsync(file.fileno())
