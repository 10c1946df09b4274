"""What evaluation keeps of weights is theirs as they are now."""

import copy
import pickle
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.func import functional_call, grad, jvp

from reftnoise.interventions import (
    INTERVENTIONS,
    LoreftIntervention,
    LowRankIntervention,
    RowEdit,
    edit_rows,
    shared_factors,
)
from reftnoise.interventions.arguments import constructor_arguments
from support.tolerance import assert_close

LOW_RANK = {n: c for n, c in INTERVENTIONS.items() if issubclass(c, LowRankIntervention)}
WIDTH = 6


def build(cls: Any) -> Any:
    has_rank = "low_rank_dimension" in constructor_arguments(cls)
    unit = cls(embed_dim=WIDTH, **({"low_rank_dimension": 2} if has_rank else {})).eval()
    with torch.no_grad():
        for tensor in (*unit.parameters(), *unit.buffers()):
            if tensor.is_floating_point():
                tensor.normal_()
    return unit


@torch.no_grad()
def edited(unit: Any, hidden: Tensor, **options: Any) -> Tensor:
    return edit_rows(hidden, [unit.row_edit(hidden.dtype, hidden.device, **options)])


def set_in_place(unit: nn.Module) -> None:
    with torch.no_grad():
        for tensor in (*unit.parameters(), *unit.buffers()):
            if tensor.is_floating_point():
                tensor.add_(torch.randn_like(tensor))


def step(unit: nn.Module, fused: bool = False) -> None:
    for parameter in unit.parameters():
        parameter.grad = torch.randn_like(parameter)
    torch.optim.AdamW(unit.parameters(), lr=0.5, fused=fused).step()


def load(unit: nn.Module) -> None:
    unit.load_state_dict(build(type(unit)).state_dict())


def replace(unit: nn.Module) -> None:
    for module in unit.modules():
        for name, parameter in list(module._parameters.items()):
            if parameter is not None:
                setattr(module, name, nn.Parameter(torch.randn_like(parameter)))


def through_data(unit: nn.Module) -> None:
    for parameter in unit.parameters():
        parameter.data.add_(torch.randn_like(parameter))
    unit.eval()  # which torch's record lacks


CHANGES: list[Callable[[Any], None]] = [
    set_in_place,
    step,
    lambda unit: step(unit, fused=True),
    load,
    replace,
    through_data,
]


@pytest.mark.parametrize("change", CHANGES)
@pytest.mark.parametrize("cls", LOW_RANK.values(), ids=list(LOW_RANK))
def test_changed_weights_edit(cls: Any, change: Callable[[Any], None]) -> None:
    unit, hidden = build(cls), torch.randn(3, WIDTH)
    if change not in (set_in_place, load) and not list(unit.parameters()):
        pytest.skip("has no parameters")
    before = edited(unit, hidden)
    assert torch.equal(edited(unit, hidden), before)
    change(unit)
    with torch.no_grad():
        assert_close(edited(unit, hidden), unit(hidden[None])[0])
    assert not torch.equal(edited(unit, hidden), before)


def test_nothing_is_computed_twice(monkeypatch: pytest.MonkeyPatch) -> None:
    unit, hidden = build(LoreftIntervention), torch.randn(3, WIDTH)
    calls: list[int] = []
    form = LoreftIntervention.form
    monkeypatch.setattr(LoreftIntervention, "form", lambda *a: calls.append(1) or form(*a))
    for _ in range(3):
        edited(unit, hidden)
        edited(unit, hidden, scale=0.5)
    assert len(calls) == 2  # one of each scale
    for scale in range(20):
        edited(unit, hidden, scale=scale / 3)
    assert len(unit._kept[2]) <= 8


@pytest.mark.parametrize("cls", LOW_RANK.values(), ids=list(LOW_RANK))
def test_scale_and_gates(cls: Any) -> None:
    unit, hidden = build(cls), torch.randn(3, WIDTH)
    change = unit(hidden[None])[0] - hidden
    assert_close(edited(unit, hidden, scale=-2.0), hidden - 2 * change)
    if unit.has_subspaces:
        gates = torch.tensor([[1.0, 1.0], [0.0, 0.0], [1.0, 1.0]])
        expected = torch.where(gates[:, :1] > 0, hidden + change, hidden)
        assert_close(edited(unit, hidden, gates=gates), expected)
    else:
        with pytest.raises(ValueError, match="has no subspace"):
            edited(unit, hidden, gates=torch.ones(3, 1))


@pytest.mark.parametrize("name", ["bias", "addition", "lobireft"])
@torch.no_grad()
def test_the_vector_of_a_constant_edit(name: str) -> None:
    unit, hidden = build(LOW_RANK[name]), torch.randn(3, WIDTH)
    for scale in (1.0, 0.5):
        vector = unit.row_edit(hidden.dtype, hidden.device, scale).vector(hidden.dtype)
        assert_close(hidden + vector / scale, unit(hidden[None])[0])
    assert (
        build(LoreftIntervention).row_edit(hidden.dtype, hidden.device).vector(hidden.dtype) is None
    )


@torch.no_grad()
def test_autocast_leaves_nothing_behind() -> None:
    for cls in LOW_RANK.values():
        unit, hidden = build(cls), torch.randn(3, WIDTH)
        expected = unit(hidden[None])[0]
        with torch.autocast("cpu", dtype=torch.bfloat16):
            assert_close(edited(unit, hidden), expected)
        assert_close(edited(unit, hidden), expected)


def test_another_activation() -> None:
    unit, hidden = build(LoreftIntervention), torch.randn(3, WIDTH)
    before = edited(unit, hidden)
    unit.act_fn = nn.Tanh()
    with torch.no_grad():
        assert_close(edited(unit, hidden), unit(hidden[None])[0])
    assert not torch.equal(edited(unit, hidden), before)


def test_what_is_kept_has_no_graph_and_is_no_part_of_a_copy() -> None:
    unit, hidden = build(LoreftIntervention), torch.randn(3, WIDTH)
    size = len(pickle.dumps(unit))
    with shared_factors([unit], torch.float32), torch.no_grad():
        unit.row_edit(hidden.dtype, hidden.device)
    assert len(pickle.dumps(unit)) < size + 50
    copy.deepcopy(unit)
    unit.requires_grad_(False)
    for _ in range(2):
        states = hidden.clone().requires_grad_()
        edit_rows(states, [unit.row_edit(states.dtype, states.device)]).sum().backward()


def test_a_vector_that_is_trained_itself() -> None:
    unit, hidden = build(LOW_RANK["addition"]), torch.randn(3, WIDTH)
    edited(unit, hidden)
    unit.vector.requires_grad_()
    edit_rows(hidden, [unit.row_edit(hidden.dtype, hidden.device)]).sum().backward()
    assert_close(unit.vector.grad, torch.full((WIDTH,), 3.0))


@pytest.mark.filterwarnings("ignore:.*torch.jit.script:DeprecationWarning")
@pytest.mark.parametrize("cls", LOW_RANK.values(), ids=list(LOW_RANK))
def test_forward_mode(cls: Any) -> None:
    unit, hidden = build(cls), torch.randn(3, WIDTH)
    weights = {n: t.detach() for n, t in (*unit.named_parameters(), *unit.named_buffers())}
    weights = {name: tensor for name, tensor in weights.items() if tensor.is_floating_point()}

    def change(weights: Any) -> Tensor:
        class Call(nn.Module):
            def __init__(self) -> None:
                super().__init__()
                self.unit = unit

            def forward(self) -> Tensor:
                edit = unit.row_edit(hidden.dtype, hidden.device)
                return edit_rows(hidden, [edit], is_transformed=True).square().sum()

        named = {f"unit.{name}": weight for name, weight in weights.items()}
        return functional_call(Call(), named, ())

    edited(unit, hidden)
    _, tangent = jvp(change, (weights,), ({n: torch.ones_like(w) for n, w in weights.items()},))
    gradients = grad(change)(weights)
    assert_close(tangent, sum(gradient.sum() for gradient in gradients.values()), scale=100.0)
    assert tangent != 0


def test_a_scale_is_not_rounded_to_the_weights_dtype() -> None:
    unit, hidden = build(LoreftIntervention).to(torch.bfloat16), torch.randn(3, WIDTH)
    exact = 0.3 * (edited(unit, hidden) - hidden) + hidden
    assert_close(edited(unit, hidden, scale=0.3), exact)


def test_shared_factors_under_autocast_and_in_copies() -> None:
    units = [LoreftIntervention(embed_dim=WIDTH, low_rank_dimension=2) for _ in range(2)]
    for unit in units:
        unit.to(torch.float16)
    with torch.autocast("cpu", dtype=torch.bfloat16), shared_factors(units, torch.float32):
        assert units[0].factors().up.dtype is torch.float32
        copy.deepcopy(units[0])


def test_threads_keep_side_by_side() -> None:
    unit, hidden = build(LoreftIntervention), torch.randn(3, WIDTH)
    change = edited(unit, hidden) - hidden

    def call(index: int) -> None:
        scale = 1 + index % 11
        assert_close(edited(unit, hidden, scale=scale), hidden + scale * change)

    with ThreadPoolExecutor(6) as pool:
        list(pool.map(call, range(600)))


def test_inference_mode_and_copies() -> None:
    unit, hidden = build(LoreftIntervention), torch.randn(3, WIDTH)
    with torch.inference_mode():
        first = edited(unit, hidden)
    # What was kept there meets autograd here.
    states = hidden.clone().requires_grad_()
    unit.requires_grad_(False)
    edit: RowEdit = unit.row_edit(states.dtype, states.device)
    edit_rows(states, [edit]).sum().backward()
    assert states.grad is not None
    other = copy.deepcopy(unit)
    set_in_place(other)
    assert torch.equal(edited(unit, hidden), first)
    assert_close(edited(other, hidden), other(hidden[None])[0])
