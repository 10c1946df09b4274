"""Training data for models with a classification head."""

from typing import Any

import datasets
import numpy as np
from transformers import DataCollatorWithPadding

from .sources import Rows, expect_no_subspaces, map_rows
from .tasks.classifier import ClassifierTask


def make_classifier_data_module(
    tokenizer: Any,
    task: ClassifierTask,
    rows: Rows,
    eval_rows: Rows | None = None,
    *,
    max_length: int,
) -> dict[str, Any]:
    """Datasets, collator and the task's metrics: arguments of a trainer.

    Texts longer than `max_length` tokens lose their end.

    Raises:
        RowError: a row that the task cannot read.
        ValueError: a tokenizer that cannot pad, or a column `subspaces`.
    """
    if tokenizer.pad_token_id is None:
        raise ValueError("the tokenizer has no padding token: give it one and save it again")

    def encoded(source: Rows, name: str) -> Rows:
        expect_no_subspaces(source)

        def encode(row: Any) -> dict[str, Any]:
            tokens = tokenizer(*task.texts(row), truncation=True, max_length=max_length)
            return {**tokens, "labels": task.label(row), "length": len(tokens["input_ids"])}

        value = datasets.Value("int64" if task.classes else "float32")
        numbers = datasets.List(datasets.Value("int64"))
        features = dict.fromkeys(tokenizer("a"), numbers)
        features |= {"labels": value, "length": datasets.Value("int64")}
        return map_rows(source, encode, datasets.Features(features), name)

    def metrics(predicted: Any) -> dict[str, float]:
        labels = np.asarray(predicted.label_ids)
        answers = [task.classes[int(n)] if task.classes else repr(float(n)) for n in labels]
        return task.scores([task.prediction(row) for row in predicted.predictions], answers)

    return {
        "train_dataset": encoded(rows, "training"),
        "eval_dataset": None if eval_rows is None else encoded(eval_rows, "evaluation"),
        "data_collator": DataCollatorWithPadding(tokenizer),
        "compute_metrics": metrics,
    }
