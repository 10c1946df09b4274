"""Adapters for inference: small at rest, and one edit when several of them act."""

import copy
from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, replace

import torch
from jaxtyping import Float
from torch import Tensor, nn
from transformers import PreTrainedModel

from ..config.positions import Positions
from ..engine.base.sharding import device_of
from ..engine.base.sites import Site
from ..engine.units import PlacedUnit, place_units
from ..interventions import (
    Activation,
    Factors,
    GatedUnit,
    NoiseIntervention,
    StackedEdit,
    has_factors,
)
from .directory import AdapterFiles
from .saving import buildable_config, load_weights
from .vocabulary import expect_rows


@dataclass(frozen=True)
class UnitShape:
    """A unit of an adapter without its weights; the first four fields are as in `PlacedUnit`."""

    site: Site
    positions: Positions
    prefix: int
    suffix: int
    rank: int
    """k, the rows of its factors."""
    width: int
    acts: tuple[tuple[str | Activation | None, int], ...]
    diagonals: int = 0
    """n, the rows of their diagonal part."""
    has_probe: bool = False
    keeps_norm: bool = False
    """Whether its gate makes edited states as long as they were."""

    @property
    def sizes(self) -> list[torch.Size]:
        """The shapes of its tensors."""
        rows = torch.Size((self.rank, self.width))
        diagonal = [torch.Size((self.diagonals, self.width))] if self.diagonals else []
        probe = [torch.Size((1, self.width + 1))] if self.has_probe else []
        return [rows, rows[:1], rows, *diagonal, *probe]


class FrozenAdapter:
    """The units of an adapter in one tensor, without noise and dropout.

    Thousands may be loaded: each holds a tensor, and the shapes, which equal adapters share.

    Args:
        shapes: the units without their weights.
        weights: D, b, U, and S and a probe where there is one, of each unit, one after the other.
        others: units that have no factors, as they are.
    """

    __slots__ = ("others", "shapes", "weights")

    def __init__(
        self,
        shapes: tuple[UnitShape, ...],
        weights: Float[Tensor, " n"],
        others: tuple[PlacedUnit, ...] = (),
    ) -> None:
        self.shapes, self.weights, self.others = shapes, weights, others

    @classmethod
    @torch.no_grad()
    def of(cls, units: Iterable[PlacedUnit]) -> "FrozenAdapter":
        """Freeze units as they are now, but for those without factors.

        Raises:
            ValueError: the positions of a unit overlap another's.
        """
        parts: list[tuple[UnitShape, Factors]] = []
        others: list[PlacedUnit] = []
        for placed in units:
            unit = placed.unit
            if isinstance(unit, NoiseIntervention):
                continue
            if placed.overlap is not None:
                raise ValueError(placed.overlap)
            if not has_factors(unit):
                others.append(placed)
                continue
            assert placed.positions is not None
            if unit.training:  # in which factors may be random
                unit = copy.copy(unit)
                unit.training = False
            factors = unit.gated_factors()
            place = (placed.site, placed.positions, placed.prefix, placed.suffix)
            rank, width = factors.down.shape
            rows = 0 if factors.diagonal is None else len(factors.diagonal)
            more = rows, factors.probe is not None, unit.keeps_norm
            parts.append((UnitShape(*place, rank, width, factors.acts, *more), factors))
        return cls._joined(parts, others)

    @classmethod
    @torch.no_grad()
    def _joined(
        cls, parts: Sequence[tuple[UnitShape, Factors]], others: Iterable[PlacedUnit]
    ) -> "FrozenAdapter":
        tensors = [tensor.flatten() for _, factors in parts for tensor in factors.tensors]
        on_one_device = [tensor.to(tensors[0].device) for tensor in tensors]
        weights = torch.cat(on_one_device) if tensors else torch.empty(0)
        return cls(tuple(shape for shape, _ in parts), weights, tuple(others))

    def factors(self) -> Iterator[tuple[UnitShape, Factors]]:
        """The units, as views of the weights."""
        sizes = [size for unit in self.shapes for size in unit.sizes]
        parts = iter(self.weights.split_with_sizes([size.numel() for size in sizes]))
        for unit in self.shapes:
            down, bias, up, *more = (next(parts).view(size) for size in unit.sizes)
            diagonal, probe = (
                more[0] if unit.diagonals else None,
                more[-1] if unit.has_probe else None,
            )
            yield unit, Factors(down, bias, up, unit.acts, False, diagonal, probe)

    def part(self, keep: Callable[[Site, Positions], Positions | None]) -> "FrozenAdapter":
        """The adapter's units at the positions that `keep` returns, without those of None."""
        kept = ((unit, keep(unit.site, unit.positions), f) for unit, f in self.factors())
        others = (
            replace(other, positions=p, unit=copy.deepcopy(other.unit))
            for other in self.others
            if other.positions and (p := keep(other.site, other.positions)) is not None
        )
        parts = [(replace(unit, positions=p), f) for unit, p, f in kept if p is not None]
        return self._joined(parts, others)


def freeze(adapter: AdapterFiles, base: PreTrainedModel) -> FrozenAdapter:
    """A saved adapter for inference on a base.

    Raises:
        ValueError: the adapter has weights of the base, is damaged, or does not fit the base.
    """
    if adapter.config.peft is not None or adapter.base_parameters:
        own = "a peft section" if adapter.config.peft else adapter.base_parameters[0]
        raise ValueError(
            f"{adapter.config_path}: has {own}, and rows of a batch share the base's weights: "
            "adapters are loaded by name if they edit hidden states alone"
        )
    buildable_config(adapter, base)
    if adapter.config.token_rows is not None:
        expect_rows(adapter, adapter.weights(), base)
    with torch.random.fork_rng(devices=[]), torch.inference_mode(False), torch.no_grad():
        placed_units = place_units(adapter.config, base)  # draws weights
        units = nn.Module()
        units.interventions = nn.ModuleDict({placed.key: placed.unit for placed in placed_units})
        load_weights(units.eval().requires_grad_(False), adapter)
        try:
            frozen = FrozenAdapter.of(placed_units)
        except ValueError as error:
            raise ValueError(f"{adapter.config_path}: {error}") from None
    # In one product with others, they would make NaN of rows that have another adapter.
    others = (t for placed in frozen.others for t in placed.unit.parameters())
    if not all(tensor.isfinite().all() for tensor in (frozen.weights, *others)):
        raise ValueError(f"{adapter.weights_path}: holds numbers that are not finite")
    return frozen


def stacked_units(adapters: Sequence[FrozenAdapter]) -> list[PlacedUnit]:
    """Adapters as units of an engine; an adapter's number in the sequence is its gates' column."""
    by_place = defaultdict[
        tuple[tuple[Site, Positions, int, int], bool], list[tuple[int, Factors]]
    ](list)
    for number, adapter in enumerate(adapters):
        for unit, factors in adapter.factors():
            # All heads of an attention are in one product; a norm is that of the unit's own heads.
            site = unit.site if unit.keeps_norm else unit.site.whole
            place = (site, unit.positions, unit.prefix, unit.suffix)
            whole = factors
            if site != unit.site and unit.site.columns is not None and site.width is not None:
                whole = factors.spread_to(unit.site.columns, site.width)
            by_place[place, unit.keeps_norm].append((number, whole))
    units = []
    for index, ((place, keeps_norm), parts) in enumerate(by_place.items()):
        site, (owners, edits) = place[0], zip(*parts, strict=True)
        stacked = StackedEdit(edits, owners, keeps_norm).to(
            device_of(site.module) or edits[0].up.device
        )
        units.append(PlacedUnit(f"{site}#{index}", stacked, *place))
    for owner, adapter in enumerate(adapters):
        for other in adapter.others:
            site = other.site.whole
            gated = GatedUnit(other.unit, owner, other.site.columns, site.width)
            gated = gated.to(device=device_of(site.module))
            units.append(replace(other, key=f"{other.key}@{owner}", unit=gated, site=site))
    return units
