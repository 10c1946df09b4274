"""The arithmetic tasks of the ReFT paper, in the form of LLM-Adapters (arXiv:2304.01933).

A model writes out its reasoning, whose last number or letter is the answer. The paper trains and
evaluates with the Alpaca template (`data.template: alpaca`).

| name | word problems |
|---|---|
| `mawps` | MAWPS (Koncel-Kedziorski et al., 2016): a collection of them |
| `svamp` | SVAMP (arXiv:2103.07191): varied so that shallow cues mislead |
| `addsub` | AddSub (Hosseini et al., 2014): of addition and subtraction |
| `gsm8k` | GSM8K (arXiv:2110.14168): of several steps |
| `aqua` | AQuA (arXiv:1705.04146): with five answers, named by letters |
"""

import math
import re
from collections.abc import Mapping
from typing import Any, Literal

from .base import Question, Task, column

TOLERANCE = 1e-3
SAMPLING = {"do_sample": True, "temperature": 0.3, "top_p": 0.75, "top_k": 40}
_MARK, _LETTERS = "####", "ABCDE"
_NUMBER = re.compile(r"-?\d+\.?\d*")


class ArithmeticTask(Task):
    """Rows of `instruction`, `output` (the reasoning) and `answer`, a number.

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
        """The last number, as LLM-Adapters reads it: in "5-3" it is -3."""
        numbers: list[str] = _NUMBER.findall(text.replace(",", ""))
        return numbers[-1] if numbers else ""

    def is_right(self, prediction: str, answer: str) -> bool:
        return prediction != "" and abs(float(prediction) - float(answer)) <= TOLERANCE


class Gsm8kTask(ArithmeticTask):
    """Rows as in the other arithmetic tasks, or the official ones.

    An official row has a `question` and an `answer`, which holds reasoning, "####" and a number.
    """

    def question(self, row: Mapping[str, Any]) -> Question:
        if "question" not in row:
            return super().question(row)
        completion = column(row, "answer")
        _, mark, number = completion.rpartition(_MARK)
        if not mark:
            raise ValueError(f"answer {completion!r}: expected reasoning, {_MARK!r} and a number")
        return Question(f"{column(row, 'question')}\n", completion, self.read_answer(number))


class AquaTask(ArithmeticTask):
    """Word problems whose answer is a letter from A to E.

    Args:
        letter: which letter of a text is its answer. `first` is the first capital letter from A to
            E, even of a word, as in the code of LLM-Adapters and the ReFT paper, so published
            numbers mean it; `last` is the last such letter that stands alone.
        sampling: as in the other arithmetic tasks.

    Raises:
        ValueError: `letter` is neither.
    """

    def __init__(
        self, *, letter: Literal["first", "last"] = "first", sampling: bool = False
    ) -> None:
        super().__init__(name="aqua", sampling=sampling)
        if letter not in ("first", "last"):
            raise ValueError(f"letter {letter!r}: expected 'first' or 'last'")
        self.letter = letter

    def read_answer(self, text: str) -> str:
        if text.strip() not in tuple(_LETTERS):
            raise ValueError(f"answer {text!r}: expected a letter from A to E")
        return text.strip()

    def extract(self, text: str) -> str:
        pattern = f"[{_LETTERS}]" if self.letter == "first" else rf"\b[{_LETTERS}]\b"
        letters: list[str] = re.findall(pattern, text)
        return "" if not letters else letters[0 if self.letter == "first" else -1]

    def is_right(self, prediction: str, answer: str) -> bool:
        return prediction == answer
