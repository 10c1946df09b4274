"""pyvene's ways to say columns and dimensions, as nested lists: interventions × batch × …."""

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from jaxtyping import Int
from torch import Tensor

from ..._util.errors import brief
from ...engine.locations import holds_columns


def nested_locations(unit_locations: Any, interventions: int, rows: int) -> Any:
    """The locations of the base in a mapping: columns of each intervention and row.

    `{"base": 3}` is column 3 of every row for every intervention, `{"base": [0, 2, 4]}` are three
    columns; of two integers, as in `{"sources->base": (1, 2)}`, the second is of the base.

    Args:
        unit_locations: a mapping with `base` or `sources->base`.
        interventions: number of units that edit.
        rows: number of rows.

    Returns:
        The nested list; None for something else.
    """
    if not isinstance(unit_locations, Mapping):
        return None
    key = "base" if "base" in unit_locations else "sources->base"
    value: Any = unit_locations.get(key)
    is_pair = isinstance(value, list | tuple) and len(value) == 2
    if is_pair and isinstance(value[1], int) and isinstance(value[0], int | None):
        value = value[1]
    if isinstance(value, int):
        value = [value]
    if isinstance(value, list) and value and all(isinstance(column, int) for column in value):
        return [[value] * rows] * interventions
    if key == "sources->base":
        value = value[1] if is_pair else None
    return list(value) if isinstance(value, Tensor) and value.dim() else value


def nested_subspaces(subspaces: Any, interventions: int, rows: int) -> Any:
    """The subspaces of a call: one dimension, or several, are those of each row and intervention.

    A tensor of three axes is interventions × batch × dimensions here.
    """
    if isinstance(subspaces, int):
        subspaces = [subspaces]
    if isinstance(subspaces, Tensor) and subspaces.dim() == 3:
        return subspaces.tolist()
    if isinstance(subspaces, list) and subspaces and isinstance(subspaces[0], int):
        return [[subspaces] * rows] * interventions
    return subspaces


def by_unit(locations: Any, interventions: int, rows: int) -> Int[Tensor, "units batch positions"]:
    """A column `intervention_locations`, batch × interventions × positions, by intervention.

    Raises:
        ValueError: another nesting.
    """
    try:
        columns = torch.as_tensor(locations)
    except (RuntimeError, TypeError, ValueError):
        columns = torch.empty(0)
    is_nested = columns.dim() == 3 and columns.shape[:2] == (rows, interventions)
    if not (is_nested and holds_columns(columns)):
        what = tuple(locations.shape) if isinstance(locations, Tensor) else brief(locations)
        raise ValueError(
            f"intervention_locations {what}: expected {rows} rows × {interventions} interventions "
            "× positions, as many for each"
        )
    return columns.permute(1, 0, 2)


def subspaces_by_unit(subspaces: Any) -> Any:
    """Subspaces that come with `intervention_locations`, by intervention as these are.

    Raises:
        ValueError: rows of different numbers of interventions.
    """
    nested = subspaces.tolist() if isinstance(subspaces, Tensor) else subspaces
    if not isinstance(nested, Sequence):
        return subspaces  # the engine's error says what it is
    is_by_row = all(
        isinstance(row, Sequence) and any(isinstance(part, Sequence) for part in row)
        for row in nested
    )
    if not is_by_row:
        return subspaces  # dimensions of each row, for all interventions
    if len({len(row) for row in nested}) > 1:
        raise ValueError(
            f"subspaces {brief(subspaces)}: expected rows × interventions × dimensions, as the "
            "intervention_locations that come with them"
        )
    return [list(unit) for unit in zip(*nested, strict=True)]


def without_repeats(part: Any, index: int, rows: int) -> Any:
    """One intervention's columns with a row for each prompt, from one for each of its beams.

    Returns:
        A tensor, or what is none as it is: its form is for the engine's error to show.

    Raises:
        ValueError: beams of one prompt with columns of their own.
    """
    try:
        columns = torch.as_tensor(part)
    except (RuntimeError, TypeError, ValueError):
        return part
    count = len(columns) if columns.dim() == 2 else 0
    if count < rows or count % rows:
        return part
    beams = columns.view(rows, count // rows, -1)
    if (beams != beams[:, :1]).any():
        raise ValueError(
            f"unit_locations of intervention {index}, {brief(part)}: has {count} rows for "
            f"{rows} prompts, expected one for each, or the same for all beams of a prompt"
        )
    return beams[:, 0]
