"""Rows of a file, of a hub dataset or of the embedded dataset."""

import glob
import hashlib
import json
import logging
import re
from collections import defaultdict
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict
from itertools import islice
from pathlib import Path
from typing import Any, TypeAlias
from uuid import uuid4

import datasets
from datasets.exceptions import DatasetsError
from datasets.fingerprint import get_temporary_cache_files_directory

from .._util.errors import one_line
from .._util.files import local_path
from ..engine.base import tiny
from .files import LOADERS, expect_file, is_path, placed_rows
from .tasks.base import JSON, RowError, row_as_written

Rows: TypeAlias = datasets.Dataset | datasets.IterableDataset

_FIRST_ROWS = 1000
"""Number of rows that a stream knows its columns from."""
_DTYPES = {str: "string", bool: "bool", int: "int64", float: "float64"}


def load_rows(
    source: str | Path | Rows,
    *,
    split: str = "train",
    subset: str | None = None,
    streaming: bool = False,
) -> Rows:
    """The rows of one split, in memory-mapped tables or, with `streaming`, as they are needed.

    Args:
        source: JSONL, JSON, CSV, TSV or Parquet file, which is the whole of any split; name of a
            hub dataset; "tiny-chat", the embedded dataset; or rows, which are returned as they are.
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
    if name is not None and LOADERS.get(path.suffix) is not None and path.is_file():
        places = datasets.Dataset.from_dict({"place": [place for place, _ in placed_rows(path)]})
        return f"{source}, {_take({name[0]: places}, split, source)[index]['place']}"
    return f"{source}, row {index}"


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
    if LOADERS[path.suffix] is None:
        return _load_parquet(path, split, streaming)
    if streaming:
        first = [row for _, row in islice(placed_rows(path), _FIRST_ROWS)]
        names = tuple(dict.fromkeys(name for row in first for name in row))
        if not names:
            raise ValueError(f"{path}: no rows in it")
        return datasets.IterableDataset.from_generator(
            _streamed, gen_kwargs={"path": path, "names": names}
        )
    features = _features(path)
    if not features:
        raise ValueError(f"{path}: no rows in it")
    return datasets.Dataset.from_generator(
        _stored,
        features=features,
        gen_kwargs={"path": path, "features": features, "digest": file_digest(path)},
    )


def _features(path: Path) -> datasets.Features:
    """The type of each column: that of all its values, or JSON where that is no scalar."""
    types: dict[str, set[type]] = defaultdict(set)
    for _, row in placed_rows(path):
        for name, value in row.items():
            types[name].add(type(value))
    features = datasets.Features()
    for name, kinds in types.items():
        kind, *others = kinds - {type(None)} or {str}
        is_scalar = not others and kind in _DTYPES
        features[name] = (
            datasets.Value(_DTYPES[kind]) if is_scalar else datasets.Value("string", id=JSON)
        )
    return features


def _stored(path: Path, features: datasets.Features, **_: str) -> Iterator[dict[str, Any]]:
    """The rows of a file of text for a table, which datasets keeps by all arguments."""
    names = [name for name, feature in features.items() if feature.id == JSON]
    for _place, row in placed_rows(path):
        filled = dict.fromkeys(features) | row
        # As text: datasets' own type for JSON changes the last digits of numbers.
        in_json = {n: json.dumps(filled[n]) for n in names if filled[n] is not None}
        yield filled | in_json


def _streamed(path: Path, names: tuple[str, ...]) -> Iterator[dict[str, Any]]:
    """The rows of a file of text with all columns."""
    for place, row in placed_rows(path):
        if new := [name for name in row if name not in names]:
            raise ValueError(
                f"{path}, {place}: column {new[0]!r}, which none of the first {_FIRST_ROWS} rows "
                "has: a stream needs it there"
            )
        yield dict.fromkeys(names) | row


def _load_parquet(path: Path, split: str, streaming: bool) -> Rows:
    # datasets knows a file by its path and time; with the digest, by its content.
    name = None if streaming else file_digest(path)
    files = {split: glob.escape(str(path))}
    try:
        with _errors_raised_alone():
            rows = datasets.load_dataset(
                "parquet", name, data_files=files, split=split, streaming=streaming
            )
            column_names(rows)  # of a stream, reads the file's beginning
            if not streaming:
                rows.data.table.validate(full=True)  # finds texts that are not UTF-8
    except Exception as error:  # of a damaged file, of any kind
        reason = one_line(error.__cause__ or error) or type(error).__name__
        if isinstance(error, StopIteration) or "corresponds to no data" in reason:
            raise ValueError(f"{path}: no rows in it") from None
        raise ValueError(f"{path}: not a readable parquet file ({reason})") from None
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
        parts.append(splits[part.splitname].select(range(first, end) or []))
    return datasets.concatenate_datasets(parts)
