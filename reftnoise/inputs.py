"""Read from a base's inputs which of its tokens are attended, and where the prompts end."""

from collections.abc import Mapping
from typing import Any

import torch
from jaxtyping import Bool
from torch import Tensor

from .positions import (
    PackedLayout,
    PromptLayout,
    checked_lengths,
    document_starts,
    has_token_labels,
    prompt_lengths_from_labels,
)


def tokens_of(inputs: Mapping[str, Any]) -> Tensor | None:
    """`input_ids` or `inputs_embeds`; None for a base that reads neither."""
    tokens: Tensor | None = inputs.get("input_ids")
    return inputs.get("inputs_embeds") if tokens is None else tokens


def size_of(inputs: Mapping[str, Any]) -> tuple[int, int]:
    """Rows and columns of the tokens; a ValueError if there are none."""
    tokens = tokens_of(inputs)
    if tokens is None:
        raise ValueError("expected input_ids or inputs_embeds")
    return tokens.shape[0], tokens.shape[1]


def batch_of(inputs: Mapping[str, Any]) -> int:
    """Rows of a batch of any kind: tokens, pixels, audio."""
    tokens = tokens_of(inputs)
    if tokens is not None:
        return tokens.shape[0]
    first = next((v for v in inputs.values() if isinstance(v, Tensor) and v.dim() > 1), None)
    if first is None:
        raise ValueError(
            f"expected inputs with a batch dimension, got {', '.join(inputs) or 'none'}; a Trainer "
            "other than ReftTrainer leaves out columns of the base's own: set "
            "remove_unused_columns=False"
        )
    return first.shape[0]


def cached_length(cache: Any) -> int:
    """Tokens that a transformers cache holds; 0 for None."""
    return 0 if cache is None else int(cache.get_seq_length())


def attended_tokens(inputs: Mapping[str, Any], past: int = 0) -> Bool[Tensor, "batch width"]:
    """Which of the cached and given tokens are no padding."""
    batch, width = size_of(inputs)
    width += past
    mask = inputs.get("attention_mask")
    if mask is None:
        tokens = tokens_of(inputs)
        assert tokens is not None
        return torch.ones(batch, width, dtype=torch.bool, device=tokens.device)
    if mask.shape != (batch, width):
        raise ValueError(
            f"attention_mask of shape {tuple(mask.shape)}: expected ({batch}, {width}), one entry "
            "per token, cached ones included"
        )
    return mask.bool()


def read_layout(
    inputs: Mapping[str, Any], prompt_lengths: Tensor | None, *, past: int, continues: bool
) -> PromptLayout:
    """The layout of a batch of tokens.

    Args:
        inputs: of the base.
        prompt_lengths: attended tokens in each row's prompt. By default the prompt ends before the
            first label, and is the whole input where there are none; with a filled cache, it is
            what is cached.
        past: cached tokens.
        continues: whether labels are what the base writes after a prompt, so that they tell its
            end; a classifier's or masked model's do not.
    """
    attended = attended_tokens(inputs, past)
    labels = inputs.get("labels")
    if not continues or labels is None or not has_token_labels(labels, attended):
        labels = None
    position_ids = inputs.get("position_ids")
    if position_ids is not None and position_ids.shape == attended[:1].shape:
        position_ids = position_ids.expand_as(attended)  # one row for all
    if inputs.get("attention_mask") is None and not past and position_ids is not None:
        # Without a mask, transformers attends within documents whose position ids begin anew.
        is_packed = position_ids.shape == attended.shape and (
            torch.compiler.is_compiling()
            or bool((document_starts(attended, position_ids).sum(1) > 1).any())
        )
        if is_packed and prompt_lengths is None:
            return PackedLayout(attended, position_ids, labels)
        if is_packed and not torch.compiler.is_compiling():
            raise ValueError(
                "prompt_lengths of packed rows: each document's prompt ends before its first "
                "label, leave prompt_lengths out"
            )
    if prompt_lengths is not None:
        lengths = checked_lengths(prompt_lengths, attended)
    elif labels is not None:
        lengths = prompt_lengths_from_labels(labels, attended)
    elif past:
        lengths = attended[:, :past].sum(1)
    else:
        return PromptLayout(attended)
    return PromptLayout(attended, lengths)
