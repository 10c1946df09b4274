"""Edit the hidden states that come to a site, in one call of a base."""

from collections.abc import Sequence
from typing import NamedTuple

import torch
from jaxtyping import Float
from torch import Tensor

from ..interventions import NoiseIntervention, ReftIntervention, StackedEdit
from .calls import Chunk, Rows, TokenlessChunk
from .layout import Selection
from .units import PlacedUnit


class _ActingUnit(NamedTuple):
    """A unit in one pass."""

    unit: ReftIntervention | StackedEdit
    selection: Selection
    gates: Float[Tensor, "batch k"] | None = None
    """How much of each dimension the rows of the batch get."""


def apply_units(
    placed: Sequence[PlacedUnit],
    chunk: Chunk | TokenlessChunk,
    hidden: Float[Tensor, "batch length hidden"],
    scale: float,
) -> Float[Tensor, "batch length hidden"]:
    """Apply a site's units in their order; edits that no noise stands between read equal states.

    Raises:
        ValueError: hidden states that are not one per row and token, or of another width than a
            unit's.
    """
    site = placed[0].site
    if not isinstance(hidden, Tensor) or hidden.dim() != 3:
        raise ValueError(
            f"{site}: expected hidden states [batch, length, width], got "
            f"{tuple(hidden.shape) if isinstance(hidden, Tensor) else type(hidden).__name__}"
        )
    chunk = chunk.at(hidden)
    if hidden.shape[:2] != (chunk.batch, chunk.length):
        raise ValueError(
            f"{site}: expected hidden states [{chunk.batch}, {chunk.length}, width], one per row "
            f"and token of the input, got {tuple(hidden.shape)}"
        )
    edits: list[PlacedUnit] = []
    for one in placed:
        if not isinstance(one.unit, NoiseIntervention):
            edits.append(one)
            continue
        hidden, edits = _add_edits(edits, chunk, hidden, scale), []
        if not chunk.current.has(one):
            continue
        if chunk.current.alignment is None:
            hidden = one.unit(hidden, **chunk.tokens(hidden.device))
        else:
            hidden = hidden + chunk.current.noise(one, hidden, chunk.offset)
    return _add_edits(edits, chunk, hidden, scale)


def _add_edits(
    placed: Sequence[PlacedUnit],
    chunk: Chunk,
    hidden: Float[Tensor, "batch length hidden"],
    scale: float,
) -> Float[Tensor, "batch length hidden"]:
    """Add the edits of all units to the states that all of them read.

    Those of few positions are applied at once.
    """
    if chunk.offset + chunk.length <= chunk.current.cut or scale == 0.0:
        return hidden
    edited, few = hidden, []
    for one in placed:
        selection = chunk.current.selections[one.key]
        if selection is None:
            continue
        assert not isinstance(one.unit, NoiseIntervention)
        if hidden.shape[-1] != one.unit.hidden_size:
            raise ValueError(
                f"{one.site} has width {hidden.shape[-1]}, but its "
                f"{type(one.unit).__name__} has embed_dim {one.unit.hidden_size}: pass "
                f"embed_dim={hidden.shape[-1]}"
            )
        acting = _ActingUnit(one.unit, selection, chunk.gates(one.key))
        if selection.columns is None:
            edited = _edit_rows(edited, hidden, [acting], chunk.rows([selection]), scale)
        else:
            few.append(acting)
    if few:
        rows = chunk.rows([acting.selection for acting in few])
        edited = _edit_rows(edited, hidden, few, rows, scale)
    return edited


def _edit_rows(
    edited: Float[Tensor, "batch length hidden"],
    hidden: Float[Tensor, "batch length hidden"],
    units: Sequence[_ActingUnit],
    rows: Rows,
    scale: float,
) -> Float[Tensor, "batch length hidden"]:
    """Add each unit's edit of `hidden`, times `scale`, to those rows of `edited` in the mask.

    Rows outside the mask are added exact zeros, which keeps every shape static: no
    synchronisation with the device, and a NaN in padding stays where it is.
    """
    flat = hidden.reshape(-1, hidden.shape[-1])
    target = edited.reshape(-1, hidden.shape[-1])
    mask = rows.mask.to(hidden.device)[:, None]
    if rows.indices is None:
        delta = _delta(units[0], flat.masked_fill(~mask, 0), scale)
        return _shaped_like(hidden, target + delta.masked_fill(~mask, 0))
    indices = rows.indices.to(hidden.device)
    parts = flat.index_select(0, indices).split_with_sizes(rows.counts)
    deltas = [_delta(unit, part, scale) for unit, part in zip(units, parts, strict=True)]
    delta = torch.cat(deltas).masked_fill(~mask, 0)
    return _shaped_like(hidden, target.index_add(0, indices, delta))


def _delta(
    acting: _ActingUnit, hidden: Float[Tensor, "n hidden"], scale: float
) -> Float[Tensor, "n hidden"]:
    if acting.gates is None:
        delta = acting.unit.delta(hidden)
    else:
        gates = acting.gates.to(hidden.device)
        by_row = hidden.view(len(gates), -1, hidden.shape[-1])
        delta = acting.unit.delta(by_row, gates[:, None]).flatten(0, 1)
    return (delta if scale == 1.0 else scale * delta).to(hidden.dtype)


def _shaped_like(hidden: Tensor, flat: Tensor) -> Tensor:
    """Fresh `flat` in the shape of `hidden`, not as a view.

    FSDP2 gathers for the backward pass by a hook on a layer's output, which an in-place operation
    on a view would drop.
    """
    return torch.ops.aten._unsafe_view(flat, hidden.shape)
