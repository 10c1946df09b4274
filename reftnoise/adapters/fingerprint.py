"""A few weights of a base: they show an adapter other weights of the same shape.

Casts between dtypes round weights, so values are compared, not digests: those of one base agree to
the precision of bfloat16.
"""

import json
from collections.abc import Collection, Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel

from ..engine.base.peft import inner_model
from ..engine.base.running import is_part
from ..engine.base.sites import hidden_size, num_layers

TENSORS, VALUES = 6, 4
"""The number of tensors that are read, and of values of each."""
TOLERANCE = 2**-7
"""Relative: a cast to bfloat16 rounds by at most 2⁻⁹, and both values may have been cast."""
SMALLEST = 1e-6
"""Absolute, for values that float16 rounds to zero."""

_READABLE = (torch.float32, torch.float16, torch.bfloat16, torch.float64)


def fingerprint(model: PreTrainedModel) -> dict[str, Any]:
    """The shape that an adapter needs of its base, without the vocabulary, which may be resized."""
    if not hasattr(inner_model(model), "config"):  # a plain module inside PEFT
        name = type(inner_model(model)).__name__
        return {"model_type": name, "hidden_size": None, "num_hidden_layers": None}
    layers: int | None
    try:
        layers = num_layers(model)
    except ValueError:  # units at dotted paths do not need it
        layers = getattr(model.config.get_text_config(), "num_hidden_layers", None)
    return {
        "model_type": model.config.model_type,
        "hidden_size": hidden_size(model),
        "num_hidden_layers": layers,
    }


def sample_weights(model: PreTrainedModel, trained: Collection[str]) -> dict[str, list[float]]:
    """Values of a base's frozen matrices, by name, spread evenly over the model and each matrix.

    The sample leaves out embeddings and heads, which are resized with a vocabulary, and weights
    that PEFT changes, or that are quantised, sharded or not in memory.

    Args:
        model: a base, in PEFT's wrapper or not.
        trained: names, or ends of names, of the parameters of the base that an adapter holds.
    """
    base = inner_model(model)
    resized = {id(t) for part in _vocabulary(base) for t in part.parameters()}
    matrices = {
        name: tensor
        for name, tensor in _matrices(base)
        if not (tensor.requires_grad or id(tensor) in resized or ".base_layer." in name)
        and not any(saved.endswith(name) for saved in trained)
    }
    step = max(1, -(-len(matrices) // TENSORS))
    return {name: _values(matrices[name]) for name in list(matrices)[::step]}


def other_weights(sample: Mapping[str, Sequence[float]], model: PreTrainedModel) -> str | None:
    """The name of the first sampled matrix that differs in `model`; None where none does.

    Matrices that the model does not have, or that cannot be read, are passed over.
    """
    own = dict(_matrices(inner_model(model)))
    return other_values(sample, {name: _values(own[name]) for name in sample if name in own})


def other_values(
    sample: Mapping[str, Sequence[float]], other: Mapping[str, Sequence[float]]
) -> str | None:
    """The name of the first matrix that differs between two samples; None where none does."""
    for name, values in sample.items():
        if name not in other:
            continue
        mine, theirs = torch.tensor(other[name]), torch.tensor(values)
        if mine.shape != theirs.shape or differs(mine, theirs).any():
            return name
    return None


def differs(mine: Tensor, theirs: Tensor) -> Tensor:
    """Where values are others, and not those of another dtype."""
    mine, theirs = mine.float(), theirs.float()
    other_kind = mine.isnan() ^ theirs.isnan()  # NaN is not greater than any tolerance
    mine, theirs = mine.nan_to_num(), theirs.nan_to_num()
    largest = torch.maximum(mine.abs(), theirs.abs())
    return other_kind | ((mine - theirs).abs() > TOLERANCE * largest + SMALLEST)


def is_readable(tensor: Tensor) -> bool:
    """Whether a weight is in memory as it is: neither sharded nor quantised."""
    is_here = not (tensor.is_meta or is_part(tensor)) and type(tensor.data) is Tensor
    return is_here and tensor.dtype in _READABLE and tensor.numel() > 0


def rope_parameters(model: PreTrainedModel) -> Any:
    """How a base encodes positions, which no weight shows; None where its config does not say."""
    config = getattr(inner_model(model), "config", None)
    parameters = getattr(config and config.get_text_config(), "rope_parameters", None)
    return None if parameters is None else json.loads(json.dumps(parameters))


def _matrices(base: PreTrainedModel) -> Iterator[tuple[str, Tensor]]:
    for name, tensor in base.named_parameters():
        if tensor.dim() >= 2 and is_readable(tensor):
            yield name, tensor


def _vocabulary(base: PreTrainedModel) -> Iterator[Any]:
    for name in ("get_input_embeddings", "get_output_embeddings"):
        try:
            part = getattr(base, name)()
        except (NotImplementedError, AttributeError):  # the second: a plain module inside PEFT
            continue
        if part is not None:
            yield part


def _values(tensor: Tensor) -> list[float]:
    places = torch.linspace(0, tensor.numel() - 1, VALUES, dtype=torch.float64).long()
    columns = torch.unravel_index(places.to(tensor.device), tensor.shape)
    return [round(value, 9) for value in tensor.detach()[columns].double().tolist()]
