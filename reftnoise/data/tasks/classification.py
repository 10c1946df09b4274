"""Classification in words: the completion is one of a few labels."""

from collections.abc import Mapping, Sequence
from typing import Any

from .base import Question, Task, column


class ClassificationTask(Task):
    """Rows of `prompt` and `completion`, which is a label with or without whitespace before it.

    Args:
        labels: all labels, as they are written.

    Raises:
        ValueError: fewer than two labels, two that are equal, or a label that is no text or has
            whitespace around it.
    """

    name = "classification"
    max_new_tokens = None  # those of the longest label

    def __init__(self, labels: Sequence[str]) -> None:
        if isinstance(labels, str) or len(set(labels)) < max(2, len(labels)):
            raise ValueError(f"labels {labels!r}: expected a list of two or more different labels")
        for label in labels:
            if not isinstance(label, str) or not label or label != label.strip():
                raise ValueError(f"label {label!r}: expected a text without whitespace around it")
        self.labels = tuple(labels)

    def question(self, row: Mapping[str, Any]) -> Question:
        prompt, completion = column(row, "prompt"), column(row, "completion")
        answer = completion.strip()
        if answer not in self.labels:
            raise ValueError(f"completion {completion!r}: expected one of {', '.join(self.labels)}")
        space = completion[: len(completion) - len(completion.lstrip())]
        choices = tuple(space + label for label in self.labels)
        return Question(prompt, completion, answer, choices, self.labels)
