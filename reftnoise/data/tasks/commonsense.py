"""The commonsense tasks of the ReFT paper, in the form of LLM-Adapters (arXiv:2304.01933).

A model reads an instruction that ends in the answers it may give, and writes "the correct answer
is …". The answer is the first that its text holds, as in LLM-Adapters; the ReFT paper's code
counts an answer only if nothing but it follows these words.
"""

import re
from collections.abc import Mapping
from typing import Any

from .base import Question, Task, column

TRIGGER = "the correct answer is "
_FORMAT = re.compile(r"Answer format: (\S+)\s*$")
_ANSWERS = tuple(f"answer{number}" for number in range(1, 6))
CHOICES = {
    # BoolQ (arXiv:1905.10044): yes or no, without the passage that the question is about.
    "boolq": ("true", "false"),
    # PIQA (arXiv:1911.11641): which of two solutions reaches a goal.
    "piqa": ("solution1", "solution2"),
    # Social IQa (arXiv:1904.09728): what people feel, want or do next; three answers.
    "social_i_qa": _ANSWERS,
    # HellaSwag (arXiv:1905.07830): which of four endings a description has.
    "hellaswag": ("ending1", "ending2", "ending3", "ending4"),
    # WinoGrande (arXiv:1907.10641): which of two nouns fills the blank of a sentence.
    "winogrande": ("option1", "option2"),
    # ARC-Easy (arXiv:1803.05457): science questions of school exams; three to five answers.
    "arc_easy": _ANSWERS,
    # ARC-Challenge (same paper): those that retrieval and co-occurrence got wrong.
    "arc_challenge": _ANSWERS,
    # OpenBookQA (arXiv:1809.02789): questions on elementary facts of science; four answers.
    "openbookqa": _ANSWERS,
}
"""Name of a task → all answers that its rows may have."""


class CommonsenseTask(Task):
    """Rows of `instruction` and `answer`; greedy decoding. The name is a key of `CHOICES`."""

    def __init__(self, name: str) -> None:
        self.name = name
        self.choices = CHOICES[name]

    def question(self, row: Mapping[str, Any]) -> Question:
        instruction, answer = column(row, "instruction"), column(row, "answer")
        listed = _FORMAT.search(instruction)
        choices = tuple(listed[1].split("/")) if listed else self.choices
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
        match = re.search("|".join(self.choices), text)
        return match[0] if match else ""
