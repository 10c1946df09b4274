"""AddSub (Hosseini et al., 2014): word problems of addition and subtraction."""

from .arithmetic import ArithmeticTask


class AddsubTask(ArithmeticTask):
    """Word problems with one number as the answer."""

    name = "addsub"
