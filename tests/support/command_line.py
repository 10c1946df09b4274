"""The command line in this process, and a short run of it."""

from pathlib import Path
from typing import Any

from reftnoise.cli.main import main

LOREFT = '[{"layer": "all", "intervention": "loreft", "low_rank_dimension": 4}]'


def command(*arguments: Any) -> int:
    return main([str(argument) for argument in arguments])


def quick(directory: Path, *more: Any) -> tuple[Any, ...]:
    """A run of a few steps on the embedded model."""
    given = {
        "representations": LOREFT,
        "data.train": "tiny-chat",
        "data.template": "chat",
        "training.max_steps": 4,
        "training.logging_steps": 2,
        "training.learning_rate": 4e-3,
        "evaluation.data": "tiny-chat",
        "evaluation.split": "test[:8]",
        "output_dir": directory,
        "device": "cpu",
    }
    options = [part for name, value in given.items() for part in (f"--{name}", value)]
    return ("train", *options, *more)
