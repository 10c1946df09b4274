"""WinoGrande (arXiv:1907.10641): which of two nouns fills the blank."""

from .commonsense import CommonsenseTask


class WinograndeTask(CommonsenseTask):
    """A sentence with a blank and two options."""

    name = "winogrande"
    choices = ("option1", "option2")
