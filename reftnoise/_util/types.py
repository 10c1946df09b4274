"""Whether plain values are of the types that dataclasses state."""

from collections.abc import Mapping
from dataclasses import fields, is_dataclass
from enum import Enum
from types import NoneType, UnionType
from typing import Any, Literal, Union, get_args, get_origin, get_type_hints

from .errors import brief, is_finite_number

_LARGEST = 2.0**128 - 2.0**104
"""Of float32."""


def fits(value: Any, hint: Any) -> bool:  # noqa: PLR0911  # one for each kind of type
    """Whether a plain value is of a type; an int is a float, and a text may name an Enum's member.

    A float is a finite number of float32, as torch computes with. A kind of type that is not known
    fits everything.
    """
    origin, parts = get_origin(hint), get_args(hint)
    if origin in (Union, UnionType):
        return any(fits(value, part) for part in parts)
    if origin is Literal:
        return value in parts
    if hint is Any:
        return True
    if hint in (None, NoneType):
        return value is None
    if hint is int:
        return isinstance(value, int) and not isinstance(value, bool)
    if hint is float:
        return is_finite_number(value) and abs(value) <= _LARGEST
    if origin is list:
        return isinstance(value, list | tuple) and all(fits(item, parts[0]) for item in value)
    if origin is dict:
        return isinstance(value, Mapping) and all(fits(item, parts[1]) for item in value.values())
    if isinstance(hint, type) and issubclass(hint, Enum):
        return isinstance(value, hint | str)
    return isinstance(value, hint) if isinstance(hint, type) else True


def expect_types(config: Any, where: str = "") -> None:
    """Raise a ValueError for the first field of a dataclass whose value is of another type.

    Args:
        config: dataclass, whose fields may be dataclasses.
        where: text before the field's name, such as `data.`.
    """
    hints = get_type_hints(type(config))
    for field in fields(config):
        expect_type(f"{where}{field.name}", getattr(config, field.name), hints[field.name])


def as_yaml(value: Any) -> str:
    """A value in a few words, with the null of YAML for None."""
    return "null" if value is None else brief(value)


def expect_type(name: str, value: Any, hint: Any) -> None:
    """Raise a ValueError for a value of another type, as in `expect_types`."""
    if not fits(value, hint):
        null = "; leave it out for its default" if value is None else ""
        raise ValueError(f"{name}: expected {described(hint)}, got {as_yaml(value)}{null}")
    if is_dataclass(value):
        expect_types(value, f"{name}.")
    elif isinstance(value, list) and any(map(is_dataclass, value)):
        for index, item in enumerate(value):
            expect_type(f"{name}[{index}]", item, type(item))


def described(hint: Any) -> str:
    """A type in words: `str`, `dict[str, str]`, `none, memory or disk`."""
    if get_origin(hint) is Literal:
        return " or ".join(map(str, get_args(hint)))
    if hint is float:
        return "finite float32"
    return hint.__name__ if type(hint) is type else str(hint).replace("typing.", "")
