"""Adapt an image classifier: LoReFT compared with its classification head alone.

The images are drawn on the spot: a square, disc, triangle or cross of some colour on noise. A small
ViT first learns filled shapes, all of it trained. Frozen, it is adapted to outlines.

    python examples/papers/vit.py
    python examples/papers/vit.py --model google/vit-base-patch16-224
"""

import copy
import tempfile
from typing import Any

import numpy as np
import torch
from jsonargparse import auto_cli
from rich.console import Console
from rich.table import Table
from transformers import (
    AutoModelForImageClassification,
    Trainer,
    TrainingArguments,
    ViTConfig,
    ViTForImageClassification,
    set_seed,
)

import reftnoise as rn

CONSOLE = Console()
COLOURS = np.array([(1, 0, 0), (0, 1, 0), (0, 0, 1), (1, 1, 0)])
SHAPES = ("square", "disc", "triangle", "cross")

Rows = list[dict[str, Any]]


def drawn(count: int, size: int, *, filled: bool, seed: int) -> Rows:
    """Images [3, size, size] with values around -1 and 1, labelled by their shape."""
    draw = np.random.default_rng(seed)
    y, x = np.mgrid[:size, :size] - size / 2
    rows = []
    for _ in range(count):
        label = int(draw.integers(len(SHAPES)))
        colour = COLOURS[draw.integers(len(COLOURS))]
        right, down = draw.uniform(-0.1 * size, 0.1 * size, 2)
        radius = draw.uniform(0.28, 0.36) * size
        shape = inside(label, x - right, y - down, radius)
        if not filled:
            shape &= ~inside(label, x - right, y - down, radius - 0.06 * size)
        pixels = draw.normal(0, 0.1, (3, size, size)) + colour[:, None, None] * shape
        values = torch.tensor(2 * pixels - 1, dtype=torch.float32)
        rows.append({"pixel_values": values, "labels": label})
    return rows


def inside(label: int, x: Any, y: Any, radius: float) -> Any:
    """Which points belong to a shape around the origin."""
    across, down = np.abs(x), np.abs(y)
    match SHAPES[label]:
        case "square":
            return np.maximum(across, down) < radius
        case "disc":
            return x**2 + y**2 < radius**2
        case "triangle":
            return (down < radius) & (across < (y + radius) / 2)
    return (np.minimum(across, down) < radius / 3) & (np.maximum(across, down) < radius)


def train(model: Any, rows: Rows, *, steps: int, learning_rate: float) -> None:
    with tempfile.TemporaryDirectory() as scratch:
        args = TrainingArguments(
            output_dir=scratch,
            max_steps=steps,
            per_device_train_batch_size=32,
            learning_rate=learning_rate,
            warmup_steps=0.1,
            remove_unused_columns=False,  # `pixel_values` is the base's
            logging_steps=10,
            save_strategy="no",
            report_to="none",
            dataloader_pin_memory=torch.cuda.is_available(),
        )
        Trainer(model, args, train_dataset=rows).train()


@torch.no_grad()
def accuracy(model: Any, rows: Rows) -> float:
    """The share of images whose class is found."""
    model.eval()
    pixels = torch.stack([row["pixel_values"] for row in rows]).to(model.device)
    parts = torch.split(pixels, 64)
    chosen = torch.cat([model(pixel_values=part).logits.argmax(1) for part in parts]).cpu()
    return float((chosen == torch.tensor([row["labels"] for row in rows])).float().mean())


def small_vit(size: int, steps: int) -> Any:
    """A ViT that tells filled shapes."""
    config = ViTConfig(
        image_size=size,
        patch_size=size // 4,
        hidden_size=64,
        intermediate_size=128,
        num_hidden_layers=4,
        num_attention_heads=4,
        num_labels=len(SHAPES),
    )
    model = ViTForImageClassification(config)
    rows = drawn(4096, size, filled=True, seed=1)
    train(model, rows, steps=steps, learning_rate=2e-3)
    return model


def main(
    model: str | None = None,
    base_steps: int = 800,
    steps: int = 300,
    rank: int = 4,
    positions: str = "all",
    learning_rate: float = 1e-2,
    images: int = 1024,
    seed: int = 0,
) -> dict[str, float]:
    """Print, and return, the accuracy of each way to adapt the model.

    Args:
        model: directory or hub name of an image classifier; by default a small one, trained here.
        base_steps: number of training steps of the small one.
        steps: number of training steps, with 32 images each.
        rank: rank of the edits.
        positions: patches that are edited: `f1` is the class token, `all` are all.
        learning_rate: learning rate of AdamW, which falls linearly to 0.
        images: number of images to train on; the test has half as many.
        seed: seed of all random numbers.
    """
    set_seed(seed)
    if model is None:
        base = small_vit(32, base_steps)
    else:
        base = AutoModelForImageClassification.from_pretrained(
            model, num_labels=len(SHAPES), ignore_mismatched_sizes=True, dtype=torch.float32
        )
    size = base.config.image_size
    training = drawn(images, size, filled=False, seed=2)
    test = drawn(images // 2, size, filled=False, seed=3)
    loreft = {
        "layer": "all",
        "intervention": "loreft",
        "low_rank_dimension": rank,
        "positions": positions,
    }
    table = Table("trained", "parameters", "accuracy", title="outlines of shapes")
    accuracies = {}
    for name in ("head", "head and LoReFT"):
        set_seed(seed)
        adapted: Any = copy.deepcopy(base)
        adapted.classifier.reset_parameters()
        adapted.base_model.requires_grad_(False)
        if name != "head":
            adapted = rn.get_reft_model(adapted, rn.ReftConfig(representations=loreft))
        train(adapted, training, steps=steps, learning_rate=learning_rate)
        accuracies[name] = accuracy(adapted, test)
        count = sum(p.numel() for p in adapted.parameters() if p.requires_grad)
        table.add_row(name, f"{count:,}", f"{accuracies[name]:.3f}")
    CONSOLE.print(table)
    return accuracies


if __name__ == "__main__":
    auto_cli(main, as_positional=False)
