"""ARC-Challenge (arXiv:1803.05457): those that retrieval and co-occurrence got wrong."""

from .commonsense import CommonsenseTask


class ArcChallengeTask(CommonsenseTask):
    """A question and three to five answers."""

    name = "arc_challenge"
    choices = ("answer1", "answer2", "answer3", "answer4", "answer5")
