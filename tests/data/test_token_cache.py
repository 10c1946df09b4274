"""Tokens that were computed once are read again, if and only if all they depend on is the same."""

import json
import logging
import os
from pathlib import Path
from typing import Any

import datasets
import pyarrow as pa
import pytest
from transformers import AutoTokenizer

import reftnoise as rn
from reftnoise.data import token_cache, tokenization
from reftnoise.data.sources import load_rows
from reftnoise.data.tasks.examples import as_examples
from reftnoise.data.tasks.text import TextTask
from reftnoise.engine.base.tiny import DIRECTORY

ROWS = [{"prompt": f"What is {n} + {n}?", "completion": f" It is {2 * n}."} for n in range(30)]


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Where data sets of any size are kept here."""
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(token_cache, "KEPT_BYTES", 0)
    return tmp_path / "cache" / "reftnoise"


@pytest.fixture
def tokenizer() -> Any:
    return AutoTokenizer.from_pretrained(DIRECTORY)


def write(path: Path, rows: list[dict[str, str]]) -> Path:
    path.write_text("\n".join(map(json.dumps, rows)))
    os.utime(path, (1, 1))
    return path


class Tokenised:
    """How often something was tokenised."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.times = 0

        def counted(*args: Any) -> Any:
            self.times += 1
            return tokenization.tokenize_all(*args)

        monkeypatch.setattr("reftnoise.data.encoding.tokenize_all", counted)


@pytest.fixture
def tokenised(monkeypatch: pytest.MonkeyPatch) -> Tokenised:
    return Tokenised(monkeypatch)


def examples(tokenizer: Any, rows: Any, **options: Any) -> list[dict[str, Any]]:
    made = rn.make_last_position_supervised_data_module(tokenizer, None, rows, **options)
    return list(made["train_dataset"])


def test_the_same_content_is_read_again(
    tokenizer: Any, tmp_path: Path, cache: Path, tokenised: Tokenised
) -> None:
    path = write(tmp_path / "rows.jsonl", ROWS)
    table = datasets.Dataset.from_list([{"id": "x", **row} for row in ROWS * 2])
    same = [
        path,
        write(tmp_path / "other.jsonl", ROWS),
        write(path, ROWS),  # again
        table.select(range(30)),
        table.select(range(29, -1, -1)).select(range(29, -1, -1)),
        datasets.concatenate_datasets([table.select(range(7)), table.select(range(7, 30))]),
        as_examples(load_rows(path), TextTask(), "plain", tokenizer),
    ]
    first, *others = [examples(tokenizer, rows) for rows in same]
    assert all(other == first for other in others)
    assert tokenised.times == 1
    assert len(list(cache.iterdir())) == 1
    renamed = table.select(range(30)).rename_column("prompt", "question")
    assert examples(tokenizer, renamed, prompt_column="question") == first
    assert examples(AutoTokenizer.from_pretrained(DIRECTORY), path) == first
    assert tokenised.times == 1


def test_what_is_kept_is_what_is_made(
    tokenizer: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = write(tmp_path / "rows.jsonl", ROWS)
    written, read = examples(tokenizer, path), examples(tokenizer, path)
    monkeypatch.setattr(token_cache, "KEPT_BYTES", 2**40)
    assert examples(tokenizer, path) == written == read


def test_a_file_changed_in_place_is_tokenised_again(
    tokenizer: Any, tmp_path: Path, tokenised: Tokenised
) -> None:
    path, changed = tmp_path / "rows.jsonl", [{**row, "completion": " no"} for row in ROWS]
    size = write(path, [{**row, "completion": " ok"} for row in ROWS]).stat().st_size
    before = examples(tokenizer, path)
    assert write(path, changed).stat().st_size == size
    assert examples(tokenizer, path) != before
    assert tokenised.times == 2


def with_a_token(tokenizer: Any) -> None:
    tokenizer.add_tokens(["What is"])


def with_another_end(tokenizer: Any) -> None:
    tokenizer.eos_token = tokenizer.convert_ids_to_tokens(7)


def with_another_template(tokenizer: Any) -> None:
    tokenizer.chat_template = "{% for m in messages %}{{ m.content }}{% endfor %}"


@pytest.mark.parametrize("change", [with_a_token, with_another_end, with_another_template])
def test_another_tokenizer(
    tokenizer: Any, tmp_path: Path, tokenised: Tokenised, change: Any
) -> None:
    path = write(tmp_path / "rows.jsonl", ROWS)
    examples(tokenizer, path)
    change(tokenizer)
    examples(tokenizer, path)
    assert tokenised.times == 2


@pytest.mark.parametrize("options", [{"nonstop": True}, {"max_length": 9}, {"chat_template": True}])
def test_other_settings(
    tokenizer: Any, tmp_path: Path, tokenised: Tokenised, options: dict[str, Any]
) -> None:
    path = write(tmp_path / "rows.jsonl", ROWS)
    plain = examples(tokenizer, path)
    assert examples(tokenizer, path, **options) != plain
    assert tokenised.times == 2


def test_the_tokenizers_last_call_changes_nothing(
    tokenizer: Any, tmp_path: Path, tokenised: Tokenised
) -> None:
    path = write(tmp_path / "rows.jsonl", ROWS)
    before = examples(tokenizer, path)
    tokenizer(["a", "b c"], padding=True, truncation=True, max_length=5)
    assert examples(tokenizer, path) == before
    assert tokenised.times == 1


@pytest.mark.parametrize(
    "damage",
    [
        lambda content: content[:-1],
        lambda content: content[: len(content) // 2],
        lambda content: content[:0],
        lambda content: content[:2000] + bytes([content[2000] ^ 1]) + content[2001:],
    ],
    ids=["end", "half", "all", "bit"],
)
def test_a_damaged_file_is_made_again(
    tokenizer: Any, tmp_path: Path, cache: Path, tokenised: Tokenised, damage: Any
) -> None:
    path = write(tmp_path / "rows.jsonl", ROWS)
    whole = examples(tokenizer, path)
    (kept,) = cache.iterdir()
    content = kept.read_bytes()
    kept.unlink()  # so that what is mapped stays as it is
    kept.write_bytes(damage(content))
    assert examples(tokenizer, path) == whole
    assert tokenised.times == 2
    assert [file.read_bytes() for file in cache.iterdir()] == [content]


def test_nothing_is_left_of_a_failure(tokenizer: Any, tmp_path: Path, cache: Path) -> None:
    path = write(tmp_path / "rows.jsonl", [*ROWS, {"prompt": "", "completion": "x"}])
    with pytest.raises(ValueError, match="training example 30: the prompt is empty"):
        examples(tokenizer, path)
    assert not list(cache.iterdir())


def test_what_was_lost_is_told_again(
    tokenizer: Any, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    path = write(tmp_path / "rows.jsonl", ROWS)
    for _ in range(2):
        caplog.clear()
        with caplog.at_level(logging.WARNING, logger="reftnoise"):
            cut = examples(tokenizer, path, max_length=9)
        assert max(example["length"] for example in cut) == 9
        (record,) = caplog.records
        assert record.getMessage().startswith("30 of 30 training examples were longer than 9")


@pytest.mark.parametrize("reason", ["few", "switched off"])
def test_what_is_not_kept(
    tokenizer: Any, tmp_path: Path, cache: Path, monkeypatch: pytest.MonkeyPatch, reason: str
) -> None:
    path = write(tmp_path / "rows.jsonl", ROWS)
    kept = examples(tokenizer, path)
    (file,) = cache.iterdir()
    file.unlink()
    if reason == "few":
        monkeypatch.setattr(token_cache, "KEPT_BYTES", 2**20)
    else:
        monkeypatch.setattr(datasets.fingerprint, "_CACHING_ENABLED", False)
    assert examples(tokenizer, path) == kept
    assert not list(cache.iterdir())


def test_the_files_are_arrow(tokenizer: Any, tmp_path: Path, cache: Path) -> None:
    """Any other program can read them."""
    made = examples(tokenizer, write(tmp_path / "rows.jsonl", ROWS))
    (file,) = cache.iterdir()
    with pa.ipc.open_stream(str(file)) as reader:
        assert reader.read_all().column("input_ids").to_pylist() == [m["input_ids"] for m in made]
