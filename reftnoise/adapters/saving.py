"""Adapter directories: `reft_config.json`, `reft_model.safetensors` and a model card.

No pickles, and nothing is imported by a name that a file gives. Every file is written under a
temporary name and renamed, so that a directory holds the old or the new adapter at every instant.
"""

import hashlib
import json
import os
import warnings
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any, Protocol

import safetensors.torch
import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from .._util.errors import brief, one_line, value_errors
from .._util.files import local_path, replace_all
from ..config.base_model import PACKAGED
from ..config.representations import ReftConfig
from ..engine.base.peft import inner_model, is_peft_model, own_state, section_of
from ..engine.base.running import is_part
from ..engine.base.saved_peft import built_from_file, meta_state
from ..engine.base.sharding import part_like, size, takes_weights_of_one_process
from ..engine.base.sites import trained_modules
from ..engine.base.tiny import DIRECTORY
from ..engine.units import place_units
from ..interventions.arguments import dtype_name
from .card import card
from .directory import AdapterFiles, called, expect_finite, warn_of_not_finite
from .fingerprint import fingerprint, other_weights, rope_parameters, sample_weights
from .location import (
    CARD_NAME,
    CONFIG_NAME,
    SCHEMA_VERSION,
    WEIGHTS_NAME,
    local_directory,
)
from .snapshot import sealed
from .vocabulary import (
    PREFIX,
    expect_vocabulary,
    other_rows,
    put_rows,
    sample_vocabulary,
    saved_rows,
)

_CASTABLE = {torch.float16, torch.bfloat16, torch.float32, torch.float64}
"""Dtypes that weights may have in a file, whichever of them they have in a new model."""


class ModelWithUnits(Protocol):
    """What an adapter directory is written of."""

    model: PreTrainedModel
    interventions: nn.ModuleDict
    reft_config: ReftConfig

    def state_dict(self) -> dict[str, Any]:
        """All tensors by name."""

    def named_parameters(self) -> Iterator[tuple[str, nn.Parameter]]:
        """All parameters and their names."""


def save_adapter(
    reft_model: ModelWithUnits,
    directory: str | Path,
    state_dict: Mapping[str, Tensor] | None = None,
    *,
    keeps_path: bool = True,
) -> None:
    """Write an adapter directory, as `ReftModel.save_pretrained` does.

    An adapter in the directory is replaced; a model card and other files are left alone. A
    `state_dict`, of a sharded model whose owner gathered it, is written as it is. Where the base is
    on this machine, its path is written next to its name, if `keeps_path`.

    Raises:
        ValueError: the directory is a file, or the weights are not whole.
    """
    directory = local_path(directory, "save_directory")
    if directory.exists() and not directory.is_dir():
        raise ValueError(f"{directory}: expected a directory, found a file")
    state = (
        without_frozen(reft_model, reft_model.state_dict()) if state_dict is None else state_dict
    )
    if reft_model.reft_config.peft is not None and not own_state(reft_model.model):
        raise ValueError(
            "the config has a peft section, but the model holds nothing of it: was it merged or "
            "unloaded? Wrap the merged model without the section"
        )
    own = dict(reft_model.named_parameters()) if state_dict is None else state
    if parts := [name for name in state if name in own and is_part(own[name])]:
        raise ValueError(
            f"{parts[0]} is spread over processes: gather the weights in all of them, as by "
            "accelerator.get_state_dict(model), and pass them as state_dict"
        )
    if lost := [n for n in own if n.startswith("interventions.") and n not in state]:
        raise ValueError(
            f"{lost[0]} is not in the state_dict() of its unit, which overrides that method: "
            "expected all tensors under their names"
        )
    tensors = {name: tensor.detach().cpu().contiguous() for name, tensor in state.items()}
    tensors |= saved_rows(reft_model.model, reft_model.reft_config.token_rows)
    warn_of_not_finite(directory, tensors)
    of_base = sorted(name for name in tensors if name.startswith("model."))
    description = {
        "schema_version": SCHEMA_VERSION,
        "base_model": _described(reft_model.model, of_base, keeps_path),
        **reft_model.reft_config.to_dict(),
        "base_parameters": of_base,
    }
    weights = sealed(safetensors.torch.save(tensors), description)
    description["weights_sha256"] = hashlib.sha256(weights).hexdigest()
    text = json.dumps(description, indent=2, ensure_ascii=False) + "\n"
    files = {WEIGHTS_NAME: weights, CONFIG_NAME: text.encode()}
    if not (directory / CARD_NAME).exists():
        units, base, total = count_parameters(reft_model.interventions, reft_model.model)
        files[CARD_NAME] = card(
            reft_model.reft_config,
            base=inner_model(reft_model.model),
            name=_base_name(reft_model.model),
            trained=units + base,
            total=total,
        ).encode()
    directory.mkdir(parents=True, exist_ok=True)
    replace_all(directory, files)


def _described(base: PreTrainedModel, of_base: list[str], keeps_path: bool) -> dict[str, Any]:
    """What an adapter tells of its base, of which it holds the parameters `of_base`."""
    name, full_name = _base_name(base), _full_name(base)
    is_named = name == full_name or Path(full_name) == DIRECTORY
    return {
        "name_or_path": name,
        **({"path": os.path.abspath(full_name)} if keeps_path and not is_named else {}),
        **fingerprint(base),
        "sample": sample_weights(base, of_base),
        "rope_parameters": rope_parameters(base),
        "vocabulary": sample_vocabulary(base, of_base),
    }


def count_parameters(units: nn.Module, base: nn.Module) -> tuple[int, int, int]:
    """Trainable parameters of the units and of the base, and all of the base."""
    return (
        sum(size(p) for p in units.parameters() if p.requires_grad),
        sum(size(p) for p in base.parameters() if p.requires_grad),
        sum(size(p) for p in base.parameters()),
    )


def read_adapter(
    directory: str | Path,
    model: PreTrainedModel,
    *,
    revision: str | None = None,
    token: str | bool | None = None,
) -> AdapterFiles:
    """An adapter directory, or a hub adapter, whose config is checked against the base.

    Args:
        directory: an adapter directory, or the name of a hub repository that is one.
        model: the base that the adapter was trained on, or one of its shape.
        revision: branch, tag or commit of a hub repository.
        token: token for a private one, as `huggingface_hub` takes it.

    Raises:
        FileNotFoundError: the directory or one of its files is missing.
        ValueError: the adapter is for another base or schema, or damaged; the message names both
            bases.
    """
    files = [CONFIG_NAME, WEIGHTS_NAME]
    adapter = AdapterFiles.read(local_directory(directory, files, revision=revision, token=token))
    adapter.expect_base(fingerprint(model), _full_name(model))
    expect_vocabulary(adapter, model)
    both = (
        f"{adapter.config_path}: the adapter's base ({adapter.base_name}) and the given model "
        f"({called(_full_name(model))}) have different"
    )
    theirs, own = adapter.base.get("rope_parameters"), rope_parameters(model)
    if None not in (theirs, own) and theirs != own:
        warnings.warn(f"{both} rope_parameters: {theirs} and {own}", stacklevel=4)
    if other := other_weights(adapter.base.get("sample", {}), model):
        warnings.warn(f"{both} weights, as in {other}", stacklevel=4)
    elif tokens := other_rows(adapter, model):
        warnings.warn(
            f"{both} embeddings of the tokens {tokens}: those of tokens that were added are saved "
            "with ReftConfig(…, token_rows=[…])",
            stacklevel=4,
        )
    return adapter


def load_trained(
    reft_model: ModelWithUnits,
    adapter: AdapterFiles,
    include_model: bool = True,
    allow_nan: bool = False,
) -> None:
    """Load an adapter's weights into a model of its config; what it trained is to be trained."""
    loaded = load_weights(reft_model, adapter, include_model=include_model, allow_nan=allow_nan)
    for name, parameter in reft_model.model.named_parameters():
        if adapter.config.peft is None:  # else PEFT has said what it trains
            parameter.requires_grad_(f"model.{name}" in loaded)
    for part in trained_modules(reft_model.model, adapter.config.modules_to_save).values():
        part.requires_grad_(True)


def buildable_config(
    adapter: AdapterFiles,
    base: PreTrainedModel,
    include_model: bool = True,
    allow_nan: bool = False,
) -> ReftConfig:
    """The config to build for a base, after what it says is compared to the file's tensors.

    It says the sizes of units and PEFT's layers on the meta device, which take no memory. The base
    stays as it is. The `peft` section is that of `built_from_file`.

    Raises:
        ValueError: it does not fit the base or the weights.
    """
    config, others = adapter.config, (PREFIX,) if include_model else (PREFIX, "model.")
    shapes = {n: shape for n, shape in adapter.shapes().items() if not n.startswith(others)}
    own: dict[str, Any] | None = dict(base.named_parameters()) | dict(base.named_buffers())
    with value_errors(adapter.config_path):
        section = section_of(base, config.peft)
        if section is not None and not is_peft_model(base):
            section = built_from_file(section, base, shapes)
            names = [name.removeprefix("model.") for name in shapes]
            own = meta_state(section, base, names if include_model else None)
            config = replace(config, peft=section)
        units = _units_without_values(config, base)
    if own is not None and units is not None:
        own = {f"model.{name}": tensor for name, tensor in own.items()}
        _expect_fit(adapter, shapes, units, own | units, include_model)
        state = {name: t for name, t in adapter.weights().items() if name in shapes}
        _expect_values(adapter, state, own | units, allow_nan)
    return config


def _units_without_values(config: ReftConfig, base: PreTrainedModel) -> dict[str, Any] | None:
    """The tensors of units on the meta device; None where a user's class cannot be built there."""
    try:
        with torch.device("meta"):
            placed = place_units(config, base)
    except Exception:
        if all(
            entry.unit_class.__module__.startswith("reftnoise.") for entry in config.representations
        ):
            raise
        return None
    modules = nn.ModuleDict({unit.key: unit.unit for unit in placed})
    return dict(modules.state_dict(prefix="interventions."))


def _expect_fit(
    adapter: AdapterFiles,
    shapes: Mapping[str, tuple[int, ...]],
    expected: Iterable[str],
    own: Mapping[str, Any],
    include_model: bool,
) -> None:
    """Raise a ValueError where a file holds other tensors than a model of its config.

    Args:
        adapter: the adapter.
        shapes: the shapes of what is loaded of its file.
        expected: the names of all tensors of units.
        own: the tensors of the model by name, on any device.
        include_model: whether what it trained of the base is loaded, too.
    """
    path, expected = adapter.weights_path, list(expected)
    of_base = adapter.base_parameters if include_model else []
    if missing := [name for name in (*expected, *of_base) if name not in shapes]:
        raise ValueError(
            f"{path}: the config names {one_line(missing[0])}, the file does not hold it"
        )
    announced = {*expected, *adapter.base_parameters} & set(own)
    if unknown := [name for name in shapes if name not in announced]:
        raise ValueError(
            f"{path}: holds {one_line(unknown[0])}, which neither the config nor the base has"
        )
    for name, shape in shapes.items():
        if tuple(own[name].shape) != shape:
            raise ValueError(
                f"{path}: {name} has shape {brief(shape)}, the config says {tuple(own[name].shape)}"
            )


def _expect_values(
    adapter: AdapterFiles, state: Mapping[str, Tensor], own: Mapping[str, Any], allow_nan: bool
) -> None:
    """Raise a ValueError for tensors of a file whose dtypes or numbers no model can compute with.

    Arguments are as in `_expect_fit`; `state` is what is loaded.
    """
    for name, tensor in state.items():
        if tensor.dtype != own[name].dtype and not {tensor.dtype, own[name].dtype} <= _CASTABLE:
            raise ValueError(
                f"{adapter.weights_path}: {name} has dtype {dtype_name(tensor.dtype)}, the model's "
                f"has {dtype_name(own[name].dtype)}"
            )
    if not allow_nan:
        expect_finite(adapter, state)


def load_weights(
    reft_model: Any, adapter: AdapterFiles, include_model: bool = True, allow_nan: bool = False
) -> set[str]:
    """Load an adapter's weights into a model, or another module with the same `interventions`.

    Everything is checked before anything changes.

    Args:
        reft_model: the model.
        adapter: the adapter.
        include_model: whether to load what it trained of the base, too.
        allow_nan: whether to load numbers that are not finite.

    Returns:
        The names of the weights.
    """
    state = adapter.weights()
    rows = {name: state.pop(name) for name in list(state) if name.startswith(PREFIX)}
    if not include_model:
        state = {name: tensor for name, tensor in state.items() if not name.startswith("model.")}
    expected = [name for name in reft_model.state_dict() if name.startswith("interventions.")]
    own = {**dict(reft_model.named_parameters()), **dict(reft_model.named_buffers())}
    shapes = {name: tuple(tensor.shape) for name, tensor in state.items()}
    _expect_fit(adapter, shapes, expected, own, include_model)
    _expect_values(adapter, state, own, allow_nan)
    if include_model and not allow_nan:
        expect_finite(adapter, rows)
    for name, tensor in state.items():
        is_unit = not name.startswith("model.")  # the base's dtypes are the base's
        if is_unit and own[name].dtype != tensor.dtype:  # as it was when it was saved
            own[name].data = own[name].data.to(tensor.dtype)
    if include_model and hasattr(reft_model, "model"):
        put_rows(adapter, rows, reft_model.model)
    parts = {name: part_like(own[name], tensor) for name, tensor in state.items()}
    reft_model.load_state_dict(parts, strict=False)  # checked above, with clearer errors
    for unit in reft_model.interventions.values():  # which may keep R: FSDP2 marks no change
        unit.train(unit.training)
    return set(state)


def keep_trained(module: ModelWithUnits, state: dict[str, Any], prefix: str, _: Any) -> None:
    """Remove frozen tensors of the base from a state: checkpoints hold adapters only."""
    if not takes_weights_of_one_process(module.model):
        for name in set(state) - set(without_frozen(module, state, prefix)):
            del state[name]


def without_frozen(
    module: ModelWithUnits, state: Mapping[str, Tensor], prefix: str = ""
) -> dict[str, Tensor]:
    """The part of a state that an adapter holds."""
    kept = {f"{prefix}model.{name}" for name in _kept(module)}
    return {n: t for n, t in state.items() if n in kept or not n.startswith(f"{prefix}model.")}


def expect_trained(module: ModelWithUnits, keys: Any) -> None:
    """Take the tensors that `keep_trained` removes off the list of missing keys."""
    trained = {f"model.{name}" for name in _kept(module)}
    frozen = {f"model.{n}" for n in module.model.state_dict()} - trained

    def is_frozen(key: str) -> bool:  # the key may begin with the names of modules around ours
        parts = key.split(".")
        return any(".".join(parts[start:]) in frozen for start in range(len(parts)))

    keys.missing_keys[:] = [key for key in keys.missing_keys if not is_frozen(key)]


def _kept(module: ModelWithUnits) -> set[str]:
    """The tensors of a base that are saved: trained ones, named ones, and those that PEFT adds."""
    base = module.model
    once = dict(base.named_parameters()) | dict(base.named_buffers())  # tied ones under one name
    named = trained_modules(base, module.reft_config.modules_to_save).values()
    chosen = {id(t) for part in named for t in (*part.parameters(), *part.buffers())}
    trained = {name for name, t in once.items() if t.requires_grad or id(t) in chosen}
    return trained if module.reft_config.peft is None else trained | own_state(base)


def _base_name(model: PreTrainedModel) -> str:
    """A hub name, or the last part of a path: the rest of it stays on the machine."""
    name = _full_name(model)
    is_path = name not in PACKAGED and os.path.exists(name)  # any text
    return Path(name).name if is_path else name


def _full_name(model: PreTrainedModel) -> str:
    return str(getattr(getattr(inner_model(model), "config", None), "name_or_path", ""))
