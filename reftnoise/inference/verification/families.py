"""Prompts that show a server's faults: of many lengths, some with the beginnings of others."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

LENGTHS = (1, 2, 3, 15, 16, 17, 31, 32, 33, 63, 64, 65, 127, 128, 129, 200, 257, 400, 513, 800)
"""Lengths of prompts: short ones, and those around the sizes of blocks of prefix caches."""
BLOCKS = (16, 32, 64, 128, 256)
"""Lengths that fill blocks: what is edited at such a prompt's end is in a block that is kept."""
_BEFORE = 4
"""The tokens at the end of a block that a prompt leaves for its answer to fill."""
_STEP = 19
"""The tokens between the beginnings of two texts."""
_QUESTION = 24
"""The largest number of tokens of a next turn."""


@dataclass(frozen=True)
class PlannedRequest:
    """A prompt that is asked after others.

    Args:
        tokens: tokens of the prompt.
        goes_on: whether they follow the previous request and its answer, as in a chat.
        of_base: whether the bare base is asked.
        echo: whether log-probabilities of the prompt are asked for, which some servers compute
            without their caches.
    """

    tokens: list[int]
    goes_on: bool = False
    of_base: bool = False
    echo: bool = False


def families(
    asked: Sequence[Sequence[int]], longest: int, count: int, *, with_base: bool
) -> Iterator[list[PlannedRequest]]:
    """Requests, in families whose requests are asked one after the other.

    Each family asks a prompt as it stands, a prompt that ends just before a cache's block is full,
    and the next turn of both, which begins with their answers; beginnings of one text, of which the
    first fills its blocks, from short to long, the longest twice and then echoed; and a beginning
    of another. The bare base reads some of them first, and others afterwards.

    Args:
        asked: tokens of prompts.
        longest: number of tokens that a prompt may have.
        count: number of requests in all families.
        with_base: whether the bare base is asked, too.
    """
    lengths = [*(n for n in LENGTHS if n < longest), longest]
    blocks = [n for n in BLOCKS if n < longest] or [longest]
    text = [token for prompt in asked for token in prompt]
    text *= -(-(2 * longest + 2 * _STEP) // len(text))
    number = 0
    while count > 0:
        own, block = list(asked[number % len(asked)])[:longest], blocks[-1 - number % len(blocks)]
        # Each family has texts of its own, which do not begin as its prompt does.
        start = (37 * number + 11) % longest
        document, turn, other = (text[start + n * _STEP :][:longest] for n in range(3))
        cuts = sorted(
            {lengths[number % len(lengths)], block, lengths[-1 - number % min(3, len(lengths))]}
        )
        family = [
            PlannedRequest(own),
            PlannedRequest(document[:_QUESTION], goes_on=True),
            PlannedRequest(turn[: max(1, block - _BEFORE)]),
            PlannedRequest(document[:_QUESTION], goes_on=True),
            *(PlannedRequest(document[:cut]) for cut in cuts),
            PlannedRequest(document[: cuts[-1]]),
            PlannedRequest(document[: cuts[-1]], echo=True),
            PlannedRequest(other[: cuts[-1]]),
        ]
        if with_base:
            base = PlannedRequest(document[: cuts[-1]], of_base=True)
            family = [*family[:4], base, *family[4:], PlannedRequest(own, of_base=True)]
        yield family[:count]
        count -= len(family)
        number += 1


def expect_numbers(requests: int, longest: int, tolerance: float | None) -> None:
    """Raise a ValueError for numbers of a comparison that are out of range."""
    if requests < 1:
        raise ValueError(f"requests {requests}: expected at least 1")
    if longest < 1:
        raise ValueError(f"longest {longest}: expected at least 1")
    if tolerance is not None and not tolerance > 0:
        raise ValueError(f"tolerance {tolerance}: expected a positive number of nats")
