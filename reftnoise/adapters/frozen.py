"""Adapters for inference: small at rest, side by side when they act."""

from collections import defaultdict
from collections.abc import Callable, Iterable, Sequence
from typing import NamedTuple

import torch
from jaxtyping import Float
from torch import Tensor, nn
from transformers import PreTrainedModel

from ..config.positions import Positions
from ..engine.base.sharding import device_of
from ..engine.base.sites import Site
from ..engine.units import PlacedUnit, place_units
from ..interventions import Factors, LowRankIntervention, NoiseIntervention, StackedEdit
from .directory import AdapterFiles
from .saving import load_weights


class Place(NamedTuple):
    """Where a unit edits. Units of several adapters at one place act as one."""

    site: Site
    positions: Positions
    prefix: int
    suffix: int


class Slot(NamedTuple):
    """A unit of an adapter without its weights."""

    place: Place
    rank: int
    """k, the rows of its factors."""
    width: int
    acts: tuple[tuple[str | None, int], ...]


class FrozenAdapter:
    """The units of an adapter in one tensor, without noise and dropout.

    Thousands may stand ready: each holds a tensor, and the slots, which equal adapters share.

    Args:
        slots: its units.
        weights: D, b and U of each unit, one after the other.
    """

    __slots__ = ("slots", "weights")

    def __init__(self, slots: tuple[Slot, ...], weights: Float[Tensor, " n"]) -> None:
        self.slots, self.weights = slots, weights

    @classmethod
    def of(cls, units: Iterable[PlacedUnit]) -> "FrozenAdapter":
        """Freeze units as they are now.

        Raises:
            ValueError: a unit of a class without `factors`.
        """
        parts: list[tuple[Place, Factors]] = []
        for one in units:
            if isinstance(one.unit, NoiseIntervention):
                continue
            if not isinstance(one.unit, LowRankIntervention):
                raise ValueError(
                    f"{type(one.unit).__name__} has no factors, so it cannot stand beside other "
                    "adapters: derive it from LowRankIntervention"
                )
            assert one.positions is not None
            place = Place(one.site, one.positions, one.prefix, one.suffix)
            with torch.no_grad():
                parts.append((place, one.unit.factors()))
        return cls._joined(parts)

    @classmethod
    def _joined(cls, parts: Iterable[tuple[Place, Factors]]) -> "FrozenAdapter":
        slots: list[Slot] = []
        tensors: list[Tensor] = []
        for place, (down, bias, up, acts) in parts:
            rank, width = down.shape
            slots.append(Slot(place, rank, width, acts))
            tensors += [down.flatten(), bias, up.flatten()]
        one_device = [tensor.to(tensors[0].device) for tensor in tensors]
        return cls(tuple(slots), torch.cat(one_device) if tensors else torch.empty(0))

    def factors(self) -> Iterable[tuple[Place, Factors]]:
        """The units, as views of the weights."""
        sizes = [n for s in self.slots for n in (s.rank * s.width, s.rank, s.rank * s.width)]
        parts = iter(self.weights.split_with_sizes(sizes))
        for slot in self.slots:
            down, bias, up = next(parts), next(parts), next(parts)
            shape = slot.rank, slot.width
            yield slot.place, Factors(down.view(shape), bias, up.view(shape), slot.acts)

    def part(self, keep: Callable[[Place], Place | None]) -> "FrozenAdapter":
        """Its units at the places that `keep` makes of theirs, without those that have none."""
        kept = ((keep(place), factors) for place, factors in self.factors())
        return self._joined((place, factors) for place, factors in kept if place is not None)


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
    with torch.random.fork_rng(devices=[]), torch.inference_mode(False), torch.no_grad():
        placed = place_units(adapter.config, base)  # draws weights
        units = nn.Module()
        units.interventions = nn.ModuleDict({one.key: one.unit for one in placed})
        load_weights(units, adapter)
        frozen = FrozenAdapter.of(placed)
    # Beside others in one product, it would make NaN of rows that are not its own.
    if not frozen.weights.isfinite().all():
        raise ValueError(f"{adapter.weights_path}: holds numbers that are not finite")
    return frozen


def stack(adapters: Sequence[FrozenAdapter]) -> list[PlacedUnit]:
    """Adapters as units of an engine; an adapter's number in the sequence is its gates' column."""
    found: dict[Place, list[tuple[int, Factors]]] = defaultdict(list)
    for number, adapter in enumerate(adapters):
        for place, factors in adapter.factors():
            found[place].append((number, factors))
    units = []
    for index, (place, parts) in enumerate(found.items()):
        owners, edits = zip(*parts, strict=True)
        key = f"{place.site}#{index}"
        stacked = StackedEdit(edits, owners).to(device_of(place.site.module) or edits[0].up.device)
        units.append(
            PlacedUnit(key, stacked, place.site, place.positions, place.prefix, place.suffix)
        )
    return units
