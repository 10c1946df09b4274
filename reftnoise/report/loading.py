"""A run's rows and prompts as its recipe puts them to the model."""

from collections.abc import Sequence
from typing import Any

from ..classifiers import make_classifier_data_module
from ..data import make_last_position_supervised_data_module
from ..inspection import Prompt
from ..model import ReftModel
from ..recipe import Recipe
from ..sources import load_rows, rename_columns
from ..tasks.classifier import ClassifierTask
from ..tasks.registry import get_task
from ..templates import as_examples, fill


def training_batches(
    recipe: Recipe, reft_model: ReftModel, tokenizer: Any, rows: int
) -> list[dict[str, Any]]:
    """The first rows that the adapter was trained on, collated as in training.

    Raises:
        ValueError: the recipe names no data, or data that cannot be read any more.
    """
    data, task = recipe.data, get_task(recipe.task)
    if data.train is None:
        raise ValueError("the recipe names no training data")
    source = load_rows(
        data.train, split=data.train_split, subset=data.subset, streaming=data.streaming
    )
    count = rows if data.streaming else min(rows, len(source))
    first = rename_columns(source.take(count), data.columns)
    if isinstance(task, ClassifierTask):
        module = make_classifier_data_module(tokenizer, task, first)
    else:
        module = make_last_position_supervised_data_module(
            tokenizer,
            reft_model,
            as_examples(first, task, data.template, tokenizer),
            max_length=data.max_length,
        )
    examples, collate = list(module["train_dataset"]), module["data_collator"]
    size = recipe.training.per_device_train_batch_size
    taken = (*tokenizer.model_input_names, "labels", "prompt_lengths")
    return [
        collate([{n: row[n] for n in row if n in taken} for row in examples[start : start + size]])
        for start in range(0, len(examples), size)
    ]


def rendered(recipe: Recipe, prompts: Sequence[Prompt]) -> list[Prompt]:
    """Prompts in the recipe's template; conversations as they are.

    Raises:
        ValueError: the template has columns of a row in it.
    """
    template = recipe.data.template
    return [fill(template, one, {}) if isinstance(one, str) else one for one in prompts]


def as_text(prompt: Prompt) -> str:
    """A prompt for readers."""
    if isinstance(prompt, str):
        return prompt
    return "\n".join(f"{message['role']}: {message['content']}" for message in prompt)
