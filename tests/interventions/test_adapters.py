"""Bias and bottleneck adapter against their formulas."""

from typing import Any

import pytest
import torch
import torch.nn.functional as F

import reftnoise as rn

WIDTH = 8


def filled(unit: Any) -> Any:
    with torch.no_grad():
        for parameter in unit.parameters():
            parameter.normal_()
    return unit


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_a_bias_is_added(dtype: torch.dtype) -> None:
    unit = filled(rn.BiasIntervention(embed_dim=WIDTH, dtype=dtype))
    hidden = torch.randn(2, 3, WIDTH)
    expected = (hidden.to(dtype) + unit.bias).to(hidden.dtype)
    torch.testing.assert_close(unit(hidden), expected, rtol=0, atol=0)
    assert sum(p.numel() for p in unit.parameters()) == WIDTH


@pytest.mark.parametrize(
    ("act_fn", "function"), [("gelu", F.gelu), ("relu", F.relu), (None, lambda x: x)]
)
def test_the_adapter_is_a_bottleneck_beside_the_residual(act_fn: str | None, function: Any) -> None:
    unit = filled(rn.AdapterIntervention(embed_dim=WIDTH, low_rank_dimension=3, act_fn=act_fn))
    hidden = torch.randn(2, 3, WIDTH)
    inner = function(hidden @ unit.down.weight.T + unit.down.bias)
    expected = hidden + inner @ unit.up.weight.T + unit.up.bias
    torch.testing.assert_close(unit(hidden), expected, rtol=1e-6, atol=1e-6)
    assert sum(p.numel() for p in unit.parameters()) == 2 * 3 * WIDTH + 3 + WIDTH


@pytest.mark.parametrize("name", ["bias", "adapter"])
def test_both_start_as_the_identity_and_edit_every_token(name: str) -> None:
    rank = {"low_rank_dimension": 3} if name == "adapter" else {}
    config = rn.ReftConfig({"layer": "all", "intervention": name} | rank)
    assert config.representations[0].positions == "all+decode"
    unit = rn.get_reft_model(rn.load_tiny_model()[0], config).interventions
    hidden = torch.randn(2, 3, 128)
    for one in unit.values():
        torch.testing.assert_close(one.delta(hidden), torch.zeros_like(hidden), rtol=0, atol=0)


def test_a_bias_has_no_rank_and_an_adapter_needs_one() -> None:
    with pytest.raises(TypeError, match="BiasIntervention got an unknown argument 'act_fn'"):
        rn.BiasIntervention(embed_dim=WIDTH, act_fn="relu")
    with pytest.raises(ValueError, match="low_rank_dimension 9: expected a rank from 1 to"):
        rn.AdapterIntervention(embed_dim=WIDTH, low_rank_dimension=9)


def test_bitfit_is_the_gradient_of_a_models_own_bias() -> None:
    """A bias at a linear layer's output has the gradient that the layer's own bias would have."""
    torch.manual_seed(0)
    model, _ = rn.load_tiny_model()
    path = "model.layers.1.mlp.down_proj"
    layer = model.get_submodule(path)
    ids = torch.randint(5, 100, (2, 6))
    entry = {"intervention": "bias", "component": f"{path}.output"}
    reft_model = rn.get_reft_model(model, rn.ReftConfig(entry))
    reft_model(input_ids=ids, labels=ids).loss.backward()
    (found,) = (p.grad for p in reft_model.interventions.parameters())
    layer.bias = torch.nn.Parameter(torch.zeros(layer.out_features))
    model(input_ids=ids, labels=ids).loss.backward()
    torch.testing.assert_close(found, layer.bias.grad, rtol=1e-5, atol=1e-7)
