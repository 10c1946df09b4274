"""TRL's trainers on preferences and rewards: they learn, from the numbers of each row alone."""

# ruff: noqa: E402  # what comes after importorskip needs the package

import math
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from datasets import Dataset
from torch import Tensor
from transformers import LlamaForSequenceClassification, set_seed

trl = pytest.importorskip("trl", reason="needs trl: pip install 'reftnoise[trl]'")

import reftnoise as rn
from reftnoise.engine.base.tiny import DIRECTORY
from support.trl_runs import (
    MARKS,
    TOLERANCE,
    arguments,
    base_model,
    expect_trained,
    first_batch,
    history,
    loreft,
    noise,
    preferences,
    record,
    row_sums,
    says,
    states,
    wrapped,
)

pytestmark = MARKS

LORA = {"peft_type": "lora", "r": 2, "init_lora_weights": False}
COLOURS = ["Name a colour.", "Which colour?", "What colour is it?", "Tell me a colour."]

# -- DPOTrainer, KTOTrainer ------------------------------------------------------------------------


def dpo(reft_model: rn.ReftModel, tokenizer: Any, reference: Any, path: Path, **given: Any) -> Any:
    return trl.DPOTrainer(
        reft_model,
        ref_model=reference,
        args=arguments(trl.DPOConfig, path, **given),
        train_dataset=preferences(),
        processing_class=tokenizer,
    )


def dpo_loss(policy: Tensor, reference: Tensor) -> Tensor:
    """Of rows [chosen, rejected], with TRL's default β = 0.1."""
    chosen, rejected = (policy - reference).chunk(2)
    return -F.logsigmoid(0.1 * (chosen - rejected)).mean()


@pytest.mark.parametrize("precompute", [False, True])
def test_dpo_against_the_bare_base_itself(precompute: bool, tmp_path: Path) -> None:
    reft_model, tokenizer = wrapped(loreft(dropout=0.1))
    base, fresh, before = reft_model.model, base_model(), states(reft_model)
    settings = {"max_steps": 12, "precompute_ref_log_probs": precompute}
    trainer = dpo(reft_model, tokenizer, base, tmp_path, **settings)
    assert trainer.ref_model is base  # no copy
    batch = first_batch(trainer)
    expected = dpo_loss(row_sums(reft_model, batch), row_sums(fresh, batch))
    torch.testing.assert_close(trainer.compute_loss(reft_model, batch), expected, **TOLERANCE)
    trainer.train()
    margins = history(trainer, "rewards/margins")
    assert margins[-1] > max(1.0, 5 * margins[0])
    assert history(trainer, "rewards/accuracies")[-1] == 1.0
    assert history(trainer, "loss")[-1] < 0.5 * history(trainer, "loss")[0]
    # The policy has moved, its reference has not.
    expected = dpo_loss(row_sums(reft_model.eval(), batch), row_sums(fresh, batch))
    torch.testing.assert_close(trainer.compute_loss(reft_model, batch), expected, **TOLERANCE)
    expect_trained(reft_model, before, tmp_path, base_model())
    # TRL's forward stays on the base, which goes on as it was, alone and under units.
    question = says("user", "Where does a bear live?")
    chat = tokenizer.apply_chat_template(question, add_generation_prompt=True, return_tensors="pt")
    settings = {"max_new_tokens": 8, "do_sample": False}
    texts = [tokenizer.decode(m.generate(**chat, **settings)[0]) for m in (base, fresh, reft_model)]
    assert texts[0] == texts[1]
    assert "forest" in texts[0]
    assert "🌲" in texts[2]
    assert torch.equal(base(**chat).logits, fresh(**chat).logits)


def test_mixed_precision_holds_for_the_policy_and_its_reference(tmp_path: Path) -> None:
    reft_model, tokenizer = wrapped()
    settings = {"max_steps": 1, "bf16": True, "gradient_checkpointing": False}
    trainer = dpo(reft_model, tokenizer, reft_model.model, tmp_path, **settings)
    seen: list[Tensor] = []
    record(reft_model.get_decoder().layers[0].mlp, seen)
    trainer.train()
    assert len(seen) == 2
    assert {output.dtype for output in seen} == {torch.bfloat16}


@pytest.mark.parametrize("name", ["neftune", "symnoise"])
def test_noise_perturbs_the_policy_and_not_its_reference(name: str, tmp_path: Path) -> None:
    reft_model, tokenizer = wrapped(loreft(), noise(name))
    trainer = dpo(reft_model, tokenizer, reft_model.model, tmp_path)
    batch = first_batch(trainer)
    embeddings: Any = reft_model.get_input_embeddings()
    seen: list[Tensor] = []
    handle = record(embeddings, seen)
    loss = trainer.compute_loss(reft_model.train(), batch)
    handle.remove()
    noised, clean = seen  # the policy's, the reference's
    assert torch.equal(clean, embeddings(batch["input_ids"]))
    mask, completion = batch["attention_mask"], batch["completion_mask"]
    labels = batch["input_ids"].masked_fill(completion == 0, -100)

    @torch.no_grad()
    def sums(embeds: Tensor) -> Tensor:
        inputs = {"inputs_embeds": embeds, "attention_mask": mask, "labels": labels}
        logits = reft_model.eval()(**inputs, return_logits=True).logits[:, :-1]
        found = logits.log_softmax(-1).gather(2, batch["input_ids"][:, 1:, None])[..., 0]
        return (found * completion[:, 1:]).sum(1)

    # With SymNoise, each log-probability is the mean of a pair's.
    signs = noised.split(len(clean))
    assert len(signs) == (2 if name == "symnoise" else 1)
    policy = torch.stack([sums(embeds) for embeds in signs]).mean(0)
    assert (policy - row_sums(reft_model, batch)).abs().max() > 0.01
    torch.testing.assert_close(loss, dpo_loss(policy, row_sums(base_model(), batch)), **TOLERANCE)


def test_an_adapter_is_the_reference_of_its_successor_on_one_base(tmp_path: Path) -> None:
    first, tokenizer = wrapped()
    first.save_pretrained(tmp_path / "first")
    reference = rn.ReftModel.from_pretrained(first.model, tmp_path / "first")
    policy = rn.ReftModel.from_pretrained(first.model, tmp_path / "first")
    before = states(reference)
    trainer = dpo(policy, tokenizer, reference, tmp_path, max_steps=6)
    batch = first_batch(trainer)
    loss = trainer.compute_loss(policy, batch)
    torch.testing.assert_close(loss, torch.tensor(math.log(2)), **TOLERANCE)
    trainer.train()
    assert history(trainer, "rewards/margins")[-1] > 0.5
    torch.testing.assert_close(states(reference), before, rtol=0, atol=0)
    expected = dpo_loss(row_sums(policy.eval(), batch), row_sums(reference, batch))
    torch.testing.assert_close(trainer.compute_loss(policy, batch), expected, **TOLERANCE)


def test_over_peft_the_reference_is_a_base_that_trl_loads(tmp_path: Path) -> None:
    pytest.importorskip("peft", reason="needs peft: pip install 'reftnoise[peft]'")
    reft_model, tokenizer = wrapped(peft=LORA)
    trainer = dpo(reft_model, tokenizer, None, tmp_path)
    batch = first_batch(trainer)
    expected = dpo_loss(row_sums(reft_model, batch), row_sums(base_model(), batch))
    torch.testing.assert_close(trainer.compute_loss(reft_model, batch), expected, **TOLERANCE)
    # Its adapter is in training, so that it cannot be what the policy is compared with.
    trainer = dpo(reft_model, tokenizer, reft_model.model, tmp_path)
    with pytest.raises(ValueError, match="Leave ref_model out, and TRL loads the base"):
        trainer.compute_loss(reft_model, batch)


def test_kto_against_the_bare_base_itself(tmp_path: Path) -> None:
    reft_model, tokenizer = wrapped()
    fresh, before = base_model(), states(reft_model)
    data = [
        {"prompt": row["prompt"], "completion": row[name], "label": name == "chosen"}
        for row in preferences()
        for name in ("chosen", "rejected")
    ]
    trainer = trl.KTOTrainer(
        reft_model,
        ref_model=reft_model.model,
        args=arguments(trl.KTOConfig, tmp_path, max_steps=12),
        train_dataset=Dataset.from_list(data),
        processing_class=tokenizer,
    )
    batch = first_batch(trainer)
    ratios, unmatched = (
        row_sums(reft_model, batch, prefix) - row_sums(fresh, batch, prefix)
        for prefix in ("", "KL_")
    )
    signs = torch.tensor([1 if label else -1 for label in batch["label"]])
    expected = (1 - torch.sigmoid(0.1 * signs * (ratios - unmatched.mean().clamp(min=0)))).mean()
    torch.testing.assert_close(trainer.compute_loss(reft_model, batch), expected, **TOLERANCE)
    trainer.train()
    margins = history(trainer, "rewards/margins")
    assert min(margins[-3:]) > max(0.5, 2 * margins[0])
    expect_trained(reft_model, before, tmp_path, base_model())


# -- RewardTrainer ---------------------------------------------------------------------------------


def classifier() -> Any:
    """The embedded model with a random head of one score."""
    set_seed(0)
    return LlamaForSequenceClassification.from_pretrained(DIRECTORY, num_labels=1).float()


def reward(*entries: dict[str, Any], path: Path) -> Any:
    return trl.RewardTrainer(
        rn.get_reft_model(classifier(), rn.ReftConfig(list(entries))),
        args=arguments(trl.RewardConfig, path, max_steps=12),
        train_dataset=preferences(),
        processing_class=rn.load_tiny_model()[1],
    )


def test_a_reward_model_trains_units_and_its_head(tmp_path: Path) -> None:
    trainer = reward(loreft("f2+l2"), noise("neftune"), path=tmp_path)
    reft_model = trainer.model
    before = states(reft_model)
    batch = first_batch(trainer)
    rows = [i[m] for i, m in zip(batch["input_ids"], batch["attention_mask"].bool(), strict=True)]
    reft_model.eval()
    chosen, rejected = torch.cat([reft_model(row[None]).logits[0] for row in rows]).chunk(2)
    expected = -F.logsigmoid(chosen - rejected).mean()
    torch.testing.assert_close(trainer.compute_loss(reft_model, batch), expected, **TOLERANCE)
    trainer.train()
    trained = [name for name, p in reft_model.model.named_parameters() if p.requires_grad]
    assert trained == ["score.weight"]
    assert history(trainer, "accuracy")[0] < 1.0
    assert history(trainer, "accuracy")[-3:] == [1.0] * 3
    assert history(trainer, "margin")[-1] > 1.0
    expect_trained(reft_model, before, tmp_path, classifier())


def test_symnoise_needs_labels_that_a_reward_model_has_not(tmp_path: Path) -> None:
    trainer = reward(loreft(), noise("symnoise"), path=tmp_path)
    with pytest.raises(ValueError, match="averages the loss over pairs"):
        trainer.train()


# -- GRPOTrainer -----------------------------------------------------------------------------------


def is_green(completions: Any, **_columns: Any) -> list[float]:
    return [float("green" in completion[0]["content"]) for completion in completions]


def grpo(reft_model: rn.ReftModel, tokenizer: Any, path: Path, **settings: Any) -> Any:
    defaults = {"num_generations": 8, "max_completion_length": 10}
    settings = defaults | {"per_device_train_batch_size": 32} | settings
    return trl.GRPOTrainer(
        reft_model,
        reward_funcs=is_green,
        args=arguments(trl.GRPOConfig, path, **settings),
        train_dataset=Dataset.from_list([{"prompt": says("user", text)} for text in COLOURS]),
        processing_class=tokenizer,
    )


def test_grpo_finds_what_is_rewarded(tmp_path: Path) -> None:
    reft_model, tokenizer = wrapped(loreft("l1"))
    before = states(reft_model)
    trainer = grpo(reft_model, tokenizer, tmp_path, max_steps=10)
    trainer.train()
    rewards = history(trainer, "reward")
    assert rewards[0] < 0.6
    assert min(rewards[-3:]) > 0.9
    expect_trained(reft_model, before, tmp_path, base_model())


def test_grpo_scores_tokens_as_they_were_sampled(tmp_path: Path) -> None:
    reft_model, tokenizer = wrapped(loreft("f2+l2"))
    settings = {"max_steps": 1, "learning_rate": 0.0, "temperature": 0.7}
    trainer = grpo(reft_model, tokenizer, tmp_path, **settings)
    seen: list[tuple[dict[str, Any], Any]] = []
    reft_model.register_forward_hook(
        lambda _module, _args, kwargs, output: seen.append((kwargs, output)), with_kwargs=True
    )
    trainer.train()
    ((batch, output),) = seen
    widths = batch["attention_mask"].argmax(1)
    assert widths.amin() < widths.amax()  # prompts of several lengths, padded on the left
    reft_model.eval()
    for row in range(0, 32, 5):
        attended = batch["attention_mask"][row].bool()
        ids, labels = batch["input_ids"][row][attended], batch["labels"][row][attended]
        completion = ids[labels != -100]
        width = len(ids) - len(completion)

        def as_sampled(_row: int, so_far: Tensor, ids: Tensor = ids) -> list[int]:
            return [int(ids[len(so_far)])]

        generated = reft_model.generate(
            ids[None, :width],
            prefix_allowed_tokens_fn=as_sampled,
            max_new_tokens=len(completion),
            do_sample=False,
            output_logits=True,
            return_dict_in_generate=True,
        )
        assert torch.equal(generated.sequences[0], ids)
        logits = torch.cat(generated.logits) / 0.7
        expected = logits.log_softmax(-1).gather(1, completion[:, None])[:, 0]
        found = output.log_probs[row][batch["labels"][row, 1:] != -100]
        torch.testing.assert_close(found.detach(), expected, **TOLERANCE)


def test_continuous_batching_which_would_sample_from_the_base_is_refused(tmp_path: Path) -> None:
    settings = {"max_steps": 1, "use_transformers_continuous_batching": True}
    trainer = grpo(*wrapped(), tmp_path, **settings)
    with pytest.raises(AttributeError, match="generate_batch would leave edits out"):
        trainer.train()
