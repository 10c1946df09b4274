"""What evaluation needs of weights, computed once and kept until the weights may have changed."""

import operator
from collections.abc import Callable, Hashable
from typing import Any, TypeVar

import torch
from torch import Tensor, nn
from torch.optim.optimizer import register_optimizer_step_post_hook

Value = TypeVar("Value")

_MOST = 8
"""Values of one module, such as its edit at some scales."""

_steps_taken = 0


def _count_step(*_: Any) -> None:
    global _steps_taken  # noqa: PLW0603  # fused optimizers do not raise a parameter's version
    _steps_taken += 1


register_optimizer_step_post_hook(_count_step)


class KeepsForEvaluation(nn.Module):
    """A module that keeps values of its weights until an optimizer steps, a weight changes, the
    module moves, or `train()` or `eval()` is called.

    A change through `weight.data` alone, which torch does not record, needs one of these calls.
    """

    _kept: tuple[list[Tensor], list[tuple[int, int]], dict[Hashable, Any]] | None = None
    """Tensors, the state in which each of them was, and the values of that state."""

    def kept(self, name: Hashable, compute: Callable[[], Value]) -> Value:
        """The value of a name, computed outside autograd where it is not kept."""
        tensors = [*self.parameters(), *self.buffers()]
        try:
            states = [_state(tensor) for tensor in tensors]
        except RuntimeError:  # within vmap
            return compute()
        states.append((_steps_taken, 0))
        kept = self._kept
        if kept is None or kept[1] != states or not all(map(operator.is_, kept[0], tensors)):
            kept = self._kept = tensors, states, {}
        values = kept[2]
        if name not in values:
            if len(values) == _MOST:
                values.clear()
            # Outside inference mode: what is kept may meet autograd later.
            with torch.inference_mode(False), torch.no_grad():
                values[name] = compute()
        value: Value = values[name]
        return value

    def train(self, mode: bool = True) -> Any:
        self._kept = None
        return super().train(mode)

    def _apply(self, *args: Any, **kwargs: Any) -> Any:
        self._kept = None
        return super()._apply(*args, **kwargs)  # type: ignore[no-untyped-call]  # of torch


def _state(tensor: Tensor) -> tuple[int, int]:
    return tensor.data_ptr(), 0 if tensor.is_inference() else tensor._version
