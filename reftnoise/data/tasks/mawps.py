"""MAWPS (Koncel-Kedziorski et al., 2016): a collection of word problems."""

from .arithmetic import ArithmeticTask


class MawpsTask(ArithmeticTask):
    """Word problems with one number as the answer."""

    name = "mawps"
