"""Training steps of a tiny model, plain or with cheaper passes, and their gradients."""

from typing import Any

import torch
from torch import Tensor

import reftnoise as rn
from support.models.architectures import tiny_model
from support.tolerance import assert_close, assert_close_gradients

PROMPTS, COMPLETIONS = [12, 3, 20, 1], [4, 6, 3, 5]


def wrapped(positions: Any = "l1", *more: dict[str, Any], base: Any = None) -> rn.ReftModel:
    """A model in training mode with LoReFT in all layers, the same at every call."""
    torch.manual_seed(1)
    loreft = {"layer": "all", "intervention": "loreft", "low_rank_dimension": 4}
    config = rn.ReftConfig(representations=[loreft | {"positions": positions}, *more])
    return rn.get_reft_model(tiny_model() if base is None else base, config).train()


def batch(side: str = "right", position_ids: bool = True) -> dict[str, Tensor]:
    """Four rows of other lengths each, padded on one side."""
    torch.manual_seed(2)
    width = max(p + c for p, c in zip(PROMPTS, COMPLETIONS, strict=True)) + 2
    ids = torch.zeros(len(PROMPTS), width, dtype=torch.long)
    mask, labels = torch.zeros_like(ids), torch.full_like(ids, -100)
    for row, (prompt, completion) in enumerate(zip(PROMPTS, COMPLETIONS, strict=True)):
        length = prompt + completion
        start = width - length if side == "left" else 0
        ids[row, start : start + length] = torch.randint(3, 101, (length,))
        mask[row, start : start + length] = 1
        labels[row, start + prompt : start + length] = ids[row, start + prompt : start + length]
    made = {"input_ids": ids, "attention_mask": mask, "labels": labels}
    if side == "left" and position_ids:
        made["position_ids"] = (mask.cumsum(1) - 1).clamp(min=0)
    return made


def step(model: rn.ReftModel, inputs: dict[str, Any], **options: Any) -> tuple[Any, list[Tensor]]:
    """The output, and the gradients of all units."""
    model.zero_grad()
    torch.manual_seed(3)
    output = model(**inputs, **options)
    output.loss.backward()
    return output, [parameter.grad.clone() for parameter in model.interventions.parameters()]


def plain(model: rn.ReftModel, inputs: dict[str, Any], **options: Any) -> tuple[Any, list[Tensor]]:
    """The step without a split or a cache."""
    before = model.split, model.prefix_cache
    model.split, model.prefix_cache = "never", None
    found = step(model, inputs, return_logits=True, **options)
    model.split, model.prefix_cache = before
    return found


def assert_same(found: tuple[Any, list[Tensor]], expected: tuple[Any, list[Tensor]]) -> None:
    assert_close(found[0].loss, expected[0].loss)
    assert_close_gradients(found[1], expected[1])


def split(model: rn.ReftModel) -> rn.ReftModel:
    """The model, all passes of which are split that can be."""
    model.split = "always"
    return model
