"""Examples → token ids, labels and prompt lengths; examples → batches.

An example is a prompt and a completion; the loss is on the completion alone. The prompt's tokens
are exactly those of `tokenizer(prompt)`, so training edits the positions that generation will. A
conversation becomes one example per assistant turn, whose prompt is all that precedes it.
"""

import warnings
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, TypeAlias

import datasets
import torch
from jaxtyping import Int
from torch import Tensor

from .._util.errors import brief
from ..engine.base.peft import inner_model, virtual_tokens
from ..engine.base.sites import takes_position_ids
from .encoding import IGNORED_LABEL, LOCATIONS, SUBSPACES, Encoder
from .sources import Rows, column_names, load_rows
from .streaming import ExampleStream
from .token_cache import tokenize_once
from .tokenization import padding_token, smallest_limit

Examples: TypeAlias = Rows | str | Path | Sequence[str]


def make_last_position_supervised_data_module(
    tokenizer: Any,
    model: Any,
    prompts: Examples | None = None,
    completions: Sequence[str] | None = None,
    num_interventions: int | None = None,
    nonstop: bool = False,
    *,
    inputs: Examples | None = None,
    outputs: Sequence[str] | None = None,
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
    """Datasets and collator for supervised training: arguments of a trainer.

    Each example has `input_ids`, `labels`, `prompt_lengths`, `length` (for a Trainer that groups
    batches, `train_sampling_strategy="group_by_length"`) and, where rows have them, `subspaces`.

    Args:
        tokenizer: tokenizer of the base; its `padding_side` is respected.
        model: the base or the `ReftModel`; its context length bounds `max_length`.
        prompts: list of texts; or, without `completions`, a `datasets.Dataset`, an
            `IterableDataset`, which is tokenised as it is read, pass after pass (so training needs
            `max_steps`), the path of a JSONL, JSON, CSV or Parquet file, or the name of a hub
            dataset (its "train" split).
        completions: list of texts, as many as prompts.
        num_interventions: pyreft's number of interventions, of which each then edits the prompt's
            last token, whatever positions the config has: examples also have
            `intervention_locations`. By default positions are the config's.
        nonstop: whether completions end without the end-of-text token.
        inputs: pyreft's name of `prompts`.
        outputs: pyreft's name of `completions`.
        eval_prompts: prompts for evaluation, like `prompts`.
        eval_completions: completions for evaluation, like `completions`.
        prompt_column: column of prompts in a dataset.
        completion_column: column of completions in a dataset.
        messages_column: column of conversations, lists of `{"role", "content"}` with whatever else
            the tokenizer's chat template reads, such as `tool_calls`; used where a dataset has it
            and not `prompt_column`. Columns `tools`, `documents` and `chat_template_kwargs` are
            handed on to the template. A message with `weight: 0` is not learned. Prompts and
            completions may be lists of messages, too.
        subspaces_column: column of lists of dimensions, where a dataset has it: each row is trained
            in these dimensions of every unit's subspace, like `forward(subspaces=…)`.
        chat_template: whether plain prompts, too, become a user's turn of the chat template.
        max_length: greatest number of tokens of an example, by default what tokenizer and model
            allow. A longer example loses the beginning of its prompt; how many did is logged.
        shuffle_seed: seed for streamed `prompts`, whose rows are then drawn from a buffer, in
            another order on each pass; by default they keep their order. (A Trainer shuffles the
            others.)
        shuffle_buffer: number of rows in the buffer.

    Returns:
        `train_dataset`, `eval_dataset` (or None) and `data_collator`.

    Raises:
        ValueError: no examples, unequal counts, missing columns, an empty prompt or completion.
        FileNotFoundError: a path that does not exist.
    """
    source = inputs if prompts is None else prompts
    if source is None or (prompts is not None and inputs is not None):
        raise ValueError("prompts and inputs are the same argument: expected one of them")
    if completions is not None and outputs is not None:
        raise ValueError("completions and outputs are the same argument: expected one of them")
    completions = outputs if completions is None else completions
    encoder = Encoder(
        tokenizer=tokenizer,
        prompt_column=prompt_column,
        completion_column=completion_column,
        messages_column=messages_column,
        subspaces_column=subspaces_column,
        chat_template=chat_template,
        nonstop=nonstop,
        max_length=smallest_limit(tokenizer, model, max_length),
        num_interventions=num_interventions,
    )
    rows = _load_examples(source, completions, encoder)
    if isinstance(rows, datasets.IterableDataset) and shuffle_seed is not None:
        rows = rows.shuffle(seed=shuffle_seed, buffer_size=shuffle_buffer)
    train_dataset, eval_dataset = _tokenized(rows, encoder, repeats=True), None
    if eval_prompts is not None:
        eval_rows = _load_examples(eval_prompts, eval_completions, encoder)
        eval_dataset = _tokenized(eval_rows, replace(encoder, name="evaluation"), repeats=False)
    base = model.model if hasattr(model, "reft_config") else model
    counts = hasattr(base, "forward") and takes_position_ids(inner_model(base))
    counts = counts and not virtual_tokens(base)  # PEFT counts for them, and nobody else may
    return {
        "train_dataset": train_dataset,
        "eval_dataset": eval_dataset,
        "data_collator": ReftDataCollator(tokenizer, position_ids=counts),
    }


def _load_examples(source: Examples, completions: Sequence[str] | None, encoder: Encoder) -> Rows:
    """Rows of texts, a file, a hub name, or rows as they are."""
    if completions is not None:
        if isinstance(source, str | Path | Rows):
            raise ValueError(f"prompts: expected a list of texts, got {source!r}")
        if isinstance(completions, str):
            raise ValueError(f"completions: expected a list of texts, got {completions!r}")
        if len(source) != len(completions):
            raise ValueError(f"{len(source)} prompts but {len(completions)} completions")
        texts = {encoder.prompt_column: source, encoder.completion_column: completions}
        loaded: Rows = datasets.Dataset.from_dict({name: list(t) for name, t in texts.items()})
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


def _tokenized(rows: Rows, encoder: Encoder, *, repeats: bool) -> datasets.Dataset | ExampleStream:
    encoder = replace(encoder, features=rows.features)
    if isinstance(rows, datasets.Dataset):
        return tokenize_once(rows, encoder)
    encoder.columns(column_names(rows))
    return ExampleStream(rows, encoder, repeats)


@dataclass
class ReftDataCollator:
    """Pad examples to the longest of the batch, on the tokenizer's padding side.

    The attention mask tells tokens from padding, so a tokenizer needs no padding token.
    `subspaces` are padded with -1, and `intervention_locations` count the batch's columns.
    pyreft's `data_collator` pads itself; no more locations are kept than its batch has columns.

    Args:
        tokenizer: tokenizer of the base; or a collator, in pyreft's first place.
        pad_to_multiple_of: number that the width of a batch is a multiple of.
        position_ids: whether left-padded batches say which token is a row's first. A model with
            absolute position embeddings counts padding otherwise, in training but not in
            generation.
        data_collator: collator that pads examples instead.

    Raises:
        TypeError: there is neither a tokenizer nor a collator.
    """

    tokenizer: Any = None
    pad_to_multiple_of: int = 1
    position_ids: bool = False
    data_collator: Any = None

    def __post_init__(self) -> None:
        if self.data_collator is None and not hasattr(self.tokenizer, "padding_side"):
            if not callable(self.tokenizer):
                value = brief(self.tokenizer)
                raise TypeError(f"tokenizer {value}: expected a tokenizer, or a collator")
            self.data_collator, self.tokenizer = self.tokenizer, None
        if self.tokenizer is None:
            self.tokenizer = getattr(self.data_collator, "tokenizer", None)

    def __call__(self, features: Sequence[Mapping[str, Any]]) -> dict[str, Tensor]:
        if self.data_collator is not None:
            return self._padded_as_pyreft(features)
        width = max(len(feature["input_ids"]) for feature in features)
        width += -width % self.pad_to_multiple_of
        pad = padding_token(self.tokenizer)
        on_left = self.tokenizer.padding_side == "left"

        def padded(values: Sequence[int], fill: int) -> list[int]:
            padding = [fill] * (width - len(values))
            return padding + list(values) if on_left else list(values) + padding

        batch = {
            "input_ids": [padded(f["input_ids"], pad) for f in features],
            "attention_mask": [padded([1] * len(f["input_ids"]), 0) for f in features],
            "labels": [padded(f["labels"], IGNORED_LABEL) for f in features],
        }
        if all("prompt_lengths" in feature for feature in features):
            batch["prompt_lengths"] = [f["prompt_lengths"] for f in features]
        tensors = {name: torch.tensor(rows) for name, rows in batch.items()}
        if any(SUBSPACES in feature for feature in features):
            tensors[SUBSPACES] = _padded_subspaces(features)
        if any(LOCATIONS in feature for feature in features):
            locations = torch.tensor([feature[LOCATIONS] for feature in features])
            shifts = torch.tensor([width - len(f["input_ids"]) for f in features])
            tensors[LOCATIONS] = locations + shifts[:, None, None] if on_left else locations
        if self.position_ids and on_left:
            columns = tensors["attention_mask"].cumsum(1) - 1
            tensors["position_ids"] = columns.clamp(min=0)
        return tensors

    def _padded_as_pyreft(self, features: Sequence[Mapping[str, Any]]) -> dict[str, Tensor]:
        side = getattr(self.tokenizer, "padding_side", None)
        lengths = {len(f["input_ids"]) for f in features if LOCATIONS in f}
        if side == "left" and len(lengths) > 1:
            warnings.warn(
                "padding_side 'left' moves tokens away from their intervention_locations: "
                "expected 'right'",
                stacklevel=3,
            )
        batch: dict[str, Tensor] = self.data_collator(features)
        if LOCATIONS in batch:
            width = batch["input_ids"].shape[-1]
            batch[LOCATIONS] = torch.as_tensor(batch[LOCATIONS])[..., :width]
        return batch


def _padded_subspaces(features: Sequence[Mapping[str, Any]]) -> Int[Tensor, "batch ..."]:
    rows: list[Any] = [feature.get(SUBSPACES) for feature in features]
    if None in rows:
        raise ValueError(
            f"subspaces: {rows.count(None)} of {len(rows)} examples of a batch have none; expected "
            "a list of dimensions for each, such as all of them"
        )
    if all(row and not isinstance(row[0], int) for row in rows):
        return torch.tensor(rows)  # pyreft's, for each intervention
    width = max(map(len, rows))
    return torch.tensor([[*row, *[-1] * (width - len(row))] for row in rows], dtype=torch.long)
