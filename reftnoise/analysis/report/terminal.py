"""A report's tables in a terminal."""

from rich.console import Console
from rich.table import Table as RichTable
from rich.text import Text

from .page import Table

_BETWEEN = 2


def show_table(table: Table, console: Console) -> None:
    """Print a table: in a terminal as many columns as fit, elsewhere all."""
    lines = [table.columns, *[[cell.text for cell in row] for row in table.rows]]
    widths = [max(map(len, column)) + _BETWEEN for column in zip(*lines, strict=True)]
    count = len(widths)
    if console.is_terminal:
        while count > 1 and sum(widths[:count]) > console.width:
            count -= 1
    else:
        console.width = max(console.width, sum(widths))
    shown = RichTable.grid(padding=(0, _BETWEEN, 0, 0))
    for cell in table.rows[0][:count]:
        shown.add_column(justify="right" if cell.is_number else "left", no_wrap=True)
    shown.add_row(*(Text(name, "bold") for name in table.columns[:count]))
    for row in table.rows:
        styles = ("bold" if cell.style in ("up", "down") else "" for cell in row[:count])
        shown.add_row(*(Text(cell.text, s) for cell, s in zip(row, styles, strict=False)))
    console.print(shown)
    if count < len(widths):
        console.print(f"The report also has {', '.join(table.columns[count:])}.", style="dim")
