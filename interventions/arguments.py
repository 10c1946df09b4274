"""What constructors of interventions take: fields, names of activations and dtypes."""

import difflib
import inspect
from collections.abc import Iterable, Mapping
from typing import Any, TypedDict

import torch
from torch import Tensor, nn
from transformers.activations import ACT2FN

from .factors import Activation


class PyveneFields(TypedDict, total=False):
    """The fields of pyvene's `RepresentationConfig`, which it passes to every class it builds."""

    layer: Any
    component: Any
    unit: Any
    max_number_of_units: Any
    intervention_type: Any
    intervention: Any
    subspace_partition: Any
    group_key: Any
    intervention_link_key: Any
    moe_key: Any
    source_representation: Any
    hidden_source_representation: Any
    latent_dim: Any
    use_fast: Any


class PyreftFields(PyveneFields, total=False):
    """Those fields, and arguments that pyreft's classes are often given and do not read."""

    device: Any
    init_orth: Any


class NoiseFields(PyveneFields, total=False):
    """The same fields for a class that has no rank."""

    low_rank_dimension: Any


class ReftArguments(PyreftFields, total=False):
    """The arguments of `ReftIntervention` but width and rank, for classes that pass them on."""

    dropout: float
    act_fn: str | Activation | None
    dtype: torch.dtype | str


def did_you_mean(name: str, known: Iterable[str]) -> str:
    """A question about the known name that is nearest, with a space after it, or nothing."""
    near = difflib.get_close_matches(name.lower(), known, n=1)
    return f"did you mean {near[0]!r}? " if near else ""


def reject_unknown(cls: type, fields: Mapping[str, Any]) -> None:
    """Raise a TypeError for a field that is neither an argument of `cls` nor one of pyvene's."""
    unread = getattr(cls, "unread_arguments", ())
    for name in fields:
        if name not in NoiseFields.__annotations__ and name not in unread:
            known = constructor_arguments(cls)
            raise TypeError(
                f"{cls.__name__} got an unknown argument {name!r}; {did_you_mean(name, known)}"
                f"it takes: {', '.join(known)}"
            )


def constructor_arguments(cls: type) -> dict[str, inspect.Parameter]:
    """The arguments of an intervention class by name, without pyvene's own fields.

    A constructor that passes `**arguments` on has those of its parents too.
    """
    arguments: dict[str, inspect.Parameter] = {}
    for owner in cls.__mro__:
        if "__init__" not in vars(owner):
            continue
        _, *parameters = inspect.signature(vars(owner)["__init__"]).parameters.values()
        variadic = [p.name for p in parameters if p.kind is p.VAR_KEYWORD]
        named = [p for p in parameters if p.kind not in (p.VAR_KEYWORD, p.VAR_POSITIONAL)]
        arguments = {p.name: p for p in named} | arguments
        if not variadic or variadic == ["pyvene"]:
            break
    return arguments


def activation_module(act_fn: str | Activation | None) -> nn.Module:
    """An activation without weights as a module; the identity for None.

    Raises:
        ValueError: an unknown name, something that is no function, or one with weights.
    """
    if act_fn is None:
        module: nn.Module = ACT2FN["linear"]
    elif isinstance(act_fn, str) and act_fn in ACT2FN:
        module = ACT2FN[act_fn]
    elif callable(act_fn) and not isinstance(act_fn, type):
        module = act_fn if isinstance(act_fn, nn.Module) else _Function(act_fn)
    else:
        raise ValueError(
            f"act_fn {act_fn!r} is not an activation of transformers; "
            f"{did_you_mean(str(act_fn), ACT2FN)}it has: {', '.join(ACT2FN)}"
        )
    if next(module.parameters(), None) is not None:
        raise ValueError(f"act_fn {act_fn!r} has weights of its own: expected one without")
    return module


class _Function(nn.Module):
    """A function as a module."""

    def __init__(self, function: Activation) -> None:
        super().__init__()
        self._function = function

    def forward(self, inner: Tensor) -> Tensor:
        return self._function(inner)


def as_dtype(dtype: torch.dtype | str) -> torch.dtype:
    """A floating-point `torch.dtype` from itself or its name (`"bfloat16"`)."""
    result = getattr(torch, dtype, None) if isinstance(dtype, str) else dtype
    if result not in (torch.float16, torch.bfloat16, torch.float32, torch.float64):
        raise ValueError(f"dtype {dtype!r}: expected 'float16', 'bfloat16', 'float32' or 'float64'")
    return result


def dtype_name(dtype: torch.dtype) -> str:
    """`torch.bfloat16` → `"bfloat16"`."""
    return str(dtype).removeprefix("torch.")
