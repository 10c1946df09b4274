"""Edits of a flattened batch: requests laid end to end, each with its own adapter or none.

Servers run a step on some tokens of each request, a chunk of its prompt or the token that comes
next, without padding.
"""

from collections import defaultdict
from collections.abc import Sequence
from typing import NamedTuple

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from ...adapters.frozen import FrozenAdapter, stack
from ...engine.layout import named_tokens
from ...interventions import StackedEdit


class StepRequests(NamedTuple):
    """The requests of a step, in the order of their tokens.

    Args:
        adapters: of each the column of its adapter; -1 for the bare base.
        scales: by which its edits are multiplied.
        scheduled: how many of its tokens the step runs.
        computed: how many of its tokens came before.
        prompts: how many tokens its prompt has.
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
    """Adapters side by side, for batches whose requests choose among them.

    Args:
        adapters: by column.
        device: of the hidden states.
    """

    def __init__(self, adapters: Sequence[FrozenAdapter], device: torch.device) -> None:
        self._count, self._device = len(adapters), device
        self._units = stack(adapters)
        self.edits_decode = any(one.positions and one.positions.decode for one in self._units)

    def edits(self, requests: StepRequests) -> dict[nn.Module, list[FlatEdit]]:
        """What the step edits, by the module whose output it is."""
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
        located: dict[tuple[object, ...], tuple[Tensor, Tensor]] = {}
        found: dict[nn.Module, list[FlatEdit]] = defaultdict(list)
        for one in self._units:
            assert isinstance(one.unit, StackedEdit)
            key = one.positions, one.prefix, one.suffix
            if key not in located:
                assert one.positions is not None
                chosen = named_tokens(one.positions, rank, length, one.prefix, one.suffix)
                located[key] = tokens[chosen].to(self._device), gates[chosen].to(self._device)
            if len(located[key][0]):
                found[one.site.module].append(FlatEdit(one.unit, *located[key]))
        return found


def apply_(
    edits: Sequence[FlatEdit],
    hidden: Float[Tensor, "tokens hidden"],
    residual: Float[Tensor, "tokens hidden"] | None,
) -> None:
    """Add to `hidden` the edits of its sum with `residual`.

    Models that add the residual later, in the next norm, have states in two parts.
    """
    deltas = []
    for edit in edits:
        state = hidden.index_select(0, edit.rows)
        if residual is not None:
            state = state + residual.index_select(0, edit.rows)
        deltas.append(edit.unit.delta(state, edit.gates).to(hidden.dtype))
    for edit, delta in zip(edits, deltas, strict=True):
        hidden.index_add_(0, edit.rows, delta)
