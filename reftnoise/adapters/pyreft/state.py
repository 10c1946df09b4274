"""One unit's state as pyreft pickles it ↔ the name of our class, its arguments and its state."""

import functools
import logging
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.utils.parametrizations import orthogonal

from ...interventions import (
    ConsreftIntervention,
    DireftIntervention,
    LobireftIntervention,
    LoreftIntervention,
    NodireftIntervention,
    NoreftIntervention,
    ReftIntervention,
    intervention_name,
    orthonormal_rows,
)
from ...interventions.arguments import dtype_name
from ...interventions.pyreft_layers import BUFFERS, PLAIN, RAW, SOURCE, without_rotation
from ...interventions.rotation import LARGEST_ROUNDING, distance_from_orthonormal

logger = logging.getLogger(__name__)

CLASSES: dict[str, type[ReftIntervention]] = {
    unit_class.__name__: unit_class
    for unit_class in (
        LoreftIntervention,
        NoreftIntervention,
        DireftIntervention,
        NodireftIntervention,
        ConsreftIntervention,
        LobireftIntervention,
    )
}
"""The classes that pyreft has too, by the name that both use."""

# With R in place of W₂, and W₁ = 0 where the source is constant, these compute the same.
_UNCONSTRAINED: dict[type[ReftIntervention], type[ReftIntervention]] = {
    LoreftIntervention: NoreftIntervention,
    ConsreftIntervention: NoreftIntervention,
    DireftIntervention: NodireftIntervention,
    LobireftIntervention: NodireftIntervention,
}

_PROJECTION = "proj_layer.weight"


def from_pyreft_state(
    unit_class: type[ReftIntervention], pickled: Mapping[str, Tensor], where: str
) -> tuple[dict[str, Any], dict[str, Tensor], int]:
    """Read a state of pyreft, or of one of our classes that pyvene saved.

    An R that is not orthonormal is kept as the unconstrained class that computes the same, with a
    warning that begins with `where`.

    Returns:
        The entry of a config: name, rank, dtype and `add_bias`; the state of our class; the width.

    Raises:
        ValueError: a tensor is missing, too many or of another shape.
    """
    arguments: dict[str, Any] = {}
    state, rotation = without_rotation(pickled)
    if rotation is not None:
        error = distance_from_orthonormal(rotation)
        if error <= LARGEST_ROUNDING:
            state[RAW] = rotation / 2
        elif unit_class in _UNCONSTRAINED:
            source = state.pop("learned_source", None)
            if source is not None:
                state[SOURCE["weight"]] = torch.zeros_like(rotation)
                state[SOURCE["bias"]] = source
                arguments["act_fn"] = None  # as in the class that it was
            unit_class = _UNCONSTRAINED[unit_class]
            state[_PROJECTION] = rotation
            logger.warning(
                "%s: R is not orthonormal (RRᵀ − I reaches %.1g), as pyreft leaves it under weight "
                "decay or when it trains a loaded adapter; kept as %s, which computes the same",
                *(where, error, intervention_name(unit_class)),
            )
    if unit_class is NodireftIntervention and state.pop("proj_layer.bias", None) is not None:
        logger.warning("%s: leaves out W2's bias, which NoDiReFT never reads", where)
    basis = state.get(RAW, state.get(_PROJECTION))
    if basis is None or basis.dim() != 2:
        held = ", ".join(pickled) or "no tensors"
        raise ValueError(f"no matrix of {unit_class.__name__} among {held}")
    rank, width = basis.shape
    dtypes = [tensor.dtype for name, tensor in state.items() if name != RAW]
    arguments["low_rank_dimension"] = rank
    arguments["dtype"] = dtype_name(functools.reduce(torch.promote_types, dtypes or [basis.dtype]))
    if "proj_layer.bias" in state:
        arguments["add_bias"] = True
    expected = unit_class(embed_dim=width, **arguments).state_dict()
    for name in sorted(expected.keys() | state.keys()):
        shapes = [tuple(s[name].shape) if name in s else None for s in (state, expected)]
        if shapes[0] != shapes[1]:
            raise ValueError(
                f"{name} has shape {shapes[0]}, {unit_class.__name__} of rank {rank} and width "
                f"{width} needs {shapes[1]}"
            )
    return {"intervention": intervention_name(unit_class), **arguments}, state, width


def to_pyreft_state(unit: ReftIntervention) -> dict[str, Tensor]:
    """The state that pyreft's class of the same name would save, R in fp32 as there.

    Raises:
        ValueError: the unit has no R, because the rows of its X are linearly dependent.
    """
    state: dict[str, Tensor] = unit.state_dict()
    raw = state.pop(RAW, None)
    if raw is not None:
        basis = orthonormal_rows(raw).float().mT.contiguous()
        if not basis.isfinite().all():
            raise ValueError(f"{RAW} has linearly dependent rows")
        if isinstance(unit, LoreftIntervention):
            return {name: state[own] for name, own in SOURCE.items()} | {PLAIN: basis}
        layer = nn.Linear(basis.shape[1], basis.shape[0], bias=False, device="meta")
        layer.weight = nn.Parameter(basis)
        state |= {f"{PLAIN}.{n}": t for n, t in orthogonal(layer).state_dict().items()}
    return {name: torch.tensor(unit.hidden_size) for name in BUFFERS} | state
