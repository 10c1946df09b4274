"""Modules of the base that are resized or replaced after it was wrapped."""

import copy
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import reftnoise as rn
from support.models.architectures import ARCHITECTURES, tiny_model
from support.tolerance import assert_close

LOREFT: dict[str, Any] = {"intervention": "loreft", "low_rank_dimension": 4, "positions": "f1+l1"}
IDS = torch.arange(3, 13)[None]


def wrapped(base: Any, **entry: Any) -> rn.ReftModel:
    return rn.get_reft_model(base, rn.ReftConfig(LOREFT | entry))


def anew(model: rn.ReftModel, **entry: Any) -> rn.ReftModel:
    """The same units, around the base as it is now."""
    other = wrapped(model.model, **entry)
    other.interventions.load_state_dict(model.interventions.state_dict())
    return other


@torch.no_grad()
def logits(model: Any, ids: Tensor = IDS) -> Tensor:
    return model(input_ids=ids).logits


@torch.no_grad()
def generated(model: Any) -> Tensor:
    return model.generate(IDS, max_new_tokens=6, do_sample=False, eos_token_id=None)


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_a_resized_vocabulary(architecture: str) -> None:
    model = wrapped(tiny_model(architecture), component="embeddings")
    before = logits(model)
    model.resize_token_embeddings(110, mean_resizing=False)
    assert model.get_input_embeddings().num_embeddings == model.config.vocab_size == 110
    after = logits(model)
    assert_close(after[..., :101], before)
    assert torch.equal(after, logits(anew(model, component="embeddings")))
    ids = IDS.clone()
    ids[0, -1] = 109  # the edited last token is a new one
    assert not torch.equal(logits(model, ids), logits(model.model, ids))


def test_other_embeddings() -> None:
    entry = {"component": "embeddings"}
    model = wrapped(tiny_model(), **entry)
    torch.manual_seed(1)
    embeddings = nn.Embedding(101, 32)
    model.set_input_embeddings(embeddings)
    assert model.get_input_embeddings() is embeddings
    assert torch.equal(logits(model), logits(anew(model, **entry)))
    assert not torch.equal(logits(model), logits(model.model))


def test_noise_of_other_embeddings() -> None:
    model = rn.get_reft_model(tiny_model(), rn.ReftConfig({"intervention": "neftune"})).train()
    model.set_input_embeddings(copy.deepcopy(model.get_input_embeddings()))
    assert not torch.equal(logits(model), logits(model.model))


@pytest.mark.parametrize("component", ["block_output", "model.layers[1].mlp.output"])
def test_another_layer(component: str) -> None:
    entry: dict[str, Any] = {"component": component}
    if component == "block_output":
        entry |= {"layer": [0, 1]}
    model = wrapped(tiny_model(), **entry)
    before = logits(model)
    layers = model.model.model.layers
    layers[1] = copy.deepcopy(layers[1])
    assert torch.equal(logits(model), before)
    with torch.no_grad():
        layers[1].mlp.down_proj.weight.mul_(2)
    assert torch.equal(logits(model), logits(anew(model, **entry)))
    assert torch.equal(generated(model), generated(anew(model, **entry)))
    assert not torch.equal(logits(model), logits(model.model))
    assert not any(module._forward_hooks for module in model.model.modules())


def test_a_layer_that_is_gone() -> None:
    model = wrapped(tiny_model(), layer=2)
    del model.model.model.layers[2]
    with pytest.raises(ValueError, match=r"model.layers.2.output: .* no such module any more"):
        logits(model)
