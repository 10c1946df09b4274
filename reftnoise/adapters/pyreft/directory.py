"""Adapter directories of pyreft and pyvene ↔ units of ours, without positions.

They are a `config.json` and one pickled state per unit, `intkey_{key}.bin`, and with
`include_model` a `pytorch_model.bin` of what was trained of the base. Pickles are read as tensors
alone, and class names are looked up in a dictionary, never imported.
"""

import io
import json
import warnings
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ..._util.files import replace_all
from ...interventions import ReftIntervention
from .state import CLASSES, from_pyreft_state, to_pyreft_state

CONFIG = "config.json"
UNITS = "intkey_*.bin"
BASE = "pytorch_model.bin"

# Fields of a representation, which pyvene saves as a list; some versions lack the last ones.
_FIELDS = (
    *("layer", "component", "unit", "max_number_of_units", "low_rank_dimension"),
    *("intervention_type", "intervention", "subspace_partition", "group_key"),
    *("intervention_link_key", "moe_key", "source_representation"),
    *("hidden_source_representation", "latent_dim"),
)


@dataclass(frozen=True)
class StoredUnit:
    """A unit of a directory, converted to ours."""

    file: Path
    layer: int
    component: str
    arguments: dict[str, Any]
    """The intervention's name, its rank, dtype and `add_bias`, as an entry of our config."""
    state: dict[str, Tensor]
    width: int


def read_pyreft(directory: Path) -> tuple[list[StoredUnit], dict[str, Tensor], str | None]:
    """The units of a directory in its order, what was trained of the base, and the base's class.

    The class is None where the config lacks it, as all do that were written with transformers 5.

    Raises:
        FileNotFoundError: a file is missing.
        ValueError: a file is damaged, holds more than tensors or a class that is not in `CLASSES`.
    """
    path = directory / CONFIG
    if not path.is_file():
        raise FileNotFoundError(
            f"{directory}: no {CONFIG} in it, as in checkpoints of pyreft's trainer: wrap the base "
            "with the config of their units, then call load_intervention"
        )
    names = {
        file.name.removeprefix("intkey_").removesuffix(".bin").replace(".", "_"): file
        for file in directory.glob(UNITS)
    }
    units, seen = [], Counter[str]()
    try:
        description = json.loads(path.read_text(encoding="utf-8"))
        base_class = description.get("model_type")
        base_class = None if base_class is None else _class_name(base_class)
        listed = zip(description["representations"], description["intervention_types"], strict=True)
        entries = [(_fields(values), _class_name(name)) for values, name in listed]
        keys = [_key(fields, seen) for fields, _ in entries]
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise ValueError(f"{path}: damaged or not an adapter's config ({error!r})") from None
    for key, (fields, class_name) in zip(keys, entries, strict=True):
        if class_name not in CLASSES:
            raise ValueError(
                f"{path}: {key} is a {class_name}, expected one of {', '.join(CLASSES)}"
            )
        if fields["unit"] != "pos":
            raise ValueError(f"{path}: {key} has unit {fields['unit']!r}, expected 'pos'")
        if fields.get("intervention_link_key") is not None:
            raise ValueError(
                f"{path}: {key} is linked to other units, so that pyvene gives it the output of "
                "the first instead of its own hidden states, which no unit here can do"
            )
        if key not in names:
            raise FileNotFoundError(f"{directory}: no intkey_{key}.bin in it, which {CONFIG} names")
        file = names[key]
        state = read_tensors(file)
        try:
            converted = from_pyreft_state(CLASSES[class_name], state, where=str(file))
        except ValueError as error:
            raise ValueError(f"{file}: {error}") from None
        units.append(StoredUnit(file, fields["layer"], fields["component"], *converted))
    trained = read_tensors(directory / BASE) if (directory / BASE).is_file() else {}
    return units, trained, base_class


def write_pyreft(
    directory: Path,
    units: Sequence[tuple[int, str, ReftIntervention]],
    trained: Mapping[str, Tensor],
    base_class: type,
) -> None:
    """Write a directory that pyreft and pyvene read, in place of an adapter in it.

    Args:
        directory: path of the directory, created if needed; other files in it are left alone.
        units: layer, component in pyvene's terms, and intervention.
        trained: parameters of the base by name.
        base_class: class of the base.

    Raises:
        ValueError: a unit has no R (see `to_pyreft_state`).
    """
    listed = [
        dict(zip(_FIELDS, (layer, component, "pos", 1, unit.low_rank_dimension), strict=False))
        for layer, component, unit in units
    ]
    seen = Counter[str]()
    keys = [_key(fields, seen) for fields in listed]
    files = {}
    for key, (_, _, unit) in zip(keys, units, strict=True):
        try:
            files[f"intkey_{key}.bin"] = _pickled(to_pyreft_state(unit))
        except ValueError as error:
            raise ValueError(f"{key}: {error}") from None
    if trained:
        files[BASE] = _pickled(trained)
    description = {
        "intervention_constant_sources": [True] * len(units),
        "intervention_dimensions": [unit.hidden_size for _, _, unit in units],
        "intervention_types": [
            f"<class 'pyreft.interventions.{type(unit).__name__}'>" for _, _, unit in units
        ],
        "mode": "parallel",
        "model_type": str(base_class),
        "representations": [[fields.get(name) for name in _FIELDS] for fields in listed],
        "sorted_keys": keys,
    }
    files[CONFIG] = (json.dumps(description, indent=2) + "\n").encode()
    directory.mkdir(parents=True, exist_ok=True)
    replace_all(directory, files)
    for file in (*directory.glob(UNITS), directory / BASE):  # of an adapter that was there
        if file.name not in files:
            file.unlink(missing_ok=True)


def _fields(values: Any) -> dict[str, Any]:
    fields = values if isinstance(values, dict) else dict(zip(_FIELDS, values, strict=False))
    layer, component = fields["layer"], fields["component"]
    if layer is None and isinstance(component, str) and "." in component:
        layer = 0  # a dotted path needs none
    if type(layer) is not int or not isinstance(component, str):
        raise ValueError(f"layer {layer!r}, component {component!r}")
    return {**fields, "layer": layer}


def _class_name(printed: str) -> str:
    """`"<class 'pyreft.interventions.LoreftIntervention'>"` → `"LoreftIntervention"`."""
    return printed.removesuffix("'>").rpartition(".")[2]


def _key(fields: Mapping[str, Any], seen: Counter[str]) -> str:
    """pyvene's name for a unit, which ends in the number of those `seen` at its place.

    Up to pyvene 0.1.6 there are dots where there are underscores now.
    """
    where = "" if "." in fields["component"] else f"layer_{fields['layer']}_"
    unit = f"unit_{fields['unit']}_nunit_{fields['max_number_of_units']}"
    place = f"{where}comp_{fields['component']}_{unit}".replace(".", "_")
    seen[place] += 1
    return f"{place}#{seen[place] - 1}"


def read_tensors(file: Path) -> dict[str, Tensor]:
    """A pickled dictionary of tensors; a ValueError for one that holds more, or is damaged."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # an error says what is damaged
            state = torch.load(file, map_location="cpu", weights_only=True)
    except OSError:
        raise
    except Exception as error:  # a damaged pickle may raise anything
        problem = f"damaged, or holds more than tensors ({type(error).__name__})"
        raise ValueError(f"{file}: {problem}") from None
    if not isinstance(state, Mapping) or not all(isinstance(t, Tensor) for t in state.values()):
        raise ValueError(f"{file}: expected a dictionary of tensors")
    if partial := [name for name, tensor in state.items() if not _is_whole(tensor)]:
        raise ValueError(f"{file}: {partial[0]} has a shape with more elements than the file holds")
    return {name: tensor.detach() for name, tensor in state.items()}


def _is_whole(tensor: Tensor) -> bool:
    """Whether a tensor's elements are all in memory: a few bytes may be pickled with any shape."""
    is_dense = tensor.layout is torch.strided and tensor.device.type == "cpu"
    if not is_dense or tensor.is_nested:
        return False
    return tensor.untyped_storage().nbytes() >= tensor.numel() * tensor.element_size()


def _pickled(state: Mapping[str, Tensor]) -> bytes:
    buffer = io.BytesIO()
    torch.save(dict(state), buffer)
    return buffer.getvalue()
