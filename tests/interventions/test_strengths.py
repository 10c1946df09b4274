"""Strengths of rows: against the formula, put on the base by a hook of our own."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import LlamaForCausalLM

import reftnoise as rn
from reftnoise.adapters.frozen import FrozenAdapter
from reftnoise.interventions import RowStrengths
from support.adapters import moved
from support.models.architectures import tiny_model
from support.tolerance import assert_close

LAYER = 1
IDS = torch.arange(3, 21).view(3, 6)
FACTORS = torch.tensor([2.0, -1.5, 0.0], dtype=torch.double)

Edit = Callable[[Tensor], Tensor]


def wrapped(base: Any, **entry: Any) -> rn.ReftModel:
    entry = {"layer": LAYER, "positions": "all+decode", "dtype": "float64"} | entry
    reft_model = rn.get_reft_model(base.double(), rn.ReftConfig([entry]))
    with torch.no_grad():
        for parameter in reft_model.interventions.parameters():
            parameter.normal_()
    return reft_model.train()


def by_hand(base: Any, edit: Edit) -> Tensor:
    """The logits of the base with an edit of its layer's output."""
    handle = base.model.layers[LAYER].register_forward_hook(lambda _m, _a, output: edit(output))
    try:
        logits: Tensor = base(IDS).logits
    finally:
        handle.remove()
    return logits


def compare(reft_model: rn.ReftModel, strengths: RowStrengths, edit: Edit) -> None:
    """Logits, and the gradients of the unit's parameters."""
    parameters = list(reft_model.interventions.parameters())
    weights = torch.randn(3, 6, 101, dtype=torch.double)
    with reft_model.using(strengths=strengths):
        logits = reft_model(IDS, labels=IDS, prompt_lengths=torch.tensor([4, 4, 4])).logits
    expected = by_hand(reft_model.model, edit)
    torch.testing.assert_close(logits, expected, rtol=1e-10, atol=1e-10)
    for total in (logits, expected):
        gradients = torch.autograd.grad((total * weights).sum(), parameters, retain_graph=True)
        if total is logits:
            of_ours = gradients
    assert any(gradient.abs().max() > 1e-3 for gradient in of_ours)
    torch.testing.assert_close(of_ours, gradients, rtol=1e-9, atol=1e-9)


def of_rows(factors: Tensor) -> Tensor:
    return factors[:, None, None]


@pytest.mark.parametrize("name", ["bias", "loreft", "adapter"])
def test_a_factor_multiplies_the_edit_of_its_row(tiny_llama: LlamaForCausalLM, name: str) -> None:
    rank = {} if name == "bias" else {"low_rank_dimension": 3}
    reft_model = wrapped(tiny_llama, intervention=name, **rank)
    [placed] = reft_model.engine.units

    def edit(hidden: Tensor) -> Tensor:
        return hidden + of_rows(FACTORS) * placed.unit.edit(hidden)

    compare(reft_model, RowStrengths(FACTORS), edit)


@pytest.mark.usefixtures("restored_registry")
def test_a_unit_without_factors_has_strengths(tiny_llama: LlamaForCausalLM) -> None:
    @rn.register_intervention("squares")
    class Squares(rn.ReftIntervention):
        def __init__(self, *, embed_dim: int, **arguments: Any) -> None:
            super().__init__(embed_dim=embed_dim, **arguments)
            self.scale = torch.nn.Parameter(torch.zeros(embed_dim, dtype=torch.double))

        def edit(self, hidden: Tensor) -> Tensor:
            return self.scale * hidden**2

    reft_model = wrapped(tiny_llama, intervention="squares", low_rank_dimension=1)
    [placed] = reft_model.engine.units

    def edit(hidden: Tensor) -> Tensor:
        return hidden + of_rows(FACTORS) * placed.unit.edit(hidden)

    compare(reft_model, RowStrengths(FACTORS), edit)
    removed = RowStrengths(FACTORS, torch.tensor([True, False, False]))
    with reft_model.using(strengths=removed), pytest.raises(ValueError, match="has none"):
        reft_model(IDS, labels=IDS)


def test_the_direction_of_a_vector_is_taken_out_where_it_is_positive(
    tiny_llama: LlamaForCausalLM,
) -> None:
    reft_model = wrapped(tiny_llama, intervention="bias")
    [vector] = reft_model.interventions.parameters()
    removed = torch.tensor([False, True, True])

    def edit(hidden: Tensor) -> Tensor:
        along = (hidden @ vector).clamp(min=0)[..., None] * vector / vector.norm() ** 2
        return torch.where(of_rows(removed), hidden - along, hidden + of_rows(FACTORS) * vector)

    compare(reft_model, RowStrengths(FACTORS, removed), edit)


def test_the_direction_of_rank_one_is_taken_out(tiny_llama: LlamaForCausalLM) -> None:
    reft_model = wrapped(tiny_llama, intervention="nodireft", low_rank_dimension=1)
    [placed] = reft_model.engine.units
    removed = torch.tensor([False, True, True])

    def edit(hidden: Tensor) -> Tensor:
        row = placed.unit.proj_layer.weight[0]
        along = (hidden @ row)[..., None] * row / row.norm() ** 2
        changed = hidden + of_rows(FACTORS) * placed.unit.edit(hidden)
        return torch.where(of_rows(removed), hidden - along, changed)

    compare(reft_model, RowStrengths(FACTORS, removed), edit)


def test_a_vector_of_zeros_removes_nothing_and_has_finite_gradients(
    tiny_llama: LlamaForCausalLM,
) -> None:
    reft_model = wrapped(tiny_llama, intervention="bias")
    [vector] = reft_model.interventions.parameters()
    torch.nn.init.zeros_(vector)
    with reft_model.using(strengths=RowStrengths(FACTORS, FACTORS < 9)):
        output = reft_model(IDS, labels=IDS)
    torch.testing.assert_close(output.loss, tiny_llama(IDS, labels=IDS).loss)
    output.loss.backward()
    assert vector.grad is not None
    assert not vector.grad.any()


def test_few_positions_have_strengths(tiny_llama: LlamaForCausalLM) -> None:
    reft_model = wrapped(tiny_llama, intervention="bias", positions="f1+l1")
    [vector] = reft_model.interventions.parameters()
    where = torch.tensor([True, False, False, True, False, False])[None, :, None]

    def edit(hidden: Tensor) -> Tensor:
        return hidden + of_rows(FACTORS) * vector * where

    compare(reft_model, RowStrengths(FACTORS), edit)


def test_symnoise_has_the_strengths_of_both_copies(tiny_llama: LlamaForCausalLM) -> None:
    entry = {"layer": LAYER, "intervention": "bias", "dtype": "float64"}
    noise = {"intervention": "symnoise", "alpha": 1e-9}
    reft_model = rn.get_reft_model(tiny_llama.double(), rn.ReftConfig([entry, noise])).train()
    vector = next(reft_model.interventions.parameters())
    torch.nn.init.normal_(vector)
    with reft_model.using(strengths=RowStrengths(FACTORS)):
        loss = reft_model(IDS, labels=IDS).loss
    expected = by_hand(tiny_llama, lambda hidden: hidden + of_rows(FACTORS) * vector)
    each = torch.nn.functional.cross_entropy(expected[:, :-1].flatten(0, 1), IDS[:, 1:].flatten())
    torch.testing.assert_close(loss.double(), each, rtol=1e-6, atol=1e-6)


@pytest.mark.usefixtures("unchecked_types")
def test_strengths_that_do_not_fit_the_batch() -> None:
    base, _ = rn.load_tiny_model()
    reft_model = rn.get_reft_model(base, rn.ReftConfig([{"layer": 1, "intervention": "bias"}]))
    with (
        reft_model.using(strengths=RowStrengths(torch.ones(2))),
        pytest.raises(ValueError, match=r"strengths: expected 3, one per row of the batch, got 2"),
    ):
        reft_model(IDS)
    with pytest.raises(ValueError, match="removed: expected 2 entries, one per factor, got 1"):
        RowStrengths(torch.ones(2), torch.tensor([True]))


def test_strengths_of_adapters_by_name_keep_the_probe_of_each() -> None:
    """A strength of 1 changes nothing, of units that have a gate or none."""
    gated = {"intervention": "red", "gate": {"type": "probe"}}
    model = rn.get_reft_model(tiny_model().eval())
    for seed, unit in enumerate((gated, {"intervention": "bias"}, gated)):
        single = moved_units({"layer": LAYER, "positions": "all"} | unit, seed)
        model.adapters.put(str(seed), FrozenAdapter.of(single.engine.units))
    model.eval()
    ones = RowStrengths(torch.ones(3))
    with torch.no_grad():
        expected = model(input_ids=IDS, adapter_names=["0", "1", "2"]).logits
        with model.using(strengths=ones):
            logits = model(input_ids=IDS, adapter_names=["0", "1", "2"]).logits
        assert_close(logits, expected)
        removed = RowStrengths(ones.factors, torch.tensor([True, False, False]))
        with model.using(strengths=removed), pytest.raises(ValueError, match="adapters by name"):
            model(input_ids=IDS, adapter_names=["1"] * 3)


def test_no_direction_of_several_concepts_is_taken_out() -> None:
    unit = {"layer": LAYER, "intervention": "reftr1", "low_rank_dimension": 2}
    model = moved_units(unit, 0).eval()
    removed = RowStrengths(torch.ones(3), torch.tensor([True, False, False]))
    with model.using(strengths=removed), pytest.raises(ValueError, match="the unit has none"):
        model(input_ids=IDS, subspaces=[[0]] * 3)


def moved_units(entry: dict[str, Any], seed: int) -> rn.ReftModel:
    torch.manual_seed(seed)
    return moved(rn.get_reft_model(tiny_model(), rn.ReftConfig(entry))).eval()
