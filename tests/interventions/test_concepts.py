"""ReFT-r1 against its formulas, row by row and token by token."""

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

import reftnoise as rn
from support.models.architectures import tiny_model
from support.tolerance import assert_close
from support.training_steps import batch

CONCEPTS, WIDTH = 3, 32


def unit_of(concepts: int = 1, **arguments: Any) -> rn.ReftR1Intervention:
    torch.manual_seed(0)
    unit = rn.ReftR1Intervention(
        embed_dim=WIDTH, low_rank_dimension=concepts, dtype="float64", **arguments
    )
    torch.nn.init.normal_(unit.weight)
    return unit


def by_hand(
    hidden: Tensor, w: Tensor, edited: Tensor, *, topk: int, skip: int
) -> tuple[Tensor, Tensor, Tensor]:
    """The edit, the mean of the others and the largest activation of one concept."""
    delta, rests, largest = [], [], 0.0
    for row, mask in zip(hidden, edited, strict=True):
        tokens = mask.nonzero()[:, 0].tolist()[skip:]
        acts = torch.stack([(row[t] @ w).clamp(min=0) for t in tokens])
        top, rest = acts.sort(descending=True).values.tensor_split([topk])
        added = torch.stack([top.mean() * w * (t in tokens) for t in range(len(row))])
        delta.append(added)
        rests.append(rest.sum() / len(acts))
        largest = max(largest, float(acts.detach().max()))
    return torch.stack(delta), torch.stack(rests), torch.tensor(largest)


@pytest.mark.parametrize("skip", [0, 2])
def test_training_is_the_formula_and_its_gradient(skip: int) -> None:
    unit = unit_of(topk=4, skip=skip)
    hidden = torch.randn(3, 9, WIDTH, dtype=torch.float64, requires_grad=True)
    edited = torch.tensor([[1] * 9, [0] * 4 + [1] * 5, [1] * 3 + [0] * 6]).bool()
    seed = torch.randn_like(hidden)
    delta, rest = unit.row_delta(hidden, edited)
    loss = (delta * seed).sum() + unit.added_loss(torch.tensor(0.25), [rest])
    expected, rests, largest = by_hand(hidden, unit.weight[0], edited, topk=4, skip=skip)
    other = (expected * seed).sum() + 0.25 * 0.005 * rests.mean()
    torch.testing.assert_close(delta, expected)
    torch.testing.assert_close(loss, other)
    inputs = (hidden, unit.weight)
    for gradient, closed in zip(
        torch.autograd.grad(loss, inputs), torch.autograd.grad(other, inputs), strict=True
    ):
        torch.testing.assert_close(gradient, closed)
    torch.testing.assert_close(unit.largest[0], largest.double())
    unit.row_delta(hidden / 2, edited)
    torch.testing.assert_close(unit.largest[0], largest.double())


def test_rows_have_the_concepts_that_their_gates_choose() -> None:
    unit, hidden = unit_of(CONCEPTS), torch.randn(2, 12, WIDTH, dtype=torch.float64)
    edited = torch.ones(2, 12, dtype=torch.bool)
    gates = torch.tensor([[0.0, 1.0, 0.0], [0.0, 0.0, 1.0]])
    delta, rest = unit.row_delta(hidden, edited, gates)
    rests = []
    for row, concept in ((0, 1), (1, 2)):
        one = slice(row, row + 1)
        w = unit.weight[concept]
        expected, others, largest = by_hand(hidden[one], w, edited[one], topk=8, skip=1)
        torch.testing.assert_close(delta[one], expected)
        torch.testing.assert_close(unit.largest[concept], largest.double())
        rests.append(others)
    torch.testing.assert_close(rest, torch.cat(rests).mean())
    assert unit.largest[0] == 0
    acts = unit.activations(hidden)
    torch.testing.assert_close(acts, (hidden @ unit.weight.T).relu())


@pytest.mark.parametrize("optimizer", [torch.optim.SGD, torch.optim.AdamW])
def test_directions_keep_norm_1_and_turn_alone(optimizer: Any) -> None:
    units = [unit_of(CONCEPTS), copy.deepcopy(unit_of(CONCEPTS))]
    for unit in units:
        before = torch.nn.functional.normalize(unit.weight.detach())
        steps = optimizer(unit.parameters(), lr=0.0)
        unit.weight.grad = torch.randn_like(unit.weight)
        expected = unit.weight.grad - (unit.weight.grad * before).sum(1, keepdim=True) * before
        steps.step()
        torch.testing.assert_close(unit.weight.detach(), before)
        torch.testing.assert_close(unit.weight.grad, expected)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_norms_in_half_precision_are_1_but_for_rounding(dtype: torch.dtype) -> None:
    unit = rn.ReftR1Intervention(embed_dim=512, low_rank_dimension=2, dtype=dtype)
    torch.nn.init.normal_(unit.weight, std=0.03)
    with torch.no_grad():
        unit.weight[1] = 0.0
    unit.weight.grad = torch.randn_like(unit.weight)
    torch.optim.SGD(unit.parameters(), lr=0.0).step()
    norms = unit.weight.detach().double().norm(dim=1)
    assert norms[0] == pytest.approx(1.0, abs=torch.finfo(dtype).eps / 4)
    assert norms[1] == 0.0


def test_weights_that_no_step_trains_are_warned_of_once(caplog: pytest.LogCaptureFixture) -> None:
    """As where they are flattened: what the optimizer has is another tensor."""
    hidden, edited = torch.randn(1, 4, WIDTH), torch.ones(1, 4, dtype=torch.bool)
    other = torch.nn.Parameter(torch.zeros(2))
    other.grad = torch.zeros(2)
    critic = torch.optim.SGD([other], lr=0.1)
    fresh, trained_too, flattened = (unit_of() for _ in range(3))
    for unit in (trained_too, flattened):
        unit.row_delta(hidden.double(), edited)
    trained_too.weight.grad = torch.zeros_like(trained_too.weight)
    torch.optim.SGD(trained_too.parameters(), lr=0.1).step()
    with caplog.at_level("WARNING"):
        for _ in range(20):
            critic.step()
    assert fresh.missed_steps == 0
    assert [("flatten weights" in record.message) for record in caplog.records] == [True]


def trained(**arguments: Any) -> rn.ReftModel:
    entry = {"layer": 1, "intervention": "reftr1", "factor": 2.0} | arguments
    model = rn.get_reft_model(tiny_model(), rn.ReftConfig(entry)).train()
    optimizer = torch.optim.AdamW(model.interventions.parameters(), lr=1e-2)
    for step in range(3):
        model.training_progress = step / 3
        model(**batch()).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    return model


def test_a_trained_concept_steers_and_is_saved(tmp_path: Path) -> None:
    model = trained().eval()
    (unit,) = model.interventions.values()
    assert unit.largest > 0
    inputs = batch("left")
    mask = inputs["attention_mask"].bool()
    vector = 2.0 * unit.largest * unit.weight[0].detach()
    constant = rn.get_reft_model(
        tiny_model(), rn.ReftConfig({"layer": 1, "intervention": "addition"})
    ).eval()
    next(iter(constant.interventions.values())).vector.copy_(vector)
    with torch.no_grad():
        expected = constant(**inputs).logits[mask]
        assert_close(model(**inputs).logits[mask], expected)
        model.save_pretrained(tmp_path)
        loaded = rn.ReftModel.from_pretrained(tiny_model(), tmp_path).eval()
        assert torch.equal(loaded(**inputs).logits, model(**inputs).logits)
        host = rn.get_reft_model(tiny_model()).eval()
        host.load_adapter(tmp_path, "concept")
        names = [{"concept": 0.5}] * 4
        unit.factor = 1.0
        named = host(**inputs, adapter_names=names).logits
        assert_close(named[mask], model(**inputs).logits[mask])


@pytest.mark.parametrize(
    ("argument", "value"),
    [("topk", 0), ("skip", -1), ("sparsity", -0.1)],
)
def test_arguments_out_of_range(argument: str, value: Any) -> None:
    with pytest.raises(ValueError, match=rf"^{argument} {value!r}: expected"):
        rn.ReftR1Intervention(embed_dim=4, **{argument: value})
