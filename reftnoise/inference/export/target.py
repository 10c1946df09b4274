"""What an adapter can be exported to, and where; without torch."""

import importlib.util
import json
import os
from pathlib import Path

from ..._util.errors import nearest

TARGETS = ("merged", "lora", "gguf-control-vector")
RECORD = "export.json"
"""The file next to an export that says of what it is, and how far from it."""


def expect_target(to: str | None) -> None:
    """Raise a ValueError for what no adapter is exported to, and an ImportError without gguf."""
    if to is None:
        raise ValueError(f"to is missing: expected one of {', '.join(TARGETS)}")
    if to not in TARGETS:
        raise ValueError(f"to {to!r}: {nearest(to, TARGETS)}")
    if to == "gguf-control-vector" and importlib.util.find_spec("gguf") is None:
        raise ImportError("gguf-control-vector needs the package gguf: pip install 'gguf>=0.17'")


def expect_free_directory(directory: Path, *, overwrite: bool) -> None:
    """Raise a ValueError unless an export may be written to a directory.

    Args:
        directory: directory that is to be written.
        overwrite: whether an earlier export there is replaced; nothing else ever is.
    """
    if os.path.ismount(directory) or (directory.exists() and directory.samefile(Path.cwd())):
        raise ValueError(
            f"directory {directory}: the working directory and mount points cannot be replaced; "
            "name a new one"
        )
    if directory.exists() and not directory.is_dir():
        raise ValueError(f"directory {directory}: expected a directory, found a file")
    if not directory.is_dir() or not any(directory.iterdir()):
        return
    written = _written(directory / RECORD)
    others = [name for name in files_in(directory) if name not in written]
    if others:
        raise ValueError(
            f"directory {directory} holds other files than an export's, such as {others[0]}: "
            "choose a new one"
        )
    if not overwrite:
        raise ValueError(
            f"directory {directory} holds an export already: choose another, or --overwrite it"
        )


def files_in(directory: Path) -> list[str]:
    """The paths of files in a directory and its folders, relative to it."""
    paths = (path for path in directory.rglob("*") if path.is_symlink() or not path.is_dir())
    return sorted(path.relative_to(directory).as_posix() for path in paths)


def _written(record: Path) -> list[str]:
    """The files that an export has written, by its record; none where it is no such record."""
    try:
        files = json.loads(record.read_text(encoding="utf-8"))["files"]
    except (OSError, ValueError, TypeError, KeyError):
        return []
    return [RECORD, *files] if isinstance(files, list) else []
