"""A resumed run takes the rows, and draws the random numbers, of one that was never killed."""

from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from torch.utils.data import RandomSampler, SequentialSampler

import reftnoise as rn
from reftnoise.engine.base.tiny import DIRECTORY
from reftnoise.training.steps.data_order import EpochOrder, by_epoch
from support.trainer_runs import arguments, loreft, module, weights, wrapped

PERSISTENT = {"dataloader_num_workers": 1, "dataloader_persistent_workers": True}
EVALUATED = {"eval_strategy": "steps", "eval_steps": 3}


@pytest.fixture(scope="module")
def tokenizer() -> Any:
    return transformers.AutoTokenizer.from_pretrained(DIRECTORY)


def run(directory: Path, tokenizer: Any, stop: int = 0, **settings: Any) -> rn.ReftTrainer:
    """A trainer for two epochs of four steps; with `stop`, its run is interrupted there."""

    class Interrupt(transformers.TrainerCallback):
        def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
            if state.global_step == stop:
                raise KeyboardInterrupt

    model = wrapped(tokenizer, loreft(dropout=0.2), {"intervention": "gaussian"})
    settings |= {"save_strategy": "steps", "save_steps": 6, "per_device_train_batch_size": 2}
    args = arguments(directory, num_train_epochs=2, use_cpu=True, **settings)
    data = module(tokenizer, model)
    data["eval_dataset"] = data["train_dataset"]
    return rn.ReftTrainer(model=model, args=args, callbacks=[Interrupt()], **data)


@pytest.mark.parametrize(
    "settings",
    [{"train_sampling_strategy": "group_by_length"}, PERSISTENT | EVALUATED],
    ids=["by length", "persistent workers"],
)
def test_a_run_that_is_killed_within_a_later_epoch_resumes_to_the_same_weights(
    settings: dict[str, Any], tokenizer: Any, tmp_path: Path
) -> None:
    whole = run(tmp_path / "whole", tokenizer, **settings)
    whole.train()
    with pytest.raises(KeyboardInterrupt):
        run(tmp_path / "killed", tokenizer, stop=7, **settings).train()
    torch.manual_seed(99)
    resumed = run(tmp_path / "killed", tokenizer, **settings)
    resumed.train(resume_from_checkpoint=True)
    assert resumed.state.global_step == whole.state.global_step == 8
    assert torch.equal(weights(resumed.model), weights(whole.model))


def test_an_order_is_that_of_its_epoch() -> None:
    rows = list(range(50))
    order, other = EpochOrder(RandomSampler(rows), 3), EpochOrder(RandomSampler(rows), 3)
    first = list(order)
    order.set_epoch(1)
    second = list(order)
    assert sorted(first) == sorted(second) == rows
    assert first != second
    other.set_epoch(1)
    torch.manual_seed(5)
    before = torch.get_rng_state()
    assert list(other) == second
    assert torch.equal(torch.get_rng_state(), before)
    assert len(order) == 50


def test_samplers_that_draw_nothing_or_are_seeded_stay() -> None:
    sequential, seeded = SequentialSampler([1]), RandomSampler([1], generator=torch.Generator())
    for sampler in (None, sequential, seeded):
        assert by_epoch(sampler, 1, seeds_random=False) is sampler
    drawn = RandomSampler([1])
    assert by_epoch(drawn, 1, seeds_random=True) is drawn
    assert isinstance(by_epoch(drawn, 1, seeds_random=False), EpochOrder)
