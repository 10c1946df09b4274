"""Score a model on a task's rows: by what it writes, by which choice it finds most likely, or by
how likely it finds the right answers."""

import logging
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from jaxtyping import Float
from torch import Tensor

from ..config.decoding import WAYS, Way
from ..data.conversations import Messages, rendered
from ..data.tasks.base import ParsedRow, RowError, Task, parse_rows
from ..data.tasks.classifier import ClassifierTask
from ..data.templates import fill
from ..data.tokenization import expect_tokenizer, smallest_limit, tokenize_all
from ..engine.base.threads import in_evaluation_mode, seeded
from ..model import ReftModel
from .generation import generated
from .likelihood import Progress, choice_log_probs, completion_losses, completion_pairs

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Evaluation:
    """A model's answers to a task's rows, in the rows' order.

    Args:
        scores: the task's metrics, the main one first.
        right: whether each row's prediction is right; empty by loss.
        predictions: answers read from `texts`; empty by loss.
        texts: generated texts; by likelihood, the most likely choices; by a head, the predictions;
            empty by loss.
        prompts: prompts of the task, without the template.
        answers: right answers.
        losses: by loss, the mean of −log p over the tokens of each row's completion, in nats.
    """

    scores: dict[str, float]
    right: list[bool]
    predictions: list[str]
    texts: list[str]
    prompts: list[str | Messages]
    answers: list[str]
    losses: list[float] | None = None

    def rows(self) -> list[dict[str, Any]]:
        """Each row's prompt, text, prediction, answer, and whether it is right; or its loss."""
        if self.losses is not None:
            losses = zip(self.prompts, self.answers, self.losses, strict=True)
            return [dict(zip(("prompt", "answer", "loss"), row, strict=True)) for row in losses]
        names = ("prompt", "text", "prediction", "answer", "right")
        columns = (self.prompts, self.texts, self.predictions, self.answers, self.right)
        return [dict(zip(names, row, strict=True)) for row in zip(*columns, strict=True)]


def evaluate(
    model: Any,
    tokenizer: Any,
    task: Task,
    rows: Iterable[Mapping[str, Any] | ParsedRow],
    *,
    by: Way = "generation",
    batch_size: int = 16,
    template: str = "plain",
    max_length: int | None = None,
    max_new_tokens: int | None = None,
    seed: int = 0,
    progress: Progress | None = None,
) -> Evaluation:
    """A model's answers to rows, and their scores.

    By likelihood, the answer is the choice c with the greatest Σᵢ log p(cᵢ | prompt, c₁…cᵢ₋₁),
    without an end-of-text token. Scores that end in `_normalised` take that sum per character of
    the choice, like `acc_norm` of lm-evaluation-harness. A `ClassifierTask` is scored by what the
    model's head predicts.

    By loss, nothing is answered: the score is the mean over rows of −log p per token of the row's
    completion, tokens and end as in training.

    Args:
        model: a `ReftModel`, or a causal language model of transformers; for a `ClassifierTask`,
            one with a head of its classes.
        tokenizer: tokenizer of the base.
        task: makes questions of rows, and reads and compares answers.
        rows: mappings with the task's columns, or what `parse_rows` made of them.
        by: whether the model writes the answer, finds one most likely, or reads the right one.
        batch_size: number of prompts, or by likelihood of prompts with a choice, per forward pass.
        template: template, as in training.
        max_length: by loss, greatest number of tokens of a prompt with its completion, as in
            training.
        max_new_tokens: greatest number of tokens of an answer; by default as many as the task
            needs, but no more than half of the model's context.
        seed: seed for tasks that draw their answers; these also depend on the batch size.
        progress: function that is called with the numbers of rows done and of all rows.

    Raises:
        ValueError: no rows, a row that the task cannot read, a task without choices by likelihood,
            or a model that is not of the kind that the task needs.
    """
    if by not in WAYS:
        raise ValueError(f"by {by!r}: expected {', '.join(WAYS)}")
    expect_tokenizer(tokenizer)
    if batch_size < 1:
        raise ValueError(f"batch_size {batch_size}: expected at least 1")
    parsed = _parsed(task, rows)
    answers = [question.answer for _, question in parsed]
    settings = _Settings(model, tokenizer, batch_size, progress)
    normalised: list[str] | None = None
    further: dict[str, float] = {}
    with evaluating(model, seed):
        if isinstance(task, ClassifierTask):
            if template != "plain":
                raise ValueError(f"template {template!r}: a classifier reads its texts as they are")
            texts = predictions = _by_head(settings, task, parsed)
        else:
            prompts = _prompts(settings, template, parsed)
            if by == "loss":
                return _by_loss(settings, parsed, prompts, max_length)
            if by == "generation":
                if max_new_tokens is None:
                    max_new_tokens = _needed_tokens(settings, task, parsed, prompts)
                texts = generated(
                    model,
                    tokenizer,
                    prompts,
                    max_new_tokens=max_new_tokens,
                    batch_size=batch_size,
                    generation=task.generation,
                    progress=progress,
                )
                predictions = [task.extract(text) for text in texts]
            else:
                sums = _choice_sums(settings, task, parsed, prompts)
                texts, predictions, normalised = _likeliest(parsed, sums)
                further = task.scores_of_choices([row.tolist() for row in sums])
    scores = task.scores(predictions, answers)
    if normalised is not None:
        metrics = task.scores(normalised, answers)
        scores |= {f"{name}_normalised": value for name, value in metrics.items()}
    return Evaluation(
        scores=scores | further,
        right=[task.is_right(p, a) for p, a in zip(predictions, answers, strict=True)],
        predictions=predictions,
        texts=texts,
        prompts=[question.prompt for _, question in parsed],
        answers=answers,
    )


class _Settings(NamedTuple):
    """Arguments of all kinds of evaluation."""

    model: Any
    tokenizer: Any
    batch_size: int
    progress: Progress | None


def _parsed(task: Task, rows: Iterable[Mapping[str, Any] | ParsedRow]) -> list[ParsedRow]:
    try:
        parsed = parse_rows(task, rows)
    except RowError as error:
        raise ValueError(f"task {task.name!r}, row {error.index}: {error.reason}") from None
    if not parsed:
        raise ValueError("no rows: expected at least one to evaluate")
    return parsed


@contextmanager
def evaluating(model: Any, seed: int = 0) -> Iterator[None]:
    """Evaluation mode, no gradients and a seed; modes and random state are restored afterwards."""
    with torch.no_grad(), in_evaluation_mode(model), seeded(seed, model.device):
        yield


def _prompts(
    settings: _Settings, template: str, parsed: Sequence[ParsedRow]
) -> list[str | Messages]:
    """The prompts that a causal language model reads."""
    model = settings.model
    if not model.can_generate() or getattr(model.config, "is_encoder_decoder", False):
        kind = type(model.model if isinstance(model, ReftModel) else model).__name__
        raise ValueError(f"the task needs a causal language model, got {kind}")
    if template == "chat" and settings.tokenizer.chat_template is None:
        raise ValueError("template 'chat': the tokenizer has no chat template")
    return [fill(template, question.prompt, row) for row, question in parsed]


def _needed_tokens(
    settings: _Settings,
    task: Task,
    parsed: Sequence[ParsedRow],
    prompts: Sequence[str | Messages],
) -> int:
    """New tokens that the task needs: its own number, or those of the longest choice and an end."""
    model, tokenizer, needed = settings.model, settings.tokenizer, task.max_new_tokens
    if needed is None:
        pairs = zip(prompts, parsed, strict=True)
        after = {c: prompt for prompt, (_, question) in pairs for c in question.choices}
        texts = [rendered(tokenizer, prompt, choice) for choice, prompt in after.items()]
        needed = 1 + max(len(ids) for _, ids in tokenize_all(tokenizer, texts, True))
    limit = smallest_limit(tokenizer, model, None)
    if limit is not None and needed > limit // 2:
        logger.warning(
            "task %r needs %d new tokens, of a context of %d it gets %d",
            task.name,
            needed,
            limit,
            limit // 2,
        )
        needed = limit // 2
    return needed


def _choice_sums(
    settings: _Settings,
    task: Task,
    parsed: Sequence[ParsedRow],
    prompts: Sequence[str | Messages],
) -> list[Float[Tensor, " choices"]]:
    """The log-probabilities of each row's choices."""
    model, tokenizer, batch_size, progress = settings
    if not all(question.choices for _, question in parsed):
        raise ValueError(f"task {task.name!r} has no choices: evaluate by generation")
    choices = [question.choices for _, question in parsed]
    return choice_log_probs(
        model, tokenizer, prompts, choices, batch_size=batch_size, progress=progress
    )


def _likeliest(
    parsed: Sequence[ParsedRow], sums: Sequence[Float[Tensor, " choices"]]
) -> tuple[list[str], list[str], list[str]]:
    """The likeliest choices, their answers, and the answers of the likeliest per character."""
    questions = [question for _, question in parsed]
    lengths = [torch.tensor([max(1, len(c.strip())) for c in q.choices]) for q in questions]
    best = [int(row.argmax()) for row in sums]
    of_normalised = [int((row / count).argmax()) for row, count in zip(sums, lengths, strict=True)]
    return (
        [q.choices[index] for q, index in zip(questions, best, strict=True)],
        [q.choice_answers[index] for q, index in zip(questions, best, strict=True)],
        [q.choice_answers[index] for q, index in zip(questions, of_normalised, strict=True)],
    )


def _by_loss(
    settings: _Settings,
    parsed: Sequence[ParsedRow],
    prompts: Sequence[str | Messages],
    max_length: int | None,
) -> Evaluation:
    """The loss of each row's completion."""
    model, tokenizer, batch_size, progress = settings
    questions = [question for _, question in parsed]
    completions = [question.completion for question in questions]
    pairs = completion_pairs(model, tokenizer, prompts, completions, max_length)
    losses = completion_losses(model, pairs, batch_size=batch_size, progress=progress)
    return Evaluation(
        scores={"loss": sum(losses) / len(losses)},
        right=[],
        predictions=[],
        texts=[],
        prompts=[question.prompt for question in questions],
        answers=[question.answer for question in questions],
        losses=losses,
    )


def _by_head(settings: _Settings, task: ClassifierTask, parsed: Sequence[ParsedRow]) -> list[str]:
    """The predictions of a classification head."""
    model, tokenizer, batch_size, progress = settings
    limit = min(task.max_length, smallest_limit(tokenizer, model, None) or task.max_length)
    encoded = [tokenizer(*task.texts(row), truncation=True, max_length=limit) for row, _ in parsed]
    order = sorted(range(len(encoded)), key=lambda index: -len(encoded[index]["input_ids"]))
    predictions = [""] * len(encoded)
    for start in range(0, len(order), batch_size):
        indices = order[start : start + batch_size]
        # On the right, since encoders count positions from the first column on.
        batch = tokenizer.pad(
            [encoded[index] for index in indices], padding_side="right", return_tensors="pt"
        )
        logits = model(**batch.to(model.device)).logits
        if logits.shape[1:] != (task.num_labels,):
            raise ValueError(
                f"the model gives {list(logits.shape[1:])} numbers for a row: task {task.name!r} "
                f"needs a head of {task.num_labels}"
            )
        for index, outputs in zip(indices, logits.tolist(), strict=True):
            predictions[index] = task.prediction(outputs)
        if progress is not None:
            progress(min(start + batch_size, len(order)), len(order))
    return predictions
