"""Classification in words: the completion is one of a few labels."""

from collections.abc import Mapping, Sequence
from typing import Any

from .base import Question, Task, column, scalar_text


class ClassificationTask(Task):
    """Rows of `prompt` and `completion`, which is a label with or without whitespace before it.

    Args:
        labels: all labels, as the rows have them: texts, numbers or bools, which are written `1`,
            `0.5` and `true`.

    Raises:
        ValueError: fewer than two labels, two that are written alike, or a label that is no scalar
            or has whitespace around it.
    """

    name = "classification"
    max_new_tokens = None  # those of the longest label

    def __init__(self, labels: Sequence[str | int | float]) -> None:
        if not isinstance(labels, list | tuple):
            raise ValueError(f"labels {labels!r}: expected a list of two or more different labels")
        self.has_bools = any(isinstance(label, bool) for label in labels)
        try:
            self.labels = tuple(map(scalar_text, labels))
        except ValueError as error:
            raise ValueError(f"label {error}") from None
        if len(set(self.labels)) < max(2, len(labels)):
            raise ValueError(f"labels {labels!r}: expected a list of two or more different labels")
        for label in self.labels:
            if not label or label != label.strip():
                raise ValueError(f"label {label!r}: expected a text without whitespace around it")

    def question(self, row: Mapping[str, Any]) -> Question:
        prompt, completion = column(row, "prompt"), self._completion(row)
        answer = completion.strip()
        if answer not in self.labels:
            # YAML 1.1 reads yes, no, on and off so.
            hint = "; a recipe's yes and no are bools unless quoted" if self.has_bools else ""
            raise ValueError(
                f"completion {completion!r}: expected one of {', '.join(self.labels)}{hint}"
            )
        space = completion[: len(completion) - len(completion.lstrip())]
        choices = tuple(space + label for label in self.labels)
        return Question(prompt, completion, answer, choices, self.labels)

    def _completion(self, row: Mapping[str, Any]) -> str:
        value = row.get("completion")
        if value is None or isinstance(value, str):
            return column(row, "completion")
        if isinstance(value, float) and value.is_integer() and str(int(value)) in self.labels:
            return str(int(value))  # a column of integers with nulls in it
        try:
            return scalar_text(value)
        except ValueError as error:
            raise ValueError(f"completion {error}") from None
