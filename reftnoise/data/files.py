"""Which sources of rows are files, and the rows of texts; nothing heavy is imported here.

Text stays text: a cell of a CSV file is what the file says, and a date in JSON is no date.
"""

import codecs
import csv
import functools
import json
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import IO, Any, TypeAlias

from .._util.errors import brief
from .._util.files import local_path

PlacedRow: TypeAlias = tuple[str, dict[str, Any]]
"""A row, and before it where it is in its file, such as `line 3`."""

_DEPTH = 100
"""Levels of lists and mappings in a value; programs that walk through more end in errors."""
_INTEGERS = range(-(2**63), 2**63)
_CHECKED_BYTES = 2**23
"""Size up to which a file is read before anything else is done, in a fraction of a second."""
csv.field_size_limit(2**31 - 1)  # texts may be longer than the default of 2**17 letters


def is_path(source: str | Path) -> bool:
    """Whether a source is a path rather than a hub dataset's `owner/name`."""
    path, text = local_path(source, "data"), str(source)
    return (
        not isinstance(source, str)
        or path.suffix in LOADERS
        or text.startswith((".", "~"))
        or path.is_absolute()
        or text.count("/") > 1
        or path.is_file()
        or (path.parent != Path() and path.parent.is_dir())
    )


def expect_file(source: str | Path) -> None:
    """Raise an error for a path that is no file of rows; a small one is read to its end.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: nothing reads such files, or the file is damaged.
    """
    if not is_path(source):
        return
    path = local_path(source, "data")
    is_known = path.suffix in LOADERS
    if not path.exists() or (is_known and not path.is_file()):
        raise FileNotFoundError(f"{path}: no such file")
    if not is_known:
        raise ValueError(f"{path}: expected a file that ends in {', '.join(LOADERS)}")
    facts = path.stat()
    if LOADERS[path.suffix] is not None and facts.st_size <= _CHECKED_BYTES:
        _expect_rows(path, facts.st_mtime_ns, facts.st_size)


@functools.cache
def _expect_rows(path: Path, _time: int, _size: int) -> None:
    """Read a file, once for each of its states, since studies name it often."""
    has_columns = False
    for _, row in placed_rows(path):
        has_columns |= bool(row)
    if not has_columns:
        raise ValueError(f"{path}: no rows in it")


def placed_rows(path: Path) -> Iterator[PlacedRow]:
    """The rows of a file of text, each with its place.

    Raises:
        ValueError: the file is damaged; the message has its path and the place.
    """
    read = LOADERS[path.suffix]
    assert read is not None
    try:
        yield from read(path)
    except ValueError as error:
        raise ValueError(f"{path}, {error}") from None


def json_lines_of(path: Path) -> Iterator[PlacedRow]:
    """The rows of a file with a JSON mapping in each line."""
    with path.open("rb") as file:
        yield from _json_lines(file)


def _json_rows(path: Path) -> Iterator[PlacedRow]:
    """The rows of a JSON list, or of lines."""
    with path.open("rb") as file:
        start = file.read(4096).removeprefix(codecs.BOM_UTF8).lstrip()
        file.seek(0)
        if not start.startswith(b"["):
            yield from _json_lines(file)
            return
        rows = _json_value(file.read().removeprefix(codecs.BOM_UTF8), "row 0")
    for index, row in enumerate(rows):
        yield f"row {index}", _mapping(row, f"row {index}")


def _json_lines(file: IO[bytes]) -> Iterator[PlacedRow]:
    for number, line in enumerate(file, start=1):
        text = line.removeprefix(codecs.BOM_UTF8) if number == 1 else line
        if text.strip():
            place = f"line {number}"
            yield place, _mapping(_json_value(text, place), place)


def _json_value(text: bytes, place: str) -> Any:
    try:
        return json.loads(text.decode(), parse_constant=_refuse)
    except RecursionError:
        raise ValueError(f"{place}: nested more than {_DEPTH} levels deep") from None
    except UnicodeDecodeError:
        raise ValueError(f"{place}: not UTF-8") from None
    except ValueError as error:
        raise ValueError(f"{place}: not JSON ({error})") from None


def _refuse(constant: str) -> None:
    raise ValueError(f"{constant} is no number of JSON")


def _mapping(row: Any, place: str) -> dict[str, Any]:
    if not isinstance(row, dict):
        raise ValueError(f"{place}: expected a mapping, got {brief(row)}")
    try:
        _expect_storable(row, 0)
        _expect_columns(row)
    except ValueError as error:
        raise ValueError(f"{place}: {error}") from None
    return row


def _expect_columns(names: Iterable[str]) -> None:
    """Raise a ValueError for a column's name that a table would cut off."""
    for name in names:
        if "\0" in name:
            raise ValueError(f"column {brief(name)}: expected a name without NUL characters")


def _expect_storable(value: Any, depth: int) -> None:
    """Raise a ValueError for what JSON can say and no table can hold."""
    match value:
        case str() if not value.isascii():
            _expect_encodable(value)
        case int() if value not in _INTEGERS:
            raise ValueError("an integer of more than 64 bits")
        case dict() | list() if depth == _DEPTH:
            raise ValueError(f"nested more than {_DEPTH} levels deep")
        case dict():
            for key, item in value.items():
                _expect_encodable(key)
                _expect_storable(item, depth + 1)
        case list():
            for item in value:
                _expect_storable(item, depth + 1)


def _expect_encodable(text: str) -> None:
    try:
        text.encode()
    except UnicodeEncodeError:
        raise ValueError("a text that is not UTF-8") from None


def _separated_rows(path: Path, delimiter: str) -> Iterator[PlacedRow]:
    """The rows of a table whose first line has the names of columns; each cell is a text."""
    with path.open(encoding="utf-8-sig", errors="surrogateescape", newline="") as file:
        reader, names, place = csv.reader(file, delimiter=delimiter, strict=True), None, ""
        while True:
            place = f"line {reader.line_num + 1}"
            try:
                cells = next(reader, None)
            except csv.Error as error:
                raise ValueError(f"{place}: {error}") from None
            if cells is None:
                return
            if not cells:
                continue
            try:
                for cell in cells:
                    _expect_encodable(cell)
                if names is None:
                    _expect_columns(cells)
            except ValueError as error:
                raise ValueError(f"{place}: {error}") from None
            if names is None:
                names = _names(cells, place)
                continue
            if len(cells) != len(names):
                listed = ", ".join(names)[:80]
                raise ValueError(f"{place}: {len(cells)} cells, expected {len(names)} ({listed})")
            yield place, dict(zip(names, cells, strict=True))


def _names(cells: list[str], place: str) -> list[str]:
    # As pandas names the column of its index.
    names = [name or f"Unnamed: {index}" for index, name in enumerate(cells)]
    if len(set(names)) < len(names):
        raise ValueError(f"{place}: two columns have one name: {', '.join(names)[:80]}")
    return names


LOADERS: dict[str, Callable[[Path], Iterator[PlacedRow]] | None] = {
    ".jsonl": json_lines_of,
    ".json": _json_rows,
    ".csv": functools.partial(_separated_rows, delimiter=","),
    ".tsv": functools.partial(_separated_rows, delimiter="\t"),
    ".parquet": None,
}
"""By suffix, what reads the rows of a file; None for what datasets reads."""
