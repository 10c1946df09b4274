"""How likely a model finds texts after prompts: what evaluation and lm-evaluation-harness share."""

from collections.abc import Sequence
from typing import Any, TypeAlias

import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

from .model import ReftModel

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
