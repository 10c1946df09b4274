"""torch.compile: one graph, the numbers of the plain pass, and nothing left on the bare base."""

import copy
from typing import Any

import pytest
import torch
from torch import Tensor
from torch._dynamo.utils import counters

import reftnoise as rn
from support.added_losses import WIDTH, Averaged, model_with, penalised
from support.models.architectures import tiny_model
from support.tolerance import assert_close, assert_close_gradients
from support.training_steps import batch
from support.training_steps import wrapped as wrapped_base

pytestmark = pytest.mark.filterwarnings("ignore:.*should not be instantiated:DeprecationWarning")


@pytest.fixture(autouse=True)
def _fresh() -> None:
    torch._dynamo.reset()
    counters.clear()


def wrapped(positions: str, *more: dict[str, Any]) -> rn.ReftModel:
    """Two layers: a graph is traced layer by layer."""
    return wrapped_base(positions, *more, base=tiny_model(num_hidden_layers=2))


def gradients(model: Any, called: Any, **inputs: Any) -> tuple[Tensor, list[Tensor]]:
    model.zero_grad()
    torch.manual_seed(3)
    loss = called(**inputs).loss
    loss.backward()
    return loss, [parameter.grad.clone() for parameter in model.interventions.parameters()]


def assert_same(found: tuple[Tensor, list[Tensor]], expected: tuple[Tensor, list[Tensor]]) -> None:
    assert_close(found[0], expected[0])
    assert_close_gradients(found[1], expected[1])


SYMNOISE = [{"intervention": "symnoise"}]
RED = [{"layer": "all", "component": "mlp_output", "intervention": "red", "gate": "probe"}]
STEPS: list[Any] = [("f1+l1", RED), ("all", SYMNOISE)]
STEPS += [
    pytest.param(positions, more, marks=pytest.mark.slow)
    for positions in ("l1", "f1+l1", "f7+l7", "all")
    for more in ([], SYMNOISE, RED)
    if (positions, more) not in STEPS
]


@pytest.mark.parametrize(("positions", "more"), STEPS)
def test_a_training_step_is_one_graph(positions: str, more: list[dict[str, Any]]) -> None:
    model, inputs = wrapped(positions, *more), batch() | {"use_cache": False}
    expected = gradients(model, model, **inputs, return_logits=True)
    bare = model.model(**inputs).loss
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    for _ in range(2):
        assert_same(gradients(model, compiled, **inputs), expected)
    assert counters["stats"]["unique_graphs"] == 1
    assert not counters["graph_break"]
    # Its hooks stay, and act in a compiled pass alone.
    assert torch.equal(model.model(**inputs).loss, bare)
    assert_same(gradients(model, model, **inputs, return_logits=True), expected)


@pytest.mark.parametrize("kind", ["weights", "pass"])
def test_units_add_their_losses_in_the_graph(kind: str) -> None:
    base = tiny_model(num_hidden_layers=2)
    model = penalised(base) if kind == "weights" else model_with(Averaged(embed_dim=WIDTH), base)
    inputs = batch() | {"use_cache": False, "num_items_in_batch": torch.tensor(40)}
    compiled = torch.compile(model, fullgraph=True, backend="eager")
    with torch._dynamo.config.patch(error_on_recompile=True):
        for progress in (0.25, 1.0):
            model.training_progress = progress
            expected = gradients(model, model, **inputs, return_logits=True)
            added = model.added_loss
            assert_same(gradients(model, compiled, **inputs), expected)
            assert_close(model.added_loss, added)


# Hooks act alike in a graph whatever its backend: no gradients need to be traced below.


@torch.no_grad()
def test_evaluation_and_another_model_on_the_same_base() -> None:
    first = wrapped("l1").eval()
    second = rn.get_reft_model(first.model, wrapped("f2").reft_config).eval()
    inputs = {name: value for name, value in batch().items() if name != "labels"}
    inputs["use_cache"] = False
    for model in (first, second, first):
        compiled = torch.compile(model, fullgraph=True, backend="eager")
        assert_close(compiled(**inputs).logits, model(**inputs).logits)


def test_a_copy_is_on_its_own() -> None:
    model, inputs = wrapped("l1"), batch() | {"use_cache": False}
    torch.compile(model, fullgraph=True, backend="eager")(**inputs)
    other = copy.deepcopy(model)
    with torch.no_grad():
        for unit in other.interventions.values():
            unit.learned_source.bias.add_(1)
    for one in (model, other):
        expected = gradients(one, one, **inputs, return_logits=True)
        assert_same(gradients(one, torch.compile(one, backend="eager"), **inputs), expected)


def test_what_others_hook_sees_edited_states() -> None:
    model, inputs = wrapped("all"), batch() | {"use_cache": False}
    model.model.model.layers[0].register_forward_hook(lambda _, __, hidden: hidden * 2)
    expected = model(**inputs, return_logits=True).loss
    compiled = torch.compile(model, fullgraph=True, backend="eager")
    assert_close(compiled(**inputs).loss, expected)


def test_eager_passes_after_a_compiled_one_are_split_again() -> None:
    model, inputs = wrapped("l1"), batch()
    torch.compile(model, fullgraph=True, backend="eager")(**inputs | {"use_cache": False})
    model.split = "always"
    assert model(**inputs, return_logits=False).loss.requires_grad
