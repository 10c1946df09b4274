"""Adapt an image classifier: LoReFT beside training the classification head alone.

The images are drawn on the spot: a shape in a colour, somewhere on a noisy ground. A small ViT
first learns the colours, all of it trained; frozen, it is then adapted to tell the shapes.

    python examples/vit.py
    python examples/vit.py --model google/vit-base-patch16-224
"""

import copy
import tempfile
from typing import Any

import numpy as np
import torch
from jsonargparse import auto_cli
from rich.console import Console
from rich.table import Table
from torch import Tensor
from transformers import (
    AutoModelForImageClassification,
    PrinterCallback,
    Trainer,
    TrainingArguments,
    ViTConfig,
    ViTForImageClassification,
    set_seed,
)

import reftnoise as rn
from reftnoise.progress import RichProgressCallback

CONSOLE = Console()
COLOURS = {"red": (1, 0, 0), "green": (0, 1, 0), "blue": (0, 0, 1), "yellow": (1, 1, 0)}
SHAPES = ("square", "disc", "triangle", "cross")

Rows = list[dict[str, Any]]


def drawn(count: int, size: int, label: str, seed: int) -> Rows:
    """Images [3, size, size] of values around -1 to 1, labelled by colour or by shape."""
    draw = np.random.default_rng(seed)
    y, x = np.mgrid[:size, :size]
    rows = []
    for _ in range(count):
        colour, shape = draw.integers(len(COLOURS)), draw.integers(len(SHAPES))
        radius = draw.uniform(0.2, 0.3) * size
        right, down = (draw.uniform(radius, size - radius) for _ in range(2))
        across, along = np.abs(x - right), y - down
        inside = [
            np.maximum(across, np.abs(along)) < radius,
            across**2 + along**2 < radius**2,
            (np.abs(along) < radius) & (across < (along + radius) / 2),
            (np.minimum(across, np.abs(along)) < radius / 3)
            & (np.maximum(across, np.abs(along)) < radius),
        ][shape]
        pixels = draw.normal(0, 0.2, (3, size, size))
        pixels += np.array(list(COLOURS.values()))[colour][:, None, None] * inside
        rows.append(
            {
                "pixel_values": torch.tensor(2 * pixels - 1, dtype=torch.float32),
                "labels": int(colour if label == "colour" else shape),
            }
        )
    return rows


def train(model: Any, rows: Rows, *, steps: int, learning_rate: float, name: str) -> None:
    with tempfile.TemporaryDirectory() as scratch:
        args = TrainingArguments(
            output_dir=scratch,
            max_steps=steps,
            per_device_train_batch_size=32,
            learning_rate=learning_rate,
            warmup_steps=0.1,
            logging_steps=10,
            save_strategy="no",
            report_to="none",
            disable_tqdm=True,
            dataloader_pin_memory=torch.cuda.is_available(),
            remove_unused_columns=False,  # pixels, which a ReftModel hands on without naming them
        )
        bar = RichProgressCallback(CONSOLE, name)
        trainer = Trainer(model, args, train_dataset=rows, callbacks=[bar])
        trainer.remove_callback(PrinterCallback)
        trainer.train()


@torch.no_grad()
def accuracy(model: Any, rows: Rows) -> float:
    """The share of images whose class is found."""
    model.eval()
    pixels = torch.stack([row["pixel_values"] for row in rows]).to(model.device)
    chosen: Tensor = torch.cat(
        [model(pixel_values=p).logits.argmax(1) for p in torch.split(pixels, 64)]
    )
    return float((chosen.cpu() == torch.tensor([row["labels"] for row in rows])).float().mean())


def small_vit(size: int, steps: int) -> Any:
    """A ViT that tells colours."""
    config = ViTConfig(
        image_size=size,
        patch_size=4,
        hidden_size=64,
        intermediate_size=128,
        num_hidden_layers=4,
        num_attention_heads=4,
        num_labels=len(COLOURS),
    )
    model = ViTForImageClassification(config)
    train(model, drawn(512, size, "colour", 1), steps=steps, learning_rate=1e-3, name="base")
    return model


def main(
    model: str | None = None,
    steps: int = 300,
    rank: int = 4,
    positions: str = "all",
    learning_rate: float = 4e-3,
    images: int = 1024,
    seed: int = 0,
) -> dict[str, float]:
    """Print, and return, the accuracy of each way to adapt the model.

    Args:
        model: directory or hub name of an image classifier; by default a small one, trained here.
        steps: of the optimizer, of 32 images each.
        rank: of the edits.
        positions: patches that are edited: `f1` is the class token, `all` are all.
        learning_rate: of AdamW, falling linearly to 0.
        images: to train on; half as many are for the test.
        seed: of all random numbers.
    """
    set_seed(seed)
    if model is None:
        base = small_vit(size=32, steps=steps)
    else:
        base = AutoModelForImageClassification.from_pretrained(
            model, num_labels=len(SHAPES), ignore_mismatched_sizes=True, dtype=torch.float32
        )
    size = base.config.image_size
    training, test = drawn(images, size, "shape", 2), drawn(images // 2, size, "shape", 3)
    loreft = {
        "layer": "all",
        "intervention": "loreft",
        "low_rank_dimension": rank,
        "positions": positions,
    }
    table = Table("trained", "parameters", "accuracy", title="shapes")
    found = {}
    for name in ("head", "head and LoReFT"):
        set_seed(seed)
        adapted: Any = copy.deepcopy(base)
        adapted.classifier.reset_parameters()
        adapted.base_model.requires_grad_(False)
        if name != "head":
            adapted = rn.get_reft_model(adapted, rn.ReftConfig(representations=loreft))
        train(adapted, training, steps=steps, learning_rate=learning_rate, name=name)
        found[name] = accuracy(adapted, test)
        count = sum(p.numel() for p in adapted.parameters() if p.requires_grad)
        table.add_row(name, f"{count:,}", f"{found[name]:.3f}")
    CONSOLE.print(table)
    return found


if __name__ == "__main__":
    auto_cli(main, as_positional=False)
