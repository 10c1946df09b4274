"""Rows that a training does not see: how many are right, and the loss of each.

| rows | loss of a row | right |
|---|---|---|
| of a task with choices | −log p(right choice) | where the right choice is the likeliest |
| for a classification head | cross-entropy, or squared error of a number | the predicted class |
| others | mean −log p of the completion's tokens, its end-of-text token, too | – |
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple, TypeAlias

import torch
import torch.nn.functional as F
from torch import Tensor

from ...data.sources import Rows
from ...data.tasks.base import parse_rows
from ...data.tasks.classifier import ClassifierTask
from ...data.templates import fill
from ...engine.training_pass.loss import targets_of
from ...evaluation.likelihood import (
    choice_pairs,
    completion_losses,
    completion_pairs,
    summed_log_probs,
)
from ...model import ReftModel
from ..resolved_run import ResolvedRun
from ..run import data_module_of


class Measurement(NamedTuple):
    """The loss of each row, and 0 or 1 for it where rows are right or wrong, else nothing."""

    losses: list[float]
    right: str


HeldOutMeasure: TypeAlias = Callable[[ReftModel], Measurement]


def measure_of(run: ResolvedRun, tokenizer: Any, base: Any, rows: Rows) -> HeldOutMeasure:
    """What measures a model on rows; they are tokenised once, and prompts may be kept.

    Args:
        run: recipe with the task, the template and the size of batches.
        tokenizer: tokenizer of the base.
        base: base of the models, whose context bounds the rows.
        rows: rows as for training.

    Raises:
        RowError: a row that the task cannot read.
    """
    task, size = run.task, run.recipe.evaluation.batch_size
    if isinstance(task, ClassifierTask) or task.name == "text":
        data = data_module_of(run, tokenizer, base, rows)
        batches = list(_batches(data["train_dataset"], data["data_collator"], size))
        by_head = isinstance(task, ClassifierTask)
        return lambda model: _by_batch(model, batches, _of_head if by_head else _of_completion)
    parsed = parse_rows(task, rows, name="training")
    questions = [question for _, question in parsed]
    settings = run.recipe.data
    prompts = [fill(settings.template, question.prompt, row) for row, question in parsed]
    if not all(question.choices for question in questions):
        completions = [question.completion for question in questions]
        texts = completion_pairs(base, tokenizer, prompts, completions, settings.max_length)
        return lambda model: Measurement(completion_losses(model, texts, batch_size=size), "")
    choices = [question.choices for question in questions]
    pairs = choice_pairs(base, tokenizer, prompts, choices)

    def measure(model: ReftModel) -> Measurement:
        sums = torch.split(summed_log_probs(model, pairs, batch_size=size), list(map(len, choices)))
        losses, right = [], ""
        for of_row, question in zip(sums, questions, strict=True):
            answers = [task.is_right(a, question.answer) for a in question.choice_answers]
            losses.append(-float(of_row[answers.index(True)]))
            right += "01"[answers[int(of_row.argmax())]]
        return Measurement(losses, right)

    return measure


def _batches(
    examples: Any, collate: Callable[..., Any], size: int
) -> Iterator[tuple[list[int], Mapping[str, Tensor]]]:
    """Batches of examples of similar length, each with the examples' indices."""
    lengths = examples["length"]
    order = sorted(range(len(examples)), key=lambda index: -lengths[index])
    for start in range(0, len(order), size):
        indices = order[start : start + size]
        features = [
            {name: value for name, value in examples[index].items() if name != "length"}
            for index in indices
        ]
        yield indices, collate(features)


def _by_batch(
    model: ReftModel,
    batches: Sequence[tuple[list[int], Mapping[str, Tensor]]],
    measure: Callable[[ReftModel, dict[str, Tensor]], tuple[Tensor, Sequence[bool]]],
) -> Measurement:
    count = sum(len(indices) for indices, _ in batches)
    losses, right = [0.0] * count, dict[int, bool]()
    for indices, batch in batches:
        of_batch, is_right = measure(model, {n: t.to(model.device) for n, t in batch.items()})
        for index, loss in zip(indices, of_batch.tolist(), strict=True):
            losses[index] = loss
        right |= dict(zip(indices, is_right, strict=False))
    return Measurement(losses, "".join("01"[right[index]] for index in range(len(right))))


def _of_head(model: ReftModel, batch: dict[str, Tensor]) -> tuple[Tensor, Sequence[bool]]:
    labels = batch.pop("labels")
    logits = model(**batch).logits.float()
    if labels.is_floating_point():
        return F.mse_loss(logits[:, 0], labels, reduction="none"), []
    return F.cross_entropy(logits, labels, reduction="none"), (logits.argmax(1) == labels).tolist()


def _of_completion(model: ReftModel, batch: dict[str, Tensor]) -> tuple[Tensor, Sequence[bool]]:
    logits = model(**batch, return_logits="labels").logits.float()
    targets = targets_of(batch["labels"])
    is_label = targets != -100
    losses = logits.new_zeros(targets.shape)
    losses[is_label] = F.cross_entropy(logits, targets[is_label], reduction="none")
    return losses.sum(1) / is_label.sum(1).clamp(min=1), []
