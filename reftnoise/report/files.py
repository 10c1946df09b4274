"""What the directories of runs and studies hold."""

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import yaml

Line = dict[str, Any]
Key = tuple[tuple[str, str], ...]

SEED = "seed"
"""The axis that every study has."""

DATA_AXES = ("data", "dataset", "task")
"""Of these, the first that a study has comes before its other axes."""


@dataclass(frozen=True)
class Run:
    """A trained adapter with what was written of its training and evaluation."""

    directory: Path
    recipe: Line
    recipe_text: str
    log: list[Line]
    summary: Line
    scores: list[Line]
    predictions: list[Line]

    @property
    def adapter(self) -> Path:
        """The adapter's own directory."""
        return self.directory / "adapter"


@dataclass(frozen=True)
class Combination:
    """The finished cells of a study that differ in their seed alone."""

    axes: dict[str, str]
    cells: dict[str, Line]
    """By seed."""

    @property
    def key(self) -> Key:
        """By which it is known from others."""
        return tuple(self.axes.items())

    def right(self, seeds: list[str]) -> npt.NDArray[np.float64] | None:
        """[seeds, items]: whether each answer is right; None where that was not written.

        Raises:
            ValueError: the seeds have unequal numbers of items.
        """
        answers = [self.cells[seed].get("right") or "" for seed in seeds]
        if not all(answers):
            return None
        if len({len(row) for row in answers}) > 1:
            counts = ", ".join(str(len(row)) for row in answers)
            raise ValueError(f"{self.name()}: its seeds have unequal numbers of items: {counts}")
        return np.array([[letter == "1" for letter in row] for row in answers], dtype=float)

    def mean(self, *keys: str) -> float | None:
        """The mean over seeds of a number in each cell; None where one lacks it."""
        values: list[Any] = list(self.cells.values())
        for key in keys:
            values = [value.get(key) if isinstance(value, dict) else None for value in values]
        return None if None in values else float(np.mean(values))

    def name(self, without: str | None = None) -> str:
        """Its place in the grid, such as `loreft, symnoise, trec`; also without an axis."""
        return ", ".join(value for axis, value in self.axes.items() if axis != without)


@dataclass(frozen=True)
class Study:
    """A grid of runs."""

    directory: Path
    text: str
    baseline: dict[str, str]
    axes: list[str]
    combinations: list[Combination]

    def baseline_of(self, combination: Combination) -> Combination | None:
        """The combination that differs in the baseline's axes alone; None for a baseline itself."""
        wanted = combination.axes | self.baseline
        if wanted == combination.axes:
            return None
        return next((other for other in self.combinations if other.axes == wanted), None)


def is_study(directory: Path) -> bool:
    """Whether a directory is a study's and not a run's.

    Raises:
        FileNotFoundError: it is neither.
    """
    if (directory / "results.jsonl").is_file():
        return True
    if (directory / "recipe.yaml").is_file():
        return False
    raise FileNotFoundError(
        f"{directory}: expected a run (recipe.yaml) or a study (results.jsonl), found neither"
    )


def read_run(directory: Path) -> Run:
    """A run; what was not written of it, such as scores, is empty.

    Raises:
        ValueError: a file that cannot be read.
    """
    text = (directory / "recipe.yaml").read_text(encoding="utf-8")
    return Run(
        directory=directory,
        recipe=_mapping(directory / "recipe.yaml", text),
        recipe_text=text,
        log=_lines(directory / "log.jsonl"),
        summary=_json(directory / "summary.json", {}),
        scores=_json(directory / "scores.json", []),
        predictions=_lines(directory / "predictions.jsonl"),
    )


def read_study(directory: Path) -> Study:
    """A study, also one that is not finished; of a cell that was run twice, the last.

    Raises:
        ValueError: a file that cannot be read, no finished cell, a baseline of unknown axes.
    """
    path = directory / "study.yaml"
    text = path.read_text(encoding="utf-8") if path.is_file() else ""
    lines = _lines(directory / "results.jsonl")
    if not lines:
        raise ValueError(f"{directory}: no cell of the study is finished yet")
    found: dict[Key, Combination] = {}
    values: dict[str, list[str]] = {}
    for line in lines:
        cell = {str(axis): str(value) for axis, value in line["cell"].items()}
        seed = cell.pop(SEED, "0")
        for axis, value in cell.items():
            values.setdefault(axis, []).append(value)
        one = Combination(cell, {})
        found.setdefault(one.key, one).cells[seed] = line
    first = next((name for name in DATA_AXES if name in values), None)
    axes = sorted(values, key=lambda axis: axis != first)
    baseline = _mapping(path, text).get("baseline") or {}
    for axis in baseline:
        if axis not in axes:
            raise ValueError(f"{path}: baseline {axis!r}: the study has axes {', '.join(axes)}")

    def place(one: Combination) -> list[int]:  # cells may be finished in any order
        return [values[axis].index(one.axes[axis]) if axis in one.axes else -1 for axis in axes]

    return Study(
        directory=directory,
        text=text,
        baseline={str(axis): str(value) for axis, value in baseline.items()},
        axes=axes,
        combinations=sorted(found.values(), key=place),
    )


def _mapping(path: Path, text: str) -> Line:
    try:
        found = yaml.safe_load(text) or {}
    except yaml.YAMLError as error:
        raise ValueError(f"{path}: no YAML: {' '.join(str(error).split())}") from None
    if not isinstance(found, dict):
        raise ValueError(f"{path}: expected a mapping, got {found!r}")
    return found


def _json(path: Path, default: Any) -> Any:
    try:
        return json.loads(path.read_text(encoding="utf-8")) if path.is_file() else default
    except ValueError as error:
        raise ValueError(f"{path}: no JSON: {error}") from None


def _lines(path: Path) -> list[Line]:
    """The lines of a file; none, if there is no such file. One being written is left out."""
    if not path.is_file():
        return []
    text = path.read_text(encoding="utf-8")
    found = []
    for number, line in enumerate(text[: text.rfind("\n") + 1].split("\n")[:-1], 1):
        try:
            found.append(json.loads(line))
        except ValueError as error:
            raise ValueError(f"{path}, line {number}: no JSON: {error}") from None
    return found
