"""torch.func through a model: the gradients of autograd."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.func import functional_call, grad, hessian, jacfwd, jacrev, vmap

import reftnoise as rn
from reftnoise.interventions.rotation import orthonormal_rows
from support.adapters import moved
from support.models.architectures import tiny_model
from support.tolerance import assert_close

pytestmark = pytest.mark.filterwarnings("ignore:.*torch.jit.script:DeprecationWarning")

IDS, LABELS = torch.tensor([[5, 6, 9]]), torch.tensor([[-100, 6, 9]])
Weights = dict[str, Tensor]


@pytest.fixture
def reft_model() -> rn.ReftModel:
    base = tiny_model(num_hidden_layers=2)
    base.set_attn_implementation("eager")  # torch's fused kernels have no forward mode
    loreft = {"layer": "all", "intervention": "loreft", "low_rank_dimension": 2}
    return moved(rn.get_reft_model(base, rn.ReftConfig([loreft]))).eval()


def weights_of(model: rn.ReftModel) -> Weights:
    return {n: p.detach().clone() for n, p in model.named_parameters() if n.startswith("interv")}


def loss_of(model: rn.ReftModel) -> Callable[..., Tensor]:
    def loss(weights: Weights, ids: Tensor = IDS, labels: Tensor = LABELS) -> Tensor:
        inputs = {"input_ids": ids, "labels": labels}
        return functional_call(model, weights, (), inputs).loss  # type: ignore[no-any-return]  # torch's

    return loss


def autograd(model: rn.ReftModel, **inputs: Tensor) -> Weights:
    model.zero_grad()
    model(**inputs).loss.backward()
    return {n: p.grad for n, p in model.named_parameters() if p.grad is not None}


def assert_same(actual: Weights, expected: Weights) -> None:
    assert actual.keys() == expected.keys()
    for name, gradient in expected.items():
        assert_close(actual[name], gradient)


@pytest.mark.parametrize("transform", [grad, jacrev, jacfwd])
def test_gradients_of_a_loss(reft_model: rn.ReftModel, transform: Any) -> None:
    expected = autograd(reft_model, input_ids=IDS, labels=LABELS)
    assert_same(transform(loss_of(reft_model))(weights_of(reft_model)), expected)


def test_gradients_of_each_example(reft_model: rn.ReftModel) -> None:
    ids, labels = torch.stack([IDS, IDS + 1]), torch.stack([LABELS, LABELS])
    each = vmap(grad(loss_of(reft_model)), in_dims=(None, 0, 0))
    gradients = each(weights_of(reft_model), ids, labels)
    for row in range(2):
        expected = autograd(reft_model, input_ids=ids[row], labels=labels[row])
        assert_same({name: g[row] for name, g in gradients.items()}, expected)


@torch.no_grad()
def test_many_weights_at_once(reft_model: rn.ReftModel) -> None:
    weights = weights_of(reft_model)
    stacked = {n: torch.stack([w, 2 * w, w + 0.1]) for n, w in weights.items()}
    losses = vmap(loss_of(reft_model))(stacked)
    for index, loss in enumerate(losses):
        assert_close(loss, loss_of(reft_model)({n: w[index] for n, w in stacked.items()}))


@torch.no_grad()
def test_weights_that_come_and_go_are_not_taken_for_one_another(reft_model: rn.ReftModel) -> None:
    weights = weights_of(reft_model)

    def changed(shift: float) -> Tensor:  # its tensors may get the addresses of those before
        return loss_of(reft_model)({n: w + shift * w.flip(-1) for n, w in weights.items()})

    losses = [changed(shift) for shift in (0.0, 0.5, 1.0, 0.0)]
    assert losses[0] == losses[3]
    assert len(set(map(float, losses))) == 3


def test_derivatives_of_the_rotation() -> None:
    raw = torch.randn(3, 6, dtype=torch.float64)

    def by_qr(raw: Tensor) -> Tensor:
        orthogonal, upper = torch.linalg.qr(raw.mT)
        return (orthogonal * upper.diagonal().sign()).mT

    assert_close(jacfwd(orthonormal_rows)(raw), jacrev(by_qr)(raw))
    assert_close(jacrev(orthonormal_rows)(raw), jacrev(by_qr)(raw))
    cubes = hessian(lambda x: (orthonormal_rows(x) ** 3).sum())(raw)
    assert_close(cubes, hessian(lambda x: (by_qr(x) ** 3).sum())(raw))
