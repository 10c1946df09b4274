"""HellaSwag (arXiv:1905.07830): which ending a description has."""

from .commonsense import CommonsenseTask


class HellaswagTask(CommonsenseTask):
    """A beginning and four endings."""

    name = "hellaswag"
    choices = ("ending1", "ending2", "ending3", "ending4")
