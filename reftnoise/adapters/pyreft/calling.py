"""pyreft's form of a call: a mapping of all inputs, and the base's own output before the edited."""

from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager
from typing import Any


def call_with_mapping(
    call: Callable[..., Any],
    inputs: Mapping[str, Any],
    arguments: Mapping[str, Any],
    bare: AbstractContextManager[Any] | None,
) -> tuple[Any, Any]:
    """Call with a mapping of all inputs, as pyreft does.

    Args:
        call: a model or its `generate`.
        inputs: mapping of all inputs.
        arguments: further arguments; where they are not None, they replace those of the mapping.
        bare: context in which the model is its bare base, to call it there first; None not to.

    Returns:
        `(base_output or None, intervened_output)`.
    """
    batch = {**inputs, **{name: value for name, value in arguments.items() if value is not None}}
    original = None
    if bare is not None:
        with bare:
            original = call(**batch)
    return original, call(**batch)
