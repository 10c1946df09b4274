"""The progress bar of a Trainer."""

import time
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from transformers import TrainerCallback


class RichProgressCallback(TrainerCallback):
    """One line per run: name, bar, steps, loss, speed and time left.

    Tokens per second are shown where the trainer counts tokens
    (`include_num_input_tokens_seen="non_padding"`).
    """

    def __init__(self, console: Console, description: str) -> None:
        self._progress = Progress(
            TextColumn("{task.description}", markup=False),
            BarColumn(),
            MofNCompleteColumn(),
            TextColumn("loss {task.fields[loss]}{task.fields[speed]}"),
            TimeRemainingColumn(elapsed_when_finished=True),
            console=console,
        )
        self._task = self._progress.add_task(description, total=None, loss="…", speed="")
        self._started, self._before = 0.0, 0

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self._progress.update(self._task, total=state.max_steps)
        self._progress.start()
        self._started, self._before = time.perf_counter(), state.num_input_tokens_seen

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self._progress.update(self._task, completed=state.global_step)
        if tokens := state.num_input_tokens_seen - self._before:
            speed = f", {tokens / (time.perf_counter() - self._started):,.0f} tokens/s"
            self._progress.update(self._task, speed=speed)

    def on_log(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if "loss" in (logs := kwargs.get("logs") or {}):
            self._progress.update(self._task, loss=f"{float(logs['loss']):.3f}")

    def on_train_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.stop()

    def stop(self) -> None:
        """Leave the bar as it is. Call this after an exception, which Trainers do not pass on."""
        self._progress.stop()
