"""Every example twice in one batch, for SymNoise, with the loss of the pair's mean."""

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor


def in_pairs(inputs: dict[str, Any], batch: int) -> dict[str, Any]:
    """Every example twice, for SymNoise. The loss stays a mean: its divisor doubles too."""
    if inputs.get("labels") is None:
        raise ValueError(
            "SymNoise averages the loss over the pair x + δ, x - δ, so it needs labels while "
            "training (label smoothing and compute_loss_func take them away); call eval() for "
            "outputs without noise"
        )
    doubled = {
        name: torch.cat([value, value])
        if isinstance(value, Tensor) and value.dim() and value.shape[0] == batch
        else value
        for name, value in inputs.items()
        if name not in ("num_items_in_batch", "logits_to_keep")
    }
    if "logits_to_keep" in inputs:
        doubled["logits_to_keep"] = inputs["logits_to_keep"]
    if inputs.get("num_items_in_batch") is not None:
        doubled["num_items_in_batch"] = 2 * inputs["num_items_in_batch"]
    return doubled


def first_of_pairs(outputs: Any, batch: int) -> Any:
    """The outputs for the +δ rows, with the pair's loss: as many rows as the caller gave."""

    def first(value: Any) -> Any:
        if isinstance(value, Tensor):
            return value[:batch] if value.dim() and value.shape[0] == 2 * batch else value
        if isinstance(value, tuple | list):
            return type(value)(first(part) for part in value)
        return value

    if isinstance(outputs, Mapping):
        return type(outputs)(**{name: first(value) for name, value in outputs.items()})
    return first(outputs)
