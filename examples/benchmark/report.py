"""Results as a table, as JSON, and as a picture."""

import json
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from reftnoise._util.hardware import machine

Measurement = dict[str, Any]
"""One method on one workload: `case`, `method`, `seconds`, `spread`, `tokens_per_second`, and where
they were measured `peak_bytes` and `own_share`."""


def print_table(rows: Sequence[Measurement], title: str, console: Console) -> None:
    """One workload's methods, relative to the floor, or else to the first of them."""
    first = next((row for row in rows if row["method"] == "floor"), rows[0])
    has_memory = any("peak_bytes" in row for row in rows)
    table = Table("method", "median", "±", f"÷ {first['method']}", "tokens/s", title=title)
    table.title_justify = "left"
    if has_memory:
        table.add_column("peak memory")
        table.add_column(f"÷ {first['method']}")
    table.add_column("own code")
    for row in rows:
        cells = [
            row["method"],
            _milliseconds(row["seconds"]),
            _milliseconds(row["spread"]),
            f"{row['seconds'] / first['seconds']:.2f}",
            f"{row['tokens_per_second']:,.0f}",
        ]
        if has_memory:
            cells += [f"{row['peak_bytes'] / 2**20:,.0f} MiB"]
            cells += [f"{row['peak_bytes'] / first['peak_bytes']:.2f}"]
        cells += [f"{row['own_share']:.1%}" if "own_share" in row else ""]
        table.add_row(*cells)
    console.print(table)


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
    """Steps and generation as a table each: a workload a line, a method a column."""
    groups: dict[bool, list[Measurement]] = {False: [], True: []}
    for row in rows:
        groups[row["method"] in ("base", "reftnoise")].append(row)
    about = [f"{key} {value}" for key, value in where.items() if key not in ("date", "python")]
    last = f"Measured on {where['date']}: {', '.join(about)}."
    return "\n\n".join([_pivot(group) for group in groups.values() if group] + [last]) + "\n"


def _pivot(rows: Sequence[Measurement]) -> str:
    """Times relative to the first method, and peak memory where it was measured."""
    methods = list(dict.fromkeys(row["method"] for row in rows))
    lines = ["| | " + " | ".join(methods) + " |", "|---" * (1 + len(methods)) + "|"]
    for case in dict.fromkeys(row["case"] for row in rows):
        own = {row["method"]: row for row in rows if row["case"] == case}
        first = next(iter(own.values()))
        cells = []
        for row in (own.get(method) for method in methods):
            if row is None:
                cells.append("")
                continue
            ratio = f"{row['seconds'] / first['seconds']:.2f}"
            cells.append(_milliseconds(row["seconds"]) if row is first else ratio)
            if "peak_bytes" in row:
                cells[-1] += f", {row['peak_bytes'] / 2**20:,.0f} MiB"
        lines.append(f"| {case} | " + " | ".join(cells) + " |")
    return "\n".join(lines)


def exponent(values: Sequence[float], seconds: Sequence[float]) -> float:
    """The slope of log time over log value, by least squares: 1 for linear growth."""
    x, y = [math.log(v) for v in values], [math.log(s) for s in seconds]
    mean_x, mean_y = sum(x) / len(x), sum(y) / len(y)
    above = sum((a - mean_x) * (b - mean_y) for a, b in zip(x, y, strict=True))
    return above / sum((a - mean_x) ** 2 for a in x)


def draw_bars(path: Path, rows: Sequence[Measurement]) -> None:
    """Every workload's methods, relative to its floor."""
    import matplotlib.pyplot as plt

    cases = list(dict.fromkeys(row["case"] for row in rows))
    figure, axes = plt.subplots(
        len(cases), 1, figsize=(8, 0.6 + 0.34 * len(rows) + 0.5 * len(cases)), squeeze=False,
        gridspec_kw={"height_ratios": [sum(r["case"] == case for r in rows) for case in cases]},
        layout="constrained",
    )  # fmt: skip
    for axis, case in zip(axes[:, 0], cases, strict=True):
        own = [row for row in rows if row["case"] == case]
        first = next((row for row in own if row["method"] == "floor"), own[0])
        ratios = [row["seconds"] / first["seconds"] for row in own]
        colors = ["tab:blue" if row["is_ours"] else "tab:gray" for row in own]
        names = [row["method"] for row in own]
        bars = axis.barh(names, ratios, color=colors)
        axis.bar_label(bars, [f"{ratio:.2f}" for ratio in ratios], padding=3)
        axis.axvline(1, color="black", linewidth=0.8)
        axis.set_xlim(0, max(ratios) * 1.12)
        axis.set_title(f"{case}: time ÷ {first['method']}", fontsize=9, loc="left")
        axis.invert_yaxis()
    _save(figure, path)


def draw_lines(path: Path, rows: Sequence[Measurement], vary: str) -> None:
    """Time of each method over what was varied, both logarithmic."""
    import matplotlib.pyplot as plt

    figure, axis = plt.subplots(figsize=(8, 4.5), layout="constrained")
    for method in dict.fromkeys(row["method"] for row in rows):
        own = [row for row in rows if row["method"] == method]
        values, seconds = [row[vary] for row in own], [row["seconds"] for row in own]
        axis.plot(values, [1000 * s for s in seconds], "o-", label=method)
    axis.set(xlabel=vary, ylabel="milliseconds per step", xscale="log", yscale="log")
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
