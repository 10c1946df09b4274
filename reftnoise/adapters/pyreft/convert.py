"""Adapters of pyreft and pyvene → ours, and ours → theirs.

The base's config is enough: its layers are built on torch's meta device, where they have shapes and
no weights. What one format cannot hold of the other is logged.
"""

import logging
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, cast

import torch
from torch import Tensor, nn
from transformers import (
    AutoConfig,
    AutoModel,
    AutoModelForCausalLM,
    AutoModelForSequenceClassification,
    PreTrainedModel,
)

from ..._util.files import local_path
from ...config.components import is_dotted
from ...config.positions import Positions
from ...config.representations import ReftConfig, RepresentationConfig
from ...engine.base.sites import Site, find_site, num_layers
from ...engine.base.tiny import DIRECTORY, NAME
from ...engine.units import place_units
from ...interventions import ReftIntervention
from ..directory import AdapterFiles
from ..location import CONFIG_NAME, WEIGHTS_NAME, local_directory
from ..saving import load_weights, read_adapter, save_adapter
from . import directory as pyreft_directory
from .directory import StoredUnit, read_pyreft, write_pyreft
from .loading import FILES, is_pyreft, site_of
from .state import CLASSES

logger = logging.getLogger(__name__)


def convert(
    source: str | Path,
    output: str | Path,
    *,
    base: str,
    positions: str | Sequence[int] = "l1",
    dropout: float = 0.0,
    act_fn: str | None = None,
) -> str:
    """Write an adapter of pyreft or pyvene for reftnoise, or an adapter of reftnoise for pyreft.

    Args:
        source: directory of the adapter, or name of a hub repository that is one.
        output: directory for the result: new, empty, or with an adapter of its kind, which is
            replaced.
        base: name or path of the base model, of which only the config is read.
        positions: positions that a pyreft adapter edits. Of two units at one site the first gets
            the prefix and the second the suffix, as of `"f5+l5"`.
        dropout: dropout of a pyreft adapter, for training it further.
        act_fn: activation of a pyreft adapter.

    Returns:
        One line on what was written.

    Raises:
        FileNotFoundError: the source or one of its files is missing.
        ValueError: the source is damaged, for another base, pickles more than tensors or has a
            class that the other library does not; the output holds something else.
    """
    source = local_directory(source, [CONFIG_NAME, WEIGHTS_NAME, *FILES])
    output = local_path(output, "output")
    kinds = _kinds(source)
    if not kinds:
        raise FileNotFoundError(
            f"{source}: neither {CONFIG_NAME} nor {pyreft_directory.UNITS} in it, so it is not an "
            "adapter directory"
        )
    if len(kinds) > 1:
        raise ValueError(f"{source}: both a reftnoise and a pyreft adapter; give each a directory")
    target = "pyreft" if kinds == {"reftnoise"} else "reftnoise"
    if output.exists() and not output.is_dir():
        raise ValueError(f"{output}: expected a directory, found a file")
    if output.is_dir() and any(output.iterdir()) and _kinds(output) != {target}:
        raise ValueError(f"{output}: neither empty nor a {target} adapter, so it is left alone")
    if target == "reftnoise":
        arguments = {"dropout": dropout} | ({} if act_fn is None else {"act_fn": act_fn})
        return _to_reftnoise(source, output, base, Positions.parse(positions), arguments)
    if (positions, dropout, act_fn) != ("l1", 0.0, None):
        raise ValueError(
            f"{source}: positions, dropout and act_fn are in a reftnoise adapter's own config: "
            "leave the options out"
        )
    return _to_pyreft(source, output, base)


def _kinds(directory: Path) -> set[str]:
    ours = {"reftnoise"} if (directory / CONFIG_NAME).is_file() else set()
    return ours | ({"pyreft"} if is_pyreft(directory) else set())


def _structure(name: str, trained: Iterable[str], class_name: str | None = None) -> PreTrainedModel:
    """The base without weights.

    Args:
        name: name or path of the base.
        trained: parameters that it must have.
        class_name: class that it must be of; None for what its config says, or one that fits.

    Raises:
        ValueError: there is no such config, or none of its models is such a base.
    """
    try:
        path = DIRECTORY if name == NAME else local_path(name, "base")
        place = path if path.is_dir() else name
        config = AutoConfig.from_pretrained(place, trust_remote_code=False)
    except (OSError, ValueError) as error:
        raise ValueError(f"base {name!r}: {str(error).splitlines()[0]}") from None
    possible: dict[str, PreTrainedModel] = {}
    for auto in (AutoModelForCausalLM, AutoModelForSequenceClassification, AutoModel):
        try:
            with torch.device("meta"):
                model = auto.from_config(config, trust_remote_code=False)
        except ValueError:  # no such head for this architecture
            continue
        possible[type(model).__name__] = model.requires_grad_(False)
    if class_name is not None and class_name not in possible:
        raise ValueError(
            f"base {name!r} is one of {', '.join(possible)}, the adapter is for {class_name}"
        )
    for wanted in (class_name, *(config.architectures or ()), *possible):
        model = possible.get(str(wanted))
        if model is not None and set(trained) <= dict(model.named_parameters()).keys():
            return model
    raise ValueError(
        f"base {name!r} is one of {', '.join(possible) or type(config).__name__}, of which none "
        f"has all that the adapter trained: {', '.join(trained)}"
    )


class _UnitsAtBase(nn.Module):
    """The units of a config and their base, as files hold them: nothing runs."""

    def __init__(self, config: ReftConfig, base: PreTrainedModel) -> None:
        super().__init__()
        self.reft_config, self.model = config, base
        units = place_units(config, base)
        self.interventions = nn.ModuleDict({placed.key: placed.unit for placed in units})


# -- theirs → ours -------------------------------------------------------------------------------


def _to_reftnoise(
    source: Path, output: Path, name: str, positions: Positions, arguments: dict[str, Any]
) -> str:
    units, trained, base_class = read_pyreft(source)
    base = _structure(name, trained, base_class)
    config = ReftConfig(representations=_entries(units, base, positions, arguments))
    adapted = _UnitsAtBase(config, base)
    for own, unit in zip(adapted.interventions.values(), units, strict=True):
        own.load_state_dict(unit.state)
    state: dict[str, Tensor] = adapted.interventions.state_dict(prefix="interventions.")
    save_adapter(adapted, output, state | {f"model.{n}": t for n, t in trained.items()})
    chosen = {"positions": positions.spec(), "act_fn": None, **arguments}
    return (
        f"{output}: {len(units)} units, with "
        + ", ".join(f"{key} {value}" for key, value in chosen.items())
        + ", which pyreft's files do not hold"
    )


def _entries(
    units: Sequence[StoredUnit],
    base: PreTrainedModel,
    positions: Positions,
    arguments: Mapping[str, Any],
) -> list[dict[str, Any]]:
    """A config's entries in the order of the units; units that differ by layer share an entry."""
    sites = [site_of(unit, base) for unit in units]
    parts, times, seen = positions.split(), Counter(sites), Counter[Site]()
    entries: list[dict[str, Any]] = []
    for site, unit in zip(sites, units, strict=True):
        if times[site] not in (1, len(parts)):
            raise ValueError(
                f"positions {positions.spec()!r}: {times[site]} units edit {site}; two need a "
                "prefix and a suffix, such as 'f5+l5', and more cannot be told apart"
            )
        part = positions if times[site] == 1 else parts[seen[site]]
        seen[site] += 1
        entry = {"component": unit.component, **arguments, **unit.arguments}
        entry["positions"] = part.spec()
        if is_dotted(unit.component):
            if site.width is None:
                entry["embed_dim"] = unit.width
            entries.append(entry)
        elif entries and entries[-1] == entry | {"layer": entries[-1].get("layer")}:
            entries[-1]["layer"].append(unit.layer)
        else:
            entries.append(entry | {"layer": [unit.layer]})
    return _prefixes_with_suffixes(entries, positions)


def _prefixes_with_suffixes(
    entries: list[dict[str, Any]], positions: Positions
) -> list[dict[str, Any]]:
    """Put the entry of the suffixes into that of the prefixes before it."""
    prefix, suffix = ({"positions": positions.split()[i].spec()} for i in (0, -1))
    merged: list[dict[str, Any]] = []
    for entry in entries:
        last = merged[-1] if merged and prefix != suffix else {}
        if last and last == last | prefix and entry == last | suffix:
            last |= {"positions": positions.spec(), "tied": False}
        else:
            merged.append(entry)
    return merged


# -- ours → theirs -------------------------------------------------------------------------------


def _to_pyreft(source: Path, output: Path, name: str) -> str:
    adapter = AdapterFiles.read(source)
    if adapter.config.peft is not None:
        raise ValueError(
            f"{source}: has a peft section ({adapter.config.peft.get('peft_type')}), which "
            "pyreft's format does not hold"
        )
    if adapter.config.token_rows is not None:
        raise ValueError(f"{source}: has token_rows, which pyreft's format does not hold")
    names = [name.removeprefix("model.") for name in adapter.base_parameters]
    base = _structure(name, names)
    adapter = read_adapter(source, base)
    adapted = _UnitsAtBase(adapter.config, base)
    trained = _give_memory(base, names)
    load_weights(adapted, adapter)
    interventions = iter(adapted.interventions.values())
    units: list[tuple[int, str, ReftIntervention]] = []
    for index, entry in enumerate(adapted.reft_config.representations):
        layers = entry.layers(num_layers(base)) if entry.is_per_layer else [0]
        placed = [(layer, next(interventions)) for _ in entry.parts() for layer in layers]
        where = f"{adapter.config_path}: representations[{index}]"
        if entry.is_noise:
            logger.warning("%s: pyreft has no noise, so it is left out", where)
            continue
        if CLASSES.get(entry.unit_class.__name__) is not entry.unit_class:
            raise ValueError(
                f"{where}: pyreft has no {entry.unit_class.__name__}, but {', '.join(CLASSES)}"
            )
        component = entry.component
        if component == "embeddings":  # for which pyvene has no name
            component = str(find_site(base, component))
        if entry.gate is not None:
            raise ValueError(f"{where}: gate {entry.gate}, which pyreft's format does not hold")
        if isinstance(entry.heads, list):
            raise ValueError(f"{where}: heads {entry.heads}, of which pyreft's format has no units")
        if entry.heads == "all":
            component = component.replace("head_output", "attention_value_output")
        units += [(layer, component, cast(ReftIntervention, unit)) for layer, unit in placed]
        _warn_of_losses(where, entry, component)
    if not units:
        raise ValueError(f"{source}: nothing but noise in it, which pyreft does not have")
    try:
        write_pyreft(output, units, trained, type(base))
    except ValueError as error:
        raise ValueError(f"{adapter.weights_path}: {error}") from None
    if trained:
        logger.warning("%s: holds weights of the base, so load it with include_model=True", output)
    return f"{output}: {len(units)} units"


def _give_memory(base: PreTrainedModel, names: Iterable[str]) -> dict[str, Tensor]:
    """Parameters of the base, made to be loaded into, by name."""
    parameters: dict[str, Tensor] = {}
    for name in names:
        owner, _, own = name.rpartition(".")
        memory = torch.empty_like(base.get_parameter(name), device="cpu")
        parameters[name] = nn.Parameter(memory, requires_grad=False)
        setattr(base.get_submodule(owner), own, parameters[name])
    return parameters


def _warn_of_losses(where: str, entry: RepresentationConfig, component: str) -> None:
    values = {"positions": entry.positions, **entry.arguments}
    lost = [f"{n} {values[n]!r}" for n in ("positions", "dropout", "act_fn") if values.get(n)]
    logger.warning("%s: pyreft's format does not hold %s", where, ", ".join(lost))
    problems = []
    if "add_bias" in values:
        problems.append(f"cannot build a {entry.unit_class.__name__}")
    if is_dotted(component):
        problems.append(f"cannot build units at {component}")
    if "act_fn" in values and values["dtype"] != "bfloat16":  # the constant sources are fp32 there
        problems.append(f"rounds {values['dtype']} weights to bfloat16")
    if problems:
        logger.warning(
            "%s: pyreft's ReftModel.load %s: build its interventions, with dtype, and load their "
            "files with load_state_dict",
            *(where, " and ".join(problems)),
        )
