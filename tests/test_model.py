"""`ReftModel`: call forms, explicit locations, noise in training, SymNoise's pairs."""

import copy
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import (
    Gemma3Config,
    Gemma3ForConditionalGeneration,
    GenerationConfig,
)
from transformers.modeling_outputs import CausalLMOutputWithPast

import reftnoise as rn
from reftnoise.engine.base.sites import find_site
from support.models.architectures import neftune_post_forward_hook, tiny_model
from support.tolerance import assert_close

LOREFT: dict[str, Any] = {
    "layer": "all",
    "intervention": "loreft",
    "low_rank_dimension": 4,
    "positions": "f1+l1",
}


def wrapped(*entries: dict[str, Any], model: Any = None) -> rn.ReftModel:
    torch.manual_seed(1)
    config = rn.ReftConfig(representations=list(entries) or [LOREFT])
    return rn.get_reft_model(model or tiny_model(), config)


def batch(length: int = 10, rows: int = 3) -> dict[str, Tensor]:
    torch.manual_seed(2)
    ids = torch.randint(3, 101, (rows, length))
    mask = torch.ones_like(ids)
    mask[0, :4] = 0
    labels = ids.masked_fill(torch.arange(length) < 6, -100)
    return {"input_ids": ids, "attention_mask": mask, "labels": labels}


def test_it_is_called_like_the_base() -> None:
    model = wrapped()
    output = model(**batch())
    assert isinstance(output, CausalLMOutputWithPast)
    assert output.loss.requires_grad


@torch.no_grad()
def test_pyrefts_call_form() -> None:
    model, inputs = wrapped(), batch()
    lengths = {"prompt_lengths": torch.tensor([3, 7, 7])}
    _, edited = model(inputs | lengths)
    assert torch.equal(edited.loss, model(**inputs, **lengths).loss)
    labels = inputs.pop("labels")
    mask = inputs.pop("attention_mask")
    assert torch.equal(
        model(inputs, attention_mask=mask, labels=labels)[1].loss,
        model(**inputs, attention_mask=mask, labels=labels).loss,
    )
    inputs["attention_mask"] = mask
    base, edited = model(inputs, labels=labels)
    assert base is None
    assert torch.equal(edited.loss, model(**inputs, labels=labels).loss)
    base, _ = model(inputs, labels=labels, output_original_output=True)
    assert torch.equal(base.logits, model.model(**inputs).logits)


@torch.no_grad()
def test_calls_from_several_threads() -> None:
    base = tiny_model()
    models = [wrapped(LOREFT | {"positions": p}, model=base) for p in ("f1", "l1", "all")]
    inputs = [batch(length) for length in (6, 9, 12)]
    expected = [model(**given).logits for model, given in zip(models, inputs, strict=True)]

    def call(index: int) -> bool:
        with torch.no_grad():
            output = models[index % 3](**inputs[index % 3]).logits
        return torch.equal(output, expected[index % 3])

    with ThreadPoolExecutor(3) as pool:
        assert all(pool.map(call, range(60)))


def test_a_copy_for_data_parallel_is_refused() -> None:
    model = wrapped()
    replica = copy.copy(model)  # as nn.DataParallel makes it
    replica.__dict__["_modules"] = model._modules | {"model": tiny_model()}
    with pytest.raises(ValueError, match="start one process per device"):
        replica(**batch())


def test_it_can_be_part_of_another_module() -> None:
    outer = torch.nn.Sequential(wrapped())
    names = set(outer.state_dict())
    assert names
    assert all(name.startswith("0.interventions.") for name in names)
    outer.load_state_dict(outer.state_dict())


def test_the_bases_settings_can_be_set() -> None:
    model = wrapped()
    model.generation_config = GenerationConfig(max_new_tokens=3)
    ids = batch()["input_ids"]
    assert model.generate(input_ids=ids).shape == (3, 13)
    assert model.generate(ids, GenerationConfig(max_new_tokens=2)).shape == (3, 12)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("gpt2", rn.ReftConfig(LOREFT)), "model: expected a model of transformers, got 'gpt2'"),
        ((None, LOREFT), "reft_config: expected a ReftConfig, got {"),
    ],
)
def test_wrapping_something_else(arguments: tuple[Any, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        rn.get_reft_model(*arguments)


def test_a_component_that_is_not_hidden_states() -> None:
    entry = {"component": "model.output", "intervention": "loreft", "low_rank_dimension": 2}
    with pytest.raises(ValueError, match=r"expected hidden states .* got BaseModelOutputWithPast"):
        wrapped(entry)(**batch())


@torch.no_grad()
def test_pyrefts_generate_form() -> None:
    model, inputs = wrapped(), batch()
    del inputs["labels"]
    base, edited = model.generate(inputs, intervene_on_prompt=True, max_new_tokens=4)
    assert base is None
    assert torch.equal(edited, model.generate(**inputs, max_new_tokens=4))
    base, _ = model.generate(inputs, output_original_output=True, max_new_tokens=4)
    assert torch.equal(base, model.model.generate(**inputs, max_new_tokens=4))
    with pytest.raises(ValueError, match="give the config positions 'decode' or 'all\\+decode'"):
        model.generate(inputs, intervene_on_prompt=False)


def test_it_carries_what_the_base_has() -> None:
    model = wrapped()
    base = model.model
    assert model.config is base.config
    assert model.generation_config is base.generation_config
    assert model.get_input_embeddings() is base.get_input_embeddings()
    assert model.get_output_embeddings() is base.get_output_embeddings()
    assert (model.device, model.dtype) == (torch.device("cpu"), torch.float32)
    assert model.accepts_loss_kwargs is True
    with pytest.raises(AttributeError, match="no attribute 'nonsense'"):
        _ = model.nonsense


def test_wrapping_twice_is_an_error() -> None:
    with pytest.raises(ValueError, match="is a ReftModel already"):
        wrapped(model=wrapped())


def test_published_parameter_counts() -> None:
    # 7B: 32 layers of width 4096, rank 8, tied (ReFT, table 1)
    unit = rn.LoreftIntervention(embed_dim=4096, low_rank_dimension=8)
    assert 32 * sum(p.numel() for p in unit.parameters()) == 2_097_408
    # layers · m · (2rd + r), here untied: m = 2
    model = wrapped(LOREFT | {"tied": False})
    assert model.parameter_counts()[:2] == (3 * 2 * (2 * 4 * 32 + 4), 0)


def test_print_trainable_parameters(capsys: pytest.CaptureFixture[str]) -> None:
    model = wrapped()
    model.print_trainable_parameters()
    total = sum(p.numel() for p in model.model.parameters())
    printed = capsys.readouterr().out
    assert "trainable intervention params: 780 || trainable model params: 0" in printed
    assert f"model params: {total:,d} || trainable%: {100 * 780 / total:.4f}" in printed


@torch.no_grad()
def test_explicit_locations_override_the_configs() -> None:
    model, inputs = wrapped(), batch()
    del inputs["labels"]
    expected = model(**inputs).logits
    first_and_last = [[4, 9], [0, 9], [0, 9]]
    everywhere = {"sources->base": (None, [first_and_last] * 3)}
    assert torch.equal(model(**inputs, unit_locations=everywhere).logits, expected)
    tokens = model.generate(**inputs, unit_locations=everywhere, max_new_tokens=4)
    assert torch.equal(tokens, model.generate(**inputs, max_new_tokens=4))
    nowhere = {"sources->base": (None, [None] * 3)}
    assert torch.equal(model(**inputs, unit_locations=nowhere).logits, model.model(**inputs).logits)
    elsewhere = {"sources->base": (None, torch.full((3, 3, 1), 7))}
    other = model(**inputs, unit_locations=elsewhere).logits
    assert torch.equal(other[1, :7], model.model(**inputs).logits[1, :7])
    assert not torch.equal(other[1, 7], model.model(**inputs).logits[1, 7])


@pytest.mark.parametrize("lengths", [torch.tensor([6]), torch.tensor(6), torch.full((3,), 6.0)])
def test_prompt_lengths_of_another_form(lengths: Tensor) -> None:
    with pytest.raises(ValueError, match=r"expected \(3,\) integers, one per row"):
        wrapped()(**batch(), prompt_lengths=lengths)


def test_prompt_lengths_beyond_the_tokens_mean_all_of_them() -> None:
    model, inputs = wrapped(), batch()
    whole = model(**inputs, prompt_lengths=inputs["attention_mask"].sum(1)).loss
    assert torch.equal(model(**inputs, prompt_lengths=torch.full((3,), 99)).loss, whole)


def test_layers_are_those_of_the_text_model() -> None:
    config = Gemma3Config(
        text_config={"num_hidden_layers": 2, "hidden_size": 16, "vocab_size": 9, "head_dim": 8},
        vision_config={
            "num_hidden_layers": 2,
            "hidden_size": 16,
            "image_size": 28,
            "num_attention_heads": 2,
        },
    )
    with torch.device("meta"):
        base = Gemma3ForConditionalGeneration(config)
    assert "language_model" in find_site(base, "block_output", 1).name


def test_a_wrong_nesting_shows_the_right_one() -> None:
    model, inputs = wrapped(), batch()
    with pytest.raises(ValueError, match="3 interventions × 3 rows × positions"):
        model(**inputs, unit_locations={"sources->base": (None, [[[9]]])})


@torch.no_grad()
def test_disabled_is_the_bare_base() -> None:
    model, inputs = wrapped(LOREFT, {"intervention": "neftune"}).train(), batch()
    expected = model.model(**inputs).logits
    with model.disabled() as bare:
        assert torch.equal(bare(**inputs).logits, expected)
    assert not torch.equal(model(**inputs).logits, expected)


def test_other_widths_by_dotted_path() -> None:
    component = "model.layers[1].mlp.act_fn.output"
    entry = {"component": component, "intervention": "loreft", "low_rank_dimension": 4}
    model = wrapped(entry | {"embed_dim": 64})
    assert not torch.equal(model(**batch()).logits, model.model(**batch()).logits)
    with pytest.raises(
        ValueError, match="has width 64, but its LoreftIntervention has embed_dim 3"
    ):
        wrapped(entry)(**batch())


# -- noise -------------------------------------------------------------------------------------


def neftune(**arguments: Any) -> dict[str, Any]:
    return {"intervention": "neftune", "alpha": 5.0} | arguments


def embedded(model: rn.ReftModel, **inputs: Any) -> Tensor:
    """What the first layer gets."""
    seen: list[Tensor] = []
    layer = model.model.model.layers[0]
    handle = layer.register_forward_pre_hook(lambda _, args: seen.append(args[0]))
    torch.manual_seed(7)
    model(**inputs)
    handle.remove()
    return seen[0]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_padded_neftune_is_transformers_own_bit_for_bit(dtype: torch.dtype) -> None:
    base = tiny_model().to(dtype)
    mine = wrapped(neftune(length="padded"), model=base).train()
    noisy = embedded(mine, **batch())
    embeddings = base.get_input_embeddings()
    embeddings.neftune_noise_alpha = 5.0
    handle = embeddings.register_forward_hook(neftune_post_forward_hook)
    with mine.disabled():
        assert torch.equal(noisy, embedded(mine, **batch()))
    handle.remove()


def test_attended_noise_leaves_padding_clean_and_counts_tokens() -> None:
    model, inputs = wrapped(neftune()).train(), batch(length=200)
    clean = model.get_input_embeddings()(inputs["input_ids"])
    noise = embedded(model, **inputs) - clean
    assert torch.equal(noise[0, :4], torch.zeros(4, 32))
    for row, attended in ((0, 196), (1, 200)):
        bound = 5 / (attended * 32) ** 0.5
        largest = noise[row].abs().max()
        assert 0.98 * bound < largest <= bound * 1.001


@pytest.mark.parametrize(("where", "noised"), [("prompt", range(6)), ("completion", range(6, 10))])
def test_noise_on_prompt_or_completion(where: str, noised: range) -> None:
    model, inputs = wrapped(neftune(where=where)).train(), batch()
    clean = model.get_input_embeddings()(inputs["input_ids"])
    changed = (embedded(model, **inputs) != clean).any(-1)[1]
    assert changed.nonzero().flatten().tolist() == list(noised)


@pytest.mark.parametrize("noise", ["neftune", "gaussian", "bernoulli", "symnoise"])
@torch.no_grad()
def test_generation_is_clean_in_training_mode_too(noise: str) -> None:
    model = wrapped({"intervention": noise, "alpha": 50.0}).train()
    ids = batch()["input_ids"][:1]
    tokens = model.generate(input_ids=ids, max_new_tokens=6, do_sample=False)
    with model.disabled():
        assert torch.equal(tokens, model.generate(input_ids=ids, max_new_tokens=6, do_sample=False))


def test_noise_is_off_in_evaluation_and_generation() -> None:
    model, inputs = wrapped(neftune()).eval(), batch()
    clean = model.get_input_embeddings()(inputs["input_ids"])
    assert torch.equal(embedded(model, **inputs), clean)
    del inputs["labels"]
    tokens = model.generate(**inputs, max_new_tokens=4)
    assert torch.equal(tokens, model.model.generate(**inputs, max_new_tokens=4))


def test_noise_reaches_embeddings_that_the_caller_gives() -> None:
    model, inputs = wrapped(neftune()).train(), batch()
    expected = embedded(model, **inputs)
    inputs["inputs_embeds"] = model.get_input_embeddings()(inputs.pop("input_ids"))
    assert torch.equal(embedded(model, **inputs), expected)


def test_noise_at_a_layer() -> None:
    model, inputs = wrapped(neftune(component="block_output", layer=1)).train(), batch()
    assert torch.equal(embedded(model, **inputs), model.get_input_embeddings()(inputs["input_ids"]))
    assert not torch.equal(model(**inputs).logits, model.model(**inputs).logits)


# -- SymNoise ----------------------------------------------------------------------------------


def test_symnoise_is_the_mean_over_the_pair() -> None:
    model, inputs = wrapped(LOREFT, {"intervention": "symnoise"}).train(), batch()
    parameters = list(model.interventions.parameters())
    torch.manual_seed(7)
    output = model(**inputs)
    mine = torch.autograd.grad(output.loss, parameters)
    assert output.logits.shape[0] == 3

    clean = model.get_input_embeddings()(inputs["input_ids"])
    signs = embedded(model, **inputs)[:3] - clean  # draws the same noise again
    assert signs[1].abs().unique().numel() < 40, "±α/√(Ld), up to rounding of the sum"
    plain = wrapped(LOREFT, model=model.model)
    plain.interventions.load_state_dict(
        {k: v for k, v in model.interventions.state_dict().items() if "embeddings" not in k}
    )
    labels, mask = inputs["labels"], inputs["attention_mask"]
    losses = [
        plain(inputs_embeds=clean + sign * signs, attention_mask=mask, labels=labels).loss
        for sign in (1, -1)
    ]
    mean = sum(losses) / 2
    assert_close(output.loss, mean)
    expected = torch.autograd.grad(mean, list(plain.interventions.parameters()))
    for gradient, reference in zip(mine, expected, strict=True):
        torch.testing.assert_close(gradient, reference, atol=1e-6, rtol=1e-4)
    torch.manual_seed(7)
    tokens = torch.tensor(24)
    weighted = model(**inputs, num_items_in_batch=tokens).loss
    assert_close(weighted, output.loss * 12 / 24)


def test_symnoise_needs_labels_while_training() -> None:
    model, inputs = wrapped({"intervention": "symnoise"}), batch()
    del inputs["labels"]
    with pytest.raises(ValueError, match="needs labels while training"):
        model.train()(**inputs)
    assert torch.equal(model.eval()(**inputs).logits, model.model(**inputs).logits)
