"""Where a model's methods meet calls in pyreft's forms.

This is all that a call in transformers' form runs of it: the forms themselves are in `forms`.
"""

import functools
import inspect
from collections.abc import Callable, Mapping, Sequence
from typing import Any

_COLUMN = "intervention_locations"
_NAMES = frozenset({_COLUMN, "intervene_on_prompt", "output_original_output"})
"""Arguments that calls in transformers' form do not have."""


def in_forms_of_pyreft(method: Callable[..., Any]) -> Callable[..., Any]:
    """`forward` or `generate` of a model, which then also takes calls in pyreft's forms.

    Trainers keep the columns that its signature names: `intervention_locations` is one of them.
    """
    signature = inspect.signature(method)
    *named, rest = signature.parameters.values()
    first = named[1].name
    column = inspect.Parameter(_COLUMN, inspect.Parameter.KEYWORD_ONLY, default=None)

    @functools.wraps(method)
    def call(model: Any, *args: Any, **kwargs: Any) -> Any:
        has_mapping = _takes_mapping(first, args, kwargs)
        if not has_mapping and _NAMES.isdisjoint(kwargs):
            return method(model, *args, **kwargs)
        from .forms import call_in_form

        return call_in_form(method, first, model, args, kwargs, has_mapping=has_mapping)

    call.__signature__ = signature.replace(parameters=[*named, column, rest])  # type: ignore[attr-defined]  # inspect reads it
    return call


def _takes_mapping(first: str, args: Sequence[Any], kwargs: Mapping[str, Any]) -> bool:
    """Whether a call's inputs are a mapping, as the first argument or as `base`.

    A `base` that is no mapping is a column of a batch, if there are other inputs.
    """
    inputs, base = args[0] if args else kwargs.get(first), kwargs.get("base")
    if isinstance(inputs, Mapping) or isinstance(base, Mapping):
        return True
    return "base" in kwargs and inputs is None


class TakesBatches:
    """Lets trainers call a subclass whose `forward` has pyreft's form: `forward(base, …)`."""

    def __init_subclass__(cls, **kwargs: Any) -> None:
        super().__init_subclass__(**kwargs)
        forward = vars(cls).get("forward")
        if forward is not None and "base" in inspect.signature(forward).parameters:
            from .forms import also_for_batches

            cls.forward = also_for_batches(forward, super(cls, cls).forward)  # type: ignore[attr-defined,misc]  # of a model
