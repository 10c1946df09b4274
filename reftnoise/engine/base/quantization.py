"""Bases with quantised weights, whose kernels are made for inference."""

from torch import nn


def keep_differentiable(base: nn.Module) -> None:
    """Keep bitsandbytes from packing 4-bit weights for a kernel without a backward pass.

    It does so on CPUs with AVX512-BF16 when a layer is first evaluated, and leaves them packed for
    training. Weights that are packed already are unpacked.
    """
    for module in base.modules():
        if getattr(module, "support_avx512bf16_for_cpu", False):
            module.support_avx512bf16_for_cpu = False  # type: ignore[assignment]  # of no tensor
            module.state_dict()  # unpacks in place, so that the file is the same on every CPU
