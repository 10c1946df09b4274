"""The progress of a training, and the losses that units add, in Trainers."""

from pathlib import Path
from typing import Any

import pytest
from transformers import AutoTokenizer, Trainer, TrainerCallback

import reftnoise as rn
from reftnoise.engine.base.tiny import DIRECTORY
from support.added_losses import penalised
from support.trainer_runs import arguments, base_model, module

pytestmark = pytest.mark.filterwarnings("ignore:.*pin_memory.*:UserWarning")


@pytest.fixture(scope="module")
def tokenizer() -> Any:
    return AutoTokenizer.from_pretrained(DIRECTORY)


class Records(TrainerCallback):
    def __init__(self) -> None:
        self.seen: list[float] = []

    def on_substep_end(self, *_: Any, **kwargs: Any) -> None:
        self.seen.append(kwargs["model"].training_progress)

    on_step_end = on_substep_end


@pytest.mark.parametrize("trainer", [Trainer, rn.ReftTrainer])
def test_progress_in_a_trainer(tmp_path: Path, tokenizer: Any, trainer: Any) -> None:
    model = penalised(base_model(tokenizer))
    records = Records()
    args = arguments(
        tmp_path,
        per_device_train_batch_size=2,
        gradient_accumulation_steps=2,
        max_steps=4,
        remove_unused_columns=False,
    )
    callbacks = [records] if trainer is rn.ReftTrainer else [rn.TrainingProgress(), records]
    trainer(model=model, args=args, callbacks=callbacks, **module(tokenizer, model)).train()
    assert records.seen == [0, 0, 0.25, 0.25, 0.5, 0.5, 0.75, 0.75]
    assert model.training_progress == 1


@pytest.mark.parametrize("smoothing", [0.0, 0.1])
@pytest.mark.parametrize("micro_batches", [1, 4])
def test_accumulated_penalties_are_one_penalty(
    tmp_path: Path, tokenizer: Any, smoothing: float, micro_batches: int
) -> None:
    model = penalised(base_model(tokenizer))
    args = arguments(
        tmp_path,
        per_device_train_batch_size=8 // micro_batches,
        gradient_accumulation_steps=micro_batches,
        max_steps=1,
        learning_rate=0.0,
        logging_steps=1,
        label_smoothing_factor=smoothing,
    )
    losses = []
    for progress in (0.0, 1.0):  # without and with the penalty
        model.training_progress = progress
        trainer = rn.ReftTrainer(model=model, args=args, **module(tokenizer, model))
        trainer.remove_callback(rn.TrainingProgress)
        losses.append(trainer.train().training_loss)
    (unit,) = model.interventions.values()
    penalty = float(unit.bias.detach().square().mean())
    assert losses[1] - losses[0] == pytest.approx(penalty, rel=1e-4)
