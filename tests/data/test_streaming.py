"""Data larger than memory trains as it is read: the same examples, in flat memory."""

import json
import logging
import os
import subprocess
import sys
from itertools import islice
from pathlib import Path
from typing import Any

import datasets
import pytest
import torch
from transformers import AutoTokenizer, TrainingArguments

import reftnoise as rn
from reftnoise.data.sources import load_rows
from reftnoise.engine.base.tiny import DIRECTORY

UNIT = {"layer": 0, "intervention": "loreft", "low_rank_dimension": 2}
WORKER = Path(__file__).parents[1] / "support" / "programs" / "streaming_worker.py"


@pytest.fixture(autouse=True)
def _own_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", str(tmp_path / "cache"))


@pytest.fixture(scope="module")
def tokenizer() -> Any:
    return AutoTokenizer.from_pretrained(DIRECTORY)


def rows(number: int) -> list[dict[str, str]]:
    return [
        {"prompt": f"What is {n} and {n}?", "completion": f" It is {2 * n}."} for n in range(number)
    ]


def stream(number: int) -> Any:
    return datasets.Dataset.from_list(rows(number)).to_iterable_dataset()


def module(tokenizer: Any, *sources: Any, **options: Any) -> dict[str, Any]:
    return rn.make_last_position_supervised_data_module(tokenizer, None, *sources, **options)


# -- examples --------------------------------------------------------------------------------------


def test_the_examples_of_a_stream_are_those_of_a_table(tokenizer: Any) -> None:
    table = datasets.Dataset.from_list(rows(150))
    made = module(tokenizer, stream(150), eval_prompts=stream(150))
    expected = list(module(tokenizer, table)["train_dataset"])
    assert list(made["eval_dataset"]) == expected
    assert list(islice(made["train_dataset"], 400)) == [*expected, *expected, *expected[:100]]


def test_every_assistant_turn_is_one_example(tokenizer: Any) -> None:
    roles = ("user", "assistant")
    talks = [[{"role": roles[i % 2], "content": str(i)} for i in range(n)] for n in (4, 1, 2)]
    table = datasets.Dataset.from_dict({"messages": talks})
    made = module(tokenizer, table, eval_prompts=table.to_iterable_dataset())
    assert list(made["eval_dataset"]) == list(made["train_dataset"])
    assert len(made["train_dataset"]) == 3


def test_a_seed_shuffles_each_pass_in_its_own_way(tokenizer: Any) -> None:
    def passes(**options: Any) -> list[list[tuple[int, ...]]]:
        drawn = module(tokenizer, stream(60), **options)["train_dataset"]
        ids = [tuple(example["input_ids"]) for example in islice(drawn, 120)]
        return [ids[:60], ids[60:]]

    ordered, _ = passes()
    first, second = passes(shuffle_seed=3, shuffle_buffer=20)
    assert first != second
    assert first != ordered
    assert sorted(first) == sorted(second) == sorted(ordered)
    assert [first, second] == passes(shuffle_seed=3, shuffle_buffer=20)
    assert first != passes(shuffle_seed=4, shuffle_buffer=20)[0]


@pytest.mark.parametrize("shards", [1, 3])
def test_workers_share_out_the_rows(tokenizer: Any, shards: int) -> None:
    source = datasets.Dataset.from_list(rows(30)).to_iterable_dataset(num_shards=shards)
    made = module(tokenizer, source, eval_prompts=source)
    loaded = torch.utils.data.DataLoader(made["eval_dataset"], batch_size=None, num_workers=2)
    ids = [list(example["input_ids"]) for example in loaded]
    assert sorted(ids) == sorted(example["input_ids"] for example in made["eval_dataset"])
    loaded = torch.utils.data.DataLoader(made["train_dataset"], batch_size=None, num_workers=2)
    assert len(list(islice(loaded, 50))) == 50


# -- what is logged --------------------------------------------------------------------------------


@pytest.mark.parametrize("taken", [20, 45, 70])
def test_truncation_is_told_at_once_and_in_total(
    tokenizer: Any, taken: int, caplog: pytest.LogCaptureFixture
) -> None:
    table = rows(30)
    for index in (3, 11, 17):
        table[index]["prompt"] *= 9
    source = datasets.Dataset.from_list(table).to_iterable_dataset()
    made = module(tokenizer, source, max_length=40)["train_dataset"]
    with caplog.at_level(logging.WARNING, logger="reftnoise"):
        examples = iter(made)
        list(islice(examples, taken))
        examples.close()  # type: ignore[attr-defined]
    assert [record.getMessage() for record in caplog.records] == [
        "training example 3 is longer than 40 tokens and loses the beginning of its prompt; how "
        "many do is logged when the stream ends",
        f"3 of {min(taken, 30)} training examples were longer than 40 tokens and lost the "
        "beginning of their prompts",
    ]


@pytest.mark.parametrize(
    ("source", "message"),
    [
        ([{"prompt": "a", "completion": "b"}, {"prompt": "a", "completion": None}], "example 1: c"),
        ([{"text": "a"}], "columns text: expected 'prompt' and 'completion', or 'messages'"),
        ([{"messages": [{"role": "user", "content": "a"}]}], "no training examples in the stream"),
    ],
)
def test_mistakes(tokenizer: Any, source: Any, message: str) -> None:
    streamed = datasets.Dataset.from_list(source).to_iterable_dataset()
    with pytest.raises(ValueError, match=message):
        list(islice(module(tokenizer, streamed)["train_dataset"], 3))


# -- training --------------------------------------------------------------------------------------


def trained(directory: Path, tokenizer: Any, steps: int, **options: Any) -> dict[str, Any]:
    """Weights after some steps of two examples each, on a stream of nine, shuffled."""
    torch.manual_seed(0)
    base, _ = rn.load_tiny_model()
    reft_model = rn.get_reft_model(base, rn.ReftConfig([UNIT]))
    directory.mkdir(exist_ok=True)
    path = directory / "rows.jsonl"
    path.write_text("\n".join(map(json.dumps, rows(9))))
    made = module(tokenizer, load_rows(path, streaming=True), shuffle_seed=1, shuffle_buffer=4)
    args = TrainingArguments(
        str(directory / "run"),
        max_steps=steps,
        per_device_train_batch_size=2,
        lr_scheduler_type="constant",
        save_steps=6,
        report_to="none",
        use_cpu=True,
        disable_tqdm=True,
        dataloader_pin_memory=False,
    )
    trainer = rn.ReftTrainerForCausalLM(reft_model, args, processing_class=tokenizer, **made)
    trainer.train(**options)
    assert trainer.state.global_step == steps
    return {name: value.clone() for name, value in reft_model.state_dict().items()}


def test_a_resumed_stream_goes_on_where_it_was(tmp_path: Path, tokenizer: Any) -> None:
    whole = trained(tmp_path / "whole", tokenizer, 10)  # more than two passes
    trained(tmp_path / "killed", tokenizer, 6)
    resumed = trained(tmp_path / "killed", tokenizer, 10, resume_from_checkpoint=True)
    assert whole.keys() == resumed.keys()
    assert all(torch.equal(whole[name], resumed[name]) for name in whole)


# -- memory ----------------------------------------------------------------------------------------


def peaks(directory: Path, *numbers: int) -> list[int]:
    """The most bytes that a process had, after it trained on a file of so many rows each."""
    for number in numbers:
        with (directory / f"{number}.jsonl").open("w") as file:
            for row in rows(1):
                file.writelines(json.dumps(row | {"id": n}) + "\n" for n in range(number))
    files = [str(directory / f"{number}.jsonl") for number in numbers]
    done = subprocess.run(
        [sys.executable, str(WORKER), str(directory / "cache"), *files],
        env=os.environ | {"PYTHONPATH": str(WORKER.parents[1])},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    return [int(line) for line in done.stdout.splitlines() if line.isdigit()]


def test_memory_does_not_grow_with_rows(tmp_path: Path) -> None:
    few, many = peaks(tmp_path, 4_000, 20_000)
    assert many <= 1.2 * few


@pytest.mark.slow
def test_memory_of_a_million_rows(tmp_path: Path) -> None:
    few, many = peaks(tmp_path, 10_000, 1_000_000)
    assert many <= 1.2 * few
