"""Files that are replaced as a whole; JSON as runs and studies write and read it."""

import json
import os
import tempfile
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any


def replace_all(directory: Path, files: Mapping[str, bytes]) -> None:
    """Write files under temporary names; when all are whole, rename them one by one."""
    with tempfile.TemporaryDirectory(prefix=".saving-", dir=directory) as scratch:
        for name, content in files.items():
            (Path(scratch) / name).write_bytes(content)
        for name in files:
            os.replace(Path(scratch) / name, directory / name)


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
