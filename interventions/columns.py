"""Parts of hidden states, such as attention heads: runs of features."""

from collections.abc import Callable
from itertools import pairwise
from typing import TypeAlias

import torch
from jaxtyping import Float
from torch import Tensor

Columns: TypeAlias = tuple[tuple[int, int], ...]
"""First feature and end of each run, in order."""


def edited_columns(
    hidden: Float[Tensor, "*rows hidden"],
    columns: Columns,
    edit: Callable[[Float[Tensor, "*rows columns"]], Float[Tensor, "*rows columns"]],
) -> Float[Tensor, "*rows hidden"]:
    """Hidden states of which these columns are edited, next to each other."""
    bounds = (0, *(bound for run in columns for bound in run), hidden.shape[-1])
    sizes = [end - start for start, end in pairwise(bounds)]
    # Its gradient is one concatenation, where that of a slice is padded with zeros.
    pieces = list(hidden.split_with_sizes(sizes, -1))
    part = pieces[1] if len(columns) == 1 else torch.cat(pieces[1::2], -1)
    edited = edit(part)
    if edited is part:
        return hidden
    pieces[1::2] = edited.split_with_sizes(sizes[1::2], -1)
    return torch.cat(pieces, -1)


def taken_columns(
    hidden: Float[Tensor, "*rows hidden"], columns: Columns
) -> Float[Tensor, "*rows columns"]:
    """These columns, next to each other."""
    return torch.cat([hidden[..., start:end] for start, end in columns], -1)


def spread_columns(
    part: Float[Tensor, "*rows columns"], columns: Columns, width: int
) -> Float[Tensor, "*rows hidden"]:
    """What `taken_columns` takes in its place, with zeros elsewhere."""
    whole = part.new_zeros(*part.shape[:-1], width)
    pieces = part.split_with_sizes([end - start for start, end in columns], -1)
    for (start, end), piece in zip(columns, pieces, strict=True):
        whole[..., start:end] = piece
    return whole
