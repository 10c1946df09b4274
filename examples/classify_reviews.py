"""Does embedding noise help LoReFT on a classification task? A table over noises and seeds.

Data: a folder with `train.jsonl` and `test.jsonl`, lines of {"prompt", "output"}, where the output
is a label in words (" good", " bad"). A prediction is right if greedy decoding gives the label.

    python examples/classify_reviews.py --model MODEL --data FOLDER
    python examples/classify_reviews.py --model MODEL --data FOLDER --dev true --learning_rate 2e-3
"""

import statistics
import tempfile
from pathlib import Path
from typing import Any

import datasets
import torch
from jsonargparse import auto_cli
from rich.console import Console
from rich.table import Table
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    PrinterCallback,
    Trainer,
    TrainingArguments,
    set_seed,
)

import reftnoise as rn
from reftnoise.progress import RichProgressCallback

NOISES: dict[str, list[dict[str, Any]]] = {
    "none": [],
    "NEFTune": [{"intervention": "neftune", "alpha": 5.0}],
    "SymNoise": [{"intervention": "symnoise", "alpha": 5.0}],
}
CONSOLE = Console()


def loreft(rank: int, positions: str = "f4+l4") -> dict[str, Any]:
    """LoReFT at all layers."""
    return {
        "layer": "all",
        "intervention": "loreft",
        "low_rank_dimension": rank,
        "positions": positions,
    }


def load(model: str) -> tuple[Any, Any]:
    """A base model in fp32 and its tokenizer, padding on the left for generation."""
    tokenizer = AutoTokenizer.from_pretrained(model, padding_side="left")
    return AutoModelForCausalLM.from_pretrained(model, dtype=torch.float32), tokenizer


def start_from_identity(reft_model: rn.ReftModel) -> None:
    """W = R and b = 0: no edit yet, where a random start disturbs every layer at once."""
    with torch.no_grad():
        for unit in reft_model.interventions.values():
            if isinstance(unit, rn.LoreftIntervention):
                unit.learned_source.weight.copy_(unit.rotate_layer())
                unit.learned_source.bias.zero_()


def train(
    reft_model: rn.ReftModel,
    tokenizer: Any,
    examples: datasets.Dataset,
    *,
    steps: int,
    learning_rate: float,
    batch_size: int,
    seed: int,
    name: str,
    warmup_steps: int = 0,
    adam_beta2: float = 0.999,
) -> list[float]:
    """Train, and return the loss of every tenth step."""
    data_module = rn.make_last_position_supervised_data_module(
        tokenizer, reft_model, examples, completion_column="output"
    )
    with tempfile.TemporaryDirectory() as scratch:
        args = TrainingArguments(
            output_dir=scratch,
            max_steps=steps,
            per_device_train_batch_size=batch_size,
            learning_rate=learning_rate,
            lr_scheduler_type="linear",
            warmup_steps=warmup_steps,
            adam_beta2=adam_beta2,
            logging_steps=10,
            save_strategy="no",
            report_to="none",
            disable_tqdm=True,
            train_sampling_strategy="group_by_length",
            include_num_input_tokens_seen="non_padding",
            dataloader_pin_memory=torch.cuda.is_available(),
            seed=seed,
        )
        trainer: Trainer = rn.ReftTrainerForCausalLM(
            model=reft_model,
            args=args,
            callbacks=[RichProgressCallback(CONSOLE, name)],
            **data_module,
        )
        trainer.remove_callback(PrinterCallback)
        trainer.train()
    return [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]


def accuracy(model: Any, tokenizer: Any, examples: datasets.Dataset, batch_size: int = 64) -> float:
    """The share of examples whose greedy completion is the label."""
    longest = max(len(tokenizer(label)["input_ids"]) for label in set(examples["output"]))
    right = 0
    for batch in examples.iter(batch_size):
        prompts = tokenizer(batch["prompt"], padding=True, return_tensors="pt")
        tokens = model.generate(**prompts, max_new_tokens=longest, do_sample=False)
        width = prompts["input_ids"].shape[1]
        texts = tokenizer.batch_decode(tokens[:, width:], skip_special_tokens=True)
        right += sum(t == label for t, label in zip(texts, batch["output"], strict=True))
    return right / len(examples)


def main(
    model: str,
    data: str,
    seeds: tuple[int, ...] = (0, 1, 2),
    steps: int = 300,
    batch_size: int = 8,
    learning_rate: float = 2e-3,
    warmup_steps: int = 15,
    adam_beta2: float = 0.95,
    rank: int = 4,
    positions: str = "f4+l4",
    identity_start: bool = True,
    dev: bool = False,
) -> None:
    """Train LoReFT with each noise and seed, and print the accuracies.

    Args:
        model: directory or hub name of the base.
        data: folder with train.jsonl and test.jsonl.
        seeds: one run each.
        steps: of the optimizer.
        batch_size: examples per step.
        learning_rate: of AdamW, falling linearly to 0.
        warmup_steps: over which it rises from 0 first.
        adam_beta2: of AdamW.
        rank: of the edits.
        positions: of the edits.
        identity_start: start without an edit instead of a random one.
        dev: score on the last 1,000 training rows, which are then not trained on.
    """
    files = {split: str(Path(data) / f"{split}.jsonl") for split in ("train", "test")}
    splits = datasets.load_dataset("json", data_files=files)
    training, test = splits["train"], splits["test"]
    if dev:
        rows = len(training)
        training, test = (
            training.select(range(rows - 1000)),
            training.select(range(rows - 1000, rows)),
        )
    base, tokenizer = load(model)
    table = Table("noise", *[f"seed {seed}" for seed in seeds], "mean", "sd")
    table.title = f"accuracy on {len(test)} rows; base {accuracy(base.eval(), tokenizer, test):.3f}"
    for name, noise in NOISES.items():
        scores = []
        for seed in seeds:
            set_seed(seed)
            base, tokenizer = load(model)
            config = rn.ReftConfig(representations=[loreft(rank, positions), *noise])
            reft_model = rn.get_reft_model(base, config)
            if identity_start:
                start_from_identity(reft_model)
            train(
                reft_model,
                tokenizer,
                training,
                steps=steps,
                learning_rate=learning_rate,
                batch_size=batch_size,
                seed=seed,
                name=f"{name}, seed {seed}",
                warmup_steps=warmup_steps,
                adam_beta2=adam_beta2,
            )
            scores.append(accuracy(reft_model.eval(), tokenizer, test))
        spread = statistics.stdev(scores) if len(scores) > 1 else 0.0
        numbers = [*scores, statistics.mean(scores), spread]
        table.add_row(name, *[f"{number:.3f}" for number in numbers])
    CONSOLE.print(table)


if __name__ == "__main__":
    auto_cli(main, as_positional=False)
