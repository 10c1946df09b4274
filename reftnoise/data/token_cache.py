"""Examples that are tokenised once, into Arrow tables in memory or on disk.

Large data sets are kept on disk from run to run, each under a hash of everything that its tokens
depend on.
"""

import datetime
import hashlib
import json
import logging
import time
from collections.abc import Iterable, Iterator, Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import Any
from uuid import uuid4

import datasets
import pyarrow as pa
import pyarrow.compute as pc
import tokenizers
import transformers
from datasets.fingerprint import get_temporary_cache_files_directory
from rich.console import Console

from .._util.progress import progress_of
from .encoding import SUBSPACES, Counts, Encoder, Example
from .sources import file_digest

logger = logging.getLogger(__name__)

KEPT_BYTES = 2**20
"""Rows of fewer bytes, which take a second or two, are tokenised anew."""
_VERSION = 1  # of what the files hold
_BATCH = 1000
_INT, _INTS, _FLAG = pa.int32(), pa.list_(pa.int32()), pa.bool_()
_SCHEMA = pa.schema(
    {
        "input_ids": _INTS,
        "labels": _INTS,
        "prompt_lengths": _INT,
        "length": _INT,
        "is_cut": _FLAG,
        "is_cut_short": _FLAG,
    }
)


def tokenize_once(rows: datasets.Dataset, encoder: Encoder) -> datasets.Dataset:
    """Tokenised examples of rows: in memory if they are few, else in a file.

    The file is kept from run to run, and found again by the content of rows and tokenizer.

    Raises:
        ValueError: a row that is no example, or no examples.
    """
    rows = rows.with_format(None).select_columns(encoder.columns(rows.column_names))
    if rows.data.nbytes * len(rows) < KEPT_BYTES * len(rows.data):
        buffer = pa.BufferOutputStream()
        _write(buffer, rows, encoder)
        examples = datasets.Dataset.from_buffer(buffer.getvalue())
    elif encoder.tokenizer.is_fast and datasets.is_caching_enabled():
        examples = datasets.Dataset.from_file(str(_kept_file(rows, encoder)))
    else:
        path = Path(get_temporary_cache_files_directory()) / f"{uuid4().hex}.arrow"
        _write(str(path), rows, encoder)
        examples = datasets.Dataset.from_file(str(path))
    if not len(examples):
        raise ValueError(f"no {encoder.name} examples: no conversation has an assistant's turn")
    _counts(examples.data).tell(encoder.name, encoder.max_length)
    return examples.remove_columns(["is_cut", "is_cut_short"])


# -- files that are kept ---------------------------------------------------------------------------


def _kept_file(rows: datasets.Dataset, encoder: Encoder) -> Path:
    """The file of these examples, `key-digest.arrow`; written unless a whole one is there."""
    directory = Path(datasets.config.HF_DATASETS_CACHE) / "reftnoise"
    key = _key(rows, encoder)
    for path in directory.glob(f"{key}-*.arrow"):
        if path.stem == f"{key}-{file_digest(path)}":
            logger.info("%s examples: as tokenised before, in %s", encoder.name, path)
            return path
        path.unlink(missing_ok=True)  # damaged
    directory.mkdir(parents=True, exist_ok=True)
    part = directory / f".{uuid4().hex}.part"
    try:
        _write(str(part), rows, encoder)
        return part.replace(directory / f"{key}-{file_digest(part)}.arrow")
    finally:
        part.unlink(missing_ok=True)


def _key(rows: datasets.Dataset, encoder: Encoder) -> str:
    """A hash of all that the tokens depend on."""
    tokenizer = encoder.tokenizer
    backend = json.loads(tokenizer.backend_tokenizer.to_str())
    template = str(tokenizer.chat_template)
    depends_on = {
        "version": [_VERSION, tokenizers.__version__, transformers.__version__],
        "settings": [encoder.chat_template, encoder.nonstop, encoder.max_length, rows.num_columns],
        # Padding and truncation are what somebody's last call left there.
        "backend": {n: v for n, v in backend.items() if n not in ("padding", "truncation")},
        "tokenizer": [type(tokenizer).__name__, tokenizer.special_tokens_map, template],
        "date": str(datetime.date.today()) if "strftime_now" in template else None,
    }
    digest = hashlib.blake2b(digest_size=16)
    digest.update(json.dumps(depends_on, default=str).encode())
    for table in rows.with_format("arrow").iter(_BATCH):
        names = [str(index) for index in range(table.num_columns)]
        # Taking rows copies them: a slice would be written with what lies beside it in memory.
        rows_alone = table.take(pa.array(range(table.num_rows))).combine_chunks()
        plain = rows_alone.rename_columns(names).replace_schema_metadata(None)
        buffer = pa.BufferOutputStream()
        with pa.ipc.new_stream(buffer, plain.schema) as writer:
            writer.write_table(plain)
        digest.update(buffer.getvalue())
    return digest.hexdigest()


# -- tables ----------------------------------------------------------------------------------------


def _write(sink: Any, rows: datasets.Dataset, encoder: Encoder) -> None:
    schema = _SCHEMA
    if encoder.subspaces_column in rows.column_names:
        schema = schema.append(pa.field(SUBSPACES, _INTS))
    with pa.ipc.new_stream(sink, schema) as writer:
        for batch in _watched(encoder.encode(rows, _BATCH), len(rows), encoder.name):
            writer.write_batch(_record_batch(batch, schema))


def _record_batch(batch: Sequence[Example], schema: pa.Schema) -> pa.RecordBatch:
    rows = [
        {**each.features(), "is_cut": each.is_cut, "is_cut_short": each.is_cut_short}
        for each in batch
    ]
    columns = {field.name: [row[field.name] for row in rows] for field in schema}
    return pa.RecordBatch.from_pydict(columns, schema=schema)


def _counts(table: Any) -> Counts:
    def total(column: str) -> int:
        return int(pc.sum(table.column(column)).as_py())

    return Counts(
        examples=table.num_rows,
        prompt_tokens=total("prompt_lengths"),
        tokens=total("length"),
        longest=pc.max(table.column("length")).as_py(),
        cut=total("is_cut"),
        cut_short=total("is_cut_short"),
    )


def _watched(batches: Iterable[list[Example]], total: int, name: str) -> Iterator[list[Example]]:
    """Batches, with a bar on a terminal where they take more than two seconds."""
    console, started, done, tell = Console(stderr=True), time.monotonic(), 0, None
    with ExitStack() as stack:
        for batch in batches:
            done += len(batch)
            if tell is None and console.is_terminal and time.monotonic() > started + 2:
                tell = stack.enter_context(progress_of(console, f"tokenising {name} examples"))
            if tell is not None:
                tell(done, max(done, total))
            yield batch
