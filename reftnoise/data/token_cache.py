"""Examples that are tokenised once, into tables in memory or on disk.

Large datasets are kept on disk from run to run, each under a hash of all that its tokens depend on.
"""

import datetime
import hashlib
import json
import logging
import sys
from collections.abc import Mapping, Sequence
from contextlib import nullcontext
from itertools import chain
from pathlib import Path
from typing import Any
from uuid import uuid4

import datasets
import pyarrow.compute as pc
import tokenizers
import transformers

from .conversations import HANDED_ON
from .encoding import LOCATIONS, SUBSPACES, Counts, Encoder
from .sources import file_digest, quiet, temporary_file

logger = logging.getLogger(__name__)

KEPT_BYTES = 2**20
"""Rows of fewer bytes, which take a second or two, are tokenised in every run."""
_VERSION = 2  # of what the files hold
_BATCH = 1000
_INT, _FLAG = datasets.Value("int32"), datasets.Value("bool")
_FEATURES = {
    **dict.fromkeys(("input_ids", "labels"), datasets.List(_INT)),
    **dict.fromkeys(("prompt_lengths", "length"), _INT),
    **dict.fromkeys(("is_cut", "is_cut_short"), _FLAG),
}


def tokenize_once(rows: datasets.Dataset, encoder: Encoder) -> datasets.Dataset:
    """Tokenised examples of rows: in memory if the rows are few, else in a file.

    The file is kept from run to run, under a name from the content of rows and tokenizer.

    Raises:
        ValueError: a row that is no example, or no examples.
    """
    rows = rows.with_format(None).select_columns(encoder.columns(rows.column_names))
    if rows.data.nbytes * len(rows) < KEPT_BYTES * len(rows.data):
        examples = _tokenized(rows, encoder)
    elif encoder.tokenizer.is_fast and datasets.is_caching_enabled():
        examples = datasets.Dataset.from_file(str(_kept_file(rows, encoder)))
    else:
        examples = _tokenized(rows, encoder, path=temporary_file())
    if not len(examples):
        raise ValueError(f"no {encoder.name} examples: no conversation has an assistant's turn")
    _counts(examples.data).log(encoder.name, encoder.max_length)
    return examples.remove_columns(["is_cut", "is_cut_short"])


def _kept_file(rows: datasets.Dataset, encoder: Encoder) -> Path:
    """The file of these examples, `key-digest.arrow`; written unless an undamaged one exists."""
    directory = Path(datasets.config.HF_DATASETS_CACHE) / "reftnoise"
    key = _key(rows, encoder)
    for path in directory.glob(f"{key}-*.arrow"):
        if path.stem == f"{key}-{file_digest(path)}":
            logger.info("%s examples: as tokenised before, in %s", encoder.name, path)
            return path
        path.unlink(missing_ok=True)  # damaged
    directory.mkdir(parents=True, exist_ok=True)
    part = directory / f".{uuid4().hex}.arrow"
    try:
        _tokenized(rows, encoder, path=part, fingerprint=key)
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
        "columns": [name for name in rows.column_names if name in HANDED_ON],
        "locations": encoder.num_interventions,
        # Padding and truncation are left over from the last call.
        "backend": {n: v for n, v in backend.items() if n not in ("padding", "truncation")},
        "tokenizer": [type(tokenizer).__name__, tokenizer.special_tokens_map, template],
        "date": str(datetime.date.today()) if "strftime_now" in template else None,
    }
    digest = hashlib.blake2b(digest_size=16)
    digest.update(json.dumps(depends_on, default=str).encode())
    for batch in rows.iter(_BATCH):
        digest.update(json.dumps(list(batch.values()), default=str).encode())
    return digest.hexdigest()


def _tokenized(
    rows: datasets.Dataset,
    encoder: Encoder,
    *,
    path: Path | None = None,
    fingerprint: str | None = None,
) -> datasets.Dataset:
    """Examples of rows, in a file that appears when it is whole, or without a path in memory."""

    def encode(columns: Mapping[str, Sequence[Any]], indices: Sequence[int]) -> dict[str, Any]:
        values = zip(*columns.values(), strict=True)
        batch = [dict(zip(columns, row, strict=True)) for row in values]
        examples = chain.from_iterable(encoder.encode(batch, _BATCH, first=indices[0]))
        made = [
            e.features(encoder.num_interventions)
            | {"is_cut": e.is_cut, "is_cut_short": e.is_cut_short}
            for e in examples
        ]
        return {name: [row[name] for row in made] for name in features}

    features = datasets.Features(_FEATURES)
    if encoder.subspaces_column in rows.column_names:
        features[SUBSPACES] = datasets.List(_INT)
    if encoder.num_interventions is not None:
        features[LOCATIONS] = datasets.List(datasets.List(_INT))
    is_shown = path is not None and sys.stderr.isatty()
    with nullcontext() if is_shown else quiet():
        return rows.map(
            encode,
            batched=True,
            with_indices=True,
            batch_size=_BATCH,
            remove_columns=rows.column_names,
            features=features,
            keep_in_memory=path is None,
            cache_file_name=None if path is None else str(path),
            new_fingerprint=fingerprint or uuid4().hex,
            desc=f"tokenising {encoder.name} examples",
        )


def _counts(table: Any) -> Counts:
    column = table.column
    names = ("prompt_lengths", "length", "is_cut", "is_cut_short")
    prompts, tokens, cut, cut_short = (int(pc.sum(column(name)).as_py()) for name in names)
    return Counts(table.num_rows, prompts, tokens, pc.max(column("length")).as_py(), cut, cut_short)
