"""Training with the real Trainer: pyreft's example, accumulation, evaluation, resuming."""

import copy
import functools
import json
import os
import re
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from torch import Tensor

import reftnoise as rn
from reftnoise.engine.base.tiny import DIRECTORY
from reftnoise.engine.training_pass.prefix_cache import BLOCK
from reftnoise.interventions import INTERVENTIONS
from support.models.architectures import ARCHITECTURES
from support.tolerance import assert_close
from support.trainer_runs import (
    COMPLETIONS,
    PROMPTS,
    arguments,
    base_model,
    loreft,
    module,
    resumable_run,
    weights,
    wrapped,
)

pytestmark = [
    pytest.mark.filterwarnings("ignore:'pin_memory' argument is set as true:UserWarning"),
    pytest.mark.filterwarnings("ignore:.*gradient_checkpointing.*deprecated:FutureWarning"),
]

slow = pytest.mark.slow


@pytest.fixture(scope="module")
def tokenizer() -> Any:
    return transformers.AutoTokenizer.from_pretrained(DIRECTORY)


@pytest.mark.filterwarnings("ignore:.*early_stopping.*:UserWarning")
@pytest.mark.parametrize(
    "architecture",
    [
        name if name in ("llama", "gpt2", "gemma3_text") else pytest.param(name, marks=slow)
        for name in ARCHITECTURES
    ],
)
def test_pyrefts_example_as_it_stands(architecture: str, tokenizer: Any, tmp_path: Path) -> None:
    pyreft, model, device = rn, base_model(tokenizer, architecture), "cpu"
    # get reft model
    reft_config = pyreft.ReftConfig(
        representations={
            "layer": 2,
            "component": "block_output",
            "low_rank_dimension": 4,
            "intervention": pyreft.LoreftIntervention(
                embed_dim=model.config.hidden_size, low_rank_dimension=4
            ),
        }
    )
    reft_model = pyreft.get_reft_model(model, reft_config)
    reft_model.set_device(device)
    reft_model.print_trainable_parameters()
    before = weights(reft_model)

    data_module = pyreft.make_last_position_supervised_data_module(
        tokenizer, model, PROMPTS, COMPLETIONS
    )
    training_args = transformers.TrainingArguments(
        num_train_epochs=10.0,
        output_dir=str(tmp_path / "tmp"),
        per_device_train_batch_size=10,
        learning_rate=4e-3,
        logging_steps=20,
        report_to="none",
        disable_tqdm=True,
    )
    trainer = pyreft.ReftTrainerForCausalLM(
        model=reft_model, tokenizer=tokenizer, args=training_args, **data_module
    )
    first = trainer.evaluate(data_module["train_dataset"])["eval_loss"]
    _ = trainer.train()
    assert trainer.evaluate(data_module["train_dataset"])["eval_loss"] < first
    assert not torch.equal(weights(reft_model), before)

    prompt = tokenizer("Which dog is cuter?", return_tensors="pt").to(device)
    base_unit_location = prompt["input_ids"].shape[-1] - 1  # last position
    _, reft_response = reft_model.generate(
        prompt,
        unit_locations={"sources->base": (None, [[[base_unit_location]]])},
        intervene_on_prompt=True,
        max_new_tokens=8,
        do_sample=True,
        eos_token_id=tokenizer.eos_token_id,
        early_stopping=True,
    )
    assert reft_response.shape[1] <= prompt["input_ids"].shape[1] + 8
    print(tokenizer.decode(reft_response[0], skip_special_tokens=True))

    reft_model.set_device("cpu")
    reft_model.save(save_directory=str(tmp_path / "reft_to_share"))
    loaded = pyreft.ReftModel.load(
        str(tmp_path / "reft_to_share"), base_model(tokenizer, architecture)
    )
    with torch.no_grad():
        assert torch.equal(loaded(**prompt).logits, reft_model(**prompt).logits)


class SignedPattern(rn.SymNoiseIntervention):
    """SymNoise with a fixed pattern, so that every split of a batch perturbs a row alike."""

    def sample(self, like: Tensor, bound: float) -> Tensor:
        signs = torch.ones(like.shape[-1]).index_fill(0, torch.arange(0, 32, 3), -1.0)
        return (signs * bound).expand_as(like)


@pytest.mark.parametrize("noise", [None, "signed_pattern"])
def test_the_loss_weighs_tokens_alike_under_accumulation(
    noise: str | None, tokenizer: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(INTERVENTIONS, "signed_pattern", SignedPattern)
    entries = [loreft()] + ([{"intervention": noise, "alpha": 20.0}] if noise else [])
    stepped, losses = [], []
    for accumulation in (1, 2, 4):
        model = wrapped(tokenizer, *entries)
        args = arguments(
            tmp_path,
            per_device_train_batch_size=8 // accumulation,
            gradient_accumulation_steps=accumulation,
            max_steps=1,
            logging_steps=1,
            optim="sgd",
            max_grad_norm=0.0,
        )
        trainer = rn.ReftTrainer(model=model, args=args, **module(tokenizer, model))
        trainer.train()
        stepped.append(weights(model))
        losses.append(trainer.state.log_history[0]["loss"])
    start = weights(wrapped(tokenizer, *entries))
    for other in (1, 2):
        torch.testing.assert_close(stepped[other] - start, stepped[0] - start, atol=2e-7, rtol=1e-4)
        assert_close(losses[other], losses[0])

    # The mean over tokens, and over the pair, written out.
    model = wrapped(tokenizer, *entries).train()
    features = module(tokenizer, model)
    batch = features["data_collator"](list(features["train_dataset"]))
    embeds = model.get_input_embeddings()(batch["input_ids"])
    lengths = batch["attention_mask"].sum(1, keepdim=True)[..., None]
    signs = SignedPattern().sample(embeds, 1.0) * 20 / (lengths * 32) ** 0.5
    delta = signs * batch["attention_mask"][..., None] if noise else torch.zeros_like(embeds)
    plain = wrapped(tokenizer, loreft())
    total = 0.0
    for sign in (1, -1):
        logits = plain(
            inputs_embeds=embeds + sign * delta,
            attention_mask=batch["attention_mask"],
            prompt_lengths=batch["prompt_lengths"],
        ).logits
        total += torch.nn.functional.cross_entropy(
            logits[:, :-1].flatten(0, 1), batch["labels"][:, 1:].flatten()
        ).item()
    assert_close(losses[0], total / 2)


def test_evaluation_best_model_and_reporting(tokenizer: Any, tmp_path: Path) -> None:
    model = wrapped(tokenizer, loreft(dropout=0.1), {"intervention": "neftune"})
    args = arguments(
        tmp_path,
        max_steps=6,
        eval_strategy="steps",
        eval_steps=2,
        save_strategy="steps",
        save_steps=2,
        load_best_model_at_end=True,
        metric_for_best_model="loss",
        greater_is_better=True,  # the best is then known to be the first, not the last
        report_to="tensorboard",
        logging_steps=1,
        gradient_checkpointing=True,
    )
    data = module(tokenizer, model, eval_prompts=PROMPTS[:2], eval_completions=COMPLETIONS[:2])
    trainer = rn.ReftTrainerForCausalLM(model=model, args=args, processing_class=tokenizer, **data)
    trainer.train()
    best = Path(trainer.state.best_model_checkpoint)
    assert best.name == "checkpoint-2"
    assert {"reft_config.json", "reft_model.safetensors", "tokenizer.json"} <= {
        path.name for path in best.iterdir()
    }
    assert not list(best.glob("model*.safetensors"))
    loaded = rn.ReftModel.load(best, base_model(tokenizer))
    assert torch.equal(weights(loaded), weights(model))
    batch = data["data_collator"](list(data["eval_dataset"]))
    with torch.no_grad():
        assert torch.equal(loaded(**batch).logits, model.eval()(**batch).logits)
    assert list(tmp_path.rglob("events.out.tfevents*"))


def test_the_trainers_own_neftune_reaches_the_embedding(tokenizer: Any, tmp_path: Path) -> None:
    ended = []
    for alpha in (None, 50.0):
        model = wrapped(tokenizer)
        args = arguments(tmp_path, max_steps=2, neftune_noise_alpha=alpha)
        rn.ReftTrainer(model=model, args=args, **module(tokenizer, model)).train()
        ended.append(weights(model))
        assert not model.get_input_embeddings()._forward_hooks
    assert not torch.equal(*ended)


def test_any_trainer_trains_and_saves_the_adapter_alone(tokenizer: Any, tmp_path: Path) -> None:
    model = wrapped(tokenizer)
    args = arguments(tmp_path, max_steps=2, save_strategy="steps", save_steps=2)
    trainer = transformers.Trainer(model=model, args=args, **module(tokenizer, model))
    trainer.train()
    saved = tmp_path / "checkpoint-2" / "model.safetensors"
    assert saved.stat().st_size < 4 * weights(model).numel() + 4096
    again = wrapped(tokenizer)
    transformers.Trainer(
        model=again,
        args=arguments(tmp_path, max_steps=2),
        **module(tokenizer, again),
    ).train(resume_from_checkpoint=str(tmp_path / "checkpoint-2"))
    assert torch.equal(weights(again), weights(model))


def test_positions_do_not_change_when_labels_are_taken_away(tokenizer: Any, tmp_path: Path) -> None:
    lengths: list[list[int]] = []
    for smoothing in (0.0, 0.1):
        model = wrapped(tokenizer)
        data = module(tokenizer, model)
        plain = transformers.DataCollatorForSeq2Seq(tokenizer, model)
        forward = model.forward

        def spy(*args: Any, **inputs: Any) -> Any:
            lengths.append(inputs["prompt_lengths"].tolist())
            return forward(*args, **inputs)  # noqa: B023  # called within the loop

        model.forward = spy
        args = arguments(
            tmp_path, max_steps=1, label_smoothing_factor=smoothing, remove_unused_columns=False
        )
        dataset = data["train_dataset"].remove_columns("prompt_lengths")
        rn.ReftTrainer(model=model, args=args, train_dataset=dataset, data_collator=plain).train()
    assert lengths[0] == lengths[1]


@pytest.mark.parametrize("architecture", ["gpt2", "gpt_neo", "llama"])
def test_left_padding_trains_like_right_padding(architecture: str, tokenizer: Any) -> None:
    model = rn.get_reft_model(base_model(tokenizer, architecture), rn.ReftConfig(loreft()))
    losses, tokenizer = [], copy.deepcopy(tokenizer)
    for side in ("left", "right"):
        tokenizer.padding_side = side
        data = module(tokenizer, model)
        losses.append(model(**data["data_collator"](list(data["train_dataset"]))).loss)
    assert_close(*losses)


def test_noise_alone_trains_nothing_on_a_frozen_base(tokenizer: Any, tmp_path: Path) -> None:
    model = wrapped(tokenizer, {"intervention": "neftune"})
    args = arguments(tmp_path, max_steps=1)
    trainer = rn.ReftTrainer(model=model, args=args, **module(tokenizer, model))
    with pytest.raises(ValueError, match=r"^nothing is trained: .*disable_model_grads=False"):
        trainer.train()


def test_tokenizer_and_processing_class_are_one_argument(tokenizer: Any, tmp_path: Path) -> None:
    model = wrapped(tokenizer)
    with pytest.raises(ValueError, match="same argument"):
        rn.ReftTrainer(
            model=model, args=arguments(tmp_path), tokenizer=tokenizer, processing_class=tokenizer
        )


# -- resuming ----------------------------------------------------------------------------------


def test_a_killed_run_resumes_to_the_same_weights(tokenizer: Any, tmp_path: Path) -> None:
    whole = resumable_run(tmp_path / "whole", tokenizer)
    whole.train()
    directory = tmp_path / "killed"
    code = f"from support.trainer_runs import killed_run; killed_run({str(directory)!r})"
    paths = os.pathsep.join(filter(None, sys.path))
    environment = os.environ | {"PYTHONPATH": paths}
    killed = subprocess.run([sys.executable, "-c", code], env=environment, check=False)
    assert killed.returncode == -signal.SIGKILL
    assert {p.name for p in directory.glob("checkpoint-*")} == {"checkpoint-3", "checkpoint-6"}

    # A kill in the middle of a save leaves a checkpoint that must be passed over.
    (directory / "checkpoint-9").mkdir()
    (directory / "checkpoint-9" / "trainer_state.json").write_text('{"global_st')
    resumed = resumable_run(directory, tokenizer)
    with pytest.warns(UserWarning, match="checkpoint-9 incomplete, resuming from checkpoint-6"):
        resumed.train(resume_from_checkpoint=True)
    assert resumed.state.global_step == 12
    assert torch.equal(weights(resumed.model), weights(whole.model))
    for rotation in resumed.model.modules():
        if isinstance(rotation, rn.LowRankRotation):
            error = rotation() @ rotation().T - torch.eye(4)
            assert error.norm() < 1e-5


@pytest.mark.parametrize(
    ("entry", "difference"),
    [
        ({"positions": "l1"}, "positions is 'f1+l1', but the model has 'l1'"),
        ({"act_fn": "gelu"}, "act_fn is None, but the model has 'gelu'"),
        ({"dropout": 0.1}, "dropout is 0.2, but the model has 0.1"),
        ({"layer": 0}, "layer is 'all', but the model has 0"),
    ],
    ids=lambda value: str(value)[:12],
)
def test_a_checkpoint_of_another_config_is_refused(
    entry: dict[str, Any], difference: str, tokenizer: Any, tmp_path: Path
) -> None:
    arguments_ = arguments(tmp_path, max_steps=2, save_strategy="steps", save_steps=1)
    model = wrapped(tokenizer, loreft(dropout=0.2))
    rn.ReftTrainer(model, arguments_, **module(tokenizer, model)).train()
    model = wrapped(tokenizer, loreft(**{"dropout": 0.2} | entry))
    before = weights(model)
    trainer = rn.ReftTrainer(model, arguments_, **module(tokenizer, model))
    place = f"checkpoint-2/reft_config.json: representations[0].{difference}"
    with pytest.raises(ValueError, match=re.escape(place)):
        trainer.train(resume_from_checkpoint=True)
    assert torch.equal(weights(model), before)


class Poison(transformers.TrainerCallback):
    """Makes a unit's weights infinite, as a step that is too long does."""

    def __init__(self, step: int) -> None:
        self.step = step

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if state.global_step == self.step:
            rotation = next(
                m for m in kwargs["model"].modules() if isinstance(m, rn.LowRankRotation)
            )
            rotation.weight.data[0, 0] = float("inf")


@pytest.mark.parametrize(
    "settings",
    [{}, {"logging_nan_inf_filter": False}, {"save_steps": 100}],
    ids=["", "losses are not read", "nothing is saved"],
)
def test_a_diverged_training_stops_at_its_step_and_unit(
    settings: dict[str, Any], tokenizer: Any, tmp_path: Path
) -> None:
    model = wrapped(tokenizer)
    saving = {"save_strategy": "steps", "save_steps": 2, "logging_steps": 1000}
    args = arguments(tmp_path, max_steps=12, **saving | settings)
    trainer = rn.ReftTrainer(model, args, callbacks=[Poison(5)], **module(tokenizer, model))
    with pytest.raises(
        ValueError, match=r"^training diverged at step \d+: interventions\."
    ) as error:
        trainer.train()
    message = str(error.value)
    assert "at step 6:" in message
    assert "is not finite; lower learning_rate (0.01) or max_grad_norm (1)" in message
    saved = ["checkpoint-2", "checkpoint-4"] if trainer.args.save_steps == 2 else []
    assert sorted(path.name for path in tmp_path.glob("checkpoint-*")) == saved
    assert not saved or message.endswith(f"the last good checkpoint is {tmp_path}/checkpoint-4")


def test_a_start_with_dependent_rows_of_r_stops_at_its_unit(tokenizer: Any, tmp_path: Path) -> None:
    model = wrapped(tokenizer)
    rotation = next(m for m in model.modules() if isinstance(m, rn.LowRankRotation))
    rotation.weight.data.zero_()
    trainer = rn.ReftTrainer(model, arguments(tmp_path, max_steps=4), **module(tokenizer, model))
    with pytest.raises(ValueError, match=r"^training diverged at step \d: interventions\."):
        trainer.train()


def test_single_losses_that_are_not_finite_stop_nothing(tokenizer: Any, tmp_path: Path) -> None:
    class Trainer(rn.ReftTrainer):
        def training_step(self, *args: Any, **kwargs: Any) -> Tensor:
            loss = super().training_step(*args, **kwargs)
            lost = self.state.global_step in lost_steps
            return loss * float("nan") if lost else loss

        def compute_loss(self, *args: Any, **kwargs: Any) -> Any:
            loss = super().compute_loss(*args, **kwargs)
            return loss + float("inf") if self.state.global_step in lost_steps else loss

    for lost_steps in ({1, 4}, set(range(2, 30))):
        model = wrapped(tokenizer)
        trainer = Trainer(model, arguments(tmp_path, max_steps=14), **module(tokenizer, model))
        if len(lost_steps) == 2:
            trainer.train()
            continue
        with pytest.raises(ValueError, match="step 12: the loss was not finite in 10 batches"):
            trainer.train()


def cached_run(directory: Path, cache: rn.PrefixCache | str, stop: int = 0) -> rn.ReftTrainer:
    """Three epochs on the embedded model, whose kernels round by the shape of a batch."""

    class Interrupt(transformers.TrainerCallback):
        def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
            if state.global_step == stop:
                raise KeyboardInterrupt

    transformers.set_seed(0)
    model, tokenizer = rn.load_tiny_model()
    reft_model = rn.get_reft_model(model, rn.ReftConfig([loreft(positions="l1")]))
    examples = rn.load_tiny_examples("train")[:16]
    data = rn.make_last_position_supervised_data_module(
        tokenizer,
        reft_model,
        [example.prompt for example in examples],
        [example.completion for example in examples],
        chat_template=True,
    )
    args = arguments(directory, max_steps=11, save_strategy="steps", save_steps=5, use_cpu=True)
    return rn.ReftTrainer(reft_model, args, prefix_cache=cache, callbacks=[Interrupt()], **data)


@pytest.mark.parametrize(("place", "blocks"), [("memory", 2**10), ("disk", 10)])
def test_kept_prompts_resume_to_the_same_weights(place: Any, blocks: int, tmp_path: Path) -> None:
    base = rn.load_tiny_model()[0].config
    size = 2 * base.num_hidden_layers * base.num_key_value_heads * base.head_dim * 4 * BLOCK
    whole, killed, resumed = (rn.PrefixCache(place, blocks * size, tmp_path) for _ in range(3))
    unbroken = cached_run(tmp_path / "whole", whole)
    unbroken.train()
    with pytest.raises(KeyboardInterrupt):
        cached_run(tmp_path / "run", killed, stop=7).train()
    trainer = cached_run(tmp_path / "run", resumed)
    trainer.train(resume_from_checkpoint=True)
    assert torch.equal(weights(trainer.model), weights(unbroken.model))
    assert (resumed.hits, resumed.misses) == (whole.hits, whole.misses)
    assert (whole.misses > 16) == (blocks == 10)  # as prompts were evicted


def test_a_checkpoint_without_the_kept_prompts_says_so(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    with pytest.raises(KeyboardInterrupt):
        cached_run(tmp_path, "none", stop=6).train()
    with caplog.at_level("WARNING", "reftnoise"), pytest.raises(KeyboardInterrupt):
        cached_run(tmp_path, "memory", stop=6).train(resume_from_checkpoint=True)
    assert "no prefix_cache_0.pt in it; prompts are computed in other batches" in caplog.text


def test_resuming_without_a_checkpoint_says_so(tokenizer: Any, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="no complete checkpoint to resume from"):
        resumable_run(tmp_path, tokenizer).train(resume_from_checkpoint=True)


def test_checkpoints_hold_the_config(tokenizer: Any, tmp_path: Path) -> None:
    resumable_run(tmp_path, tokenizer).train()
    saved = json.loads((tmp_path / "checkpoint-12" / "reft_config.json").read_text())
    first, second = saved["representations"]
    assert (first["dropout"], first["positions"]) == (0.2, "f1+l1")
    assert (second["intervention"], second["alpha"]) == ("symnoise", 5.0)


# -- cheaper passes --------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("entry", "prefix_cache"),
    [
        ({}, "memory"),
        ({"positions": "l1"}, "disk"),
        pytest.param({}, "disk", marks=slow),
        pytest.param({"positions": "l1"}, "memory", marks=slow),
    ],
)
def test_a_run_with_every_saving_ends_with_the_same_weights(
    entry: dict[str, str], prefix_cache: str, tokenizer: Any, tmp_path: Path
) -> None:
    trained = []
    kept: dict[str, Any] = {"split": "always" if entry else "auto", "prefix_cache": prefix_cache}
    for options in ({"split": "never"}, {}, kept):
        model = wrapped(tokenizer, loreft(**entry))
        args = arguments(tmp_path, num_train_epochs=3, optim="sgd", seed=3)
        trainer = rn.ReftTrainer(model=model, args=args, **module(tokenizer, model), **options)
        trainer.train()
        trained.append(weights(model))
    start = weights(wrapped(tokenizer, loreft(**entry)))
    for other in trained[1:]:
        torch.testing.assert_close(other - start, trained[0] - start, rtol=1e-3, atol=1e-6)
    cache = trainer._prefix_cache
    assert cache.misses + cache.hits == (3 * 8 if entry else 0)
    assert cache.misses <= 8  # four prompts, each in the first two batches
    assert model.prefix_cache is None  # as it was, and its memory given back
    assert cache.nbytes == 0


def test_what_the_model_is_told_stays(tokenizer: Any, tmp_path: Path) -> None:
    model = wrapped(tokenizer, loreft(positions="l1"))
    model.split, model.prefix_cache = "always", rn.PrefixCache()
    args = arguments(tmp_path, max_steps=3)
    rn.ReftTrainer(model=model, args=args, **module(tokenizer, model)).train()
    assert model.split == "always"
    assert model.prefix_cache.misses > 0
    given = rn.PrefixCache("disk", 2**20, tmp_path)
    trainer = rn.ReftTrainer(model=model, args=args, prefix_cache=given, **module(tokenizer, model))
    trainer.train()
    assert len(given) > 0  # they stay for others on the same base


def test_training_computes_no_logits_and_evaluation_has_them(
    tokenizer: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen: list[Any] = []

    class Watching(rn.ReftTrainer):
        def compute_loss(self, model: Any, inputs: Any, *args: Any, **kwargs: Any) -> Any:
            seen.append(super().compute_loss(model, inputs, return_outputs=True)[1])
            return super().compute_loss(model, inputs, *args, **kwargs)

    model = wrapped(tokenizer)
    forward, kept = rn.ReftModel.forward, []

    @functools.wraps(forward)  # a Trainer looks at its arguments
    def watched(self: rn.ReftModel, *inputs: Any, **named: Any) -> Any:
        kept.append((self.training, named.get("return_logits")))
        return forward(self, *inputs, **named)

    monkeypatch.setattr(rn.ReftModel, "forward", watched)
    args = arguments(tmp_path, max_steps=1)
    data = module(tokenizer, model)
    trainer = Watching(
        model=model,
        args=args,
        compute_metrics=lambda found: {"columns": found.predictions.shape[-1]},
        **data | {"eval_dataset": data["train_dataset"]},
    )
    trainer.train()
    assert kept == [(True, None), (True, False)]
    assert trainer.evaluate()["eval_columns"] == len(tokenizer)
    assert seen[0].logits.shape[-1] == len(tokenizer)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"split": "maybe"}, "split 'maybe': expected 'auto', 'always' or 'never'"),
        ({"prefix_cache": "gpu"}, "prefix cache 'gpu': expected 'memory' or 'disk'"),
        ({"prefix_cache": "disk", "prefix_cache_bytes": -1}, "max_bytes -1: expected a positive"),
    ],
)
def test_savings_that_do_not_exist(
    options: dict[str, Any], message: str, tokenizer: Any, tmp_path: Path
) -> None:
    with pytest.raises(ValueError, match=message):
        rn.ReftTrainer(model=wrapped(tokenizer), args=arguments(tmp_path), **options)


def test_batches_grouped_by_length_hold_less_padding(tokenizer: Any, tmp_path: Path) -> None:
    padding = {}
    texts = ["What is it? " * (1 + 7 * n % 12) for n in range(60)]
    for strategy in ("random", "group_by_length"):
        model = wrapped(tokenizer)
        args = arguments(tmp_path, train_sampling_strategy=strategy, per_device_train_batch_size=2)
        data = rn.make_last_position_supervised_data_module(tokenizer, model, texts, ["🐟"] * 60)
        trainer = rn.ReftTrainer(model=model, args=args, **data)
        masks = [batch["attention_mask"] for batch in trainer.get_train_dataloader()]
        padding[strategy] = sum(int((mask == 0).sum()) for mask in masks)
    assert padding["group_by_length"] < padding["random"] / 2


def test_half_precision_training_and_evaluation(tokenizer: Any, tmp_path: Path) -> None:
    model = wrapped(tokenizer, loreft(positions="l1"))
    data = module(tokenizer, model)
    args = arguments(tmp_path, bf16=True, use_cpu=True, num_train_epochs=5, logging_steps=10)
    trainer = rn.ReftTrainer(
        model=model,
        args=args,
        compute_metrics=lambda found: {"columns": found.predictions.shape[-1]},
        **data | {"eval_dataset": data["train_dataset"]},
    )
    before = trainer.evaluate()
    trainer.train()
    after = trainer.evaluate()
    assert after["eval_loss"] < before["eval_loss"]
    assert after["eval_columns"] == len(tokenizer)
    plain = transformers.Trainer(
        model=model,
        args=args,
        data_collator=data["data_collator"],
        eval_dataset=data["train_dataset"],
    )
    assert plain.evaluate()["eval_loss"] == pytest.approx(after["eval_loss"], rel=1e-2)
