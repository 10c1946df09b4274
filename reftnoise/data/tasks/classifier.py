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
    """Their names, in the head's order; none where the head predicts a number."""
    max_length: ClassVar[int] = 256
    """Tokens of the texts; what is longer loses its end."""

    @property
    def num_labels(self) -> int:
        """Outputs of the head."""
        return len(self.classes) or 1

    @abstractmethod
    def texts(self, row: Mapping[str, Any]) -> tuple[str, ...]:
        """What the tokenizer is given."""

    @abstractmethod
    def label(self, row: Mapping[str, Any]) -> int | float:
        """What the model is trained with: the index of a class, or a number."""

    def question(self, row: Mapping[str, Any]) -> Question:
        label = self.label(row)
        answer = self.classes[int(label)] if self.classes else repr(float(label))
        return Question("\n".join(self.texts(row)), answer, answer)

    def prediction(self, logits: Sequence[float]) -> str:
        """What the head's outputs for one row say."""
        if not self.classes:
            return repr(float(logits[0]))
        return self.classes[max(range(len(logits)), key=lambda index: logits[index])]
