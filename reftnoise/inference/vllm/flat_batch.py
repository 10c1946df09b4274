"""Edits of a flattened batch: requests laid end to end, each with its own adapter or none.

Servers run a step on some tokens of each request, a part of its prompt or its next token, without
padding.
"""

from collections import defaultdict
from collections.abc import Iterable, Sequence
from typing import NamedTuple

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from ...adapters.frozen import FrozenAdapter, stacked_units
from ...config.positions import Positions
from ...engine.layout import named_tokens
from ...interventions import EditedRows, StackedEdit, edit_rows


class StepRequests(NamedTuple):
    """The requests of a step, in the order of their tokens.

    Args:
        adapters: column of each request's adapter; -1 for the bare base.
        scales: factor of each request's edits.
        scheduled: number of its tokens in this step.
        computed: number of its tokens in earlier steps.
        prompts: number of tokens of its prompt.
    """

    adapters: Int[Tensor, " requests"]
    scales: Float[Tensor, " requests"]
    scheduled: Int[Tensor, " requests"]
    computed: Int[Tensor, " requests"]
    prompts: Int[Tensor, " requests"]


class FlatEdit(NamedTuple):
    """A stacked edit of some tokens."""

    unit: StackedEdit
    rows: Int[Tensor, " n"]
    gates: Float[Tensor, "n adapters"]


class FlatBatch:
    """Adapters side by side, for batches whose requests choose among them by column."""

    def __init__(self, adapters: Sequence[FrozenAdapter], device: torch.device) -> None:
        self._count, self._device = len(adapters), device
        self._units = stacked_units(adapters)
        self.edits_decode = any(u.positions and u.positions.decode for u in self._units)

    def edits(self, requests: StepRequests) -> dict[nn.Module, list[FlatEdit]]:
        """The edits of a step, by the module whose output they change."""
        edited = requests.adapters >= 0
        if not self.edits_decode:
            edited = edited & (requests.computed < requests.prompts)
        if not edited.any():
            return {}
        request = torch.repeat_interleave(requests.scheduled)  # of each token
        starts = requests.scheduled.cumsum(0) - requests.scheduled
        tokens = edited[request].nonzero().squeeze(1)
        request = request[tokens]
        rank = tokens - starts[request] + requests.computed[request]
        length = requests.prompts[request]
        gates = torch.zeros(len(tokens), self._count)
        gates[torch.arange(len(tokens)), requests.adapters[request]] = requests.scales[request]
        selected: dict[tuple[object, ...], tuple[Tensor, Tensor]] = {}
        edits: dict[nn.Module, list[FlatEdit]] = defaultdict(list)
        for placed in self._units:
            assert isinstance(placed.unit, StackedEdit)
            key = placed.positions, placed.prefix, placed.suffix
            if key not in selected:
                assert placed.positions is not None
                ends = placed.prefix, placed.suffix
                mask = named_tokens(placed.positions, rank, length, *ends)
                selected[key] = tokens[mask].to(self._device), gates[mask].to(self._device)
            if len(selected[key][0]):
                edits[placed.site.module].append(FlatEdit(placed.unit, *selected[key]))
        return edits


def settled_tokens(positions: Iterable[Positions], length: int) -> int | None:
    """How many first tokens are edited in the same way in all prompts that begin with this one.

    A longer prompt may begin with a shorter one and its answer: these tokens have the same states.

    Args:
        positions: positions of an adapter's units.
        length: number of the prompt's tokens.

    Returns:
        None for all of them.
    """
    units = list(positions)
    if length < max((u.first for u in units), default=0) + max((u.last for u in units), default=0):
        return 0  # where the rule for short prompts may hold
    counts: list[int] = []
    for unit in units:
        if unit.decode != unit.all:  # the prompt's end is where the edits begin or end
            counts.append(length)
        if unit.last:
            counts.append(length - unit.last)
        # A token that is also named from the start is edited in longer prompts, too.
        ends = {length + index for index in unit.indices if -length <= index < 0}
        counts += ends.difference(unit.indices)
        counts += [index for index in unit.indices if index >= length]
    return min(counts, default=None)


def apply_(
    edits: Sequence[FlatEdit],
    hidden: Float[Tensor, "tokens hidden"],
    residual: Float[Tensor, "tokens hidden"] | None,
) -> None:
    """Add to `hidden` the edits of its sum with `residual`.

    A model that adds the residual in the next norm has its states in these two parts.
    """
    if not edits:
        return
    dtype = hidden.dtype
    for edit in edits:
        dtype = edit.unit.wide_dtype(dtype)
    rows = edits[0].rows if len(edits) == 1 else torch.cat([edit.rows for edit in edits])
    counts = () if len(edits) == 1 else tuple(len(edit.rows) for edit in edits)
    edit_rows(
        hidden,
        [edit.unit.row_edit(dtype, hidden.device, gates=edit.gates) for edit in edits],
        EditedRows(rows, None, counts),
        states=() if residual is None else (hidden, residual),
        in_place=True,
    )
