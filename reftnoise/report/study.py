"""A study's page: every combination with its interval, and how it differs from the baseline."""

from collections.abc import Sequence
from functools import partial

from ..study.statistics import Difference, mean_interval, paired_difference
from .figures import draw_panels, picture
from .files import Combination, Study
from .formats import duration, memory, score, signed
from .page import Block, Cell, Folded, Section, Style, Table, Text, markdown, number

DATA_AXES = ("data", "dataset", "task")
"""The axes, the first of which that a study has makes panels of its pictures."""

ACCURACY = "accuracy"
NONE = "–"

Panels = dict[str, list[tuple[str, float, Sequence[float]]]]


def study_sections(study: Study) -> list[Section]:
    """The sections of a study's page."""
    results: list[Block] = [Text(_explanation(study)), results_table(study)]
    drawn: list[Block] = []
    differences, accuracies = _difference_panels(study), _seed_panels(study)
    if differences:
        about = f"Difference to {_baseline(study)} in points, with 95 % intervals"
        label = f"difference to {_baseline(study)}, points"
        draw = partial(draw_panels, differences, label, is_difference=True)
        drawn.append(picture("differences", about, draw))
    if accuracies:
        about = "Accuracy of each seed, a dot, and the mean over seeds, a bar"
        draw = partial(draw_panels, accuracies, "accuracy, %", is_difference=False)
        drawn.append(picture("seeds", about, draw))
    sections = [Section("Results", results)]
    if differences:
        sections.append(Section("Differences to the baseline", drawn[:1]))
    if accuracies:
        sections.append(Section("Seeds", drawn[-1:]))
    if study.text:
        sections.append(Section("Study", [Folded("study.yaml", study.text)]))
    return sections


def results_markdown(study: Study) -> str:
    """The table and what its numbers mean."""
    return f"{markdown(results_table(study))}\n{_explanation(study)}\n"


def results_table(study: Study) -> Table:
    """A row per combination of axes."""
    others = [name for name in _score_names(study) if name != ACCURACY]
    columns = [*study.axes, "seeds", ACCURACY, "95 % interval"]
    if study.baseline:
        columns += [f"− {_baseline(study)}", "95 % interval", "p"]
    columns += [*others, "parameters", "time", "peak memory"]
    return Table(columns, [_row(study, one, others) for one in study.combinations])


def _row(study: Study, one: Combination, others: Sequence[str]) -> list[Cell]:
    cells = [Cell(one.axes.get(axis, "")) for axis in study.axes]
    cells += [number(str(len(one.cells))), *_mean_cells(one)]
    if study.baseline:
        cells += _difference_cells(study, one)
    cells += [number(score(one.mean("scores", name)) or NONE) for name in others]
    parameters, peak = one.mean("parameters"), one.mean("peak_memory_bytes")
    seconds = one.mean("seconds")
    return [
        *cells,
        number(NONE if parameters is None else f"{parameters:,.0f}"),
        number(NONE if seconds is None else duration(seconds)),
        number(NONE if peak is None else memory(peak)),
    ]


def _mean_cells(one: Combination) -> list[Cell]:
    right = one.right(list(one.cells))
    if right is None:
        mean = one.mean("scores", ACCURACY)
        return [number(NONE if mean is None else _percent(mean)), number(NONE)]
    found = mean_interval(right)
    return [
        number(_percent(found.mean)),
        number(f"{_percent(found.low)} to {_percent(found.high)}"),
    ]


def _difference_cells(study: Study, one: Combination) -> list[Cell]:
    found = difference(study, one)
    if found is None:
        return [number(NONE)] * 3
    style: Style = "up" if found.low > 0 else "down" if found.high < 0 else "number"
    return [
        Cell(signed(100 * found.mean, 1), style),
        number(f"{signed(100 * found.low, 1)} to {signed(100 * found.high, 1)}"),
        number("< 0.001" if found.p < 0.001 else f"{found.p:.3f}"),
    ]


def difference(study: Study, one: Combination) -> Difference | None:
    """To the baseline, over the seeds that both have; None where there is nothing to compare."""
    baseline = study.baseline_of(one)
    if baseline is None:
        return None
    common = [seed for seed in one.cells if seed in baseline.cells]
    if not common:
        return None
    ours, theirs = one.right(common), baseline.right(common)
    return None if ours is None or theirs is None else paired_difference(ours, theirs)


def _difference_panels(study: Study) -> Panels:
    panels: Panels = {}
    for one in study.combinations:
        found = difference(study, one)
        if found is not None:
            title, name = _place(study, one)
            panels.setdefault(title, []).append((name, found.mean, (found.low, found.high)))
    return panels


def _seed_panels(study: Study) -> Panels:
    panels: Panels = {}
    for one in study.combinations:
        values = [cell["scores"].get(ACCURACY) for cell in one.cells.values()]
        if None not in values:
            title, name = _place(study, one)
            panels.setdefault(title, []).append((name, sum(values) / len(values), values))
    return panels


def _place(study: Study, one: Combination) -> tuple[str, str]:
    """The panel of a combination, and its name there."""
    axis = next((name for name in DATA_AXES if name in study.axes), None)
    if axis is None or len(study.axes) == 1:
        return "", one.name()
    return one.axes.get(axis, ""), one.name(without=(axis,))


def _baseline(study: Study) -> str:
    return ", ".join(f"{axis} {value}" for axis, value in study.baseline.items())


def _score_names(study: Study) -> list[str]:
    cells = [cell for one in study.combinations for cell in one.cells.values()]
    return list(dict.fromkeys(name for cell in cells for name in cell["scores"]))


def _explanation(study: Study) -> str:
    text = (
        "Accuracy in percent, the mean over seeds and items. Intervals are bootstrapped over seeds "
        "and items."
    )
    if study.baseline:
        text += (
            f" Differences in points are to the combination with {_baseline(study)} and all else "
            "equal, paired over seeds and items; p is two-sided and not corrected for the number "
            "of comparisons."
        )
    few = min(len(one.cells) for one in study.combinations)
    if few < 5:
        text += f" With few seeds (here {few} at least) intervals are too narrow."
    return text + " Parameters, time and memory are means over seeds."


def _percent(share: float) -> str:
    return f"{100 * share:.1f}"
