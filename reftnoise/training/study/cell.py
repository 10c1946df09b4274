"""One cell of a study, in a process of its own; imported ahead, so that each starts at once."""

import os
import shutil
import signal
import sys
import threading
import time
import warnings
from multiprocessing.connection import Connection

import torch
from transformers.utils import logging as transformers_logging

from ...adapters.location import ADAPTER
from ..recipe import Recipe
from ..resolved_run import ResolvedRun
from ..run import run_recipe
from ..run_scores import FORGETTING
from .grid import Cell
from .results import Outcome


def check_cell(cell: Cell) -> None:
    """Raise what the cell's run would, as far as that is known before a model is loaded."""
    with cell.named():
        run = ResolvedRun(cell.recipe)
        _ = run.config, run.arguments, run.scored_rows


def prepare(threads: int, gpu: int | None) -> None:
    """Give this process its threads and its GPU, and hide what users can do nothing about."""
    if gpu is not None:
        visible = os.environ.get("CUDA_VISIBLE_DEVICES")
        os.environ["CUDA_VISIBLE_DEVICES"] = visible.split(",")[gpu] if visible else str(gpu)
    torch.set_num_threads(threads)
    transformers_logging.set_verbosity_error()
    warnings.filterwarnings("ignore", category=FutureWarning)  # as on the command line


def run_cell(recipe: Recipe, threads: int, gpu: int | None, keep_adapter: bool) -> Outcome:
    """Train and score; the cell's line of the results file, without its name."""
    prepare(threads, gpu)
    run = ResolvedRun(recipe)
    summary, (entry, *others) = run_recipe(run, overwrite=True)
    if not keep_adapter:
        shutil.rmtree(run.directory / ADAPTER)
    outcome: Outcome = {
        "scores": entry["scores"],
        "parameters": summary["parameters"]["units"] + summary["parameters"]["base"],
        "seconds": summary["seconds"],
        "peak_memory_bytes": summary["peak_memory_bytes"],
        "train_loss": summary["train_loss"],
    }
    outcome["scores"] = entry["scores"] | {
        f"{name} on {other['data']}": other["scores"][name]
        for other in others
        if other["task"] == FORGETTING and other["adapter"]
        for name in ("kl", "change")
    }
    if "losses" in entry:
        outcome["losses"] = entry["losses"]
    else:
        outcome["right"] = entry["right"]
    return outcome


def run_in_process(
    end: Connection, recipe: Recipe, threads: int, gpu: int | None, keep_adapter: bool
) -> None:
    """Send the result of `run_cell`, or the text of its error, through a pipe."""
    follow_parent()
    try:
        end.send(run_cell(recipe, threads, gpu, keep_adapter))
    except Exception as error:  # the parent reports it, and runs the other cells
        end.send(f"{type(error).__name__}: {error}")


def follow_parent() -> None:
    """Leave interrupts to the process that started this one, and end when it ends."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # a terminal's Ctrl-C reaches the study, too
    # Terminated, a process would leave its semaphores behind; Python's own way out cleans up.
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(1))
    threading.Thread(target=_leave_with_parent, args=(os.getppid(),), daemon=True).start()


def _leave_with_parent(parent: int) -> None:
    """End this process when the study was killed: its result would not be read."""
    while os.getppid() == parent:
        time.sleep(1)
    os._exit(1)
