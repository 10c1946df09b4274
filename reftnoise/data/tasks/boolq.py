"""BoolQ (arXiv:1905.10044): yes or no, without the passage that the question is about."""

from .commonsense import CommonsenseTask


class BoolqTask(CommonsenseTask):
    """A question, to be answered with true or false."""

    name = "boolq"
    choices = ("true", "false")
