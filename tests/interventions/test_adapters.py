"""Bias, RED and bottleneck adapter against their formulas."""

from typing import Any

import pytest
import torch
import torch.nn.functional as F

import reftnoise as rn
from reftnoise.interventions import EditedRows, edit_rows

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


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32, torch.float64])
def test_red_scales_and_shifts(dtype: torch.dtype) -> None:
    unit = rn.RedIntervention(embed_dim=WIDTH, dtype=dtype)
    assert torch.equal(unit.scaling, torch.ones(WIDTH, dtype=dtype))
    hidden = torch.randn(2, 3, WIDTH, dtype=torch.float64)
    assert torch.equal(unit(hidden), hidden)
    s, b = filled(unit).scaling.double(), unit.bias.double()
    torch.testing.assert_close(unit(hidden), s * hidden + b, rtol=1e-6, atol=1e-6)
    assert sum(p.numel() for p in unit.parameters()) == 2 * WIDTH


@pytest.mark.parametrize("grad", [True, False])
@pytest.mark.parametrize("rows", ["all", "few", "dropout"])
def test_red_and_its_gradients_are_those_of_the_formula(rows: str, grad: bool) -> None:
    """As a model edits with it, in float64."""
    dropout = 0.4 if rows == "dropout" else 0.0
    unit = filled(rn.RedIntervention(embed_dim=WIDTH, dropout=dropout, dtype="float64"))
    hidden = torch.randn(6, WIDTH, dtype=torch.float64, requires_grad=True)
    places = EditedRows(torch.tensor([0, 2, 5]) if rows == "few" else None)
    inputs = (hidden, unit.scaling, unit.bias)
    weight = torch.randn_like(hidden)
    with torch.set_grad_enabled(grad):
        torch.manual_seed(0)
        edited = edit_rows(hidden, [unit.row_edit(torch.float64, hidden.device)], places)
    torch.manual_seed(0)
    kept = F.dropout(torch.ones_like(hidden), dropout)
    delta = (unit.scaling - 1) * hidden + unit.bias
    mask = torch.zeros(6, 1, dtype=torch.float64).index_fill(0, torch.tensor([0, 2, 5]), 1.0)
    expected = hidden + delta * (mask if rows == "few" else kept)
    torch.testing.assert_close(edited, expected, rtol=1e-12, atol=1e-12)
    if grad:
        pairs = (torch.autograd.grad((x * weight).sum(), inputs) for x in (edited, expected))
        for gradient, closed in zip(*pairs, strict=True):
            torch.testing.assert_close(gradient, closed, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("norm", [0.01, 1.0, 30.0])
def test_ablation_takes_the_part_along_the_direction_away(norm: float, dtype: torch.dtype) -> None:
    unit, vector = (
        rn.AblationIntervention(embed_dim=WIDTH, dtype=dtype),
        torch.randn(WIDTH).double(),
    )
    unit.vector.copy_(norm * vector)
    hidden = torch.randn(2, 3, WIDTH, dtype=torch.float64, requires_grad=True)
    w = vector / vector.norm()
    projection = torch.eye(WIDTH, dtype=torch.float64) - torch.outer(w, w)
    edited, weight = unit(hidden), torch.randn_like(hidden)
    precision = 10 * torch.finfo(dtype).eps
    torch.testing.assert_close(edited, hidden @ projection, rtol=precision, atol=precision)
    (gradient,) = torch.autograd.grad((edited * weight).sum(), hidden)
    torch.testing.assert_close(gradient, weight @ projection, rtol=precision, atol=precision)
    assert not list(unit.parameters())


def test_no_direction_is_an_error() -> None:
    unit = rn.AblationIntervention(embed_dim=WIDTH)
    for ablate in (lambda: unit(torch.randn(1, 2, WIDTH)), unit.factors):
        with pytest.raises(ValueError, match=r"vector of AblationIntervention is zero.*: set it"):
            ablate()


def test_ablation_is_of_all_layers_unless_an_entry_says_which() -> None:
    def layers(**entry: object) -> object:
        return rn.ReftConfig({"intervention": "ablate"} | entry).representations[0].layer

    assert layers() == "all"
    assert layers(layer=[1, 3]) == [1, 3]
    assert layers(component="embeddings") is None
    with pytest.raises(ValueError, match="layer is missing"):
        rn.ReftConfig({"intervention": "bias"})


def test_red_has_no_subspace() -> None:
    unit = rn.RedIntervention(embed_dim=WIDTH)
    with pytest.raises(ValueError, match="RedIntervention has no subspace to edit a part of"):
        unit.delta(torch.randn(2, WIDTH), torch.ones(2, 1))


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


@pytest.mark.parametrize("name", ["bias", "red", "adapter"])
def test_all_start_as_the_identity_and_edit_every_token(name: str) -> None:
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


@torch.no_grad()
def test_the_papers_three_places_leave_no_state_along_the_direction() -> None:
    """The output of a layer alone leaves those within it, and the embeddings."""
    base, tokenizer = rn.load_tiny_model()
    ids = tokenizer("Where does a bear live?", return_tensors="pt")["input_ids"]
    vector = torch.randn(base.config.hidden_size)
    norm = base.model.layers[1].post_attention_layernorm  # which reads the residual stream
    within: list[Any] = []

    def largest_part(entries: list[dict[str, Any]]) -> tuple[float, float]:
        model = rn.get_reft_model(base, rn.ReftConfig(entries)).eval()
        for unit in model.interventions.values():
            unit.vector.copy_(vector)
        within.clear()
        with norm.register_forward_pre_hook(lambda _, args: within.append(args[0])):
            states = model(ids, output_hidden_states=True).hidden_states[:-1]
        parts = [F.cosine_similarity(s, vector, dim=-1).abs().max() for s in (*states, *within)]
        return float(max(parts[1:-1])), float(max(parts[0], parts[-1]))

    places = ("embeddings", "attention_output", "mlp_output")
    everywhere = [{"component": place, "intervention": "ablate"} for place in places]
    assert max(largest_part(everywhere)) < 1e-5
    after_layers, elsewhere = largest_part([{"intervention": "ablate"}])
    assert after_layers < 1e-5
    assert elsewhere > 1e-3
