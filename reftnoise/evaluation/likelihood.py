"""How likely a model finds texts after prompts: what evaluation and lm-evaluation-harness share."""

import logging
from collections.abc import Callable, Sequence
from typing import Any, TypeAlias

import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

from ..data.tokenization import Messages, smallest_limit, tokenize, truncate
from ..model import ReftModel

logger = logging.getLogger(__name__)

Progress: TypeAlias = Callable[[int, int], None]
"""Called with the rows that are done, and all rows."""
Row: TypeAlias = tuple[list[int], list[int]]
"""Tokens of a prompt, and of what follows it."""


Read: TypeAlias = tuple[tuple[int, ...], tuple[int, ...]]


def what_is_read(row: Row) -> Read:
    """A row without its last token, which is predicted, never read."""
    return tuple(row[0]), tuple(row[1][:-1])


def rows_alike(rows: Sequence[Row]) -> dict[Read, list[int]]:
    """Indices of the rows that differ in the last token alone, so that one pass scores them.

    Rows of the same tokens whose prompts end elsewhere are not alike: edits land elsewhere.
    """
    alike: dict[Read, list[int]] = {}
    for index, row in enumerate(rows):
        alike.setdefault(what_is_read(row), []).append(index)
    return alike


@torch.no_grad()
def next_token_log_probs(
    model: Any, rows: Sequence[Row], *, limit: int | None = None, dtype: torch.dtype | None = None
) -> list[Tensor]:
    """Of the vocabulary, before each token that follows a prompt: [tokens, vocabulary] per row.

    Args:
        model: a `ReftModel`, which is told where prompts end, or any causal language model.
        rows: one pass's.
        limit: tokens that are read at most; longer prompts lose their beginning.
        dtype: of the softmax; by default that of the logits.
    """
    first = None if limit is None else -limit - 1
    tokens = [torch.tensor((prompt + rest)[first:-1]) for prompt, rest in rows]
    widths = [len(row) for row in tokens]
    starts = [width - len(rest) for width, (_, rest) in zip(widths, rows, strict=True)]
    mask = pad_sequence([torch.ones_like(row) for row in tokens], batch_first=True)
    inputs = {
        "input_ids": pad_sequence(tokens, batch_first=True).to(model.device),
        "attention_mask": mask.to(model.device),
    }
    if isinstance(model, ReftModel):
        inputs["prompt_lengths"] = torch.tensor(starts, device=model.device) + 1
    logits = model(**inputs).logits
    logits = logits[:, -mask.shape[1] :]  # not of virtual tokens that PEFT puts before
    return [
        row[start:end].log_softmax(-1, dtype=dtype)
        for row, start, end in zip(logits, starts, widths, strict=True)
    ]


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

    Args:
        model: a `ReftModel`, or a causal language model of transformers.
        tokenizer: of the base.
        prompts: texts, or conversations for its chat template, which may end choices with a token
            of its own.
        choices: of each prompt. One that leaves a prompt no room takes its beginning away.
        batch_size: prompts with a choice per forward pass; those that differ in the last token
            alone count once.
        progress: called with the prompts that are done and all prompts.
    """
    rows: list[Row] = []
    for prompt, texts in zip(prompts, choices, strict=True):
        rows += [tokenize(tokenizer, prompt, text, True) for text in texts]
    rows = without_beginnings(tokenizer, rows, smallest_limit(tokenizer, model, None))
    groups = sorted(rows_alike(rows).values(), key=lambda group: -sum(map(len, rows[group[0]])))
    sums = torch.empty(len(rows))
    for start in range(0, len(groups), batch_size):
        chunk = groups[start : start + batch_size]
        all_log_probs = next_token_log_probs(
            model, [rows[group[0]] for group in chunk], dtype=torch.float32
        )
        for group, log_probs in zip(chunk, all_log_probs, strict=True):
            for index in group:
                tokens = torch.tensor(rows[index][1], device=log_probs.device)
                sums[index] = log_probs.gather(1, tokens[:, None]).sum()
        if progress is not None:
            done = min(start + batch_size, len(groups)) / len(groups)
            progress(int(done * len(prompts)), len(prompts))
    return list(torch.split(sums, [len(texts) for texts in choices]))


def without_beginnings(tokenizer: Any, rows: Sequence[Row], limit: int | None) -> list[Row]:
    """Rows without the beginning of prompts that are too long, as training has them."""
    if limit is None:
        return list(rows)
    long = sum(len(prompt) + len(rest) > limit for prompt, rest in rows)
    if long:
        logger.warning(
            "%d of %d prompts were longer than %d tokens and lost their beginning",
            long,
            len(rows),
            limit,
        )
    return [
        truncate(tokenizer, prompt, rest, limit)
        if len(prompt) + len(rest) > limit
        else (prompt, rest)
        for prompt, rest in rows
    ]
