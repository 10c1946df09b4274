"""Templates put the same text around a prompt in training and in evaluation."""

from collections.abc import Mapping
from itertools import islice
from typing import Any

import datasets
import pytest
from tokenizers import Tokenizer
from tokenizers.models import BPE
from transformers import AutoTokenizer, PreTrainedTokenizerFast

import reftnoise as rn
from reftnoise.data.sources import load_rows
from reftnoise.data.tasks.base import Question, Task
from reftnoise.data.tasks.examples import as_examples
from reftnoise.data.tasks.text import TextTask
from reftnoise.data.templates import fill
from reftnoise.engine.base.tiny import DIRECTORY
from support.data import REAL, rendered

STORIES = REAL / "models" / "TinyStories-Instruct-3M-chat"
UNMARKED = (
    "{% for m in messages %}{{ m.role }}: {{ m.content }}\n{% endfor %}"
    "{% if add_generation_prompt %}assistant: {% endif %}"
)
INPUT = "{prompt} | {topic} | {{literally}}"


class Sums(Task):
    """A task that writes its own prompts."""

    name = "sums"

    def question(self, row: Mapping[str, Any]) -> Question:
        if row["b"] is None:
            raise ValueError("column 'b' is empty")
        return Question(f"{row['a']} + {row['b']} =", f" {row['a'] + row['b']}", str(row["a"]))


@pytest.fixture(params=[DIRECTORY, STORIES], ids=lambda path: path.name)
def tokenizer(request: pytest.FixtureRequest) -> Any:
    if not request.param.is_dir():
        pytest.skip("needs REFTNOISE_REAL")
    tokenizer = AutoTokenizer.from_pretrained(request.param)
    tokenizer.chat_template = tokenizer.chat_template or UNMARKED
    return tokenizer


@pytest.mark.parametrize(
    ("template", "row", "expected"),
    [
        ("plain", {}, "Why {so}?"),
        ("chat", {}, [{"role": "user", "content": "Why {so}?"}]),
        (INPUT, {"topic": "{rain}"}, "Why {so}? | {rain} | {literally}"),
        ("}}{{{n}{prompt}{empty}", {"n": 1.5, "empty": ""}, "}{1.5Why {so}?"),
        ("{prompt}{prompt}", {"prompt": "the row's"}, "Why {so}?Why {so}?"),
    ],
)
def test_filling(template: str, row: dict[str, Any], expected: Any) -> None:
    assert fill(template, "Why {so}?", row) == expected


@pytest.mark.parametrize(
    ("row", "has_input"),
    [
        ({}, False),
        ({"input": None}, False),
        ({"input": " "}, False),
        ({"input": "Rain."}, True),
        ({"input": "Say"}, False),  # which the prompt already holds
    ],
)
def test_alpaca(row: dict[str, Any], has_input: bool) -> None:
    text = fill("alpaca", "Say why.", row)
    assert isinstance(text, str)
    parts = text.split("\n\n### ")[1:]
    expected = ["Instruction:\nSay why.", *["Input:\nRain."] * has_input, "Response:\n"]
    assert parts == expected


@pytest.mark.parametrize(
    ("template", "message"),
    [
        ("chta", "template 'chta': expected plain, chat, alpaca, or a text with {prompt} and"),
        ("{topic}", "template '{topic}': expected plain, chat, alpaca, or a text with {prompt}"),
        ("{prompt", "template '{prompt': a single '{' at column 1; expected plain"),
        ("{prompt}}", "template '{prompt}}': a single '}' at column 9; expected plain"),
        ("{prompt[0].foo}", "template '{prompt[0].foo}': {prompt[0].foo} is no column; expected"),
        ("{prompt!r}", "template '{prompt!r}': {prompt!r} is no column; expected plain"),
        (
            "{prompt:>4000000000}",
            "template '{prompt:>4000000000}': {prompt:>4000000000} is no column; expected plain",
        ),
        ("{prompt}{n}", "template: column 'n' is None: expected a text or a number"),
        ("{prompt}{}", "template '{prompt}{}': {} is no column; expected plain"),
        ("{prompt}{a.b}", "template '{prompt}{a.b}': {a.b} is no column; expected plain"),
        ("{prompt}{b}", "template: no column 'b' in a row with a, n, prompt"),
    ],
)
def test_mistaken_templates(template: str, message: str) -> None:
    with pytest.raises(ValueError) as caught:  # noqa: PT011  # the message is compared
        fill(template, "Why?", {"a": 1, "n": None})
    assert str(caught.value).startswith(message)


@pytest.mark.parametrize("streaming", [False, True])
@pytest.mark.parametrize("template", ["plain", "chat", "alpaca", "Q: {prompt} ({words})\nA:"])
def test_training_sees_the_tokens_of_evaluation(
    tokenizer: Any, template: str, streaming: bool
) -> None:
    rows = load_rows("tiny-chat", split="test[:5]")
    texts = [rendered(tokenizer, template, row) for row in rows]
    expected = [tokenizer(text, add_special_tokens=adds)["input_ids"] for text, adds in texts]
    rows = rows.to_iterable_dataset() if streaming else rows
    module = rn.make_last_position_supervised_data_module(
        tokenizer, None, as_examples(rows, TextTask(), template, tokenizer)
    )
    tokenized = list(islice(module["train_dataset"], len(expected)))
    assert [row["input_ids"][: row["prompt_lengths"]] for row in tokenized] == expected


def test_chat_is_what_the_data_module_makes_of_prompts(tokenizer: Any) -> None:
    rows = load_rows("tiny-chat", split="test")
    made = rn.make_last_position_supervised_data_module(
        tokenizer,
        None,
        as_examples(rows, TextTask(), "chat", tokenizer),
        eval_prompts=rows.select_columns(["prompt", "completion"]),
        chat_template=True,
    )
    assert list(made["train_dataset"]) == list(made["eval_dataset"])


@pytest.mark.parametrize("streaming", [False, True])
def test_a_tasks_own_prompts(streaming: bool) -> None:
    rows: Any = datasets.Dataset.from_dict({"a": [1, 2], "b": [3, 4]})
    rows = rows.to_iterable_dataset() if streaming else rows
    examples = list(as_examples(rows, Sums(), "<{prompt}> {b}", None))
    assert examples == [
        {"prompt": "<1 + 3 => 3", "completion": " 4"},
        {"prompt": "<2 + 4 => 4", "completion": " 6"},
    ]


@pytest.mark.parametrize("streaming", [False, True])
def test_conversations_stay_as_they_are(streaming: bool) -> None:
    talk = [[{"role": "user", "content": "hi"}, {"role": "assistant", "content": "yo"}]]
    rows: Any = datasets.Dataset.from_dict({"messages": talk, "id": [1]})
    rows = rows.to_iterable_dataset() if streaming else rows
    assert list(as_examples(rows, TextTask(), "plain", None)) == [{"messages": talk[0]}]


@pytest.mark.parametrize("streaming", [False, True])
@pytest.mark.parametrize(
    ("task", "columns", "template", "message"),
    [
        (Sums(), {"a": [1, 1], "b": [1, None]}, "plain", "training example 1: column 'b' is empty"),
        (
            Sums(),
            {"a": [1], "b": [1]},
            "{prompt}{c}",
            "training example 0: template: no column 'c' in a row with a, b, prompt",
        ),
    ],
)
def test_mistaken_rows(
    task: Task, columns: dict[str, Any], template: str, message: str, streaming: bool
) -> None:
    rows: Any = datasets.Dataset.from_dict(columns)
    rows = rows.to_iterable_dataset() if streaming else rows
    with pytest.raises(ValueError) as caught:  # noqa: PT011  # the whole message is compared
        list(as_examples(rows, task, template, None))
    assert str(caught.value) == message


def test_a_chat_without_template() -> None:
    rows = load_rows("tiny-chat")
    with pytest.raises(ValueError, match="the tokenizer has no chat template"):
        as_examples(
            rows, TextTask(), "chat", PreTrainedTokenizerFast(tokenizer_object=Tokenizer(BPE()))
        )
