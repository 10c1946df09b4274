"""Put the units of a config at the sites of a model."""

from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import replace
from itertools import combinations

from transformers import PreTrainedModel

from .chunks import PlacedUnit
from .components import Site, find_site, hidden_size, num_layers, split_component
from .composition import inner_model
from .config import ReftConfig, RepresentationConfig
from .positions import Positions


def place_units(config: ReftConfig, model: PreTrainedModel) -> list[PlacedUnit]:
    """Build the units of a config at their sites in `model`.

    The order is that of pyvene's `unit_locations`: entry by entry, and within an untied entry all
    layers' prefixes before all layers' suffixes.

    Raises:
        ValueError: a layer out of range, a rank or width that does not fit, or two interventions
            at one site whose positions can overlap.
    """
    placed: list[PlacedUnit] = []
    counts = Counter[str]()
    for index, entry in enumerate(config.representations):
        try:
            layers = 0
            if entry.is_per_layer:
                layers = num_layers(model, split_component(entry.component)[0])
            for key, layer, positions in _places(entry, layers, counts):
                site = find_site(model, entry.component, layer)
                _expect_decoding(model, site, positions)
                unit = entry.build(site.width, default=hidden_size(model))
                placed.append(PlacedUnit(key, unit, site, positions))
        except ValueError as error:
            raise ValueError(f"representations[{index}]: {error}") from None
    modules = [
        e.intervention for e in config.representations if not isinstance(e.intervention, str)
    ]
    if len({id(module) for module in modules}) < len(modules):
        raise ValueError("one module serves two entries: give each entry a module of its own")
    return _disjoint(placed)


def _expect_decoding(model: PreTrainedModel, site: Site, positions: Positions | None) -> None:
    """Positions that no pass has would leave a unit without effect."""
    if positions is None or positions.spec() != "decode":
        return
    if not inner_model(model).can_generate() or site.stack == "encoder":
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
        for key, layer, positions in _places(entry, layers, counts):
            yield key, entry, layer, None if positions is None else str(positions.spec())


def place_name(entry: RepresentationConfig, layer: int | None) -> str:
    """An entry's place as its config has it: `block_output, layer 3`."""
    return entry.component if layer is None else f"{entry.component}, layer {layer}"


def _places(
    entry: RepresentationConfig, layers: int, counts: Counter[str]
) -> Iterator[tuple[str, int | None, Positions | None]]:
    """pyvene's key, layer and positions of each of an entry's units.

    Args:
        entry: of a config.
        layers: of the model.
        counts: units at each place that entries before it have.
    """
    numbers: Sequence[int | None] = entry.layers(layers) if entry.is_per_layer else [None]
    for positions in entry.parts():
        for layer in numbers:
            place = f"layer_{layer or 0}_comp_{entry.component.replace('.', '_')}_unit_pos_nunit_1"
            yield f"{place}#{counts[place]}", layer, positions
            counts[place] += 1


def _disjoint(placed: list[PlacedUnit]) -> list[PlacedUnit]:
    """Check that no token is edited twice at a site, and tell units of their neighbours."""
    by_site: dict[Site, list[tuple[str, Positions]]] = {}
    for one in placed:
        if one.positions is not None:
            by_site.setdefault(one.site, []).append((one.key, one.positions))
    for site, units in by_site.items():
        for (key, positions), (other_key, other) in combinations(units, 2):
            if positions.overlaps(other):
                raise ValueError(
                    f"positions {positions.spec()!r} of {key} and {other.spec()!r} of {other_key} "
                    f"can overlap at {site}: units at one site need disjoint positions"
                )
    return [
        one
        if one.positions is None
        else replace(
            one,
            prefix=max(positions.first for _, positions in by_site[one.site]),
            suffix=max(positions.last for _, positions in by_site[one.site]),
        )
        for one in placed
    ]
