"""What the directories of runs and studies hold."""

import json
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from ..._util.files import read_lines
from ..._util.numbers import fixed, significant
from ..._util.options import read_file
from ...data.tasks.registry import get_task
from ...training.recipe import Recipe
from ...training.resolved_run import scored_by
from ...training.run_files import LOG, PREDICTIONS, RECIPE, SCORES, STUDY, SUMMARY
from ...training.study.grid import SEED, Study, TunedAxis, cells
from ...training.study.results import Result, read_results

Line = dict[str, Any]

DATA_AXES = ("data", "dataset", "task")
"""The first of these that a study has comes before its other axes."""


@dataclass(frozen=True)
class Run:
    """The files of a run: its recipe, and what was written of training and evaluation."""

    directory: Path
    recipe: Recipe
    recipe_text: str
    log: list[Line]
    summary: Line
    scores: list[Line]
    predictions: list[Line]


@dataclass(frozen=True)
class Measure:
    """What the answers of a combination are measured by: a share of right ones, or a loss."""

    name: str
    unit: str
    factor: float
    decimals: int | None = None
    """Digits after the point; None for significant digits."""
    is_better_low: bool = False

    def shown(self, value: float, *, sign: bool = False) -> str:
        """A mean in the unit, or a difference, with its sign."""
        value *= self.factor
        if self.decimals is None:
            return significant(value, 3 if sign else 4, sign=sign)
        return fixed(value, self.decimals, sign=sign)


RIGHT = Measure("right", "%", 100, decimals=1)
LOSS = Measure("loss", "nats per token", 1, is_better_low=True)


@dataclass(frozen=True)
class Combination:
    """The finished runs of a study that differ in their seed alone."""

    axes: dict[str, str]
    results: dict[str, Result]
    """By seed."""
    scored_by: str = ""
    selected: str | None = None
    """The level that was best on rows of which `results` hold none."""

    @property
    def measure(self) -> Measure:
        """What its answers are measured by."""
        return LOSS if any("losses" in result for result in self.results.values()) else RIGHT

    def answers(self, seeds: list[str]) -> npt.NDArray[np.float64] | None:
        """[seeds, items]: whether each answer is right, or its loss; None where neither is known.

        Raises:
            ValueError: the seeds have unequal numbers of items.
        """
        name = "losses" if self.measure is LOSS else "right"
        answers: list[Any] = [self.results[seed].get(name) or "" for seed in seeds]
        if not all(answers):
            return None
        if len({len(row) for row in answers}) > 1:
            counts = ", ".join(str(len(row)) for row in answers)
            raise ValueError(f"{self.name()}: its seeds have unequal numbers of items: {counts}")
        return np.array([[float(answer) for answer in row] for row in answers])

    def mean(self, *keys: str) -> float | None:
        """The mean over seeds of a number in each result; None where one lacks it."""
        values: list[Any] = list(self.results.values())
        for key in keys:
            values = [value.get(key) if isinstance(value, dict) else None for value in values]
        return None if None in values else float(np.mean(values))

    def means(self) -> list[float] | None:
        """Each seed's share of right answers, or mean loss; None where neither is known."""
        answers = self.answers(list(self.results))
        return None if answers is None else [float(row.mean()) for row in answers]

    def name(self, without: str | None = None) -> str:
        """Its place in the grid, such as `loreft, symnoise, trec`, also without an axis."""
        return ", ".join(value for axis, value in self.axes.items() if axis != without)


@dataclass(frozen=True)
class StudyResults:
    """The results of a grid of runs."""

    text: str
    baseline: dict[str, str]
    axes: list[str]
    combinations: list[Combination]
    missing: int
    """Cells that are not finished."""
    diverged: int = 0
    """Cells whose losses are not finite; `combinations` hold none of them."""
    select: TunedAxis | None = None
    """The axis that `axes` lacks, since each combination has its best level of it."""

    def baseline_of(self, combination: Combination) -> Combination | None:
        """The combination that differs in the baseline's axes alone; None for a baseline itself."""
        axes = combination.axes | self.baseline
        if axes == combination.axes:
            return None
        return next((other for other in self.combinations if other.axes == axes), None)


def read_run(directory: Path) -> Run:
    """A run; what it has not written, such as scores, is empty.

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


def read_study(directory: Path) -> StudyResults:
    """A study, finished or not; results that its grid does not have are left out.

    Raises:
        ValueError: a file that cannot be read, or no finished cell.
    """
    study = read_file(Study, directory / STUDY)
    results = {line["key"]: line for line in read_results(directory)}
    finite = {key: line for key, line in results.items() if not _is_diverged(line)}
    first = next((name for name in DATA_AXES if name in study.axes), None)
    names = sorted(study.axes, key=lambda axis: axis != first)
    combinations: dict[tuple[tuple[str, str], ...], Combination] = {}
    grid = cells(study)
    for cell in grid:
        if cell.key in finite:
            axes = {name: str(value) for name, value in cell.levels.items() if name != SEED}
            way = scored_by(cell.recipe, get_task(cell.recipe.task))
            combination = combinations.setdefault(tuple(axes.items()), Combination(axes, {}, way))
            combination.results[str(cell.levels[SEED])] = results[cell.key]
    if not combinations:
        is_finished = any(cell.key in results for cell in grid)
        state = "has finite losses" if is_finished else "is finished yet"
        raise ValueError(f"{directory}: no cell of the study {state}")

    def place(combination: Combination) -> list[int]:
        return [list(study.axes[axis]).index(combination.axes[axis]) for axis in names]

    ordered = sorted(combinations.values(), key=place)
    if study.select is not None:
        names.remove(study.select.axis)
        ordered = _selected(ordered, study.select)
    return StudyResults(
        text=(directory / STUDY).read_text(encoding="utf-8"),
        baseline=study.baseline,
        axes=names,
        combinations=ordered,
        missing=sum(cell.key not in results for cell in grid),
        diverged=sum(cell.key in results and cell.key not in finite for cell in grid),
        select=study.select,
    )


def _selected(combinations: Sequence[Combination], select: TunedAxis) -> list[Combination]:
    """Of combinations that differ in an axis alone, the best on the first rows, on the others.

    It is one of those with the most seeds, since training with the others' level may have failed.

    Raises:
        ValueError: a result with no answers, or no rows beyond those.
    """
    groups = defaultdict[tuple[tuple[str, str], ...], list[Combination]](list)
    for combination in combinations:
        others = {axis: v for axis, v in combination.axes.items() if axis != select.axis}
        groups[tuple(others.items())].append(combination)
    chosen = []
    for axes, levels in groups.items():
        seeds = max(len(level.results) for level in levels)
        group = [level for level in levels if len(level.results) == seeds]
        rows = [combination.answers(list(combination.results)) for combination in group]
        means = []
        for combination, answers in zip(group, rows, strict=True):
            if answers is None:
                raise ValueError(f"select: {combination.name()} has no right or wrong by row")
            if answers.shape[1] <= select.rows:
                raise ValueError(f"select.rows {select.rows}: {combination.name()} has no more")
            mean = float(answers[:, : select.rows].mean())
            means.append(-mean if combination.measure.is_better_low else mean)
        best = group[means.index(max(means))]
        results = {seed: _beyond(result, select.rows) for seed, result in best.results.items()}
        level = best.axes[select.axis]
        chosen.append(replace(best, axes=dict(axes), results=results, selected=level))
    return chosen


def _is_diverged(result: Result) -> bool:
    """Whether a result has losses that are not finite, which are null in its file."""
    return any(loss is None or not np.isfinite(loss) for loss in result.get("losses") or ())


def _beyond(result: Result, rows: int) -> Result:
    """A result of the rows after the first ones; its scores are of all, so it has none."""
    beyond: Result = {**result, "scores": {}}
    if "right" in beyond:
        beyond["right"] = beyond["right"][rows:]
    if "losses" in beyond:
        beyond["losses"] = beyond["losses"][rows:]
    return beyond


def _json(path: Path, default: Any) -> Any:
    try:
        return json.loads(path.read_text(encoding="utf-8")) if path.is_file() else default
    except ValueError as error:
        raise ValueError(f"{path}: not JSON: {error}") from None
