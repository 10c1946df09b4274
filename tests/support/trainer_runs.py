"""Runs of the Trainer on a tiny model with the embedded tokenizer."""

import os
import signal
from pathlib import Path
from typing import Any

import torch
import transformers
from torch import Tensor
from transformers import TrainingArguments, set_seed

import reftnoise as rn
from reftnoise.engine.base.tiny import DIRECTORY
from support.models.architectures import tiny_model

PROMPTS = ["Where does a fish live?", "What is it?", "What colour is the big banana?", "Who?"] * 2
COMPLETIONS = ["🐟", "🌊🌊", "🍌🟡 and more words", "🤖💬🌐🧠"] * 2


def base_model(tokenizer: Any, architecture: str = "llama") -> Any:
    special = {f"{n}_token_id": getattr(tokenizer, f"{n}_token_id") for n in ("pad", "bos", "eos")}
    return tiny_model(architecture, vocab_size=len(tokenizer), **special)


def loreft(**entry: Any) -> dict[str, Any]:
    defaults = {"layer": "all", "intervention": "loreft", "low_rank_dimension": 4}
    return defaults | {"positions": "f1+l1"} | entry


def wrapped(tokenizer: Any, *entries: dict[str, Any]) -> rn.ReftModel:
    base = base_model(tokenizer)
    set_seed(1)
    return rn.get_reft_model(base, rn.ReftConfig(representations=list(entries) or [loreft()]))


def arguments(directory: Path, **settings: Any) -> TrainingArguments:
    defaults = {
        "output_dir": str(directory),
        "per_device_train_batch_size": 4,
        "learning_rate": 1e-2,
        "report_to": "none",
        "disable_tqdm": True,
        "save_strategy": "no",
    }
    return TrainingArguments(**(defaults | settings))


def module(tokenizer: Any, model: Any, **settings: Any) -> dict[str, Any]:
    return rn.make_last_position_supervised_data_module(
        tokenizer, model, PROMPTS, COMPLETIONS, **settings
    )


def weights(model: rn.ReftModel) -> Tensor:
    return torch.cat([p.detach().flatten() for p in model.interventions.parameters()])


def resumable_run(directory: Path, tokenizer: Any, callbacks: Any = None) -> rn.ReftTrainer:
    model = wrapped(tokenizer, loreft(dropout=0.2), {"intervention": "symnoise"})
    args = arguments(
        directory,
        per_device_train_batch_size=2,
        max_steps=12,
        save_strategy="steps",
        save_steps=3,
        weight_decay=0.1,
        warmup_steps=2,
        seed=3,
    )
    return rn.ReftTrainer(model=model, args=args, callbacks=callbacks, **module(tokenizer, model))


class KillAtStep(transformers.TrainerCallback):
    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if state.global_step == 8:
            os.kill(os.getpid(), signal.SIGKILL)


def killed_run(directory: str) -> None:
    """Run in a process of its own, which ends by a signal in the middle of training."""
    torch.set_num_threads(1)  # as the tests do: sums over other chunks round otherwise
    tokenizer = transformers.AutoTokenizer.from_pretrained(DIRECTORY)
    resumable_run(Path(directory), tokenizer, [KillAtStep()]).train()
