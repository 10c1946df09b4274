"""Examples → token ids, labels and prompt lengths; examples → batches.

An example is a prompt and a completion; the loss is on the completion alone. The prompt's tokens
are exactly those that `tokenizer(prompt)` gives, so training edits the positions that generation
will. A conversation becomes one example per assistant turn, with all that precedes it as prompt.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeAlias

import datasets
import torch
from jaxtyping import Int
from torch import Tensor

from ..engine.base.sites import takes_position_ids
from .encoding import IGNORED_LABEL, SUBSPACES, Encoder
from .sources import Rows, column_names, load_rows
from .streaming import ExampleStream
from .token_cache import tokenize_once
from .tokenization import smallest_limit

Examples: TypeAlias = Rows | str | Path | Sequence[str]


def make_last_position_supervised_data_module(
    tokenizer: Any,
    model: Any,
    prompts: Examples,
    completions: Sequence[str] | None = None,
    num_interventions: int | None = None,  # noqa: ARG001  # pyreft's callers pass it
    nonstop: bool = False,
    *,
    eval_prompts: Examples | None = None,
    eval_completions: Sequence[str] | None = None,
    prompt_column: str = "prompt",
    completion_column: str = "completion",
    messages_column: str = "messages",
    subspaces_column: str = SUBSPACES,
    chat_template: bool = False,
    max_length: int | None = None,
    shuffle_seed: int | None = None,
    shuffle_buffer: int = 10_000,
) -> dict[str, Any]:
    """Datasets and collator for supervised training, to be given to a trainer as `**module`.

    Args:
        tokenizer: of the base model; its `padding_side` is respected.
        model: the base or the `ReftModel`; its context length bounds `max_length`.
        prompts: texts; or, without `completions`, a `datasets.Dataset`, an `IterableDataset`, which
            is tokenised as it is read, pass after pass (so training needs `max_steps`), the path
            of a JSONL, JSON, CSV or Parquet file, or the name of a hub dataset (its "train" split).
        completions: texts, as many as prompts.
        num_interventions: accepted for pyreft's sake; positions come from the config.
        nonstop: leave out the end-of-text token after a completion.
        eval_prompts: like `prompts`, for evaluation.
        eval_completions: like `completions`, for evaluation.
        prompt_column: column of prompts in a dataset.
        completion_column: column of completions in a dataset.
        messages_column: column of conversations, lists of `{"role", "content"}`; used, with the
            tokenizer's chat template, where a dataset has it and not `prompt_column`.
        subspaces_column: column of lists of dimensions, where a dataset has it: each row is trained
            in those of every unit's subspace, as `forward(subspaces=…)` has it.
        chat_template: also render plain prompts as a user's turn of the chat template.
        max_length: tokens of an example, by default what tokenizer and model allow. A longer
            example loses the beginning of its prompt; how many did is logged.
        shuffle_seed: of a streamed `prompts`, whose rows are then drawn from a buffer, in another
            order on each pass; by default they keep their order. (A Trainer shuffles the others.)
        shuffle_buffer: rows in it.

    Returns:
        `train_dataset`, `eval_dataset` (or None) and `data_collator`.

    Raises:
        ValueError: no examples, unequal counts, missing columns, an empty prompt or completion.
        FileNotFoundError: a path that does not exist.
    """
    limit = smallest_limit(tokenizer, model, max_length)
    base = model.model if hasattr(model, "reft_config") else model
    counts = hasattr(base, "forward") and takes_position_ids(base)

    def tokenized(source: Examples, targets: Sequence[str] | None, name: str) -> Any:
        rows = load_examples(source, targets, prompt_column, completion_column)
        is_training = name == "training"
        if isinstance(rows, datasets.IterableDataset) and is_training and shuffle_seed is not None:
            rows = rows.shuffle(seed=shuffle_seed, buffer_size=shuffle_buffer)
        return tokenize_examples(
            rows,
            tokenizer,
            prompt_column=prompt_column,
            completion_column=completion_column,
            messages_column=messages_column,
            subspaces_column=subspaces_column,
            chat_template=chat_template,
            nonstop=nonstop,
            max_length=limit,
            name=name,
            repeats=is_training,
        )

    return {
        "train_dataset": tokenized(prompts, completions, "training"),
        "eval_dataset": None
        if eval_prompts is None
        else tokenized(eval_prompts, eval_completions, "evaluation"),
        "data_collator": ReftDataCollator(tokenizer, position_ids=counts),
    }


def load_examples(
    source: Examples,
    completions: Sequence[str] | None = None,
    prompt_column: str = "prompt",
    completion_column: str = "completion",
) -> Rows:
    """A dataset from texts, a file, a hub name, or one that is ready."""
    if completions is not None:
        if isinstance(source, str | Path | Rows):
            raise ValueError(f"prompts: expected a list of texts, got {source!r}")
        if isinstance(completions, str):
            raise ValueError(f"completions: expected a list of texts, got {completions!r}")
        if len(source) != len(completions):
            raise ValueError(f"{len(source)} prompts but {len(completions)} completions")
        columns = {prompt_column: list(source), completion_column: list(completions)}
        loaded = datasets.Dataset.from_dict(columns)
    elif isinstance(source, str | Path | Rows):
        loaded = load_rows(source)
    else:
        raise ValueError(
            "completions are missing: without them, prompts are a datasets.Dataset (one split), a "
            f"path or a hub name, not {type(source).__name__}"
        )
    if isinstance(loaded, datasets.Dataset) and len(loaded) == 0:
        raise ValueError("no examples: expected at least one prompt and completion")
    return loaded


def tokenize_examples(
    examples: Rows,
    tokenizer: Any,
    *,
    prompt_column: str = "prompt",
    completion_column: str = "completion",
    messages_column: str = "messages",
    subspaces_column: str = SUBSPACES,
    chat_template: bool = False,
    nonstop: bool = False,
    max_length: int | None = None,
    name: str = "training",
    repeats: bool = False,
) -> datasets.Dataset | ExampleStream:
    """`input_ids`, `labels`, `prompt_lengths` and `length` for each example or assistant turn.

    `subspaces`, too, where rows have the dimensions that they are trained in.

    `length` is what a Trainer groups batches by, so that they hold little padding
    (`train_sampling_strategy="group_by_length"`). A stream of rows gives a stream, which begins
    again after its last row if it `repeats`.
    """
    encoder = Encoder(
        tokenizer=tokenizer,
        prompt_column=prompt_column,
        completion_column=completion_column,
        messages_column=messages_column,
        subspaces_column=subspaces_column,
        chat_template=chat_template,
        nonstop=nonstop,
        max_length=max_length,
        name=name,
    )
    if isinstance(examples, datasets.Dataset):
        return tokenize_once(examples, encoder)
    encoder.columns(column_names(examples))
    return ExampleStream(examples, encoder, repeats)


@dataclass
class ReftDataCollator:
    """Pad examples to the longest of the batch, on the tokenizer's padding side.

    The attention mask tells tokens from padding, so it does not matter which id pads, and a
    tokenizer without a padding token is fine. `subspaces` are padded with -1.
    """

    tokenizer: Any
    pad_to_multiple_of: int = 1
    position_ids: bool = False
    """Whether left-padded batches say which token is a row's first. A model with absolute position
    embeddings counts padding otherwise, in training but not in generation."""

    def __call__(self, features: Sequence[Mapping[str, Any]]) -> dict[str, Tensor]:
        width = max(len(feature["input_ids"]) for feature in features)
        width += -width % self.pad_to_multiple_of
        pad = self.tokenizer.pad_token_id
        if pad is None:
            pad = self.tokenizer.eos_token_id or 0
        on_left = self.tokenizer.padding_side == "left"

        def padded(values: Sequence[int], fill: int) -> list[int]:
            padding = [fill] * (width - len(values))
            return padding + list(values) if on_left else list(values) + padding

        batch = {
            "input_ids": [padded(f["input_ids"], pad) for f in features],
            "attention_mask": [padded([1] * len(f["input_ids"]), 0) for f in features],
            "labels": [padded(f["labels"], IGNORED_LABEL) for f in features],
            "prompt_lengths": [f["prompt_lengths"] for f in features],
        }
        tensors = {name: torch.tensor(rows) for name, rows in batch.items()}
        if any(SUBSPACES in feature for feature in features):
            tensors[SUBSPACES] = _padded_subspaces(features)
        if self.position_ids and on_left:
            counted = tensors["attention_mask"].cumsum(1) - 1
            tensors["position_ids"] = counted.clamp(min=0)
        return tensors


def _padded_subspaces(features: Sequence[Mapping[str, Any]]) -> Int[Tensor, "batch n"]:
    rows: list[Any] = [feature.get(SUBSPACES) for feature in features]
    if None in rows:
        raise ValueError(
            f"subspaces: {rows.count(None)} of {len(rows)} examples of a batch have none; expected "
            "a list of dimensions for each, such as all of them"
        )
    width = max(map(len, rows))
    return torch.tensor([[*row, *[-1] * (width - len(row))] for row in rows], dtype=torch.long)
