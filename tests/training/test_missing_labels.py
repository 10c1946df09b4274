"""Steps whose rows have no label, as where a truncation cut all completions off."""

import logging
from pathlib import Path

import pytest
import torch

import reftnoise as rn
from reftnoise.engine.base.tiny import load_tiny_model
from support.trainer_runs import arguments, loreft, weights


def test_a_step_without_labels_teaches_nothing_and_says_so(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    base, _ = load_tiny_model()
    model = rn.get_reft_model(base, rn.ReftConfig([loreft()]))
    ids = list(range(5, 15))
    rows = [{"input_ids": ids, "attention_mask": [1] * 10, "labels": [-100] * 10}] * 24
    settings = {"gradient_accumulation_steps": 2, "per_device_train_batch_size": 1}
    args = arguments(tmp_path, num_train_epochs=1, use_cpu=True, logging_steps=1, **settings)
    trainer = rn.ReftTrainer(model=model, args=args, train_dataset=rows)
    before = weights(model)
    with caplog.at_level(logging.WARNING, "reftnoise"):
        trainer.train()
    losses = [line["loss"] for line in trainer.state.log_history if "loss" in line]
    assert losses == [0.0] * 12
    assert torch.equal(weights(model), before)
    assert [record.getMessage() for record in caplog.records] == [
        "a step had no label but -100 and taught nothing: was the end of its rows cut off?"
    ]
    batches, count = trainer.get_batch_samples(
        iter([{"labels": torch.tensor([[3, 4, 5]])}]), 1, "cpu"
    )
    assert (len(batches), int(count)) == (1, 2)  # the first label has no token before it
