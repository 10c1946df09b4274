"""PIQA (arXiv:1911.11641): which of two solutions works."""

from .commonsense import CommonsenseTask


class PiqaTask(CommonsenseTask):
    """A goal and two solutions."""

    name = "piqa"
    choices = ("solution1", "solution2")
