"""Name → intervention class: the names that configurations and saved adapters use."""

from collections.abc import Callable
from typing import TypeVar

from . import adapters, concepts, fixed_noise, heads, noise, reft
from .arguments import did_you_mean
from .base import NoiseIntervention, ReftIntervention, is_edit, overrides_forward
from .pyvene_units import unit_class_for

Unit = ReftIntervention | NoiseIntervention
UnitClass = TypeVar("UnitClass", bound=type)

INTERVENTIONS: dict[str, type[Unit]] = {
    "loreft": reft.LoreftIntervention,
    "noreft": reft.NoreftIntervention,
    "direft": reft.DireftIntervention,
    "nodireft": reft.NodireftIntervention,
    "consreft": reft.ConsreftIntervention,
    "lobireft": reft.LobireftIntervention,
    "bias": adapters.BiasIntervention,
    "red": adapters.RedIntervention,
    "addition": adapters.AdditionIntervention,
    "ablate": adapters.AblationIntervention,
    "adapter": adapters.AdapterIntervention,
    "reftr1": concepts.ReftR1Intervention,
    "lofit": heads.LofitIntervention,
    "jola": heads.JolaIntervention,
    "neftune": noise.NeftuneIntervention,
    "gaussian": noise.GaussianNoiseIntervention,
    "bernoulli": noise.BernoulliNoiseIntervention,
    "symnoise": noise.SymNoiseIntervention,
    "r3f": fixed_noise.R3fIntervention,
    "smart": fixed_noise.SmartIntervention,
    "hype": fixed_noise.HypeIntervention,
}


def register_intervention(name: str) -> Callable[[UnitClass], UnitClass]:
    """Class decorator: configurations can name the intervention `name`.

    Raises:
        ValueError: `name` belongs to another class already.
        TypeError: the class is neither a `ReftIntervention` nor a `NoiseIntervention`, nor an
            intervention of pyvene that edits hidden states.
    """

    def register(cls: UnitClass) -> UnitClass:
        try:
            unit_class = unit_class_for(cls)
        except TypeError:
            raise TypeError(
                f"{cls.__name__}: expected a subclass of ReftIntervention or NoiseIntervention, or "
                "of an intervention of pyvene"
            ) from None
        holder = INTERVENTIONS.setdefault(name, unit_class)
        if holder is not unit_class:
            raise ValueError(f"intervention name {name!r} belongs to {holder.__name__} already")
        return cls

    return register


def intervention_class(name: str) -> type[Unit]:
    """The class registered under `name`; a ValueError lists all names."""
    if name not in INTERVENTIONS:
        raise ValueError(
            f"intervention {name!r} is not registered; {did_you_mean(name, INTERVENTIONS)}"
            f"known: {', '.join(INTERVENTIONS)}; "
            f"register_intervention({name!r}) adds a class of your own"
        )
    return INTERVENTIONS[name]


def intervention_name(cls: type) -> str:
    """The name under which a class is registered; a ValueError says how to register it.

    A class with a `forward` of its own, as scripts of pyreft have it, is known by its own name.
    """
    for name, registered in INTERVENTIONS.items():
        if cls in (registered, getattr(registered, "original", None)):
            return name
    holder = INTERVENTIONS.get(cls.__name__, cls)
    if is_edit(cls) and overrides_forward(cls) and _place(holder) == _place(cls):
        return cls.__name__
    raise ValueError(
        f"{cls.__name__} is not registered, so no configuration can name it: decorate the class "
        'with @register_intervention("some_name")'
    )


def registered_name(cls: type) -> str:
    """The same name, under which the class is registered from now on, if it was not.

    Its definition may have run again since, as a notebook's cell does.
    """
    name = intervention_name(cls)
    if name == cls.__name__:
        INTERVENTIONS[name] = unit_class_for(cls)
    return name


def _place(cls: type) -> tuple[str, str]:
    """Where a class is defined."""
    return cls.__module__, getattr(cls, "original", cls).__qualname__
