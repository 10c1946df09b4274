"""A few weights of a base, by which an adapter tells other weights of the same shape.

Casts between dtypes round weights, so values are compared and not digests: those of one base agree
to the precision of bfloat16.
"""

from collections.abc import Collection, Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel

from ..engine.base.peft import inner_model
from ..engine.base.sharding import is_part

TENSORS, VALUES = 6, 4
"""How many tensors are read, and how many values of each."""
TOLERANCE = 2**-7
"""Relative: a cast to bfloat16 rounds by at most 2⁻⁹, and either side may have been cast."""
SMALLEST = 1e-6
"""Absolute, for what float16 rounds to zero."""

_READABLE = (torch.float32, torch.float16, torch.bfloat16, torch.float64)


def sample_weights(model: PreTrainedModel, trained: Collection[str]) -> dict[str, list[float]]:
    """Values of a base's frozen matrices, by name, spread evenly over the model and each matrix.

    Embeddings and heads, which are resized with a vocabulary, are left out, and weights that PEFT
    changes, or that are quantised, sharded or not in memory.

    Args:
        model: a base, in PEFT's wrapper or not.
        trained: names, or their ends, of what is saved of the base.
    """
    base = inner_model(model)
    resized = {id(t) for part in _vocabulary(base) for t in part.parameters()}
    found = {
        name: tensor
        for name, tensor in _matrices(base)
        if not (tensor.requires_grad or id(tensor) in resized or ".base_layer." in name)
        and not any(one.endswith(name) for one in trained)
    }
    names = list(found)
    return {name: _values(found[name]) for name in names[:: max(1, -(-len(names) // TENSORS))]}


def other_weights(sample: Mapping[str, Sequence[float]], model: PreTrainedModel) -> str | None:
    """The first sampled matrix of which `model` has other values; None where there is none.

    One that the model does not have, or that cannot be read, tells nothing.
    """
    found = dict(_matrices(inner_model(model)))
    return other_values(sample, {name: _values(found[name]) for name in sample if name in found})


def other_values(
    sample: Mapping[str, Sequence[float]], other: Mapping[str, Sequence[float]]
) -> str | None:
    """The first matrix of two samples of which they have other values; None where there is none."""
    for name, values in sample.items():
        if name in other:
            mine, theirs = torch.tensor(other[name]), torch.tensor(values)
            largest = torch.maximum(mine.abs(), theirs.abs())
            if ((mine - theirs).abs() > TOLERANCE * largest + SMALLEST).any():
                return name
    return None


def _matrices(base: PreTrainedModel) -> Iterator[tuple[str, Tensor]]:
    for name, tensor in base.named_parameters():
        is_here = not (tensor.is_meta or is_part(tensor)) and type(tensor.data) is Tensor
        if is_here and tensor.dtype in _READABLE and tensor.dim() >= 2 and tensor.numel():
            yield name, tensor


def _vocabulary(base: PreTrainedModel) -> Iterator[Any]:
    for find in (base.get_input_embeddings, base.get_output_embeddings):
        try:
            part = find()
        except NotImplementedError:
            continue
        if part is not None:
            yield part


def _values(tensor: Tensor) -> list[float]:
    places = torch.linspace(0, tensor.numel() - 1, VALUES, dtype=torch.float64).long()
    columns = torch.unravel_index(places.to(tensor.device), tensor.shape)
    return [round(value, 9) for value in tensor.detach()[columns].double().tolist()]
