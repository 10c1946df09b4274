"""SVAMP (arXiv:2103.07191): word problems, varied so that shallow cues mislead."""

from .arithmetic import ArithmeticTask


class SvampTask(ArithmeticTask):
    """Word problems with one number as the answer."""

    name = "svamp"
