"""Classes that change a part of ours act in a model as their `delta` says."""

from typing import Any

import pytest
import torch
from torch import Tensor, nn

import reftnoise as rn
from reftnoise.interventions import (
    BiasIntervention,
    Factors,
    LobireftIntervention,
    LoreftIntervention,
)
from support.adapters import moved
from support.models.architectures import tiny_model
from support.tolerance import assert_close

pytestmark = pytest.mark.filterwarnings("ignore::UserWarning")

IDS = torch.tensor([[5, 6, 9, 4, 3], [8, 2, 7, 1, 6]])


class OtherFactors(LobireftIntervention):
    def factors(self) -> Factors:
        basis = self.rotate_layer()
        return Factors(basis, self.learned_source, basis, ((None, len(basis)),))


class OtherForm(BiasIntervention):
    def form(self, *parts: Tensor) -> Factors:
        (bias,) = parts
        up = bias[..., None, :]
        return Factors(up, torch.ones_like(up[..., 0]), up, ((None, 1),))


class OtherEdit(LoreftIntervention):
    def edit(self, hidden: Tensor) -> Tensor:
        return super().edit(hidden).tanh()


class OtherDelta(LoreftIntervention):
    def delta(self, hidden: Tensor, gates: Any = None) -> Tensor:
        return 0.5 * super().delta(hidden, gates)


class OtherInnerEdit(LoreftIntervention):
    def _edit(self, hidden: Tensor, gates: Any) -> Tensor:
        return 2.0 * super()._edit(hidden, gates)


class Softsign(nn.Dropout):
    def forward(self, values: Tensor) -> Tensor:
        return values / (1 + values.abs())


class OtherDropout(LoreftIntervention):
    def __init__(self, **arguments: Any) -> None:
        super().__init__(**arguments)
        self.dropout = Softsign()


CLASSES = [OtherFactors, OtherForm, OtherEdit, OtherDelta, OtherInnerEdit, OtherDropout]


def states(model: Any, site: nn.Module) -> Tensor:
    seen: list[Tensor] = []
    handle = site.register_forward_hook(lambda *call: seen.append(call[-1]))
    model(input_ids=IDS)
    handle.remove()
    return seen[0] if isinstance(seen[0], Tensor) else seen[0][0]


@pytest.mark.parametrize("training", [False, True])
@pytest.mark.parametrize("cls", CLASSES)
def test_a_subclass_acts_as_its_delta(cls: Any, training: bool) -> None:
    base = tiny_model(num_hidden_layers=2)
    rank = {} if cls is OtherForm else {"low_rank_dimension": 2}
    units = [cls(embed_dim=base.config.hidden_size, **rank) for _ in range(2)]
    entries = [
        {"layer": layer, "intervention": unit, "positions": "all+decode"}
        for layer, unit in enumerate(units)
    ]
    model = moved(rn.get_reft_model(base, rn.ReftConfig(entries))).train(training)
    placed = model.engine.units[0]
    with torch.set_grad_enabled(training):
        before = states(model.model, placed.site.module)
        assert_close(states(model, placed.site.module), before + placed.unit.delta(before))
    assert not torch.equal(before, states(model, placed.site.module))


def test_a_unit_that_a_call_leaves_out_has_no_gradient() -> None:
    entry = {"layer": [0, 1], "intervention": "loreft", "low_rank_dimension": 2}
    model = rn.get_reft_model(tiny_model(num_hidden_layers=2), rn.ReftConfig([entry])).train()
    places = {"sources->base": (None, [[[3], [3]], None])}
    labels = IDS.masked_fill(torch.arange(5) < 4, -100)
    model(input_ids=IDS, labels=labels, unit_locations=places).loss.backward()
    acting, left_out = model.interventions.values()
    assert all(p.grad is not None and p.grad.any() for p in acting.parameters())
    assert all(p.grad is None for p in left_out.parameters())


def test_weights_after_a_generation_outside_no_grad() -> None:
    entry = {"layer": 0, "intervention": "loreft", "low_rank_dimension": 2}
    config = rn.ReftConfig([entry | {"positions": "all+decode"}])
    model = moved(rn.get_reft_model(tiny_model(num_hidden_layers=2), config)).eval()
    model.generate(input_ids=IDS, max_new_tokens=3, do_sample=False)
    model.requires_grad_(False)
    embeds = model.get_input_embeddings()(IDS).detach().requires_grad_()
    for _ in range(2):  # with a graph of the generation, the second time fails
        model(inputs_embeds=embeds).logits.sum().backward()
