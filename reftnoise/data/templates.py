"""The text around a prompt that a model reads."""

from collections.abc import Mapping
from string import Formatter
from typing import Any

import datasets

from .sources import Rows, column_names, expect_no_subspaces, map_rows
from .tasks.base import RowError, Task
from .tokenization import Messages

ALPACA = (
    "Below is an instruction that describes a task. Write a response that appropriately completes "
    "the request.\n\n### Instruction:\n{prompt}\n\n### Response:\n"
)
ALPACA_WITH_INPUT = (
    "Below is an instruction that describes a task, paired with an input that provides further "
    "context. Write a response that appropriately completes the request.\n\n"
    "### Instruction:\n{prompt}\n\n### Input:\n{input}\n\n### Response:\n"
)
_TEXT = datasets.Value("string")
_PROMPTS = datasets.Features({"prompt": _TEXT, "completion": _TEXT})
_CHAT = datasets.Features({"messages": [{"role": _TEXT, "content": _TEXT}]})


def fill(template: str, prompt: str, row: Mapping[str, Any]) -> str | Messages:
    """A prompt in its template: a text, or for `chat` a conversation for the tokenizer's own.

    Args:
        template: `plain` (the prompt alone), `chat` (a user's turn of the tokenizer's chat
            template), `alpaca` (which has a place for a row's `input`), or a text with `{prompt}`
            and columns of the row in braces.
        prompt: prompt of the task.
        row: row with the columns that the template names.

    Raises:
        ValueError: no such template, or no such column.
    """
    check_template(template)
    if template == "plain":
        return prompt
    if template == "chat":
        return [{"role": "user", "content": prompt}]
    if template == "alpaca":
        extra = row.get("input")
        extra = extra.strip() if isinstance(extra, str) else ""
        prompt = prompt.rstrip()
        has_input = extra != "" and extra not in prompt
        if extra and prompt.endswith(f"\n\n{extra}"):  # as `instruct` joins them
            prompt, has_input = prompt.removesuffix(extra).rstrip(), True
        template = ALPACA_WITH_INPUT if has_input else ALPACA
    values = {**row, "prompt": prompt}
    try:
        return template.format_map(values)
    except KeyError as error:
        known = ", ".join(values)
        raise ValueError(f"template: no column {error} in a row with {known}") from None


def check_template(template: str) -> None:
    """Raise a ValueError unless `fill` knows the template."""
    if template in ("plain", "chat", "alpaca"):
        return
    expected = "expected plain, chat, alpaca, or a text with {prompt} and columns in braces"
    try:
        fields = {name for _, name, _, _ in Formatter().parse(template) if name is not None}
    except ValueError as error:
        raise ValueError(f"template {template!r}: {error}; {expected}") from None
    if "prompt" not in fields:
        raise ValueError(f"template {template!r}: {expected}")
    for field in fields:
        if not field.isidentifier():
            raise ValueError(f"template {template!r}: {{{field}}} is no column; {expected}")


def as_examples(
    rows: Rows, task: Task, template: str, tokenizer: Any, *, name: str = "training"
) -> Rows:
    """Rows of `prompt` and `completion`, which `make_last_position_supervised_data_module` reads.

    With the template `chat` they are rows of `messages`, as are conversations, which the task
    `text` leaves as they are.

    Args:
        rows: rows with the columns that the task reads.
        task: makes prompts and completions of the rows.
        template: template, as in `fill`.
        tokenizer: tokenizer of the base.
        name: name of the dataset, for errors.

    Raises:
        RowError: a row that the task or the template cannot read.
        ValueError: a tokenizer without chat template that needs one, or a column `subspaces`.
    """
    check_template(template)
    expect_no_subspaces(rows)
    if template == "chat" and getattr(tokenizer, "chat_template", None) is None:
        raise ValueError("template 'chat': the tokenizer has no chat template")
    columns = column_names(rows)
    if task.name == "text" and "messages" in columns and "prompt" not in columns:
        return rows.select_columns("messages")

    def example(row: Mapping[str, Any], index: int) -> dict[str, Any]:
        try:
            question = task.question(row)
            for part, text in (("prompt", question.prompt), ("completion", question.completion)):
                if not isinstance(text, str):
                    raise ValueError(f"{part} {text!r}: expected a text")
            filled = fill(template, question.prompt, row)
        except ValueError as error:
            raise RowError(error, name=name, index=index) from None
        if isinstance(filled, str):
            return {"prompt": filled, "completion": question.completion}
        return {"messages": [*filled, {"role": "assistant", "content": question.completion}]}

    return map_rows(rows, example, _CHAT if template == "chat" else _PROMPTS)
