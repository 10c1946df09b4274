"""Units that add a loss: of their weights, and of what a pass computed."""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

import reftnoise as rn
from reftnoise.interventions import AddsLoss, EditsRows
from support.models.architectures import tiny_model

WIDTH = 32


class Penalised(AddsLoss, rn.BiasIntervention):
    """h + b, with the loss progress · mean b²."""

    def added_loss(self, progress: Tensor, noted: Sequence[Tensor]) -> Tensor:
        assert not noted
        return progress * self.bias.square().mean()


class Averaged(AddsLoss, EditsRows, rn.ReftIntervention):
    """h + (mean of h·w over the row's tokens) w, with the loss 3 · mean (h·w)² over all of them."""

    default_positions = "all"

    def __init__(self, *, embed_dim: int) -> None:
        super().__init__(embed_dim=embed_dim)
        self.weight = nn.Parameter(torch.linspace(-1, 1, embed_dim) / 4)

    def edit(self, hidden: Tensor) -> Tensor:
        return torch.zeros_like(hidden)

    def row_delta(
        self, hidden: Tensor, edited: Tensor, gates: Tensor | None = None
    ) -> tuple[Tensor, Tensor]:
        inner = (hidden @ self.weight).masked_fill(~edited, 0)
        mean = inner.sum(1) / edited.sum(1).clamp(min=1)
        delta = (mean[:, None, None] * self.weight).expand_as(hidden)
        return delta, inner.square().sum() / edited.sum()

    def added_loss(self, progress: Tensor, noted: Sequence[Tensor]) -> Tensor:
        (squares,) = noted
        return 3 * squares


def model_with(unit: Any, base: Any = None, **entry: Any) -> rn.ReftModel:
    entry = {"layer": 1, "intervention": unit} | entry
    return rn.get_reft_model(tiny_model() if base is None else base, rn.ReftConfig(entry)).train()


def penalised(base: Any = None, positions: str = "l1") -> rn.ReftModel:
    unit = Penalised(embed_dim=base.config.hidden_size if base else WIDTH)
    nn.init.normal_(unit.bias)
    return model_with(unit, base, positions=positions)


def step(model: Any, **inputs: Any) -> tuple[Tensor, list[Tensor]]:
    model.zero_grad()
    loss = model(**inputs).loss
    loss.backward()
    return loss, [parameter.grad.clone() for parameter in model.interventions.parameters()]
