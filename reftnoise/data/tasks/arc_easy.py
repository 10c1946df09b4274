"""ARC-Easy (arXiv:1803.05457): science questions of school exams."""

from .commonsense import CommonsenseTask


class ArcEasyTask(CommonsenseTask):
    """A question and three to five answers."""

    name = "arc_easy"
    choices = ("answer1", "answer2", "answer3", "answer4", "answer5")
