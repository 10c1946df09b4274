"""The directory of a run: when a run may begin there, and who writes; no torch, if possible."""

import json
import logging
import os
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import asdict
from pathlib import Path
from typing import Any

from filelock import FileLock, Timeout
from typing_extensions import Self

from .._util.errors import first_difference
from .._util.files import (
    SCRATCH,
    json_lines,
    json_text,
    local_path,
    read_lines,
    remove,
    replace_all,
    writing,
)
from .._util.options import read_file
from ..adapters.location import ADAPTER
from .recipe import Recipe
from .run_files import CHECKPOINTS, LOCK, LOG, PREDICTIONS, RECIPE, SCORES, SUMMARY

_FILES = (SUMMARY, CHECKPOINTS, ADAPTER, LOG, SCORES, PREDICTIONS)
"""What is written, but for the recipe, in the order in which it is removed.

Without the first two, what is left is no finished run and none to continue.
"""

logger = logging.getLogger(__name__)


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
        self.is_trained = resume and (self.path / SUMMARY).exists() and not self.is_finished
        """Whether the run that is resumed lacks only its scores."""

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self._held.close()

    def begin(self, step: int) -> None:
        """Make the directory, without what an earlier run left.

        A resumed one keeps its recipe, and the log's lines up to the step.
        """
        self._hold()
        if self.checkpoint is None:
            if self._resume:
                logger.warning("%s: no complete checkpoint, the run starts over", self.path)
            self._clear()
            replace_all(self.path, {RECIPE: self._recipe.to_yaml().encode()})
        lines = [line for line in read_lines(self.path / LOG) if line["step"] <= step]
        replace_all(self.path, {LOG: json_lines(lines)})

    def reopen(self) -> dict[str, Any]:
        """Keep other processes from a trained run, and read its summary."""
        self._hold()
        remove(self.path / CHECKPOINTS)  # unless the run was killed before this
        try:
            summary: dict[str, Any] = json.loads((self.path / SUMMARY).read_text(encoding="utf-8"))
        except ValueError as error:
            raise ValueError(f"{self.path / SUMMARY}: damaged ({error})") from None
        return summary

    def _hold(self) -> None:
        self.path.mkdir(parents=True, exist_ok=True)
        self._held.enter_context(alone(self.path))
        if self._find_checkpoint() != self.checkpoint:
            raise ValueError(f"output_dir {self.path}: another process has written there")

    def log(self, line: dict[str, Any]) -> None:
        """Add a line to the log."""
        path = self.path / LOG
        with writing(path), path.open("a", encoding="utf-8") as file:
            file.write(json_text(line) + "\n")

    def finish(self, summary: dict[str, Any]) -> None:
        """Write the summary, which says that the run is finished, and remove its checkpoints."""
        replace_all(self.path, {SUMMARY: json_text(summary, indent=2).encode() + b"\n"})
        remove(self.path / CHECKPOINTS)

    def _find_checkpoint(self) -> str | None:
        """Where to go on from; None for a new run, which must not take the place of another."""
        path = self.path
        if path.exists() and not path.is_dir():
            raise ValueError(f"output_dir {path}: expected a directory, found a file")
        if self._resume and not self.is_finished:
            return self._resumed()
        if self._overwrite:
            return None
        # The Trainer makes an empty folder of checkpoints before anything is trained.
        is_begun = any((path / CHECKPOINTS).glob("checkpoint-*"))
        names = (RECIPE, *(name for name in _FILES if name != CHECKPOINTS))
        file = next((name for name in names if (path / name).exists()), None)
        if file is None and not is_begun:
            return None
        held, instead = f"{file} already", "choose another --output_dir"
        if (path / SUMMARY).exists():
            held = "a finished run"
        elif is_begun:
            held, instead = "an unfinished run", "--resume it"
        raise ValueError(f"output_dir {path} holds {held}: {instead}, or --overwrite it")

    @property
    def is_finished(self) -> bool:
        """Whether the directory holds the summary, and scores if the recipe names what to score."""
        evaluation = self._recipe.evaluation
        names = (SUMMARY, SCORES) if evaluation.is_wanted else (SUMMARY,)
        return all((self.path / name).exists() for name in names)

    def _resumed(self) -> str | None:
        """The checkpoint of a run that was killed; None if it has none, or needs none any more."""
        path = self.path
        if path.is_dir() and not (path / RECIPE).exists() and _holds_nothing(path):
            return None  # killed before its recipe was written
        _expect_same(self._recipe, path / RECIPE)
        if (path / SUMMARY).exists():
            return None
        from .trainer import find_checkpoint

        return find_checkpoint(str(path / CHECKPOINTS))

    def _clear(self) -> None:
        """Remove what an earlier run left, and nothing else."""
        for name in _FILES:
            remove(self.path / name)


def _expect_same(recipe: Recipe, path: Path) -> None:
    """Raise a ValueError if a recipe would train differently than that of the resumed run."""
    if not path.exists():
        lack = f"no {RECIPE} in it" if path.parent.exists() else "no such directory"
        raise ValueError(f"{path.parent}: {lack}, so there is no run to resume")
    before, now = asdict(read_file(Recipe, path)), asdict(recipe)
    for name in ("output_dir", "device", "evaluation"):
        del before[name], now[name]
    if difference := first_difference(before, now):
        where, old, new = difference
        raise ValueError(
            f"{where} {new!r}: the run that is to be resumed has {old!r}; leave it, or "
            "--overwrite the run"
        )


def _holds_nothing(path: Path) -> bool:
    """Whether a directory has no more than the lock and the folders that a run begins with."""
    return all(p.name in (LOCK, CHECKPOINTS) or p.name.startswith(SCRATCH) for p in path.iterdir())
