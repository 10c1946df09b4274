"""Components are found by structure, on architectures that name their modules differently."""

import copy
import re
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from transformers import (
    AlbertConfig,
    AlbertForSequenceClassification,
    BartConfig,
    BartForCausalLM,
    ResNetConfig,
    ResNetForImageClassification,
    XLNetConfig,
    XLNetForSequenceClassification,
)

import reftnoise as rn
from reftnoise.config.components import COMPONENTS
from reftnoise.engine.base.sites import Site, find_layers, find_site, hidden_size, num_layers
from support.models.architectures import tiny_model
from support.models.tiny_models import examples_of, model_of
from support.tolerance import assert_close

WIDTH, LAYERS = 32, 3

# Names of the embedding and, in layer 1, of the layer itself, its attention and its MLP.
NAMES = {
    "llama": ("model.embed_tokens", "model.layers.1", "self_attn", "mlp"),
    "gpt2": ("transformer.wte", "transformer.h.1", "attn", "mlp"),
    "gpt_neo": ("transformer.wte", "transformer.h.1", "attn", "mlp"),
    "gpt_neox": ("gpt_neox.embed_in", "gpt_neox.layers.1", "attention", "mlp"),
    "gemma3_text": ("model.embed_tokens", "model.layers.1", "self_attn", "mlp"),
    "phi3": ("model.embed_tokens", "model.layers.1", "self_attn", "mlp"),
}
# Modules within the attention or the MLP, in the order of NAMES; "-" where queries, keys and values
# are mixed in one matrix.
PARTS = {
    "query_output": "q_proj c_attn attention.q_proj - q_proj -",
    "key_output": "k_proj c_attn attention.k_proj - k_proj -",
    "value_output": "v_proj c_attn attention.v_proj - v_proj -",
    "attention_value_output": "o_proj c_proj attention.out_proj dense o_proj o_proj",
    "mlp_activation": "act_fn act act act act_fn activation_fn",
}
THIRDS = {"query_output": "[0:32]", "key_output": "[32:64]", "value_output": "[64:96]"}


def exactly(text: str) -> str:
    return f"^{re.escape(text)}$"


@pytest.mark.parametrize("architecture", NAMES)
def test_every_component_is_the_right_module(architecture: str) -> None:
    model = tiny_model(architecture)
    embeddings, block, attention, mlp = NAMES[architecture]
    expected = {
        "embeddings": f"{embeddings}.output",
        "block_output": f"{block}.output",
        "block_input": f"{block}.input",
        "attention_output": f"{block}.{attention}.output",
        "mlp_output": f"{block}.{mlp}.output",
        "attention_input": f"{block}.{attention}.input",
        "mlp_input": f"{block}.{mlp}.input",
        "attention_parallel": f"{block}.{attention}.output, computed of its input",
        "mlp_parallel": f"{block}.{mlp}.output, computed of its input",
    }
    parallel = {f"{part}_parallel" for part in ("query", "key", "value")}  # test_parallel_sites.py
    assert {*expected, *PARTS, *parallel, "head_output"} == set(COMPONENTS)
    for component, name in expected.items():
        site = find_site(model, component, None if component == "embeddings" else 1)
        assert str(site) == name
        assert site.module is model.get_submodule(name.partition(",")[0].rpartition(".")[0])
        assert site.width == WIDTH
    assert find_layers(model)[1] is model.get_submodule(block)
    assert (num_layers(model), hidden_size(model)) == (LAYERS, WIDTH)


@pytest.mark.parametrize("component", PARTS)
@pytest.mark.parametrize("architecture", NAMES)
@torch.no_grad()
def test_modules_within_attention_and_mlp(architecture: str, component: str) -> None:
    model = tiny_model(architecture)
    _, block, attention, mlp = NAMES[architecture]
    part = PARTS[component].split()[list(NAMES).index(architecture)]
    owner = f"{block}.{mlp if component.startswith('mlp') else attention}"
    if part == "-":
        mixed = next(name for name, _ in model.get_submodule(owner).named_children())
        message = f"by its dotted path, such as '{owner}.{mixed}.output'"
        with pytest.raises(ValueError, match=re.escape(message)):
            find_site(model, component, 1)
        return
    site = find_site(model, component, 1)
    is_input = component.endswith("_input") or component == "attention_value_output"
    third = THIRDS[component] if part == "c_attn" else ""
    assert str(site) == f"{owner}.{part}.{'input' if is_input else 'output'}{third}"
    assert site.module is model.get_submodule(f"{owner}.{part}")
    states = states_at(model, site, torch.tensor([[5, 6, 7, 8]]))
    assert site.width == states.shape[-1] // (3 if third else 1)


def states_at(model: nn.Module, site: Site, ids: Tensor) -> Tensor:
    """The hidden states that pass a site, read by a hook of the test's own."""
    seen: list[Any] = []
    if site.is_input:
        handle = site.module.register_forward_pre_hook(
            lambda _, args, kwargs: seen.append(args[0] if args else kwargs["hidden_states"]),
            with_kwargs=True,
        )
    else:
        handle = site.module.register_forward_hook(lambda _, __, output: seen.append(output))
    model(ids)
    handle.remove()
    (states,) = seen
    return states[0] if isinstance(states, tuple) else states


@pytest.mark.parametrize("architecture", NAMES)
@torch.no_grad()
def test_sites_carry_the_states_that_the_model_reports(architecture: str) -> None:
    model, ids = tiny_model(architecture), torch.tensor([[5, 6, 7, 8]])
    reported = model(ids, output_hidden_states=True).hidden_states
    assert torch.equal(states_at(model, find_site(model, "block_input", 0), ids), reported[0])
    assert torch.equal(states_at(model, find_site(model, "block_output", 0), ids), reported[1])
    assert torch.equal(states_at(model, find_site(model, "block_input", 1), ids), reported[1])
    assert torch.equal(states_at(model, find_site(model, "block_output", 1), ids), reported[2])


# Gemma 3 normalises what its attention and its MLP return before adding them.
@pytest.mark.parametrize("architecture", [name for name in NAMES if name != "gemma3_text"])
@torch.no_grad()
def test_a_block_adds_its_attention_and_its_mlp(architecture: str) -> None:
    model, ids = tiny_model(architecture), torch.tensor([[5, 6, 7, 8]])
    parts = ("block_input", "block_output", "attention_output", "mlp_output")
    at = {part: states_at(model, find_site(model, part, 1), ids) for part in parts}
    total = at["block_input"] + at["attention_output"] + at["mlp_output"]
    assert_close(at["block_output"], total)


@pytest.mark.parametrize(
    ("component", "module", "is_input", "width"),
    [
        ("model.layers[2].output", "model.layers.2", False, None),
        ("model.layers.2.output", "model.layers.2", False, None),
        ("model.layers[2].input", "model.layers.2", True, None),
        ("model.layers[0].mlp.output", "model.layers.0.mlp", False, None),
        ("model.layers[0].mlp.down_proj.input", "model.layers.0.mlp.down_proj", True, 64),
        ("model.layers[0].mlp.down_proj.output", "model.layers.0.mlp.down_proj", False, 32),
        ("model.embed_tokens.output", "model.embed_tokens", False, 32),
        ("lm_head.output", "lm_head", False, 101),
    ],
)
@pytest.mark.parametrize("layer", [None, 0])
def test_dotted_paths(
    component: str, module: str, is_input: bool, width: int | None, layer: int | None
) -> None:
    model = tiny_model()
    site = find_site(model, component, layer)
    assert site.module is model.get_submodule(module)
    assert (site.is_input, site.width) == (is_input, width)


@pytest.mark.parametrize(
    ("component", "problem"),
    [
        ("model.layers[7].output", "ModuleList has no '7', but 0, 1, 2"),
        ("layers[0].output", "LlamaForCausalLM has no 'layers', but model, lm_head"),
        ("model.layer[0].output", "LlamaModel has no 'layer', but embed_tokens, layers, norm,"),
        ("model.layers[0].mlpp.output", "LlamaDecoderLayer has no 'mlpp', but self_attn, mlp,"),
        ("lm_head.weight.output", "Linear has no 'weight', but no modules in it"),
    ],
)
def test_an_unknown_path_lists_the_children(component: str, problem: str) -> None:
    with pytest.raises(ValueError, match=f"^{re.escape(f'component {component!r}: {problem}')}"):
        find_site(tiny_model(), component)


@pytest.mark.parametrize("layer", [3, -1, None])
@pytest.mark.parametrize("component", [c for c in COMPONENTS if c != "embeddings"])
def test_a_wrong_layer(component: str, layer: int | None) -> None:
    with pytest.raises(
        ValueError, match=exactly(f"layer {layer}: GPT2LMHeadModel has layers 0 to 2")
    ):
        find_site(tiny_model("gpt2"), component, layer)


def test_an_unknown_component() -> None:
    message = (
        f"component 'mlp': expected {', '.join(COMPONENTS)} or a dotted path that ends in .output "
        "or .input, such as 'model.layers[3].mlp.output'"
    )
    with pytest.raises(ValueError, match=exactly(message)):
        find_site(tiny_model(), "mlp", 0)


@pytest.mark.parametrize("component", ["attention_output", "mlp_output"])
def test_a_layer_with_two_attentions_or_no_mlp(component: str) -> None:
    small = {"d_model": 16, "encoder_layers": 1, "decoder_layers": 1, "vocab_size": 20}
    model = BartForCausalLM(BartConfig(**small, decoder_attention_heads=2, decoder_ffn_dim=16))
    children = ", ".join(name for name, _ in model.model.decoder.layers[0].named_children())
    message = (
        f"component {component!r}: BartDecoderLayer has {children}; name one of them by its "
        "dotted path, such as 'model.decoder.layers.0.self_attn.output'"
    )
    with pytest.raises(ValueError, match=exactly(message)):
        find_site(model, component, 0)


def test_a_model_without_a_list_of_layers() -> None:
    model = tiny_model()
    model.config.num_hidden_layers = 5
    message = (
        "LlamaForCausalLM: found no list of 5 layers; name the component by its dotted path, "
        "ending in .output or .input; lists of modules: model.layers[0-2]"
    )
    with pytest.raises(ValueError, match=exactly(message)):
        find_site(model, "block_output", 0)


SMALL = {
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "vocab_size": 101,
}


def test_layers_that_stand_in_no_list_are_named_by_their_path(tmp_path: Path) -> None:
    """ALBERT's layers are one module, called three times."""
    base = AlbertForSequenceClassification(AlbertConfig(**SMALL, embedding_size=16))
    unit: dict[str, Any] = {"intervention": "loreft", "low_rank_dimension": 2, "positions": "f1"}
    message = (
        "representations[0]: AlbertForSequenceClassification: found no list of 3 layers; name the "
        "component by its dotted path, ending in .output or .input; lists of modules: "
        "albert.encoder.albert_layer_groups[0-0], "
        "albert.encoder.albert_layer_groups.0.albert_layers[0-0]"
    )
    with pytest.raises(ValueError, match=exactly(message)):
        rn.get_reft_model(base, rn.ReftConfig(unit | {"layer": "all"}))
    unit["component"] = "albert.encoder.albert_layer_groups[0].output"
    model = rn.get_reft_model(base, rn.ReftConfig(unit))
    inputs = {"input_ids": torch.arange(3, 9)[None]}
    model(**inputs, labels=torch.tensor([1])).loss.backward()
    assert all(parameter.grad.abs().max() > 0 for parameter in model.interventions.parameters())
    expected = model.eval()(**inputs).logits
    model.save_pretrained(tmp_path)
    loaded = rn.ReftModel.from_pretrained(copy.deepcopy(base), tmp_path)
    assert torch.equal(loaded(**inputs).logits, expected)


def test_an_embedding_that_the_model_does_not_tell_is_named_by_its_path() -> None:
    base = model_of("wav2vec2")
    message = (
        "representations[0]: component 'embeddings': Wav2Vec2ForSequenceClassification has no "
        "get_input_embeddings; name it by its dotted path, such as 'model.embed_tokens.output'"
    )
    with pytest.raises(ValueError, match=exactly(message)):
        rn.get_reft_model(base, rn.ReftConfig({"intervention": "neftune"}))
    path = "wav2vec2.feature_projection.output"
    rn.get_reft_model(base, rn.ReftConfig({"intervention": "neftune", "component": path}))


def test_a_config_without_layers_or_width() -> None:
    base = ResNetForImageClassification(
        ResNetConfig(embedding_size=8, hidden_sizes=[8], depths=[1])
    )
    message = (
        "ResNetForImageClassification: found no list of its layers; name the component by its "
        "dotted path, ending in .output or .input; lists of modules: resnet.encoder.stages[0-0]"
    )
    with pytest.raises(ValueError, match=exactly(message)):
        num_layers(base)
    message = "ResNetForImageClassification: its config has no hidden_size"
    with pytest.raises(ValueError, match=exactly(message)):
        hidden_size(base)


def test_hidden_states_that_are_not_one_per_token() -> None:
    """XLNet's are [length, batch, width]; those of an image tower belong to patches."""
    config = XLNetConfig(vocab_size=101, d_model=32, n_layer=2, n_head=4, d_inner=48)
    base = XLNetForSequenceClassification(config)
    loreft = {"layer": "all", "intervention": "loreft", "low_rank_dimension": 2}
    model = rn.get_reft_model(base, rn.ReftConfig(loreft))
    message = (
        "transformer.layer.0.output: expected hidden states [1, 6, width], one per row and token "
        "of the input, got (6, 1, 32)"
    )
    with pytest.raises(ValueError, match=exactly(message)):
        model(input_ids=torch.arange(3, 9)[None])
    path = "model.vision_tower.encoder.layers[0].output"
    unit = {"intervention": "loreft", "low_rank_dimension": 2, "component": path}
    model = rn.get_reft_model(model_of("llava"), rn.ReftConfig(unit))
    with pytest.raises(ValueError, match=r"one per row and token of the input, got \(1, 5, 32\)"):
        model(**examples_of("llava")[0])
