"""A study's page: every combination with its interval, and how it differs from the baseline."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import partial

from ...training.study.statistics import Difference, Interval, mean_interval, paired_difference
from .figures import draw_panels, picture
from .files import DATA_AXES, Combination, Key, Study
from .formats import duration, memory, score, signed
from .page import Cell, Folded, Section, Style, Table, Text, number

NONE = "–"

Panels = dict[str, list[tuple[str, float, Sequence[float]]]]


@dataclass(frozen=True)
class Outcome:
    """What is concluded about a combination; None where its cells do not tell."""

    combination: Combination
    mean: Interval | None
    difference: Difference | None
    """To the baseline, over the seeds that both have."""


def study_page(study: Study) -> tuple[list[Section], Table, str]:
    """The sections of a study's page, and of these the table and what it says."""
    found = [_outcome(study, one) for one in study.combinations]
    table, text = _table(study, found), _explanation(study)
    sections = [Section("Results", [Text(text), table])]
    differences = _panels(
        study,
        {
            one.combination.key: (one.difference.mean, (one.difference.low, one.difference.high))
            for one in found
            if one.difference is not None
        },
    )
    if differences:
        about = (
            f"Difference to {_baseline(study)} in points, with 95\u00a0% intervals; the dot is "
            "open where the interval holds 0."
        )
        draw = partial(
            draw_panels, differences, f"difference to {_baseline(study)}, points",
            is_difference=True,
        )  # fmt: skip
        drawn = picture("differences", about, draw)
        sections.append(Section("Differences to the baseline", [Text(about), drawn]))
    seeds = _panels(
        study,
        {
            one.key: (sum(shares) / len(shares), shares)
            for one in study.combinations
            if (shares := one.shares()) is not None
        },
    )
    if seeds:
        about = "Right answers of each seed, a dot, and the mean over seeds, a bar."
        draw = partial(draw_panels, seeds, "right, %", is_difference=False)
        sections.append(Section("Seeds", [Text(about), picture("seeds", about, draw)]))
    sections.append(Section("Study", [Folded("study.yaml", study.text)]))
    return sections, table, text


def _outcome(study: Study, one: Combination) -> Outcome:
    right = one.right(list(one.cells))
    mean = None if right is None else mean_interval(right)
    baseline = study.baseline_of(one)
    common = [] if baseline is None else [seed for seed in one.cells if seed in baseline.cells]
    if baseline is None or not common:
        return Outcome(one, mean, None)
    ours, theirs = one.right(common), baseline.right(common)
    if ours is None or theirs is None or ours.shape != theirs.shape:
        return Outcome(one, mean, None)
    return Outcome(one, mean, paired_difference(ours, theirs))


def _table(study: Study, found: Sequence[Outcome]) -> Table:
    """A row per combination of axes."""
    names = _score_names(study)
    columns = [*study.axes, "seeds", "right", "95 % interval"]
    if study.baseline:
        columns += ["difference", "95 % interval", "p"]
    columns += [*names, "parameters", "time", "peak memory"]
    return Table(columns, [_row(study, one, names) for one in found])


def _row(study: Study, outcome: Outcome, names: Sequence[str]) -> list[Cell]:
    one = outcome.combination
    cells = [Cell(one.axes[axis]) for axis in study.axes]
    cells += [number(str(len(one.cells))), *_mean_cells(outcome.mean)]
    if study.baseline:
        cells += _difference_cells(outcome.difference)
    cells += [number(score(one.mean("scores", name)) or NONE) for name in names]
    sizes = (("parameters", "{:,.0f}".format), ("seconds", duration), ("peak_memory_bytes", memory))
    for key, shown in sizes:
        value = one.mean(key)
        cells.append(number(NONE if value is None else shown(value)))
    return cells


def _mean_cells(found: Interval | None) -> list[Cell]:
    if found is None:
        return [number(NONE)] * 2
    interval = f"{_percent(found.low)} to {_percent(found.high)}"
    return [number(_percent(found.mean)), number(interval)]


def _difference_cells(found: Difference | None) -> list[Cell]:
    if found is None:
        return [number(NONE)] * 3
    style: Style = "up" if found.low > 0 else "down" if found.high < 0 else "number"
    return [
        Cell(signed(100 * found.mean, 1), style),
        number(f"{signed(100 * found.low, 1)} to {signed(100 * found.high, 1)}"),
        number("< 0.001" if found.p < 0.001 else f"{found.p:.3f}"),
    ]


def _panels(study: Study, values: Mapping[Key, tuple[float, Sequence[float]]]) -> Panels:
    """Rows of a picture, by dataset where the study has several."""
    panels: Panels = {}
    for one in study.combinations:
        if one.key in values:
            title, name = _place(study, one)
            panels.setdefault(title, []).append((name, *values[one.key]))
    return panels


def _place(study: Study, one: Combination) -> tuple[str, str]:
    """The panel of a combination, and its name there."""
    first, *others = study.axes
    if first not in DATA_AXES or not others:
        return "", one.name()
    return one.axes[first], one.name(without=first)


def _baseline(study: Study) -> str:
    return ", ".join(f"{axis} {value}" for axis, value in study.baseline.items())


def _score_names(study: Study) -> list[str]:
    """Scores of the tasks but those that are the share of right answers under another name."""
    found: dict[str, bool] = {}
    for one in study.combinations:
        shares = one.shares() or [math.inf] * len(one.cells)
        for cell, share in zip(one.cells.values(), shares, strict=True):
            for name, value in cell["scores"].items():
                found[name] = found.get(name, False) or not math.isclose(value, share)
    return [name for name, differs in found.items() if differs]


def _explanation(study: Study) -> str:
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
    few = min(len(one.cells) for one in study.combinations)
    if few < 5:
        text += f" Intervals of few seeds (here {few}) are too narrow."
    return text + " Parameters, time and memory are means over seeds."


def _percent(share: float) -> str:
    return f"{100 * share:.1f}"
