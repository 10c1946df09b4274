"""The `peft` section of a saved adapter, whose layers are built without looking elsewhere.

PEFT runs patterns of a section, reads files and tokenizers that it names, and imports a module by
name, all to give weights their first values. A saved adapter has all values in its own file. So
patterns become the names of the modules that they match, and what names other places is left out.
"""

import copy
import itertools
import math
import re
import time
from collections.abc import Collection, Iterable, Mapping
from dataclasses import fields
from typing import Any

import regex
import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from ..._util.errors import brief
from ...config.peft import import_peft, peft_config
from .peft import own_state, with_peft

_FIRST_VALUES = (
    *("prompt_tuning_init", "prompt_tuning_init_text", "prompt_tuning_init_task"),
    *("prompt_tuning_init_state_dict_path", "tokenizer_name_or_path", "tokenizer_kwargs"),
    *("megatron_config", "megatron_core"),
)
_OTHER_PLACES = ("adapters", "shadow_model")
"""Arguments by which X-LoRA and Shadow load the other models that they need."""

_PATTERNS = ("target_modules", "exclude_modules", "feedforward_modules")
"""Patterns where they are strings, and names in lists."""

_BY_PATTERN = (
    *("rank_pattern", "alpha_pattern", "lambda_pattern", "block_size_pattern"),
    "n_frequency_pattern",
)
"""Mappings from the pattern of a module's name."""

_PUT_INTO_PATTERNS = ("modules_to_save", "layers_pattern", "target_svd_config")
_PLAIN = re.compile(r"[\w.\[\]-]+")

_OF_MODULES = ("encoder_num_layers", "depth", "shadow_num_hidden_layers")
_OF_SIZES = (
    *("num_virtual_tokens", "token_dim", "num_tasks", "num_ranks", "num_transformer_submodules"),
    *("n_skills", "n_splits", "theta_d_length", "r"),
)
"""Numbers of modules, which the file holds tensors of, and of dimensions or elements."""

_SECONDS = 1.0
"""Time for all patterns of a section."""

_MOST_ROUNDS = 10
"""Of LoftQ and of PiSSA's fast decomposition, which PEFT runs again on the base's weights."""


def built_from_file(
    section: Mapping[str, Any], base: nn.Module, shapes: Mapping[str, tuple[int, ...]]
) -> dict[str, Any]:
    """A section with which PEFT adds the same layers to a base, and reads the base alone.

    Args:
        section: the section of a saved adapter.
        base: the base, without PEFT's layers.
        shapes: shapes of the adapter's tensors by name.

    Raises:
        ValueError: the section needs other models, is damaged, or would take long.
    """
    for key in _OTHER_PLACES:
        if section.get(key) not in (None, "mirror"):
            raise ValueError(f"peft {key} {brief(section[key])}: loading reads no other models")
    _expect_few(section, shapes)
    names = {name: None for name, _ in base.named_modules() if name}
    matcher, owners = _Matcher(), _owners(names, shapes)
    kept = {key: value for key, value in section.items() if key not in _FIRST_VALUES}
    for key, value in kept.items():
        if key in _PATTERNS and isinstance(value, str) and value.lower() != "all-linear":
            kept[key] = [name for name in names if matcher.matches(key, value, name)]
            if key == "target_modules" and not kept[key]:
                raise ValueError(f"peft {key} {brief(value)}: the base has no such module")
        elif key in _BY_PATTERN and isinstance(value, Mapping):
            kept[key] = matcher.by_name(key, value, owners)
        elif key in _PUT_INTO_PATTERNS and value is not None:
            for part in [value] if isinstance(value, str) else value:
                if not isinstance(part, str) or not _PLAIN.fullmatch(part):
                    raise ValueError(f"peft {key} {brief(part)}: expected the name of a module")
    return kept


def meta_state(
    section: Mapping[str, Any], base: PreTrainedModel, names: Collection[str] | None
) -> dict[str, Tensor] | None:
    """The parameters and buffers of a base with PEFT's layers, by name, on the meta device.

    Args:
        section: what `built_from_file` gives.
        base: the base, which stays as it is.
        names: names of what the file holds of the base and of PEFT; None if that is not loaded.

    Returns:
        None where this cannot be known before the layers are built: on a base that is quantised,
        sharded or offloaded, and of methods that compute values in the meantime.

    Raises:
        ValueError: PEFT cannot build the layers, or they have other tensors than those named.
    """
    tensors = {id(t): t for t in itertools.chain(base.parameters(), base.buffers())}
    if any(t.is_meta or type(t) not in (Tensor, nn.Parameter) for t in tensors.values()):
        return None
    shells: dict[int, Any] = {key: _shell(tensor) for key, tensor in tensors.items()}
    if isinstance(section.get("init_lora_weights"), str):
        section = {**section, "init_lora_weights": True}
    try:
        with torch.device("meta"):
            built = with_peft(copy.deepcopy(base, shells), section)
    except (RuntimeError, NotImplementedError):
        return None
    own = dict(built.named_parameters()) | dict(built.named_buffers())
    if names is not None and (missing := sorted(own_state(built) - set(names))):
        raise ValueError(f"the peft section names {missing[0]}, the file does not hold it")
    return own


def restore_section(wrapper: Any, section: Mapping[str, Any]) -> None:
    """Let PEFT's wrapper say the saved section again, of which nothing runs any more."""
    (own,) = wrapper.peft_config.values()
    saved = peft_config(import_peft(), section)
    for field in fields(own):
        if field.name in section:
            setattr(own, field.name, getattr(saved, field.name))


def _shell(tensor: Tensor) -> Tensor:
    """A tensor of the same shape, without values."""
    empty = torch.empty_like(tensor, device="meta")
    if isinstance(tensor, nn.Parameter):
        return nn.Parameter(empty, requires_grad=tensor.requires_grad)
    return empty


def _owners(names: Collection[str], tensors: Iterable[str]) -> list[str]:
    """The modules of a base to which PEFT has added tensors."""
    owners = dict[str, None]()
    for tensor in tensors:
        path = tensor.removeprefix("model.base_model.model.")
        while path and path not in names:
            path = path.rpartition(".")[0]
        owners[path] = None
    return [name for name in owners if name]


def _expect_few(section: Mapping[str, Any], shapes: Mapping[str, tuple[int, ...]]) -> None:
    """Raise a ValueError for numbers of which each costs a module, or a round of arithmetic."""
    tensors, largest = len(shapes), max(map(math.prod, shapes.values()), default=0)
    counts = {key: (section.get(key, 0), tensors) for key in _OF_MODULES}
    counts |= {key: (section.get(key, 0), largest) for key in _OF_SIZES}
    copies = section.get("layer_replication") or ()
    counts["layer_replication"] = (sum(end - start for start, end in copies), tensors)
    loftq = section.get("loftq_config") or {}
    counts["loftq_config"] = (loftq.get("loftq_iter", 1), _MOST_ROUNDS)
    rounds = re.fullmatch(r"pissa_niter_(\d+)", str(section.get("init_lora_weights")))
    counts["init_lora_weights"] = (int(rounds[1]) if rounds else 0, _MOST_ROUNDS)
    for key, (count, most) in counts.items():
        if count is not None and not 0 <= count <= most:
            raise ValueError(f"peft {key} {brief(section[key])}: expected at most {most}")


class _Matcher:
    """Patterns against the names of a base's modules, for as long as all of them may take."""

    def __init__(self) -> None:
        self._end = time.monotonic() + _SECONDS

    def matches(self, key: str, pattern: str, name: str) -> bool:
        left = self._end - time.monotonic()
        try:
            if left <= 0:
                raise TimeoutError
            return regex.fullmatch(pattern, name, timeout=left) is not None
        except TimeoutError:
            raise ValueError(f"peft {key} {brief(pattern)}: takes too long to match") from None
        except (regex.error, RecursionError) as error:
            raise ValueError(f"peft {key} {brief(pattern)}: {error}") from None

    def by_name(self, key: str, values: Mapping[str, Any], names: Iterable[str]) -> dict[str, Any]:
        """A mapping from patterns, of which the first that matches counts, as one from names."""
        by_name: dict[str, Any] = {}
        for name in names:
            for pattern, value in values.items():
                if self.matches(key, rf"(.*\.)?({pattern})", name):
                    by_name.setdefault(re.escape(name), value)
        return by_name
