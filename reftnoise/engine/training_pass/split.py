r"""Where a training pass can be split: nothing before a causal model's first edit is trained.

The columns before the first edited one depend on no trainable parameter, so they run without
gradients, as a prefill, and only the rest is differentiated: with `positions: l1`, half of the step
for a long prompt and a short completion. Loss and gradients are those of the plain pass.

Rows are first shifted so that their first edited columns coincide, which also drops padding. The
shift is undone before anyone reads logits.
"""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Bool, Int
from torch import Tensor

from ..layout import PromptLayout, Selection

PER_TOKEN = ("input_ids", "inputs_embeds", "position_ids")
"""Inputs of a base that have a column per token, beside the attention mask."""


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
        """A per-token tensor [batch, given width, ...] in this alignment."""
        rows = torch.arange(len(self.columns), device=values.device)[:, None]
        inside = self.inside.to(values.device)
        inside = inside.view(*inside.shape, *[1] * (values.dim() - 2))
        return values[rows, self.columns.to(values.device)].masked_fill(~inside, fill)

    def put_back(self, values: Tensor) -> Tensor:
        """The inverse of `take`, zero where the alignment has no column."""
        columns = torch.arange(self.given_width, device=values.device) + self.shift[:, None]
        inside = (columns >= 0) & (columns < values.shape[1])
        rows = torch.arange(len(columns), device=values.device)[:, None]
        found = values[rows, columns.clamp(0, values.shape[1] - 1)]
        return found.masked_fill(~inside[..., None], 0)

    def select(self, selection: Selection) -> Selection:
        """A selection of the given columns as one of the aligned columns."""
        if selection.columns is None:
            mask = selection.mask.gather(1, self.columns) & self.inside
            return Selection(None, mask, selection.decode)
        columns = selection.columns + self.shift[:, None]
        mask = selection.mask & (columns >= 0) & (columns < self.columns.shape[1])
        columns = columns.clamp(0, self.columns.shape[1] - 1)
        return Selection(columns, mask & self.inside.gather(1, columns))


def align(
    layout: PromptLayout,
    selections: Iterable[Selection | None],
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
        layout: of the batch.
        selections: all edits.
        labels: -100 where nothing is predicted.
        position_ids: as given to the base; None where it counts columns itself.
        keep_end: also keep tokens after the one that predicts the last label.
    """
    attended = layout.attended
    device, width = attended.device, attended.shape[1]
    column = torch.arange(width, device=device)
    start = attended.to(torch.uint8).argmax(1)
    end = (width - attended.flip(1).to(torch.uint8).argmax(1)).clamp(min=1)
    is_label = labels.to(device) != -100
    has_label = is_label.any(1)
    first = torch.where(has_label, is_label.to(torch.uint8).argmax(1) - 1, width)
    for selection in {id(s): s for s in selections if s is not None}.values():
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


def aligned_inputs(
    alignment: Alignment, inputs: Mapping[str, Any], layout: PromptLayout, *, position_ids: bool
) -> dict[str, Tensor]:
    """The base's per-token inputs in the alignment.

    Args:
        alignment: of the batch.
        inputs: as given.
        layout: of the batch.
        position_ids: whether to add those that the base would count itself.
    """
    found = {name: alignment.take(inputs[name]) for name in PER_TOKEN if name in inputs}
    found["attention_mask"] = alignment.take(layout.attended.long())
    if position_ids and "position_ids" not in found:
        found["position_ids"] = alignment.columns
    return found
