"""The directory of a run: when a run may begin there, and who writes; no torch, if possible."""

import os
import shutil
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import asdict
from pathlib import Path
from typing import Any

from filelock import FileLock, Timeout
from typing_extensions import Self

from .._util.files import json_lines, json_text, local_path, read_lines, replace_all
from .._util.options import read_file
from .recipe import Recipe
from .run_files import ADAPTER, CHECKPOINTS, LOCK, LOG, PREDICTIONS, RECIPE, SCORES, SUMMARY

_FILES = (ADAPTER, LOG, SUMMARY, SCORES, PREDICTIONS)  # what is written, but for the recipe
_SECTIONS = ("data", "training")


def is_main_process() -> bool:
    """Whether this is the first process that a launcher started, or the only one."""
    return os.environ.get("RANK", "0") == "0"


@contextmanager
def alone(directory: Path, *, seconds: float = 0) -> Iterator[None]:
    """Keep other processes from writing in a directory; the same process may do so twice.

    Raises:
        ValueError: another process still writes there after so many seconds.
    """
    lock = FileLock(directory / LOCK, is_singleton=True)
    try:
        lock.acquire(timeout=seconds)
    except Timeout:
        raise ValueError(f"{directory}: another process is writing there") from None
    try:
        yield
    finally:
        lock.release()


class RunDirectory:
    """A run's directory, which one process at a time writes, from `begin` to the context's end.

    Nothing is written, and nothing of an earlier run removed, before `begin`. Arguments are as in
    `run_recipe`.

    Raises:
        ValueError: the directory holds another run, none to resume, or another process writes it.
    """

    def __init__(self, recipe: Recipe, *, resume: bool, overwrite: bool) -> None:
        self.path = local_path(recipe.output_dir, "output_dir")
        self._recipe, self._resume, self._overwrite = recipe, resume, overwrite
        self._held = ExitStack()
        if is_main_process() and (self.path / LOCK).exists():
            with alone(self.path):  # raises before the base is loaded
                pass
        self.checkpoint = self._find_checkpoint()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self._held.close()

    def begin(self, step: int) -> None:
        """Make the directory, without what an earlier run left.

        A resumed one keeps its recipe, and the log's lines up to the step.
        """
        self.path.mkdir(parents=True, exist_ok=True)
        self._held.enter_context(alone(self.path))
        if self._find_checkpoint() != self.checkpoint:
            raise ValueError(f"output_dir {self.path}: another process has written there")
        if self.checkpoint is None:
            self._clear()
            replace_all(self.path, {RECIPE: self._recipe.to_yaml().encode()})
        lines = [line for line in read_lines(self.path / LOG) if line["step"] <= step]
        replace_all(self.path, {LOG: json_lines(lines)})

    def log(self, line: dict[str, Any]) -> None:
        """Add a line to the log."""
        with (self.path / LOG).open("a", encoding="utf-8") as file:
            file.write(json_text(line) + "\n")

    def finish(self, summary: dict[str, Any]) -> None:
        """Write the summary, which says that the run is finished, and remove its checkpoints."""
        replace_all(self.path, {SUMMARY: json_text(summary, indent=2).encode() + b"\n"})
        shutil.rmtree(self.path / CHECKPOINTS, ignore_errors=True)

    def _find_checkpoint(self) -> str | None:
        """Where to go on from; None for a new run, which must not take the place of another."""
        path = self.path
        if path.exists() and not path.is_dir():
            raise ValueError(f"output_dir {path}: expected a directory, found a file")
        if self._resume and not (path / SUMMARY).exists():
            _expect_same(self._recipe, path / RECIPE)
            from .trainer import last_complete_checkpoint

            return last_complete_checkpoint(str(path / CHECKPOINTS))
        if self._overwrite:
            return None
        # The Trainer makes an empty folder of checkpoints before anything is trained.
        is_begun = any((path / CHECKPOINTS).glob("checkpoint-*"))
        file = next((name for name in (RECIPE, *_FILES) if (path / name).exists()), None)
        if file is None and not is_begun:
            return None
        held, instead = f"{file} already", "choose another --output_dir"
        if (path / SUMMARY).exists():
            held = "a finished run"
        elif is_begun:
            held, instead = "an unfinished run", "--resume it"
        raise ValueError(f"output_dir {path} holds {held}: {instead}, or --overwrite it")

    def _clear(self) -> None:
        """Remove what an earlier run left, and nothing else."""
        for path in (self.path / name for name in (*_FILES, CHECKPOINTS)):
            if path.is_dir():
                shutil.rmtree(path)
            else:
                path.unlink(missing_ok=True)


def _expect_same(recipe: Recipe, path: Path) -> None:
    """Raise a ValueError if a recipe would train differently than that of the resumed run."""
    if not path.exists():
        raise ValueError(f"{path.parent}: no {RECIPE} in it, so there is no run to resume")
    before, now = asdict(read_file(Recipe, path)), asdict(recipe)
    for name in ("output_dir", "device", "evaluation"):
        del before[name], now[name]
    for name, value in before.items():
        if value != now[name]:
            parts = [n for n in value if value[n] != now[name].get(n)] if name in _SECTIONS else []
            where, old = (f"{name}.{parts[0]}", value[parts[0]]) if parts else (name, value)
            new = now[name][parts[0]] if parts else now[name]
            raise ValueError(
                f"{where} {new!r}: the run that is to be resumed has {old!r}; leave it, or "
                "--overwrite the run"
            )
