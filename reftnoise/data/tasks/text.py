"""Prompts and completions as they are: right is what equals the completion."""

from collections.abc import Mapping, Sequence
from typing import Any

from .base import Question, Task, column


class TextTask(Task):
    """Rows of `prompt` and `completion`; exact match without surrounding whitespace."""

    name = "text"
    max_new_tokens = 64

    def question(self, row: Mapping[str, Any]) -> Question:
        completion = column(row, "completion")
        return Question(column(row, "prompt"), completion, answer=completion.strip())

    def scores(self, predictions: Sequence[str], answers: Sequence[str]) -> dict[str, float]:
        return {"exact_match": super().scores(predictions, answers)["accuracy"]}
