"""Texts as they are: prompts with completions, or passages of a domain."""

import re
from collections.abc import Mapping, Sequence
from typing import Any, ClassVar

from ...config.decoding import Way
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


class RawTextTask(Task):
    """Rows of `text`, all of which is learnt, as a base is adapted to a domain.

    The first word is the prompt, since nothing comes before it that it could be predicted from, or
    the first character, where no space is among the first 20: the text may be of a language without
    them. The rest is the completion. It is scored by loss: no text is expected to be written again.
    """

    name = "raw_text"
    way: ClassVar[Way] = "loss"
    default_edit: ClassVar[dict[str, Any]] = Task.default_edit | {"positions": "all+decode"}

    def question(self, row: Mapping[str, Any]) -> Question:
        text = column(row, "text")
        first = re.match(r"\s*\S{1,20}(?=\s+\S)|\s*\S(?=\S)", text)
        if first is None:
            raise ValueError(f"text {text!r}: expected more than a word")
        prompt, completion = text[: first.end()], text[first.end() :]
        return Question(prompt, completion, answer=completion.strip())
