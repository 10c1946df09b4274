"""Interventions of pyvene that are not ours: their `forward` acts as it is written.

A module of such a class is adopted: it gets a class of the same name, derived from its own, which
has what a unit needs. It stays an instance of its own class, with its parameters under their names.
"""

import functools
import itertools
from collections.abc import Mapping
from typing import Any, ClassVar

from jaxtyping import Float
from torch import Tensor

from .arguments import constructor_arguments
from .base import NoiseIntervention, ReftIntervention, is_edit
from .own_forward import RowSubspaces, own_edit


class _Adopted:
    """What a unit has and pyvene's classes do not."""

    default_positions: ClassVar[str] = "l1"
    has_own_forward: ClassVar[bool] = True
    unread_arguments: ClassVar[frozenset[str]] = frozenset()
    entry_defaults: ClassVar[Mapping[str, Any]] = dict.fromkeys(
        ("low_rank_dimension", "subspace_partition", "latent_dim")
    )
    """Fields of pyvene that the constructor gets, from a config's entry."""
    low_rank_dimension: int | None = None
    embed_dim: Tensor | None

    @property
    def hidden_size(self) -> int | None:
        """Width of the hidden states, if the unit says it."""
        return None if self.embed_dim is None else int(self.embed_dim)

    def delta(
        self, hidden: Float[Tensor, "*rows hidden"], gates: Tensor | RowSubspaces | None = None
    ) -> Float[Tensor, "*rows hidden"]:
        """Arguments as in `own_edit`."""
        return own_edit(self, hidden, gates)  # type: ignore[arg-type]  # it is a module, too

    def arguments(self) -> dict[str, Any]:
        """The constructor's arguments, without the width."""
        names = [*self.entry_defaults, *constructor_arguments(type(self))]
        return {n: getattr(self, n) for n in names if n != "embed_dim" and hasattr(self, n)}

    __getitem__ = ReftIntervention.__getitem__


@functools.cache
def unit_class_for(cls: type) -> type[Any]:
    """The class of units for modules of a class: itself, or for pyvene's an adopted one.

    Raises:
        TypeError: a class that is no intervention.
    """
    if issubclass(cls, ReftIntervention | NoiseIntervention):
        return cls
    if not is_edit(cls):
        raise TypeError(f"{cls.__name__}: expected an intervention that edits hidden states")
    names = {"__module__": cls.__module__, "__doc__": cls.__doc__, "original": cls}
    adopted = type(cls.__name__, (cls, _Adopted), names | {"state_dict": _state_dict})
    return ReftIntervention.register(adopted)


def _state_dict(
    self: Any,
    *arguments: Any,
    destination: Any = None,
    prefix: str = "",
    keep_vars: bool = False,
) -> Any:
    """The class's own state, or as a part of a larger one all tensors under their names.

    A class may override `state_dict`, and return a part of its tensors under other names.
    """
    if destination is None:
        return type(self).original.state_dict(self, *arguments, prefix=prefix, keep_vars=keep_vars)
    for name, tensor in itertools.chain(self.named_parameters(), self.named_buffers()):
        destination[prefix + name] = tensor if keep_vars else tensor.detach()
    return destination


def adopt(module: Any, rank: int | None = None) -> None:
    """Make a unit of a module of pyvene's classes, which may say no rank itself.

    Raises:
        TypeError: a module that is no intervention, or whose intervention reads a second input.
    """
    unit_class = unit_class_for(module.__class__)
    if not module.is_source_constant:
        raise TypeError(f"{type(module).__name__} reads a source, and no call has one")
    module.__class__ = unit_class
    if module.low_rank_dimension is None:
        module.low_rank_dimension = rank
