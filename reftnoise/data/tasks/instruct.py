"""Following instructions, where no automatic score judges answers well.

Their length, repetition and diversity are reported: embedding noise lengthens answers
(arXiv:2310.05914, section 5.2), which may be by repetition. `ifeval` of
lm-evaluation-harness scores whether instructions are followed.
"""

from collections.abc import Mapping, Sequence
from typing import Any

from .base import Question, Task, column


class InstructTask(Task):
    """Rows of `instruction`, `output` and, if there is more to read, `input`.

    Args:
        repetition_penalty: penalty for tokens that were there before; the ReFT paper's code has
            1.1, the authors of NEFTune advise 1.2.
        no_repeat_ngram_size: length of runs of tokens that are written only once; 0 for no limit.
    """

    name = "instruct"
    max_new_tokens = 512

    def __init__(self, *, repetition_penalty: float = 1.1, no_repeat_ngram_size: int = 5) -> None:
        if repetition_penalty <= 0:
            raise ValueError(f"repetition_penalty {repetition_penalty}: expected above 0")
        if no_repeat_ngram_size < 0:
            raise ValueError(f"no_repeat_ngram_size {no_repeat_ngram_size}: expected at least 0")
        self.generation = {
            "do_sample": False,
            "repetition_penalty": repetition_penalty,
            "no_repeat_ngram_size": no_repeat_ngram_size,
        }

    def question(self, row: Mapping[str, Any]) -> Question:
        prompt, output = column(row, "instruction"), column(row, "output")
        if row.get("input"):
            prompt = f"{prompt}\n\n{column(row, 'input')}"
        return Question(prompt, output, answer=output.strip())

    def scores(self, predictions: Sequence[str], answers: Sequence[str]) -> dict[str, float]:
        """Statistics of what was written, and of the rows' own answers.

        `words` is the mean number of words. `repetition` is the share of runs of four words that
        the same text had before, `distinct` the share of pairs of words that no text had before
        (distinct-2 of arXiv:1510.03055), over all texts.
        """
        of_answers = {f"{name}_of_answers": value for name, value in _statistics(answers).items()}
        return _statistics(predictions) | of_answers


def _statistics(texts: Sequence[str]) -> dict[str, float]:
    words = [text.split() for text in texts]
    fours = [_runs(text, 4) for text in words]
    pairs = [pair for text in words for pair in _runs(text, 2)]
    repeated = sum(len(runs) - len(set(runs)) for runs in fours)
    return {
        "words": sum(map(len, words)) / len(texts),
        "repetition": repeated / max(1, sum(map(len, fours))),
        "distinct": len(set(pairs)) / max(1, len(pairs)),
    }


def _runs(words: Sequence[str], length: int) -> list[tuple[str, ...]]:
    return [tuple(words[i : i + length]) for i in range(len(words) - length + 1)]
