"""Gradient checkpointing: what the backward pass recomputes must run as it did in the forward."""

import contextlib
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import nn

_FUNCTIONS = ("checkpoint_fn", "_gradient_checkpointing_func")
"""What recomputes: of torch's CheckpointWrapper, which FSDP puts around layers; of transformers."""


def checkpointed_modules(base: nn.Module) -> list[nn.Module]:
    """The modules whose layers gradient checkpointing would recompute now."""
    return [
        module
        for module in base.modules()
        if module.training
        and torch.is_grad_enabled()
        and any(name in vars(module) for name in _FUNCTIONS)
        and vars(module).get("gradient_checkpointing", "checkpoint_fn" in vars(module))
    ]


@contextlib.contextmanager
def checkpointing(
    module: nn.Module, repeatable: Callable[[Callable[..., Any]], Callable[..., Any]]
) -> Iterator[None]:
    """Within the block, checkpoint what `repeatable` makes of the functions of `module`.

    Args:
        module: one of `checkpointed_modules`.
        repeatable: called as a layer is about to run; returns its function such that the backward
            pass, which comes when the block has ended, recomputes what runs now.
    """
    name = next(name for name in _FUNCTIONS if name in vars(module))
    checkpoint = getattr(module, name)

    def checkpoint_repeatable(function: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        return checkpoint(repeatable(function), *args, **kwargs)

    setattr(module, name, checkpoint_repeatable)
    try:
        yield
    finally:
        setattr(module, name, checkpoint)
