"""Score a model on a task's rows: by what it writes, or by which choice it finds most likely."""

import logging
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

from .scoring import Row, next_token_log_probs, rows_alike
from .tasks.base import Question, Task
from .tokenization import Messages
from .tokenization import smallest_limit as _max_length
from .tokenization import tokenize as _tokenize
from .tokenization import truncate as _truncate

logger = logging.getLogger(__name__)

Progress = Callable[[int, int], None]
"""Called with the rows that are done, and all rows."""


@dataclass(frozen=True)
class Evaluation:
    """A model's answers to a task's rows, in the rows' order.

    Args:
        scores: the task's metrics, the main one first.
        right: of each row.
        predictions: the answers read from `texts`.
        texts: what was generated; by likelihood, the choice that was most likely.
        prompts: what the task asked, before the template.
        answers: the right ones.
    """

    scores: dict[str, float]
    right: list[bool]
    predictions: list[str]
    texts: list[str]
    prompts: list[str]
    answers: list[str]


def evaluate(
    model: Any,
    tokenizer: Any,
    task: Task,
    rows: Iterable[Mapping[str, Any]],
    *,
    by: Literal["generation", "likelihood"] = "generation",
    batch_size: int = 16,
    template: str = "plain",
    max_new_tokens: int | None = None,
    seed: int = 0,
    progress: Progress | None = None,
) -> Evaluation:
    """A model's answers to rows, and their scores.

    By likelihood, the answer is the choice c with the greatest Σᵢ log p(cᵢ | prompt, c₁…cᵢ₋₁),
    without an end-of-text token. Scores that end in `_normalised` take that sum per character of
    the choice (the `acc_norm` of lm-evaluation-harness).

    Args:
        model: a `ReftModel`, or a causal language model of transformers.
        tokenizer: of the base.
        task: makes questions of rows, and reads and compares answers.
        rows: mappings with the task's columns.
        by: what the model is asked for.
        batch_size: prompts, or by likelihood prompts with a choice, per forward pass.
        template: as in training.
        max_new_tokens: of an answer; by default as many as the task needs.
        seed: of tasks that draw their answers; these also depend on the batch size.
        progress: called with the rows that are done and all rows.

    Raises:
        ValueError: no rows, a row that the task cannot read, choices of a task that has none.
    """
    questions = _questions(task, rows)
    if by not in ("generation", "likelihood"):
        raise ValueError(f"by {by!r}: expected 'generation' or 'likelihood'")
    if batch_size < 1:
        raise ValueError(f"batch_size {batch_size}: expected at least 1")
    prompts = [_rendered(template, question) for question in questions]
    answers = [question.answer for question in questions]
    more: dict[str, float] = {}
    with _evaluating(model, seed):
        if by == "generation":
            if max_new_tokens is None:
                max_new_tokens = task.max_new_tokens or _longest_choice(
                    tokenizer, prompts, questions
                )
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
            sums = choice_log_probs(
                model, tokenizer, prompts, questions, batch_size=batch_size, progress=progress
            )
            texts, predictions = _most_likely(questions, sums)
            lengths = [torch.tensor([max(1, len(c.strip())) for c in q.choices]) for q in questions]
            _, normalised = _most_likely(
                questions, [s / n for s, n in zip(sums, lengths, strict=True)]
            )
            more = {f"{n}_normalised": v for n, v in task.scores(normalised, answers).items()}
    return Evaluation(
        scores=task.scores(predictions, answers) | more,
        right=[task.is_right(p, a) for p, a in zip(predictions, answers, strict=True)],
        predictions=predictions,
        texts=texts,
        prompts=[question.prompt for question in questions],
        answers=answers,
    )


def _questions(task: Task, rows: Iterable[Mapping[str, Any]]) -> list[Question]:
    questions = []
    for index, row in enumerate(rows):
        try:
            questions.append(task.question(row))
        except ValueError as error:
            raise ValueError(f"task {task.name!r}, row {index}: {error}") from None
    if not questions:
        raise ValueError("no rows: expected at least one to evaluate")
    return questions


def _rendered(template: str, question: Question) -> str | Messages:
    if template == "plain":
        return question.prompt
    if template == "chat":
        return [{"role": "user", "content": question.prompt}]
    raise ValueError(f"template {template!r}: expected plain or chat")


@contextmanager
def _evaluating(model: Any, seed: int) -> Iterator[None]:
    """Evaluation mode, no gradients, and draws of their own; afterwards all is as it was."""
    device, was_training = model.device, model.training
    model.eval()
    try:
        with torch.no_grad(), torch.random.fork_rng([device] if device.type == "cuda" else []):
            torch.manual_seed(seed)
            yield
    finally:
        model.train(was_training)


# -- by generation ---------------------------------------------------------------------------------


def generated(
    model: Any,
    tokenizer: Any,
    prompts: Sequence[str | Messages],
    *,
    max_new_tokens: int,
    batch_size: int = 16,
    generation: Mapping[str, Any] | None = None,
    progress: Progress | None = None,
) -> list[str]:
    """What a model writes after each prompt: the new tokens' text, up to an end of text.

    Args:
        model: a `ReftModel`, or a causal language model of transformers.
        tokenizer: of the base; prompts are padded on the left, whatever its padding side.
        prompts: texts, or conversations for its chat template.
        max_new_tokens: of each. A prompt that leaves no room for them loses its beginning.
        batch_size: prompts per forward pass; those of about equal length go together.
        generation: further arguments of `generate`; greedy by default.
        progress: called with the prompts that are done and all prompts.

    Raises:
        ValueError: `max_new_tokens` is below 1 or as long as the model's context.
    """
    limit = _max_length(tokenizer, model, None)
    if max_new_tokens < 1 or (limit is not None and limit - max_new_tokens < 2):
        room = "" if limit is None else f" and at most {limit - 2}, for a context of {limit}"
        raise ValueError(f"max_new_tokens {max_new_tokens}: expected at least 1{room}")
    rows: list[Row] = [(_prompt_tokens(tokenizer, prompt), []) for prompt in prompts]
    tokens = _cut(tokenizer, rows, None if limit is None else limit - max_new_tokens)
    ends = _ends(model, tokenizer)
    pad = next(n for n in (tokenizer.pad_token_id, *ends, 0) if n is not None)
    settings = {"do_sample": False} | dict(generation or {})
    if not settings["do_sample"]:  # what the base would sample with is unused, and warned of
        settings = {"temperature": None, "top_p": None, "top_k": None} | settings
    texts = [""] * len(prompts)
    order = sorted(range(len(tokens)), key=lambda index: -len(tokens[index][0]))
    for start in range(0, len(order), batch_size):
        indices = order[start : start + batch_size]
        ids = [torch.tensor(tokens[index][0]) for index in indices]
        mask = [torch.ones_like(one) for one in ids]
        padded = pad_sequence(ids, batch_first=True, padding_value=pad, padding_side="left")
        written = model.generate(
            input_ids=padded.to(model.device),
            attention_mask=pad_sequence(mask, batch_first=True, padding_side="left").to(
                model.device
            ),
            max_new_tokens=max_new_tokens,
            pad_token_id=pad,
            eos_token_id=ends or None,
            **settings,
        )
        for index, new in zip(indices, written[:, padded.shape[1] :].tolist(), strict=True):
            end = next((place for place, token in enumerate(new) if token in ends), None)
            texts[index] = tokenizer.decode(
                new[:end], skip_special_tokens=True, clean_up_tokenization_spaces=False
            )
        if progress is not None:
            progress(min(start + batch_size, len(order)), len(order))
    return texts


def _ends(model: Any, tokenizer: Any) -> list[int]:
    """What ends a text: the token that training puts there, and those that the base writes."""
    own = getattr(model.generation_config, "eos_token_id", None)
    ends = [own] if isinstance(own, int) else list(own or [])
    if tokenizer.eos_token_id is not None:
        ends.append(tokenizer.eos_token_id)
    return sorted(set(ends))


# -- by likelihood ---------------------------------------------------------------------------------


def choice_log_probs(
    model: Any,
    tokenizer: Any,
    prompts: Sequence[str | Messages],
    questions: Sequence[Question],
    *,
    batch_size: int = 16,
    progress: Progress | None = None,
) -> list[Tensor]:
    """Σᵢ log p(cᵢ | prompt, c₁…cᵢ₋₁) of each question's choices c, [choices] per question."""
    rows: list[Row] = []
    for index, (prompt, question) in enumerate(zip(prompts, questions, strict=True)):
        if not question.choices:
            raise ValueError(f"row {index} has no choices: evaluate this task by generation")
        rows += [_tokenize(tokenizer, prompt, choice, True) for choice in question.choices]
    rows = _cut(tokenizer, rows, _max_length(tokenizer, model, None))
    groups = sorted(rows_alike(rows).values(), key=lambda group: -sum(map(len, rows[group[0]])))
    sums = torch.empty(len(rows))
    for start in range(0, len(groups), batch_size):
        chunk = groups[start : start + batch_size]
        all_log_probs = next_token_log_probs(
            model, [rows[group[0]] for group in chunk], dtype=torch.float32
        )
        for group, log_probs in zip(chunk, all_log_probs, strict=True):
            for index in group:
                tokens = torch.tensor(rows[index][1], device=log_probs.device)
                sums[index] = log_probs.gather(1, tokens[:, None]).sum()
        if progress is not None:
            done = min(start + batch_size, len(groups)) / len(groups)
            progress(int(done * len(questions)), len(questions))
    return list(torch.split(sums, [len(question.choices) for question in questions]))


def _most_likely(
    questions: Sequence[Question], scores: Sequence[Tensor]
) -> tuple[list[str], list[str]]:
    """The texts of the best choices, and the answers that they stand for."""
    best = [int(row.argmax()) for row in scores]
    texts = [q.choices[index] for q, index in zip(questions, best, strict=True)]
    answers = [q.choice_answers[index] for q, index in zip(questions, best, strict=True)]
    return texts, answers


# -- tokens ----------------------------------------------------------------------------------------


def _prompt_tokens(tokenizer: Any, prompt: str | Messages) -> list[int]:
    return _tokenize(tokenizer, prompt, " ", True)[0]  # which completion follows does not matter


def _longest_choice(
    tokenizer: Any, prompts: Sequence[str | Messages], questions: Sequence[Question]
) -> int:
    """Tokens of the longest choice, and one that ends it."""
    after = {c: prompt for prompt, q in zip(prompts, questions, strict=True) for c in q.choices}
    return max(len(_tokenize(tokenizer, p, c, True)[1]) for c, p in after.items()) + 1


def _cut(tokenizer: Any, rows: Sequence[Row], limit: int | None) -> list[Row]:
    """Rows without the beginning of prompts that are too long, as training has them."""
    if limit is None:
        return list(rows)
    long = sum(len(prompt) + len(rest) > limit for prompt, rest in rows)
    if long:
        logger.warning(
            "%d of %d prompts were longer than %d tokens and lost their beginning",
            long,
            len(rows),
            limit,
        )
    return [
        _truncate(tokenizer, prompt, rest, limit)
        if len(prompt) + len(rest) > limit
        else (prompt, rest)
        for prompt, rest in rows
    ]
