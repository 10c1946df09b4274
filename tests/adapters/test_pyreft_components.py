"""Components within a layer edit what pyvene's components of the same names edit."""

from typing import Any

import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM

import reftnoise as rn
from support.models.architectures import CONFIGS, tiny_model

IDS = torch.tensor([[3, 5, 6, 7, 8, 9], [4, 15, 16, 17, 18, 19]])
LOCATIONS = {"sources->base": (None, [[[2], [3]]])}

# Logits 0 to 2 of both rows' last token under pyreft's LoReFT at layer 1, from pyvene 0.1.8.
EXPECTED: dict[tuple[str, str], list[list[float]]] = {
    ("llama", "attention_input"): [[-0.6662, -0.7919, -0.2438], [-0.6074, -0.4561, -0.3979]],
    ("llama", "query_output"): [[-0.7202, -0.7567, -0.176], [-0.3167, 0.2066, -0.4609]],
    ("llama", "key_output"): [[-0.6897, -0.7389, -0.1841], [-0.3338, 0.2215, -0.4577]],
    ("llama", "value_output"): [[-1.1064, -0.9582, -0.1863], [-0.3731, 0.1785, -0.4852]],
    ("llama", "attention_value_output"): [[-0.6963, -0.7876, -0.1579], [-0.3228, 0.2039, -0.4587]],
    ("llama", "mlp_input"): [[-0.7239, -0.7582, -0.1757], [-0.3268, 0.1911, -0.4819]],
    ("llama", "mlp_activation"): [[-0.7491, -0.7768, -0.1793], [-0.3255, 0.2305, -0.4477]],
    ("gpt2", "attention_input"): [[1.1711, 0.4513, -0.6383], [1.1282, 0.4947, -0.7666]],
    ("gpt2", "query_output"): [[1.4114, 0.6231, -0.5693], [1.3923, 0.6837, -0.6431]],
    ("gpt2", "key_output"): [[1.4154, 0.625, -0.5709], [1.3956, 0.6879, -0.6409]],
    ("gpt2", "value_output"): [[1.3817, 0.6062, -0.5511], [1.379, 0.6731, -0.6411]],
    ("gpt2", "attention_value_output"): [[1.4014, 0.6143, -0.5862], [1.3764, 0.6724, -0.6639]],
    ("gpt2", "mlp_input"): [[1.4134, 0.6226, -0.5631], [1.3945, 0.6854, -0.6345]],
    ("gpt2", "mlp_activation"): [[1.4278, 0.611, -0.5635], [1.4105, 0.67, -0.633]],
    ("gpt_neox", "attention_input"): [[0.2101, 0.5487, 0.1753], [0.5702, 0.292, 0.0609]],
    ("gpt_neox", "attention_value_output"): [[0.1934, 0.6344, 0.1544], [0.5765, 0.3848, 0.0301]],
    ("gpt_neox", "mlp_input"): [[0.1983, 0.6088, 0.1711], [0.5514, 0.3685, 0.0602]],
    ("gpt_neox", "mlp_activation"): [[0.1438, 0.5973, 0.3055], [0.536, 0.3293, 0.1554]],
}


def base_of(architecture: str) -> Any:
    """A model with weights that do not depend on how transformers draws them."""
    config = AutoConfig.for_model(architecture, **CONFIGS[architecture])
    model = AutoModelForCausalLM.from_config(config).eval()
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for _, parameter in sorted(model.named_parameters(), key=lambda item: item[0]):
            parameter.copy_(0.3 * torch.randn(parameter.shape, generator=generator))
    return model


def fill(unit: Any) -> None:
    """The weights that pyreft's unit had."""
    generator, width = torch.Generator().manual_seed(5), unit.hidden_size
    rotation = torch.linalg.qr(torch.randn(width, 4, generator=generator))[0]
    with torch.no_grad():
        unit.learned_source.weight.copy_(torch.randn(4, width, generator=generator))
        unit.learned_source.bias.copy_(torch.randn(4, generator=generator))
        unit.rotate_layer.weight.copy_(rotation.T)


@pytest.mark.parametrize(("architecture", "component"), EXPECTED)
@torch.no_grad()
def test_outputs_are_those_of_pyvene(architecture: str, component: str) -> None:
    entry = {"layer": 1, "component": component, "intervention": "loreft"}
    config = rn.ReftConfig(entry | {"low_rank_dimension": 4})
    model = rn.get_reft_model(base_of(architecture), config)
    for unit in model.interventions.values():
        fill(unit)
    logits = model.eval()(input_ids=IDS, unit_locations=LOCATIONS).logits
    expected = torch.tensor(EXPECTED[architecture, component])
    torch.testing.assert_close(logits[:, -1, :3], expected, rtol=0, atol=1e-4)
    assert (base_of(architecture)(IDS).logits[:, -1, :3] - expected).abs().max() > 2e-4


@pytest.mark.parametrize("component", ["key_output", "mlp_activation", "attention_value_output"])
@pytest.mark.parametrize("architecture", ["llama", "gpt2"])
def test_split_passes_have_the_gradients_of_plain_ones(architecture: str, component: str) -> None:
    entry = {"layer": [0, 2], "component": component, "intervention": "loreft"}
    config = rn.ReftConfig(entry | {"low_rank_dimension": 4, "positions": "l2"})
    model = rn.get_reft_model(tiny_model(architecture), config).train()
    labels = IDS.clone()
    labels[:, :4] = -100
    gradients = []
    for split in ("never", "always"):
        model.split = split
        model.zero_grad()
        model(input_ids=IDS, labels=labels).loss.backward()
        gradients.append([p.grad.clone() for p in model.interventions.parameters()])
    assert all(gradient.abs().max() > 0 for gradient in gradients[0])
    torch.testing.assert_close(gradients[1], gradients[0], rtol=1e-4, atol=1e-6)


@torch.no_grad()
def test_generated_tokens_are_edited_within_a_layer() -> None:
    entry = {"layer": 1, "component": "query_output", "intervention": "loreft"}
    config = rn.ReftConfig(entry | {"low_rank_dimension": 4, "positions": "all+decode"})
    model = rn.get_reft_model(tiny_model("gpt2"), config).eval()
    for unit in model.interventions.values():
        fill(unit)
    tokens = model.generate(IDS, max_new_tokens=4, do_sample=False)
    for length in range(IDS.shape[1], tokens.shape[1]):
        logits = model(input_ids=tokens[:, :length]).logits  # all of it is a prompt
        assert torch.equal(logits[:, -1].argmax(-1), tokens[:, length])
