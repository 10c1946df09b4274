"""Loss curves of three ways to keep R orthonormal, from the same start on the same batches.

- Householder product of the coordinates, as pyreft does it with torch's parametrisation
- Cholesky-QR of X, from X = R/2: reftnoise
- Cholesky-QR of X, from X = R

    python examples/papers/learning_curves.py --model MODEL --data FOLDER --output curves.png
"""

import tempfile
from pathlib import Path
from typing import Any

import datasets
import matplotlib as mpl
import torch
from jsonargparse import auto_cli
from rich.console import Console
from rich.table import Table
from torch import Tensor, nn
from torch.nn.utils import parametrizations, parametrize
from transformers import Trainer, TrainingArguments, set_seed

import reftnoise as rn
from reftnoise.engine.base.loading import load_base

mpl.use("Agg")
from matplotlib import pyplot as plt  # after the backend

CONSOLE = Console()


class Householder(nn.Module):
    """R as pyreft keeps it: the transpose of a [hidden, rank] weight under `orthogonal`."""

    def __init__(self, start: Tensor) -> None:
        super().__init__()
        rank, hidden_size = start.shape
        self.linear = nn.Linear(rank, hidden_size, bias=False)
        parametrizations.orthogonal(self.linear, orthogonal_map="householder")
        with torch.no_grad():
            self.linear.weight = start.T
        self.is_trained = False  # leave it out of the batched Cholesky-QR

    def forward(self) -> Tensor:
        with parametrize.cached():
            return self.linear.weight.T


def start_from_whole(unit: Any) -> None:
    with torch.no_grad():
        unit.rotate_layer.weight.mul_(2)


def use_householder(unit: Any) -> None:
    unit.rotate_layer = Householder(unit.rotate_layer().detach())


WAYS = {
    "Householder (pyreft)": use_householder,
    "Cholesky-QR from R/2 (reftnoise)": None,
    "Cholesky-QR from R": start_from_whole,
}


def train(
    reft_model: rn.ReftModel,
    tokenizer: Any,
    examples: datasets.Dataset,
    *,
    steps: int,
    learning_rate: float,
    batch_size: int,
    seed: int,
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
            logging_steps=10,
            save_strategy="no",
            report_to="none",
            train_sampling_strategy="group_by_length",
            dataloader_pin_memory=torch.cuda.is_available(),
            seed=seed,
        )
        trainer: Trainer = rn.ReftTrainerForCausalLM(
            model=reft_model,
            args=args,
            **data_module,
        )
        trainer.train()
    return [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]


def main(
    model: str,
    data: str,
    output: str = "learning_curves.png",
    steps: int = 300,
    batch_size: int = 8,
    learning_rate: float = 4e-3,
    rank: int = 4,
    seed: int = 0,
) -> None:
    """Train LoReFT three times and plot the losses.

    Args:
        model: directory or hub name of the base.
        data: folder with train.jsonl, lines of {"prompt", "output"}.
        output: PNG to write.
        steps: number of training steps.
        batch_size: number of examples per step.
        learning_rate: learning rate of AdamW, which falls linearly to 0.
        rank: rank of the edits.
        seed: seed of the start and the batches.
    """
    file = str(Path(data) / "train.jsonl")
    examples = datasets.load_dataset("json", data_files=file, split="train")
    curves: dict[str, list[float]] = {}
    for name, change in WAYS.items():
        set_seed(seed)
        base, tokenizer = load_base(model, dtype="float32")
        loreft = {"layer": "all", "intervention": "loreft", "low_rank_dimension": rank}
        reft_model = rn.get_reft_model(base, rn.ReftConfig([loreft | {"positions": "f4+l4"}]))
        if change is not None:
            for unit in reft_model.interventions.values():
                change(unit)
        curves[name] = train(
            reft_model,
            tokenizer,
            examples,
            steps=steps,
            learning_rate=learning_rate,
            batch_size=batch_size,
            seed=seed,
        )
    figure, axes = plt.subplots(figsize=(6.4, 3.6), layout="constrained")
    logged = range(10, 10 * len(next(iter(curves.values()))) + 1, 10)
    for (name, losses), style in zip(curves.items(), ("-", "--", ":"), strict=True):
        axes.plot(logged, losses, style, label=name, linewidth=2)
    axes.set(xlabel="step", ylabel="training loss, mean of 10 steps", yscale="log")
    axes.legend(frameon=False)
    axes.spines[["top", "right"]].set_visible(False)
    figure.savefig(output, dpi=150)
    table = Table("step", *curves, title=f"training loss, rank {rank}")
    for row in range(0, len(logged), 5):
        table.add_row(str(logged[row]), *[f"{losses[row]:.4f}" for losses in curves.values()])
    table.add_row(str(logged[-1]), *[f"{losses[-1]:.4f}" for losses in curves.values()])
    CONSOLE.print(table)


if __name__ == "__main__":
    auto_cli(main, as_positional=False)
