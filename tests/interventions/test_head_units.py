"""LoFiT and JoLA against their formulas."""

import math
from typing import Any

import pytest
import torch
from torch import Tensor

import reftnoise as rn
from reftnoise.interventions.row_edits import edit_rows
from support.models.architectures import tiny_model

WIDTH, HEAD = 12, 4
BETA, LOW, HIGH = 0.33, -0.1, 1.1


def filled(unit: Any) -> Any:
    torch.manual_seed(1)
    with torch.no_grad():
        for parameter in unit.parameters():
            parameter.normal_()
    return unit


def lofit(trained: str = "both", **arguments: Any) -> Any:
    return rn.LofitIntervention(embed_dim=WIDTH, trained=trained, **arguments)


def jola(**arguments: Any) -> Any:
    return rn.JolaIntervention(embed_dim=WIDTH, head_width=HEAD, **arguments)


def per_feature(gates: Tensor) -> Tensor:
    return torch.stack([gates[feature // HEAD] for feature in range(WIDTH)])


def stretched(concrete: Tensor) -> Tensor:
    return (concrete * (HIGH - LOW) + LOW).clamp(0, 1)


def expected_jola(unit: Any, hidden: Tensor, first: Tensor, second: Tensor) -> Tensor:
    a, v = unit.scaling.double(), unit.bias.double()
    return (1 + per_feature(second) * a) * hidden + per_feature(first) * v


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_a_fresh_unit_is_the_identity_and_a_filled_one_its_formula(dtype: torch.dtype) -> None:
    hidden = torch.randn(2, 3, WIDTH, dtype=torch.float64)
    for unit in (*map(lofit, ("scaling", "bias", "both")), jola()):
        assert torch.equal(unit(hidden), hidden)
    for trained in ("scaling", "bias", "both"):
        unit = filled(lofit(trained, dtype=dtype))
        assert sum(p.numel() for p in unit.parameters()) == WIDTH * (1 + (trained == "both"))
        a, v = (0.0 if p is None else p.double() for p in (unit.scaling, unit.bias))
        torch.testing.assert_close(unit(hidden), (1 + a) * hidden + v, rtol=1e-6, atol=1e-6)
    unit = filled(jola(dtype=dtype)).eval()
    assert sum(p.numel() for p in unit.parameters()) == 2 * WIDTH + 2 * WIDTH // HEAD
    gates = stretched(unit.log_alpha.double().sigmoid())
    right = expected_jola(unit, hidden, *gates)
    torch.testing.assert_close(unit(hidden), right, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("is_trained", [True, False])
def test_gradients_are_those_of_the_formula(is_trained: bool) -> None:
    """As a model edits, in float64: A, v and, in training, the gates' log α as they were drawn."""
    hidden = torch.randn(6, WIDTH, dtype=torch.float64, requires_grad=True)
    weight = torch.randn_like(hidden)
    for unit in (filled(lofit(dtype="float64")), filled(jola(dtype="float64"))):
        unit.train(is_trained)
        torch.manual_seed(0)
        edited = edit_rows(hidden, [unit.row_edit(torch.float64, hidden.device)])
        if isinstance(unit, rn.LofitIntervention):
            right = (1 + unit.scaling) * hidden + unit.bias
        elif is_trained:
            torch.manual_seed(0)
            u = torch.rand(2, WIDTH // HEAD, dtype=torch.float64) * (1 - 2e-6) + 1e-6
            concrete = ((u.log() - (1 - u).log() + unit.log_alpha) / BETA).sigmoid()
            right = expected_jola(unit, hidden, *stretched(concrete))
        else:
            right = expected_jola(unit, hidden, *stretched(unit.log_alpha.sigmoid()))
        torch.testing.assert_close(edited, right, rtol=1e-12, atol=1e-12)
        inputs = (hidden, *unit.parameters())
        pairs = (torch.autograd.grad((x * weight).sum(), inputs) for x in (edited, right))
        for actual, expected in zip(*pairs, strict=True):
            torch.testing.assert_close(actual, expected, rtol=1e-10, atol=1e-10)


def test_gates_open_as_often_as_the_penalty_says() -> None:
    unit = jola(l0=2.0, schedule="constant").train()
    with torch.no_grad():
        unit.log_alpha.copy_(torch.tensor([[-2.0, 0.0, 1.0], [-1.0, 0.5, 3.0]]))
    draws = 20_000
    torch.manual_seed(0)
    with torch.no_grad():
        is_open = torch.stack([unit.gates() > 0 for _ in range(draws)]).double().mean(0)
    share = (unit.log_alpha.double() - BETA * math.log(0.1 / 1.1)).sigmoid()
    assert ((is_open - share).abs() < 5 * (share * (1 - share) / draws).sqrt()).all()
    loss = unit.added_loss(torch.tensor(0.3), ())
    torch.testing.assert_close(loss.double(), 2.0 * share.mean(1).sum(), rtol=1e-6, atol=0)
    (gradient,) = torch.autograd.grad(loss, unit.log_alpha)
    slope = 2.0 * share * (1 - share) / 3
    torch.testing.assert_close(gradient.double(), slope, rtol=1e-5, atol=0)


@pytest.mark.parametrize(
    ("schedule", "factor"), [("decay", math.exp(-2.0)), ("linear", 0.4), ("constant", 1.0)]
)
def test_schedules(schedule: str, factor: float) -> None:
    losses = [
        jola(l0=l0, schedule=name) for l0, name in ((3.0, schedule), (3.0 * factor, "constant"))
    ]
    losses[1].load_state_dict(losses[0].state_dict())
    scheduled, constant = (unit.added_loss(torch.tensor(0.4), ()) for unit in losses)
    torch.testing.assert_close(scheduled, constant, rtol=1e-6, atol=0)


def test_what_is_not_trained_adds_no_loss() -> None:
    assert lofit("bias", l1=1.0).added_loss(torch.tensor(0.5), ()) is None
    assert lofit("both").added_loss(torch.tensor(0.5), ()) is None
    assert jola(l0=0).added_loss(torch.tensor(0.5), ()) is None
    unit = filled(lofit("both", l1=0.25))
    total = 0.25 * unit.scaling.abs().sum()
    torch.testing.assert_close(unit.added_loss(torch.tensor(0.5), ()), total)


@pytest.mark.parametrize(
    ("make", "arguments", "problem"),
    [
        (lofit, {"trained": "A"}, "trained 'A': expected 'scaling', 'bias' or 'both'"),
        (lofit, {"l1": -1}, "l1 -1: expected a number from 0"),
        (jola, {"l0": math.inf}, "l0 inf: expected a number from 0"),
        (jola, {"schedule": "expon"}, "schedule 'expon': expected 'decay', 'linear' or 'constant'"),
        (
            rn.JolaIntervention,
            {"embed_dim": 8, "head_width": 3},
            "head_width 3: expected a divisor of 8",
        ),
    ],
)
def test_mistakes(make: Any, arguments: dict[str, Any], problem: str) -> None:
    with pytest.raises(ValueError, match=f"^{problem}$"):
        make(**arguments)


def test_a_ready_module_has_heads_of_the_places_width() -> None:
    unit = rn.JolaIntervention(embed_dim=32)
    entry = {"layer": 1, "component": "head_output", "intervention": unit}
    with pytest.raises(ValueError, match="head_width 32: the heads there have 8"):
        rn.get_reft_model(tiny_model(), rn.ReftConfig(entry))
