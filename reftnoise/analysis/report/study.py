"""A study's page: every combination with its interval, and how it differs from the baseline."""

import math
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass

from ..._util.numbers import significant
from ...training.study.statistics import Difference, Interval, mean_interval, paired_difference
from .figures import draw_panels, picture
from .files import DATA_AXES, LOSS, RIGHT, Combination, Measure, StudyResults
from .page import Folded, Section, Style, Table, TableCell, duration, memory, number

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
            f"Difference to {_baseline(study)}, with 95\u00a0% intervals; the dot is open where "
            "the interval holds 0."
        )
        label = f"difference to {_baseline(study)}, {_units(study, 'points')}"
        drawn = picture(
            "differences", about, draw_panels, _panels(study, differences), label,
            is_difference=True,
        )  # fmt: skip
        sections.append(Section("Differences to the baseline", [about, drawn]))
    seeds = [
        (combination, sum(means) / len(means), means)
        for combination in study.combinations
        if (means := combination.means()) is not None
    ]
    if seeds:
        about = f"{_results(study)}: a dot for each seed, and a bar for the mean over seeds."
        label = f"{_measures(study)}, {_units(study)}"
        drawn = picture(
            "seeds", about, draw_panels, _panels(study, seeds), label, is_difference=False
        )
        sections.append(Section("Seeds", [about, drawn]))
    sections.append(Section("Study", [Folded("study.yaml", study.text)]))
    return sections, table, text


def _compare(study: StudyResults, combination: Combination) -> Comparison:
    answers = combination.answers(list(combination.results))
    mean = None if answers is None else mean_interval(answers)
    baseline = study.baseline_of(combination)
    if baseline is None:
        return Comparison(combination, mean, None)
    common = [seed for seed in combination.results if seed in baseline.results]
    ours, theirs = (c.answers(common) if common else None for c in (combination, baseline))
    if ours is None or theirs is None or ours.shape != theirs.shape:
        return Comparison(combination, mean, None)
    return Comparison(combination, mean, paired_difference(ours, theirs))


def _table(study: StudyResults, compared: Sequence[Comparison]) -> Table:
    """A row for each combination of axes."""
    names = _score_names(study)
    columns = [*study.axes, *_selected(study), "by", "seeds", _measures(study), "95 % interval"]
    if study.baseline:
        columns += ["difference", "95 % interval", "p"]
    columns += [*names, "parameters", "time", "peak memory"]
    return Table(columns, [_row(study, row, names) for row in compared])


def _row(study: StudyResults, compared: Comparison, names: Sequence[str]) -> list[TableCell]:
    combination = compared.combination
    cells = [TableCell(combination.axes[axis]) for axis in study.axes]
    if combination.selected is not None:
        cells.append(TableCell(combination.selected))
    cells.append(TableCell(combination.scored_by))
    measure = combination.measure
    cells += [number(str(len(combination.results))), *_mean_cells(compared.mean, measure)]
    if study.baseline:
        cells += _difference_cells(compared.difference, measure)
    scores = (combination.mean("scores", name) for name in names)
    cells += [number(NONE if score is None else significant(score)) for score in scores]
    sizes = (("parameters", "{:,.0f}".format), ("seconds", duration), ("peak_memory_bytes", memory))
    for key, shown in sizes:
        value = combination.mean(key)
        cells.append(number(NONE if value is None else shown(value)))
    return cells


def _mean_cells(interval: Interval | None, measure: Measure) -> list[TableCell]:
    if interval is None:
        return [number(NONE)] * 2
    mean, low, high = (measure.shown(v) for v in (interval.mean, interval.low, interval.high))
    return [number(mean), number(f"{low} to {high}")]


def _difference_cells(difference: Difference | None, measure: Measure) -> list[TableCell]:
    if difference is None:
        return [number(NONE)] * 3
    is_more, is_less = difference.low > 0, difference.high < 0
    style: Style = "number"
    if is_more or is_less:
        style = "up" if is_more is not measure.is_better_low else "down"
    mean, low, high = (
        measure.shown(v, sign=True) for v in (difference.mean, difference.low, difference.high)
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
        factor = combination.measure.factor
        panels[title].append((name, factor * mean, [factor * value for value in values]))
    return panels


def _used(study: StudyResults) -> list[Measure]:
    """The measures of the combinations, each once."""
    return list(dict.fromkeys(combination.measure for combination in study.combinations))


def _measures(study: StudyResults) -> str:
    return " or ".join(measure.name for measure in _used(study))


def _units(study: StudyResults, of_share: str = RIGHT.unit) -> str:
    """Units of the measures, in which a share has one of its own."""
    return " or ".join(of_share if m is RIGHT else m.unit for m in _used(study))


def _results(study: StudyResults) -> str:
    """What the results are, as a sentence begins."""
    names = {RIGHT: "Right answers in percent", LOSS: "Loss of the right answers, nats per token"}
    return "; ".join(names[measure] for measure in _used(study))


def _selected(study: StudyResults) -> list[str]:
    """The axis of which each combination has its best level."""
    return [] if study.select is None else [study.select.axis]


def _baseline(study: StudyResults) -> str:
    return ", ".join(f"{axis} {value}" for axis, value in study.baseline.items())


def _score_names(study: StudyResults) -> list[str]:
    """Scores of the tasks but those that are the share of right answers under another name."""
    differs: dict[str, bool] = {}
    for combination in study.combinations:
        means = combination.means() or [math.inf] * len(combination.results)
        for result, mean in zip(combination.results.values(), means, strict=True):
            for name, value in result["scores"].items():
                is_other = not math.isclose(value, mean, abs_tol=1e-5)  # as losses are rounded
                differs[name] = differs.get(name, False) or is_other
    return [name for name, is_other in differs.items() if is_other]


def _explanation(study: StudyResults) -> str:
    text = (
        f"{_results(study)}, the mean over seeds and items. Intervals are bootstrapped over seeds "
        "and items."
    )
    if study.baseline:
        text += (
            f" Differences are to the combination with {_baseline(study)} and all else "
            "equal, paired over seeds and items; p is two-sided and not corrected for the number "
            "of comparisons."
        )
    if study.select is not None:
        text += (
            f" Of {study.select.axis}, each row has the level that was best on the first "
            f"{study.select.rows} scored rows, of those with the most seeds and the "
            "first of equal ones, and shows the others."
        )
    if study.missing:
        text += f" {study.missing} cells are not finished."
    if study.diverged:
        text += f" {study.diverged} cells have losses that are not finite, and are left out."
    few = min(len(combination.results) for combination in study.combinations)
    if few < 5:
        text += f" Intervals of few seeds (here {few}) are too narrow."
    return text + " Parameters, time and memory are means over seeds."
