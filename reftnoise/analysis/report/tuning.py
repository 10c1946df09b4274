"""The page of a search of settings: every trial with its interval, and what the settings did."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, MaxNLocator, NullFormatter

from ..._util.files import local_path
from ...training.run_files import BEST, TUNING
from ...training.study.statistics import mean_interval, paired_difference
from ...training.study.tuning import TunedTrial, best_of
from .figures import WIDTH, picture
from .files import LOSS, RIGHT, Measure
from .page import Folded, Section, Table, TableCell, duration, number
from .write import write_page

NONE = "–"
SETTINGS = {
    "learning_rate": "learning rate",
    "layers": "layers",
    "positions": "positions",
    "rank": "rank",
    "dropout": "dropout",
    "noise": "noise",
    "alpha": "α",
}


class Point(NamedTuple):
    """A trial in a panel: the setting's value, and the trial's."""

    x: Any
    y: float
    is_complete: bool
    is_best: bool


def write_tuning_report(directory: str | Path, trials: Sequence[TunedTrial]) -> tuple[Path, Table]:
    """Write the report of a search; the path of its page, and the table of its trials.

    Raises:
        ValueError: no trial was trained to its end.
    """
    directory = local_path(directory, "directory")
    best = best_of(trials)
    table, text = _table(trials, best), _explanation(trials)
    about = (
        "Each trial by its settings: a star for the best, dots for those trained to their end, "
        "circles for those that were ended early, at their last measurement. The line in the first "
        "panel is the best so far."
    )
    label = "right, %" if best.by_right else "loss"
    drawn = picture("trials", about, draw_panels_of_settings, _panels(trials, best), label)
    files = [
        Folded(name, (directory / name).read_text(encoding="utf-8"))
        for name in (BEST, TUNING)
        if (directory / name).is_file()
    ]
    sections = [
        Section("Trials", [text, table]),
        Section("Settings", [about, drawn]),
        Section("Files", files),
    ]
    title = f"Search {directory.resolve().name}"
    subtitle = f"{len(trials)} trials on {best.recipe.model}"
    return write_page(directory, title, subtitle, sections, table, text), table


def _searched(trials: Sequence[TunedTrial]) -> dict[str, str]:
    return {n: t for n, t in SETTINGS.items() if any(n in trial.values for trial in trials)}


def _table(trials: Sequence[TunedTrial], best: TunedTrial) -> Table:
    """A row for each trial, the best first; those that were ended early, and failed, come last."""
    settings = _searched(trials)
    measured = ["right, %", "95 % interval", "loss"] if best.by_right else ["loss", "95 % interval"]
    own = _own_of(trials)
    to_own = ["to the recipe", "95 % interval"] if own is not None else []
    columns = ["trial", *measured, *to_own, *settings.values()]
    ordered = sorted(trials, key=lambda t: (t.is_complete, bool(t.losses), t.value), reverse=True)
    rows = []
    for trial in ordered:
        cells = [number(str(trial.number)), *_measured(trial, best.by_right)]
        if own is not None:
            cells += _difference(trial, own, best.by_right)
        for name in settings:
            value = trial.values.get(name, NONE)
            text = f"{value:.2g}" if isinstance(value, float) else str(value)
            cells.append(TableCell(text) if isinstance(value, str) else number(text))
        rows.append([*cells, number(f"{trial.part:.0%}"), number(duration(trial.seconds))])
    return Table([*columns, "trained", "time"], rows)


def _measured(trial: TunedTrial, by_right: bool) -> list[TableCell]:
    if not trial.losses:
        return [number(NONE)] * (3 if by_right else 2)
    measure, values = _values(trial, by_right)
    mean, low, high = map(measure.shown, mean_interval(values[None]))
    cells = [number(mean), number(f"{low} to {high}")]
    return [*cells, number(LOSS.shown(trial.loss))] if by_right else cells


def _own_of(trials: Sequence[TunedTrial]) -> TunedTrial | None:
    """The trial of the recipe itself, if it was trained to its end."""
    return next((trial for trial in trials if trial.is_own and trial.is_complete), None)


def _difference(trial: TunedTrial, own: TunedTrial, by_right: bool) -> list[TableCell]:
    """How a trial differs from the recipe itself, paired over rows."""
    if trial is own or not trial.is_complete:
        return [number(NONE)] * 2
    measure, values = _values(trial, by_right)
    mean, low, high, _ = paired_difference(values[None], _values(own, by_right)[1][None])
    is_better, is_worse = (high < 0, low > 0) if measure.is_better_low else (low > 0, high < 0)
    texts = [measure.shown(value, sign=True) for value in (mean, low, high)]
    cell = TableCell(texts[0], "up" if is_better else "down" if is_worse else "number")
    return [cell, number(f"{texts[1]} to {texts[2]}")]


def _values(trial: TunedTrial, by_right: bool) -> tuple[Measure, Any]:
    """What a trial is measured by, and the value of each held-out row."""
    if by_right:
        return RIGHT, np.array([letter == "1" for letter in trial.right], dtype=float)
    return LOSS, np.array(trial.losses)


def _explanation(trials: Sequence[TunedTrial]) -> str:
    best = best_of(trials)
    measured = "right answers, then the lowest loss" if best.by_right else "the lowest loss"
    early = sum(not trial.is_complete and trial.problem is None for trial in trials)
    failed = [trial for trial in trials if trial.problem is not None]
    text = (
        f"Trials are measured on {len(best.losses)} held-out training rows; the best has the most "
        f"{measured}. " if best.by_right else
        f"Trials are measured on {len(best.losses)} held-out training rows; the best has "
        f"{measured}. "
    )  # fmt: skip
    own = _own_of(trials)
    text += "Intervals are bootstrapped over rows" + (
        f", and differences to the recipe itself, trial {own.number}, are paired. "
        if own is not None
        else ". "
    )
    text += (
        "The best of many trials was chosen by these rows, so its own figures here are too good: "
        "score it on rows that no trial saw. One seed says nothing about others."
    )
    if early:
        text += f" {early} trials were ended early, with the figures of that time."
    if failed:
        text += f" {len(failed)} trials have no result; the first: {failed[0].problem}."
    return text


def _panels(trials: Sequence[TunedTrial], best: TunedTrial) -> dict[str, list[Point]]:
    """The points of each panel, by the setting's name."""

    def point(x: Any, trial: TunedTrial) -> Point:
        y = 100 * trial.right.count("1") / len(trial.right) if best.by_right else trial.loss
        return Point(x, y, trial.is_complete, trial is best)

    measured = [trial for trial in trials if trial.losses]
    panels = {"trial": [point(trial.number, trial) for trial in measured]}
    for name, title in _searched(trials).items():
        panels[title] = [point(t.values[name], t) for t in measured if name in t.values]
    return {
        title: points
        for title, points in panels.items()
        if title == "trial" or len({point.x for point in points}) > 1
    }


def draw_panels_of_settings(panels: Mapping[str, Sequence[Point]], label: str) -> Figure:
    """A panel for each setting: its values, and what the trials with them reached."""
    rows = max(1, -(-len(panels) // 2))
    figure = Figure(figsize=(1.4 * WIDTH, 2.1 * rows + 0.3), layout="constrained")
    grid: Any = figure.subplots(rows, 2, squeeze=False, sharey=True)
    is_loss = label == "loss"
    for axes, (title, points) in zip(grid.flat, panels.items(), strict=False):
        is_text = any(isinstance(point.x, str) for point in points)
        numbers = title in ("trial", "learning rate")
        levels = [] if numbers else _levels(points, is_text)
        for point in points:
            x = point.x if numbers else levels.index(point.x)
            style: dict[str, Any] = {"marker": "o", "s": 26, "facecolors": "none", "zorder": 2}
            style |= {"edgecolors": "C0"}
            if point.is_complete:
                style |= {"facecolors": "C0", "zorder": 3}
            if point.is_best:
                style |= {"marker": "*", "s": 130, "facecolors": "C1", "edgecolors": "C1"}
                style["zorder"] = 4
            axes.scatter([x], [point.y], **style)
        if title == "trial":
            complete = [point for point in points if point.is_complete]
            best = np.minimum if is_loss else np.maximum
            axes.step([p.x for p in complete], best.accumulate([p.y for p in complete]),
                      where="post", color="C1", linewidth=1.2, zorder=1)  # fmt: skip
            axes.xaxis.set_major_locator(MaxNLocator(nbins=7, integer=True, min_n_ticks=1))
        elif title == "learning rate":
            axes.set_xscale("log")
            _label_plainly(axes.xaxis)
        else:
            axes.set_xticks(range(len(levels)), [x if is_text else f"{x:g}" for x in levels])
            axes.set_xlim(-0.5, len(levels) - 0.5)
        axes.set_xlabel(title)
        axes.grid(axis="y")
        axes.set_axisbelow(True)
    for axes in list(grid.flat)[len(panels) :]:
        axes.set_visible(False)
    for axes in grid[:, 0]:
        axes.set_ylabel(label)
    if is_loss and min(p.y for ps in panels.values() for p in ps) > 0:
        grid[0, 0].set_yscale("log")
        _label_plainly(grid[0, 0].yaxis)
    return figure


def _label_plainly(axis: Any) -> None:
    axis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
    axis.set_minor_formatter(NullFormatter())


def _levels(points: Sequence[Point], is_text: bool) -> list[Any]:
    levels = list(dict.fromkeys(point.x for point in points))
    return levels if is_text else sorted(levels)
