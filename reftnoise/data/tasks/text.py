"""Texts as they are: prompts with completions, or passages of a domain."""

import re
from collections.abc import Mapping, Sequence
from typing import Any, ClassVar

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

    The first word, or the first character of a text that has no spaces, is the prompt, since
    nothing comes before it that it could be predicted from. The rest is the completion. Score it by
    loss: no text is expected to be written again.
    """

    name = "raw_text"
    default_positions: ClassVar[str] = "all+decode"

    def question(self, row: Mapping[str, Any]) -> Question:
        text = column(row, "text")
        first = re.match(r"\s*\S+(?=\s+\S)|\s*\S(?=\S)", text)
        if first is None:
            raise ValueError(f"text {text!r}: expected more than a word")
        prompt, completion = text[: first.end()], text[first.end() :]
        return Question(prompt, completion, answer=completion.strip())
