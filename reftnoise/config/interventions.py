"""The intervention of a config's entry: a registered name, or a module that is ready."""

import inspect
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, TypeAlias

import torch

from ..interventions import (
    INTERVENTIONS,
    NoiseIntervention,
    Unit,
    intervention_class,
    intervention_name,
)
from ..interventions.base import constructor_arguments, dtype_name

_METHODS_OF_PEFT = {"lora", "dora", "adalora", "vera", "ia3", "oft", "boft", "loha", "lokr"}


@dataclass(frozen=True)
class NamedIntervention:
    """A registered name: each site gets a new unit, with the entry's arguments."""

    name: str

    @property
    def value(self) -> str:
        """The name, as an entry gives it."""
        return self.name

    @property
    def unit_class(self) -> type[Unit]:
        """The registered class."""
        return intervention_class(self.name)

    def arguments(self, values: Mapping[str, Any]) -> dict[str, Any]:
        """All arguments as plain values, defaults filled in."""
        filled = {**argument_defaults(self.unit_class), **values}
        for key, value in filled.items():
            if value is inspect.Parameter.empty:
                raise ValueError(f"{self.unit_class.__name__} needs {key!r}")
        return {key: plain(value) for key, value in filled.items()}

    def embed_dim(self, width: int | None, *, is_dotted: bool) -> int | None:
        """The width that an entry has to say."""
        return width

    def expect_fit(self, layer: object, parts: int) -> None:
        """Raise a ValueError where the units of an entry cannot serve its layers and parts."""

    def width(self, embed_dim: int | None) -> int | None:
        """The width of the units where a site does not tell it."""
        return embed_dim

    def build(self, width: int, arguments: Mapping[str, Any]) -> Unit:
        """A new unit for hidden states of that width."""
        return self.unit_class(embed_dim=width, **arguments)


@dataclass(frozen=True)
class ReadyIntervention:
    """A module, which has its arguments and serves one site."""

    module: Unit

    @property
    def value(self) -> Unit:
        """The module, as an entry gives it."""
        return self.module

    @property
    def name(self) -> str:
        """The name under which the module's class is registered."""
        return intervention_name(type(self.module))

    @property
    def unit_class(self) -> type[Unit]:
        """The module's class."""
        return type(self.module)

    def arguments(self, values: Mapping[str, Any]) -> dict[str, Any]:
        """The module's arguments as plain values; those of the entry must say the same."""
        own = {key: plain(value) for key, value in self.module.arguments().items()}
        for key, value in values.items():
            self._expect_same(key, own[key], value)
        return own

    def embed_dim(self, width: int | None, *, is_dotted: bool) -> int | None:
        """The width that an entry has to say: at a dotted path, loading asks the entry for it."""
        if isinstance(self.module, NoiseIntervention):
            return width
        if width is not None:
            self._expect_same("embed_dim", self.module.hidden_size, width)
        return self.module.hidden_size if is_dotted else width

    def expect_fit(self, layer: object, parts: int) -> None:
        """Raise a ValueError where the module would have to serve several sites."""
        if parts > 1:
            raise ValueError("tied False needs two sets of weights: name the intervention instead")
        if not isinstance(layer, int | None):
            raise ValueError(
                f"layer {layer!r} with a ready {self.unit_class.__name__}: a module serves one "
                "layer; name the intervention, or give one entry per layer"
            )

    def width(self, embed_dim: int | None) -> int | None:
        """The width of the module; None for noise, which fits every width."""
        return getattr(self.module, "hidden_size", None)

    def build(self, width: int, arguments: Mapping[str, Any]) -> Unit:
        """The module itself."""
        return self.module

    def _expect_same(self, key: str, own: Any, value: Any) -> None:
        if own != value:
            raise ValueError(
                f"{key} {value!r} with a ready {self.unit_class.__name__} whose {key} is "
                f"{own!r}: set it in the module"
            )


EntryIntervention: TypeAlias = NamedIntervention | ReadyIntervention


def entry_intervention(value: Any) -> EntryIntervention:
    """The intervention that an entry gives as a registered name or as a module.

    Raises:
        ValueError: any other value, or a name that is not registered.
    """
    if isinstance(value, Unit):
        return ReadyIntervention(value)
    if isinstance(value, type):
        raise ValueError(f"intervention {value.__name__}: expected an instance or a name")
    if not isinstance(value, str):
        raise ValueError(
            f"intervention {value!r}: expected a registered name, or a module derived from "
            "ReftIntervention or NoiseIntervention"
        )
    if value.lower() in _METHODS_OF_PEFT and value not in INTERVENTIONS:
        raise _of_peft(f"intervention {value!r}")
    intervention_class(value)
    return NamedIntervention(value)


def pop_intervention(entry: dict[str, Any]) -> EntryIntervention:
    """Take the intervention, and pyvene's fields that have one meaning here, out of an entry.

    Raises:
        ValueError: no intervention, two, or a field with another value.
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
    for key, only in (("unit", "pos"), ("max_number_of_units", 1)):
        if (field := entry.pop(key, only)) != only:
            raise ValueError(f"{key} {field!r}: only {only!r} is supported; see 'positions'")
    if its_type is not None:
        return NamedIntervention(intervention_name(its_type))
    return entry_intervention(value)


def argument_defaults(unit_class: type[Unit]) -> dict[str, Any]:
    """The arguments that an entry of a class can have, and their defaults."""
    parameters = constructor_arguments(unit_class)
    return {name: p.default for name, p in parameters.items() if name != "embed_dim"}


def plain(value: Any) -> Any:
    """A value as JSON can hold it: dtypes become names."""
    return dtype_name(value) if isinstance(value, torch.dtype) else value


def _of_peft(what: str) -> ValueError:
    return ValueError(
        f"{what} is a method of PEFT: give it next to representations, as in "
        "peft={'peft_type': 'lora', 'r': 8}"
    )
