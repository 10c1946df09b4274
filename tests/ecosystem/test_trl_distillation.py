"""TRL's DistillationTrainer: student and teacher are edits of one base."""

# ruff: noqa: E402  # what comes after importorskip needs the package

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import AutoModel, set_seed

trl = pytest.importorskip("trl", reason="needs trl: pip install 'reftnoise[trl]'")

import reftnoise as rn
from reftnoise.engine.base.tiny import DIRECTORY
from support.trl_runs import (
    MARKS,
    TOLERANCE,
    arguments,
    base_model,
    conversations,
    expect_trained,
    history,
    loreft,
    states,
    wrapped,
)

pytestmark = MARKS


def trained_by_hand(reft_model: rn.ReftModel, scale: float = 0.1) -> rn.ReftModel:
    torch.manual_seed(2)
    with torch.no_grad():
        for parameter in reft_model.interventions.parameters():
            parameter.add_(scale * torch.randn_like(parameter))
    return reft_model


def padded() -> dict[str, Tensor]:
    ids = torch.arange(3, 21).view(2, 9)
    mask = torch.ones_like(ids)
    mask[0, :2] = mask[1, -1] = 0
    return {"input_ids": ids, "attention_mask": mask}


@pytest.mark.parametrize("positions", ["l1", "f1+l2", "all+decode"])
def test_the_backbone_has_the_edits(positions: str) -> None:
    reft_model = trained_by_hand(wrapped(loreft(positions))[0]).eval()
    inputs = padded()
    # The last four states predict; the first of them is the prompt's last.
    hidden = reft_model.base_model(**inputs, logits_to_keep=4).last_hidden_state
    lengths = inputs["attention_mask"][:, :6].sum(1)
    whole = reft_model(**inputs, prompt_lengths=lengths)
    assert torch.equal(reft_model.lm_head(hidden), whole.logits)
    bare = reft_model.model.base_model(**inputs).last_hidden_state
    assert (bare - hidden).abs().max() > 0.1
    with reft_model.disabled():
        assert torch.equal(reft_model.base_model(**inputs).last_hidden_state, bare)
    without = reft_model.base_model(**inputs).last_hidden_state
    assert torch.equal(reft_model.lm_head(without), reft_model(**inputs).logits)
    # Gradients pass, and nothing stays behind.
    hidden.square().mean().backward()
    assert all(p.grad is not None for p in reft_model.interventions.parameters())
    assert torch.equal(reft_model.model.base_model(**inputs).last_hidden_state, bare)
    assert reft_model.base_model.layers is reft_model.model.base_model.layers


def test_a_base_without_a_head_is_its_own_backbone() -> None:
    base = AutoModel.from_pretrained(DIRECTORY, dtype=torch.float32)
    reft_model = rn.get_reft_model(base, rn.ReftConfig([loreft()]))
    assert reft_model.base_model is reft_model


def test_a_unit_at_the_head_is_refused() -> None:
    head = {"component": "lm_head.output", "intervention": "addition", "positions": "all"}
    reft_model, _ = wrapped(head)
    with pytest.raises(ValueError, match="the weight of the head alone"):
        reft_model.base_model(**padded())


def distillation(student: Any, teacher: Any, tokenizer: Any, path: Path, **given: Any) -> Any:
    settings = {"max_completion_length": 8, "per_device_train_batch_size": 8} | given
    return trl.DistillationTrainer(
        student,
        teacher_model=teacher,
        args=arguments(trl.DistillationConfig, path, **settings),
        train_dataset=conversations("prompt"),
        processing_class=tokenizer,
    )


def log_probs(reft_model: rn.ReftModel, prompt: Tensor, completion: Tensor) -> Tensor:
    """Of all tokens of the vocabulary, at each token of an unpadded row's completion."""
    ids = torch.cat([prompt, completion])[None]
    logits = reft_model(ids, prompt_lengths=torch.tensor([len(prompt)])).logits[0]
    return logits[len(prompt) - 1 : -1].log_softmax(-1)


def test_the_loss_is_the_divergence_of_the_edited_models(tmp_path: Path) -> None:
    student, tokenizer = wrapped(loreft("l1"))
    trained_by_hand(student)
    teacher = rn.get_reft_model(student.model, rn.ReftConfig([loreft("f1+l1")]))
    trained_by_hand(teacher, 1.0)
    trainer = distillation(student, teacher, tokenizer, tmp_path)
    set_seed(0)
    batch = trainer._prepare_inputs(next(iter(trainer.get_train_dataloader())))
    loss = trainer.compute_loss(student, batch)
    apart = []
    for row in range(len(batch["prompt_ids"])):
        prompt = batch["prompt_ids"][row][batch["prompt_mask"][row].bool()]
        completion = batch["completion_ids"][row][batch["completion_mask"][row].bool()]
        with torch.no_grad():
            ours, its = (log_probs(m, prompt, completion) for m in (student, teacher))
        apart.append((ours.exp() * (ours - its)).sum(-1))  # reverse KL, TRL's default
    assert len({len(row) for row in apart}) > 1
    torch.testing.assert_close(loss, torch.cat(apart).mean(), **TOLERANCE)
    assert loss > 0.01


def test_an_edit_of_the_last_token_learns_what_a_wider_one_does(tmp_path: Path) -> None:
    teacher, tokenizer = wrapped(loreft("f1+l1"))
    settings: dict[str, Any] = {"max_steps": 25, "packing": False}
    trl.SFTTrainer(
        teacher,
        args=arguments(trl.SFTConfig, tmp_path, **settings),
        train_dataset=conversations("prompt", "completion"),
        processing_class=tokenizer,
    ).train()
    student = rn.get_reft_model(teacher.model, rn.ReftConfig([loreft("l1")]))
    before = states(student)
    trainer = distillation(student, teacher, tokenizer, tmp_path, max_steps=20, beta=0.5)
    trainer.train()
    losses = history(trainer, "loss")
    assert sum(losses[-5:]) < 0.5 * sum(losses[:5])
    expect_trained(student, before, tmp_path, base_model())
