"""A run's adapted model, and its rows and prompts as the recipe puts them to the model."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from ..data import load_examples, make_last_position_supervised_data_module
from ..inspection import Prompt
from ..model import ReftModel
from ..tiny import load_tiny_examples, load_tiny_model

TINY = "tiny-chat"

Recipe = Mapping[str, Any]


def load_base(recipe: Recipe) -> tuple[Any, Any]:
    """The recipe's base and its tokenizer."""
    if recipe["model"] == TINY:
        return load_tiny_model()
    name, revision = recipe["model"], recipe.get("revision")
    tokenizer = AutoTokenizer.from_pretrained(name, revision=revision, padding_side="left")
    model = AutoModelForCausalLM.from_pretrained(
        name, revision=revision, dtype=recipe.get("dtype", "auto")
    )
    device = recipe.get("device", "auto")
    if device == "auto":
        device = "cuda" if torch.cuda.is_available() else "cpu"
    return model.to(device), tokenizer


def load_adapted(recipe: Recipe, adapter: Path) -> tuple[ReftModel, Any]:
    """The recipe's base with the adapter of a directory, in evaluation mode.

    Raises:
        FileNotFoundError: no such directory.
        ValueError: the adapter does not fit the base.
    """
    if not adapter.is_dir():
        raise FileNotFoundError(f"{adapter}: no such adapter directory; is the run finished?")
    base, tokenizer = load_base(recipe)
    return ReftModel.from_pretrained(base, adapter), tokenizer


def adapter_directory(directory: Path) -> Path:
    """The adapter that a run's directory holds, or the directory itself."""
    inside = directory / "adapter"
    return inside if inside.is_dir() else directory


def training_batches(
    recipe: Recipe, reft_model: ReftModel, tokenizer: Any, rows: int
) -> list[dict[str, Any]]:
    """The first rows that the adapter was trained on, collated as in training.

    Raises:
        ValueError: the recipe names no data.
    """
    data = recipe["data"]
    if data["train"] is None:
        raise ValueError("the recipe names no training data")
    if data["train"] == TINY:
        tiny = load_tiny_examples("train")[:rows]
        examples = load_examples([e.prompt for e in tiny], [e.completion for e in tiny])
    else:
        examples = load_examples(data["train"])
        examples = examples.select(range(min(rows, len(examples))))
    module = make_last_position_supervised_data_module(
        tokenizer,
        reft_model,
        examples,
        max_length=data.get("max_length"),
        chat_template=data.get("template") == "chat",
    )
    tokenized, collate = module["train_dataset"], module["data_collator"]
    size = recipe["training"]["per_device_train_batch_size"]
    starts = range(0, len(tokenized), size)
    return [
        collate([tokenized[n] for n in range(s, min(s + size, len(tokenized)))]) for s in starts
    ]


def rendered(recipe: Recipe, prompts: Sequence[str]) -> list[Prompt]:
    """Prompts in the recipe's template."""
    template = recipe["data"].get("template", "plain")
    if template == "chat":
        return [[{"role": "user", "content": prompt}] for prompt in prompts]
    if template == "plain":
        return list(prompts)
    return [template.replace("{prompt}", prompt) for prompt in prompts]
