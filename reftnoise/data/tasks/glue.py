"""GLUE (arXiv:1804.07461), as in the ReFT paper: eight subsets and one metric for each."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal, TypeAlias

import numpy as np

from ..._util.errors import is_finite_number
from .base import column, number_in
from .classifier import ClassifierTask

Metric: TypeAlias = Literal["accuracy", "matthews", "pearson"]


@dataclass(frozen=True)
class Subset:
    """The columns of a subset's texts, the names of its classes, and its metric."""

    texts: tuple[str, ...]
    classes: tuple[str, ...] = ()
    metric: Metric = "accuracy"


_PAIR = ("sentence1", "sentence2")
_ENTAILMENT = ("entailment", "not_entailment")
SUBSETS = {
    "mnli": Subset(("premise", "hypothesis"), ("entailment", "neutral", "contradiction")),
    "sst2": Subset(("sentence",), ("negative", "positive")),
    "mrpc": Subset(_PAIR, ("not_equivalent", "equivalent")),
    "cola": Subset(("sentence",), ("unacceptable", "acceptable"), "matthews"),
    "qnli": Subset(("question", "sentence"), _ENTAILMENT),
    "qqp": Subset(("question1", "question2"), ("not_duplicate", "duplicate")),
    "rte": Subset(_PAIR, _ENTAILMENT),
    "stsb": Subset(_PAIR, metric="pearson"),
}


def score(metric: Metric, predicted: Any, labels: Any) -> float:
    """Accuracy, Matthews' correlation of two classes, or Pearson's of numbers; 0 if undefined.

    Predictions and labels are indices of classes, or numbers, [rows].
    """
    predicted, labels = np.asarray(predicted, float), np.asarray(labels, float)
    if metric == "accuracy":
        return float((predicted == labels).mean())
    if len(set(predicted)) < 2 or len(set(labels)) < 2:
        return 0.0
    return float(np.corrcoef(predicted, labels)[0, 1])  # for two classes, this is Matthews'


class GlueTask(ClassifierTask):
    """Rows like the hub's GLUE: texts and a `label`, which is the index or name of a class.

    A prediction of STS-B is right if it is at most ½ from the label.

    Args:
        subset: name of the subset: mnli, sst2, mrpc, cola, qnli, qqp, rte or stsb.

    Raises:
        ValueError: there is no such subset.
    """

    name = "glue"

    def __init__(self, subset: str) -> None:
        if subset not in SUBSETS:
            raise ValueError(f"subset {subset!r}: expected one of {', '.join(SUBSETS)}")
        self.subset = SUBSETS[subset]
        self.classes = self.subset.classes

    def texts(self, row: Mapping[str, Any]) -> tuple[str, ...]:
        return tuple(column(row, name) for name in self.subset.texts)

    def label(self, row: Mapping[str, Any]) -> int | float:
        if "label" not in row:
            raise ValueError(f"no column 'label' in {', '.join(map(str, row))}")
        label = row["label"]
        if label in self.classes:
            return self.classes.index(label)
        label = number_in(label)
        if not self.classes:
            if is_finite_number(label):
                return float(label)
            raise ValueError(f"label {label!r}: expected a number")
        if is_finite_number(label) and label in range(len(self.classes)):
            return int(label)
        raise ValueError(
            f"label {label!r}: expected one of {', '.join(self.classes)}, or its index (the hub's "
            "test rows have none)"
        )

    def is_right(self, prediction: str, answer: str) -> bool:
        if self.classes:
            return prediction == answer
        return abs(float(prediction) - float(answer)) <= 0.5

    def scores(self, predictions: Sequence[str], answers: Sequence[str]) -> dict[str, float]:
        number: Any = self.classes.index if self.classes else float
        predicted, labels = ([number(text) for text in texts] for texts in (predictions, answers))
        return {self.subset.metric: score(self.subset.metric, predicted, labels)}
