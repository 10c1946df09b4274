"""The arithmetic tasks of the ReFT paper, in the form of LLM-Adapters (arXiv:2304.01933).

A model writes out its reasoning, of which the last number is the answer. The paper trains and
evaluates with the Alpaca template (`data.template: alpaca`).

| name | word problems with one number as the answer |
|---|---|
| `mawps` | MAWPS (Koncel-Kedziorski et al., 2016): a collection of them |
| `svamp` | SVAMP (arXiv:2103.07191): varied so that shallow cues mislead |
| `addsub` | AddSub (Hosseini et al., 2014): of addition and subtraction |
"""

import math
import re
from collections.abc import Mapping
from typing import Any

from .base import Question, Task, column

TOLERANCE = 1e-3
SAMPLING = {"do_sample": True, "temperature": 0.3, "top_p": 0.75, "top_k": 40}
_NUMBER = re.compile(r"-?\d+\.?\d*")


def last_number(text: str) -> str:
    """The last number of a text, without commas; "" if there is none.

    As LLM-Adapters reads it: the number in "5-3" is -3.
    """
    numbers: list[str] = _NUMBER.findall(text.replace(",", ""))
    return numbers[-1] if numbers else ""


class ArithmeticTask(Task):
    """Rows of `instruction`, `output` (the reasoning) and `answer`.

    Args:
        name: name of the task.
        sampling: whether to draw the text as the paper does (temperature 0.3, top_p 0.75,
            top_k 40) instead of decoding greedily, as its code's README does. The code also draws
            with 4 beams; the paper's number of beams is UNCONFIRMED, and here it is 1.
    """

    max_new_tokens = 512

    def __init__(self, *, name: str, sampling: bool = False) -> None:
        self.name = name
        if sampling:
            self.generation = SAMPLING

    def question(self, row: Mapping[str, Any]) -> Question:
        answer = row.get("answer")
        is_number = isinstance(answer, int | float)
        answer = self.read_answer(str(answer) if is_number else column(row, "answer"))
        return Question(f"{column(row, 'instruction')}\n", column(row, "output"), answer)

    def read_answer(self, text: str) -> str:
        """A row's answer in the form that `extract` has; a ValueError if it is not one."""
        try:
            finite = math.isfinite(float(text.replace(",", "")))
        except ValueError:
            finite = False
        if not finite:
            raise ValueError(f"answer {text!r}: expected a number")
        return text.replace(",", "").strip()

    def extract(self, text: str) -> str:
        return last_number(text)

    def is_right(self, prediction: str, answer: str) -> bool:
        return prediction != "" and abs(float(prediction) - float(answer)) <= TOLERANCE
