"""Methods of pyreft's and pyvene's models under their names, apart from `save` and `load`."""

import logging
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from ..._util.errors import brief, nearest
from ..._util.files import local_path
from ...config.representations import ReftConfig
from ...engine.base.sharding import device_of
from ...interventions import last_outputs
from .. import saving
from ..location import checkpoint_adapter

logger = logging.getLogger(__name__)

_ARGUMENTS: dict[str, tuple[Any, ...]] = {
    "backend": (None, "native"),
    "as_adaptor": (None, False),
    "intervenables_sort_fn": (None,),
    "use_fast": (None, False, True),
}
"""What pyvene's constructor takes after config and model, and the values that are possible here."""

_HINTS = {
    "as_adaptor": "; a unit reads what it edits: for one that edits what a layer reads, give the "
    "component 'block_input'"
}


def expect_native(arguments: Mapping[str, Any]) -> None:
    """Check pyvene's further arguments of a constructor.

    `use_fast` has no effect: each row is edited at its own locations.

    Raises:
        TypeError: an argument that pyvene does not have.
        ValueError: a value that asks for what is not done here.
    """
    for name, value in arguments.items():
        if name not in _ARGUMENTS:
            raise TypeError(f"ReftModel has no argument {name!r}; {nearest(name, _ARGUMENTS)}")
        if value not in _ARGUMENTS[name]:
            possible = " or ".join(repr(known) for known in _ARGUMENTS[name])
            hint = _HINTS.get(name, "")
            raise ValueError(f"{name} {value!r}: expected {possible}{hint}")


class PyreftMethods(nn.Module):
    """What scripts of pyreft call on a model."""

    model: PreTrainedModel
    interventions: nn.ModuleDict
    reft_config: ReftConfig

    def __setattr__(self, name: str, value: Any) -> None:
        if name == "reft_config" and not isinstance(value, ReftConfig):
            if value is self.model.config:
                return  # pyreft's config is the model's: scripts keep it so before they replace it
            raise TypeError(f"reft_config {brief(value)}: expected a ReftConfig")
        super().__setattr__(name, value)

    def count_parameters(self, include_model: bool = False) -> int:
        """The number of trained parameters of the units, and of the base if asked for."""
        units, base, _ = saving.count_parameters(self.interventions, self.model)
        return units + base if include_model else units

    def get_device(self) -> torch.device:
        """The device that the base computes on."""
        return device_of(self.model) or self.model.device

    def get_trainable_parameters(self) -> list[nn.Parameter]:
        """The trained parameters of the units, then those of the base."""
        owners = (self.interventions, self.model)
        return [p for owner in owners for p in owner.parameters() if p.requires_grad]

    def enable_model_gradients(self) -> None:
        """Train all of the base, and put it into training mode."""
        self.model.train()
        for parameter in self.model.parameters():
            parameter.requires_grad_(parameter.is_floating_point())

    def disable_intervention_gradients(self) -> None:
        """Do nothing but log so, as in pyreft."""
        logger.warning(
            "disable_intervention_gradients does nothing, as in pyreft: to freeze the units, call "
            "reft_model.interventions.requires_grad_(False)"
        )

    def set_zero_grad(self) -> None:
        """Forget the gradients of the units."""
        self.interventions.zero_grad()

    def get_cached_activations(self) -> dict[str, Tensor]:
        """pyvene's activations of source inputs, which ReFT does not have: always empty."""
        return {}

    @property
    def full_intervention_outputs(self) -> list[Any]:
        """What units returned last that is more than hidden states, such as latents.

        It is of the thread that reads it.
        """
        return last_outputs(self.interventions.values())

    def load_intervention(self, load_directory: str | Path, include_model: bool = True) -> None:
        """Load a saved adapter's weights into the model's own units.

        Args:
            load_directory: path of an adapter of ours or of pyreft, or of a checkpoint of pyreft's
                trainer, which is read as tensors alone.
            include_model: whether to load what was trained of the base, too.

        Raises:
            FileNotFoundError: there is no adapter, or one of its files is missing.
            ValueError: the weights do not fit the units.
        """
        directory = local_path(checkpoint_adapter(load_directory), "load_directory")
        from .loading import is_pyreft, load_pyreft_weights

        if is_pyreft(directory):
            load_pyreft_weights(self, directory, include_model)
        else:
            adapter = saving.read_adapter(directory, self.model)
            saving.load_weights(self, adapter, include_model=include_model)

    def _units_state(self) -> dict[str, Tensor]:
        state: dict[str, Tensor] = self.interventions.state_dict(prefix="interventions.")
        return state
