"""transformers' own Trainer on a `ReftModel`; ours is tested in `test_trainer`."""

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import AutoTokenizer, EvalPrediction, Trainer
from transformers.trainer_pt_utils import get_model_param_count

import reftnoise as rn
from reftnoise.engine.base.tiny import DIRECTORY
from support.tolerance import assert_close
from support.trainer_runs import COMPLETIONS, PROMPTS, arguments, loreft, module, weights, wrapped

pytestmark = pytest.mark.filterwarnings("ignore:'pin_memory' argument is set as true:UserWarning")


@pytest.fixture(scope="module")
def tokenizer() -> Any:
    return AutoTokenizer.from_pretrained(DIRECTORY)


def data_of(tokenizer: Any, model: rn.ReftModel) -> dict[str, Any]:
    return module(tokenizer, model, eval_prompts=PROMPTS[:3], eval_completions=COMPLETIONS[:3])


def neftune(alpha: float) -> dict[str, Any]:
    return {"intervention": "neftune", "alpha": alpha, "length": "padded"}


def test_evaluation_has_the_loss_and_the_logits_of_the_model(
    tokenizer: Any, tmp_path: Path
) -> None:
    model = wrapped(tokenizer, loreft(dropout=0.2), {"intervention": "symnoise"})
    data = data_of(tokenizer, model)
    seen: list[EvalPrediction] = []

    def metrics(prediction: EvalPrediction) -> dict[str, float]:
        seen.append(prediction)
        return {"right": float((prediction.predictions.argmax(-1) >= 0).mean())}

    args = arguments(tmp_path, max_steps=2, eval_strategy="steps", eval_steps=1)
    trainer = Trainer(model=model, args=args, compute_metrics=metrics, **data)
    trainer.train()
    found = trainer.evaluate()
    batch = data["data_collator"](list(data["eval_dataset"]))
    with torch.no_grad():
        expected = model.eval()(**batch)
    assert_close(found["eval_loss"], float(expected.loss))
    assert_close(torch.tensor(seen[-1].predictions), expected.logits)
    logged = [entry["eval_loss"] for entry in trainer.state.log_history if "eval_loss" in entry]
    assert logged[1] == pytest.approx(found["eval_loss"], rel=1e-5)
    assert logged[0] != logged[1]


def test_resuming_in_the_middle_ends_with_the_same_weights(tokenizer: Any, tmp_path: Path) -> None:
    def trained(name: str, resume: str | None = None) -> Tensor:
        model = wrapped(tokenizer, loreft(dropout=0.2), {"intervention": "neftune"})
        args = arguments(tmp_path / name, max_steps=6, save_strategy="steps", save_steps=2)
        Trainer(model=model, args=args, **data_of(tokenizer, model)).train(resume)
        return weights(model)

    expected = trained("whole")
    assert torch.equal(trained("again", str(tmp_path / "whole" / "checkpoint-2")), expected)


def test_the_best_model_is_loaded_at_the_end(tokenizer: Any, tmp_path: Path) -> None:
    model = wrapped(tokenizer)
    args = arguments(
        tmp_path,
        max_steps=3,
        eval_strategy="steps",
        eval_steps=1,
        save_strategy="steps",
        save_steps=1,
        load_best_model_at_end=True,
        metric_for_best_model="loss",
        greater_is_better=True,  # the best is then known to be the first, not the last
    )
    trainer = Trainer(model=model, args=args, **data_of(tokenizer, model))
    trainer.train()
    assert trainer.state.best_global_step == 1
    losses = [entry["eval_loss"] for entry in trainer.state.log_history if "eval_loss" in entry]
    assert trainer.evaluate()["eval_loss"] == pytest.approx(losses[0], rel=1e-6)
    assert losses[0] != pytest.approx(losses[-1], rel=1e-4)


@pytest.mark.parametrize("trainer_class", [Trainer, rn.ReftTrainer])
def test_transformers_neftune_is_a_noise_of_ours(
    trainer_class: Any, tokenizer: Any, tmp_path: Path
) -> None:
    ended = []
    for alpha, noise in ((50.0, []), (None, [neftune(50.0)]), (None, [])):
        model = wrapped(tokenizer, loreft(), *noise)
        model.split = "never"  # as it trains where a foreign hook reads the embeddings
        args = arguments(tmp_path, max_steps=3, neftune_noise_alpha=alpha)
        trainer_class(model=model, args=args, **module(tokenizer, model)).train()
        ended.append(weights(model))
        assert not model.get_input_embeddings()._forward_hooks
    assert torch.equal(ended[0], ended[1])
    assert not torch.equal(ended[0], ended[2])


@pytest.mark.parametrize("noise", ["neftune", "gaussian", "symnoise"])
def test_two_noises_of_the_embeddings_are_told(noise: str, tokenizer: Any, tmp_path: Path) -> None:
    model = wrapped(tokenizer, loreft(), {"intervention": noise})
    args = arguments(tmp_path, max_steps=1, neftune_noise_alpha=5.0)
    trainer = Trainer(model=model, args=args, **module(tokenizer, model))
    with pytest.warns(UserWarning, match=r"noised twice: .* \(neftune_noise_alpha=5.0\)"):
        trainer.train()


def test_a_noise_elsewhere_is_no_second_one(tokenizer: Any, tmp_path: Path) -> None:
    elsewhere = {"intervention": "neftune", "component": "block_output", "layer": 1}
    model = wrapped(tokenizer, loreft(), elsewhere)
    args = arguments(tmp_path, max_steps=1, neftune_noise_alpha=5.0)
    Trainer(model=model, args=args, **module(tokenizer, model)).train()


def test_parameters_are_counted_as_the_trainer_counts_them(tokenizer: Any) -> None:
    model = wrapped(tokenizer)
    for only_trainable in (False, True):
        counted = model.num_parameters(only_trainable=only_trainable)
        assert counted == get_model_param_count(model, trainable_only=only_trainable)
    embeddings = model.get_input_embeddings().weight.numel()
    assert model.num_parameters() - model.num_parameters(exclude_embeddings=True) == embeddings
