r"""A training pass in two: nothing before a causal model's first edit is trained.

The columns before the first edited one depend on no trainable parameter, so they run without
gradients, as a prefill, and only the rest is differentiated: with `positions: l1`, half of the step
for a long prompt and a short completion. Loss and gradients are those of the plain pass.

Rows are first shifted so that their first edited columns coincide, which also drops padding. The
shift is undone before anyone reads logits.
"""

import contextlib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor
from transformers import DynamicCache
from transformers.cache_utils import DynamicLayer
from transformers.modeling_outputs import ModelOutput

from ...interventions import NoiseIntervention
from ..base.peft import inner_model
from ..base.running import weights_stamp
from ..calls import EditPlan
from ..hooks import Engine
from ..layout import PromptLayout, Selection
from .loss import without_logits
from .prefix_cache import PrefixCache

PER_TOKEN = ("input_ids", "inputs_embeds", "position_ids")
"""Inputs of a base that have a column per token, apart from the attention mask."""


@dataclass(frozen=True)
class Alignment:
    """A batch whose rows are shifted: column c of row b was column `columns[b, c]`."""

    columns: Int[Tensor, "batch width"]
    inside: Bool[Tensor, "batch width"]
    """False at padding."""
    shift: Int[Tensor, " batch"]
    cut: int
    """Columns before it need no gradient."""
    given_width: int

    @property
    def is_worthwhile(self) -> bool:
        """Whether the split saves at least a twentieth of the plain pass, forward and backward."""
        plain = 2 * self.given_width
        return self.cut + 2 * (self.columns.shape[1] - self.cut) <= 0.95 * plain

    def take(self, values: Tensor, fill: int = 0) -> Tensor:
        """A tensor of the batch [batch, columns, ...] in this alignment."""
        rows = torch.arange(len(self.columns), device=values.device)[:, None]
        inside = self.inside.to(values.device)
        inside = inside.view(*inside.shape, *[1] * (values.dim() - 2))
        return values[rows, self.columns.to(values.device)].masked_fill(~inside, fill)

    def put_back(self, values: Tensor) -> Tensor:
        """The inverse of `take`, zero where the alignment has no column."""
        columns = torch.arange(self.given_width, device=values.device) + self.shift[:, None]
        inside = (columns >= 0) & (columns < values.shape[1])
        rows = torch.arange(len(columns), device=values.device)[:, None]
        taken = values[rows, columns.clamp(0, values.shape[1] - 1)]
        return taken.masked_fill(~inside[..., None], 0)

    def select(self, selection: Selection) -> Selection:
        """A selection of the batch's columns as one of the aligned columns."""
        width = self.columns.shape[1]
        if selection.columns is None:
            mask = selection.mask.gather(1, self.columns) & self.inside
            return Selection.known(None, mask, range(width), selection.decode)
        columns = selection.columns + self.shift[:, None]
        mask = selection.mask & (columns >= 0) & (columns < width)
        columns = columns.clamp(0, width - 1)
        return Selection.known(
            columns, mask & self.inside.gather(1, columns), range(self.cut, width)
        )

    def shifted(self, plan: EditPlan) -> EditPlan:
        """A plan of the batch's columns as one of the aligned columns."""
        # Units with equal positions share one selection.
        moved = {s: self.select(s) for s in set(plan.selections.values())}
        selections = {key: moved[s] for key, s in plan.selections.items()}
        noise = self._noise(plan.layout)
        return replace(plan, selections=selections, cut=self.cut, noise=noise)

    def _noise(self, layout: PromptLayout) -> Callable[[NoiseIntervention, Tensor, int], Tensor]:
        """The noise of the plain pass, for the calls of a split one: drawn once for all."""
        drawn: dict[NoiseIntervention, Tensor] = {}

        def noise(unit: NoiseIntervention, hidden: Tensor, offset: int) -> Tensor:
            if unit not in drawn:
                like = hidden.new_zeros(*layout.attended.shape, hidden.shape[-1])
                masks = (layout.attended.to(like.device), layout.prompt.to(like.device))
                drawn[unit] = self.take(unit.delta(like, *masks))
            return drawn[unit][:, offset : offset + hidden.shape[1]]

        return noise


def align(
    plan: EditPlan,
    labels: Int[Tensor, "batch width"],
    position_ids: Int[Tensor, "batch width"] | None,
    *,
    keep_end: bool,
) -> Alignment | None:
    """Shift rows so that what needs gradients starts at one column.

    A row's cut is before its first edited token, and before the token that predicts its first
    label. None for packed rows, whose position ids start again within a row, and for labels at
    padding or at a token with only padding before it: a base predicts those, too.

    Args:
        plan: what is edited.
        labels: -100 where nothing is predicted.
        position_ids: position ids of the base; None where it counts columns itself.
        keep_end: whether to keep tokens after the one that predicts the last label.
    """
    attended = plan.layout.attended
    device, width = attended.device, attended.shape[1]
    column = torch.arange(width, device=device)
    start = attended.to(torch.uint8).argmax(1)
    end = (width - attended.flip(1).to(torch.uint8).argmax(1)).clamp(min=1)
    is_label = labels.to(device) != -100
    has_label = is_label.any(1)
    first = torch.where(has_label, is_label.to(torch.uint8).argmax(1) - 1, width)
    for selection in set(plan.selections.values()):
        first = torch.minimum(first, selection.first_column(width))
    first = torch.maximum(torch.minimum(first, end - 1), start)
    if not keep_end:
        last = (column * is_label).amax(1)
        end = torch.maximum(torch.minimum(end, last), first + 1)
    cut, rest = (first - start).amax(), (end - first).amax()
    is_odd = (is_label & ~attended).any()
    is_odd = is_odd | (is_label & (column == start[:, None]) & (column > 0)).any()
    if position_ids is not None:
        follows = position_ids.diff(dim=1) == 1
        is_odd = is_odd | (attended[:, 1:] & attended[:, :-1] & ~follows).any()
    before, after, odd = torch.stack([cut, rest, is_odd.long()]).tolist()  # the one synchronisation
    if odd:
        return None
    shift = before - first
    aligned = torch.arange(before + after, device=device) - shift[:, None]
    inside = (aligned >= start[:, None]) & (aligned < end[:, None])
    return Alignment(aligned.clamp(0, width - 1), inside, shift, before, width)


class Complete(Exception):  # noqa: N818  # it tells of no error
    """Raised within a base's forward once a prompt's keys and values are complete."""


class PromptStates(DynamicCache):
    """A prompt's keys and values, not copied where transformers' own cache would.

    Args:
        last: layer whose keys and values complete it: what the base computes after them is needed
            by no later token, so `Complete` ends the forward pass there. None runs it to its end.
    """

    def __init__(self, last: int | None = None) -> None:
        super().__init__()
        self.layer_class_to_replicate = _PromptLayer
        self.last = last

    def update(
        self, key_states: Tensor, value_states: Tensor, layer_idx: int, *args: Any, **kwargs: Any
    ) -> Any:
        states = super().update(key_states, value_states, layer_idx, *args, **kwargs)
        if layer_idx == self.last:
            self.last = None
            raise Complete
        return states


class _PromptLayer(DynamicLayer):
    def update(
        self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any
    ) -> tuple[Tensor, Tensor]:
        if self.is_initialized:
            keys, values = super().update(key_states, value_states, *args, **kwargs)
            return keys, values
        self.lazy_initialization(key_states, value_states)
        self.keys, self.values = key_states, value_states
        return key_states, value_states


class SplitPass:
    """A pass whose prompts run without gradients; `plan` and `inputs` are not aligned yet.

    With `position_ids`, the base is given those that it would count itself.
    """

    hidden: Tensor
    """The hidden states from the cut on, once the pass has run."""

    def __init__(
        self,
        engine: Engine,
        plan: EditPlan,
        alignment: Alignment,
        inputs: Mapping[str, Any],
        *,
        position_ids: bool,
    ) -> None:
        self._engine, self._alignment = engine, alignment
        self._decoder = inner_model(engine.base).base_model
        self._plan = alignment.shifted(plan)
        aligned = {name: alignment.take(inputs[name]) for name in PER_TOKEN if name in inputs}
        aligned["attention_mask"] = alignment.take(plan.layout.attended.long())
        if position_ids and "position_ids" not in aligned:
            aligned["position_ids"] = alignment.columns
        self._inputs = aligned
        self._stamp: tuple[object, ...] = ()
        self._before: Tensor | None = None

    def run(self, last: int | None, prefixes: PrefixCache | None) -> ModelOutput:
        """Run the pass; the output is that of the columns from the cut on.

        Args:
            last: layer after which prompts need not go on; None to run them to their end.
            prefixes: where keys and values of prompts are kept.
        """
        cut = self._alignment.cut
        rest = {name: value[:, cut:] for name, value in self._inputs.items()}
        rest["attention_mask"] = self._inputs["attention_mask"]
        with (
            self._engine.running(self._plan) as is_ours,
            without_logits(self._decoder, is_ours) as seen,
        ):
            if prefixes is None:
                states = self._prefill(last)
            else:
                with prefixes.lock:
                    states = self._fetch(last, prefixes)
                self._stamp = prefixes.stamp
            outputs: ModelOutput = self._engine.base(**rest, past_key_values=states, use_cache=True)
        self.hidden = seen[-1]
        if len(seen) > 1 and len(seen[0]) == len(self.hidden):  # none came from the prefix cache
            self._before = seen[0]
        kept = {name: value for name, value in outputs.items() if name != "past_key_values"}
        return type(outputs)(**kept)

    def all_hidden(self) -> Float[Tensor, "batch width hidden"]:
        """The hidden states of all the batch's columns. Those before the cut may be computed again.

        Raises:
            RuntimeError: they have to be, but the base has changed.
        """
        if self._before is None:
            if self._stamp != stamp_of(self._engine.base):
                raise RuntimeError("the base has changed since these logits' forward pass")
            with (
                self._engine.running(self._plan) as is_ours,
                without_logits(self._decoder, is_ours) as seen,
            ):
                self._prefill()
            self._before = seen[0]
        return self._alignment.put_back(torch.cat([self._before, self.hidden], 1))

    @torch.no_grad()
    def _prefill(self, last: int | None = None, rows: list[int] | None = None) -> PromptStates:
        """Keys and values of the columns before the cut, of some rows or all."""
        prompt = {name: value[:, : self._alignment.cut] for name, value in self._inputs.items()}
        if rows is not None:
            prompt = {name: value[rows] for name, value in prompt.items()}
        return self._computed(prompt, last)

    def _computed(self, prompt: Mapping[str, Tensor], last: int | None) -> PromptStates:
        states = PromptStates(last)
        with contextlib.suppress(Complete):
            self._engine.base(**prompt, past_key_values=states, use_cache=True)
        return states

    @torch.no_grad()
    def _fetch(self, last: int | None, prefixes: PrefixCache) -> DynamicCache:
        """Keys and values of prompts from the cache, and of those that it lacks from the base."""
        alignment, inputs, cut = self._alignment, self._inputs, self._alignment.cut
        inside = alignment.inside[:, :cut]
        prefixes.belongs_to(stamp_of(self._engine.base))
        ids, mask = inputs["input_ids"], inputs["attention_mask"]
        places = inputs.get("position_ids", alignment.columns)
        columns = torch.stack([ids[:, :cut], places[:, :cut], mask[:, :cut]], dim=2).cpu()
        names = [
            row[kept].numpy().tobytes() for row, kept in zip(columns, inside.cpu(), strict=True)
        ]

        def compute(rows: list[int]) -> PromptStates:
            return self._prefill(last, None if len(rows) == len(names) else rows)

        lengths = inside.sum(1).tolist()
        recompute = partial(self._repeat, last)
        return prefixes.fetch(names, lengths, cut, compute, recompute, PromptStates(), ids.device)

    def _repeat(
        self, last: int | None, names: Sequence[bytes], lengths: Sequence[int], width: int
    ) -> PromptStates:
        """Keys and values of the prompts of an earlier call, in its shape; arguments as above."""
        columns = torch.zeros(len(names), width, 3, dtype=torch.int64)
        for row, (name, length) in enumerate(zip(names, lengths, strict=True)):
            tokens = torch.frombuffer(bytearray(name), dtype=torch.int64)
            columns[row, width - length :] = tokens.view(length, 3)
        parts = columns.to(self._inputs["input_ids"].device).unbind(2)
        prompt = dict(zip(("input_ids", "position_ids", "attention_mask"), parts, strict=True))
        if "position_ids" not in self._inputs:
            del prompt["position_ids"]
        # The pass that goes on has other rows, which must not be edited here.
        with self._engine.running() as is_ours, without_logits(self._decoder, is_ours):
            return self._computed(prompt, last)


def stamp_of(base: Any) -> tuple[object, ...]:
    """What keys and values depend on, apart from tokens."""
    device = base.device.type
    cast = torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else None
    return (*weights_stamp(base), cast)
