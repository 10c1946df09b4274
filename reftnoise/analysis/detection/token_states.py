"""The bare base's hidden states of each token of texts, at the sites of units."""

import logging
from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

import torch
from jaxtyping import Float
from torch import Tensor

from ...data.conversations import Messages
from ...data.tokenization import smallest_limit
from ...engine.units import PlacedUnit
from ...evaluation.likelihood import Progress
from ...evaluation.scoring import evaluating
from ...model import ReftModel
from ..steering.states import recorded, whole_tokens

logger = logging.getLogger(__name__)


class TextStates(NamedTuple):
    """What was read of one text."""

    number: int
    """Its number."""
    by_unit: dict[str, Float[Tensor, "tokens hidden"]]
    """By unit key, the state of each token."""


def tokens_of(
    tokenizer: Any, model: Any, texts: Sequence[str | Messages], *, name: str = "texts"
) -> list[list[int]]:
    """The tokens of texts, and of conversations to their end, as far as the model's context goes.

    Raises:
        ValueError: a single text instead of a list, no text, or an empty one.
    """
    if isinstance(texts, str):
        raise ValueError(f"{name}: expected a list of texts, got a single one")
    if not texts:
        raise ValueError(f"{name}: expected at least one")
    rows = [whole_tokens(tokenizer, text) for text in texts]
    limit = smallest_limit(tokenizer, model, None)
    if long := sum(limit is not None and len(row) > limit for row in rows):
        logger.warning(
            "%d of %d texts were longer than %d tokens and lost their end", long, len(rows), limit
        )
    return [row[:limit] for row in rows]


def expect_longer(rows: Sequence[Sequence[int]], skip: int) -> None:
    """Raise a ValueError for a `skip` below 0, or a text of no more tokens."""
    if skip < 0:
        raise ValueError(f"skip {skip}: expected at least 0")
    for index, row in enumerate(rows):
        if len(row) <= skip:
            raise ValueError(f"text {index} has {len(row)} tokens: expected more than skip, {skip}")


def beginning_of(tokenizer: Any, texts: Sequence[str | Messages]) -> int:
    """The number of tokens with which the tokenizer, or its chat template, begins all such texts.

    Tokens of a text's first message do not count.
    """
    if all(isinstance(text, str) for text in texts):
        pair = [tokenizer(text)["input_ids"] for text in "12"]
    else:
        role = next(text for text in texts if not isinstance(text, str))[0].get("role", "user")
        pair = [whole_tokens(tokenizer, [{"role": role, "content": text}]) for text in "12"]
    same = (first == second for first, second in zip(*pair, strict=False))
    return next((index for index, is_same in enumerate(same) if not is_same), 0)


def pieces_of(tokenizer: Any, tokens: Sequence[int]) -> list[str]:
    """The text that each token adds to those before it.

    A letter of several tokens is added by the last of them, and the others add nothing.
    """

    def text(first: int, end: int) -> str:
        return str(tokenizer.decode(tokens[first:end], clean_up_tokenization_spaces=False))

    pieces, before, shown = [], 0, 0  # the text is that of the tokens from `before` on
    for end in range(1, len(tokens) + 1):
        known, longer = text(before, shown), text(before, end)
        is_whole = not longer.endswith("\ufffd") or end == len(tokens)
        pieces.append(longer[len(known) :] if is_whole else "")
        if is_whole:
            before, shown = shown, end
    return pieces


def token_states(
    reft_model: ReftModel,
    rows: Sequence[Sequence[int]],
    units: Sequence[PlacedUnit],
    *,
    batch_size: int,
    progress: Progress | None = None,
) -> Iterator[TextStates]:
    """The states of each text's tokens at all units, in one pass, the longest texts first.

    Raises:
        ValueError: states that are not finite.
    """
    if batch_size < 1:
        raise ValueError(f"batch_size {batch_size}: expected at least 1")
    order = sorted(range(len(rows)), key=lambda index: -len(rows[index]))
    device = reft_model.model.device
    for start in range(0, len(order), batch_size):
        indices = order[start : start + batch_size]
        lengths = torch.tensor([len(rows[index]) for index in indices])
        width = int(lengths.max())
        ids = torch.tensor(
            [[*rows[i], *[rows[i][0]] * (width - len(rows[i]))] for i in indices], device=device
        )
        mask = (torch.arange(width) < lengths[:, None]).long().to(device)
        with evaluating(reft_model), reft_model.disabled(), recorded(units) as seen:
            reft_model(input_ids=ids, attention_mask=mask)
        for row, index in enumerate(indices):
            states = {key: hidden[row, : lengths[row]] for key, hidden in seen.items()}
            for key, of_tokens in states.items():
                if not of_tokens.isfinite().all():
                    raise ValueError(f"{key}: the base's states there are not finite")
            yield TextStates(index, states)
        if progress is not None:
            progress(min(start + batch_size, len(order)), len(order))
