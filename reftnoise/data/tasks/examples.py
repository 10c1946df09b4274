"""Examples that tasks and templates make of rows."""

from collections.abc import Mapping
from typing import Any

import datasets

from ..conversations import HANDED_ON
from ..sources import Rows, column_names, expect_no_subspaces, map_rows
from ..templates import check_template, fill
from .base import Task, row_as_written

_TEXT = datasets.Value("string")
_PROMPTS = datasets.Features({"prompt": _TEXT, "completion": _TEXT})
_CHAT = datasets.Features({"messages": [{"role": _TEXT, "content": _TEXT}]})


def as_examples(
    rows: Rows, task: Task, template: str, tokenizer: Any, *, name: str = "training"
) -> Rows:
    """Rows of `prompt` and `completion`, which `make_last_position_supervised_data_module` reads.

    With the template `chat` they are rows of `messages`. Conversations, which the task `text`
    leaves as they are, have the columns that the tokenizer's chat template reads. Errors have the
    dataset's name.

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
        return rows.select_columns([name for name in ("messages", *HANDED_ON) if name in columns])
    first = row_as_written(next(iter(rows.take(1)), {}), rows.features)
    if task.name == "text" and isinstance(first.get("prompt"), list):
        read = [name for name in ("prompt", "completion", *HANDED_ON) if name in columns]
        return rows.select_columns(read)

    def example(row: Mapping[str, Any]) -> dict[str, Any]:
        question = task.question(row)
        for part, text in (("prompt", question.prompt), ("completion", question.completion)):
            if not isinstance(text, str):
                raise ValueError(f"{part} {text!r}: expected a text")
        filled = fill(template, question.prompt, row)
        if isinstance(filled, str):
            return {"prompt": filled, "completion": question.completion}
        return {"messages": [*filled, {"role": "assistant", "content": question.completion}]}

    return map_rows(rows, example, _CHAT if template == "chat" else _PROMPTS, name)
