"""Train LoReFT, in one process or in many: the launcher decides, this script does not change.

    python examples/distributed/train.py
    torchrun --nproc_per_node 8 examples/distributed/train.py
    accelerate launch --config_file examples/distributed/fsdp2.yaml examples/distributed/train.py
    deepspeed examples/distributed/train.py --deepspeed examples/distributed/deepspeed_zero3.json

The .yaml files beside it are for `accelerate launch`: ddp, fsdp2, deepspeed_zero2, deepspeed_zero3.
By default it trains the embedded tiny model on its emoji, anywhere in seconds. Data of your own are
lines of {"prompt", "output"}:

    … train.py --model meta-llama/Llama-3.1-8B --data train.jsonl --dtype bfloat16
"""

from typing import Any, Literal

import torch
from jsonargparse import auto_cli
from transformers import AutoModelForCausalLM, AutoTokenizer, TrainingArguments, set_seed

import reftnoise as rn


def main(
    model: str | None = None,
    data: str | None = None,
    output: str = "adapter",
    chat_template: bool = False,
    dtype: Literal["float32", "bfloat16"] = "float32",
    rank: int = 4,
    positions: str = "f1+l1",
    noise: Literal["none", "neftune", "gaussian", "bernoulli", "symnoise"] = "neftune",
    alpha: float = 5.0,
    learning_rate: float = 4e-3,
    batch_size: int = 4,
    accumulation: int = 1,
    epochs: float = 3,
    steps: int = -1,
    max_length: int | None = None,
    resume: bool = False,
    seed: int = 0,
    deepspeed: str | None = None,
    local_rank: int = -1,  # noqa: ARG001  # launcher and environment say the same
) -> None:
    """Train LoReFT at all layers, with noise on the embeddings.

    Args:
        model: directory or hub name of the base.
        data: JSONL file, lines of {"prompt", "output"}.
        output: directory of the checkpoints, and of the adapter at the end.
        chat_template: make each prompt a user's turn.
        dtype: of the base. The units are in fp32.
        rank: of the edits.
        positions: of the edits.
        noise: on the embeddings.
        alpha: its strength.
        learning_rate: of AdamW, falling linearly to 0.
        batch_size: examples of each process per micro-batch.
        accumulation: micro-batches per step.
        epochs: passes over the data.
        steps: of the optimizer, instead of epochs.
        max_length: tokens of an example.
        resume: from the last checkpoint in the output directory.
        seed: of start, batches and noise.
        deepspeed: JSON configuration, for the deepspeed launcher and torchrun.
        local_rank: comes from the deepspeed launcher.
    """
    # First of all, because it starts the processes' group, and ZeRO-3 shards what is loaded later.
    args = TrainingArguments(
        output_dir=output,
        use_cpu=not torch.accelerator.is_available(),
        per_device_train_batch_size=batch_size,
        gradient_accumulation_steps=accumulation,
        num_train_epochs=epochs,
        max_steps=steps,
        learning_rate=learning_rate,
        save_strategy="epoch",
        save_total_limit=1,
        logging_steps=5,
        report_to="none",
        seed=seed,
        deepspeed=deepspeed,
    )
    set_seed(seed)
    if model is None:
        base, tokenizer = rn.load_tiny_model()
        chat_template = True
    else:
        base = AutoModelForCausalLM.from_pretrained(model, dtype=dtype)
        tokenizer = AutoTokenizer.from_pretrained(model)
        tokenizer.pad_token = tokenizer.pad_token or tokenizer.eos_token

    units: list[dict[str, Any]] = [
        {
            "layer": "all",
            "intervention": "loreft",
            "low_rank_dimension": rank,
            "positions": positions,
        }
    ]
    if noise != "none":
        units.append({"intervention": noise, "alpha": alpha})
    reft_model = rn.get_reft_model(base, rn.ReftConfig(units))

    examples = rn.load_tiny_examples("train") if data is None else None
    with args.main_process_first():  # which writes the cache of `datasets`
        data_module = rn.make_last_position_supervised_data_module(
            tokenizer,
            reft_model,
            data if examples is None else [e.prompt for e in examples],
            None if examples is None else [e.completion for e in examples],
            completion_column="output",
            chat_template=chat_template,
            max_length=max_length,
        )
    trainer = rn.ReftTrainer(reft_model, args, processing_class=tokenizer, **data_module)
    trainer.train(resume_from_checkpoint=resume or None)
    trainer.save_model()  # in all processes, of which one writes
    if trainer.is_world_process_zero():
        reft_model.print_trainable_parameters()
        print(f"adapter: {output}")


if __name__ == "__main__":
    auto_cli(main, as_positional=False)
