"""Rows of a file, of a hub dataset or of the embedded dataset."""

import csv
import glob
import hashlib
import logging
import re
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path
from typing import Any, TypeAlias
from uuid import uuid4

import datasets
from datasets.exceptions import DatasetGenerationError, DatasetsError
from datasets.fingerprint import get_temporary_cache_files_directory

from .._util.errors import one_line
from .._util.files import local_path
from ..engine.base import tiny
from .files import LOADERS, expect_file, is_path
from .tasks.base import RowError, row_as_written

Rows: TypeAlias = datasets.Dataset | datasets.IterableDataset


def load_rows(
    source: str | Path | Rows,
    *,
    split: str = "train",
    subset: str | None = None,
    streaming: bool = False,
) -> Rows:
    """The rows of one split, in memory-mapped tables or, with `streaming`, as they are needed.

    Args:
        source: JSONL, JSON, CSV or Parquet file, which is the whole of any split; name of a hub
            dataset; "tiny-chat", the embedded dataset; or rows, which are returned as they are.
        split: name of the split, or a slice of it such as `train[:-1000]`.
        subset: name of a subset, for hub datasets that have several.
        streaming: whether rows are read as they are needed; a stream has no slices.

    Raises:
        FileNotFoundError: a path that does not exist.
        ValueError: no rows, a file that cannot be read, an unknown dataset, split or slice.
    """
    if isinstance(source, Rows):
        return source
    name = re.match(r"\w+", split)
    if name is None:
        raise ValueError(f"split {split!r}: expected a name, or a slice such as train[:-1000]")
    if streaming and name[0] != split:
        raise ValueError(f"split {split!r}: a stream has no slices, expected a name such as train")
    is_file = is_path(source)
    if subset is not None and (is_file or source == tiny.NAME):
        raise ValueError(f"subset {subset!r}: {source} has none, only hub datasets do")
    with quiet():
        if is_file:
            rows = _load_file(local_path(source), name[0], streaming)
            rows = rows if streaming else _take({name[0]: rows}, split, source)
        elif source == tiny.NAME:
            rows = _take(_embedded(), split, source)
            rows = rows.to_iterable_dataset() if streaming else rows
        else:
            rows = _load_from_hub(str(source), split, subset, streaming)
        if not column_names(rows) or (not streaming and not len(rows)):
            raise ValueError(f"{source}: no rows in split {split!r}")
    return rows


def rename_columns(rows: Rows, columns: Mapping[str, str]) -> Rows:
    """Rows whose columns have the names that a task reads: `{the task's name: the data's}`.

    Another column that has such a name already is dropped.

    Raises:
        ValueError: the data has no such column, or a column would have two names.
    """
    names = column_names(rows)
    for name, column in columns.items():
        if column not in names:
            raise ValueError(f"column {column!r} for {name!r}: the data has {', '.join(names)}")
    if len(set(columns.values())) < len(columns):
        raise ValueError(f"columns {dict(columns)}: expected each of the data's columns once")
    changed = {column: name for name, column in columns.items() if name != column}
    shadowed = [name for name in changed.values() if name in names and name not in changed]
    # In two steps, since streams cannot swap names in one.
    between = {column: f"{name} (new)" for column, name in changed.items()}
    rows = rows.remove_columns(shadowed).rename_columns(between)
    return rows.rename_columns({between[column]: name for column, name in changed.items()})


def column_names(rows: Rows) -> list[str]:
    """The columns; a stream that does not know them is asked for its first row."""
    return list(rows.column_names or next(iter(rows.take(1)), ()))


def expect_no_subspaces(rows: Rows) -> None:
    """Raise a ValueError for rows that name dimensions, which a recipe would silently ignore."""
    if "subspaces" in column_names(rows):
        raise ValueError(
            "column 'subspaces': recipes train and score all dimensions; leave the column out, or "
            "train some by make_last_position_supervised_data_module"
        )


def map_rows(
    rows: Rows,
    function: Callable[[Mapping[str, Any]], dict[str, Any]],
    features: datasets.Features,
    name: str,
) -> Rows:
    """What a function makes of each row: streamed, in memory or on disk, like `rows`.

    Nothing is kept for later runs, since a function's name does not say what it computes.

    Raises:
        RowError: the function raises a ValueError; the message has the dataset's name.
    """

    def indexed(row: Mapping[str, Any], index: int) -> dict[str, Any]:
        try:
            return function(row_as_written(row, features_of_rows))
        except ValueError as error:
            raise RowError(error, name=name, index=index) from None

    removed, features_of_rows = column_names(rows), rows.features
    if isinstance(rows, datasets.IterableDataset):
        return rows.map(indexed, with_indices=True, remove_columns=removed, features=features)
    with quiet():
        return rows.map(
            indexed,
            with_indices=True,
            remove_columns=removed,
            features=features,
            cache_file_name=str(temporary_file()) if rows.cache_files else None,
            new_fingerprint=uuid4().hex,
        )


def temporary_file() -> Path:
    """A path for an Arrow file that is deleted with the process."""
    return Path(get_temporary_cache_files_directory()) / f"{uuid4().hex}.arrow"


def place_of(source: str | Path, split: str, index: int) -> str:
    """Where a row is: `rows.jsonl, line 3`, or `rows.parquet, row 3` where there are no lines."""
    path, name = local_path(source), re.match(r"\w+", split)
    read = {".jsonl": _lines_of_json, ".csv": _lines_of_csv}.get(path.suffix)
    if read is not None and name is not None and path.is_file():
        lines = datasets.Dataset.from_dict({"line": list(read(path))})
        if len(lines) == len(load_rows(source, split=name[0])):
            return f"{source}, line {_take({name[0]: lines}, split, source)[index]['line']}"
    return f"{source}, row {index}"


def _lines_of_json(path: Path) -> Iterator[int]:
    with path.open(encoding="utf-8", newline="\n") as file:
        for number, line in enumerate(file, start=1):
            if line.strip():
                yield number


def _lines_of_csv(path: Path) -> Iterator[int]:
    """The first line of each row; a row may have several."""
    with path.open(encoding="utf-8", newline="") as file:
        reader = csv.reader(file)
        next(reader, None)  # the names of columns
        before = reader.line_num
        for row in reader:
            if row:
                yield before + 1
            before = reader.line_num


def file_digest(path: Path) -> str:
    """A hash of a file's bytes."""
    digest = hashlib.blake2b(digest_size=16)
    with path.open("rb") as file:
        while block := file.read(1 << 20):
            digest.update(block)
    return digest.hexdigest()


@contextmanager
def quiet() -> Iterator[None]:
    """Hide the progress bars of datasets, unless the environment asks for them."""
    is_set = datasets.config.HF_DATASETS_DISABLE_PROGRESS_BARS is not None
    if is_set or datasets.are_progress_bars_disabled():
        yield
        return
    datasets.disable_progress_bars()
    try:
        yield
    finally:
        datasets.enable_progress_bars()


@contextmanager
def _errors_raised_alone() -> Iterator[None]:
    """Hide what the readers of datasets log before they raise."""
    readers = logging.getLogger("datasets.packaged_modules")
    before = readers.level
    readers.setLevel(logging.CRITICAL)
    try:
        yield
    finally:
        readers.setLevel(before)


def _load_file(path: Path, split: str, streaming: bool) -> Rows:
    expect_file(path)
    kind = LOADERS[path.suffix]
    # datasets knows a file by its path and time; with the digest, by its content.
    name = None if streaming else file_digest(path)
    files = {split: glob.escape(str(path))}
    # A stream should hold little in memory, and 10 MiB of lines are many times that as rows.
    options = {"chunksize": 2**20} if streaming and kind == "json" else {}
    try:
        with _errors_raised_alone():
            rows = datasets.load_dataset(
                kind, name, data_files=files, split=split, streaming=streaming, **options
            )
            column_names(rows)  # of a stream, reads the file's beginning
    except (DatasetGenerationError, StopIteration, ValueError) as error:
        reason = one_line(error.__cause__ or error)
        if not reason or "corresponds to no data" in reason:
            raise ValueError(f"{path}: no rows in it") from None
        raise ValueError(f"{path}: not a readable {kind} file ({reason})") from None
    return rows


def _load_from_hub(source: str, split: str, subset: str | None, streaming: bool) -> Rows:
    try:
        return datasets.load_dataset(source, subset, split=split, streaming=streaming)
    except (OSError, ValueError, DatasetsError) as error:
        reason = "no such file, and no hub dataset: " if isinstance(error, OSError) else ""
        raise ValueError(f"{source}: {reason}{one_line(error)}") from None


def _embedded() -> dict[str, datasets.Dataset]:
    return {
        split: datasets.Dataset.from_list([asdict(e) for e in tiny.load_tiny_examples(split)])
        for split in tiny.SPLITS
    }


def _take(splits: Mapping[str, Any], split: str, source: str | Path) -> datasets.Dataset:
    """A split or slices of one, in datasets' notation."""
    lengths = {name: len(rows) for name, rows in splits.items()}
    try:
        slices = datasets.ReadInstruction.from_spec(split).to_absolute(lengths)
    except (AssertionError, ValueError) as error:
        raise ValueError(f"{source}: split {split!r}: {one_line(error)}") from None
    parts = []
    for part in slices:
        first, end = part.from_ or 0, lengths[part.splitname] if part.to is None else part.to
        parts.append(splits[part.splitname].select(range(first, end)))
    return datasets.concatenate_datasets(parts)
