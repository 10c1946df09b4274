"""Directories of pyreft and pyvene, read into models at once; their files hold no positions.

A checkpoint of pyreft's trainer, `checkpoint-N/intervenable_model`, has the files of weights alone.
"""

import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import Tensor, nn
from transformers import PreTrainedModel

from ...config.components import is_dotted
from ...config.representations import ReftConfig
from ...engine.base.sites import Site, find_layers, find_site, hidden_size
from ...engine.units import unit_keys
from ...interventions import intervention_name
from ...interventions.pyreft_layers import BUFFERS
from ..directory import AdapterFiles
from ..saving import ModelWithUnits, load_weights
from .directory import BASE, CONFIG, UNITS, StoredUnit, read_pyreft, read_tensors
from .state import CLASSES, from_pyreft_state

FILES = [CONFIG, UNITS, BASE]
"""Patterns of all files in a directory of pyreft."""


@dataclass(frozen=True)
class PyreftFiles(AdapterFiles):
    """A directory of pyreft as if it were one of ours.

    Args:
        state: all tensors by the names that a model of the config gives them.
    """

    state: dict[str, Tensor]

    @property
    def config_path(self) -> Path:
        """The file of the config."""
        return self.directory / CONFIG

    @property
    def weights_path(self) -> Path:
        """The directory: each unit's weights are a file in it."""
        return self.directory

    def weights(self) -> dict[str, Tensor]:
        """All tensors by name."""
        return dict(self.state)

    def shapes(self) -> dict[str, tuple[int, ...]]:
        """The shapes of all tensors by name."""
        return {name: tuple(tensor.shape) for name, tensor in self.state.items()}


def is_pyreft(directory: Path) -> bool:
    """Whether a directory holds units of pyreft or pyvene."""
    return any(directory.glob(UNITS))


def read_pyreft_adapter(directory: Path, model: PreTrainedModel) -> PyreftFiles:
    """An adapter of pyreft for `model`, one entry per unit in its order, which names no positions.

    Raises:
        FileNotFoundError: a file is missing.
        ValueError: the directory is damaged, for another base, pickles more than tensors or has a
            class that pyreft does not.
    """
    units, trained, _ = read_pyreft(directory)
    config = ReftConfig([_entry(unit, model) for unit in units])
    layers = 1 + max((unit.layer for unit in units), default=0)
    state = {
        f"interventions.{key}.{name}": tensor
        for (key, *_), unit in zip(unit_keys(config, layers), units, strict=True)
        for name, tensor in unit.state.items()
    }
    of_base = _of_base(trained, model)
    return PyreftFiles(directory, config, {}, list(of_base), None, state | of_base)


def load_pyreft_weights(
    reft_model: ModelWithUnits, directory: Path, include_model: bool = True
) -> None:
    """Load weights that pyreft saved into the units that a model has, whose dtypes stay.

    Args:
        reft_model: a model with the units that were saved.
        directory: an adapter or a checkpoint of pyreft.
        include_model: whether to load what was trained of the base, too.

    Raises:
        FileNotFoundError: a unit has no file.
        ValueError: a file is damaged or does not fit its unit.
    """
    files = {_key_of(file): file for file in directory.glob(UNITS)}
    state: dict[str, Tensor] = {}
    for key, unit in reft_model.interventions.items():
        own = unit.state_dict()
        if not own:
            continue  # noise, which pyreft does not have
        # pyreft's keys of dotted paths have no layer.
        file = files.get(key) or files.get(key.removeprefix("layer_0_"))
        if file is None:
            raise FileNotFoundError(f"{directory}: no intkey_{key}.bin in it")
        for name, tensor in _unit_state(unit, file).items():
            dtype = own[name].dtype if name in own else tensor.dtype
            state[f"interventions.{key}.{name}"] = tensor.to(dtype)
    trained = read_tensors(directory / BASE) if (directory / BASE).is_file() else {}
    of_base = _of_base(trained, reft_model.model)
    config = reft_model.reft_config
    adapter = PyreftFiles(directory, config, {}, list(of_base), None, state | of_base)
    load_weights(reft_model, adapter, include_model=include_model)


def _key_of(file: Path) -> str:
    """The key that we give the unit of a file."""
    key = file.name.removeprefix("intkey_").removesuffix(".bin").replace(".", "_")
    return re.sub(r"_nunit_\d+#", "_nunit_1#", key)


def _unit_state(unit: nn.Module, file: Path) -> dict[str, Tensor]:
    """What a file holds, as the state of a unit."""
    pickled = read_tensors(file)
    unit_class = next((c for c in type(unit).__mro__ if CLASSES.get(c.__name__) is c), None)
    if unit_class is None:
        return {name: t for name, t in pickled.items() if name not in BUFFERS}
    try:
        arguments, state, _ = from_pyreft_state(CLASSES[unit_class.__name__], pickled, str(file))
    except ValueError as error:
        raise ValueError(f"{file}: {error}") from None
    if arguments["intervention"] != intervention_name(unit_class):
        raise ValueError(
            f"{file}: R is not orthonormal, so it does not fit a {type(unit).__name__}: make the "
            f"unit a {arguments['intervention']}, which computes the same"
        )
    return state


def _of_base(trained: dict[str, Tensor], model: PreTrainedModel) -> dict[str, Tensor]:
    """What was trained of a base by the names of a model around it, in the base's dtypes."""
    own = dict(model.named_parameters())
    return {
        f"model.{name}": tensor.to(own[name].dtype) if name in own else tensor
        for name, tensor in trained.items()
    }


def _entry(unit: StoredUnit, model: PreTrainedModel) -> dict[str, Any]:
    site = site_of(unit, model)
    entry: dict[str, Any] = {"component": unit.component, **unit.arguments}
    if not is_dotted(unit.component):
        entry["layer"] = unit.layer
    elif site.width is None:
        entry["embed_dim"] = unit.width
    return entry


def site_of(unit: StoredUnit, base: PreTrainedModel) -> Site:
    """The site of a unit in a base; a ValueError names its file."""
    layer = None if is_dotted(unit.component) else unit.layer
    try:
        site = find_site(base, unit.component, layer)
    except ValueError as error:
        raise ValueError(f"{unit.file}: {error}") from None
    is_layer = any(site.module is module for module in find_layers(base))
    width = site.width or (hidden_size(base) if is_layer else unit.width)
    if unit.width != width:
        raise ValueError(
            f"{unit.file}: edits hidden states of width {unit.width}, those at {site} of "
            f"{base.config.name_or_path} have {width}"
        )
    return site
