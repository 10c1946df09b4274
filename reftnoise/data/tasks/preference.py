"""Pairs of answers of which one is preferred."""

from collections.abc import Mapping, Sequence
from typing import Any, ClassVar

from ...config.decoding import Way
from ...config.preference import ObjectiveName, PreferenceObjective, Suppression
from .base import Question, Task, column


class PreferenceTask(Task):
    """Rows of `prompt`, `chosen` and `rejected`: the answer is the more probable one of the two.

    Each is a text, or a list of messages, as for TRL's trainers.

    Args:
        objective: loss of training, reps, bipo or dpo.
        beta: as of `PreferenceObjective`.
        factors: as of `PreferenceObjective`.
        suppression: as of `PreferenceObjective`.
    """

    name = "preference"
    way: ClassVar[Way] = "likelihood"
    # Its edit has one direction, so that every objective can train it.
    default_edit: ClassVar[dict[str, Any]] = {
        "layer": "all",
        "intervention": "bias",
        "positions": "all+decode",
    }

    def __init__(
        self,
        *,
        objective: ObjectiveName = "reps",
        beta: float | None = None,
        factors: Sequence[float] | None = None,
        suppression: Suppression | None = None,
    ) -> None:
        self.objective = PreferenceObjective(
            name=objective, beta=beta, factors=factors, suppression=suppression
        )

    def question(self, row: Mapping[str, Any]) -> Question:
        prompt = row.get("prompt")
        if not isinstance(prompt, list):
            prompt = column(row, "prompt")
        chosen, rejected = (_answer(row, name) for name in ("chosen", "rejected"))
        if chosen == rejected:
            raise ValueError(f"chosen and rejected are the same, {chosen!r}: expected two answers")
        return Question(prompt, chosen, "chosen", (chosen, rejected), ("chosen", "rejected"))

    def scores_of_choices(self, log_probs: Sequence[Sequence[float]]) -> dict[str, float]:
        """`margin`, the mean of log p(chosen) − log p(rejected), in nats."""
        margins = [chosen - rejected for chosen, rejected in log_probs]
        return {"margin": sum(margins) / len(margins)}


def _answer(row: Mapping[str, Any], name: str) -> str:
    """The text of an answer, which may be a conversation of one message."""
    messages = row.get(name)
    if not isinstance(messages, list):
        return column(row, name)
    message = messages[0] if len(messages) == 1 and isinstance(messages[0], Mapping) else {}
    content = message.get("content")
    if message.get("role") != "assistant" or not isinstance(content, str):
        raise ValueError(
            f"column {name!r}: expected a text, or one message of the assistant's, got {messages!r}"
        )
    return content
