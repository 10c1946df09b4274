"""A server's answers against the model here: log-probabilities of what the server wrote."""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from ...model import ReftModel
from .client import Completion

_FLOOR = 1e-3
"""The difference of log-probabilities, in nats, that float32 explains in any model."""
_OF_FLOAT32 = 2e-5
"""The same as a share of the largest logit, of which a log-probability is a difference."""
_OF_ROUNDING = 4.0
"""The same of half precision, as a multiple of what its rounding changes of the model here."""


@dataclass(frozen=True)
class Exchange:
    """A request, and a server's answer.

    Args:
        prompt: tokens of the prompt.
        completion: what the server wrote.
        of_base: whether the bare base was asked.
        shared: number of the prompt's first tokens that an earlier request of its family began
            with.
        has_stopped: whether the answer ends without a token that ends texts, before its time.
    """

    prompt: list[int]
    completion: Completion
    of_base: bool
    shared: int
    has_stopped: bool = False


@dataclass(frozen=True)
class OwnReading:
    """What the model here says of an exchange's tokens; the first of them has no entry.

    Args:
        log_probs: log-probabilities of the tokens after the first, prompt and answer.
        best: the most probable tokens there.
        margins: how much more probable these are, in nats.
        largest: largest absolute logit.
        end: the most probable token that ends texts, its log-probability after the last token, the
            most probable token there, and its own; None unless the answer stopped early.
    """

    log_probs: Float[Tensor, " tokens"]
    best: Tensor
    margins: Float[Tensor, " tokens"]
    largest: float
    end: tuple[int, float, int, float] | None


@torch.no_grad()
def reading(model: Any, exchange: Exchange, ends: Sequence[int]) -> OwnReading:
    """Read a prompt and a server's answer by one pass; a `ReftModel` edits them as they are."""
    tokens = torch.tensor([*exchange.prompt, *exchange.completion.tokens], device=model.device)
    inputs: dict[str, Any] = {
        "input_ids": tokens[None],
        "attention_mask": torch.ones_like(tokens)[None],
    }
    if isinstance(model, ReftModel):
        inputs["prompt_lengths"] = torch.tensor([len(exchange.prompt)], device=model.device)
    logits = model(**inputs).logits[0, -len(tokens) :].float()  # after PEFT's virtual tokens
    log_probs, after = logits.log_softmax(-1).tensor_split([len(tokens) - 1])
    own = log_probs.gather(1, tokens[1:, None])[:, 0]
    highest, best = log_probs.max(-1)
    end = None
    if exchange.has_stopped:
        token, likeliest = max(ends, key=lambda one: float(after[0, one])), int(after[0].argmax())
        end = token, float(after[0, token]), likeliest, float(after[0, likeliest])
    if not math.isfinite(largest := float(logits.abs().max())):
        raise ValueError(f"the model here has logits that are not finite in {model.dtype}")
    return OwnReading(own.cpu(), best.cpu(), (highest - own).cpu(), largest, end)


def readings(
    reft_model: ReftModel,
    exchanges: Sequence[Exchange],
    ends: Sequence[int],
    *,
    bare: bool = False,
    progress: Callable[[int, int], None] | None = None,
) -> list[OwnReading]:
    """Those of all exchanges; by the bare base where it was asked, or for all of them."""
    results = []
    for done, exchange in enumerate(exchanges):
        if bare or exchange.of_base:
            with reft_model.disabled():
                results.append(reading(reft_model, exchange, ends))
        else:
            results.append(reading(reft_model, exchange, ends))
        if progress is not None:
            progress(done + 1, len(exchanges))
    return results


def limit_of_float32(own: Sequence[OwnReading]) -> float:
    """The largest difference of log-probabilities that arithmetic in float32 explains."""
    return max(_FLOOR, _OF_FLOAT32 * max((r.largest for r in own), default=0.0))


def limit_of_rounding(own: Sequence[OwnReading], in_float32: Sequence[OwnReading] | None) -> float:
    """The largest difference that rounding explains.

    Args:
        own: readings of the model here.
        in_float32: its readings in float32; None where it is in float32 itself.
    """
    if in_float32 is None:
        return limit_of_float32(own)
    return max(limit_of_float32(own), _OF_ROUNDING * largest_move(own, in_float32))


def largest_move(readings_: Sequence[OwnReading], others: Sequence[OwnReading]) -> float:
    """The largest difference of log-probabilities of the same tokens."""
    pairs = zip(readings_, others, strict=True)
    moves = [(mine.log_probs - theirs.log_probs).abs() for mine, theirs in pairs]
    return max((float(move.max()) for move in moves if len(move)), default=0.0)


@dataclass(frozen=True)
class TokenDifference:
    """How a request's answer differs from the model here.

    Args:
        request: number of the request.
        of_base: whether the bare base was asked.
        prompt_length: number of the prompt's tokens.
        shared: number of its first tokens that an earlier request of its family began with.
        position: number of the first token that differs, from the prompt's first.
        is_prompt: whether that is a token of the prompt.
        token: the server's token there.
        own_token: the most probable one here.
        log_prob: the server's log-probability of its token; None if it gives none.
        own_log_prob: that of the same token here.
        margin: how much less probable than the most probable one it is here, in nats.
    """

    request: int
    of_base: bool
    prompt_length: int
    shared: int
    position: int
    is_prompt: bool
    token: int
    own_token: int
    log_prob: float | None
    own_log_prob: float
    margin: float


@dataclass(frozen=True)
class Verdict:
    """An exchange's comparison.

    Args:
        difference: the first token that differs by more than rounding; None if all are equal.
        largest: largest difference of log-probabilities; 0 where the server gives none.
        near_ties: number of answer tokens that are not the most probable here, within rounding.
        compared: number of log-probabilities that were compared.
    """

    difference: TokenDifference | None
    largest: float
    near_ties: int
    compared: int


def compare(number: int, exchange: Exchange, own: OwnReading, limit: float) -> Verdict:
    """The verdict on an exchange: tokens are greedy ones, and log-probabilities equal.

    Args:
        number: number of the request.
        exchange: request and answer.
        own: what the model here says of it.
        limit: difference of log-probabilities that rounding explains.
    """
    before = len(exchange.prompt) - 1
    theirs, is_given = _given(exchange.completion, before, len(own.log_probs))
    gaps = torch.where(is_given, (theirs - own.log_probs).abs(), 0.0)
    is_answer = torch.arange(len(gaps)) >= before
    # Tokens are in the right order within the rounding of both their log-probabilities.
    is_other = is_answer & ~(own.margins <= 2 * limit)
    differs = (is_other | ~(gaps <= limit)).nonzero()  # NaN is not within
    verdict = Verdict(
        None,
        largest=float(gaps.max()) if len(gaps) else 0.0,
        near_ties=int((is_answer & (own.margins > 0) & ~is_other).sum()),
        compared=int(is_given.sum()),
    )
    tokens = [*exchange.prompt, *exchange.completion.tokens]
    place = (number, exchange.of_base, len(exchange.prompt), exchange.shared)
    if len(differs):
        at = int(differs[0])
        said = float(theirs[at]) if is_given[at] else None
        mine, margin = float(own.log_probs[at]), float(own.margins[at])
        difference = TokenDifference(
            *place, at + 1, at < before, tokens[at + 1], int(own.best[at]), said, mine, margin
        )
        return replace(verdict, difference=difference)
    if own.end is not None:
        token, mine, best, highest = own.end
        if not highest - mine <= 2 * limit:
            difference = TokenDifference(
                *place, len(tokens), False, token, best, None, mine, highest - mine
            )
            return replace(verdict, difference=difference)
    return verdict


def _given(completion: Completion, before: int, count: int) -> tuple[Tensor, Tensor]:
    """The server's log-probabilities of the tokens after the first, and where it gives some."""
    theirs = torch.full((count,), torch.nan)
    is_given = torch.zeros(count, dtype=torch.bool)
    for start, values in ((0, completion.prompt_log_probs), (before, completion.log_probs)):
        if values is not None:
            end = min(start + len(values), count)
            theirs[start:end] = torch.tensor(values[: end - start])
            is_given[start:end] = True
    return theirs, is_given
