"""How far an exported model is from the adapted one: logits, and what both write."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from ...data.conversations import Messages
from ...data.tokenization import padding_token, prompt_tokens, smallest_limit
from ...evaluation.generation import ends_of

NEW_TOKENS = 16
"""The number of tokens that are written after each prompt."""
_LONGEST = 256
"""Longest beginning of a prompt, in tokens, that is read."""
_OF_FLOAT32 = 1e-5
"""Largest difference that float32 explains, as a share of the largest logit."""
_OF_ROUNDING = 4.0
"""The same of half precision, as a multiple of what its rounding changes of the adapted model."""


@dataclass(frozen=True)
class GreedyAnswers:
    """What a model writes greedily after prompts, and its logits there."""

    written: list[list[int]]
    logits: list[Float[Tensor, "tokens vocabulary"]]
    """At the last token of a prompt and all but the last of an answer."""


def token_prompts(tokenizer: Any, model: Any, prompts: Sequence[str | Messages]) -> list[list[int]]:
    """The tokens of prompts, cut to what leaves room for an answer."""
    limit = smallest_limit(tokenizer, model, None)
    longest = _LONGEST if limit is None else min(_LONGEST, limit - NEW_TOKENS)
    return [prompt_tokens(tokenizer, prompt)[:longest] for prompt in prompts]


def answers_of(
    model: Any,
    tokenizer: Any,
    prompts: Sequence[Sequence[int]],
    answers: Sequence[Sequence[int]] | None = None,
) -> GreedyAnswers:
    """What a model writes, and its logits of these answers, or of given ones.

    Args:
        model: model in evaluation mode.
        tokenizer: tokenizer of the model.
        prompts: tokens of prompts.
        answers: tokens of answers that are read for the logits, instead of the model's own.
    """
    written, logits = [], []
    for index, prompt in enumerate(prompts):
        tokens = torch.tensor([prompt], device=model.device)
        with torch.no_grad():
            output = model.generate(
                input_ids=tokens,
                attention_mask=torch.ones_like(tokens),
                max_new_tokens=NEW_TOKENS,
                do_sample=False,
                temperature=None,
                top_p=None,
                top_k=None,
                pad_token_id=padding_token(tokenizer),
                eos_token_id=ends_of(model, tokenizer) or None,
            )
            own = output[0, len(prompt) :].tolist()
            read = own if answers is None else answers[index]
            whole = torch.tensor([[*prompt, *read]], device=model.device)
            at_answer = model(input_ids=whole).logits[0, len(prompt) - 1 : -1]
        written.append(own)
        logits.append(at_answer.float().cpu())
    return GreedyAnswers(written, logits)


def largest_difference(answers: GreedyAnswers, others: GreedyAnswers) -> float:
    """The largest difference of logits of the same answers."""
    pairs = zip(answers.logits, others.logits, strict=True)
    return _largest([mine - theirs for mine, theirs in pairs])


def largest_logit(answers: GreedyAnswers) -> float:
    """The largest absolute logit."""
    return _largest(answers.logits)


def _largest(values: Sequence[Tensor]) -> float:
    """The largest absolute value; NaN if there is one, which Python's `max` would lose."""
    return float(torch.stack([value.abs().max() for value in values]).max())


def limit_of_rounding(answers: GreedyAnswers, in_float32: GreedyAnswers | None) -> float:
    """The largest difference of logits that the arithmetic explains.

    Args:
        answers: those of the adapted model.
        in_float32: those of the adapted model in float32, with the same tokens; None where it is in
            float32 itself.
    """
    if in_float32 is None:
        return limit_of_float32(answers)
    rounding = _OF_ROUNDING * largest_difference(answers, in_float32)
    return max(limit_of_float32(answers), rounding)


def limit_of_float32(answers: GreedyAnswers) -> float:
    """The largest difference of logits that arithmetic in float32 explains."""
    return _OF_FLOAT32 * largest_logit(answers)
