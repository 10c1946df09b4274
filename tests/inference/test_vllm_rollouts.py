"""Answers of a running vLLM for GRPO: whose edits they have, how likely they are, what stays."""

import json
import runpy
import urllib.request
import warnings
from collections.abc import Iterator
from importlib.util import find_spec
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from accelerate import Accelerator
from datasets import Dataset
from transformers import set_seed

import reftnoise as rn
from reftnoise.engine.base.tiny import DIRECTORY
from reftnoise.inference.vllm.rollouts import VllmRollouts
from support.vllm_server import NEEDS_VLLM, saved_base, served_base

EXAMPLES = Path(__file__).parents[2] / "examples" / "trl"
QUESTIONS = ["Name a colour.", "Which colour?", "What colour is it?", "Tell me a colour."]
PROMPTS = [[{"role": "user", "content": text}] for text in QUESTIONS]
LOREFT = {"layer": "all", "intervention": "loreft", "low_rank_dimension": 4, "positions": "l1"}

needs_vllm = pytest.mark.skipif(find_spec("vllm") is None, reason=NEEDS_VLLM)

OPTIONS = ("--max-model-len", "128", "--block-size", "32")


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    folder = tmp_path_factory.mktemp("rollouts")
    with served_base(saved_base(folder / "base"), folder / "server.txt", *OPTIONS) as (url, _):
        yield url


def models_of(server: str) -> list[str]:
    with urllib.request.urlopen(f"{server}/v1/models", timeout=60) as answer:
        return [model["id"] for model in json.load(answer)["data"]]


def log_probs(reft_model: Any, prompt: list[int], completion: list[int]) -> torch.Tensor:
    """Of a completion's tokens, by the model that is trained, with its edits at the prompt."""
    with torch.no_grad():
        logits = reft_model(
            input_ids=torch.tensor([prompt + completion]),
            attention_mask=torch.ones(1, len(prompt) + len(completion), dtype=torch.long),
            prompt_lengths=torch.tensor([len(prompt)]),
        ).logits[0, len(prompt) - 1 : -1]
    return logits.log_softmax(-1).gather(1, torch.tensor(completion)[:, None])[:, 0]


@needs_vllm
@pytest.mark.filterwarnings("ignore:You are using 'rollout_func'")
def test_grpo_learns_from_answers_of_the_trained_edits(server: str, tmp_path: Path) -> None:
    pytest.importorskip("trl")
    with warnings.catch_warnings(action="ignore"):  # of its versions of vLLM, which it does not use
        from trl import GRPOConfig, GRPOTrainer
    set_seed(0)
    reft_model = rn.get_reft_model(rn.load_tiny_model()[0], rn.ReftConfig([LOREFT]))
    _, tokenizer = rn.load_tiny_model()
    differences, served = [], []
    with VllmRollouts(server, tmp_path / "versions", name="run") as rollouts:

        def compared(prompts: list[Any], trainer: Any) -> dict[str, list[Any]]:
            answers = rollouts(prompts, trainer)
            served.append((trainer.state.global_step, models_of(server)))
            for prompt, completion, values in zip(*answers.values(), strict=True):
                ours = log_probs(reft_model, prompt, completion)
                differences.append(float((ours - torch.tensor(values)).abs().max()))
            return answers

        def is_green(completions: list[Any], **_columns: Any) -> list[float]:
            return [float("green" in completion[0]["content"]) for completion in completions]

        trainer = GRPOTrainer(
            reft_model,
            reward_funcs=is_green,
            args=GRPOConfig(
                output_dir=str(tmp_path / "run"),
                max_steps=12,
                learning_rate=4e-3,
                per_device_train_batch_size=32,
                num_generations=8,
                max_completion_length=10,
                logging_steps=1,
                bf16=False,
                report_to="none",
                save_strategy="no",
                disable_tqdm=True,
                dataloader_pin_memory=False,
            ),
            train_dataset=Dataset.from_list([{"prompt": prompt} for prompt in PROMPTS]),
            processing_class=tokenizer,
            rollout_func=compared,
        )
        trainer.train()
    rewards = [entry["reward"] for entry in trainer.state.log_history[:-1]]
    assert sum(rewards[-4:]) / 4 > sum(rewards[:4]) / 4 + 0.2, rewards
    assert len(differences) == 12 * 32
    assert max(differences) < 1e-3
    # Each step has a name of its own; the one before is gone.
    assert served == [(step, ["base", f"run-{step}"]) for step in range(12)]
    assert models_of(server) == ["base"]
    assert not list((tmp_path / "versions").iterdir())
    assert 0 < rollouts.sync_seconds < rollouts.sampling_seconds


@needs_vllm
@pytest.mark.filterwarnings("ignore:You are using 'rollout_func'")
def test_the_example(
    server: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    pytest.importorskip("trl")
    monkeypatch.syspath_prepend(str(EXAMPLES))
    main = runpy.run_path(str(EXAMPLES / "grpo_vllm.py"))["main"]
    output, versions = str(tmp_path / "adapter"), str(tmp_path / "versions")
    main(model=str(DIRECTORY), server=server, steps=2, versions=versions, output=output)
    assert "handing edits to the server" in capsys.readouterr().out
    rn.ReftModel.from_pretrained(rn.load_tiny_model()[0], output)


def trainer_of(model: Any, **arguments: Any) -> Any:
    """What of a trainer is read."""
    args = {"seed": 0, "temperature": 1.0, "top_p": 1.0, "top_k": 0, "min_p": None}
    args |= {"repetition_penalty": 1.0, "max_completion_length": 6, "generation_kwargs": None}
    return SimpleNamespace(
        model=model,
        args=SimpleNamespace(**args | arguments),
        state=SimpleNamespace(global_step=0),
        accelerator=Accelerator(cpu=True),
        processing_class=rn.load_tiny_model()[1],
        chat_template_kwargs={},
    )


@needs_vllm
def test_completions_follow_the_seed_and_the_arguments(server: str, tmp_path: Path) -> None:
    reft_model = rn.get_reft_model(rn.load_tiny_model()[0], rn.ReftConfig([LOREFT]))
    prompts = [PROMPTS[0]] * 4 + [PROMPTS[1]] * 4
    drawn = []
    for seed in (0, 0, 1):
        with VllmRollouts(server, tmp_path, name="seeds") as rollouts:
            drawn.append(rollouts(prompts, trainer_of(reft_model, seed=seed)))
    assert drawn[0]["completion_ids"] == drawn[1]["completion_ids"]
    assert drawn[0]["completion_ids"] != drawn[2]["completion_ids"]
    assert len({tuple(ids) for ids in drawn[0]["completion_ids"][:4]}) > 1
    with VllmRollouts(server, tmp_path, name="greedy") as rollouts:
        greedy = rollouts(prompts, trainer_of(reft_model, generation_kwargs={"top_k": 1}))
    assert len({tuple(ids) for ids in greedy["completion_ids"]}) <= 2
    with VllmRollouts(server, tmp_path, name="text") as rollouts:
        texts = rollouts(QUESTIONS, trainer_of(reft_model))
    tokenizer = rn.load_tiny_model()[1]
    assert texts["prompt_ids"] == [tokenizer(text)["input_ids"] for text in QUESTIONS]


@needs_vllm
@pytest.mark.slow
def test_two_engines_have_the_edits(tmp_path: Path) -> None:
    torch.manual_seed(0)
    reft_model = rn.get_reft_model(rn.load_tiny_model()[0], rn.ReftConfig([LOREFT]))
    with torch.no_grad():
        for parameter in reft_model.interventions.parameters():
            parameter.add_(0.3 * torch.randn_like(parameter))
    options = (*OPTIONS, "--data-parallel-size", "2")
    with (
        served_base(saved_base(tmp_path / "base"), tmp_path / "server.txt", *options) as (url, _),
        VllmRollouts(url, tmp_path) as rollouts,
    ):
        answers = rollouts([*PROMPTS, *QUESTIONS] * 3, trainer_of(reft_model.eval()))
    for prompt, completion, values in zip(*answers.values(), strict=True):
        ours = log_probs(reft_model, prompt, completion)
        torch.testing.assert_close(ours, torch.tensor(values), rtol=0, atol=1e-3)


@needs_vllm
def test_a_refused_adapter_is_an_error(server: str, tmp_path: Path) -> None:
    unserved = LOREFT | {"component": "mlp_output"}
    reft_model = rn.get_reft_model(rn.load_tiny_model()[0], rn.ReftConfig([unserved]))
    with (
        VllmRollouts(server, tmp_path, name="mlp") as rollouts,
        pytest.raises(ValueError, match="mlp_output"),
    ):
        rollouts(PROMPTS, trainer_of(reft_model))
    assert models_of(server) == ["base"]


def test_a_server_that_is_not_there_is_named(tmp_path: Path) -> None:
    reft_model = rn.get_reft_model(rn.load_tiny_model()[0], rn.ReftConfig([LOREFT]))
    rollouts = VllmRollouts("http://127.0.0.1:9/v1", tmp_path)
    with pytest.raises(
        ConnectionError, match=r"http://127\.0\.0\.1:9/v1/load_lora_adapter: no answer"
    ):
        rollouts(PROMPTS, trainer_of(reft_model))
    with pytest.raises(ValueError, match="model Linear: expected a ReftModel"):
        rollouts(PROMPTS, trainer_of(torch.nn.Linear(2, 2)))
