"""Results as a table, as JSON, and as a picture."""

import json
import math
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from reftnoise._util.hardware import machine

Measurement = dict[str, Any]
"""One method in one phase of a workload: `kind`, `phase`, `case`, `method`, `first` (the method
that it is compared with), and where they were measured `seconds`, `spread`, `ratio`,
`tokens_per_second`, `peak_bytes`, `own_share`, `operations` (a layer, beyond the first method's),
`operations_once` (a step) and `operations_of_layer` (by operator); or the `error`."""


def print_tables(rows: Sequence[Measurement], console: Console) -> None:
    """A table for each phase of a workload, its methods relative to the first of them."""
    for case in dict.fromkeys(row["case"] for row in rows):
        own = [row for row in rows if row["case"] == case]
        columns: dict[str, Callable[[Measurement], str]] = {
            "method": lambda row: str(row["method"]),
            "median": lambda row: _milliseconds(row["seconds"]),
            "±": lambda row: _milliseconds(row["spread"]),
            f"÷ {own[0]['first']}": lambda row: f"{row['ratio']:.3f}",
            "tokens/s": lambda row: f"{row['tokens_per_second']:,.0f}",
            "peak memory": lambda row: _mebibytes(row["peak_bytes"]),
            "own code": lambda row: f"{row['own_share']:.1%}",
            "operations": _operations,
            "error": lambda row: str(row["error"]),
        }
        cells = {name: [_cell(row, write) for row in own] for name, write in columns.items()}
        filled = {name: column for name, column in cells.items() if any(column)}
        table = Table(*filled, title=case)
        table.title_justify = "left"
        for line in zip(*filled.values(), strict=True):
            table.add_row(*line)
        console.print(table)


def _cell(row: Measurement, write: Callable[[Measurement], str]) -> str:
    try:
        return write(row)
    except KeyError:  # not measured
        return ""


def _mebibytes(number: int) -> str:
    return f"{number / 2**20:,.0f} MiB"


def _operations(row: Measurement) -> str:
    """Operations a layer, and once a step: beyond the first method's, or its own."""
    sign = "" if row["method"] == row["first"] else "+"
    return f"{row['operations']:{sign},d} a layer, {row['operations_once']:{sign},d} a step"


def _milliseconds(seconds: float) -> str:
    return f"{1000 * seconds:,.1f} ms"


def write(folder: Path, rows: Sequence[Measurement], device: str) -> None:
    """`results.json` with everything and `results.md`, each under a temporary name first."""
    where = machine(device)
    everything = {"machine": where, "rows": list(rows)}
    texts = {
        "results.json": json.dumps(everything, indent=2, ensure_ascii=False) + "\n",
        "results.md": markdown(rows, where),
    }
    for name, text in texts.items():
        temporary = folder / f"{name}.part"
        temporary.write_text(text, encoding="utf-8")
        temporary.replace(folder / name)


def markdown(rows: Sequence[Measurement], where: dict[str, Any]) -> str:
    """Times of steps, times of generation, and operations: a workload a line, a method a column."""
    about = [f"{key} {value}" for key, value in where.items() if key not in ("date", "python")]
    tables = []
    for kind in dict.fromkeys(row["kind"] for row in rows):
        own = [row for row in rows if row["kind"] == kind]
        tables.append(_pivot([row for row in own if "seconds" in row or "error" in row], _time))
        tables.append(_pivot([row for row in own if "operations" in row], _operations))
    last = f"Measured on {where['date']}: {', '.join(about)}."
    return "\n\n".join([table for table in tables if table] + [last]) + "\n"


def _pivot(rows: Sequence[Measurement], write: Callable[[Measurement], str]) -> str:
    """Cells of all workloads and methods; none without rows."""
    if not rows:
        return ""
    methods = list(dict.fromkeys(row["method"] for row in rows))
    lines = ["| | " + " | ".join(methods) + " |", "|---" * (1 + len(methods)) + "|"]
    for case in dict.fromkeys(row["case"] for row in rows):
        own = {row["method"]: row for row in rows if row["case"] == case}
        cells = [write(own[m]) if m in own else "" for m in methods]
        lines.append(f"| {case} | " + " | ".join(cells) + " |")
    return "\n".join(lines)


def _time(row: Measurement) -> str:
    """Time relative to the first method's, or its own, and peak memory where it was measured."""
    if "error" in row:
        return str(row["error"])
    is_first = row["method"] == row["first"]
    cell = _milliseconds(row["seconds"]) if is_first else f"{row['ratio']:.3f}"
    return f"{cell}, {_mebibytes(row['peak_bytes'])}" if "peak_bytes" in row else cell


def exponent(values: Sequence[float], seconds: Sequence[float]) -> float:
    """The slope of log time over log value, by least squares: 1 for linear growth."""
    x, y = [math.log(v) for v in values], [math.log(s) for s in seconds]
    mean_x, mean_y = sum(x) / len(x), sum(y) / len(y)
    above = sum((a - mean_x) * (b - mean_y) for a, b in zip(x, y, strict=True))
    return above / sum((a - mean_x) ** 2 for a in x)


def draw_bars(path: Path, rows: Sequence[Measurement]) -> None:
    """Every workload's methods, relative to the first of them."""
    import matplotlib.pyplot as plt

    cases = list(dict.fromkeys(row["case"] for row in rows))
    figure, axes = plt.subplots(
        len(cases), 1, figsize=(8, 0.6 + 0.34 * len(rows) + 0.5 * len(cases)), squeeze=False,
        gridspec_kw={"height_ratios": [sum(r["case"] == case for r in rows) for case in cases]},
        layout="constrained",
    )  # fmt: skip
    for axis, case in zip(axes[:, 0], cases, strict=True):
        own = [row for row in rows if row["case"] == case]
        ratios = [row["ratio"] for row in own]
        colors = ["tab:blue" if row["is_ours"] else "tab:gray" for row in own]
        names = [row["method"] for row in own]
        bars = axis.barh(names, ratios, color=colors)
        axis.bar_label(bars, [f"{ratio:.2f}" for ratio in ratios], padding=3)
        axis.axvline(1, color="black", linewidth=0.8)
        axis.set_xlim(0, max(ratios) * 1.12)
        axis.set_title(f"{case}: time ÷ {own[0]['method']}", fontsize=9, loc="left")
        axis.invert_yaxis()
    _save(figure, path)


def draw_lines(path: Path, rows: Sequence[Measurement], vary: str) -> None:
    """Time of each method over what was varied, both logarithmic."""
    import matplotlib.pyplot as plt

    figure, axis = plt.subplots(figsize=(8, 4.5), layout="constrained")
    for phase, method in dict.fromkeys((row["phase"], row["method"]) for row in rows):
        own = [row for row in rows if (row["phase"], row["method"]) == (phase, method)]
        values, seconds = [row[vary] for row in own], [row["seconds"] for row in own]
        label = method if phase == "training" else f"{phase}, {method}"
        axis.plot(values, [1000 * s for s in seconds], "o-", label=label)
    axis.set(xlabel=vary, ylabel="milliseconds", xscale="log", yscale="log")
    axis.set_xticks(values, [f"{value:,d}" for value in values], minor=False)
    axis.tick_params(axis="x", which="minor", bottom=False, labelbottom=False)
    for which in (axis.yaxis.set_major_formatter, axis.yaxis.set_minor_formatter):
        which("{x:,.0f}")
    axis.set_title(f"from {rows[0]['case']}", fontsize=9, loc="left")
    axis.grid(alpha=0.3, which="both")
    figure.legend(loc="outside right upper")
    _save(figure, path)


def _save(figure: Any, path: Path) -> None:
    import matplotlib.pyplot as plt

    temporary = path.with_name("part-" + path.name)
    figure.savefig(temporary, dpi=150)
    temporary.replace(path)
    plt.close(figure)
