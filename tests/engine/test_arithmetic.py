"""The dtype in which edits are computed beside a base in bf16."""

import pytest
import torch
from torch import Tensor

import reftnoise as rn
from reftnoise.interventions import RowEdit
from support.adapters import moved
from support.models.architectures import tiny_model

IDS = torch.tensor([[5, 6, 9, 4, 3], [8, 2, 7, 1, 6]])
EPS = torch.finfo(torch.bfloat16).eps


def model(intervention: str = "loreft", positions: str = "all+decode") -> rn.ReftModel:
    base = tiny_model(num_hidden_layers=2).to(torch.bfloat16)
    entry = {"layer": 0, "intervention": intervention, "positions": positions}
    if intervention not in ("bias", "red"):
        entry["low_rank_dimension"] = 2
    return moved(rn.get_reft_model(base, rn.ReftConfig([entry]))).eval()


def states(called: torch.nn.Module) -> Tensor:
    with torch.no_grad():
        hidden: Tensor = called(input_ids=IDS, output_hidden_states=True).hidden_states[1]
    return hidden


@pytest.mark.parametrize("intervention", ["loreft", "nodireft", "bias", "red"])
def test_wide_rounds_once_and_base_at_each_operation(intervention: str) -> None:
    reft_model = model(intervention)
    [unit] = reft_model.interventions.values()
    before = states(reft_model.model).double()
    exact = unit.double()(before).detach()
    unit.float()
    errors = {}
    for arithmetic in ("wide", "base"):
        reft_model.arithmetic = arithmetic
        edited = states(reft_model)
        assert edited.dtype is torch.bfloat16
        errors[arithmetic] = (edited.double() - exact).abs()
    # The sum is rounded once, and a constant before that.
    once = EPS / 2 * exact.abs() + (EPS * (exact - before).abs() if intervention == "bias" else 0)
    assert (errors["wide"] <= once * 1.001).all()
    down, bias, up, *diagonal = (tensor.abs().double() for tensor in unit.factors().tensors)
    terms = (before.abs() @ down.mT + bias) @ up
    terms += sum(before.abs() * part for part in diagonal)
    assert (errors["base"] <= EPS * (exact.abs() + 4 * terms)).all()
    if intervention != "bias":
        assert errors["base"].max() > errors["wide"].max()


def test_the_dtype_of_the_products(monkeypatch: pytest.MonkeyPatch) -> None:
    dtypes: set[torch.dtype] = set()
    inner = RowEdit.inner

    def seen(edit: RowEdit, rows: Tensor) -> Tensor:
        dtypes.add(rows.dtype)
        return inner(edit, rows)

    monkeypatch.setattr(RowEdit, "inner", seen)
    reft_model = model(positions="f1+l1")
    assert reft_model.arithmetic == "wide"
    for arithmetic, dtype in (("wide", torch.float32), ("base", torch.bfloat16)):
        reft_model.arithmetic = arithmetic
        for train in (False, True):
            reft_model.train(train)
            labels = IDS.masked_fill(torch.arange(5) < 3, -100)
            reft_model(input_ids=IDS, labels=labels).loss.backward()
            assert dtypes == {dtype}
            dtypes.clear()
        gradients = [parameter.grad for parameter in reft_model.interventions.parameters()]
        assert all(gradient.dtype is torch.float32 for gradient in gradients)
        reft_model.zero_grad()


def test_another_word() -> None:
    with pytest.raises(ValueError, match="arithmetic 'narrow': expected 'wide' or 'base'"):
        model().arithmetic = "narrow"
