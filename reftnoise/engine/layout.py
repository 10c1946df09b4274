"""Which columns of a batch are prompt, and which of them an intervention edits.

One resolver serves training, evaluation and generation. Positions count *attended* tokens, so
the padding side, a padding token that equals end-of-text and a repeated beginning-of-text make no
difference. Everything is vectorised over the batch and stays on the batch's device.
"""

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

import torch
import torch.nn.functional as F
from jaxtyping import Bool, Int
from torch import Tensor

from ..config.positions import Positions

UnitLocations = Mapping[str, Any]
"""pyvene's form: `{"sources->base": (None, locations)}`."""


@dataclass(frozen=True)
class Selection:
    """Positions of one batch: `columns` with the slots that count, or a mask over all columns."""

    columns: Int[Tensor, "batch positions"] | None
    mask: Bool[Tensor, "batch positions"]
    decode: bool = False
    """Whether columns beyond the mask's width, which generation appends, are selected."""

    def first_column(self, width: int) -> Int[Tensor, " batch"]:
        """Each row's first selected column; `width` where nothing is selected."""
        columns = self.columns
        if columns is None:
            columns = torch.arange(width, device=self.mask.device).expand_as(self.mask)
        return F.pad(columns.masked_fill(~self.mask, width), (0, 1), value=width).amin(1)

    def repeat(self, times: int) -> "Selection":
        """Each row `times` in succession, as beams and return sequences lay batches out."""
        if times == 1:
            return self
        columns = None if self.columns is None else self.columns.repeat_interleave(times, 0)
        return replace(self, columns=columns, mask=self.mask.repeat_interleave(times, 0))

    def within(
        self, offset: int, length: int
    ) -> tuple[Int[Tensor, " rows"] | None, Bool[Tensor, " rows"]]:
        """Flat row indices into the [batch · length] columns from `offset`, and their mask.

        Columns before 0, where virtual tokens stand, are not selected.
        None instead of indices stands for every row. Slots that do not count point at some row of
        their own sequence.
        """
        batch = self.mask.shape[0]
        if self.columns is None:
            known = F.pad(self.mask[:, max(offset, 0) : offset + length], (max(-offset, 0), 0))
            beyond = self.mask.new_full((batch, length - known.shape[1]), self.decode)
            return None, torch.cat([known, beyond], dim=1).flatten()
        relative = self.columns - offset
        mask = self.mask & (relative >= 0) & (relative < length)
        start = torch.arange(batch, device=relative.device)[:, None] * length
        return (start + relative.clamp(0, length - 1)).flatten(), mask.flatten()


class PromptLayout:
    """Which columns of a batch hold attended tokens, and which of those the prompt.

    Args:
        attended: True at tokens, False at padding, on either side or in between.
        prompt_lengths: attended tokens in each row's prompt; all of them, if None.
    """

    document_lengths: Int[Tensor, "batch width"] | None = None
    """For rows packed with several documents, the tokens of each column's document."""

    def __init__(
        self,
        attended: Bool[Tensor, "batch width"],
        prompt_lengths: Int[Tensor, " batch"] | None = None,
    ) -> None:
        self.attended = attended
        self.lengths = attended.sum(1) if prompt_lengths is None else prompt_lengths
        rank = attended.cumsum(1) - 1
        self.prompt: Bool[Tensor, "batch width"] = attended & (rank < self.lengths[:, None])
        # order[b, k] is the column of row b's k-th attended token.
        self._order = torch.argsort((~attended).to(torch.uint8), dim=1, stable=True)

    def select(self, positions: Positions, first: int = 0, last: int = 0) -> Selection:
        """Resolve `positions`.

        Args:
            positions: what to select.
            first: the largest prefix of any unit at the same site, if larger than this one's.
            last: likewise the largest suffix. The rule for short prompts then keeps them disjoint.
        """
        n = self.lengths[:, None]
        device, width = self.attended.device, self.attended.shape[1]
        prefix = torch.arange(min(positions.first, width), device=device)[None]
        suffix = torch.arange(min(positions.last, width), device=device)[None]
        explicit = torch.tensor(positions.indices, dtype=torch.long, device=device)[None]
        rule = _ShortPrompts(positions, first, last)
        ranks = [
            prefix.expand(len(n), -1),
            n - suffix.shape[1] + suffix,
            torch.where(explicit < 0, n + explicit, explicit),
        ]
        counted = [rule.in_prefix(ranks[0], n), rule.in_suffix(ranks[1], n), ranks[2] < n]
        rank, mask = torch.cat(ranks, 1), torch.cat(counted, 1)
        mask = mask & (rank >= 0)
        if positions.indices:  # on a short prompt, two of them may mean one token
            mask = _once(rank, mask)
        # Slots that do not count point at a prompt token, whose hidden state is always finite.
        columns = self._order.gather(1, torch.minimum(rank, n - 1).clamp(min=0))
        if not positions.is_dense:
            return Selection(columns, mask)
        dense = torch.zeros_like(self.attended).scatter_reduce(1, columns, mask, "amax")
        return self._with_words(dense, positions)

    def _with_words(self, dense: Bool[Tensor, "batch width"], positions: Positions) -> Selection:
        """A mask over all columns, with the prompt and what follows it where they are asked for."""
        if positions.all:
            dense = dense | self.prompt
        if positions.decode:
            dense = dense | (self.attended & ~self.prompt)
        return Selection(None, dense, decode=positions.decode)


class PackedLayout(PromptLayout):
    """The layout of rows that hold several documents one after the other.

    Args:
        attended: True at tokens.
        position_ids: which begin anew with each document.
        labels: each document's prompt ends before its first label that is not -100; without
            labels, all of it is prompt.
    """

    def __init__(
        self,
        attended: Bool[Tensor, "batch width"],
        position_ids: Int[Tensor, "batch width"],
        labels: Int[Tensor, "batch width"] | None = None,
    ) -> None:
        super().__init__(attended)
        starts = document_starts(attended, position_ids)
        document = (starts.cumsum(1) - 1).clamp(min=0)

        def per_document(mask: Tensor) -> Tensor:
            counts = torch.zeros_like(document).scatter_add(1, document, mask.long())
            return counts.gather(1, document)

        def within(mask: Tensor) -> Tensor:
            """How many of a document's columns up to this one are in the mask."""
            counted = mask.cumsum(1)
            before = torch.where(starts, counted - mask.long(), 0)
            return counted - before.cummax(1).values

        self.document_lengths = per_document(attended)
        self._rank = within(attended) - 1
        self._lengths = self.document_lengths
        if labels is not None:
            before_label = within(labels != -100) == 0
            self._lengths = per_document(attended & before_label).clamp(min=1)
        self.prompt = attended & (self._rank < self._lengths)

    def select(self, positions: Positions, first: int = 0, last: int = 0) -> Selection:
        """Resolve `positions` in each document; arguments as in `PromptLayout.select`."""
        dense = named_tokens(positions, self._rank, self._lengths, first, last) & self.prompt
        if positions.is_dense:
            return self._with_words(dense, positions)
        if torch.compiler.is_compiling():  # the number of columns would break the graph
            return Selection(None, dense)
        count = max(1, int(dense.sum(1).amax()))
        columns = torch.argsort((~dense).to(torch.uint8), dim=1, stable=True)[:, :count]
        return Selection(columns, dense.gather(1, columns))


def named_tokens(
    positions: Positions,
    rank: Int[Tensor, "*tokens"],
    lengths: Int[Tensor, "*tokens"],
    first: int = 0,
    last: int = 0,
) -> Bool[Tensor, "*tokens"]:
    """Whether tokens are among the first, the last or the listed ones of their prompts.

    Args:
        positions: of which `all` and `decode` are left to the caller.
        rank: how many attended tokens of the prompt come before each token.
        lengths: of each token's prompt.
        first: as in `PromptLayout.select`.
        last: likewise.
    """
    rule = _ShortPrompts(positions, first, last)
    found = (rule.in_prefix(rank, lengths) & (rank < positions.first)) | (
        rule.in_suffix(rank, lengths) & (lengths - rank <= positions.last)
    )
    for index in positions.indices:
        found = found | (rank == (lengths + index if index < 0 else index))
    return found & (rank < lengths)


class _ShortPrompts:
    """The paper's rule for prompts that are shorter than prefix and suffix together."""

    def __init__(self, positions: Positions, first: int, last: int) -> None:
        limit = max(positions.first, first) + max(positions.last, last)
        self._limit = min(limit, 2**62)  # within int64

    def in_prefix(self, rank: Tensor, n: Tensor) -> Tensor:
        """Whether a rank counts as one of the first tokens of a prompt of n."""
        return torch.where(n < self._limit, rank < n // 2, rank < n)

    def in_suffix(self, rank: Tensor, n: Tensor) -> Tensor:
        """Whether a rank counts as one of the last tokens of a prompt of n."""
        return (n >= self._limit) | (n - rank <= (n + 1) // 2)


def document_starts(
    attended: Bool[Tensor, "batch width"], position_ids: Int[Tensor, "batch width"]
) -> Bool[Tensor, "batch width"]:
    """The columns where a document begins: position ids do not go on counting."""
    follows = F.pad(position_ids.diff(dim=1) == 1, (1, 0))
    return attended & ~follows


def explicit_selection(columns: Int[Tensor, "batch positions"]) -> Selection:
    """The selection of given columns; a column that a row repeats counts once."""
    return Selection(columns, _once(columns, torch.ones_like(columns, dtype=torch.bool)))


def _once(values: Int[Tensor, "batch n"], mask: Bool[Tensor, "batch n"]) -> Bool[Tensor, "batch n"]:
    """The mask without those slots whose value an earlier slot of the mask holds already."""
    same = (values[:, :, None] == values[:, None, :]) & mask[:, None, :]
    return mask & ~same.tril(-1).any(-1)


def has_token_labels(labels: Tensor, attended: Bool[Tensor, "batch width"]) -> bool:
    """Whether labels are one per token, and not one or several per row."""
    return labels is not None and labels.shape == attended.shape and not labels.is_floating_point()


def checked_lengths(
    lengths: Tensor, attended: Bool[Tensor, "batch width"]
) -> Int[Tensor, " batch"]:
    """Prompt lengths, at least 0 and at most the attended tokens; a ValueError for another form."""
    lengths = torch.as_tensor(lengths, device=attended.device)
    rows = attended.shape[0]
    if lengths.shape != (rows,) or lengths.is_floating_point():
        raise ValueError(
            f"prompt_lengths of shape {tuple(lengths.shape)} and {lengths.dtype}: expected "
            f"({rows},) integers, one per row"
        )
    return torch.minimum(lengths, attended.sum(1)).clamp(min=0)


def prompt_lengths_from_labels(
    labels: Int[Tensor, "batch width"], attended: Bool[Tensor, "batch width"]
) -> Int[Tensor, " batch"]:
    """Attended tokens before each row's first label that is not -100, at least 1.

    The label of a row's first token is never predicted, so that token always is prompt. A row
    without any label is all prompt.
    """
    before_first = (labels != -100).cumsum(1) == 0
    return (attended & before_first).sum(1).clamp(min=1)


def parse_unit_locations(
    unit_locations: UnitLocations, interventions: int, batch: int, width: int
) -> list[Int[Tensor, "batch positions"] | None]:
    """Read pyvene's `{"sources->base": (None, locations)}`.

    `locations` nests interventions × batch × positions; None instead of an intervention's part
    leaves it out, and a single integer stands for that column everywhere.

    Raises:
        ValueError: another nesting, or a column outside the input.
    """
    expected = (
        f"expected {{'sources->base': (None, locations)}} with locations nested as "
        f"{interventions} interventions × {batch} rows × positions"
    )
    try:
        _, locations = unit_locations["sources->base"]
    except (KeyError, TypeError, ValueError):
        raise ValueError(f"unit_locations {unit_locations!r}: {expected}") from None
    if isinstance(locations, int):
        locations = [[[locations]] * batch] * interventions
    if isinstance(locations, Tensor) and locations.dim():
        locations = list(locations)
    if not isinstance(locations, list | tuple) or len(locations) != interventions:
        raise ValueError(f"unit_locations {locations!r}: {expected}")
    found: list[Tensor | None] = []
    for index, part in enumerate(locations):
        if part is None:
            found.append(None)
            continue
        try:
            columns = torch.as_tensor(part)
        except (TypeError, ValueError):
            columns = torch.empty(0)
        if columns.dim() != 2 or columns.shape[0] != batch or columns.is_floating_point():
            raise ValueError(f"unit_locations of intervention {index}, {part!r}: {expected}")
        if ((columns < 0) | (columns >= width)).any():
            raise ValueError(
                f"unit_locations of intervention {index}, {part!r}: expected columns from 0 to "
                f"{width - 1}, the input's last"
            )
        found.append(columns.long())
    return found


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
