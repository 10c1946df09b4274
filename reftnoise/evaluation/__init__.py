"""What a model writes, how likely it finds a text, and the scores of both.

Names are imported when they are first used, so that `evaluation.decoding` loads no torch.
"""

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:  # `as` marks a name as public for type checkers
    from .scoring import Evaluation as Evaluation
    from .scoring import evaluate as evaluate

__all__ = ["Evaluation", "evaluate"]


def __getattr__(name: str) -> Any:
    if name not in __all__:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    from . import scoring

    return getattr(scoring, name)
