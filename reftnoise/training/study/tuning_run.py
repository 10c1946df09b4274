"""Run a search: in this process, or in several that share its trials."""

import logging
import os
from collections.abc import Callable, Sequence
from multiprocessing import connection
from multiprocessing.connection import Connection
from typing import Any

import torch
from rich.console import Console

from ..._util.numbers import significant
from ..._util.progress import progress_of
from .cell import follow_parent, prepare
from .runner import process_context, stop_all, terminated_as_interrupted
from .space import Tuning, check_tuning
from .tuning import TrialStorage, TunedTrial, best_of, run_trials

logger = logging.getLogger(__name__)

_SECONDS = 0.5
"""Between two looks at what the processes have finished."""


def run_tuning(tuning: Tuning, *, console: Console | None = None) -> list[TunedTrial]:
    """Run the trials that are missing, write the best recipe, and return all finished trials.

    A search that was interrupted or killed continues. Other processes may run the same search at
    the same time. Progress is shown on the console, if there is one.

    Raises:
        ValueError, OSError: the recipe or the search is wrong, or the directory holds another one.
    """
    check_tuning(tuning)
    storage = TrialStorage(tuning)
    with terminated_as_interrupted(), progress_of(console, "trials") as progress:

        def show(trials: Sequence[TunedTrial]) -> None:
            if progress is not None:
                progress(len(trials), tuning.trials, _text(trials))

        if tuning.jobs == 1:
            threads = torch.get_num_threads()
            torch.set_num_threads(tuning.threads or threads)
            try:
                run_trials(storage, show)
            finally:
                torch.set_num_threads(threads)
        else:
            _in_processes(storage, show)
    storage.write_best()
    return storage.finished()


def _text(trials: Sequence[TunedTrial]) -> str:
    if not any(trial.is_complete for trial in trials):
        return ""
    best = best_of(trials)
    loss = f"loss {significant(best.loss)}"
    return f"best {best.right.count('1') / len(best.right):.1%}, {loss}" if best.right else loss


def _in_processes(storage: TrialStorage, show: Callable[[Sequence[TunedTrial]], None]) -> None:
    tuning = storage.tuning
    context = process_context(__name__)
    threads = tuning.threads or max(1, (os.cpu_count() or 1) // tuning.jobs)
    running: dict[Any, Any] = {}
    problem = None
    try:
        for job in range(tuning.jobs):
            gpu = tuning.gpus[job % len(tuning.gpus)] if tuning.gpus else None
            pipe, end = context.Pipe(duplex=False)
            process = context.Process(target=_job, args=(end, tuning, threads, gpu), daemon=True)
            process.start()
            end.close()
            running[pipe] = process
        while running:
            show(storage.finished())
            for pipe in connection.wait(list(running), timeout=_SECONDS):
                process = running.pop(pipe)
                problem = problem or _end_of(pipe, process)
    finally:
        stop_all(list(running.values()))
    show(storage.finished())
    if problem is not None and not any(trial.is_complete for trial in storage.finished()):
        raise ValueError(problem)
    if problem is not None:
        logger.warning("a process of the search ended early: %s", problem)


def _job(end: Connection, tuning: Tuning, threads: int, gpu: int | None) -> None:
    """Run trials in a process of its own; an error's text goes through the pipe."""
    follow_parent()
    prepare(threads, gpu)
    try:
        run_trials(TrialStorage(tuning), lambda _: None)
        end.send("")
    except Exception as error:  # the parent reports it
        end.send(str(error))


def _end_of(pipe: Any, process: Any) -> str | None:
    """Why a process ended, if not because there were enough trials."""
    try:
        text = str(pipe.recv())
    except EOFError:
        text = None
    process.join()
    if text is None:
        return f"a process of the search ended with exit code {process.exitcode}"
    return text or None
