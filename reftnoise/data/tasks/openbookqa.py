"""OpenBookQA (arXiv:1809.02789): questions on elementary facts of science."""

from .commonsense import CommonsenseTask


class OpenbookqaTask(CommonsenseTask):
    """A question and four answers."""

    name = "openbookqa"
    choices = ("answer1", "answer2", "answer3", "answer4", "answer5")
