"""Parts of a unit's subspace, chosen for each row of a batch.

One adapter can be trained on several tasks, each in dimensions of its own, which are orthogonal in
R; at inference a row gets some of them, or the union (ReFT, arXiv:2404.03592, on composition).
"""

from collections.abc import Sequence
from typing import Any, TypeAlias

import torch
from jaxtyping import Float, Int
from torch import Tensor

from .chunks import PlacedUnit
from .interventions import LowRankIntervention

Subspaces: TypeAlias = Sequence[Any] | Int[Tensor, "batch n"]
"""For each row its dimensions, or None for all; or such a list for each unit, as pyvene nests it;
or a tensor, padded with -1."""


def subspace_gates(
    subspaces: Subspaces, units: Sequence[PlacedUnit], batch: int, device: torch.device
) -> dict[str, Float[Tensor, "batch rank"]]:
    """By unit key, 1 for dimensions that a row's edit has and 0 for the others.

    Raises:
        ValueError: another nesting, or a dimension that a unit does not have.
    """
    edits = [one for one in units if one.positions is not None]
    nested: Any = subspaces.tolist() if isinstance(subspaces, Tensor) else subspaces
    if _depth(nested) < 3:
        nested = [nested] * len(edits)
    if not _is_list(nested) or len(nested) != len(edits):
        raise _wrong(subspaces, len(edits), batch)
    found = {}
    for one, rows in zip(edits, nested, strict=True):
        if rows is None:
            continue
        if not _is_list(rows) or len(rows) != batch:
            raise _wrong(subspaces, len(edits), batch)
        unit = one.unit
        if not isinstance(unit, LowRankIntervention) or not unit.has_subspaces:
            raise ValueError(f"subspaces: {type(unit).__name__} has no subspace to edit a part of")
        rank = int(unit.low_rank_dimension or 0)
        gates = torch.zeros(batch, rank)
        for gate, dimensions in zip(gates, rows, strict=True):
            if dimensions is not None and not _is_list(dimensions):
                raise _wrong(subspaces, len(edits), batch)
            chosen = range(rank) if dimensions is None else [i for i in dimensions if i != -1]
            if not all(type(i) is int and 0 <= i < rank for i in chosen):
                raise ValueError(
                    f"subspaces {dimensions!r}: {one.key} has dimensions 0 to {rank - 1}"
                )
            gate[list(chosen)] = 1.0
        found[one.key] = gates.to(device)
    return found


def _is_list(value: Any) -> bool:
    return isinstance(value, Sequence) and not isinstance(value, str)


def _depth(nested: Any) -> int:
    if not _is_list(nested):
        return 0
    return 1 + max((_depth(part) for part in nested), default=0)


def _wrong(subspaces: Any, units: int, batch: int) -> ValueError:
    return ValueError(
        f"subspaces {subspaces!r}: expected the dimensions of each of {batch} rows, or None for "
        f"all; or a list of such for each of {units} units"
    )
