"""Where an intervention edits: `"f7+l7"` → columns and a mask.

One resolver serves training, evaluation and generation. Positions count *attended* tokens, so
the padding side, a padding token that equals end-of-text and a repeated beginning-of-text make no
difference. Everything is vectorised over the batch and stays on the batch's device.
"""

import re
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, fields, replace
from typing import Any

import torch
import torch.nn.functional as F
from jaxtyping import Bool, Int
from torch import Tensor

UnitLocations = Mapping[str, Any]
"""pyvene's form: `{"sources->base": (None, locations)}`."""

_TERM = re.compile(r"(?P<kind>f|l)(?P<count>[0-9]+)|(?P<word>all|decode)")


@dataclass(frozen=True)
class Positions:
    """A set of positions of a prompt and, with `decode`, of what is generated after it.

    Grammar: terms joined by `+`, each at most once.

    | term | positions |
    |---|---|
    | `f{n}` | the first n attended prompt tokens |
    | `l{n}` | the last n attended prompt tokens |
    | `all` | all prompt tokens |
    | `decode` | every token after the prompt |

    or a list of explicit prompt positions, negative ones counted from the prompt's end.

    A prompt of n tokens that is shorter than p + s, for f{p}+l{s}, is edited at its first
    min(p, ⌊n/2⌋) and last min(s, ⌈n/2⌉) tokens (ReFT, arXiv:2404.03592, section 4.1).
    """

    first: int = 0
    last: int = 0
    all: bool = False
    decode: bool = False
    indices: tuple[int, ...] = ()

    @classmethod
    def parse(cls, spec: "str | Sequence[int] | Positions") -> "Positions":
        """Read positions; a ValueError names what was expected and the column."""
        if isinstance(spec, Positions):
            return spec
        if not isinstance(spec, str):
            return cls._from_indices(spec)
        found: dict[str, int | bool] = {}
        column = 0
        while True:
            term = _TERM.match(spec, column)
            if term is None:
                raise _syntax_error(spec, column, "terms like 'f7', 'l7', 'all' or 'decode'")
            field = {"f": "first", "l": "last"}.get(term["kind"]) or term["word"]
            if field in found:
                raise _syntax_error(spec, column, f"{term[0][0] if term['kind'] else field} once")
            if term["kind"] and int(term["count"]) == 0:
                raise _syntax_error(spec, column + 1, "a count of at least 1")
            found[field] = int(term["count"]) if term["kind"] else True
            column = term.end()
            if column == len(spec):
                break
            if spec[column] != "+":
                raise _syntax_error(spec, column, "terms like 'f7' or 'l7' joined by '+'")
            column += 1
        positions = cls(**found)  # type: ignore[arg-type]  # field names and types match
        if positions.all and (positions.first or positions.last):
            raise ValueError(f"positions {spec!r}: 'all' includes the first and last tokens")
        return positions

    @classmethod
    def _from_indices(cls, spec: Sequence[int]) -> "Positions":
        is_list = isinstance(spec, Sequence) and not isinstance(spec, bytes)
        if not is_list or not spec or not all(type(i) is int for i in spec):
            raise ValueError(
                f"positions {spec!r}: expected a string such as 'f7+l7' or a list of integers"
            )
        if len(set(spec)) < len(spec):
            raise ValueError(f"positions {list(spec)}: every index may occur once")
        return cls(indices=tuple(spec))

    def spec(self) -> str | list[int]:
        """What `parse` reads back: a string, or the list of indices."""
        if self.indices:
            return list(self.indices)
        counts = [f"{c}{n}" for c, n in (("f", self.first), ("l", self.last)) if n]
        return "+".join(counts + [w for w in ("all", "decode") if getattr(self, w)])

    def only(self, names: Collection[str]) -> "Positions":
        """Those of some fields: `first`, `last`, `all`, `decode`, `indices`."""
        return Positions(**{name: getattr(self, name) for name in names})

    def split(self) -> "list[Positions]":
        """Prefix and the rest, for interventions with weights of their own for each."""
        if not (self.first and self.last):
            return [self]
        return [Positions(first=self.first), replace(self, first=0)]

    def overlaps(self, other: "Positions") -> bool:
        """Whether some prompt has a token that both positions contain."""
        if self.decode and other.decode:
            return True
        if self.indices and other.indices:
            same_end = {i < 0 for i in self.indices + other.indices}
            return len(same_end) > 1 or bool(set(self.indices) & set(other.indices))
        if self.all or other.all or self.indices or other.indices:
            return self.edits_prompt and other.edits_prompt
        return bool((self.first and other.first) or (self.last and other.last))

    @property
    def edits_prompt(self) -> bool:
        return bool(self.first or self.last or self.all or self.indices)

    @property
    def is_dense(self) -> bool:
        """Whether the number of positions grows with the sequence."""
        return self.all or self.decode


POSITION_FIELDS = tuple(field.name for field in fields(Positions))


def _syntax_error(spec: str, column: int, expected: str) -> ValueError:
    got = repr(spec[column]) if column < len(spec) else "the end"
    return ValueError(f"positions {spec!r}: expected {expected}, got {got} at column {column + 1}")


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
