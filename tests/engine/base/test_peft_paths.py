"""Dotted paths that begin at PEFT's wrapper, as pyreft's scripts write them."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from torch import Tensor, nn

import reftnoise as rn
from reftnoise.engine.base.sites import find_site
from support.models.architectures import tiny_model

pytestmark = pytest.mark.filterwarnings("ignore:.*gradient_checkpointing.*:FutureWarning")  # peft's

IDS = torch.tensor([[3, 5, 6, 7, 8, 9], [4, 15, 16, 17, 18, 19]])
LORA = {"r": 2, "target_modules": ["o_proj"], "init_lora_weights": False}


def adapted(base: nn.Module | None = None, **arguments: Any) -> Any:
    torch.manual_seed(0)
    return peft.get_peft_model(base or tiny_model(), peft.LoraConfig(**LORA | arguments))


def wrapped(base: Any, *, seed: int = 1, section: Any = None, **place: Any) -> rn.ReftModel:
    torch.manual_seed(seed)
    entry = {"intervention": "noreft", "low_rank_dimension": 4, "embed_dim": 32} | place
    return rn.get_reft_model(base, rn.ReftConfig(entry, peft=section)).eval()


@torch.no_grad()
def logits(model: Any) -> Tensor:
    return model(input_ids=IDS).logits


@pytest.mark.parametrize("task_type", ["CAUSAL_LM", None])
def test_a_layer_of_a_peft_model(task_type: str | None) -> None:
    """Its edit is that of the component; pyreft's example with LoRA names layers so."""
    path = "base_model.model.model.layers[2].output"
    by_path = wrapped(adapted(task_type=task_type), component=path, layer=2)
    by_name = wrapped(adapted(task_type=task_type), component="block_output", layer=2)
    assert torch.equal(logits(by_path), logits(by_name))
    assert not torch.equal(logits(by_path), logits(by_path.model))


def test_a_section_puts_the_wrapper_on_later(tmp_path: Path) -> None:
    section = {"peft_type": "lora"} | LORA
    path = "base_model.model.model.layers.2.output"
    model = wrapped(tiny_model(), section=section, component=path)
    model.save_pretrained(tmp_path)
    loaded = rn.ReftModel.from_pretrained(tiny_model(), tmp_path)
    assert torch.equal(logits(loaded), logits(model))
    assert isinstance(loaded.model, peft.PeftModel)


@pytest.mark.parametrize(
    ("path", "own"),
    [
        ("base_model.model.model.layers[1].mlp.output", "model.layers.1.mlp"),
        (
            "base_model.model.model.layers[1].self_attn.o_proj.base_layer.output",
            "model.layers.1.self_attn.o_proj.base_layer",
        ),
        ("model.layers[1].mlp.output", "model.layers[1].mlp"),
    ],
)
def test_modules_within_a_peft_model(path: str, own: str) -> None:
    base = adapted()
    site = find_site(base, path)
    assert site.name == own
    assert site.module is base.get_base_model().get_submodule(own.replace("[1]", ".1"))


def test_virtual_tokens_are_in_one_wrapper_alone() -> None:
    config = peft.PromptTuningConfig(num_virtual_tokens=2, task_type="CAUSAL_LM")
    base = peft.get_peft_model(tiny_model(), config)
    site = find_site(base, "base_model.model.layers[1].output")
    assert site.module is base.get_base_model().model.layers[1]


def test_a_path_that_leads_nowhere() -> None:
    path = "base_model.model.model.layer[2].output"
    with pytest.raises(ValueError, match=r"LlamaModel has no 'layer', but embed_tokens, layers"):
        find_site(adapted(), path)
    with pytest.raises(ValueError, match=r"LlamaForCausalLM has no 'base_model', but model"):
        find_site(adapted(), "base_model.nothing.output")


class Plain(nn.Module):
    """A module that is no model of transformers."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(30, 32)
        self.layers = nn.ModuleList([nn.Linear(32, 32) for _ in range(3)])
        self.head = nn.Linear(32, 30)

    def forward(self, input_ids: Tensor, attention_mask: Tensor | None = None) -> Tensor:
        hidden = self.embed(input_ids)
        for layer in self.layers:
            hidden = hidden + torch.tanh(layer(hidden))
        scores: Tensor = self.head(hidden)
        return scores


class Around(nn.Module):
    """A module around a model of transformers."""

    def __init__(self) -> None:
        super().__init__()
        self.inside = tiny_model()

    def forward(self, input_ids: Tensor, attention_mask: Tensor | None = None) -> Tensor:
        scores: Tensor = self.inside(input_ids=input_ids, attention_mask=attention_mask).logits
        return scores


@pytest.mark.parametrize(
    ("module", "target", "path"),
    [
        (Plain, "layers.0", "base_model.model.layers[1].output"),
        (Around, "o_proj", "base_model.model.inside.model.layers[1].output"),
    ],
)
def test_a_plain_module_inside(
    module: Callable[[], nn.Module], target: str, path: str, tmp_path: Path
) -> None:
    def base() -> Any:
        torch.manual_seed(0)
        return adapted(module(), target_modules=[target])

    model = wrapped(base(), component=path, positions="l2")
    ids = IDS.clone()
    bare, edited = model.model(input_ids=ids), model(input_ids=ids)
    assert not torch.equal(edited[:, -2:], bare[:, -2:])
    assert torch.equal(edited[:, :-2], bare[:, :-2])
    where = {"sources->base": (None, [[[4, 5], [4, 5]]])}
    _, by_location = model({"input_ids": ids}, unit_locations=where)
    assert torch.equal(by_location, edited)

    model.train()
    model(input_ids=ids).square().sum().backward()
    assert all(p.grad is not None for p in model.get_trainable_parameters())
    assert any("lora" in name for name, p in model.named_parameters() if p.requires_grad)
    with torch.no_grad():
        for parameter in model.get_trainable_parameters():
            parameter.add_(0.1)
    model.eval().save_pretrained(tmp_path)
    loaded = rn.ReftModel.from_pretrained(base(), tmp_path)
    assert torch.equal(loaded(input_ids=ids), model(input_ids=ids))
