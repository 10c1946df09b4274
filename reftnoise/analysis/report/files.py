"""What the directories of runs and studies hold."""

import json
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from ..._util.files import read_lines
from ..._util.options import read_file
from ...training.recipe import Recipe
from ...training.run_files import ADAPTER, LOG, PREDICTIONS, RECIPE, SCORES, STUDY, SUMMARY
from ...training.study.grid import SEED, cells
from ...training.study.grid import Study as Grid
from ...training.study.results import Result, read_results

Line = dict[str, Any]
Key = tuple[tuple[str, str], ...]

DATA_AXES = ("data", "dataset", "task")
"""Of these, the first that a study has comes before its other axes."""


@dataclass(frozen=True)
class Run:
    """A trained adapter with what was written of its training and evaluation."""

    directory: Path
    recipe: Recipe
    recipe_text: str
    log: list[Line]
    summary: Line
    scores: list[Line]
    predictions: list[Line]

    @property
    def has_adapter(self) -> bool:
        """Whether the adapter was kept."""
        return (self.directory / ADAPTER).is_dir()


@dataclass(frozen=True)
class Combination:
    """The finished cells of a study that differ in their seed alone."""

    axes: dict[str, str]
    cells: dict[str, Result]
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

    def shares(self) -> list[float] | None:
        """Each seed's share of right answers; None where that was not written."""
        right = self.right(list(self.cells))
        return None if right is None else [float(row.mean()) for row in right]

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
    missing: int
    """Cells that are not finished."""

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
    if (directory / STUDY).is_file():
        return True
    if (directory / RECIPE).is_file():
        return False
    raise FileNotFoundError(
        f"{directory}: expected a run (recipe.yaml) or a study (study.yaml), found neither"
    )


def read_run(directory: Path) -> Run:
    """A run; what was not written of it, such as scores, is empty.

    Raises:
        ValueError: a file that cannot be read.
    """
    text = (directory / RECIPE).read_text(encoding="utf-8")
    return Run(
        directory=directory,
        recipe=replace(read_file(Recipe, directory / RECIPE), output_dir=str(directory)),
        recipe_text=text,
        log=read_lines(directory / LOG),
        summary=_json(directory / SUMMARY, {}),
        scores=_json(directory / SCORES, []),
        predictions=read_lines(directory / PREDICTIONS),
    )


def read_study(directory: Path) -> Study:
    """A study, also one that is not finished; results that its grid does not have are left out.

    Raises:
        ValueError: a file that cannot be read, or no finished cell.
    """
    study = read_file(Grid, directory / STUDY)
    results = {line["key"]: line for line in read_results(directory)}
    grid = cells(study)
    found: dict[Key, Combination] = {}
    for cell in grid:
        if cell.key in results:
            one = Combination({n: str(v) for n, v in cell.levels.items() if n != SEED}, {})
            found.setdefault(one.key, one).cells[str(cell.levels[SEED])] = results[cell.key]
    if not found:
        raise ValueError(f"{directory}: no cell of the study is finished yet")
    first = next((name for name in DATA_AXES if name in study.axes), None)
    axes = sorted(study.axes, key=lambda axis: axis != first)

    def place(one: Combination) -> list[int]:
        return [list(study.axes[axis]).index(one.axes[axis]) for axis in axes]

    return Study(
        directory=directory,
        text=(directory / STUDY).read_text(encoding="utf-8"),
        baseline=study.baseline,
        axes=axes,
        combinations=sorted(found.values(), key=place),
        missing=sum(cell.key not in results for cell in grid),
    )


def _json(path: Path, default: Any) -> Any:
    try:
        return json.loads(path.read_text(encoding="utf-8")) if path.is_file() else default
    except ValueError as error:
        raise ValueError(f"{path}: no JSON: {error}") from None
