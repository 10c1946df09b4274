"""Bases with quantised weights: units before a layer train on the gradients that pass through it.

Quantised kernels are made for inference. Some have no backward pass and raise no error: the
gradient then takes the residual stream alone.
"""

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel


def keep_differentiable(base: nn.Module) -> None:
    """Keep bitsandbytes from packing 4-bit weights for a kernel without a backward pass.

    It does so on CPUs with AVX512-BF16 when a layer is first evaluated, and leaves them packed for
    training. Weights that are packed already are unpacked.
    """
    for module in base.modules():
        if getattr(module, "support_avx512bf16_for_cpu", False):
            module.support_avx512bf16_for_cpu = False  # type: ignore[assignment]  # of no tensor
            module.state_dict()  # unpacks in place, so that the file is the same on every CPU


def check_gradients(base: PreTrainedModel) -> None:
    r"""Compare the backward pass of quantised linear layers, one of each kind, with their forward.

    A linear layer f has one derivative J everywhere, with $J x = (f(x) - f(-x)) / 2$, so that
    $\langle x, J^\top J x \rangle = \lVert J x \rVert^2$.

    Raises:
        ValueError: the two differ by more than quantised activations explain.
    """
    if any(type(module).__module__.startswith("torch.distributed.") for module in base.modules()):
        return  # layers of shards have their weights during a pass alone
    for name, module in one_of_each_kind(base):
        width: Any = module.in_features
        inputs = torch.arange(2 * width, device=_device(module, base)).sin()
        inputs = inputs.to(base.dtype).view(1, 2, width).requires_grad_()
        try:
            with torch.enable_grad(), torch.autocast(inputs.device.type, enabled=False):
                outputs = module.forward(inputs)
                change = (outputs - module.forward(-inputs.detach())).detach() / 2
            gradient = torch.zeros_like(inputs)
            if outputs.requires_grad:
                (flowing,) = torch.autograd.grad(outputs, inputs, change, allow_unused=True)
                gradient = gradient if flowing is None else flowing
        except Exception:
            continue  # a pass of the base raises it, too
        backward = (inputs.detach().float() * gradient.float()).sum()
        forward = change.float().square().sum()
        if (backward - forward).abs() > 0.2 * forward:
            weight = getattr(module, "weight", None)
            kind = "" if weight is None else f" of {type(weight).__name__}"
            raise ValueError(
                f"{name}: the backward pass of this {type(module).__name__}{kind} is not that of "
                "its forward pass, so gradients of units before it would be wrong: load the base "
                "with another backend, or other quantisation"
            )


def one_of_each_kind(base: nn.Module) -> Iterator[tuple[str, nn.Module]]:
    """The first quantised linear layer of every class of layer and of weight."""
    seen: set[tuple[type, type]] = set()
    for name, module in base.named_modules():
        kind = (type(module), type(getattr(module, "weight", None)))
        if kind not in seen and _is_quantised(module):
            seen.add(kind)
            yield name, module


def _is_quantised(module: nn.Module) -> bool:
    """Whether a module is linear, with weights that are not simply numbers."""
    if not isinstance(getattr(module, "in_features", None), int) or any(module.children()):
        return False
    weight = getattr(module, "weight", None)
    if not isinstance(weight, Tensor):
        return True
    if type(weight).__module__.startswith("torch.distributed.") or weight.numel() == 0:  # a shard
        return False
    usual = weight.dtype in (torch.float16, torch.bfloat16, torch.float32, torch.float64)
    return type(weight) not in (Tensor, nn.Parameter) or not usual


def _device(module: nn.Module, base: PreTrainedModel) -> torch.device:
    tensors = (*module.parameters(), *module.buffers())
    return next((t.device for t in tensors if t.device.type != "meta"), base.device)
