"""Tasks: how a row becomes a prompt, and how the text that a model writes is scored."""

import json
from abc import ABC, abstractmethod
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar, NamedTuple

from ...config.decoding import Way

if TYPE_CHECKING:
    from ..conversations import Messages


@dataclass(frozen=True)
class Question:
    """One row as a task sees it.

    Args:
        prompt: text that the model reads, without the data's template, or a conversation.
        completion: text that training teaches the model to write after it.
        answer: answer that a prediction is compared with.
        choices: completions of which likelihood chooses; empty where a task has none.
        choice_answers: answer of each choice.
    """

    prompt: "str | Messages"
    completion: str
    answer: str
    choices: tuple[str, ...] = ()
    choice_answers: tuple[str, ...] = ()


JSON = "json"
"""The id of a column of texts that are values in JSON."""


def as_written(value: Any, feature: Any) -> Any:
    """A value of a dataset as its author wrote it.

    Labels have their names. The keys that other rows have, which a table fills with nulls, are
    gone.

    Args:
        value: value of a column in a row.
        feature: type of the column, or None where it is not known.
    """
    if getattr(feature, "id", None) == JSON:
        return None if value is None else json.loads(value)
    if hasattr(feature, "int2str"):  # a ClassLabel; rows without a label have -1
        return feature.int2str(value) if isinstance(value, int) and value >= 0 else value
    if isinstance(feature, Mapping) and isinstance(value, Mapping):
        filled = {name: item for name, item in value.items() if item is not None}
        return {name: as_written(item, feature.get(name)) for name, item in filled.items()}
    item_feature = getattr(feature, "feature", feature[0] if isinstance(feature, list) else None)
    if item_feature is not None and isinstance(value, list):
        return [as_written(item, item_feature) for item in value]
    return value


def row_as_written(row: Mapping[str, Any], features: Mapping[str, Any] | None) -> dict[str, Any]:
    """A row of a dataset as its author wrote it, like `as_written`."""
    return {name: as_written(value, (features or {}).get(name)) for name, value in row.items()}


def scalar_text(value: Any) -> str:
    """A label as a text: `1`, `0.5`, `true` or the text itself.

    Raises:
        ValueError: the value is no text, number or bool.
    """
    if isinstance(value, bool):
        return str(value).lower()
    if isinstance(value, str | int | float):
        return str(value)
    raise ValueError(f"{value!r}: expected a text, a number or a bool")


def number_in(value: Any) -> Any:
    """The number that a text holds, as in CSV files; other values as they are."""
    if not isinstance(value, str):
        return value
    for kind in (int, float):
        try:
            return kind(value)
        except ValueError:
            continue
    return value


def column(row: Mapping[str, Any], name: str) -> str:
    """The text in a row's column.

    Raises:
        ValueError: the row has no such column, or no text in it.
    """
    if name not in row:
        raise ValueError(
            f"no column {name!r} in {', '.join(map(str, row))}; data.columns says which it is: "
            f"{{{name}: …}}"
        )
    if not isinstance(row[name], str):
        raise ValueError(f"column {name!r}: expected a text, got {row[name]!r}")
    return row[name]


class Task(ABC):
    """A task; a recipe gives its constructor's arguments with its name."""

    name: str
    way: ClassVar[Way] = "generation"
    """The way to score it where a recipe does not say one."""
    max_new_tokens: ClassVar[int | None] = 32
    """Greatest number of tokens of an answer; None for those of the longest choice and an end."""
    default_edit: ClassVar[dict[str, Any]] = {
        "layer": "all",
        "intervention": "loreft",
        "low_rank_dimension": 4,
        "positions": "l1",
    }
    """The unit that is trained where a recipe does not say what is."""
    generation: Mapping[str, Any] = {"do_sample": False}
    """Further arguments of `generate`, as the task's authors chose them."""

    @abstractmethod
    def question(self, row: Mapping[str, Any]) -> Question:
        """The prompt, completion and answer of a row.

        Raises:
            ValueError: a column is missing, or has a value that the task does not know.
        """

    def extract(self, text: str) -> str:
        """The answer that a generated text gives; "" if it gives none."""
        return text.strip()

    def is_right(self, prediction: str, answer: str) -> bool:
        """Whether an extracted answer is the right one."""
        return prediction == answer

    def scores(self, predictions: Sequence[str], answers: Sequence[str]) -> dict[str, float]:
        """The task's metrics over all rows, the main one first."""
        right = sum(map(self.is_right, predictions, answers))
        return {"accuracy": right / len(answers)}

    def scores_of_choices(self, log_probs: Sequence[Sequence[float]]) -> dict[str, float]:
        """Further metrics by likelihood, from the log-probabilities of each row's choices."""
        return {}


class RowError(ValueError):
    """A row, with an index in the dataset of a name, that cannot be used for a reason."""

    def __init__(self, reason: object, *, name: str = "training", index: int | None = None) -> None:
        super().__init__(str(reason) if index is None else f"{name} example {index}: {reason}")
        self.reason, self.name, self.index = reason, name, index


class ParsedRow(NamedTuple):
    """A row, and the question that a task makes of it."""

    row: Mapping[str, Any]
    question: Question


def parse_rows(
    task: Task, rows: Iterable[Mapping[str, Any] | ParsedRow], *, name: str = "evaluation"
) -> list[ParsedRow]:
    """The rows with their questions; rows that are parsed already stay as they are.

    Errors have the dataset's name.

    Raises:
        RowError: a row that the task cannot read.
    """
    parsed, features = [], getattr(rows, "features", None)
    for index, row in enumerate(rows):
        if isinstance(row, ParsedRow):
            parsed.append(row)
            continue
        written = row_as_written(row, features)
        try:
            parsed.append(ParsedRow(written, task.question(written)))
        except ValueError as error:
            raise RowError(error, name=name, index=index) from None
    return parsed
