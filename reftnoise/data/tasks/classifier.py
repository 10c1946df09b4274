"""Tasks for models with a classification head."""

from abc import abstractmethod
from collections.abc import Mapping, Sequence
from typing import Any, ClassVar

from .base import Question, Task


class ClassifierTask(Task):
    """One or two texts, and a class or a number that a head gives for them.

    Predictions and answers are class names, or numbers as texts.
    """

    classes: tuple[str, ...]
    """Names of the classes, in the head's order; none where the head predicts a number."""
    default_edit: ClassVar[dict[str, Any]] = Task.default_edit | {"positions": "all"}
    max_length: ClassVar[int] = 256
    """Greatest number of tokens of the texts; longer ones lose their end."""

    @property
    def num_labels(self) -> int:
        """Number of the head's outputs."""
        return len(self.classes) or 1

    @abstractmethod
    def texts(self, row: Mapping[str, Any]) -> tuple[str, ...]:
        """The texts of a row, for the tokenizer."""

    @abstractmethod
    def label(self, row: Mapping[str, Any]) -> int | float:
        """The label of a row: the index of a class, or a number."""

    def question(self, row: Mapping[str, Any]) -> Question:
        label = self.label(row)
        answer = self.classes[int(label)] if self.classes else repr(float(label))
        return Question("\n".join(self.texts(row)), answer, answer)

    def prediction(self, logits: Sequence[float]) -> str:
        """The answer that the head's outputs for one row stand for."""
        if not self.classes:
            return repr(float(logits[0]))
        return self.classes[max(range(len(logits)), key=lambda index: logits[index])]
