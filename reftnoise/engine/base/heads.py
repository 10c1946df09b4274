"""Attention heads, found by structure: the slices of what the output projection reads."""

import re
from collections.abc import Iterable, Sequence
from typing import Any, NamedTuple

from torch import nn

from .running import uncompiled

_ATTENTION, _NORM = re.compile(r"attn|attention", re.IGNORECASE), re.compile(r"norm|ln_|drop")
_CROSS = re.compile(r"cross|enc", re.IGNORECASE)
_QUERY = re.compile(r"(q|query)(_proj|_lin)?")
OUTPUT_PROJECTION = re.compile(r"(o|out|c)(_proj|_lin)|dense|o|out|Wo")
"""Names of the projection in the models of transformers."""

# Attributes of attentions, and of configs. Where values have another width than queries, it counts.
_WIDTHS = (
    *("v_head_dim", "head_v_dim", "head_dim", "head_size"),
    *("attention_head_size", "key_value_proj_dim"),
)
_NUMBERS = ("num_v_heads", "num_heads", "num_attention_heads", "n_heads", "n_head")


class HeadPlace(NamedTuple):
    """Where the outputs of a layer's heads are side by side."""

    path: str
    """Path of the output projection within the layer."""
    projection: nn.Module
    head_width: int
    heads: int
    """Number of heads, which is that of the queries."""


def find_heads(layer: nn.Module, config: Any) -> HeadPlace:
    """The heads of a layer's own attention, not of one that reads an encoder's states.

    Args:
        layer: layer of a model.
        config: config of its text model.

    Raises:
        ValueError: the layer has no attention, or none with one output projection and heads of one
            width; the message says which.
    """
    layer = uncompiled(layer)
    path, attention = _attention_of(layer)
    modules = {name: module for name, module in attention.named_modules() if name}
    names = [name for name in modules if OUTPUT_PROJECTION.fullmatch(_last(name))]
    if len(names) != 1:
        raise _missing(
            f"{type(attention).__name__} has {_list(modules)}: no single output projection"
        )
    projection = modules[names[0]]
    features = feature_count(projection, is_input=True)
    owner = f"{type(attention).__name__}.{names[0]}"
    if features is None:
        raise _missing(f"{owner} is a {type(projection).__name__}, which does not say its width")
    owners = [attention, *modules.values()]
    count = _first_number(owners, _NUMBERS) or _first_number([config], _NUMBERS)
    width = _first_number(owners, _WIDTHS) or (features // count if count else None)
    if width is None or features != width * (count or features // width):
        raise _missing(
            f"{owner} reads {features} features, but {count} heads of width {width} differ"
        )
    return HeadPlace(f"{path}.{names[0]}", projection, width, features // width)


def _attention_of(layer: nn.Module) -> tuple[str, nn.Module]:
    """Path and module of a layer's own attention."""
    modules = {name: uncompiled(module) for name, module in layer.named_modules() if name}
    names: list[str] = []
    for name in modules:
        is_inner = any(name.startswith(f"{outer}.") for outer in names)
        if _ATTENTION.search(_last(name)) and not _NORM.search(_last(name)) and not is_inner:
            names.append(name)
    if not names:  # a name that says nothing, such as `mixer`
        names = [name for name, _ in layer.named_children() if _is_attention(modules[name])]
    if len(names) > 1:
        names = [name for name in names if not _CROSS.search(_last(name))]
    if len(names) != 1:
        children = _list(dict(layer.named_children()))
        raise _missing(f"{type(layer).__name__} has {children}: no single attention with heads")
    return names[0], modules[names[0]]


def _is_attention(module: nn.Module) -> bool:
    children = [name for name, _ in module.named_children()]
    return all(any(map(kind.fullmatch, children)) for kind in (_QUERY, OUTPUT_PROJECTION))


def runs_of_heads(heads: Sequence[int], width: int) -> tuple[tuple[int, int], ...]:
    """The features of heads: first and end of each run, where neighbours are one run."""
    runs: list[tuple[int, int]] = []
    for head in sorted(heads):
        start, end = head * width, (head + 1) * width
        if runs and runs[-1][1] == start:
            start = runs.pop()[0]
        runs.append((start, end))
    return tuple(runs)


def feature_count(module: nn.Module, *, is_input: bool = False) -> int | None:
    """The last dimension of a module's input or output, if its attributes show it."""
    names = ("in_features", "nx", "input_size_per_partition")  # of linear layers of any library
    if not is_input:
        names = ("out_features", "nf", "embedding_dim")
    return _first_number([module], names)


def _first_number(owners: Iterable[Any], names: Sequence[str]) -> int | None:
    values = (getattr(owner, name, None) for owner in owners for name in names)
    return next((value for value in values if type(value) is int), None)


def _missing(reason: str) -> ValueError:
    return ValueError(f"component 'head_output': {reason}")


def _list(modules: Iterable[str]) -> str:
    return ", ".join(modules) or "no modules"


def _last(name: str) -> str:
    return name.rpartition(".")[2]
