"""GSM8K (arXiv:2110.14168): word problems of several steps."""

from collections.abc import Mapping
from typing import Any

from .arithmetic import ArithmeticTask
from .base import Question, column

_MARK = "####"


class Gsm8kTask(ArithmeticTask):
    """Rows as in the other arithmetic tasks, or the official ones.

    An official row has a `question` and an `answer`, which holds reasoning, "####" and a number.

    Args:
        sampling: as in the other arithmetic tasks.
    """

    def __init__(self, *, sampling: bool = False) -> None:
        super().__init__(name="gsm8k", sampling=sampling)

    def question(self, row: Mapping[str, Any]) -> Question:
        if "question" not in row:
            return super().question(row)
        completion = column(row, "answer")
        _, mark, number = completion.rpartition(_MARK)
        if not mark:
            raise ValueError(f"answer {completion!r}: expected reasoning, {_MARK!r} and a number")
        return Question(f"{column(row, 'question')}\n", completion, self.read_answer(number))
