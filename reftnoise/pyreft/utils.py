"""pyreft's `utils` module."""

from enum import Enum

from ..model import get_reft_model

__all__ = ["ReftType", "TaskType", "get_reft_model"]


class ReftType(str, Enum):
    """pyreft's names of methods, which nothing reads."""

    LOREFT = "LOREFT"
    NLOREFT = "NOREFT"


class TaskType(str, Enum):
    """pyreft's names of tasks, which nothing reads."""

    SEQ_CLS = "SEQ_CLS"
    CAUSAL_LM = "CAUSAL_LM"
