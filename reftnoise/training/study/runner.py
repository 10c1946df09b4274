"""Run the cells of a study that have no result yet, several at a time."""

import multiprocessing
import os
import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from multiprocessing import connection
from pathlib import Path
from typing import Any

from rich.console import Console

from ..._util.files import local_path, replace_all
from ..._util.options import read_file
from ..._util.progress import progress_of
from ..run_directory import alone
from ..run_files import CELLS, STUDY
from .cell import check_cell, run_in_process
from .grid import Cell, Study, checked_cells
from .results import Outcome, Result, append_result, read_results


def run_study(study: Study, *, console: Console | None = None) -> list[Result]:
    """Run what is missing, and return all results in the order of the grid.

    A cell's result is one line of `results.jsonl`, written when it is finished. A study that was
    killed continues with the other cells. A cell whose recipe has changed runs again. Progress is
    shown on the console, if there is one.

    Raises:
        ValueError: the study is contradictory, another process runs it, or cells failed: the
            message names the first, after all others have run.
    """
    grid = checked_cells(study)
    for cell in {cell.key: cell for cell in grid if cell.levels["seed"] == study.seeds[0]}.values():
        check_cell(cell)
    directory = local_path(study.output_dir, "output_dir")
    if directory.exists() and not directory.is_dir():
        raise ValueError(f"output_dir {directory}: expected a directory, found a file")
    directory.mkdir(parents=True, exist_ok=True)
    with alone(directory):
        if not _is_written(study, directory / STUDY):
            replace_all(directory, {STUDY: study.to_yaml().encode()})
        done = {result["key"]: result for result in read_results(directory)}
        failed = _run(study, [cell for cell in grid if cell.key not in done], directory, console)
    if failed:
        cell, error = failed[0]
        raise ValueError(f"{len(failed)} of {len(grid)} cells failed; {cell.name}: {error}")
    done = {result["key"]: result for result in read_results(directory)}
    return [{**done[cell.key], "cell": cell.levels} for cell in grid]


def process_context(module: str) -> Any:
    """What starts processes of their own that have a module already, where that is possible."""
    method = "forkserver" if "forkserver" in multiprocessing.get_all_start_methods() else "spawn"
    context: Any = multiprocessing.get_context(method)
    if method == "forkserver":
        context.set_forkserver_preload([module])
    return context


def _is_written(study: Study, path: Path) -> bool:
    """Whether a file holds the same study, perhaps with comments and in another order."""
    try:
        return read_file(Study, path) == study
    except (OSError, ValueError):
        return False


def _run(
    study: Study, todo: list[Cell], directory: Path, console: Console | None
) -> list[tuple[Cell, str]]:
    """Run each cell in its own process, which has its own draws and peak memory."""
    context = process_context(f"{__package__}.cell")
    threads = study.threads or max(1, (os.cpu_count() or 1) // study.jobs)
    gpus = [study.gpus[i % len(study.gpus)] if study.gpus else None for i in range(study.jobs)]
    failed: list[tuple[Cell, str]] = []
    waiting = todo[::-1]
    running: dict[Any, tuple[Cell, int | None, Any]] = {}  # by the pipe that a result comes from
    with terminated_as_interrupted(), progress_of(console, "cells", len(todo)) as progress:
        try:
            while waiting or running:
                while waiting and gpus:
                    cell, gpu = waiting.pop(), gpus.pop()
                    recipe = replace(cell.recipe, output_dir=str(directory / CELLS / cell.name))
                    pipe, end = context.Pipe(duplex=False)
                    arguments = (end, recipe, threads, gpu, study.keep_adapters)
                    process = context.Process(target=run_in_process, args=arguments, daemon=True)
                    process.start()
                    end.close()
                    running[pipe] = cell, gpu, process
                for pipe in connection.wait(list(running)):
                    cell, gpu, process = running.pop(pipe)
                    gpus.append(gpu)
                    outcome = _received(pipe, process)
                    if isinstance(outcome, str):
                        failed.append((cell, outcome))
                    else:
                        append_result(directory, {"cell": cell.levels, "key": cell.key, **outcome})
                if progress is not None:
                    progress(len(todo) - len(waiting) - len(running), len(todo))
        finally:
            stop_all([process for _, _, process in running.values()])
    return failed


def stop_all(processes: list[Any]) -> None:
    """Let processes end by themselves, and kill them after some seconds."""
    for process in processes:
        process.terminate()
    for process in processes:
        process.join(timeout=10)
        process.kill()


def _received(pipe: Any, process: Any) -> Outcome | str:
    """A cell's result, or why there is none."""
    try:
        outcome: Outcome | str = pipe.recv()
    except EOFError:
        outcome = ""
    process.join()
    return outcome or f"its process ended with exit code {process.exitcode}"


@contextmanager
def terminated_as_interrupted() -> Iterator[None]:
    """SIGTERM ends a study as Ctrl-C does, so that no process is left running."""

    def leave(*_: Any) -> None:
        raise KeyboardInterrupt

    if threading.current_thread() is not threading.main_thread():
        yield
        return
    before = signal.signal(signal.SIGTERM, leave)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)
