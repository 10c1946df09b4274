"""Rows come from files, the hub and the embedded examples, or one line says why not."""

import json
import os
from pathlib import Path
from typing import Any

import datasets
import pytest

import reftnoise as rn
from reftnoise.data.sources import load_rows, place_of, rename_columns
from reftnoise.data.tasks.base import row_as_written
from support.data import REAL

ROWS = [{"question": f"What is {n} + {n}?", "answer": str(2 * n)} for n in range(10)]
KINDS = ["jsonl", "json", "csv", "parquet"]
LISTS = REAL / "data" / "commonsense" / "openbookqa" / "test.json"

# The oldest datasets leaves CSV files to the garbage collector.
pytestmark = pytest.mark.filterwarnings("ignore:unclosed file:ResourceWarning")


@pytest.fixture(autouse=True)
def _own_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", str(tmp_path / "cache"))


def written(directory: Path, kind: str) -> Path:
    """A file of `ROWS`; `.json` is one list."""
    path, table = directory / f"rows.{kind}", datasets.Dataset.from_list(ROWS)
    if kind == "csv":
        path.write_text(
            "question,answer\n" + "".join(f'"{r["question"]}","{r["answer"]}"\n' for r in ROWS)
        )
    elif kind == "parquet":
        table.to_parquet(path)
    elif kind == "json":
        path.write_text(json.dumps(ROWS, indent=1))
    else:
        path.write_text("\n".join(map(json.dumps, ROWS)))
    return path


def as_texts(rows: Any) -> list[dict[str, str]]:
    return [{name: str(value) for name, value in row.items()} for row in rows]


def mistake(*args: Any, error: type[Exception] = ValueError, **options: Any) -> str:
    with pytest.raises(error) as caught:
        load_rows(*args, **options)
    message = str(caught.value)
    assert "\n" not in message
    return message


# -- rows ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("streaming", [False, True])
@pytest.mark.parametrize("kind", KINDS)
def test_a_file_is_all_of_any_split(tmp_path: Path, kind: str, streaming: bool) -> None:
    path = written(tmp_path, kind)
    for source, split in ((path, "train"), (str(path), "test")):
        rows = load_rows(source, split=split, streaming=streaming)
        assert isinstance(rows, datasets.IterableDataset if streaming else datasets.Dataset)
        assert as_texts(rows) == ROWS


@pytest.mark.parametrize(
    ("split", "expected"),
    [
        ("train[:3]", ROWS[:3]),
        ("test[-2:]", ROWS[-2:]),
        ("test[:-4]", ROWS[:-4]),
        ("train[20%:40%]", ROWS[2:4]),
        ("train[:1]+train[-1:]", [ROWS[0], ROWS[-1]]),
        ("train[:99]", ROWS),
    ],
)
def test_slices(tmp_path: Path, split: str, expected: list[Any]) -> None:
    assert list(load_rows(written(tmp_path, "jsonl"), split=split)) == expected


@pytest.mark.parametrize("streaming", [False, True])
@pytest.mark.parametrize("split", ["train", "test"])
def test_the_embedded_examples(split: Any, streaming: bool) -> None:
    rows = list(load_rows("tiny-chat", split=split, streaming=streaming))
    assert rows == [vars(example) for example in rn.load_tiny_examples(split)]


def test_rows_stay_as_they_are() -> None:
    table = datasets.Dataset.from_list(ROWS)
    assert load_rows(table) is table
    stream = table.to_iterable_dataset()
    assert load_rows(stream, streaming=True) is stream


@pytest.mark.skipif(not LISTS.is_file(), reason="needs REFTNOISE_REAL")
@pytest.mark.parametrize("streaming", [False, True])
def test_a_list_of_real_questions(streaming: bool) -> None:
    assert list(load_rows(LISTS, streaming=streaming)) == json.loads(LISTS.read_text())


def test_a_file_changed_in_place_is_read_again(tmp_path: Path) -> None:
    path = tmp_path / "rows.jsonl"
    for text in ("one", "two"):  # of one size and one time
        path.write_text(json.dumps({"prompt": text}))
        os.utime(path, (1, 1))
        assert list(load_rows(path)) == [{"prompt": text}]


def test_a_file_is_found_from_home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    written(tmp_path, "jsonl")
    monkeypatch.setenv("HOME", str(tmp_path))
    assert list(load_rows("~/rows.jsonl")) == ROWS


@pytest.mark.parametrize("streaming", [False, True])
def test_loading_is_silent(
    tmp_path: Path, capfd: pytest.CaptureFixture[str], streaming: bool
) -> None:
    load_rows(written(tmp_path, "jsonl"), streaming=streaming)
    (tmp_path / "broken.jsonl").write_text("{nonsense\n")
    mistake(tmp_path / "broken.jsonl", streaming=streaming)
    assert capfd.readouterr() == ("", "")
    assert not datasets.are_progress_bars_disabled()


CELLS = ["01234", "NA", "1.10", "None", "true", "", "1e5", "2020-01-01", "null", "-", " x"]


@pytest.mark.parametrize("streaming", [False, True])
@pytest.mark.parametrize("kind", ["csv", "tsv", "jsonl"])
def test_text_stays_text(tmp_path: Path, kind: str, streaming: bool) -> None:
    path, separator = tmp_path / f"rows.{kind}", {"csv": ",", "tsv": "\t"}.get(kind)
    lines = [f"{cell}{separator}b" for cell in ("a", *CELLS)]
    if separator is None:
        lines = [json.dumps({"a": cell}) for cell in CELLS]
    path.write_text("\n".join(lines), encoding="utf-8")
    rows = list(load_rows(path, streaming=streaming))
    assert [row["a"] for row in rows] == CELLS


@pytest.mark.parametrize("streaming", [False, True])
def test_values_stay_as_they_are(tmp_path: Path, streaming: bool) -> None:
    path = tmp_path / "rows.jsonl"
    values = [1, 1.5, "1", True, None, [48.9, None], {"x": {}}, "2020-01-01"]
    path.write_text("\n".join(json.dumps({"a": value, "b": 48.9}) for value in values))
    rows = load_rows(path, streaming=streaming)
    assert [row_as_written(row, rows.features) for row in rows] == [
        {"a": value, "b": 48.9} for value in values
    ]


def test_a_column_that_a_stream_does_not_know(tmp_path: Path) -> None:
    path = tmp_path / "rows.jsonl"
    path.write_text('{"a": 1}\n' * 1000 + '{"b": 1}\n')
    with pytest.raises(ValueError, match=r"rows\.jsonl, line 1001: column 'b', which none of"):
        list(load_rows(path, streaming=True))


# -- columns ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("streaming", [False, True])
def test_columns_are_renamed(streaming: bool) -> None:
    rows: Any = datasets.Dataset.from_dict({"prompt": ["a"], "completion": ["b"], "text": ["c"]})
    rows = rows.to_iterable_dataset() if streaming else rows
    swapped = rename_columns(rows, {"prompt": "completion", "completion": "prompt"})
    assert list(swapped) == [{"completion": "a", "prompt": "b", "text": "c"}]
    replaced = rename_columns(rows, {"prompt": "text", "completion": "completion"})
    assert list(replaced) == [{"completion": "b", "prompt": "c"}]
    assert list(rename_columns(rows, {})) == list(rows)


@pytest.mark.parametrize(
    ("columns", "message"),
    [
        ({"prompt": "query"}, "column 'query' for 'prompt': the data has question, answer"),
        (
            {"prompt": "answer", "completion": "answer"},
            "columns {'prompt': 'answer', 'completion': 'answer'}: expected each of the data's "
            "columns once",
        ),
    ],
)
@pytest.mark.parametrize("streaming", [False, True])
def test_mistaken_columns(
    tmp_path: Path, columns: dict[str, str], message: str, streaming: bool
) -> None:
    rows = load_rows(written(tmp_path, "jsonl"), streaming=streaming)
    with pytest.raises(ValueError) as caught:  # noqa: PT011  # the whole message is compared
        rename_columns(rows, columns)
    assert str(caught.value) == message


# -- places --------------------------------------------------------------------------------------


@pytest.mark.parametrize("split", ["train", "train[1:]", "train[-2:]", "train[2:]+train[:1]"])
@pytest.mark.parametrize("name", ["rows.jsonl", "rows.csv", "rows.tsv", "rows.json"])
def test_the_place_of_a_row(tmp_path: Path, name: str, split: str) -> None:
    texts = {  # whose rows hold their lines
        "rows.jsonl": '{"at": 1}\n\n{"at": 3}\n  \n\n{"at": 6}',
        "rows.csv": 'at,text\n2,"a\nb"\n4,c\n\n6,d\n',
        "rows.tsv": 'at\ttext\n2\ta"b\n3\tc\n',
        "rows.json": '[{"at": 0},\n{"at": 1}, {"at": 2}]',
    }
    path = tmp_path / name
    path.write_text(texts[name])
    for index, row in enumerate(load_rows(path, split=split)):
        place = f"{'row' if name == 'rows.json' else 'line'} {row['at']}"
        assert place_of(path, split, index) == f"{path}, {place}"


# -- mistakes --------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["missing.jsonl", "./missing", "a/b/c", "{tmp}/missing"])
def test_what_looks_like_a_file_is_never_a_hub_dataset(tmp_path: Path, name: str) -> None:
    name = name.replace("{tmp}", str(tmp_path))
    assert mistake(name, error=FileNotFoundError).endswith(": no such file")
    assert mistake(Path(name), error=FileNotFoundError) == f"{Path(name)}: no such file"


def test_an_unknown_name() -> None:
    message = mistake("nobody/nothing")
    assert message.startswith("nobody/nothing: no such file, and no hub dataset: ")


@pytest.mark.parametrize("streaming", [False, True])
@pytest.mark.parametrize(
    ("name", "text", "reason"),
    [
        ("a.jsonl", "", "no rows in it"),
        ("a.json", "[]", "no rows in"),
        ("a.csv", "a,b\n", "no rows in"),
        ("a.jsonl", "{nonsense\n", "line 1: not JSON (Expecting property name"),
        ("a.jsonl", '{"a": 1}\n\n{"a": NaN}', "line 3: not JSON (NaN is no number of JSON)"),
        ("a.jsonl", '{"a": 1}\n3', "line 2: expected a mapping, got 3"),
        ("a.jsonl", '{"a": ' + "[" * 100_000, "line 1: nested more than 100 levels deep"),
        ("a.jsonl", '{"a": ' + "[" * 101 + "]" * 101 + "}", "line 1: nested more than 100 levels"),
        ("a.jsonl", '{"a": ' + "9" * 30 + "}", "line 1: an integer of more than 64 bits"),
        ("a.jsonl", '{"a": "\\ud800"}', "line 1: a text that is not UTF-8"),
        ("a.json", '[{"a": 1}, "b"]', "row 1: expected a mapping, got 'b'"),
        ("a.csv", "", "no rows in it"),
        ("a.csv", "a,b\n1,2\n3\n", "line 3: 1 cells, expected 2 (a, b)"),
        ("a.csv", 'a,b\n1,2\n"3\n', "line 3: unexpected end of data"),
        ("a.csv", "a,a\n1,2\n", "line 1: two columns have one name: a, a"),
        ("a.parquet", "text", "not a readable parquet file (Parquet file size is 4 bytes"),
    ],
)
def test_unreadable_files(
    tmp_path: Path, name: str, text: str, reason: str, streaming: bool
) -> None:
    path = tmp_path / name
    path.write_text(text)
    separator = ", " if reason.startswith(("line", "row")) else ": "
    assert mistake(path, streaming=streaming).startswith(f"{path}{separator}{reason}")


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"split": "val"}, "tiny-chat: split 'val': Unknown split \"val\". Should be one of"),
        ({"split": "test[:"}, "tiny-chat: split 'test[:': Unrecognized instruction format"),
        ({"split": ""}, "split '': expected a name, or a slice such as train[:-1000]"),
        (
            {"split": "test[:5]", "streaming": True},
            "split 'test[:5]': a stream has no slices, expected a name such as train",
        ),
        ({"subset": "main"}, "subset 'main': tiny-chat has none, only hub datasets do"),
        ({"split": "test[5:5]"}, "tiny-chat: no rows in split 'test[5:5]'"),
    ],
)
def test_mistaken_splits(options: dict[str, Any], message: str) -> None:
    assert mistake("tiny-chat", **options).startswith(message)
