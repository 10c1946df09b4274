"""The inputs of a call: which columns are the prompt, and which of them an intervention edits.

One resolver serves training, evaluation, generation and serving. Positions count *attended* tokens,
so the padding side, a padding token that equals end-of-text and a repeated beginning-of-text make
no difference. Everything is vectorised over the batch and stays on the batch's device.
"""

import contextlib
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

import torch
import torch.nn.functional as F
from jaxtyping import Bool, Int
from torch import Tensor

from ..config.positions import Positions
from .base.running import is_transformed, tokens_that_are_seen

UnitLocations = Mapping[str, Any]
"""pyvene's form: `{"sources->base": (None, locations)}`."""

_MANY = 2**62
"""More tokens than any prompt has, within int64."""


@dataclass(frozen=True)
class Batch:
    """The inputs of one call of a base, and what the caller says of their prompts."""

    inputs: dict[str, Any]
    """The base's own arguments."""
    tokens: Tensor | None
    """`input_ids` or `inputs_embeds`; None for a base that reads neither."""
    labels: Tensor | None
    past: int
    """Tokens that the cache holds before the call."""
    prompt_lengths: Tensor | None = None
    """Attended tokens in each row's prompt."""
    unit_locations: UnitLocations | None = None
    """Columns to edit instead of the config's positions."""
    copies: int = 1
    """How often the batch holds each example: twice for SymNoise."""
    compared: str | None = None
    """Key of the unit that compares the copies: the inputs have labels of the first alone."""

    @classmethod
    def of(
        cls,
        inputs: dict[str, Any],
        prompt_lengths: Tensor | None = None,
        unit_locations: UnitLocations | None = None,
        copies: int = 1,
    ) -> "Batch":
        """Read the inputs of a base."""
        tokens = inputs.get("input_ids")
        if tokens is None:
            tokens = inputs.get("inputs_embeds")
        past = cached_length(inputs.get("past_key_values"))
        labels = inputs.get("labels")
        return cls(inputs, tokens, labels, past, prompt_lengths, unit_locations, copies)

    @property
    def rows(self) -> int:
        """Rows of a batch of any kind: tokens, pixels, audio; a ValueError if there are none."""
        if self.tokens is not None:
            return self.tokens.shape[0]
        values = self.inputs.values()
        first = next((v for v in values if isinstance(v, Tensor) and v.dim() > 1), None)
        if first is None:
            raise ValueError(
                f"expected inputs with a batch dimension, got {', '.join(self.inputs) or 'none'}; "
                "a Trainer other than ReftTrainer leaves out columns of the base's own: set "
                "remove_unused_columns=False"
            )
        return first.shape[0]

    @property
    def length(self) -> int:
        """Columns of the tokens, without cached ones; a ValueError if there are no tokens."""
        if self.tokens is None:
            raise ValueError("expected input_ids or inputs_embeds")
        return self.tokens.shape[1]

    @property
    def attended(self) -> Bool[Tensor, "batch width"]:
        """Which of the cached and given tokens are not padding."""
        rows, width = shape = self.rows, self.past + self.length
        mask: Any = self.inputs.get("attention_mask")
        if isinstance(mask, Mapping):  # one for each kind of layer
            mask = mask.get("full_attention", next(iter(mask.values()), None))
        if mask is None:
            device = None if self.tokens is None else self.tokens.device
            return torch.ones(shape, dtype=torch.bool, device=device)
        given = tuple(mask.shape) if isinstance(mask, Tensor) else ()
        if len(given) == 4 and given[0] in (1, rows) and given[2] == self.length <= given[3]:
            return tokens_that_are_seen(mask[..., :width], self.past).expand(shape)
        if given != shape:
            kind = f"of shape {given}" if isinstance(mask, Tensor) else type(mask).__name__
            raise ValueError(
                f"attention_mask {kind}: expected {shape}, one entry per token, cached ones "
                f"included, or a mask of 4 dimensions, ({rows}, heads, {self.length}, {width})"
            )
        return mask.bool()


@dataclass(frozen=True, eq=False)
class Selection:
    """Positions of one batch: `columns` with the slots that count, or a mask over all columns."""

    columns: Int[Tensor, "batch positions"] | None
    mask: Bool[Tensor, "batch positions"]
    decode: bool = False
    """Whether columns beyond the mask's width, which generation appends, are selected."""
    counting: range | None = None
    """Columns that hold all slots, each of which is known to count; None where that is unknown."""

    @classmethod
    def known(
        cls,
        columns: Int[Tensor, "batch positions"] | None,
        mask: Bool[Tensor, "batch positions"],
        within: range,
        decode: bool = False,
    ) -> "Selection":
        """A selection within a range, which asks its mask unless that leaves completions out."""
        is_asked = columns is not None or not torch.is_grad_enabled()
        if is_asked and not (torch.compiler.is_compiling() or is_transformed()):
            with contextlib.suppress(RuntimeError):  # meta and fake tensors have no values
                return cls(columns, mask, decode, within if mask.all() else None)
        return cls(columns, mask, decode)

    def covers(self, offset: int, length: int) -> bool:
        """Whether all slots, or columns, of a call are known to count."""
        known, end = self.counting, offset + length
        if self.columns is None and offset >= self.mask.shape[1]:
            return self.decode
        if self.columns is None:
            return known is not None and offset >= 0 and (self.decode or end <= known.stop)
        return known is not None and offset <= known.start and end >= known.stop

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

    def dense(self, start: int, end: int) -> Bool[Tensor, "batch columns"]:
        """Whether each column from `start` to `end` is selected."""
        indices, mask = self.within(start, end - start)
        if indices is not None:
            rows = self.mask.shape[0] * (end - start)
            mask = mask.new_zeros(rows).index_put((indices,), mask, accumulate=True)
        return mask.view(self.mask.shape[0], -1)

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
        lengths = attended.sum(1) if prompt_lengths is None else prompt_lengths
        self._set(attended, attended.cumsum(1) - 1, lengths[:, None])

    def _set(self, attended: Tensor, rank: Tensor, lengths: Tensor) -> None:
        """Take for each column the attended tokens before it, and those of its prompt."""
        self.attended, self._rank, self._lengths = attended, rank, lengths
        self.prompt: Bool[Tensor, "batch width"] = attended & (rank < lengths)

    def select(self, positions: Positions, first: int = 0, last: int = 0) -> Selection:
        """Resolve `positions`; arguments as in `named_tokens`.

        Few positions are columns; those whose number grows with the sequence are a mask.
        """
        named = named_tokens(positions, self._rank, self._lengths, first, last) & self.attended
        if positions.all or positions.decode:
            return Selection.known(None, named, range(named.shape[1]), positions.decode)
        count = self._most(positions, named)
        if count is None:
            return Selection(None, named)
        # Named tokens first. Slots that do not count point at one of them, or at another token of
        # the prompt, whose hidden state is always finite.
        key = named.to(torch.uint8) + self.prompt
        order = torch.argsort(key, dim=1, descending=True, stable=True)
        columns = order[:, :count]
        mask = named.gather(1, columns)
        columns = torch.where(mask, columns, columns[:, :1])
        return Selection.known(columns, mask, range(named.shape[1]))

    def _most(self, positions: Positions, named: Bool[Tensor, "batch width"]) -> int | None:
        """No row has more named tokens than this; None where only reading the mask would tell."""
        most = positions.first + positions.last + len(positions.indices)
        return min(most, named.shape[1])


class PackedLayout(PromptLayout):
    """The layout of rows that hold several documents one after the other.

    Args:
        attended: True at tokens.
        position_ids: position ids, which start again with each document.
        labels: each document's prompt ends before its first label that is not -100; without
            labels, all of it is prompt.
    """

    def __init__(
        self,
        attended: Bool[Tensor, "batch width"],
        position_ids: Int[Tensor, "batch width"],
        labels: Int[Tensor, "batch width"] | None = None,
    ) -> None:
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

        lengths = self.document_lengths = per_document(attended)
        if labels is not None:
            before_label = within(labels != -100) == 0
            lengths = per_document(attended & before_label).clamp(min=1)
        self._set(attended, within(attended) - 1, lengths)

    def _most(self, positions: Positions, named: Bool[Tensor, "batch width"]) -> int | None:
        if torch.compiler.is_compiling():  # the number of columns would break the graph
            return None
        return max(1, int(named.sum(1).amax()))


def named_tokens(
    positions: Positions,
    rank: Int[Tensor, "*tokens"],
    lengths: Int[Tensor, "*#tokens"],
    first: int = 0,
    last: int = 0,
) -> Bool[Tensor, "*tokens"]:
    r"""Whether tokens are among those that positions name: the one place where they are resolved.

    Of a prompt of n tokens shorter than p + s, f{p}+l{s} names the first $\min(p, \lfloor n/2
    \rfloor)$ and the last $\min(s, \lceil n/2 \rceil)$ (ReFT, arXiv:2404.03592, section 4.1).

    Args:
        positions: names of tokens.
        rank: how many attended tokens come before each token; from its prompt's length on, the
            token follows the prompt.
        lengths: attended tokens in each token's prompt.
        first: the largest prefix of any unit at the same site, if larger than this one's.
        last: the largest suffix. The rule for short prompts then keeps them disjoint.
    """
    in_prompt = rank < lengths
    if positions.all:
        return in_prompt | positions.decode
    prefix, suffix = min(positions.first, _MANY), min(positions.last, _MANY)
    is_short = lengths < min(max(prefix, first) + max(suffix, last), _MANY)
    named = torch.zeros_like(in_prompt)
    if prefix:
        fitting = (lengths // 2).clamp(max=prefix)
        named = named | (rank < torch.where(is_short, fitting, prefix))
    if suffix:
        fitting = ((lengths + 1) // 2).clamp(max=suffix)
        named = named | (lengths - rank <= torch.where(is_short, fitting, suffix))
    for index in positions.indices:
        named = named | (rank == (lengths + index if index < 0 else index))
    return (named & in_prompt) | ~in_prompt if positions.decode else named & in_prompt


def document_starts(
    attended: Bool[Tensor, "batch width"], position_ids: Int[Tensor, "batch width"]
) -> Bool[Tensor, "batch width"]:
    """The columns where a document begins: position ids do not go on counting."""
    follows = F.pad(position_ids.diff(dim=1) == 1, (1, 0))
    return attended & ~follows


def explicit_selection(columns: Int[Tensor, "batch positions"], width: int) -> Selection:
    """The selection of given columns of so many; a column that a row repeats counts once."""
    same = columns[:, :, None] == columns[:, None, :]
    return Selection.known(columns, ~same.tril(-1).any(-1), range(width))


def has_token_labels(labels: Tensor | None, attended: Bool[Tensor, "batch width"]) -> bool:
    """Whether labels are one per token, and not one or several per row."""
    return labels is not None and labels.shape == attended.shape and not labels.is_floating_point()


def checked_lengths(lengths: Tensor, attended: Tensor) -> Int[Tensor, " batch"]:
    """Prompt lengths, at least 0; a ValueError for another form."""
    lengths = torch.as_tensor(lengths, device=attended.device)
    if lengths.shape != attended.shape[:1] or lengths.is_floating_point():
        raise ValueError(
            f"prompt_lengths of shape {tuple(lengths.shape)} and {lengths.dtype}: expected "
            f"({len(attended)},) integers, one per row"
        )
    return lengths.long().clamp(min=0)


def prompt_lengths_from_labels(
    labels: Int[Tensor, "batch width"], attended: Bool[Tensor, "batch width"]
) -> Int[Tensor, " batch"]:
    """Attended tokens before each row's first label that is not -100, at least 1.

    The label of a row's first token is never predicted, so that token always is prompt. A row
    without any label is all prompt.
    """
    before_first = (labels != -100).cumsum(1) == 0
    return (attended & before_first).sum(1).clamp(min=1)


def cached_length(cache: Any) -> int:
    """Tokens that a transformers cache holds; 0 for None."""
    return 0 if cache is None else int(cache.get_seq_length())


def read_layout(batch: Batch, *, continues: bool) -> PromptLayout:
    """The layout of a batch of tokens.

    The prompt has `prompt_lengths` tokens. Without these it ends before the first label, and is the
    whole input where there are no labels; with a filled cache, it is what is cached.

    Args:
        batch: inputs with tokens.
        continues: whether labels are what the base writes after a prompt, so that they tell its
            end; a classifier's or masked model's do not.

    Raises:
        ValueError: a mask or lengths of another shape, or lengths of rows that are packed.
    """
    attended, past = batch.attended, batch.past
    labels = batch.labels if continues and has_token_labels(batch.labels, attended) else None
    position_ids = batch.inputs.get("position_ids")
    if position_ids is not None and position_ids.shape == attended[:1].shape:
        position_ids = position_ids.expand_as(attended)  # one row for all
    mask = batch.inputs.get("attention_mask")
    is_flat = isinstance(mask, Tensor) and mask.dim() == 2
    if not is_flat and not past and position_ids is not None:
        # Without a mask, transformers attends within documents whose position ids start again.
        is_packed = position_ids.shape == attended.shape and (
            torch.compiler.is_compiling()
            or bool((document_starts(attended, position_ids).sum(1) > 1).any())
        )
        if is_packed and batch.prompt_lengths is None:
            return PackedLayout(attended, position_ids, labels)
        if is_packed and not torch.compiler.is_compiling():
            raise ValueError(
                "prompt_lengths of packed rows: each document's prompt ends before its first "
                "label, leave prompt_lengths out"
            )
    if batch.prompt_lengths is not None:
        lengths: Tensor | None = checked_lengths(batch.prompt_lengths, attended)
    elif labels is not None:
        lengths = prompt_lengths_from_labels(labels, attended)
    else:
        lengths = attended[:, :past].sum(1) if past else None
    return PromptLayout(attended, lengths)
