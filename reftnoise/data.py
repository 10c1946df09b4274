"""Examples → token ids, labels and prompt lengths; examples → batches.

An example is a prompt and a completion; the loss is on the completion alone. The prompt's tokens
are exactly those that `tokenizer(prompt)` gives, so training edits the positions that generation
will. A conversation becomes one example per assistant turn, with all that precedes it as prompt.
"""

import logging
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeAlias

import datasets
import torch
from torch import Tensor

from .components import takes_position_ids
from .model import ReftModel
from .sources import load_rows
from .tokenization import smallest_limit, tokenize, truncate

logger = logging.getLogger(__name__)

IGNORED_LABEL = -100

Examples: TypeAlias = datasets.Dataset | str | Path | Sequence[str]


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
    chat_template: bool = False,
    max_length: int | None = None,
) -> dict[str, Any]:
    """Datasets and collator for supervised training, to be given to a trainer as `**module`.

    Args:
        tokenizer: of the base model; its `padding_side` is respected.
        model: the base or the `ReftModel`; its context length bounds `max_length`.
        prompts: texts; or, without `completions`, a `datasets.Dataset`, the path of a JSONL, JSON,
            CSV or Parquet file, or the name of a hub dataset (its "train" split).
        completions: texts, as many as prompts.
        num_interventions: accepted for pyreft's sake; positions come from the config.
        nonstop: leave out the end-of-text token after a completion.
        eval_prompts: like `prompts`, for evaluation.
        eval_completions: like `completions`, for evaluation.
        prompt_column: column of prompts in a dataset.
        completion_column: column of completions in a dataset.
        messages_column: column of conversations, lists of `{"role", "content"}`; used, with the
            tokenizer's chat template, where a dataset has it and not `prompt_column`.
        chat_template: also render plain prompts as a user's turn of the chat template.
        max_length: tokens of an example, by default what tokenizer and model allow. A longer
            example loses the beginning of its prompt; how many did is logged.

    Returns:
        `train_dataset`, `eval_dataset` (or None) and `data_collator`.

    Raises:
        ValueError: no examples, unequal counts, missing columns, an empty prompt or completion.
        FileNotFoundError: a path that does not exist.
    """
    limit = smallest_limit(tokenizer, model, max_length)
    base = model.model if isinstance(model, ReftModel) else model
    counts = hasattr(base, "forward") and takes_position_ids(base)

    def tokenized(source: Examples, targets: Sequence[str] | None, name: str) -> datasets.Dataset:
        return tokenize_examples(
            load_examples(source, targets, prompt_column, completion_column),
            tokenizer,
            prompt_column=prompt_column,
            completion_column=completion_column,
            messages_column=messages_column,
            chat_template=chat_template,
            nonstop=nonstop,
            max_length=limit,
            name=name,
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
) -> datasets.Dataset:
    """A dataset from texts, a file, a hub name, or one that is ready."""
    if completions is not None:
        if isinstance(source, str | Path | datasets.Dataset):
            raise ValueError(f"prompts: expected a list of texts, got {source!r}")
        if isinstance(completions, str):
            raise ValueError(f"completions: expected a list of texts, got {completions!r}")
        if len(source) != len(completions):
            raise ValueError(f"{len(source)} prompts but {len(completions)} completions")
        columns = {prompt_column: list(source), completion_column: list(completions)}
        loaded = datasets.Dataset.from_dict(columns)
    elif isinstance(source, datasets.Dataset):
        loaded = source
    elif isinstance(source, str | Path):
        loaded = load_rows(source)
    else:
        raise ValueError(
            "completions are missing: without them, prompts are a datasets.Dataset (one split), a "
            f"path or a hub name, not {type(source).__name__}"
        )
    if len(loaded) == 0:
        raise ValueError("no examples: expected at least one prompt and completion")
    return loaded


def tokenize_examples(
    examples: datasets.Dataset,
    tokenizer: Any,
    *,
    prompt_column: str = "prompt",
    completion_column: str = "completion",
    messages_column: str = "messages",
    chat_template: bool = False,
    nonstop: bool = False,
    max_length: int | None = None,
    name: str = "training",
) -> datasets.Dataset:
    """`input_ids`, `labels`, `prompt_lengths` and `length` for each example or assistant turn.

    `length` is what a Trainer groups batches by, so that they hold little padding
    (`train_sampling_strategy="group_by_length"`).
    """
    columns = examples.column_names
    if prompt_column in columns and completion_column in columns:
        pairs: Iterable[tuple[Any, str]] = zip(
            examples[prompt_column], examples[completion_column], strict=True
        )
        if chat_template:
            pairs = (([{"role": "user", "content": p}], c) for p, c in pairs)
    elif messages_column in columns:
        pairs = _assistant_turns(examples[messages_column], name)
    else:
        raise ValueError(
            f"columns {', '.join(columns)}: expected {prompt_column!r} and {completion_column!r}, "
            f"or {messages_column!r}; name yours with prompt_column, completion_column or "
            "messages_column"
        )
    rows: dict[str, list[Any]] = {
        name: [] for name in ("input_ids", "labels", "prompt_lengths", "length")
    }
    truncated = cut_short = 0
    for index, (prompt, completion) in enumerate(pairs):
        try:
            prompt_ids, target_ids = tokenize(tokenizer, prompt, completion, nonstop)
        except Exception as error:  # of the tokenizer or its chat template, too
            raise ValueError(f"{name} example {index}: {error}") from error
        if max_length is not None and len(prompt_ids) + len(target_ids) > max_length:
            truncated += 1
            whole = len(target_ids)
            prompt_ids, target_ids = truncate(tokenizer, prompt_ids, target_ids, max_length)
            cut_short += len(target_ids) < whole
        rows["input_ids"].append(prompt_ids + target_ids)
        rows["labels"].append([IGNORED_LABEL] * len(prompt_ids) + target_ids)
        rows["prompt_lengths"].append(len(prompt_ids))
        rows["length"].append(len(prompt_ids) + len(target_ids))
    if not rows["labels"]:
        raise ValueError(f"no {name} examples: no conversation has an assistant's turn")
    if truncated:
        logger.warning(
            "%d of %d %s examples were longer than %d tokens and lost the beginning of their "
            "prompts%s",
            truncated,
            len(rows["labels"]),
            name,
            max_length,
            f", {cut_short} of them also the end of their completions" if cut_short else "",
        )
    prompts = sum(rows["prompt_lengths"])
    logger.info(
        "%d %s examples: %d tokens of prompts, %d of completions, the longest example %d",
        len(rows["length"]),
        name,
        prompts,
        sum(rows["length"]) - prompts,
        max(rows["length"]),
    )
    return datasets.Dataset.from_dict(rows)


def _assistant_turns(conversations: Iterable[Any], name: str) -> Iterator[tuple[Any, str]]:
    """Each assistant's message, with all messages before it."""
    for index, conversation in enumerate(conversations):
        for turn, message in enumerate(conversation):
            if not isinstance(message, Mapping) or not {"role", "content"} <= set(message):
                raise ValueError(
                    f"{name} example {index}: message {turn} is {message!r}, expected a mapping "
                    "with 'role' and 'content'"
                )
            if message["role"] == "assistant":
                yield conversation[:turn], message["content"]


@dataclass
class ReftDataCollator:
    """Pad examples to the longest of the batch, on the tokenizer's padding side.

    The attention mask tells tokens from padding, so it does not matter which id pads, and a
    tokenizer without a padding token is fine.
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
        if self.position_ids and on_left:
            counted = tensors["attention_mask"].cumsum(1) - 1
            tensors["position_ids"] = counted.clamp(min=0)
        return tensors
