"""What evaluation needs of weights, computed once and kept until the weights may have changed."""

import operator
from collections.abc import Callable, Hashable
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.forward_ad import unpack_dual
from torch.optim.optimizer import register_optimizer_step_post_hook

_MOST = 8
"""Values of one module, such as its edit at some scales."""

_steps_taken = 0


def _count_step(*_: Any) -> None:
    global _steps_taken  # noqa: PLW0603  # fused optimizers do not raise a parameter's version
    _steps_taken += 1


register_optimizer_step_post_hook(_count_step)


def is_set(module: nn.Module, name: str) -> bool:
    """Whether a vector of a module has another element than 0.

    It waits for the device once after each change of the vector, and not in every pass.
    """
    tensor: Tensor = getattr(module, name)
    if torch.compiler.is_compiling():
        return True
    try:
        state = (tensor.data_ptr(), tensor._version)
    except RuntimeError:  # of inference mode, which counts no changes, or within vmap
        return bool(tensor.any())
    if module.__dict__.get("_set") != (name, *state):
        if not tensor.any():
            return False
        module.__dict__["_set"] = (name, *state)
    return True


class KeepsForEvaluation(nn.Module):
    """A module that keeps values of its weights until an optimizer steps, a weight changes, an
    attribute is set, the module moves, or `train()` or `eval()` is called.

    A change through `weight.data` alone, which torch does not record, needs one of these calls.
    """

    _kept: tuple[list[Tensor], list[tuple[int, int]], dict[Hashable, Any]] | None = None
    """Tensors, the state in which each of them was, and the values of that state."""
    _shared: Any = None
    """What a pass has computed for several modules at once."""

    def kept(self, name: Hashable, compute: Callable[[], Any]) -> Any:
        """The value of a name, a tensor or what else has a `detach`; computed if it is not kept."""
        if self.is_trained:
            return compute()
        tensors = self._tensors()
        try:
            states = [(tensor.data_ptr(), tensor._version) for tensor in tensors]
        except RuntimeError:  # within vmap, or tensors of inference mode, which count no changes
            return compute()
        if any(unpack_dual(tensor).tangent is not None for tensor in tensors):  # type: ignore[no-untyped-call]  # torch's
            return compute()  # in forward mode
        states.append((_steps_taken, 0))
        kept = self._kept
        if kept is None or kept[1] != states or not all(map(operator.is_, kept[0], tensors)):
            kept = self._kept = tensors, states, {}
        values = kept[2]
        value = values.get(name)
        if value is None:
            # Outside inference mode: what is kept may meet autograd later.
            with torch.inference_mode(False), torch.no_grad():
                value = compute().detach()
            if len(values) >= _MOST:
                values.clear()
            values[name] = value
        return value

    def _tensors(self) -> list[Tensor]:
        return [*self.parameters(), *self.buffers()]

    @property
    def is_trained(self) -> bool:
        """Whether its tensors must be differentiable now, so that nothing is kept."""
        if self.training or torch.compiler.is_compiling():
            return True
        return torch.is_grad_enabled() and any(tensor.requires_grad for tensor in self._tensors())

    def __setattr__(self, name: str, value: Any) -> None:
        if name != "_kept":
            self.__dict__["_kept"] = None
        super().__setattr__(name, value)

    def __getstate__(self) -> dict[str, Any]:
        return self.__dict__ | {"_kept": None, "_shared": None}

    def train(self, mode: bool = True) -> Any:
        self._kept = None
        return super().train(mode)

    def _apply(self, *args: Any, **kwargs: Any) -> Any:
        self._kept = None
        return super()._apply(*args, **kwargs)  # type: ignore[no-untyped-call]  # of torch
