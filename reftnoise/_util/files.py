"""Files that are replaced as a whole; JSON as runs and studies write and read it."""

import contextlib
import json
import os
import re
import shutil
import tempfile
import time
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

from .errors import brief

SCRATCH = ".saving-"
"""The beginning of a scratch folder's name, in the directory that is saved into."""

_PATIENCE = 60.0
"""Seconds that a save waits for another into the same directory."""


def local_path(path: str | os.PathLike[str], name: str = "path") -> Path:
    """A path of this machine, with `~` and `~user` as home directories, as in a shell.

    Variables such as `$HOME` are text. Each path of a user passes here once, so that all parts of
    the library and the packages under it read the same place.

    Args:
        path: the path, perhaps of nothing yet.
        name: the argument that an error names.

    Raises:
        ValueError: the path is no text and no path, is empty, or has a null character.
    """
    text = os.fspath(path) if isinstance(path, str | os.PathLike) else None
    if not isinstance(text, str) or not text or "\0" in text:
        raise ValueError(f"{name} {brief(path)}: expected a path, such as runs/first")
    return Path(os.path.expanduser(text))  # Path.expanduser refuses a file named ~draft


@contextlib.contextmanager
def writing(path: Path) -> Iterator[None]:
    """Within the block, a failed write is an OSError that names a file, or else the path.

    Python leaves the name out where a file was open already. tokenizers and safetensors raise
    exceptions of their own, and torch a RuntimeError.
    """
    try:
        yield
    except OSError as error:
        if error.filename is not None or error.errno is None:
            raise
        raise OSError(error.errno, error.strerror, str(path)) from None
    except Exception as error:
        if match := re.search(r"\(os error (\d+)\)", str(error)):  # of Rust
            raise OSError(int(match[1]), os.strerror(int(match[1])), str(path)) from None
        if isinstance(error, RuntimeError) and "PytorchStreamWriter failed" in str(error):
            raise OSError(f"{path}: a write failed, is the disk full?") from None
        raise


def replace_all(directory: Path, files: Mapping[str, bytes]) -> None:
    """Write files under temporary names; when all are whole, rename them one by one, in order.

    Where several processes or threads save into a directory, one waits for the other, so that all
    files are of one save. What a killed save has left there is removed.
    """
    with writing(directory), _saving_alone(directory) as is_alone:
        if is_alone:  # the owner of any other scratch folder is dead, or it would hold the lock
            for leftover in directory.glob(f"{SCRATCH}*"):
                shutil.rmtree(leftover, ignore_errors=True)
        with tempfile.TemporaryDirectory(prefix=SCRATCH, dir=directory) as scratch:
            for name, content in files.items():
                (Path(scratch) / name).write_bytes(content)
            for name in files:
                os.replace(Path(scratch) / name, directory / name)


def remove(path: Path) -> None:
    """Remove a file, or a folder with all that is in it, at one instant; nothing if it is missing.

    A kill leaves a scratch folder, which `replace_all` removes.
    """
    if not path.is_dir() or path.is_symlink():
        path.unlink(missing_ok=True)
        return
    with (
        _saving_alone(path.parent),
        tempfile.TemporaryDirectory(prefix=SCRATCH, dir=path.parent) as scratch,
    ):
        os.replace(path, Path(scratch) / path.name)


def replace_directory(new: Path, place: Path) -> None:
    """Put a directory in the place of another, or of none, on the same file system.

    On Linux there is the old or the new one at every instant. What was there is removed.
    """
    if not place.is_dir():
        os.rename(new, place)
        return
    if not _exchanged(new, place):
        remove(place)
        os.rename(new, place)
        return
    shutil.rmtree(new)


def _exchanged(path: Path, other: Path) -> bool:
    """Exchange two paths at one instant; whether this system can."""
    import ctypes

    rename = getattr(ctypes.CDLL(None), "renameat2", None) if os.name == "posix" else None
    if rename is None:
        return False
    here, exchange = -100, 2  # AT_FDCWD and RENAME_EXCHANGE of Linux
    return rename(here, os.fsencode(path), here, os.fsencode(other), exchange) == 0


@contextlib.contextmanager
def _saving_alone(directory: Path) -> Iterator[bool]:
    """Hold the lock of a directory that is saved into, which ends with the process that holds it.

    Yields whether it is held: not on file systems without locks, nor after a wait of `_PATIENCE`
    for a process that was stopped, which must not stop others.
    """
    try:
        import fcntl  # not on Windows

        descriptor = os.open(directory, os.O_RDONLY)
    except (ImportError, OSError):
        yield False
        return
    is_held, end = False, time.monotonic() + _PATIENCE
    try:
        while not is_held:
            try:
                fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
                is_held = True
            except BlockingIOError:
                if time.monotonic() > end:
                    break
                time.sleep(0.01)
            except OSError:
                break
        yield is_held
    finally:
        if is_held:  # a child that was forked meanwhile has the descriptor, too
            fcntl.flock(descriptor, fcntl.LOCK_UN)
        os.close(descriptor)


def json_text(value: Any, *, indent: int | None = None) -> str:
    """A value as JSON that any reader takes: infinities and NaN become null."""
    finite = json.loads(json.dumps(value), parse_constant=lambda _: None)
    return json.dumps(finite, indent=indent, ensure_ascii=False)


def json_lines(rows: Iterable[Mapping[str, Any]]) -> bytes:
    """Mappings as the content of a file of JSON lines."""
    return "".join(json_text(row) + "\n" for row in rows).encode()


def read_lines(path: Path) -> list[dict[str, Any]]:
    """The mappings in a file of JSON lines; none where there is no file.

    A line that is no mapping is left out: it was cut off when its writer was killed.
    """
    if not path.is_file():
        return []
    rows = []
    for line in path.read_text(encoding="utf-8").split("\n"):
        try:
            value = json.loads(line)
        except ValueError:
            continue
        if isinstance(value, dict):
            rows.append(value)
    return rows
