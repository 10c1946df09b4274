"""Requests of the playground, and their answers."""

from abc import ABC, abstractmethod
from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass, field

from ...analysis.inspection import EditNorms
from ...config.decoding import GREEDY, Decoding

TOGETHER = "together"
"""The name of the answer with all adapters, whose edits are added."""

NO_NOISE = "off"


@dataclass(frozen=True)
class AnswerRequest:
    """A prompt, the models that answer it, and how.

    Args:
        scales: factors of the adapters' edits by name; 1 for those that have none.
        decoding: template and sampling.
        layers: layers where adapters edit; None for all that they edit.
        positions: fields of `Positions` where adapters edit; None for all that they edit.
        noise: registered name of the noise on the prompt's embeddings, or `off`.
        alpha: α of the noise.
    """

    prompt: str
    names: Sequence[str]
    scales: Mapping[str, float] = field(default_factory=dict)
    decoding: Decoding = GREEDY
    layers: Collection[int] | None = None
    positions: Collection[str] | None = None
    noise: str = NO_NOISE
    alpha: float = 5.0

    def __post_init__(self) -> None:
        if not self.prompt.strip():
            raise ValueError("the prompt is empty")
        if not self.names:
            raise ValueError("no model is chosen: choose one that answers")


@dataclass(frozen=True)
class Answer:
    """The text so far, and how far the hidden states of its tokens and the prompt's are moved."""

    text: str = ""
    norms: EditNorms | None = None
    prompt_length: int = 0
    """The number of the norms' tokens that are the prompt's."""


class Answerer(ABC):
    """A model with its adapters, or a server of models."""

    title: str
    names: Sequence[str]
    """Models that can answer."""
    scaled: Sequence[str]
    """Those whose edits can be scaled."""
    layers: Sequence[int] = ()
    """Layers where adapters edit; none if they cannot be chosen."""
    positions: Sequence[str] = ()
    """Fields of `Positions` where adapters edit; none if they cannot be chosen."""
    templates: Mapping[str, str] = {}
    """The template of each answer where a request names none; empty where all have the same."""
    noises: Sequence[str] = ()
    """Registered names of noise for the prompt's embeddings; none if there can be no noise."""

    @abstractmethod
    def answers(self, request: AnswerRequest) -> Iterator[Mapping[str, Answer]]:
        """All answers by name, as they grow, until they are whole.

        Raises:
            ValueError: the request cannot be met.
        """
