"""What a pass over a base edits, and the calls in which the base sees it.

A plan says what is edited of all columns of a batch. The base sees these columns in one call or
several: a prompt, perhaps in parts, and each generated token. In each call, a site's hidden states
are edited where the plan's selections fall into the columns of the call.
"""

import logging
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, TypeAlias

import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float, Shaped
from torch import Tensor, nn

from .._util.errors import warn_once
from ..config.components import Stack
from ..interventions import EditedRows, Gate, NoiseIntervention, RowStrengths, RowSubspaces
from .base.running import mask_after_convolutions
from .layout import PromptLayout, Selection, cached_length
from .settings import MODEL_CHOICES, CallChoices
from .units import PlacedUnit

logger = logging.getLogger(__name__)

ReadyEdit: TypeAlias = Callable[[Tensor], Tensor]
"""Of the hidden states of a site in evaluation, all of which it edits, or none."""
Gates: TypeAlias = Float[Tensor, "batch k"] | RowSubspaces


@dataclass(eq=False)
class Notes:
    """What units note in a training pass."""

    values: dict[str, list[Tensor]] = field(default_factory=dict)
    """By unit key, for the losses that units add."""
    lost: dict[str, float] = field(default_factory=dict)
    """By what a base's dtype rounds away, the least scale that no site would lose."""
    is_open: bool = True
    """Whether the pass goes on: its layers may run again in the backward pass."""

    def add(self, key: str, value: Tensor | None) -> None:
        """Note a value for a unit."""
        if self.is_open and value is not None:
            self.values.setdefault(key, []).append(value)

    def lose(self, what: str, least: float) -> None:
        """Note noise that a site loses, and the least scale that it would not."""
        self.lost[what] = max(least, self.lost.get(what, 0.0))

    def warn_of_lost(self) -> None:
        """At a pass's end, warn of noise that sites have lost, once for all sites."""
        for what, least in self.lost.items():
            enough = f"{1.5 * least:.1g}"  # one digit may be a third less than the number
            warn_once(logger, f"{what}: expected at least {enough}, or a base in float32")

    def close(self) -> dict[str, list[Tensor]]:
        """End the pass; returns what was noted."""
        values, self.values, self.is_open = self.values, {}, False
        return values


# -- plans -----------------------------------------------------------------------------------------


@dataclass(frozen=True)
class EditPlan:
    """What one forward call, or one generation, edits."""

    layout: PromptLayout
    """The batch's prompts."""
    selections: Mapping[str, Selection]
    """By unit key; none where the caller gave no location, so that nothing is edited."""
    gates: Mapping[str, Gates] = field(default_factory=dict)
    """By unit key, how much of each row of its factors, or dimension of its subspace, each row of
    the batch gets; all of each where there is none. Of a unit with a `forward` of its own, the
    `subspaces` that it gets."""
    stack: Stack | None = None
    """The layers that are edited, in an encoder-decoder model."""
    decodes: bool = False
    """Whether tokens that generation appends are edited."""
    cut: int = 0
    """Columns before it hold no edit."""
    in_turn: bool = False
    """Whether each unit at a site reads what those before it wrote: a caller's columns of several
    may be the same."""
    noise: Callable[[NoiseIntervention, Tensor, int], Tensor] | None = None
    """The noise of a unit for a call's hidden states, from its first column on, where the base's
    rows are shifted against the layout; each call draws its own otherwise."""
    choices: CallChoices = MODEL_CHOICES
    """How much is edited and who looks on."""
    notes: Notes = field(default_factory=Notes)
    """What units note for the losses that they add."""
    decisions: dict[str, Float[Tensor, " rows"]] = field(default_factory=dict, compare=False)
    """By unit key, which rows a gate lets be edited, once their prompts have been read."""
    _ready: dict[tuple[int, int], dict[str, ReadyEdit]] = field(default_factory=dict, compare=False)

    def ready_to_decode(self, rows: int, length: int) -> dict[str, ReadyEdit]:
        """What calls run that read so many generated tokens of so many rows; see `Call.ready`."""
        return self._ready.setdefault((rows, length), {})

    def settle(self, _: Bool[Tensor, "batch width"], __: int) -> "EditPlan":
        """The plan itself, as of a `DeferredPlan`."""
        return self


@dataclass(frozen=True)
class DeferredPlan:
    """A plan of a base that tells only when it runs what its tokens are."""

    settle: Callable[[Bool[Tensor, "batch width"], int], EditPlan]
    """From a call's attended tokens, and how many of them are cached."""
    stack: Stack | None = None
    """The layers that are edited, in an encoder-decoder model."""
    decodes: bool = False
    """Whether tokens that generation appends are edited."""
    choices: CallChoices = MODEL_CHOICES
    """How much is edited and who looks on."""
    notes: Notes = field(default_factory=Notes)
    """What units note for the losses that they add, in all stacks."""


Plan: TypeAlias = EditPlan | DeferredPlan
Hidden: TypeAlias = Float[Tensor, "batch length hidden"]


# -- calls -----------------------------------------------------------------------------------------


@dataclass
class Call:
    """The columns of a plan that one call of the base sees: [offset, offset + length)."""

    plan: EditPlan
    offset: int
    """Negative where virtual tokens come before the user's."""
    length: int
    rows: int
    is_noised: bool = True
    """Whether noise acts."""
    ready: dict[str, ReadyEdit] = field(default_factory=dict)
    """By the key of a site's first unit, what it runs there, as far as that is known."""
    _edited: dict[tuple[Any, ...], EditedRows] = field(default_factory=dict)

    def __post_init__(self) -> None:
        if self.is_decoding and not torch.is_grad_enabled():
            self.ready = self.plan.ready_to_decode(self.rows, self.length)

    @property
    def is_decoding(self) -> bool:
        """Whether it reads generated tokens alone."""
        return self.offset >= self.plan.layout.attended.shape[1]

    @property
    def _times(self) -> int:
        return self.rows // self.plan.layout.attended.shape[0]

    def at(self, hidden: Tensor) -> "Call":
        """The call that a site's hidden states belong to: this one."""
        return self

    def edited(self, units: Sequence[PlacedUnit], device: torch.device) -> EditedRows:
        """The rows of flattened hidden states that units edit, computed once for all sites."""
        selections = tuple(self.plan.selections[placed.key] for placed in units)
        key = (device, *selections)
        if key not in self._edited:
            parts = [s.repeat(self._times).within(self.offset, self.length) for s in selections]
            indices, masks = zip(*parts, strict=True)
            joint = None if indices[0] is None else torch.cat(indices).to(device)
            is_whole = all(s.covers(self.offset, self.length) for s in selections)
            skipped = None if is_whole else ~torch.cat(masks)[:, None].to(device)
            counts = () if len(masks) == 1 else tuple(len(mask) for mask in masks)
            self._edited[key] = EditedRows(joint, skipped, counts)
        return self._edited[key]

    def gates(self, key: str) -> Gates | None:
        """A unit's gates for the rows of this call."""
        gates = self.plan.gates.get(key)
        return None if gates is None else gates.repeat_interleave(self._times, 0)

    def strengths(self, key: str) -> RowStrengths | None:
        """What each hidden state that a unit edits gets of its edit; None for all of it."""
        if (strengths := self.plan.choices.strengths) is None:
            return None
        columns = self.plan.selections[key].columns
        slots = self.length if columns is None else columns.shape[1]
        return strengths.repeat_interleave(self._times * slots)

    def decision(self, key: str, gate: Gate, hidden: Hidden) -> Float[Tensor, " rows"]:
        """1 for rows whose prompt meets a gate's condition; decided by the call that reads them.

        Args:
            key: key of the gate's unit.
            gate: gate that reads prompts.
            hidden: hidden states of this call.

        Raises:
            ValueError: the call has a part of the prompts alone, or several in a row.
        """
        self.expect_one_document(key)
        decisions, prompt = self.plan.decisions, self.plan.layout.prompt
        if not self.is_decoding:
            before, after = prompt[:, : max(self.offset, 0)], prompt[:, self.offset + self.length :]
            # To look at them waits for the device: a call with whole rows has none.
            if any(part.shape[1] and part.any() for part in (before, after)):
                raise ValueError(_PARTIAL.format(key))
            mask = self._columns(prompt).to(hidden.device)[..., None]
            total = hidden.masked_fill(~mask, 0).sum(1)
            decisions[key] = gate.decide(total / mask.sum(1).clamp(min=1)).detach()
        if key not in decisions or self.rows % len(decisions[key]):
            raise ValueError(_PARTIAL.format(key))
        decided = decisions[key]
        return decided.repeat_interleave(self.rows // len(decided))

    def expect_one_document(self, key: str) -> None:
        """Raise a ValueError where rows hold several documents, which a unit would mix."""
        if self.plan.layout.document_lengths is not None:
            raise ValueError(
                f"{key} reads all of a row together, and rows are packed with several documents: "
                "give each document a row of its own"
            )

    def tokens(self, device: torch.device) -> dict[str, Tensor]:
        """What noise asks of tokens."""
        layout = self.plan.layout
        values = {"attended": layout.attended, "prompt": layout.prompt}
        if layout.document_lengths is not None:
            values["lengths"] = layout.document_lengths
        return {name: self._columns(value).to(device) for name, value in values.items()}

    def _columns(self, values: Shaped[Tensor, "batch width"]) -> Shaped[Tensor, "batch length"]:
        """This call's part of a value of each column; zero at virtual tokens."""
        part = values[:, max(self.offset, 0) : self.offset + self.length]
        part = F.pad(part, (max(-self.offset, 0), 0))
        return part.repeat_interleave(self._times, 0)


_PARTIAL = (
    "gate of {}: a condition is decided by whole prompts, and this call does not have them: "
    "pass the prompt in one call, without keys and values of a part of it"
)


@dataclass
class TokenlessCall:
    """One call of a base that reads no tokens: each site's hidden states tell their number."""

    plan: Plan
    base: nn.Module
    mask: Tensor | None
    """Of what the base reads, such as samples of sound."""
    is_noised: bool = True
    """Whether noise acts."""
    _calls: dict[tuple[int, int], Call] = field(default_factory=dict)

    def at(self, hidden: Tensor) -> Call:
        """The call for hidden states [batch, length, width]: all but padding is the prompt."""
        batch, length = hidden.shape[:2]
        if (batch, length) not in self._calls:
            attended = torch.ones(batch, length, dtype=torch.bool, device=hidden.device)
            shorten = mask_after_convolutions(self.base)
            if self.mask is not None and shorten is not None and len(self.mask) == batch:
                attended = shorten(length, self.mask).bool()
            plan = self.plan.settle(attended, 0)
            self._calls[batch, length] = Call(plan, 0, length, batch, self.is_noised)
        return self._calls[batch, length]


AnyCall: TypeAlias = Call | TokenlessCall


class CachedEdits:
    """What the tokens of a cache were edited at, by the calls that put them there."""

    def __init__(self) -> None:
        self._parts: list[tuple[int, Mapping[str, Selection]]] = []
        """The first column of the calls of one plan, and its selections."""

    @classmethod
    def of(cls, cache: Any) -> "CachedEdits | None":
        """Those of a cache, which go with its copies; None for one that no plan has filled."""
        edits: CachedEdits | None = getattr(cache, "reftnoise_edits", None)
        return edits

    @classmethod
    def note(cls, cache: Any, call: AnyCall | None) -> None:
        """Remember a call that has put its tokens into a cache."""
        if cache is None or not isinstance(call, Call):
            return
        edits = cls.of(cache) or cls()
        edits._parts = [part for part in edits._parts if part[0] < call.offset]
        if not edits._parts or edits._parts[-1][1] is not call.plan.selections:
            edits._parts.append((call.offset, call.plan.selections))
        cache.reftnoise_edits = edits

    def differ_from(self, plan: EditPlan, past: int) -> bool:
        """Whether a plan would have edited other ones of the first `past` tokens."""
        ends = [start for start, _ in self._parts[1:]] + [past]
        for (start, selections), end in zip(self._parts, ends, strict=True):
            if selections.keys() != plan.selections.keys() or not start < end <= past:
                continue  # other units, or fewer tokens than were put there
            for key, selection in selections.items():
                before, now = (
                    s.dense(max(start, 0), end) for s in (selection, plan.selections[key])
                )
                if before.shape == now.shape and not torch.equal(before, now.to(before.device)):
                    return True
        return False


class CallReader:
    """Reads which columns of a plan each call of a base sees, one call after the other.

    Args:
        plan: what is edited.
        is_noised: whether noise acts: it is for training passes alone, and not for a generation
            with a model that was left in training mode.
    """

    def __init__(self, plan: Plan, *, is_noised: bool = True) -> None:
        self.plan, self._is_noised = plan, is_noised
        self._settled = plan if isinstance(plan, EditPlan) else None
        self._seen = 0  # columns that calls have read, for caches that do not tell (state-space)

    @property
    def width(self) -> int | None:
        """Columns of the layout; None before the first call of a deferred plan."""
        return None if self._settled is None else self._settled.layout.attended.shape[1]

    def has(self, placed: PlacedUnit) -> bool:
        """Whether a unit may act in the calls that come."""
        if placed.site.stack != self.plan.stack:
            return False
        if isinstance(placed.unit, NoiseIntervention):
            return self._is_noised and (placed.unit.training or self.plan.choices.is_noised)
        return self._settled is None or placed.key in self._settled.selections

    def read(
        self, entry: nn.Module, args: Sequence[Any], kwargs: Mapping[str, Any], virtual_tokens: int
    ) -> AnyCall:
        """The next call: of the module `entry` in the base, after PEFT's virtual tokens."""
        tokens: Any = kwargs.get("inputs_embeds")
        if tokens is None:
            tokens = kwargs.get("input_ids", args[0] if args else None)
            if tokens is None or tokens.is_floating_point():
                mask = kwargs.get("attention_mask")
                return TokenlessCall(self.plan, entry, mask, self._is_noised)
        batch, length = tokens.shape[:2]
        cache = kwargs.get("past_key_values")
        offset = cached_length(cache) - virtual_tokens
        if kwargs.get("cache_params") is not None:
            offset = self._seen
        self._seen = offset + length
        stack = self.plan.stack
        if stack == "encoder" or (stack and cache is not None and offset <= 0):
            self._settled = None  # another prompt, as of long speech's next part
        if self._settled is None:
            attended = _attended(kwargs.get("attention_mask"), batch, offset + length, tokens)
            self._settled = self.plan.settle(attended, max(offset, 0))
        return Call(self._settled, offset, length, batch, self._is_noised)


def _attended(mask: Any, batch: int, width: int, tokens: Tensor) -> Bool[Tensor, "batch width"]:
    """The attended tokens of a call, without virtual ones, which come first."""
    if isinstance(mask, Tensor) and mask.dim() == 2 and mask.shape[1] >= width:
        return mask[:, -width:].bool()
    return torch.ones(batch, width, dtype=torch.bool, device=tokens.device)
