"""Progress bars for whatever counts its steps."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn


@contextmanager
def progress_of(console: Console | None, description: str) -> Iterator[Callable[..., None] | None]:
    """A function that moves a bar to (done, total[, text]); None where there is no console."""
    if console is None:
        yield None
        return
    with Progress(
        TextColumn("{task.description}", markup=False),
        BarColumn(),
        MofNCompleteColumn(),
        TextColumn("{task.fields[text]}", markup=False),
        TimeRemainingColumn(elapsed_when_finished=True),
        console=console,
    ) as bar:
        task = bar.add_task(description, total=None, text="")
        yield lambda done, total, text="": bar.update(task, completed=done, total=total, text=text)
