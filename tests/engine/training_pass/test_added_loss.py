"""The losses that units add: of weights, and of what a pass computed, by any way of a pass."""

import copy
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import T5Config, T5ForConditionalGeneration

import reftnoise as rn
from reftnoise._util.errors import warn_once
from reftnoise.engine.training_pass.prefix_cache import PrefixCache
from support.added_losses import WIDTH, Averaged, model_with, penalised, step
from support.models.architectures import tiny_model
from support.tolerance import assert_close, assert_close_gradients
from support.training_steps import batch

WAYS: dict[str, dict[str, Any]] = {
    "all logits": {"return_logits": True},
    "label loss": {"return_logits": False},
    "lazy logits": {},
    "split": {"return_logits": False},
    "prefix cache": {"return_logits": False},
}


@pytest.mark.parametrize("way", WAYS)
def test_a_penalty_is_part_of_the_loss(way: str) -> None:
    model, inputs = penalised(), batch() | WAYS[way]
    model.split = "always" if way in ("split", "prefix cache") else "never"
    model.prefix_cache = PrefixCache() if way == "prefix cache" else None
    (unit,) = model.interventions.values()
    model.training_progress = 0.0
    bare, (before,) = step(model, **inputs)
    model.training_progress = 0.5
    loss, (gradient,) = step(model, **inputs)
    penalty = 0.5 * unit.bias.square().mean()
    assert_close(loss, bare + penalty)
    assert_close(model.added_loss, penalty)
    assert_close_gradients([gradient], [before + unit.bias / WIDTH])
    with torch.no_grad():
        outputs = model.eval()(**inputs)
    assert_close(outputs.loss, bare)  # the edit is the same
    assert model.added_loss is None


@pytest.mark.parametrize("unit", ["weights", "pass"])
def test_micro_batches_sum_to_the_mean(unit: str) -> None:
    model = penalised() if unit == "weights" else model_with(Averaged(embed_dim=WIDTH))
    inputs = batch()
    inputs["labels"][:, 0] = inputs["input_ids"][:, 0]  # which no token predicts
    count = (inputs["labels"][:, 1:] != -100).sum()
    whole, added = model(**inputs).loss, model.added_loss
    loss, terms = torch.zeros(()), torch.zeros(())
    for rows in (slice(0, 3), slice(3, 4)):
        part = {name: values[rows] for name, values in inputs.items()}
        loss = loss + model(**part, num_items_in_batch=count).loss
        terms = terms + (part["labels"][:, 1:] != -100).sum() / count * model.added_loss
    assert_close(loss - terms, whole - added)  # the base's own
    if unit == "weights":
        assert_close(terms, added)


@pytest.mark.parametrize("positions", ["all", "l3", "f2+l2"])
def test_rows_are_read_as_a_whole_without_padding(positions: str) -> None:
    unit = Averaged(embed_dim=WIDTH)
    model, inputs = model_with(unit, positions=positions, component="block_output"), batch("left")
    plan = rn.get_reft_model(tiny_model(), rn.ReftConfig([])).eval()
    with torch.no_grad():
        hidden = plan(**inputs, output_hidden_states=True).hidden_states[2]
    prompts, mask = [12, 3, 20, 1], inputs["attention_mask"].bool()
    squares: list[Tensor] = []
    expected = hidden.clone()
    for row, length in enumerate(prompts):
        tokens = mask[row].nonzero()[:length, 0]
        if positions == "l3":
            tokens = tokens[-3:]
        elif positions == "f2+l2" and length > 4:
            tokens = torch.cat([tokens[:2], tokens[-2:]])
        inner = hidden[row, tokens] @ unit.weight
        expected[row, tokens] += inner.mean() * unit.weight
        squares += inner.square()
    seen: list[Tensor] = []
    layer = model.model.model.layers[2]
    with layer.register_forward_pre_hook(lambda _, args: seen.append(args[0])):
        model(**inputs)
    assert_close(seen[-1][mask], expected[mask])
    assert_close(model.added_loss, 3 * torch.stack(squares).mean())
    model.eval()
    with layer.register_forward_pre_hook(lambda _, args: seen.append(args[0])):
        model(**inputs)
    assert_close(seen[-1][mask], hidden[mask])  # `edit` is what it does in evaluation


@pytest.mark.filterwarnings("ignore:.*gradient_checkpointing.*deprecated:FutureWarning")
@pytest.mark.parametrize("component", ["block_output", "mlp_output"])
@pytest.mark.parametrize("reentrant", [False, True])
def test_gradient_checkpointing(component: str, reentrant: bool) -> None:
    model, inputs = model_with(Averaged(embed_dim=WIDTH), component=component), batch()
    expected = step(model, **inputs)
    model.gradient_checkpointing_enable({"use_reentrant": reentrant})
    if reentrant and component == "mlp_output":  # within what is checkpointed
        with pytest.raises(ValueError, match=r"set gradient_checkpointing_kwargs=.*False"):
            model(**inputs)
        return
    loss, gradients = step(model, **inputs)
    assert_close(loss, expected[0])
    assert_close_gradients(gradients, expected[1])


def test_an_encoder_decoder_model_notes_in_both_stacks() -> None:
    sizes = {"d_model": WIDTH, "d_ff": 32, "num_layers": 2, "num_heads": 4, "vocab_size": 64}
    config = T5Config(**sizes, decoder_start_token_id=0, dropout_rate=0.0)
    base = T5ForConditionalGeneration(config).eval()
    entries = [
        {"layer": 0, "component": "encoder.block_output", "intervention": Averaged(embed_dim=32)},
        {"layer": 0, "component": "decoder.block_output", "intervention": Averaged(embed_dim=32)},
    ]
    model = rn.get_reft_model(base, rn.ReftConfig(entries)).train()
    ids = torch.arange(1, 9)[None]
    loss = model(input_ids=ids, labels=ids).loss
    added, terms = model.added_loss, []

    def edit(block: Any, _: Any, output: Any) -> Any:
        """As `Averaged` does, of all tokens that are read, and the first that is written."""
        hidden, tokens = output[0], slice(None if block is base.encoder.block[0] else 1)
        weight = Averaged(embed_dim=WIDTH).weight
        inner = hidden[:, tokens] @ weight
        terms.append(3 * inner.square().mean())
        changed = hidden.clone()
        changed[:, tokens] += inner.mean() * weight
        return changed, *output[1:]

    with (
        base.encoder.block[0].register_forward_hook(edit),
        base.decoder.block[0].register_forward_hook(edit),
    ):
        bare = base(input_ids=ids, labels=ids).loss
    assert len(terms) == 2
    assert_close(added, sum(terms))
    assert_close(loss, bare + sum(terms))


def test_a_loss_that_is_not_read_is_warned_of(caplog: pytest.LogCaptureFixture) -> None:
    """As in transformers' own Trainer with label smoothing, which makes its loss of logits."""
    model, inputs = penalised(), batch()
    inputs["prompt_lengths"] = torch.tensor([12, 3, 20, 1])
    del inputs["labels"]
    warn_once.cache_clear()
    with caplog.at_level("WARNING"):
        for _ in range(2):
            model(**inputs)
            assert model.added_loss is not None  # as ReftTrainer reads it
        with torch.no_grad():
            model(**inputs)
        assert "added_loss" not in caplog.text
        for _ in range(3):
            model(**inputs)
    messages = [r.message for r in caplog.records if "add reft_model.added_loss" in r.message]
    assert len(messages) == 1


def test_a_model_is_copied_after_a_pass() -> None:
    model = penalised()
    model(**batch())
    model.training_progress = 0.25
    copied = copy.deepcopy(model)
    assert copied.added_loss is None
    assert copied.training_progress == 0.25
    with pytest.raises(ValueError, match=r"training_progress 1.5: expected a share from 0 to 1"):
        model.training_progress = 1.5
