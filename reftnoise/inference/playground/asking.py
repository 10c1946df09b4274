"""What a playground asks, and what it is answered."""

from abc import ABC, abstractmethod
from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass, field

from jaxtyping import Float
from torch import Tensor

from ...evaluation.decoding import GREEDY, Decoding

BASE = "base"
"""The name of the answer without an adapter."""

TOGETHER = "together"
"""The name of the answer with all adapters, whose edits are added."""

NO_NOISE = "off"


@dataclass(frozen=True)
class Question:
    """A prompt, who answers it, and how.

    Args:
        prompt: a text.
        names: of those who answer.
        scales: by which an adapter's edits are multiplied; 1 where there is none.
        decoding: the template, and how answers are drawn.
        layers: where adapters edit; None for all of theirs.
        positions: fields of `Positions` where they edit; None for all of theirs.
        noise: on the prompt's embeddings, by its registered name, or `off`.
        alpha: of the noise.
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
            raise ValueError("nobody is asked: choose who answers")


@dataclass(frozen=True)
class Norms:
    r"""How far hidden states were moved: $\|h' - h\| / \|h\|$ at each site and token."""

    sites: Sequence[str]
    tokens: Sequence[str]
    prompt: int
    """How many of the tokens are the prompt's."""
    values: Float[Tensor, "sites tokens"]


@dataclass(frozen=True)
class Answer:
    """What has been written so far."""

    text: str = ""
    norms: Norms | None = None


class Answerer(ABC):
    """A model, or a server of models."""

    title: str
    names: Sequence[str]
    """Who can answer."""
    scaled: Sequence[str]
    """Of them, those whose edits can be scaled."""
    layers: Sequence[int] = ()
    """Where adapters edit; none if that cannot be changed."""
    positions: Sequence[str] = ()
    """Likewise, as fields of `Positions`."""
    noises: Sequence[str] = ()
    """By registered name, those that can be put on the prompt; none if there can be none."""

    @abstractmethod
    def answers(self, question: Question) -> Iterator[Mapping[str, Answer]]:
        """All answers as they grow, by name, until they are whole.

        Raises:
            ValueError: what is asked cannot be done.
        """
