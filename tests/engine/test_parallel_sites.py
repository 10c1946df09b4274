"""Edits that are computed of a module's input and added to its output (arXiv:2110.04366)."""

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import reftnoise as rn
from reftnoise.engine.base.sites import find_site
from support.adapters import moved
from support.models.architectures import ARCHITECTURES, tiny_model
from support.tolerance import assert_close

IDS = torch.arange(3, 13).repeat(2, 1)
IDS[1] += 7
ADAPTER: dict[str, Any] = {"layer": "all", "intervention": "adapter", "low_rank_dimension": 3}
LOREFT: dict[str, Any] = {"layer": "all", "intervention": "loreft", "low_rank_dimension": 2}
COMPONENTS = ["mlp_parallel", "attention_parallel"]
PLACES = [(name, component) for name in ARCHITECTURES for component in COMPONENTS]
PLACES += [(name, "query_parallel") for name in ("llama", "gpt2", "gpt_neo")]
PLACES += [("gpt2", "value_parallel"), ("gpt_neo", "key_parallel")]


def wrapped(base: Any, *entries: dict[str, Any]) -> rn.ReftModel:
    torch.manual_seed(5)
    return moved(rn.get_reft_model(base, rn.ReftConfig(list(entries))))


class NextTo(nn.Module):
    """A module, and with it the change that a unit makes of its input at some columns."""

    def __init__(self, module: nn.Module, unit: Any, columns: slice, features: slice) -> None:
        super().__init__()
        self.module, self.unit, self.columns, self.features = module, unit, columns, features

    def __getattr__(self, name: str) -> Any:  # a layer may ask its attention for settings
        try:
            return super().__getattr__(name)
        except AttributeError:
            return getattr(super().__getattr__("module"), name)

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        read = args[0] if args else kwargs["hidden_states"]
        output = self.module(*args, **kwargs)
        states = output[0] if isinstance(output, tuple) else output
        mask = torch.zeros(read.shape[1], 1, dtype=torch.bool)
        mask[self.columns] = True
        change = torch.zeros_like(states)
        change[..., self.features] = torch.where(mask, self.unit.edit(read), 0.0)
        edited = states + change
        return (edited, *output[1:]) if isinstance(output, tuple) else edited


def by_hand(reft_model: rn.ReftModel, component: str, columns: slice) -> nn.Module:
    """A copy of the base in which modules are next to their edits."""
    base = copy.deepcopy(reft_model.model)
    for layer, placed in enumerate(reft_model.engine.units):
        site = find_site(base, component, layer)
        parent, _, child = site.name.rpartition(".")
        (features,) = site.columns or [(None, None)]
        unit = copy.deepcopy(placed.unit)
        joint = NextTo(base.get_submodule(site.name), unit, columns, slice(*features))
        setattr(base.get_submodule(parent), child, joint)
    return base


@pytest.mark.parametrize(("architecture", "component"), PLACES)
def test_outputs_and_gradients_are_those_of_modules_side_by_side(
    architecture: str, component: str
) -> None:
    reft_model = wrapped(tiny_model(architecture), ADAPTER | {"component": component})
    expected = by_hand(reft_model, component, slice(None))
    labels = IDS.clone()
    labels[:, :6] = -100
    losses = [model(input_ids=IDS, labels=labels).loss for model in (reft_model.train(), expected)]
    assert_close(losses[0], losses[1])
    gradients = []
    for loss, model in zip(losses, (reft_model.interventions, expected), strict=True):
        loss.backward()
        gradients.append([p.grad for n, p in model.named_parameters() if ".unit." in f".{n}"])
    own = [p.grad for p in reft_model.interventions.parameters()]
    assert_close(own, gradients[1])
    assert all(gradient.abs().max() > 0 for gradient in own)


@pytest.mark.parametrize("component", COMPONENTS)
def test_chosen_positions(component: str) -> None:
    reft_model = wrapped(tiny_model(), LOREFT | {"component": component, "positions": "l2"})
    expected = by_hand(reft_model, component, slice(8, 10))
    with torch.no_grad():
        assert_close(reft_model.eval()(input_ids=IDS).logits, expected(input_ids=IDS).logits)


def generated(model: Any, **choices: Any) -> Tensor:
    return model.generate(IDS, max_new_tokens=6, do_sample=False, eos_token_id=None, **choices)


@pytest.mark.parametrize("positions", ["l1", "all+decode"])
def test_a_cache_changes_nothing(positions: str) -> None:
    entry = ADAPTER | {"component": "mlp_parallel", "positions": positions}
    reft_model = wrapped(tiny_model(), entry).eval()
    assert torch.equal(generated(reft_model), generated(reft_model, use_cache=False))
    assert not torch.equal(generated(reft_model), generated(reft_model.model))


def test_next_to_edits_of_the_output_by_name(tmp_path: Path) -> None:
    """A row gets its adapter's, or the sum of two: of an input and of an output."""
    parts = {
        "parallel": wrapped(tiny_model(), ADAPTER | {"component": "mlp_parallel"}),
        "output": wrapped(tiny_model(), LOREFT | {"component": "mlp_output", "positions": "all"}),
    }
    named = rn.get_reft_model(tiny_model()).eval()
    for name, part in parts.items():
        part.eval().save_pretrained(tmp_path / name)
        named.load_adapter(tmp_path / name, name)
        loaded = rn.ReftModel.from_pretrained(tiny_model(), tmp_path / name).eval()
        assert torch.equal(loaded(input_ids=IDS).logits, part(input_ids=IDS).logits)
    with torch.no_grad():
        rows = named(input_ids=IDS, adapter_names=list(parts)).logits
        for row, part in enumerate(parts.values()):
            assert_close(rows[row], part(input_ids=IDS).logits[row])
        half = named(input_ids=IDS, adapter_names=[{"parallel": 0.5}] * 2).logits
        with parts["parallel"].using(scale=0.5):
            assert_close(half, parts["parallel"](input_ids=IDS).logits)


def test_a_projection_to_fewer_heads() -> None:
    message = "component 'value_parallel': model.layers.0.self_attn.v_proj reads 32 features and"
    with pytest.raises(ValueError, match=f"{message} writes 16"):
        wrapped(tiny_model(), ADAPTER | {"component": "value_parallel"})


def test_noise_reads_nothing() -> None:
    with pytest.raises(ValueError, match="component 'mlp_parallel': noise reads nothing"):
        rn.ReftConfig({"layer": 0, "component": "mlp_parallel", "intervention": "neftune"})
