"""What the examples show of a training: one bar, and nothing of the libraries'."""

import warnings
from typing import Any

import datasets
from tqdm import tqdm
from transformers import PrinterCallback, Trainer, TrainerCallback
from transformers.utils import logging as transformers_logging


def be_quiet() -> None:
    """Let libraries show neither bars of their own nor warnings."""
    datasets.disable_progress_bars()
    transformers_logging.disable_progress_bar()
    transformers_logging.set_verbosity_error()
    warnings.filterwarnings("ignore", category=FutureWarning)


def show_bar(trainer: Trainer, stage: str) -> None:
    """Let a trainer show a bar with the stage's name instead of lines of its logs."""
    trainer.remove_callback(PrinterCallback)
    trainer.add_callback(_Bar(stage))


class _Bar(TrainerCallback):
    def __init__(self, stage: str) -> None:
        self._stage = stage

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self._bar = tqdm(total=state.max_steps, desc=self._stage)

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self._bar.update()

    def on_train_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self._bar.close()
