"""pyreft's `reft_trainer` module."""

from collections.abc import Callable, Iterable
from typing import Any

from torch.utils.data import DataLoader, Dataset
from transformers import DataCollatorForSeq2Seq

from ..data.collation import ReftDataCollator
from ..data.encoding import IGNORED_LABEL
from ..training.trainer import (
    ReftTrainer,
    ReftTrainerForCausalLM,
    ReftTrainerForCausalLMDistributed,
    ReftTrainerForSequenceClassification,
)

__all__ = [
    "ReftDataCollator",
    "ReftTrainer",
    "ReftTrainerForCausalLM",
    "ReftTrainerForCausalLMDistributed",
    "ReftTrainerForSequenceClassification",
    "make_data_collator",
    "make_dataloader",
]


def make_data_collator(tokenizer: Any, model: Any) -> ReftDataCollator:
    """A collator that pads ids, masks and labels to the longest example of the batch.

    Args:
        tokenizer: tokenizer of the base.
        model: the base or the `ReftModel`; an encoder-decoder makes its decoder's inputs.
    """
    padding = DataCollatorForSeq2Seq(
        tokenizer=tokenizer, model=model, label_pad_token_id=IGNORED_LABEL, padding="longest"
    )
    return ReftDataCollator(data_collator=padding)


def make_dataloader(
    dataset: "Dataset[Any]",
    batch_size: int,
    collate_fn: Callable[[list[Any]], Any],
    shuffle: bool,
    sampler: Iterable[Any] | None = None,
) -> "DataLoader[Any]":
    """torch's DataLoader of a dataset.

    Args:
        dataset: the examples.
        batch_size: number of examples in a batch.
        collate_fn: collator of a batch.
        shuffle: whether each epoch has another order.
        sampler: order of the examples, instead of `shuffle`.
    """
    return DataLoader(
        dataset, batch_size=batch_size, shuffle=shuffle, sampler=sampler, collate_fn=collate_fn
    )
