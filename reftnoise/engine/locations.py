"""Places that come with a call and are edited instead of the config's positions."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar, TypeAlias

import torch
from jaxtyping import Int
from torch import Tensor

from ..config.positions import Positions
from .layout import UnitLocations


@dataclass(frozen=True)
class EveryColumn:
    """All columns of the input, those of padding too, and what generation appends."""

    decode: ClassVar[bool] = True


EditedPlace: TypeAlias = Positions | EveryColumn | Int[Tensor, "batch positions"]
"""What a unit edits: positions, which each prompt resolves, or columns of the input."""
EditedPlaces: TypeAlias = Mapping[str, EditedPlace]
"""By key of the units that edit."""


def parse_unit_locations(
    unit_locations: UnitLocations, interventions: int, batch: int, width: int | None
) -> list[EditedPlace | None]:
    """Read pyvene's `{"sources->base": (None, locations)}`.

    `locations` nests interventions × batch × positions; None instead of an intervention's part
    leaves it out, and a single integer stands for that column everywhere. `Positions` instead of
    a part are resolved as a config's are; `EveryColumn` may stand there, too.

    Args:
        unit_locations: the mapping.
        interventions: number of units that edit.
        batch: number of rows.
        width: columns of the input; None where only its pass tells.

    Returns:
        Each intervention's place. Equal columns are one tensor.

    Raises:
        ValueError: another nesting, or a column outside the input.
    """
    expected = (
        f"expected {{'sources->base': (None, locations)}} with locations nested as "
        f"{interventions} interventions × {batch} rows × positions"
    )
    try:
        _, locations = unit_locations["sources->base"]
    except (KeyError, TypeError, ValueError):
        raise ValueError(f"unit_locations {unit_locations!r}: {expected}") from None
    if isinstance(locations, int):
        locations = [[[locations]] * batch] * interventions
    if isinstance(locations, Tensor) and locations.dim():
        locations = list(locations.cpu())  # one wait for the device, and not one for each unit
    if not isinstance(locations, list | tuple) or len(locations) != interventions:
        raise ValueError(f"unit_locations {locations!r}: {expected}")
    parsed: list[EditedPlace | None] = []
    known: dict[tuple[object, bytes], Tensor] = {}
    for index, part in enumerate(locations):
        if isinstance(part, Positions | EveryColumn | None):
            parsed.append(part)
            continue
        try:
            columns = torch.as_tensor(part).cpu()
        except (RuntimeError, TypeError, ValueError):
            columns = torch.empty(0)
        if columns.dim() != 2 or columns.shape[0] != batch or not holds_columns(columns):
            raise ValueError(f"unit_locations of intervention {index}, {part!r}: {expected}")
        columns = columns.long()
        if width is not None and ((columns < 0) | (columns >= width)).any():
            raise ValueError(
                f"unit_locations of intervention {index}, {part!r}: expected columns from 0 to "
                f"{width - 1}, the input's last"
            )
        if not torch.compiler.is_compiling():
            columns = known.setdefault((columns.shape, columns.numpy().tobytes()), columns)
        parsed.append(columns)
    return parsed


def holds_columns(locations: Tensor) -> bool:
    """Whether a tensor holds integers: a mask, for one, says other things than columns."""
    is_number = locations.is_floating_point() or locations.is_complex()
    return not is_number and locations.dtype != torch.bool


def has_columns(unit_locations: UnitLocations) -> bool:
    """Whether a call's places are columns, which are of its own input alone."""
    places = unit_locations.get("sources->base", (None, None))[1]
    if not isinstance(places, list | tuple):
        return True
    return not all(isinstance(place, Positions | EveryColumn | None) for place in places)
