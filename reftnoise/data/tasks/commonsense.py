"""The commonsense tasks of the ReFT paper, in the form of LLM-Adapters (arXiv:2304.01933).

A model reads an instruction that ends in the answers it may give, and writes "the correct answer
is …". The answer is the first that its text holds, as in LLM-Adapters; the ReFT paper's code
counts an answer only if nothing but it follows these words.
"""

import re
from collections.abc import Mapping
from typing import Any, ClassVar

from .base import Question, Task, column

TRIGGER = "the correct answer is "
_FORMAT = re.compile(r"Answer format: (\S+)\s*$")


class CommonsenseTask(Task):
    """Rows of `instruction` and `answer`; greedy decoding."""

    choices: ClassVar[tuple[str, ...]]
    """All answers that rows of this task may have."""

    def question(self, row: Mapping[str, Any]) -> Question:
        instruction, answer = column(row, "instruction"), column(row, "answer")
        named = _FORMAT.search(instruction)
        choices = tuple(named[1].split("/")) if named else self.choices
        if answer not in choices:
            raise ValueError(f"answer {answer!r}: expected one of {', '.join(choices)}")
        return Question(
            prompt=f"{instruction}\n",
            completion=TRIGGER + answer,
            answer=answer,
            choices=tuple(TRIGGER + choice for choice in choices),
            choice_answers=choices,
        )

    def extract(self, text: str) -> str:
        found = re.search("|".join(self.choices), text)
        return found[0] if found else ""
