"""LoReFT in TRL's GRPOTrainer, with answers that a running vLLM samples.

    VLLM_ALLOW_RUNTIME_LORA_UPDATING=1 vllm serve BASE --dtype float32 \\
        --additional-config '{"reft": ["block_output"]}'
    python examples/trl/grpo_vllm.py --model BASE

The server keeps the base; after each step it gets the trained edits, as an adapter under a name of
this step. It must be able to read the folder `versions`. Answers that name a word are rewarded.
"""

import tempfile
from typing import Any

import torch
from jsonargparse import auto_cli
from questions import colours
from transformers import AutoModelForCausalLM, AutoTokenizer, set_seed
from trl import GRPOConfig, GRPOTrainer

import reftnoise as rn
from reftnoise.inference.vllm.rollouts import VllmRollouts


def main(
    model: str,
    server: str = "http://localhost:8000",
    data: str | None = None,
    word: str = "green",
    steps: int = 15,
    learning_rate: float = 4e-3,
    length: int = 10,
    name: str = "colours",
    versions: str = "versions",
    output: str | None = None,
) -> None:
    """Train, and print the mean reward of every step, and where the time went.

    Args:
        model: directory or hub name of the base, which the server has, too.
        server: address of the server.
        data: a JSONL file.
        word: an answer that holds it gets the reward 1, another one 0.
        steps: of the optimizer, of 32 answers, 8 to a prompt.
        learning_rate: of AdamW, falling linearly to 0.
        length: of an answer, in tokens, at most.
        name: of this run in the server.
        versions: folder for the adapter of the current step.
        output: where to save the adapter.
    """

    def holds_word(completions: list[list[dict[str, str]]], **_columns: Any) -> list[float]:
        return [float(word in completion[0]["content"]) for completion in completions]

    set_seed(0)
    base = AutoModelForCausalLM.from_pretrained(model, dtype=torch.float32)
    loreft = {"layer": "all", "intervention": "loreft", "low_rank_dimension": 4, "positions": "l1"}
    reft_model = rn.get_reft_model(base, rn.ReftConfig([loreft]))
    with (
        VllmRollouts(server, versions, name=name) as rollouts,
        tempfile.TemporaryDirectory() as scratch,
    ):
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
        trainer.train()
    *log, summary = trainer.state.log_history
    for entry in log:
        print(f"step {entry['step']:3d}  reward {entry['reward']:.3f}")
    seconds = summary["train_runtime"]
    print(
        f"of {seconds:.1f} s: {rollouts.sampling_seconds / seconds:.0%} sampling, "
        f"{rollouts.sync_seconds / seconds:.1%} handing edits to the server"
    )
    if output is not None:
        reft_model.eval().save_pretrained(output)


if __name__ == "__main__":
    auto_cli(main, as_positional=False)
