"""The intervention of a config's entry: a registered name, or a module that is ready."""

import inspect
import warnings
from collections.abc import Mapping
from typing import Any, TypeAlias

from .._util.errors import brief
from ..interventions import (
    INTERVENTIONS,
    NoiseIntervention,
    Unit,
    adopt,
    gate_class,
    intervention_class,
    intervention_name,
)
from ..interventions.arguments import constructor_arguments
from ..interventions.base import is_intervention
from .components import split_component
from .values import plain, plain_if_possible

_METHODS_OF_PEFT = {"lora", "dora", "adalora", "vera", "ia3", "oft", "boft", "loha", "lokr"}

# Keys of an entry that are no arguments of its class, even where it has some of that name.
_OF_PLACES = {"layer", "component", "heads", "embed_dim", "head_width", "positions", "tied"}
_PLAIN = (str, int, float, list, tuple, dict)

# Fields of pyvene that change nothing where units read one input alone, in positions of one layer.
_UNREAD_FIELDS = {"group_key", "intervention_link_key", "moe_key", "subspace_partition"}
_UNREAD_FIELDS |= {"source_representation", "hidden_source_representation", "latent_dim"}


EntryIntervention: TypeAlias = str | Unit
"""A registered name, of which each site gets a new unit; or a module, which serves one site."""


def unit_class_of(intervention: EntryIntervention) -> type[Unit]:
    """The class of an entry's units."""
    return intervention_class(intervention) if isinstance(intervention, str) else type(intervention)


def entry_arguments(intervention: EntryIntervention, values: Mapping[str, Any]) -> dict[str, Any]:
    """All arguments of an entry's units as plain values, defaults filled in.

    Args:
        intervention: the entry's intervention.
        values: the arguments that the entry has; those of a module must be the module's.
    """
    if isinstance(intervention, Unit):
        own = {
            key: plain_if_possible(value)
            for key, value in intervention.arguments().items()
            if key not in _OF_PLACES
        }
        for key, value in values.items():
            if key == "low_rank_dimension":
                _warn_of_other_rank(intervention, own.get(key), value)
            else:
                _expect_same(intervention, key, own.get(key), value)
        return own
    unit_class = intervention_class(intervention)
    filled = {**argument_defaults(unit_class), **values}
    for key, value in filled.items():
        if value is inspect.Parameter.empty:
            raise ValueError(f"{unit_class.__name__} needs {key!r}")
    return {key: plain(value, key) for key, value in filled.items()}


def expect_one_site(module: Unit, *, layer: object, parts: int, width: int | None) -> None:
    """Raise a ValueError where a module would have to serve several sites, or another width."""
    if parts > 1:
        raise ValueError("tied False needs two sets of weights: name the intervention instead")
    if not isinstance(layer, int | None):
        raise ValueError(
            f"layer {layer!r} with a ready {type(module).__name__}: a module serves one "
            "layer; name the intervention, or give one entry per layer"
        )
    if width is not None and not isinstance(module, NoiseIntervention):
        _expect_same(module, "embed_dim", module.hidden_size, width)


def unsayable(module: Unit) -> set[str]:
    """The arguments of a module's constructor that no file can say.

    A class with a `forward` of its own is saved without them, with a warning.

    Raises:
        ValueError: there are some, of another class.
    """
    arguments = {key: plain_if_possible(value) for key, value in module.arguments().items()}
    unsaid = {
        key
        for key, value in arguments.items()
        if not isinstance(value, _PLAIN) and value is not None
    }
    unsaid |= constructor_arguments(type(module)).keys() - arguments.keys() - {"embed_dim"}
    if not unsaid:
        return unsaid
    problem = (
        f"{', '.join(sorted(unsaid))} of {type(module).__name__}: no file can say it; expected a "
        "plain value in an attribute of that name"
    )
    if not getattr(module, "has_own_forward", False):
        raise ValueError(problem)
    warnings.warn(f"{problem}. Its weights are saved without it", stacklevel=3)
    return unsaid


def _warn_of_other_rank(module: Unit, own: int | None, value: Any) -> None:
    if own not in (None, value):
        warnings.warn(
            f"low_rank_dimension {value!r} with a ready {type(module).__name__} of rank {own}, "
            "which holds",
            stacklevel=2,
        )


def _expect_same(module: Unit, key: str, own: Any, value: Any) -> None:
    if own is not value and own != value:
        raise ValueError(
            f"{key} {value!r} with a ready {type(module).__name__} whose {key} is {own!r}: set it "
            "in the module"
        )


def pop_intervention(entry: dict[str, Any]) -> EntryIntervention:
    """Take the intervention, and pyvene's fields that have one meaning here, out of an entry.

    Raises:
        ValueError: no intervention, two, or one that is neither a registered name nor a module; or
            a field with another value.
    """
    value, its_type = entry.pop("intervention", None), entry.pop("intervention_type", None)
    if value is not None and its_type is not None:
        raise ValueError("'intervention' and 'intervention_type' say the same: give one")
    if value is None and its_type is None:
        if "peft_type" in entry:
            raise _of_peft(f"peft_type {entry['peft_type']!r}")
        raise ValueError(
            "expected an 'intervention': a registered name such as 'loreft', or a ready module"
        )
    value = intervention_name(its_type) if value is None else _unit(value, entry)
    _drop_fields_of_pyvene(value, entry)
    if isinstance(value, Unit):
        return value
    if isinstance(value, type):
        raise ValueError(f"intervention {value.__name__}: expected an instance or a name")
    if not isinstance(value, str):
        raise ValueError(
            f"intervention {brief(value)}: expected a registered name, or a module derived from "
            "ReftIntervention or NoiseIntervention"
        )
    if value.lower() in _METHODS_OF_PEFT and value not in INTERVENTIONS:
        raise _of_peft(f"intervention {value!r}")
    intervention_class(value)
    return value


def _unit(value: Any, entry: Mapping[str, Any]) -> Any:
    """The value, adopted if it is a module of one of pyvene's classes."""
    if is_intervention(type(value)) and not isinstance(value, Unit):
        adopt(value, entry.get("low_rank_dimension"))
    return value


def _drop_fields_of_pyvene(intervention: Any, entry: dict[str, Any]) -> None:
    """Take fields out of an entry that have no effect here, as in pyreft, or one meaning.

    Raises:
        ValueError: another unit than positions, or several together.
    """
    is_ready = isinstance(intervention, Unit)
    for key, only in (("unit", "pos"), ("max_number_of_units", 1)):
        field = entry.pop(key, only)
        if field != only and not (is_ready and key == "max_number_of_units"):
            raise ValueError(f"{key} {field!r}: only {only!r} is supported; see 'positions'")
    named = INTERVENTIONS.get(intervention) if isinstance(intervention, str) else None
    for key in _UNREAD_FIELDS - set(getattr(named, "entry_defaults", ())):
        entry.pop(key, None)


def read_gate(gate: Any, component: str) -> dict[str, Any] | None:
    """The gate of an entry, or None where it has none.

    Raises:
        ValueError: no mapping, an unknown type or argument, or one that the component cannot have.
    """
    if gate is None:
        return None
    values = {"type": gate} if isinstance(gate, str) else gate
    if not isinstance(values, dict) or "type" not in values:
        raise ValueError(f"gate {brief(gate)}: expected a mapping such as {{'type': 'probe'}}")
    cls = gate_class(values["type"])
    known = [key for key in argument_defaults(cls) if key != "dtype"]  # which is the unit's
    for key in values:
        if key not in ("type", *known):
            possible = ", ".join(known) or "nothing"
            raise ValueError(
                f"gate {values['type']!r}: unknown key {key!r}; next to type it takes {possible}"
            )
    if cls.keeps_norm and split_component(component)[1].endswith("_parallel"):
        raise ValueError(
            f"gate {values['type']!r}: at {component!r} an edit is computed of other states than "
            "those that it is added to, so that no norm is kept"
        )
    return values


def argument_defaults(unit_class: type) -> dict[str, Any]:
    """The arguments that an entry of a class can have, and their defaults."""
    parameters = constructor_arguments(unit_class)
    own = {name: p.default for name, p in parameters.items() if name not in _OF_PLACES}
    return {**getattr(unit_class, "entry_defaults", {}), **own}


def _of_peft(what: str) -> ValueError:
    return ValueError(
        f"{what} is a method of PEFT: give it next to representations, as in "
        "peft={'peft_type': 'lora', 'r': 8}"
    )
