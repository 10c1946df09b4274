"""LoReFT in TRL's GRPOTrainer: answers are sampled, and those that name a word are rewarded.

    python examples/trl/grpo.py
    python examples/trl/grpo.py --word red
    python examples/trl/grpo.py --model MODEL --data DATA.jsonl --word WORD --output adapter

Data: lines of {"prompt"}, messages. Answers are sampled with the units on the prompt, and scored
with the same units on the same tokens. The model itself samples; in grpo_vllm.py, vLLM does.
"""

import tempfile
from typing import Any

import torch
from jsonargparse import auto_cli
from questions import colours
from stages import be_quiet, show_bar
from transformers import AutoModelForCausalLM, AutoTokenizer, set_seed
from trl import GRPOConfig, GRPOTrainer

import reftnoise as rn
from reftnoise.engine.base.tiny import DIRECTORY


def main(
    model: str = str(DIRECTORY),
    data: str | None = None,
    word: str = "green",
    steps: int = 15,
    learning_rate: float = 4e-3,
    length: int = 10,
    output: str | None = None,
) -> None:
    """Train, and print the mean reward of every step.

    Args:
        model: directory or hub name of the base.
        data: a JSONL file.
        word: an answer that holds it gets the reward 1, another one 0.
        steps: of the optimizer, of 32 answers, 8 to a prompt.
        learning_rate: learning rate of AdamW, falling linearly to 0.
        length: greatest number of tokens of an answer.
        output: where to save the adapter.
    """
    train(model, data, word, steps, learning_rate, length, output)


def train(
    model: str,
    data: str | None,
    word: str,
    steps: int,
    learning_rate: float,
    length: int,
    output: str | None,
    rollouts: Any = None,
) -> float:
    """Train and print as `main` does; `rollouts` samples the answers, by default the model itself.

    Returns:
        The seconds that training took.
    """

    def holds_word(completions: list[list[dict[str, str]]], **_columns: Any) -> list[float]:
        return [float(word in completion[0]["content"]) for completion in completions]

    be_quiet()
    set_seed(0)
    base = AutoModelForCausalLM.from_pretrained(model, dtype=torch.float32)
    loreft = {"layer": "all", "intervention": "loreft", "low_rank_dimension": 4, "positions": "l1"}
    reft_model = rn.get_reft_model(base, rn.ReftConfig([loreft]))
    with tempfile.TemporaryDirectory() as scratch:
        args = GRPOConfig(
            output_dir=scratch,
            max_steps=steps,
            learning_rate=learning_rate,
            per_device_train_batch_size=32,
            num_generations=8,
            max_completion_length=length,
            logging_steps=1,
            bf16=torch.cuda.is_available(),
            report_to="none",
            save_strategy="no",
            disable_tqdm=True,
            dataloader_pin_memory=torch.cuda.is_available(),
        )
        trainer = GRPOTrainer(
            reft_model,
            reward_funcs=holds_word,
            args=args,
            train_dataset=colours(data),
            processing_class=AutoTokenizer.from_pretrained(model),
            rollout_func=rollouts,
        )
        show_bar(trainer, "training")
        trainer.train()
    *log, summary = trainer.state.log_history
    for entry in log:
        print(f"step {entry['step']:3d}  reward {entry['reward']:.3f}")
    if output is not None:
        reft_model.eval().save_pretrained(output)
    return float(summary["train_runtime"])


if __name__ == "__main__":
    auto_cli(main, as_positional=False)
