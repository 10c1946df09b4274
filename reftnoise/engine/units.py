"""The units of a config at the sites of a model, and the parts of them that rows choose.

An adapter can be trained on several tasks, each in dimensions of its own, which are orthogonal in
R; at inference a row gets some of them, or the union (ReFT, arXiv:2404.03592, on composition).
"""

import logging
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import combinations
from typing import Any, TypeAlias

import torch
from jaxtyping import Float, Int
from torch import Tensor
from transformers import PreTrainedModel

from .._util.errors import warn_once
from ..config.components import split_component
from ..config.positions import Positions
from ..config.representations import ReftConfig, RepresentationConfig
from ..interventions import (
    GatedUnit,
    ReftIntervention,
    RowSubspaces,
    StackedEdit,
    Unit,
    has_factors,
    intervention_name,
)
from .base.peft import inner_model
from .base.sites import Site, can_generate, find_site, hidden_size, num_layers

logger = logging.getLogger(__name__)

Subspaces: TypeAlias = Sequence[Any] | Int[Tensor, "batch n"]
"""For each row its dimensions, or None for all; or such a list for each unit, as pyvene nests it;
or a tensor, padded with -1, of batch × dimensions or batch × units × dimensions."""


@dataclass(frozen=True)
class PlacedUnit:
    """A unit at its site."""

    key: str
    unit: Unit | StackedEdit | GatedUnit
    site: Site
    positions: Positions | None = None
    """None for noise."""
    prefix: int = 0
    """The largest prefix of any unit at this site, for the rule for short prompts."""
    suffix: int = 0
    """The largest suffix of any unit at this site."""
    names_positions: bool = True
    """Whether the entry says the positions, or leaves them to calls in pyreft's form."""
    overlap: str | None = None
    """Why each call has to say what the unit edits: its positions and another's can overlap."""
    place: str = ""
    """The place as the config has it, for messages; nothing where several adapters are one unit."""


def place_units(config: ReftConfig, model: PreTrainedModel) -> list[PlacedUnit]:
    """Build the units of a config at their sites in `model`.

    The order is that of pyvene's `unit_locations`: entry by entry, and within an untied entry all
    layers' prefixes before all layers' suffixes.

    Raises:
        ValueError: a layer out of range, a rank or width that does not fit, or two interventions
            at one site whose entries name positions that can overlap.
    """
    placed: list[PlacedUnit] = []
    counts = Counter[str]()
    default = hidden_size(model) if hasattr(inner_model(model), "config") else 0
    for index, entry in enumerate(config.representations):
        try:
            layers = 0
            if entry.is_per_layer:
                layers = num_layers(model, split_component(entry.component)[0])
            for key, layer, positions in _units_of(entry, layers, counts):
                site = find_site(model, entry.component, layer, entry.heads)
                _expect_decoding(model, site, positions)
                unit = entry.build(site.width, default, site.head_width)
                named = entry.names_positions
                place = place_name(entry, layer)
                placed.append(
                    PlacedUnit(key, unit, site, positions, names_positions=named, place=place)
                )
        except ValueError as error:
            raise ValueError(f"representations[{index}]: {error}") from None
    # A name gives each site a new unit; a module stays the same unit.
    if len({id(unit.unit) for unit in placed}) < len(placed):
        raise ValueError("one module serves two entries: give each entry a module of its own")
    _expect_names(placed)
    return _disjoint(placed)


def _expect_names(placed: Sequence[PlacedUnit]) -> None:
    """Warn of classes that no saved config can name, before they are trained."""
    for unit in placed:
        try:
            intervention_name(type(unit.unit))
        except ValueError as error:
            warn_once(logger, f"this model can be trained, but not saved: {error}")


def _expect_decoding(model: PreTrainedModel, site: Site, positions: Positions | None) -> None:
    """A ValueError for positions that no pass has: the unit would have no effect."""
    if positions is None or positions.spec() != "decode":
        return
    if not can_generate(model) or site.stack == "encoder":
        raise ValueError(
            f"positions 'decode': {type(inner_model(model)).__name__} writes no tokens at {site}; "
            "expected prompt positions such as 'f1+l1' or 'all'"
        )


def unit_keys(
    config: ReftConfig, layers: int
) -> Iterator[tuple[str, RepresentationConfig, int | None, str | None]]:
    """Key, entry, layer and positions of each unit that a model of so many layers would get."""
    counts = Counter[str]()
    for entry in config.representations:
        for key, layer, positions in _units_of(entry, layers, counts):
            yield key, entry, layer, None if positions is None else str(positions.spec())


def place_name(entry: RepresentationConfig, layer: int | None) -> str:
    """An entry's place as its config has it: `block_output, layer 3`, `head_output [1, 4], …`."""
    place = f"{entry.component} {entry.heads}" if entry.heads else entry.component
    return place if layer is None else f"{place}, layer {layer}"


def _units_of(
    entry: RepresentationConfig, layers: int, counts: Counter[str]
) -> Iterator[tuple[str, int | None, Positions | None]]:
    """pyvene's key, layer and positions of each of an entry's units; `counts` numbers the keys."""
    numbers: Sequence[int | None] = entry.layers(layers) if entry.is_per_layer else [None]
    for positions in entry.parts():
        for layer in numbers:
            name = f"layer_{layer or 0}_comp_{entry.component.replace('.', '_')}_unit_pos_nunit_1"
            yield f"{name}#{counts[name]}", layer, positions
            counts[name] += 1


def _disjoint(placed: list[PlacedUnit]) -> list[PlacedUnit]:
    """The units with the largest prefix and suffix at their sites; no token is edited twice."""
    edits = [(unit, unit.positions) for unit in placed if unit.positions is not None]
    sharing: dict[str, list[Positions]] = {unit.key: [positions] for unit, positions in edits}
    overlaps: dict[str, str] = {}
    for (unit, positions), (other, others) in combinations(edits, 2):
        if not unit.site.overlaps(other.site):
            continue
        sharing[unit.key].append(others)
        sharing[other.key].append(positions)
        if not positions.overlaps(others):
            continue
        overlap = (
            f"positions {positions.spec()!r} of {unit.key} and {others.spec()!r} of "
            f"{other.key} can overlap at {unit.site}: units at one site need disjoint positions"
        )
        if unit.names_positions and other.names_positions:
            raise ValueError(overlap)
        overlap += ", in the config or as unit_locations or intervention_locations of the call"
        overlaps[unit.key] = overlaps[other.key] = overlap
    return [
        unit
        if unit.positions is None
        else replace(
            unit,
            prefix=max(positions.first for positions in sharing[unit.key]),
            suffix=max(positions.last for positions in sharing[unit.key]),
            overlap=overlaps.get(unit.key),
        )
        for unit in placed
    ]


def subspace_gates(
    subspaces: Subspaces, units: Sequence[PlacedUnit], batch: int, device: torch.device
) -> dict[str, Float[Tensor, "batch rank"] | RowSubspaces]:
    """By unit key, 1 for dimensions that a row's edit has and 0 for the others.

    A unit with a `forward` of its own gets each row's dimensions, or whatever else its part is.

    Raises:
        ValueError: another nesting, or a dimension that a unit does not have.
    """
    edits = [placed for placed in units if placed.positions is not None]
    wrong = ValueError(
        f"subspaces {subspaces!r}: expected the dimensions of each of {batch} rows, or None for "
        f"all; or a list of such for each of {len(edits)} units"
    )
    nested: Any = subspaces
    if isinstance(subspaces, Tensor):
        nested = (subspaces.transpose(0, 1) if subspaces.dim() == 3 else subspaces).tolist()
    is_by_unit = _is_list(nested) and any(isinstance(part, Mapping) for part in nested)
    if _depth(nested) < 3 and not is_by_unit:
        nested = [nested] * len(edits)
    if not _is_list(nested) or len(nested) != len(edits):
        raise wrong
    by_key: dict[str, Tensor | RowSubspaces] = {}
    for placed, rows in zip(edits, nested, strict=True):
        if rows is None:
            continue
        unit = placed.unit
        if isinstance(unit, ReftIntervention) and unit.has_own_forward:
            by_key[placed.key] = _of_own_forward(unit, rows)
            continue
        if not _is_list(rows) or len(rows) != batch:
            raise wrong
        if not has_factors(unit) or not unit.has_subspaces:
            raise ValueError(f"subspaces: {type(unit).__name__} has no subspace to edit a part of")
        rank = int(unit.low_rank_dimension or 0)
        gates = torch.zeros(batch, rank)
        for gate, dimensions in zip(gates, rows, strict=True):
            if dimensions is not None and not _is_list(dimensions):
                raise wrong
            chosen = range(rank) if dimensions is None else [i for i in dimensions if i != -1]
            if not all(type(i) is int and 0 <= i < rank for i in chosen):
                raise ValueError(
                    f"subspaces {dimensions!r}: {placed.key} has dimensions 0 to {rank - 1}"
                )
            gate[list(chosen)] = 1.0
        by_key[placed.key] = gates.to(device)
    return by_key


def _of_own_forward(unit: ReftIntervention, rows: Any) -> RowSubspaces:
    """What `forward` gets: lists without padding, all dimensions for None, the rest as it is."""
    whole = list(range(unit.low_rank_dimension or 0))

    def dimensions(row: Any) -> Any:
        return [i for i in row if i != -1] if _is_list(row) else whole if row is None else row

    return RowSubspaces([dimensions(row) for row in rows] if _is_list(rows) else rows)


def _is_list(value: Any) -> bool:
    return isinstance(value, Sequence) and not isinstance(value, str)


def _depth(nested: Any) -> int:
    if not _is_list(nested):
        return 0
    return 1 + max((_depth(part) for part in nested), default=0)
