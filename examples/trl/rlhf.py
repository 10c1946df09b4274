"""Supervised training, a reward model, reinforcement learning and distillation, on edits alone.

    python examples/trl/rlhf.py
    python examples/trl/rlhf.py --model smollm2 --algorithm rloo
    python examples/trl/rlhf.py --model MODEL --answers SFT.jsonl --pairs PREFERENCES.jsonl

One base is in memory, frozen, with four small adapters:

1. `supervised`: TRL's SFTTrainer on answers, {"prompt", "completion"};
2. `reward`: TRL's RewardTrainer on pairs, {"prompt", "chosen", "rejected"}: edits and a head of one
   score on the base's own layers;
3. `reinforced`: GRPO or RLOO from the first on, with the second's scores as reward;
4. `distilled`: TRL's DistillationTrainer, a smaller edit that learns from the third.

Rows hold messages, as the embedded questions do, which are the default. The end is a table of
scores and of answers.
"""

import copy
import tempfile
from pathlib import Path
from typing import Any, Literal

import torch
from jsonargparse import auto_cli
from questions import preferences, says, supervised
from rich.console import Console
from rich.table import Table
from stages import be_quiet, show_bar
from torch import nn
from transformers import AutoModelForSequenceClassification, set_seed
from trl import (
    DistillationConfig,
    DistillationTrainer,
    GRPOConfig,
    GRPOTrainer,
    RewardConfig,
    RewardTrainer,
    RLOOConfig,
    RLOOTrainer,
    SFTConfig,
    SFTTrainer,
)

import reftnoise as rn

Messages = list[dict[str, str]]


def main(
    model: str = "tiny-chat",
    answers: str | None = None,
    pairs: str | None = None,
    algorithm: Literal["grpo", "rloo"] = "grpo",
    steps: tuple[int, int, int, int] = (6, 20, 20, 30),
    learning_rate: float = 4e-3,
    length: int = 12,
    questions: list[str] | None = None,
    output: str = "rlhf",
) -> None:
    """Train the four adapters, score them, and let them answer.

    Args:
        model: directory or hub name of the base, tiny-chat or smollm2.
        answers: a JSONL file of answers.
        pairs: a JSONL file of pairs of answers.
        algorithm: algorithm of the reinforcement.
        steps: numbers of steps of the four trainings.
        learning_rate: learning rate of AdamW, falling linearly to 0.
        length: greatest number of tokens of an answer.
        questions: questions for the table, by default unseen embedded ones.
        output: folder of the adapters.
    """
    be_quiet()
    set_seed(0)
    base, tokenizer = rn.load_base(model, dtype="float32")
    tokenizer.padding_side = "left"
    rows, places = supervised(answers), Path(output)
    prompts = rows.select_columns(["prompt"])
    with tempfile.TemporaryDirectory() as scratch:
        settings: dict[str, Any] = {
            "output_dir": scratch,
            "learning_rate": learning_rate,
            "bf16": torch.cuda.is_available(),
            "report_to": "none",
            "save_strategy": "no",
            "disable_tqdm": True,
            "dataloader_pin_memory": torch.cuda.is_available(),
        }
        policy = rn.get_reft_model(base, edits("l1", rank=4))
        args = SFTConfig(max_steps=steps[0], **settings)
        trainer = SFTTrainer(policy, args=args, train_dataset=rows, processing_class=tokenizer)
        show_bar(trainer, "supervised")
        trainer.train()
        policy.eval().save_pretrained(places / "supervised")

        reward = rn.get_reft_model(scorer_of(base, tokenizer), edits("f2+l2", rank=4, head="score"))
        args = RewardConfig(max_steps=steps[1], **settings)
        trainer = RewardTrainer(
            reward, args=args, train_dataset=preferences(pairs), processing_class=tokenizer
        )
        show_bar(trainer, "reward")
        trainer.train()
        reward.eval().save_pretrained(places / "reward")

        def rewards(prompts: list[Messages], completions: list[Messages], **_: Any) -> list[float]:
            return scores(
                reward, tokenizer, [p + c for p, c in zip(prompts, completions, strict=True)]
            )

        sampling = {"max_completion_length": length, "num_generations": 8}
        kinds = {"grpo": (GRPOConfig, GRPOTrainer), "rloo": (RLOOConfig, RLOOTrainer)}
        config_class, trainer_class = kinds[algorithm]
        args = config_class(
            max_steps=steps[2], per_device_train_batch_size=32, **sampling, **settings
        )
        trainer = trainer_class(
            policy.train(),
            reward_funcs=rewards,
            args=args,
            train_dataset=prompts,
            processing_class=tokenizer,
        )
        show_bar(trainer, "reinforced")
        trainer.train()
        policy.eval().save_pretrained(places / "reinforced")

        student = rn.get_reft_model(base, edits("l1", rank=1))
        args = DistillationConfig(max_steps=steps[3], max_completion_length=length, **settings)
        trainer = DistillationTrainer(
            student,
            teacher_model=policy,
            args=args,
            train_dataset=prompts,
            processing_class=tokenizer,
        )
        show_bar(trainer, "distilled")
        trainer.train()
        student.eval().save_pretrained(places / "distilled")

    asked = questions or [example.prompt for example in rn.load_tiny_examples("test")]
    reft_model = rn.get_reft_model(base).eval()  # the bare base, and the adapters by name
    names = ["supervised", "reinforced", "distilled"]
    for trained in names:
        reft_model.load_adapter(places / trained, trained)
    console, table = Console(), Table("", "mean reward", asked[0])
    for name in [None, *names]:
        written = answered(reft_model, tokenizer, asked, name, length)
        scored = scores(reward, tokenizer, written)
        said = written[0][-1]["content"]
        table.add_row(name or "base", f"{sum(scored) / len(scored):.2f}", said)
    console.print(table)


def edits(positions: str, rank: int, head: str | None = None) -> rn.ReftConfig:
    """LoReFT at all layers, and a head that is trained with it."""
    unit = {"layer": "all", "intervention": "loreft", "low_rank_dimension": rank}
    trained = None if head is None else [head]
    return rn.ReftConfig([unit | {"positions": positions}], modules_to_save=trained)


def scorer_of(base: Any, tokenizer: Any) -> Any:
    """A model of one score whose layers are the base's own, not copies; its head is new."""
    config = copy.deepcopy(base.config)
    config.num_labels, config.pad_token_id = 1, tokenizer.pad_token_id
    with torch.device("meta"):  # no memory for what is replaced
        scorer = AutoModelForSequenceClassification.from_config(config)
    setattr(scorer, scorer.base_model_prefix, base.base_model)
    scorer.score = nn.Linear(config.hidden_size, 1, bias=False, dtype=base.dtype)
    nn.init.normal_(scorer.score.weight, std=config.initializer_range)
    return scorer.to(base.device)


@torch.no_grad()
def scores(reward: rn.ReftModel, tokenizer: Any, conversations: list[Messages]) -> list[float]:
    """The reward model's score of each conversation."""
    batch = tokenizer.apply_chat_template(
        conversations, tokenize=True, return_dict=True, return_tensors="pt", padding=True
    )
    logits = reward.eval()(**batch.to(reward.device)).logits
    return logits[:, 0].float().tolist()


def answered(
    reft_model: rn.ReftModel, tokenizer: Any, asked: list[str], name: str | None, length: int
) -> list[Messages]:
    """Questions with the greedy answers of an adapter."""
    prompts = [says("user", question) for question in asked]
    batch = tokenizer.apply_chat_template(
        prompts, add_generation_prompt=True, return_dict=True, return_tensors="pt", padding=True
    ).to(reft_model.device)
    tokens = reft_model.generate(
        **batch, adapter_names=[name] * len(asked), max_new_tokens=length, do_sample=False
    )
    width = batch["input_ids"].shape[1]
    texts = tokenizer.batch_decode(tokens[:, width:], skip_special_tokens=True)
    return [p + says("assistant", text) for p, text in zip(prompts, texts, strict=True)]


if __name__ == "__main__":
    auto_cli(main, as_positional=False)
