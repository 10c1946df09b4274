"""The `peft` section of a config: a method of PEFT as plain values, without a model."""

import inspect
from collections.abc import Mapping
from dataclasses import MISSING, Field, fields, is_dataclass
from types import ModuleType
from typing import Any

from .._util.errors import brief, nearest, one_line
from .values import plain

# Fields of a PEFT config that say where it came from and how it is used, not what it is.
_NOT_SAVED = {
    "auto_mapping",
    "base_model_name_or_path",
    "inference_mode",
    "peft_type",
    "peft_version",
    "revision",
    "runtime_config",
}


def read_peft(section: Any) -> dict[str, Any]:
    """A `peft` section as plain values: `peft_type`, and the arguments of that method's config.

    Args:
        section: such a mapping, with `peft_type` in any case (`"lora"`), or a `peft.PeftConfig`.

    Raises:
        ValueError: an unknown method, argument or value; the message says what is possible.
        ImportError: peft is not installed.
    """
    peft = import_peft()
    if isinstance(section, peft.PeftConfig):
        return as_section(section)
    if not isinstance(section, Mapping) or "peft_type" not in section:
        raise ValueError(
            f"peft {brief(section)}: expected a mapping with 'peft_type', such as "
            "{'peft_type': 'lora', 'r': 8}, or a peft.PeftConfig"
        )
    return as_section(peft_config(peft, section))


def peft_config(peft: ModuleType, section: Mapping[str, Any]) -> Any:
    """The `peft.PeftConfig` of a section; a ValueError names what is wrong and what is possible."""
    arguments = {  # of which PEFT has a few as objects of its own
        key: value if is_dataclass(value) else plain(value, f"peft: {key}")
        for key, value in section.items()
    }
    peft_type = arguments.pop("peft_type")
    name = str(peft_type).upper()
    kinds = {kind.value: cls for kind, cls in peft.PEFT_TYPE_TO_CONFIG_MAPPING.items()}
    if name not in kinds:
        raise ValueError(f"peft_type {peft_type!r}; {nearest(name, map(str.lower, sorted(kinds)))}")
    possible = [n for n in inspect.signature(kinds[name]).parameters if n not in _NOT_SAVED]
    if unknown := [key for key in arguments if key not in possible]:
        raise ValueError(
            f"peft: unknown key {unknown[0]!r} for {kinds[name].__name__}; "
            f"{nearest(unknown[0], possible)}"
        )
    try:
        return kinds[name](**arguments)
    except (AttributeError, LookupError, TypeError, ValueError) as error:
        raise ValueError(f"peft {name.lower()}: {one_line(error)}") from None


def as_section(config: Any) -> dict[str, Any]:
    """The section of a `peft.PeftConfig`: what differs from the defaults, as JSON values."""
    section = {"peft_type": config.peft_type.value.lower()}
    for field in fields(config):
        if field.name not in _NOT_SAVED:
            value = plain(getattr(config, field.name), f"peft: {field.name}")
            if value != plain(_default(field), field.name):
                section[field.name] = value
    return section


def _default(field: Field[Any]) -> Any:
    return field.default if field.default_factory is MISSING else field.default_factory()


def import_peft() -> ModuleType:
    """The package peft; an ImportError says how to install it."""
    try:
        import peft
    except ImportError:
        raise ImportError(
            "the config has a peft section, which needs peft: pip install 'reftnoise[peft]'"
        ) from None
    return peft
