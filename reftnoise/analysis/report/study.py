"""A study's page: every combination with its interval, and how it differs from the baseline."""

import math
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass

from ...training.study.statistics import Difference, Interval, mean_interval, paired_difference
from .figures import draw_panels, picture
from .files import DATA_AXES, Combination, StudyResults
from .page import Folded, Section, Style, Table, TableCell, duration, memory, number, signed

NONE = "–"

Panels = dict[str, list[tuple[str, float, Sequence[float]]]]


@dataclass(frozen=True)
class Comparison:
    """What the runs of a combination show; None where they do not tell."""

    combination: Combination
    mean: Interval | None
    difference: Difference | None
    """To the baseline, over the seeds that both have."""


def study_page(study: StudyResults) -> tuple[list[Section], Table, str]:
    """The sections of a study's page, and of these the table and its explanation."""
    compared = [_compare(study, combination) for combination in study.combinations]
    table, text = _table(study, compared), _explanation(study)
    sections = [Section("Results", [text, table])]
    differences = [
        (row.combination, row.difference.mean, (row.difference.low, row.difference.high))
        for row in compared
        if row.difference is not None
    ]
    if differences:
        about = (
            f"Difference to {_baseline(study)} in points, with 95\u00a0% intervals; the dot is "
            "open where the interval holds 0."
        )
        label = f"difference to {_baseline(study)}, points"
        drawn = picture(
            "differences", about, draw_panels, _panels(study, differences), label,
            is_difference=True,
        )  # fmt: skip
        sections.append(Section("Differences to the baseline", [about, drawn]))
    seeds = [
        (combination, sum(shares) / len(shares), shares)
        for combination in study.combinations
        if (shares := combination.shares()) is not None
    ]
    if seeds:
        about = "Right answers: a dot for each seed, and a bar for the mean over seeds."
        drawn = picture(
            "seeds", about, draw_panels, _panels(study, seeds), "right, %", is_difference=False
        )
        sections.append(Section("Seeds", [about, drawn]))
    sections.append(Section("Study", [Folded("study.yaml", study.text)]))
    return sections, table, text


def _compare(study: StudyResults, combination: Combination) -> Comparison:
    right = combination.right(list(combination.results))
    mean = None if right is None else mean_interval(right)
    baseline = study.baseline_of(combination)
    if baseline is None:
        return Comparison(combination, mean, None)
    common = [seed for seed in combination.results if seed in baseline.results]
    ours, theirs = (c.right(common) if common else None for c in (combination, baseline))
    if ours is None or theirs is None or ours.shape != theirs.shape:
        return Comparison(combination, mean, None)
    return Comparison(combination, mean, paired_difference(ours, theirs))


def _table(study: StudyResults, compared: Sequence[Comparison]) -> Table:
    """A row for each combination of axes."""
    names = _score_names(study)
    columns = [*study.axes, "seeds", "right", "95 % interval"]
    if study.baseline:
        columns += ["difference", "95 % interval", "p"]
    columns += [*names, "parameters", "time", "peak memory"]
    return Table(columns, [_row(study, row, names) for row in compared])


def _row(study: StudyResults, compared: Comparison, names: Sequence[str]) -> list[TableCell]:
    combination = compared.combination
    cells = [TableCell(combination.axes[axis]) for axis in study.axes]
    cells += [number(str(len(combination.results))), *_mean_cells(compared.mean)]
    if study.baseline:
        cells += _difference_cells(compared.difference)
    scores = (combination.mean("scores", name) for name in names)
    cells += [number(NONE if score is None else f"{score:.4g}") for score in scores]
    sizes = (("parameters", "{:,.0f}".format), ("seconds", duration), ("peak_memory_bytes", memory))
    for key, shown in sizes:
        value = combination.mean(key)
        cells.append(number(NONE if value is None else shown(value)))
    return cells


def _mean_cells(interval: Interval | None) -> list[TableCell]:
    if interval is None:
        return [number(NONE)] * 2
    mean, low, high = (f"{100 * v:.1f}" for v in (interval.mean, interval.low, interval.high))
    return [number(mean), number(f"{low} to {high}")]


def _difference_cells(difference: Difference | None) -> list[TableCell]:
    if difference is None:
        return [number(NONE)] * 3
    style: Style = "up" if difference.low > 0 else "down" if difference.high < 0 else "number"
    mean, low, high = (
        signed(100 * v, 1) for v in (difference.mean, difference.low, difference.high)
    )
    p = "< 0.001" if difference.p < 0.001 else f"{difference.p:.3f}"
    return [TableCell(mean, style), number(f"{low} to {high}"), number(p)]


def _panels(
    study: StudyResults, rows: Sequence[tuple[Combination, float, Sequence[float]]]
) -> Panels:
    """Rows of a picture, by dataset where the study has several."""
    first, *others = study.axes
    has_panels = bool(others) and first in DATA_AXES
    panels: Panels = defaultdict(list)
    for combination, mean, values in rows:
        title = combination.axes[first] if has_panels else ""
        name = combination.name(without=first if has_panels else None)
        panels[title].append((name, mean, values))
    return panels


def _baseline(study: StudyResults) -> str:
    return ", ".join(f"{axis} {value}" for axis, value in study.baseline.items())


def _score_names(study: StudyResults) -> list[str]:
    """Scores of the tasks but those that are the share of right answers under another name."""
    differs: dict[str, bool] = {}
    for combination in study.combinations:
        shares = combination.shares() or [math.inf] * len(combination.results)
        for result, share in zip(combination.results.values(), shares, strict=True):
            for name, value in result["scores"].items():
                differs[name] = differs.get(name, False) or not math.isclose(value, share)
    return [name for name, is_other in differs.items() if is_other]


def _explanation(study: StudyResults) -> str:
    text = (
        "Right answers in percent, the mean over seeds and items. Intervals are bootstrapped over "
        "seeds and items."
    )
    if study.baseline:
        text += (
            f" Differences in points are to the combination with {_baseline(study)} and all else "
            "equal, paired over seeds and items; p is two-sided and not corrected for the number "
            "of comparisons."
        )
    if study.missing:
        text += f" {study.missing} cells are not finished."
    few = min(len(combination.results) for combination in study.combinations)
    if few < 5:
        text += f" Intervals of few seeds (here {few}) are too narrow."
    return text + " Parameters, time and memory are means over seeds."
