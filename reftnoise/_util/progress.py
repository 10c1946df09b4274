"""Progress of whatever counts its steps: a bar on a terminal, lines in a file or a pipe."""

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from datetime import timedelta

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

_PARTS, _SECONDS = 10, 30.0
"""A file gets a line for each tenth of the work, and at the latest after so many seconds."""


@contextmanager
def progress_of(
    console: Console | None, description: str, total: int | None = None
) -> Iterator[Callable[..., None] | None]:
    """A function that shows (done, total[, text]); None where there is no console.

    The total is shown at once, if it is known.
    """
    if console is None:
        yield None
        return
    if not (console.is_terminal or console.is_jupyter):
        lines = _Lines(console, description)
        if total is not None:
            lines(0, total)
        yield lines
        return
    with Progress(
        TextColumn("{task.description}", markup=False),
        BarColumn(),
        MofNCompleteColumn(),
        TextColumn("{task.fields[text]}", markup=False),
        TimeRemainingColumn(elapsed_when_finished=True),
        console=console,
    ) as bar:
        task = bar.add_task(description, total=total, text="")
        yield lambda done, total, text="": bar.update(task, completed=done, total=total, text=text)


class _Lines:
    """Progress as lines such as `emoji: 12/120, loss 1.234, 5,000 tokens/s, 0:01:20 left`."""

    def __init__(self, console: Console, description: str) -> None:
        self._console, self._description = console, description
        self._started = self._last = time.monotonic()
        self._part = -1
        self._first: int | None = None
        """What was done before, by a run that is resumed."""

    def __call__(self, done: int, total: int, text: str = "") -> None:
        now = time.monotonic()
        if self._first is None:
            self._first = done
        part = done * _PARTS // max(total, 1)
        if part == self._part and now - self._last < _SECONDS:
            return
        self._part, self._last = part, now
        elapsed, here = now - self._started, done - self._first
        facts = [f"{self._description}: {done}/{total}", *([text] if text else [])]
        if done >= total:
            facts.append(f"in {_clock(elapsed)}")
        elif here:
            facts.append(f"{_clock(elapsed / here * (total - done))} left")
        self._console.print(", ".join(facts), markup=False, highlight=False, soft_wrap=True)


def _clock(seconds: float) -> str:
    return str(timedelta(seconds=round(seconds)))
