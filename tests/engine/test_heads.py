"""Attention heads as a site: against a hook of the test's own, pyvene, and each other."""

import contextlib
import io
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from transformers import LlamaConfig, LlamaForCausalLM

import reftnoise as rn
from reftnoise.adapters.frozen import FrozenAdapter, stacked_units
from reftnoise.engine.base.sites import find_site
from reftnoise.inference.vllm.flat_batch import FlatBatch, StepRequests, apply_
from reftnoise.interventions import INTERVENTIONS
from support.adapters import moved, wrapped
from support.models.architectures import tiny_model
from support.models.tiny_models import examples_of, model_of
from support.tolerance import assert_close

with contextlib.redirect_stdout(io.StringIO()):
    import pyvene

WIDTH = 8  # of a head; a layer has four
LOREFT = {"intervention": "loreft", "low_rank_dimension": 3, "positions": "all+decode"}
HEADS = {"layer": 1, "component": "head_output"}
PLAIN = {"layer": "all", "intervention": "bias"}
IDS = torch.tensor([[5, 6, 7, 8, 9], [9, 8, 7, 6, 5]])


def features(*heads: int) -> list[int]:
    return [WIDTH * head + feature for head in heads for feature in range(WIDTH)]


@contextlib.contextmanager
def edited(projection: nn.Module, edits: dict[tuple[int, ...], Any]) -> Iterator[None]:
    """Within the block, a hook of the test's own edits what a projection reads, by heads."""

    def hook(_: nn.Module, args: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
        states = args[0].clone()
        for heads, unit in edits.items():
            states[..., features(*heads)] += unit.edit(args[0][..., features(*heads)])
        return (states,)

    handle = projection.register_forward_pre_hook(hook)
    try:
        yield
    finally:
        handle.remove()


@pytest.mark.parametrize("architecture", ["llama", "gpt2", "gpt_neox", "gemma3_text", "phi3"])
def test_a_unit_edits_its_heads_together_and_no_other(architecture: str, tmp_path: Path) -> None:
    """Outputs and gradients in float64: of a fresh unit, a moved one, and a loaded one."""
    base = tiny_model(architecture).double()
    entries = [HEADS | LOREFT | {"heads": [3, 1], "dtype": "float64"}]
    model = rn.get_reft_model(base, rn.ReftConfig(entries))
    (unit,) = model.interventions.values()
    assert unit.hidden_size == 2 * WIDTH
    projection = find_site(base, "attention_value_output", 1).module
    for state in ("fresh", "moved"):
        if state == "moved":
            moved(model)
        results = []
        for own in (False, True):
            model.zero_grad()
            with contextlib.ExitStack() as stack:
                if own:
                    stack.enter_context(edited(projection, {(1, 3): unit}))
                    stack.enter_context(model.disabled())
                logits = model(IDS).logits
            logits.square().sum().backward()
            results.append([logits, *(p.grad for p in unit.parameters())])
        for actual, expected in zip(*results, strict=True):
            torch.testing.assert_close(actual, expected, rtol=1e-9, atol=1e-9)
    model.save_pretrained(tmp_path)
    loaded = rn.ReftModel.from_pretrained(base, tmp_path)
    assert loaded.reft_config.representations[0].heads == [1, 3]
    assert torch.equal(loaded(IDS).logits, model.eval()(IDS).logits)


def test_all_heads_are_what_the_projection_reads() -> None:
    base = tiny_model()
    logits = [
        wrapped(LOREFT | {"layer": 1} | place, base, seed=3)(IDS).logits
        for place in (
            {"component": "head_output"},
            {"component": "head_output", "heads": "all"},
            {"component": "head_output", "heads": [0, 1, 2, 3]},
            {"component": "attention_value_output"},
        )
    ]
    assert all(torch.equal(logits[0], other) for other in logits[1:])


@pytest.mark.parametrize("head", range(4))
def test_a_head_is_pyvenes(head: int) -> None:
    """Of grouped-query attention, too: pyvene splits by the number of query heads."""
    base = tiny_model()
    model = wrapped([HEADS | LOREFT | {"heads": [head]}], base, seed=2)
    (unit,) = model.interventions.values()
    config = pyvene.IntervenableConfig(
        [
            {
                "layer": 1,
                "component": "head_attention_value_output",
                "unit": "h.pos",
                "max_number_of_units": 1,
                "intervention": unit,
            }
        ]
    )
    columns = list(range(IDS.shape[1]))
    with contextlib.redirect_stdout(io.StringIO()):
        theirs = pyvene.IntervenableModel(config, base)
        places = {"base": [[[[head]] * 2, [columns] * 2]]}
        _, output = theirs({"input_ids": IDS}, unit_locations=places)
    assert_close(model(IDS).logits, output.logits)
    assert (output.logits - base(IDS).logits).abs().max() > 0.1


def test_heads_of_a_layer_act_side_by_side_in_training_and_by_name(tmp_path: Path) -> None:
    base = tiny_model()
    whole = LOREFT | {"layer": 1, "component": "attention_value_output", "positions": "all"}
    entries: dict[str, Any] = {
        "two": [HEADS | LOREFT | {"heads": [1]}, HEADS | LOREFT | {"heads": [0, 3]}],
        "one": [HEADS | LOREFT | {"heads": [1, 2]}],
        "red": [HEADS | {"heads": [0, 1], "intervention": "red"}],
        "whole": [whole],
    }
    models = {n: wrapped(unit, base, seed) for seed, (n, unit) in enumerate(entries.items())}
    (projection,) = {placed.site.module for m in models.values() for placed in m.engine.units}
    units = {name: list(model.interventions.values()) for name, model in models.items()}
    with edited(projection, {(1,): units["two"][0], (0, 3): units["two"][1]}):
        expected = base(IDS).logits
    assert_close(models["two"](IDS).logits, expected)
    library = rn.get_reft_model(base).eval()
    for name, model in models.items():
        model.save_pretrained(tmp_path / name)
        library.load_adapter(tmp_path / name, name)
    rows = torch.cat([IDS, IDS, IDS[:1]])
    names = ["two", "two", "one", "whole", ["one", "red", "two"]]
    with torch.no_grad():
        logits = library(rows, adapter_names=names).logits
        assert_close(logits[:2], expected)
        assert_close(logits[2], models["one"](IDS).logits[0])
        assert_close(logits[3], models["whole"](IDS).logits[1])
        every = {(1, 2): "one", (0, 1): "red"}
        edits = {heads: units[name][0] for heads, name in every.items()}
        edits |= {(1,): units["two"][0], (0, 3): units["two"][1]}
        with edited(projection, edits):  # overlapping heads of adapters read equal states
            summed = base(IDS[:1]).logits[0]
        assert_close(logits[4], summed)
    frozen = [FrozenAdapter.of(model.engine.units) for model in models.values()]
    stacked = stacked_units(frozen)
    assert len({placed.site for placed in stacked}) == 1
    assert len(stacked) == 2  # positions "all" and "all+decode": a product each


def test_a_unit_without_factors_edits_its_heads_by_name(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    class Cumulated(rn.ReftIntervention):
        def __init__(self, *, embed_dim: int, **pyvene: Any) -> None:
            super().__init__(embed_dim=embed_dim)

        def edit(self, hidden: Tensor) -> Tensor:
            return hidden.cumsum(-1)

    monkeypatch.setitem(INTERVENTIONS, "cumulated", Cumulated)
    base = tiny_model()
    entry = HEADS | {"intervention": "cumulated", "heads": [0, 2], "positions": "all"}
    model = rn.get_reft_model(base, rn.ReftConfig(entry)).eval()
    model.save_pretrained(tmp_path)
    library = rn.get_reft_model(base).eval()
    library.load_adapter(tmp_path, "one")
    with torch.no_grad():
        logits = library(IDS, adapter_names=["one", None]).logits
        assert_close(logits[0], model(IDS).logits[0])
        assert_close(logits[1], base(IDS).logits[1])
        assert (logits[0] - base(IDS).logits[0]).abs().max() > 0.1


def test_a_flat_batch_edits_heads_as_training_does() -> None:
    base = tiny_model()
    model = wrapped([HEADS | LOREFT | {"heads": [0, 2]}], base, seed=1)
    (unit,) = model.interventions.values()
    batch = FlatBatch([FrozenAdapter.of(model.engine.units)], torch.device("cpu"))
    one, zero = torch.tensor([1]), torch.tensor([0])
    edits = batch.edits(StepRequests(zero, torch.tensor([0.5]), 3 * one, zero, 3 * one))
    hidden = torch.randn(3, 4 * WIDTH)
    expected = hidden.clone()
    with torch.no_grad():
        expected[:, features(0, 2)] += 0.5 * unit.edit(hidden[:, features(0, 2)])
    apply_(edits[base.model.layers[1].self_attn.o_proj], hidden, None)
    assert_close(hidden, expected)


def test_heads_of_both_stacks_and_of_a_wider_attention() -> None:
    t5 = model_of("t5")
    for stack in ("encoder", "decoder"):
        site = find_site(t5, f"{stack}.head_output".removeprefix("encoder."), 1, [0, 1, 3])
        assert str(site) == f"{stack}.block.1.layer.0.SelfAttention.o.input[0:16,24:32]"
        assert (site.width, site.head_width, site.whole.width) == (24, 8, 32)
    entries = [
        HEADS | LOREFT | {"component": f"{stack}head_output", "heads": [2]}
        for stack in ("", "decoder.")
    ]
    batch = examples_of("t5")[0]
    model = wrapped(entries, t5, seed=0)
    model(**batch).loss.backward()
    assert all(p.grad.abs().max() > 0 for p in model.interventions.parameters())
    config = LlamaConfig(
        hidden_size=30, num_attention_heads=6, num_key_value_heads=2, head_dim=16, vocab_size=50
    )
    config.num_hidden_layers, config.intermediate_size = 1, 32
    site = find_site(LlamaForCausalLM(config), "head_output", 0, [5])
    assert (str(site), site.width) == ("model.layers.0.self_attn.o_proj.input[80:96]", 16)


def exactly(text: str) -> str:
    return f"^{re.escape(text)}$"


@pytest.mark.parametrize(
    ("architecture", "entries", "problem"),
    [
        (
            "llama",
            [HEADS | LOREFT | {"heads": [2, 4]}],
            "heads [4]: model.layers.1 has heads 0 to 3",
        ),
        (
            "llama",
            [HEADS | LOREFT | {"heads": [2]}, HEADS | LOREFT | {"heads": [1, 2]}],
            "positions 'all+decode' of layer_1_comp_head_output_unit_pos_nunit_1#0 and "
            "'all+decode' of layer_1_comp_head_output_unit_pos_nunit_1#1 can overlap at "
            "model.layers.1.self_attn.o_proj.input[16:24]: units at one site need disjoint "
            "positions",
        ),
        (
            "jamba",
            [{"layer": "all", "component": "head_output", "intervention": "bias"}],
            "component 'head_output': JambaMambaDecoderLayer has mamba, feed_forward, "
            "input_layernorm, pre_ff_layernorm: no single attention with heads, in model.layers.0",
        ),
    ],
)
def test_heads_that_a_model_does_not_have(architecture: str, entries: Any, problem: str) -> None:
    base = tiny_model() if architecture == "llama" else model_of(architecture)
    with pytest.raises(ValueError, match=re.escape(problem) + "$"):
        rn.get_reft_model(base, rn.ReftConfig(entries))


@pytest.mark.parametrize(
    ("heads", "component", "problem"),
    [
        ([0], "block_output", "heads [0]: 'block_output' has none, 'head_output' has"),
        ("3", "head_output", "heads '3': expected a list of integers from 0, or 'all'"),
        ([], "head_output", "heads []: expected a list of integers from 0, or 'all'"),
        ([-1], "head_output", "heads [-1]: expected a list of integers from 0, or 'all'"),
        ([1, 1], "head_output", "heads [1, 1]: every head may occur once"),
    ],
)
def test_heads_that_no_model_has(heads: Any, component: str, problem: str) -> None:
    entry = LOREFT | {"layer": 0, "component": component, "heads": heads}
    with pytest.raises(ValueError, match=exactly(f"representations[0]: {problem}")):
        rn.ReftConfig(entry)


def test_heads_stand_in_files_where_there_are_any() -> None:
    config = rn.ReftConfig([HEADS | LOREFT, HEADS | LOREFT | {"heads": 2, "layer": 0}, PLAIN])
    entries = rn.ReftConfig.from_yaml(config.to_yaml()).to_dict()["representations"]
    assert [entry.get("heads") for entry in entries] == ["all", [2], None]
    assert "heads" not in entries[2]


# -- LoFiT and JoLA in a model ---------------------------------------------------------------------


def filled(entries: Any) -> rn.ReftModel:
    """A model whose units are far from the identity."""
    return wrapped(entries, tiny_model(), seed=4)


def test_elementwise_edits_are_their_formula_trained_saved_and_by_name(tmp_path: Path) -> None:
    """Units of different parts in one pass, whose factors are computed together."""
    place = {"component": "head_output", "heads": [0, 3]}
    entries = [
        place | {"layer": 0, "intervention": "lofit", "trained": "scaling"},
        place | {"layer": 1, "intervention": "lofit"},
        place | {"layer": 2, "intervention": "jola"},
    ]
    model, base = filled(entries), tiny_model()
    first, second, third = model.interventions.values()
    assert third.head_width == WIDTH
    assert third.log_alpha.shape == (2, 2)

    def edit(layer: int) -> Any:
        def hook(_: nn.Module, args: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
            states = args[0].clone()
            z = states[..., features(0, 3)]
            if layer < 2:
                changed = z * (1 + first.scaling) if layer == 0 else z + second.bias
            else:
                gates = third.gates().repeat_interleave(WIDTH, -1)
                changed = z * (1 + gates[1] * third.scaling) + gates[0] * third.bias
            states[..., features(0, 3)] = changed
            return (states,)

        return hook

    for layer, module in enumerate(base.model.layers):
        module.self_attn.o_proj.register_forward_pre_hook(edit(layer))
    for is_trained in (False, True):
        model.train(is_trained)
        results = []
        for network in (model, base):
            model.zero_grad()
            torch.manual_seed(7)  # of JoLA's gates
            logits = network(IDS).logits
            logits.square().sum().backward()
            results.append([logits, *(p.grad for p in model.interventions.parameters())])
        assert_close(*results)
    model.eval().save_pretrained(tmp_path)
    loaded = rn.ReftModel.from_pretrained(tiny_model(), tmp_path)
    library = rn.get_reft_model(tiny_model()).eval()
    library.load_adapter(tmp_path, "heads")
    with torch.no_grad():
        assert torch.equal(loaded(IDS).logits, model(IDS).logits)
        logits = library(IDS, adapter_names=["heads", None]).logits
        assert_close(logits[0], model(IDS).logits[0])
        assert_close(logits[1], tiny_model()(IDS).logits[1])


def test_losses_of_heads_are_added_in_training_alone() -> None:
    entry = {"layer": "all", "component": "head_output", "intervention": "lofit"}
    model = filled(entry | {"trained": "both", "l1": 0.01})
    plain = model.eval()(IDS, labels=IDS).loss
    norms = [unit.scaling.abs().sum() for unit in model.interventions.values()]
    assert_close(model.train()(IDS, labels=IDS).loss, plain + 0.01 * sum(norms))


def test_the_heads_that_are_scaled_most_are_selected() -> None:
    entries: list[dict[str, Any]] = [
        {"layer": [0, 1], "component": "head_output", "intervention": "lofit", "trained": "both"},
        {"layer": 2, "component": "head_output", "heads": [1, 3], "intervention": "red"},
    ]
    model = rn.get_reft_model(tiny_model(), rn.ReftConfig(entries))
    norms = torch.full((3, 4), torch.nan)
    sizes = {(0, 1): 3.0, (0, 2): 2.0, (1, 1): 5.0, (1, 2): 1.0, (2, 3): 4.0}
    norms[:2], norms[2, 1], norms[2, 3] = 0.0, 0.0, 0.0
    units = list(model.interventions.values())
    with torch.no_grad():
        for (layer, head), size in sizes.items():
            norms[layer, head] = size
            start = WIDTH * ([1, 3].index(head) if layer == 2 else head)
            units[layer].scaling[start] += size
    torch.testing.assert_close(rn.head_norms(model), norms, equal_nan=True)
    place = {"component": "head_output", "intervention": "lofit"}
    assert rn.select_heads(model, 5) == [
        {"layer": [0, 1], "heads": [1, 2]} | place,
        {"layer": [2], "heads": [3]} | place,
    ]
    assert rn.select_heads(model) == [{"layer": [1], "heads": [1]} | place]
    bias = {"intervention": "bias", "dropout": 0.1}
    assert rn.select_heads(model, 1, bias)[0] | bias == rn.select_heads(model, 1, bias)[0]
    chosen = rn.get_reft_model(tiny_model(), rn.ReftConfig(rn.select_heads(model, 3)))
    widths = [placed.site.columns for placed in chosen.engine.units]
    assert widths == [((8, 16),), ((8, 16),), ((24, 32),)]
    with pytest.raises(ValueError, match=r"^k 11: expected a number of heads from 1 to 10$"):
        rn.select_heads(model, 11)
    with pytest.raises(ValueError, match="no unit scales heads at 'head_output'"):
        rn.select_heads(rn.get_reft_model(tiny_model(), rn.ReftConfig(PLAIN)), 1)
