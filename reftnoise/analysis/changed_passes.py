"""Passes of a model in which a function sees, or changes, what modules read or return.

The hooks are plain ones: nothing of the engine takes part, so it can be compared with them.
"""

import contextlib
from collections.abc import Callable, Iterator, Sequence
from typing import Any, TypeAlias

from torch import Tensor, nn

ModuleChange: TypeAlias = tuple[nn.Module, bool, Callable[[Tensor], Tensor]]
"""A module, whether its input is meant and not its output, and what becomes of these states."""


@contextlib.contextmanager
def changing(changes: Sequence[ModuleChange]) -> Iterator[None]:
    """Within the block, functions are applied to states that modules read or return.

    The states are the first of a module's arguments or outputs, or its argument `hidden_states`.
    """
    with contextlib.ExitStack() as stack:
        for module, is_input, function in changes:
            handle = (
                module.register_forward_pre_hook(_of_input(function), with_kwargs=True)
                if is_input
                else module.register_forward_hook(_of_output(function))
            )
            stack.callback(handle.remove)
        yield


def _of_input(function: Callable[[Tensor], Tensor]) -> Callable[..., Any]:
    def change(_: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        if args:
            return (function(args[0]), *args[1:]), kwargs
        return args, kwargs | {"hidden_states": function(kwargs["hidden_states"])}

    return change


def _of_output(function: Callable[[Tensor], Tensor]) -> Callable[..., Any]:
    def change(_: nn.Module, __: Any, output: Any) -> Any:
        if isinstance(output, tuple):
            return (function(output[0]), *output[1:])
        return function(output)

    return change
