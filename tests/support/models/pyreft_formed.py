"""Interventions of pyreft's names, formulas and states, for tests that cannot have pyreft.

R is Rᵀ [width, rank] in torch's orthogonal parametrisation; LoReFT alone saves it as one matrix.
The arithmetic is fp32, of which pyreft's own is a rounding where weights are bf16.
"""

import contextlib
import io
import sys
from pathlib import Path
from typing import Any, ClassVar

import pyvene as pv
import torch
from pyvene import (
    DistributedRepresentationIntervention,
    SourcelessIntervention,
    TrainableIntervention,
)
from torch import Tensor, nn
from torch.nn.utils.parametrizations import orthogonal
from transformers.activations import ACT2FN

import reftnoise as rn
from support.models.architectures import tiny_model


class _Formed(SourcelessIntervention, TrainableIntervention, DistributedRepresentationIntervention):
    is_rotated: ClassVar[bool] = True
    is_constant: ClassVar[bool] = False
    is_relative: ClassVar[bool] = False
    """Whether the edit replaces Rh, instead of being added."""

    def __init__(
        self,
        *,
        low_rank_dimension: int,
        dtype: torch.dtype = torch.float32,
        act_fn: str = "linear",
        add_bias: bool = False,
        **fields: Any,
    ) -> None:
        super().__init__(**fields, keep_last_dim=True)
        width, rank = int(self.embed_dim), low_rank_dimension
        if self.is_rotated:
            self.rotate_layer = orthogonal(nn.Linear(rank, width, bias=False))
        else:
            self.proj_layer = nn.Linear(width, rank, bias=add_bias, dtype=dtype)
        if self.is_constant:
            self.learned_source = nn.Parameter(torch.rand(rank))
        else:
            self.learned_source = nn.Linear(width, rank, dtype=dtype)
        self.act_fn = ACT2FN[act_fn]

    def forward(self, base: Tensor, source: Any = None, subspaces: Any = None) -> Tensor:
        hidden, made = base.float(), self.learned_source
        if not self.is_constant:
            made = self.act_fn(hidden @ made.weight.float().T + made.bias.float())
        if self.is_rotated:
            matrix, own_bias = self.rotate_layer.weight.float().T, None
        else:
            matrix, own_bias = self.proj_layer.weight.float(), self.proj_layer.bias
        if self.is_relative:
            made = made - hidden @ matrix.T - (0 if own_bias is None else own_bias.float())
        return (hidden + made @ matrix).to(base.dtype)


class LoreftIntervention(_Formed):
    is_relative = True

    def state_dict(self, *args: Any, **kwargs: Any) -> dict[str, Tensor]:
        return self.learned_source.state_dict() | {"rotate_layer": self.rotate_layer.weight.data}

    def load_state_dict(self, state: dict[str, Tensor], *args: Any, **kwargs: Any) -> None:
        matrix = state["rotate_layer"]
        self.learned_source.load_state_dict({n: state[n] for n in ("weight", "bias")})
        self.rotate_layer = orthogonal(nn.Linear(*reversed(matrix.shape), bias=False))
        with torch.no_grad():  # the other columns stay: what pyreft does
            self.rotate_layer.parametrizations.weight[0].base[:, : matrix.shape[1]] = matrix


class NoreftIntervention(_Formed):
    is_rotated, is_relative = False, True


class DireftIntervention(_Formed):
    pass


class NodireftIntervention(_Formed):
    is_rotated = False


class ConsreftIntervention(_Formed):
    is_constant, is_relative = True, True


class LobireftIntervention(_Formed):
    is_constant = True


def intervention(name: str, home: Any = sys.modules[__name__], **arguments: Any) -> Any:
    """One of pyreft's form, with weights that are not those of its constructor."""
    cls = getattr(home, f"{name.capitalize()}Intervention")
    unit = cls(**{"embed_dim": 32, "low_rank_dimension": 4} | arguments)
    with torch.no_grad():
        for own, parameter in unit.named_parameters():
            change = 0.3 * torch.randn_like(parameter)
            parameter.add_(change.tril(-1) if "original" in own else change)
    return unit


def pyvene_model(units: list[Any], model: Any, **place: Any) -> pv.IntervenableModel:
    """Units at layers 0 and 2, and there again if there are four, as pyreft orders them."""
    return pv.IntervenableModel(
        [
            {"layer": layer, "component": "block_output", "intervention": unit} | place
            for layer, unit in zip([0, 2, 0, 2], units, strict=False)
        ],
        model,
    )


def saved(model: Any, directory: Path, **options: Any) -> str:
    with contextlib.redirect_stdout(io.StringIO()):
        model.save(directory, **options)
    return str(directory)


def adapter(directory: Path, representations: Any) -> rn.ReftModel:
    """A saved adapter whose weights are not those of its constructors."""
    config = rn.ReftConfig(representations=representations)
    reft_model = rn.get_reft_model(tiny_model(), config).eval()
    with torch.no_grad():
        for parameter in reft_model.interventions.parameters():
            parameter.add_(0.3 * torch.randn_like(parameter))
    reft_model.save_pretrained(directory)
    return reft_model


def entry(name: str, **changes: Any) -> dict[str, Any]:
    return {"layer": [0, 2], "intervention": name, "low_rank_dimension": 4} | changes
