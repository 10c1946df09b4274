"""The edits of one call of a base at one site.

Low-rank edits all go through `edit_rows`; other units say in `delta` what they add.
"""

import copy
from collections.abc import Sequence
from typing import Any

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from ..interventions import (
    EditsRows,
    GatedUnit,
    NoiseIntervention,
    RowEdit,
    StackedEdit,
    edit_rows,
    gate_of,
    has_factors,
    taken_columns,
)
from .base.running import is_in_ddp, is_spread, is_transformed, shaped_like
from .base.sites import Site
from .calls import AnyCall, Call, Hidden, ReadyEdit
from .units import PlacedUnit


def apply_units(
    units: Sequence[PlacedUnit], call: AnyCall, hidden: Hidden, read: Hidden | None = None
) -> Hidden:
    """Apply a site's units in their order.

    Edits that no noise stands between read equal states, unless the plan has them act in turn.

    Args:
        units: units of one site.
        call: call of the base.
        hidden: hidden states that are changed.
        read: hidden states that edits are computed of, at a parallel site; by default `hidden`.

    Raises:
        ValueError: hidden states that are not one per row and token, or of another width than a
            unit's.
    """
    site = units[0].site
    _expect_states(site, hidden)
    call = call.at(hidden)
    if hidden.shape[:2] != (call.rows, call.length):
        raise ValueError(
            f"{site}: expected hidden states [{call.rows}, {call.length}, width], one per row "
            f"and token of the input, got {tuple(hidden.shape)}"
        )
    if read is not None:
        _expect_states(site, read)
        if read.shape != hidden.shape:
            raise ValueError(
                f"{site}: its input is {tuple(read.shape)} and its output {tuple(hidden.shape)}: "
                "an edit of one from the other needs equal shapes"
            )
        return _add_edits(units, call, hidden, read)
    if (ready := _ready_edit(units, call, hidden)) is not None:
        call.ready[units[0].key] = ready
        return ready(hidden)
    edits: list[PlacedUnit] = []
    for placed in units:
        if not isinstance(placed.unit, NoiseIntervention):
            edits.append(placed)
            if call.plan.in_turn:
                hidden, edits = _add_edits(edits, call, hidden), []
            continue
        hidden, edits = _add_edits(edits, call, hidden), []
        unit = placed.unit
        compares = getattr(unit, "compares", False)  # so that labels are predicted without noise
        if not unit.training and call.plan.choices.is_noised and not compares:
            unit = copy.copy(unit)  # its mode is of all threads
            unit.training = True
        if call.is_noised and unit.training:
            hidden = _noised(unit, call, hidden)
    return _add_edits(edits, call, hidden)


def _noised(unit: NoiseIntervention, call: Call, hidden: Hidden) -> Hidden:
    is_eager = not torch.compiler.is_compiling() and not is_transformed()
    if is_eager and (lost := unit.lost_in(hidden)) is not None:
        call.plan.notes.lose(*lost)
    if call.plan.noise is not None:
        return hidden + call.plan.noise(unit, hidden, call.offset)
    noised: Tensor = unit(hidden, **call.tokens(hidden.device))
    return noised


def _expect_states(site: Site, hidden: Any) -> None:
    if not isinstance(hidden, Tensor) or hidden.dim() != 3:
        raise ValueError(
            f"{site}: expected hidden states [batch, length, width], got "
            f"{tuple(hidden.shape) if isinstance(hidden, Tensor) else type(hidden).__name__}"
        )


def _add_edits(
    units: Sequence[PlacedUnit], call: Call, hidden: Hidden, read: Hidden | None = None
) -> Hidden:
    """Add the edits of all units, all of the same states, which are `hidden` unless others are.

    Those of few positions are applied at once.
    """
    read = hidden if read is None else read
    if call.offset + call.length <= call.plan.cut or call.plan.choices.scale == 0.0:
        return hidden
    groups: dict[tuple[bool | str, bool], list[PlacedUnit]] = {}
    for placed in units:
        selection = call.plan.selections.get(placed.key)
        if selection is None or (call.is_decoding and not selection.decode):
            continue
        if hidden.shape[-1] != placed.unit.hidden_size:
            raise ValueError(
                f"{placed.site} has width {hidden.shape[-1]}, but its "
                f"{type(placed.unit).__name__} has embed_dim {placed.unit.hidden_size}: pass "
                f"embed_dim={hidden.shape[-1]}"
            )
        is_joint = selection.columns is not None
        is_low_rank = _is_low_rank(placed) and not _edits_rows(placed, call)
        groups.setdefault((is_joint or placed.key, is_low_rank), []).append(placed)
    edited = hidden
    for (_, is_low_rank), group in groups.items():
        edit = _edit_low_rank if is_low_rank else _edit_by_delta
        edited = edit(edited, read, group, call)
    return edited


def _ready_edit(units: Sequence[PlacedUnit], call: Call, hidden: Hidden) -> ReadyEdit | None:
    """The edit of a site in calls that read generated tokens alone; None where each makes its own.

    It has no mask, index or copy. Such calls edit all tokens or none.
    """
    if not call.is_decoding or torch.is_grad_enabled():
        return None
    acting = []
    for placed in units:
        if isinstance(placed.unit, NoiseIntervention):
            if call.is_noised:
                return None
        elif (selection := call.plan.selections.get(placed.key)) and selection.decode:
            acting.append(placed)
    if not acting or call.plan.choices.scale == 0.0:
        return lambda hidden: hidden
    [placed, *others] = acting
    is_alone = not others and _is_low_rank(placed) and not _edits_rows(placed, call)
    if not is_alone or hidden.shape[-1] != placed.unit.hidden_size:
        return None
    [edit] = _row_edits([placed], call, hidden)
    if (vector := edit.vector(hidden.dtype)) is not None:
        return vector.add
    return None if edit.dropout else edit.of_all


def _is_low_rank(placed: PlacedUnit) -> bool:
    """Whether the factors of a unit are at hand; FSDP2 gathers what is spread for its `delta`."""
    if isinstance(placed.unit, StackedEdit):
        return True
    return has_factors(placed.unit) and not is_spread(placed.unit)


def _edits_rows(placed: PlacedUnit, call: Call) -> bool:
    """Whether a unit reads all edited tokens of a row together: in training passes alone."""
    return isinstance(placed.unit, EditsRows) and placed.unit.training and call.is_noised


def _edit_low_rank(
    edited: Hidden, hidden: Hidden, units: Sequence[PlacedUnit], call: Call
) -> Hidden:
    """Add the edits of units, of which the factors are at hand, to their rows of `edited`."""
    rows = call.edited(units, hidden.device)
    edits = _row_edits(units, call, hidden)
    is_whole = rows.indices is None and rows.skipped is None
    # The gradient of many tokens is summed up in the wider dtype.
    is_exact = not torch.is_grad_enabled() or edits[0].factors.up.dtype is hidden.dtype
    if is_whole and is_exact and (vector := edits[0].vector(hidden.dtype)) is not None:
        return edited + vector
    flat, target = (states.reshape(-1, states.shape[-1]) for states in (hidden, edited))
    result = edit_rows(
        target,
        edits,
        rows,
        states=() if edited is hidden else (flat,),
        is_transformed=not torch.compiler.is_compiling() and is_transformed(),
    )
    return shaped_like(hidden, result)


def _row_edits(units: Sequence[PlacedUnit], call: Call, hidden: Hidden) -> list[RowEdit]:
    """The edits of units for the hidden states of a site."""
    choices, dtype, edits = call.plan.choices, hidden.dtype, []
    modules: list[Any] = [placed.unit for placed in units]
    if choices.arithmetic == "wide":
        for unit in modules:
            dtype = unit.wide_dtype(dtype)
    for placed, unit in zip(units, modules, strict=True):
        gates: Any = call.gates(placed.key)
        if gates is not None:
            columns = call.plan.selections[placed.key].columns
            slots = call.length if columns is None else columns.shape[1]
            gates = gates.to(hidden.device).repeat_interleave(slots, 0)
        edit = unit.row_edit(dtype, hidden.device, choices.scale, gates)
        if (strengths := call.strengths(placed.key)) is not None:
            if strengths.removed is not None and isinstance(unit, StackedEdit):
                raise ValueError(
                    "strengths: a direction is removed in some rows, and adapters by name share "
                    "one edit: expected the model's own units"
                )
            edit = strengths.of(edit)
        edits.append(edit)
    return edits


def _edit_by_delta(
    edited: Hidden, hidden: Hidden, units: Sequence[PlacedUnit], call: Call
) -> Hidden:
    """Add what any units say of `hidden`, times the scale, to their rows of `edited`.

    Rows that are skipped are added exact zeros, which keeps every shape static: no synchronisation
    with the device, and a NaN in padding stays where it is.
    """
    rows = call.edited(units, hidden.device)
    flat, target = (states.reshape(-1, states.shape[-1]) for states in (hidden, edited))
    states = rows.gather(flat)
    if rows.indices is None and rows.skipped is not None:
        states = states.masked_fill(rows.skipped, 0)
        if getattr(units[0].unit, "has_own_forward", False):  # which may divide by their norm
            states = torch.where(rows.skipped, flat.nan_to_num(), flat)
    shares = [_share(placed, call, hidden) for placed in units]
    parts = zip(units, rows.split(states), rows.split(rows.skipped), shares, strict=True)
    deltas = [_delta(unit, call, part, skipped, share) for unit, part, skipped, share in parts]
    delta = deltas[0] if len(deltas) == 1 else torch.cat(deltas)
    if rows.skipped is not None:
        delta = delta.masked_fill(rows.skipped, 0)
    if rows.indices is None:
        return shaped_like(hidden, target + delta)
    return shaped_like(hidden, target.index_add(0, rows.indices, delta))


def _share(placed: PlacedUnit, call: Call, hidden: Hidden) -> Float[Tensor, " rows"] | None:
    """How much of a unit's edit each row gets by its prompt; None for all of it."""
    unit: Any = placed.unit
    gate = gate_of(unit.unit if isinstance(unit, GatedUnit) else unit)
    if gate is None or not gate.reads_prompts:
        return None
    if isinstance(unit, GatedUnit) and unit.columns is not None:  # as its unit alone reads them
        hidden = taken_columns(hidden, unit.columns)
    return call.decision(placed.key, gate, hidden)


def _delta(
    placed: PlacedUnit,
    call: Call,
    hidden: Float[Tensor, "n hidden"],
    skipped: Bool[Tensor, "n 1"] | None,
    share: Float[Tensor, " rows"] | None,
) -> Float[Tensor, "n hidden"]:
    unit: Any = placed.unit
    scale = call.plan.choices.scale
    gates = call.gates(placed.key)
    delta: Tensor
    if _edits_rows(placed, call):
        call.expect_one_document(placed.key)
        by_row = hidden.view(call.rows, len(hidden) // call.rows, hidden.shape[-1])
        edited = torch.ones(by_row.shape[:2], dtype=torch.bool, device=hidden.device)
        if skipped is not None:
            edited = ~skipped.view(by_row.shape[:2])
        if not torch.compiler.is_compiling():
            unit.has_copies = is_in_ddp()
        delta, noted = unit.row_delta(by_row, edited, gates)
        call.plan.notes.add(placed.key, noted)
        delta, strengths = delta.flatten(0, 1), call.strengths(placed.key)
        return (delta if strengths is None else strengths.of_delta(delta)).to(hidden.dtype)
    options: dict[str, Any] = {}
    if isinstance(unit, GatedUnit) or gate_of(unit) is not None:  # which come after the scale
        options, scale = {"scale": scale if share is None else scale * share[:, None, None]}, 1.0
    if gates is None and share is None and not unit.has_own_forward:
        delta = unit.delta(hidden, **options)
    else:
        if isinstance(gates, Tensor):
            gates = gates.to(hidden.device)[:, None]
        by_row = hidden.view(call.rows, len(hidden) // call.rows, hidden.shape[-1])
        delta = unit.delta(by_row, gates, **options).flatten(0, 1)
    if (strengths := call.strengths(placed.key)) is not None:
        if getattr(gate_of(unit), "keeps_norm", False):
            raise ValueError(f"gate of {placed.key}: rows have strengths, which come before a norm")
        delta = strengths.of_delta(delta)
    return (delta if scale == 1.0 else scale * delta).to(hidden.dtype)
