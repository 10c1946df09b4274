"""TRL's SFTTrainer as it comes: units learn, and losses are those of each document alone."""

# ruff: noqa: E402  # what comes after importorskip needs the package

from pathlib import Path
from typing import Any

import pytest
import torch
from datasets import Dataset
from transformers import set_seed

trl = pytest.importorskip("trl", reason="needs trl: pip install 'reftnoise[trl]'")

import reftnoise as rn
import reftnoise.engine.planning
from reftnoise.engine.base.tiny import TinyExample
from support.trl_runs import (
    MARKS,
    QUESTIONS,
    TOLERANCE,
    arguments,
    base_model,
    conversations,
    expect_trained,
    first_batch,
    history,
    loreft,
    noise,
    record,
    row_logps,
    says,
    states,
    supervised,
    wrapped,
)

pytestmark = MARKS

PACKED: dict[str, Any] = {"packing": True, "max_length": 60}
# The embedded tokenizer's template with TRL's marks around what the assistant says.
MARKED = (
    "{{ bos_token }}{% for message in messages %}{{ '<|' + message['role'] + '|>' }}"
    "{% if message['role'] == 'assistant' %}{% generation %}{{ message['content'] + eos_token }}"
    "{% endgeneration %}{% else %}{{ message['content'] + eos_token }}{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|assistant|>' }}{% endif %}"
)


def sft(reft_model: rn.ReftModel, tokenizer: Any, data: Any, path: Path, **settings: Any) -> Any:
    return trl.SFTTrainer(
        reft_model,
        args=arguments(trl.SFTConfig, path, **settings),
        train_dataset=data,
        eval_dataset=data,
        processing_class=tokenizer,
    )


def turns() -> Dataset:
    """Conversations of two questions and answers."""

    def turn(question: TinyExample) -> list[dict[str, str]]:
        return says("user", question.prompt) + says("assistant", question.completion)

    pairs = zip(QUESTIONS[::2], QUESTIONS[1::2], strict=True)
    return Dataset.from_list([{"messages": turn(one) + turn(other)} for one, other in pairs])


def test_sft_learns_and_evaluates(tmp_path: Path) -> None:
    reft_model, tokenizer = wrapped(loreft(), noise("neftune"))
    before = states(reft_model)
    settings = {"max_steps": 15, "eval_strategy": "steps", "eval_steps": 5}
    trainer = sft(reft_model, tokenizer, supervised(), tmp_path, **settings)
    assert trainer.args.gradient_checkpointing
    trainer.train()
    losses, scores = history(trainer, "loss"), history(trainer, "eval_loss")
    assert losses[0] > 3
    assert losses[-1] < 0.3
    assert scores[0] > 5 * scores[-1]
    assert history(trainer, "eval_mean_token_accuracy")[-1] > 0.95
    expect_trained(reft_model, before, tmp_path, base_model())


@pytest.mark.parametrize(
    ("data", "settings"),
    [
        (supervised, {}),
        (supervised, PACKED),
        (supervised, {"padding_free": True, "max_length": None}),
        (turns, {"assistant_only_loss": True}),
    ],
    ids=["padded", "packed", "padding_free", "assistant_only"],
)
@pytest.mark.parametrize("attention", ["sdpa", "eager"])
def test_sft_loss_is_that_of_each_document_alone(
    data: Any, settings: dict[str, Any], attention: str, tmp_path: Path
) -> None:
    reft_model, tokenizer = wrapped(loreft("f2+l2"))
    reft_model.set_attn_implementation(attention)
    tokenizer.chat_template = MARKED
    trainer = sft(reft_model, tokenizer, data(), tmp_path, **settings)
    documents = []
    for row in trainer.train_dataset:
        ids, labels = torch.tensor(row["input_ids"]), torch.tensor(row["labels"])
        lengths = row.get("seq_lengths", [len(ids)])
        documents += zip(ids.split(lengths), labels.split(lengths), strict=True)
    assert len(documents) == len(data())
    assert all((labels == -100).sum() > 4 for _, labels in documents)
    alone = torch.cat([row_logps(reft_model, *document) for document in documents])
    losses, counts = [], []
    for batch in trainer.get_eval_dataloader():
        assert ("attention_mask" in batch) != trainer.padding_free
        counts.append(int((batch["labels"][:, 1:] != -100).sum()))
        losses.append(trainer.compute_loss(reft_model, batch).detach())
    assert sum(counts) == len(alone)
    found = (torch.stack(losses) * torch.tensor(counts)).sum() / sum(counts)
    torch.testing.assert_close(found, -alone.mean(), **TOLERANCE)


@pytest.mark.parametrize("name", ["neftune", "symnoise"])
def test_noise_is_scaled_by_the_length_of_each_packed_document(name: str, tmp_path: Path) -> None:
    reft_model, tokenizer = wrapped(loreft(), noise(name))
    trainer = sft(reft_model, tokenizer, supervised(), tmp_path, **PACKED)
    batch = first_batch(trainer)
    lengths = batch["cu_seq_lens_q"].diff()
    assert len(lengths.unique()) > 2
    embeddings: Any = reft_model.get_input_embeddings()
    clean = embeddings(batch["input_ids"])
    seen: list[Any] = []
    record(embeddings, seen)
    trainer.compute_loss(reft_model.train(), batch)
    bound = 5.0 / (lengths.repeat_interleave(lengths) * embeddings.embedding_dim).sqrt()
    drawn = (seen[0] - clean) / bound[:, None]
    if name == "symnoise":
        assert len(drawn) == 2
        torch.testing.assert_close(drawn[0], -drawn[1], rtol=1e-3, atol=1e-3)
        torch.testing.assert_close(drawn.abs(), torch.ones_like(drawn), rtol=1e-3, atol=1e-3)
        return
    for document in drawn[0].split(lengths.tolist()):  # U(-1, 1), hundreds of draws
        assert 0.98 < document.abs().amax() < 1.001
        assert abs(document.abs().mean() - 0.5) < 0.05


@pytest.mark.parametrize("settings", [{}, PACKED], ids=["padded", "packed"])
def test_sft_with_symnoise_has_the_loss_of_our_trainer(
    settings: dict[str, Any], tmp_path: Path
) -> None:
    reft_model, tokenizer = wrapped(loreft(), noise("symnoise"))
    theirs = sft(reft_model, tokenizer, supervised(), tmp_path, **settings)
    ours = rn.ReftTrainerForCausalLM(reft_model, arguments(trl.SFTConfig, tmp_path))
    batch = first_batch(theirs)
    found = []
    for trainer in (theirs, ours):
        set_seed(3)
        reft_model.zero_grad()
        loss = trainer.compute_loss(reft_model.train(), dict(batch))
        loss.backward()
        gradients = [p.grad.flatten() for p in reft_model.interventions.parameters()]
        found.append((loss.detach(), torch.cat(gradients)))
    torch.testing.assert_close(*found, rtol=1e-4, atol=1e-6)


def test_flash_attention_is_told_of_the_documents_in_both_rows_of_a_pair(tmp_path: Path) -> None:
    reft_model, tokenizer = wrapped(loreft(), noise("symnoise"))
    trainer = sft(reft_model, tokenizer, supervised(), tmp_path, **PACKED)
    batch = first_batch(trainer)
    seen: list[Any] = []
    reft_model.get_decoder().register_forward_pre_hook(
        lambda _module, _args, kwargs: seen.append(kwargs["cu_seq_lens_q"]), with_kwargs=True
    )
    trainer.compute_loss(reft_model.train(), dict(batch))
    twice = torch.cat([torch.tensor([0]), batch["cu_seq_lens_q"].diff().repeat(2).cumsum(0)])
    assert torch.equal(seen[0].long(), twice)


def test_accumulation_and_checkpointing_change_no_update(tmp_path: Path) -> None:
    mixed = [  # completions of few and of many tokens
        {"prompt": row["prompt"], "completion": row[("chosen", "rejected")[index % 2]]}
        for index, row in enumerate(conversations("prompt", "chosen", "rejected"))
    ]
    found = []
    for size, steps, checkpoints in [(8, 1, None), (2, 4, False), (8, 1, False), (8, 1, True)]:
        reft_model, tokenizer = wrapped()
        trainer = sft(
            reft_model,
            tokenizer,
            Dataset.from_list(mixed),
            tmp_path,
            max_steps=2,
            optim="sgd",
            per_device_train_batch_size=size,
            gradient_accumulation_steps=steps,
            gradient_checkpointing=checkpoints is not None,
            gradient_checkpointing_kwargs={"use_reentrant": bool(checkpoints)},
        )
        before = states(reft_model)
        trainer.train()
        after = states(reft_model)
        found.append({name: after[name] - before[name] for name in after})
    assert any(update.any() for update in found[0].values())
    for other in found[1:]:
        torch.testing.assert_close(other, found[0], rtol=1e-4, atol=1e-7)


def test_a_killed_run_ends_with_the_weights_of_one_that_was_not(tmp_path: Path) -> None:
    settings = {
        "max_steps": 6,
        "save_strategy": "steps",
        "save_steps": 3,
        "eval_strategy": "steps",
        "eval_steps": 3,
        "load_best_model_at_end": True,
    }
    found = []
    for resumed in (None, str(tmp_path / "run" / "checkpoint-3")):
        reft_model, tokenizer = wrapped(loreft(), noise("neftune"))
        trainer = sft(reft_model, tokenizer, supervised(), tmp_path, **settings)
        trainer.train(resume_from_checkpoint=resumed)
        found.append(states(reft_model))
    torch.testing.assert_close(*found, rtol=0, atol=0)


@pytest.mark.parametrize(
    "section",
    [
        {"peft_type": "lora", "r": 2, "init_lora_weights": False},
        {"peft_type": "prompt_tuning", "num_virtual_tokens": 3},
    ],
    ids=["lora", "virtual_tokens"],
)
def test_sft_of_units_over_peft(section: dict[str, Any], tmp_path: Path) -> None:
    pytest.importorskip("peft", reason="needs peft: pip install 'reftnoise[peft]'")
    reft_model, tokenizer = wrapped(peft=section)
    before = states(reft_model)
    trainer = sft(reft_model, tokenizer, supervised(), tmp_path, max_steps=10)
    batch = first_batch(trainer)
    expected = reft_model(**batch, return_logits=True).loss  # the base's own
    torch.testing.assert_close(trainer.compute_loss(reft_model, batch), expected, **TOLERANCE)
    trainer.train()
    assert history(trainer, "loss")[-1] < 0.6 * history(trainer, "loss")[0]
    expect_trained(reft_model, before, tmp_path, base_model())


@pytest.mark.filterwarnings("ignore:Model has `tie_word_embeddings=True`:UserWarning")
def test_edits_of_the_head_are_refused(tmp_path: Path) -> None:
    unit = {"component": "lm_head.output", "intervention": "bias", "positions": "all"}
    with pytest.raises(ValueError, match=r"unit at lm_head\.output would have no effect"):
        sft(*wrapped(unit), supervised(), tmp_path)
    pytest.importorskip("peft", reason="needs peft: pip install 'reftnoise[peft]'")
    section = {"peft_type": "lora", "target_modules": ["q_proj", "lm_head"]}
    with pytest.raises(ValueError, match="PEFT's adapter on the head would have no effect"):
        sft(*wrapped(peft=section), supervised(), tmp_path)


@pytest.mark.filterwarnings("ignore:`label_smoothing_factor` is deprecated:FutureWarning")
@pytest.mark.parametrize(
    ("data", "settings", "said"),
    [
        (supervised, {"label_smoothing_factor": 0.1}, "training without labels or prompt_lengths"),
        (turns, {}, "labels begin with each row's first token"),
        (turns, PACKED, "labels begin with each row's first token"),
        (supervised, {}, None),
        (supervised, PACKED, None),
    ],
    ids=["labels kept", "labels everywhere", "everywhere, packed", "completions", "packed"],
)
def test_prompts_that_are_none_are_mentioned_once(
    data: Any,
    settings: dict[str, Any],
    said: str | None,
    tmp_path: Path,
    caplog: pytest.LogCaptureFixture,
) -> None:
    reftnoise._util.errors.warn_once.cache_clear()
    sft(*wrapped(), data(), tmp_path, max_steps=2, **settings).train()
    messages = [
        record.message for record in caplog.records if record.name == "reftnoise.engine.planning"
    ]
    assert len(messages) == (said is not None)
    assert said is None or said in messages[0]
