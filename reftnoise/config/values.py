"""Values of a config as files hold them: what is accepted is what can be saved and loaded equal."""

import contextlib
import math
import os
from collections.abc import Mapping, Sequence, Set
from enum import Enum
from typing import Any

import numpy as np
import torch

from .._util.errors import brief
from ..interventions.arguments import dtype_name

_DEEPEST = 32
_LARGEST = 2**63


def plain(value: Any, where: str, depth: int = 0) -> Any:
    """A value as None, booleans, numbers, texts, lists and mappings with texts as keys.

    Scalars, arrays and tensors become numbers and lists of them; sets, in order, tuples and ranges
    lists; members of enumerations their values; dtypes their names; paths texts.

    Args:
        value: any value.
        where: the key that has it, for messages.
        depth: how deep it is inside others.

    Raises:
        ValueError: no file holds it, or holds it as something else.
    """
    if depth > _DEEPEST:
        raise ValueError(f"{where}: nested more than {_DEEPEST} times")
    named = _named(value)
    if named is not value:
        return plain(named, where, depth + 1)
    if value is None or type(value) is bool:
        return value
    if isinstance(value, str | int | float):
        return _scalar(value, where)
    if isinstance(value, Mapping):
        keys = {key: plain(key, where, depth + 1) for key in value}
        if wrong := [key for key, name in keys.items() if not isinstance(name, str)]:
            raise ValueError(f"{where}: key {brief(wrong[0])}, expected texts as keys")
        return {n: plain(value[k], f"{where}.{n}", depth + 1) for k, n in keys.items()}
    is_list = isinstance(value, Sequence | Set) and not isinstance(value, bytes | bytearray)
    if not is_list:
        raise ValueError(
            f"{where} {brief(value)}: expected a number, a text, a list or a mapping, which files "
            "hold"
        )
    parts = [plain(part, f"{where}[{n}]", depth + 1) for n, part in enumerate(value)]
    if not isinstance(value, Set):
        return parts
    try:
        return sorted(parts)
    except TypeError:
        raise ValueError(f"{where} {brief(value)}: expected a list, which has an order") from None


def plain_if_possible(value: Any) -> Any:
    """As `plain`, but a value that no file holds is returned as it is, and so are tensors.

    A module's attribute that is a tensor may be one of its weights.
    """
    if isinstance(value, torch.Tensor):
        return value
    try:
        return plain(value, "")
    except ValueError:
        return value


def _named(value: Any) -> Any:
    """What a file holds in place of objects of libraries; other values as they are."""
    match value:
        case Enum():
            return value.value
        case torch.dtype():
            return dtype_name(value)
        case np.dtype():
            return value.name
        case os.PathLike():
            return os.fspath(value)
        case torch.Tensor() | np.ndarray() | np.generic() if not isinstance(value, str):
            values: Any = value
            with contextlib.suppress(RuntimeError):  # of a tensor on the meta device
                values = value.tolist()
            return value if type(values) is type(value) else values  # a long double gives itself
    return value


def _scalar(value: str | float, where: str) -> str | int | float:
    if isinstance(value, str):
        try:
            value.encode()
        except UnicodeEncodeError:
            raise ValueError(f"{where} {brief(value)}: expected characters of Unicode") from None
        return str.__str__(value)
    if isinstance(value, int):
        if not -_LARGEST <= value < _LARGEST:
            raise ValueError(f"{where}: expected an integer of at most 64 bits")
        return int(value)
    if not math.isfinite(value):
        raise ValueError(f"{where} {float(value)!r}: expected a finite number")
    return float(value)
