"""What one pass over a base edits: the batch's prompts, and the columns that each call sees."""

import inspect
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any, NamedTuple, TypeAlias

import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float, Int, Shaped
from torch import Tensor, nn

from ..config.components import Stack
from ..interventions import NoiseIntervention
from .layout import PromptLayout, Selection, cached_length
from .training_pass.split import Alignment
from .units import PlacedUnit

Located: TypeAlias = tuple[PromptLayout, dict[str, Selection | None]]


@dataclass
class Pass:
    """What one forward call, or one generation, edits: the batch's prompts and the selections."""

    layout: PromptLayout | None = None
    """None until the first call, where only the call itself tells."""
    selections: dict[str, Selection | None] = field(default_factory=dict)
    """By unit key; None where the caller gave no location, so that nothing is edited."""
    gates: dict[str, Float[Tensor, "batch k"]] = field(default_factory=dict)
    """By unit key, how much of each row of its factors, or dimension of its subspace, each row of
    the batch gets; all of each where there is none."""
    locate: Callable[[Bool[Tensor, "batch width"], int], Located] | None = None
    """From attended tokens, and how many of them are cached, to layout and selections, where these
    are not known beforehand."""
    stack: Stack | None = None
    """Whose layers are edited, in an encoder-decoder model."""
    is_generation: bool = False
    """Noise is for training passes alone, also when the model is left in training mode."""
    is_assisted: bool = False
    """Whether the base drafts for itself, so that it reads the prompt more than once."""
    seen: int = 0
    """Columns that calls of the base have read, for caches that do not tell (state-space)."""
    alignment: Alignment | None = None
    """How the base's rows are shifted against the layout; the selections are shifted already."""
    _noise: dict[str, Tensor] = field(default_factory=dict)

    def settle(self, attended: Bool[Tensor, "batch width"], past: int = 0) -> PromptLayout:
        """The layout; found from the first call's tokens, if it was not known beforehand."""
        if self.layout is None:
            assert self.locate is not None
            self.layout, self.selections = self.locate(attended, past)
        return self.layout

    def has(self, one: PlacedUnit) -> bool:
        """Whether a unit acts in this pass."""
        if one.site.stack != self.stack:
            return False
        if isinstance(one.unit, NoiseIntervention):
            return one.unit.training and not self.is_generation
        return self.layout is None or self.selections[one.key] is not None

    @property
    def cut(self) -> int:
        """Columns before it hold no edit."""
        return 0 if self.alignment is None else self.alignment.cut

    def noise(
        self, one: PlacedUnit, hidden: Float[Tensor, "batch length hidden"], offset: int
    ) -> Float[Tensor, "batch length hidden"]:
        """This call's part of the noise of a shifted pass.

        It is drawn once for the whole batch as given, so it is the plain pass's.
        """
        assert self.alignment is not None
        assert self.layout is not None
        assert isinstance(one.unit, NoiseIntervention)
        if one.key not in self._noise:
            like = hidden.new_zeros(*self.layout.attended.shape, hidden.shape[-1])
            masks = (self.layout.attended.to(like.device), self.layout.prompt.to(like.device))
            self._noise[one.key] = self.alignment.take(one.unit.delta(like, *masks))
        return self._noise[one.key][:, offset : offset + hidden.shape[1]]


@dataclass
class Chunk:
    """The columns of a pass that one call of the base sees: [offset, offset + length)."""

    current: Pass
    layout: PromptLayout
    offset: int
    """Negative where virtual tokens come before the user's."""
    length: int
    batch: int
    _rows: dict[tuple[int, ...], "Rows"] = field(default_factory=dict)

    @property
    def _times(self) -> int:
        return self.batch // self.layout.attended.shape[0]

    def at(self, hidden: Tensor) -> "Chunk":
        """The chunk that a site's hidden states belong to: this one."""
        return self

    def rows(self, selections: Sequence[Selection]) -> "Rows":
        """Where selections lie in the flattened hidden states, computed once for all sites."""
        key = tuple(id(selection) for selection in selections)
        if key not in self._rows:
            parts = [s.repeat(self._times).within(self.offset, self.length) for s in selections]
            indices, masks = zip(*parts, strict=True)
            counts = [len(mask) for mask in masks]
            joint = None if indices[0] is None else torch.cat(indices)
            self._rows[key] = Rows(joint, torch.cat(masks), counts)
        return self._rows[key]

    def gates(self, key: str) -> Float[Tensor, "batch k"] | None:
        """A unit's gates for the rows of this call."""
        gates = self.current.gates.get(key)
        return None if gates is None else gates.repeat_interleave(self._times, 0)

    def tokens(self, device: torch.device) -> dict[str, Tensor]:
        """What noise asks of tokens."""
        layout = self.layout
        found = {"attended": layout.attended, "prompt": layout.prompt}
        if layout.document_lengths is not None:
            found["lengths"] = layout.document_lengths
        return {name: self.columns(values).to(device) for name, values in found.items()}

    def columns(self, values: Shaped[Tensor, "batch width"]) -> Shaped[Tensor, "batch length"]:
        """This chunk's part of something over the pass's columns; zero at virtual tokens."""
        part = values[:, max(self.offset, 0) : self.offset + self.length]
        part = F.pad(part, (max(-self.offset, 0), 0))
        return part.repeat_interleave(self._times, 0)


@dataclass
class TokenlessChunk:
    """One call of a base that reads no tokens: each site's hidden states tell their number."""

    current: Pass
    mask: Tensor | None = None
    """Of what the base reads, such as samples of sound."""
    shorten: Callable[[int, Tensor], Tensor] | None = None
    """From a number of hidden states, and that mask, to theirs."""
    _chunks: dict[tuple[int, int], Chunk] = field(default_factory=dict)

    @classmethod
    def of_call(cls, current: Pass, base: nn.Module, inputs: Mapping[str, Any]) -> "TokenlessChunk":
        # Models of sound begin with convolutions, and tell by this which results are padding.
        shorten: Any = getattr(base, "_get_feature_vector_attention_mask", None)
        if shorten is not None and "add_adapter" in inspect.signature(shorten).parameters:
            shorten = partial(shorten, add_adapter=False)  # it comes after the layers
        return cls(current, inputs.get("attention_mask"), shorten)

    def at(self, hidden: Tensor) -> Chunk:
        """The chunk for hidden states [batch, length, width]: all but padding is the prompt."""
        batch, length = hidden.shape[:2]
        if (batch, length) not in self._chunks:
            attended = torch.ones(batch, length, dtype=torch.bool, device=hidden.device)
            if self.mask is not None and self.shorten is not None and len(self.mask) == batch:
                attended = self.shorten(length, self.mask).bool()
            current = replace(self.current)
            layout = current.settle(attended)
            self._chunks[batch, length] = Chunk(current, layout, 0, length, batch)
        return self._chunks[batch, length]


class Rows(NamedTuple):
    """Rows of flattened hidden states that the units at a site edit, one unit after the other."""

    indices: Int[Tensor, " n"] | None
    """None for all rows, of a single unit."""
    mask: Bool[Tensor, " n"]
    counts: list[int]


def chunk_of_call(
    current: Pass,
    entry: nn.Module,
    args: Sequence[Any],
    kwargs: Mapping[str, Any],
    virtual_tokens: int,
) -> Chunk | TokenlessChunk:
    """The columns of a pass that a call of the module where it enters the base sees."""
    given: Any = kwargs.get("inputs_embeds")
    if given is None:
        given = kwargs.get("input_ids", args[0] if args else None)
        if given is None or given.is_floating_point():
            return TokenlessChunk.of_call(current, entry, kwargs)
    batch, length = given.shape[:2]
    cache = kwargs.get("past_key_values")
    offset = cached_length(cache) - virtual_tokens
    if kwargs.get("cache_params") is not None:
        offset = current.seen
    current.seen = offset + length
    if current.stack == "encoder" or (current.stack and cache is not None and offset <= 0):
        current.layout = None  # another prompt, as of long speech's next part
    width = offset + length  # without virtual tokens, which come first
    mask = kwargs.get("attention_mask")
    if isinstance(mask, Tensor) and mask.dim() == 2 and mask.shape[1] >= width:
        mask = mask[:, -width:]
    else:
        mask = torch.ones(batch, width, device=given.device)
    layout = current.settle(mask.bool(), max(offset, 0))
    return Chunk(current, layout, offset, length, batch)
