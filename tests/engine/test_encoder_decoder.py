"""Encoder-decoder models: units of both stacks in training, teacher forcing and generation."""

import copy
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor
from transformers import Seq2SeqTrainer, Seq2SeqTrainingArguments
from transformers.trainer_pt_utils import LabelSmoother

import reftnoise as rn
from support.models.architectures import tiny_model
from support.models.tiny_models import LAYERS, Example, examples_of, model_of, padded
from support.tolerance import assert_close

ENCODER = LAYERS | {"positions": "f1+l1"}
DECODER = LAYERS | {"component": "decoder.block_output"}
NEW_TOKENS = 6
SIDES = [("t5", "right"), ("t5", "left"), ("bart", "right")]  # Bart counts columns of padding


def wrapped(architecture: str, *units: dict[str, Any]) -> rn.ReftModel:
    torch.manual_seed(1)
    return rn.get_reft_model(copy.deepcopy(model_of(architecture)), rn.ReftConfig(list(units)))


def both(architecture: str, positions: str = "f1") -> rn.ReftModel:
    return wrapped(architecture, ENCODER, DECODER | {"positions": positions})


def prompts(architecture: str, side: str = "right") -> Example:
    batch = padded(examples_of(architecture), side)
    return {name: batch[name] for name in ("input_ids", "attention_mask")}


def rows(architecture: str) -> list[Example]:
    names = ("input_ids", "attention_mask")
    return [{name: row[name] for name in names} for row in examples_of(architecture)]


@torch.no_grad()
def written(model: Any, inputs: Example, **settings: Any) -> Tensor:
    """Tokens after the decoder's start token."""
    settings = {"do_sample": False, "max_new_tokens": NEW_TOKENS, "eos_token_id": None} | settings
    tokens: Tensor = model.generate(**inputs, **settings)
    return tokens[:, 1:].contiguous()


# -- the same, whichever way it is run -------------------------------------------------------------


@pytest.mark.parametrize("positions", ["f1", "l1", "decode", "all+decode"])
@pytest.mark.parametrize(("architecture", "side"), SIDES)
def test_generation_is_teacher_forcing(architecture: str, side: str, positions: str) -> None:
    model, inputs = both(architecture, positions), prompts(architecture, side)
    tokens = written(model, inputs)
    assert torch.equal(written(model, inputs, use_cache=False), tokens)
    with torch.no_grad():
        given = model(**inputs, labels=tokens).logits
        start = torch.full((3, 1), model.generation_config.decoder_start_token_id)
        read = torch.cat([start, tokens[:, :-1]], 1)
        assert torch.equal(model(**inputs, decoder_input_ids=read).logits, given)
    assert torch.equal(given.argmax(-1), tokens)
    with model.disabled(), torch.no_grad():
        assert not torch.allclose(model(**inputs, labels=tokens).logits, given, atol=1e-3)


@pytest.mark.parametrize("settings", [{}, {"num_beams": 3}, {"num_beams": 2, "use_cache": False}])
@pytest.mark.parametrize(("architecture", "side"), SIDES)
def test_a_batch_is_generated_as_its_rows(
    architecture: str, side: str, settings: dict[str, Any]
) -> None:
    model = both(architecture, "all+decode")
    together = written(model, prompts(architecture, side), **settings)
    alone = [written(model, row, **settings) for row in rows(architecture)]
    assert torch.equal(together, torch.cat(alone))


@pytest.mark.parametrize("architecture", ["t5", "bart"])
def test_a_decoding_loop_by_hand(architecture: str) -> None:
    model, inputs = both(architecture, "all+decode"), prompts(architecture)
    expected = written(model, inputs)
    ids = torch.full((3, 1), model.generation_config.decoder_start_token_id)
    cache, tokens = None, []
    for _ in range(NEW_TOKENS):
        with torch.no_grad():
            output = model(**inputs, decoder_input_ids=ids, past_key_values=cache, use_cache=True)
        ids, cache = output.logits[:, -1].argmax(-1, keepdim=True), output.past_key_values
        tokens.append(ids)
    assert torch.equal(torch.cat(tokens, 1), expected)


@torch.no_grad()
def test_several_tokens_that_the_decoder_must_begin_with_are_what_labels_are_in_training() -> None:
    """As Whisper's language and task."""
    model, inputs = both("t5", "f1+l1"), prompts("t5")
    forced = torch.tensor([[0, 7, 8]] * 3)
    tokens = written(model, inputs, decoder_input_ids=forced)
    assert torch.equal(tokens[:, :2], forced[:, 1:])
    logits = model(**inputs, labels=tokens).logits
    assert torch.equal(logits[:, 2:].argmax(-1), tokens[:, 2:])


# -- each stack's units ----------------------------------------------------------------------------


@pytest.mark.parametrize("architecture", ["t5", "bart"])
@torch.no_grad()
def test_units_edit_their_own_stack_alone(architecture: str) -> None:
    batch = padded(examples_of(architecture))
    plain = model_of(architecture)(**batch)
    encoder = wrapped(architecture, ENCODER)(**batch)
    decoder = wrapped(architecture, DECODER | {"positions": "all"})(**batch)
    changed = (encoder.encoder_last_hidden_state != plain.encoder_last_hidden_state).any(-1)
    assert changed[batch["attention_mask"].bool()].all()  # by attention, from first and last
    assert torch.equal(decoder.encoder_last_hidden_state, plain.encoder_last_hidden_state)
    for found in (encoder, decoder):
        assert not torch.allclose(found.logits, plain.logits, atol=1e-3)


def embedded(model: rn.ReftModel, batch: Example) -> list[Tensor]:
    """What the embeddings of encoder and decoder, or the one of both, give to them."""
    seen: list[Tensor] = []
    embeddings = {model.model.encoder.embed_tokens, model.model.decoder.embed_tokens}
    handles = [e.register_forward_hook(lambda _, __, out: seen.append(out)) for e in embeddings]
    torch.manual_seed(5)
    model(**batch)
    for handle in handles:
        handle.remove()
    return seen


@pytest.mark.parametrize("shared", [False, True])
@pytest.mark.parametrize("noise", ["neftune", "symnoise"])
@pytest.mark.parametrize("component", ["embeddings", "encoder.embeddings", "decoder.embeddings"])
def test_noise_on_an_embedding_that_both_stacks_share(
    noise: str, component: str, shared: bool
) -> None:
    base, batch = copy.deepcopy(model_of("t5")), padded(examples_of("t5"))
    if shared:  # as after resizing it
        base.set_input_embeddings(base.get_input_embeddings())
    assert (base.encoder.embed_tokens is base.decoder.embed_tokens) == shared
    unit = {"intervention": noise, "component": component, "alpha": 5.0}
    model = rn.get_reft_model(base, rn.ReftConfig([ENCODER, unit])).train()
    with model.disabled():
        clean = embedded(model, batch)
    noisy = embedded(model, batch)
    if noise == "symnoise":  # every example at +δ, then every one at -δ
        clean = [torch.cat([states, states]) for states in clean]
    noised = component == "decoder.embeddings"
    assert torch.equal(noisy[1 - noised], clean[1 - noised])
    delta = noisy[noised] - clean[noised]
    if noise == "symnoise":
        assert_close(delta[:3], -delta[3:], scale=float(clean[noised].abs().max()))
    attended = batch["labels"] != -100 if noised else batch["attention_mask"]
    lengths = attended.sum(1)  # padding of labels is padding, too
    assert lengths.unique().numel() > 1
    for row, length in enumerate(lengths.tolist()):
        bound = 5 / (length * 32) ** 0.5
        assert 0.9 * bound < delta[row, :length].abs().max() <= bound * 1.001
        assert not delta[row, length:].any()


def test_noise_is_gone_in_evaluation_and_generation() -> None:
    noise = {"intervention": "symnoise", "alpha": 50.0}
    model, inputs = wrapped("bart", ENCODER, noise), prompts("bart")
    expected = written(model.eval(), inputs)
    assert torch.equal(written(model.train(), inputs), expected)


# -- training --------------------------------------------------------------------------------------


def collate(examples: list[Example]) -> Example:
    return padded([{name: value[None] for name, value in one.items()} for one in examples])


@pytest.mark.parametrize("smoothing", [0.0, 0.1])
@pytest.mark.parametrize("architecture", ["t5", "bart"])
def test_transformers_trainer_trains_and_predicts(
    architecture: str, smoothing: float, tmp_path: Path
) -> None:
    model = both(architecture, "f1+l1")
    dataset = [{n: v[0] for n, v in row.items()} for row in examples_of(architecture)]
    args = Seq2SeqTrainingArguments(
        output_dir=str(tmp_path),
        max_steps=8,
        learning_rate=1e-2,
        predict_with_generate=True,
        generation_max_length=7,
        label_smoothing_factor=smoothing,
        save_strategy="no",
        logging_steps=1,
        report_to="none",
        use_cpu=True,
        disable_tqdm=True,
    )

    def with_decoder_input(examples: list[Example]) -> Example:
        batch = collate(examples)
        shifted = model.prepare_decoder_input_ids_from_labels(labels=batch["labels"])
        return batch | {"decoder_input_ids": shifted} if smoothing else batch

    trainer = Seq2SeqTrainer(
        model, args, train_dataset=dataset, eval_dataset=dataset, data_collator=with_decoder_input
    )
    batch = collate(dataset)
    expected = LabelSmoother(epsilon=smoothing)(model(**batch), batch["labels"])
    found = trainer.compute_loss(model, with_decoder_input(dataset))
    assert_close(found, expected)
    trainer.train()
    losses = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
    assert losses[-1] < losses[0]
    predicted = trainer.predict(dataset).predictions
    tokens = written(model, prompts(architecture), max_new_tokens=6, eos_token_id=2)
    width = tokens.shape[1] + 1
    assert np.array_equal(predicted[:, 1:width], tokens.numpy())


def test_our_trainer_takes_labels_as_wide_as_the_input(tmp_path: Path) -> None:
    model = both("t5")
    ids = torch.arange(3, 9)[None]
    args = Seq2SeqTrainingArguments(output_dir=str(tmp_path), report_to="none", use_cpu=True)
    inputs = {"input_ids": ids, "labels": ids.flip(1)}
    found = rn.ReftTrainer(model, args).compute_loss(model, inputs)
    assert_close(found, model(**inputs).loss)


# -- wrong use -------------------------------------------------------------------------------------


def test_what_encoder_decoder_models_cannot_be_told() -> None:
    model, inputs = both("t5"), prompts("t5")
    message = (
        "T5ForConditionalGeneration tells the length of its sequences only when it runs, so "
        "unit_locations and prompt_lengths cannot be given: use the config's positions"
    )
    locations = {"sources->base": (None, [[[0]] * 3] * 4)}
    with pytest.raises(ValueError, match=f"^{message}$"):
        model(**inputs, unit_locations=locations)
    with pytest.raises(ValueError, match=f"^{message}$"):
        model.generate(**inputs, unit_locations=locations)
    with pytest.raises(ValueError, match=f"^{message}$"):
        model(**inputs, prompt_lengths=torch.tensor([1, 1, 1]))


@pytest.mark.parametrize(
    ("unit", "problem"),
    [
        (
            DECODER,
            "component 'decoder.block_output': LlamaForCausalLM is not an encoder-decoder model; "
            "expected 'block_output'",
        ),
        (
            {"intervention": "neftune", "component": "encoder.embeddings"},
            "component 'encoder.embeddings': LlamaForCausalLM is not an encoder-decoder model; "
            "expected 'embeddings'",
        ),
    ],
)
def test_stacks_of_a_model_that_has_none(unit: dict[str, Any], problem: str) -> None:
    with pytest.raises(ValueError, match=rf"^representations\[0\]: {problem}$"):
        rn.get_reft_model(tiny_model(), rn.ReftConfig(unit))


def test_a_classifier_writes_nothing() -> None:
    model = rn.get_reft_model(model_of("bert"), rn.ReftConfig(LAYERS))
    with pytest.raises(
        ValueError, match=r"^generate: BertForSequenceClassification writes no tokens$"
    ):
        model.generate(input_ids=torch.ones(1, 3, dtype=torch.long))
