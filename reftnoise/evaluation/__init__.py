"""What a model writes, how likely it finds a text, and the scores of both."""

from .scoring import Evaluation as Evaluation
from .scoring import evaluate as evaluate
