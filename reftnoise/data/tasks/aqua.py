"""AQuA (arXiv:1705.04146): word problems with five answers, named by letters."""

import re
from typing import Literal

from .arithmetic import ArithmeticTask

_LETTERS = "ABCDE"


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
