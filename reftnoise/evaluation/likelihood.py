"""How likely a model finds texts after prompts, for evaluation and lm-evaluation-harness."""

import logging
from collections.abc import Callable, Iterator, Sequence
from typing import Any, TypeAlias

import torch
from jaxtyping import Float
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

from ..data.conversations import Messages, rendered
from ..data.tokenization import smallest_limit, tokenize_all, truncate
from ..model import ReftModel

logger = logging.getLogger(__name__)

Progress: TypeAlias = Callable[[int, int], None]
"""Called with the numbers of rows that are done and of all rows."""
TokenPair: TypeAlias = tuple[list[int], list[int]]
"""Tokens of a prompt, and of the text that follows it."""


def grouped(pairs: Sequence[TokenPair]) -> list[list[int]]:
    """Indices of the pairs that differ in the last token alone, so that one pass scores them.

    Pairs of the same tokens whose prompts end elsewhere are in different groups, since they are
    edited at different positions. The longest groups come first.
    """
    groups: dict[tuple[tuple[int, ...], ...], list[int]] = {}
    for index, (prompt, rest) in enumerate(pairs):
        groups.setdefault((tuple(prompt), tuple(rest[:-1])), []).append(index)
    return sorted(groups.values(), key=lambda group: -sum(map(len, pairs[group[0]])))


@torch.no_grad()
def next_token_log_probs(
    model: Any,
    pairs: Sequence[TokenPair],
    *,
    limit: int | None = None,
    dtype: torch.dtype | None = None,
) -> list[Tensor]:
    """log p of all tokens before each one that follows a prompt, [tokens, vocabulary] per pair.

    The pairs share a forward pass, in which a `ReftModel` gets the prompts' lengths. Prompts longer
    than `limit` lose their beginning. The softmax has the dtype of the logits by default. A
    `ReftModel` with a prefix cache keeps the prompts there.
    """
    if limit is None and isinstance(model, ReftModel) and model.prefix_cache is not None:
        return _with_kept_prompts(model, pairs, dtype)
    first = None if limit is None else -limit - 1
    tokens = [torch.tensor((prompt + rest)[first:-1]) for prompt, rest in pairs]
    widths = [len(row) for row in tokens]
    starts = [width - len(rest) for width, (_, rest) in zip(widths, pairs, strict=True)]
    mask = pad_sequence([torch.ones_like(row) for row in tokens], batch_first=True)
    inputs = {
        "input_ids": pad_sequence(tokens, batch_first=True).to(model.device),
        "attention_mask": mask.to(model.device),
    }
    if isinstance(model, ReftModel):
        inputs["prompt_lengths"] = torch.tensor(starts, device=model.device) + 1
    logits = model(**inputs).logits
    logits = logits[:, -mask.shape[1] :]  # without those of PEFT's virtual tokens
    return [
        row[start:end].log_softmax(-1, dtype=dtype)
        for row, start, end in zip(logits, starts, widths, strict=True)
    ]


def _with_kept_prompts(
    model: ReftModel, pairs: Sequence[TokenPair], dtype: torch.dtype | None
) -> list[Tensor]:
    """As above, by a pass that takes prompts from the prefix cache, and stores them there."""
    rows = [torch.tensor(prompt + rest) for prompt, rest in pairs]
    tokens = pad_sequence(rows, batch_first=True)
    starts = torch.tensor([len(prompt) for prompt, _ in pairs])
    ends = torch.tensor([len(row) for row in rows])
    columns = torch.arange(tokens.shape[1])
    is_label = (columns >= starts[:, None]) & (columns < ends[:, None])
    outputs = model(
        input_ids=tokens.to(model.device),
        attention_mask=(columns < ends[:, None]).long().to(model.device),
        labels=tokens.masked_fill(~is_label, -100).to(model.device),
        prompt_lengths=starts.to(model.device),
        return_logits="labels",
    )
    log_probs = outputs.logits.log_softmax(-1, dtype=dtype)
    return list(log_probs.split([len(rest) for _, rest in pairs]))


def choice_log_probs(
    model: Any,
    tokenizer: Any,
    prompts: Sequence[str | Messages],
    choices: Sequence[Sequence[str]],
    *,
    batch_size: int = 16,
    progress: Progress | None = None,
) -> list[Tensor]:
    """Σᵢ log p(cᵢ | prompt, c₁…cᵢ₋₁) of each prompt's choices c, [choices] per prompt.

    A chat template may end choices with a token of its own. A prompt without room for a choice
    loses its beginning. In a batch, choices that differ in the last token alone count once.
    """
    pairs = choice_pairs(model, tokenizer, prompts, choices)

    def of_prompts(done: int, total: int) -> None:
        if progress is not None:
            progress(int(done / total * len(prompts)), len(prompts))

    sums = summed_log_probs(model, pairs, batch_size=batch_size, progress=of_prompts)
    return list(torch.split(sums, list(map(len, choices))))


def choice_pairs(
    model: Any,
    tokenizer: Any,
    prompts: Sequence[str | Messages],
    choices: Sequence[Sequence[str]],
) -> list[TokenPair]:
    """The tokens of each prompt with each of its choices, without an end-of-text token."""
    texts = [
        rendered(tokenizer, prompt, text)
        for prompt, of_prompt in zip(prompts, choices, strict=True)
        for text in of_prompt
    ]
    pairs = tokenize_all(tokenizer, texts, nonstop=True)
    return without_beginnings(tokenizer, pairs, smallest_limit(tokenizer, model, None))


def completion_pairs(
    model: Any,
    tokenizer: Any,
    prompts: Sequence[str | Messages],
    completions: Sequence[str],
    max_length: int | None = None,
) -> list[TokenPair]:
    """The tokens of each prompt with its completion, those of training: an end-of-text token, too.

    A prompt without room for its completion, in `max_length` tokens or fewer, loses its beginning.
    """
    texts = [
        rendered(tokenizer, prompt, text) for prompt, text in zip(prompts, completions, strict=True)
    ]
    pairs = tokenize_all(tokenizer, texts, nonstop=False)
    return without_beginnings(tokenizer, pairs, smallest_limit(tokenizer, model, max_length))


def following_log_probs(
    model: Any,
    pairs: Sequence[TokenPair],
    *,
    batch_size: int = 16,
    progress: Progress | None = None,
) -> Iterator[tuple[int, Float[Tensor, " tokens"]]]:
    """Index of each pair, and log p(cᵢ | prompt, c₁…cᵢ₋₁) of the text c that follows its prompt.

    The longest pairs come first. The progress counts pairs.
    """
    groups, done = grouped(pairs), 0
    for start in range(0, len(groups), batch_size):
        batch = groups[start : start + batch_size]
        all_log_probs = next_token_log_probs(
            model, [pairs[group[0]] for group in batch], dtype=torch.float32
        )
        for group, log_probs in zip(batch, all_log_probs, strict=True):
            for index in group:
                tokens = torch.tensor(pairs[index][1], device=log_probs.device)
                yield index, log_probs.gather(1, tokens[:, None])[:, 0]
            done += len(group)
        if progress is not None:
            progress(done, len(pairs))


def summed_log_probs(
    model: Any,
    pairs: Sequence[TokenPair],
    *,
    batch_size: int = 16,
    progress: Progress | None = None,
) -> Float[Tensor, " pairs"]:
    """Σᵢ log p(cᵢ | prompt, c₁…cᵢ₋₁) of the text c that follows each prompt."""
    sums = torch.empty(len(pairs))
    for index, log_probs in following_log_probs(
        model, pairs, batch_size=batch_size, progress=progress
    ):
        sums[index] = log_probs.sum()
    return sums


def completion_losses(
    model: Any,
    pairs: Sequence[TokenPair],
    *,
    batch_size: int = 16,
    progress: Progress | None = None,
) -> list[float]:
    """The mean of −log p over the tokens of the text that follows each prompt, in nats."""
    losses = [0.0] * len(pairs)
    for index, log_probs in following_log_probs(
        model, pairs, batch_size=batch_size, progress=progress
    ):
        losses[index] = -float(log_probs.mean())
    return losses


def without_beginnings(
    tokenizer: Any, pairs: Sequence[TokenPair], limit: int | None
) -> list[TokenPair]:
    """Pairs without the beginning of prompts that are too long, and the end of what is still too
    long then, as in training.
    """
    if limit is None:
        return list(pairs)
    kept = [truncate(tokenizer, prompt, rest, limit) for prompt, rest in pairs]
    both = list(zip(pairs, kept, strict=True))
    beginnings = sum(len(before) > len(after) for (before, _), (after, _) in both)
    ends = sum(len(before) > len(after) for (_, before), (_, after) in both)
    if beginnings:
        logger.warning(
            "%d of %d prompts had no room in %d tokens and lost their beginning",
            beginnings,
            len(pairs),
            limit,
        )
    if ends:
        logger.warning(
            "%d of %d completions had no room in %d tokens and lost their end",
            ends,
            len(pairs),
            limit,
        )
    return kept
