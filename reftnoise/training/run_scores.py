"""Evaluations of a run: what its recipe names, scored with the adapter and, if asked, without."""

import contextlib
import json
from pathlib import Path
from typing import Any, TypedDict

from rich.console import Console
from typing_extensions import NotRequired

from .._util.files import json_lines, json_text, replace_all
from .._util.progress import progress_of
from ..data.sources import Rows, load_rows, place_of, rename_columns
from ..data.tasks.classifier import ClassifierTask
from ..data.tasks.registry import get_task
from ..evaluation.scoring import Evaluation, evaluate
from ..model import ReftModel
from .recipe import Recipe
from .run_directory import alone
from .run_files import PREDICTIONS, SCORES


class Entry(TypedDict):
    """One evaluation, as `scores.json` has it; one of the harness has only the first three."""

    task: str
    adapter: bool
    scores: dict[str, float]
    arguments: NotRequired[dict[str, Any]]
    data: NotRequired[str | None]
    subset: NotRequired[str | None]
    split: NotRequired[str]
    limit: NotRequired[int | None]
    by: NotRequired[str]
    rows: NotRequired[int]
    right: NotRequired[str]
    """0 and 1 for the rows in their order."""


def evaluation_rows(recipe: Recipe) -> Rows | None:
    """The rows to be scored on, each of which the recipe's task can read; None if it names none."""
    wanted, task = recipe.evaluation, get_task(recipe.task)
    _check_numbers(recipe)
    if wanted.data is None:
        return None
    rows = load_rows(wanted.data, split=wanted.split, subset=wanted.subset)
    rows = rename_columns(rows, recipe.data.columns)
    if wanted.limit is not None:
        rows = rows.take(min(wanted.limit, len(rows)))
    by_choices = wanted.by == "likelihood" and not isinstance(task, ClassifierTask)
    for index, row in enumerate(rows):
        try:
            question = task.question(row)
        except ValueError as error:
            place = place_of(wanted.data, wanted.split, index)
            raise ValueError(f"evaluation.data {place}: {error}") from None
        if by_choices and not question.choices:
            raise ValueError(
                f"evaluation.by likelihood: the task {task.name!r} has no choices; expected "
                "generation"
            )
    return rows


def _check_numbers(recipe: Recipe) -> None:
    for name in ("batch_size", "max_new_tokens", "limit"):
        value = getattr(recipe.evaluation, name)
        if value is not None and value < 1:
            raise ValueError(f"evaluation.{name} {value}: expected at least 1")
    if isinstance(get_task(recipe.task), ClassifierTask) and recipe.data.template != "plain":
        raise ValueError(
            f"data.template {recipe.data.template!r}: a classifier reads its texts as they are; "
            "expected plain"
        )


def score(
    recipe: Recipe,
    reft_model: ReftModel,
    tokenizer: Any,
    *,
    base: bool = False,
    console: Console | None = None,
) -> list[tuple[Entry, Evaluation | None]]:
    """Score a model on what its recipe names: its task's rows, and tasks of the harness.

    Args:
        recipe: its data, task and evaluation.
        reft_model: the adapted model.
        tokenizer: the base's.
        base: also score the base without its units.
        console: where progress is shown.

    Raises:
        ValueError: the recipe names nothing to be scored, or rows that its task cannot read.
    """
    wanted, rows = recipe.evaluation, evaluation_rows(recipe)
    if rows is None and not wanted.lm_eval:
        raise ValueError("nothing to score: expected evaluation.data or evaluation.lm_eval")
    found: list[tuple[Entry, Evaluation | None]] = []
    for is_adapted in (True, False) if base else (True,):
        with contextlib.nullcontext() if is_adapted else reft_model.disabled():
            if rows is not None:
                found.append(_of_task(recipe, rows, reft_model, tokenizer, is_adapted, console))
            if wanted.lm_eval:
                entries = _of_harness(recipe, reft_model, tokenizer, is_adapted)
                found.extend((entry, None) for entry in entries)
    return found


def save_scores(directory: Path, found: list[tuple[Entry, Evaluation | None]]) -> None:
    """Write evaluations beside a run, in the place of earlier ones of the same rows."""
    lines = [
        {"adapter": entry["adapter"], **_row(evaluation, index)}
        for entry, evaluation in found
        if evaluation is not None
        for index in range(entry["rows"])
    ]
    files = {PREDICTIONS: json_lines(lines)} if lines else {}
    path = directory / SCORES
    with alone(directory, seconds=60):
        earlier = json.loads(path.read_text(encoding="utf-8")) if path.exists() else []
        entries = {_of_what(entry): entry for entry in [*earlier, *(entry for entry, _ in found)]}
        files[SCORES] = json_text(list(entries.values()), indent=2).encode() + b"\n"
        replace_all(directory, files)


def _of_what(entry: Entry) -> tuple[Any, ...]:
    names = ("task", "arguments", "data", "subset", "split", "limit", "by", "adapter")
    return tuple(json.dumps(entry.get(name)) for name in names)


def _row(evaluation: Evaluation, index: int) -> dict[str, Any]:
    columns = ("prompts", "texts", "predictions", "answers")
    row = {name.removesuffix("s"): getattr(evaluation, name)[index] for name in columns}
    return row | {"right": evaluation.right[index]}


def _of_task(
    recipe: Recipe,
    rows: Rows,
    reft_model: ReftModel,
    tokenizer: Any,
    is_adapted: bool,
    console: Console | None,
) -> tuple[Entry, Evaluation]:
    wanted, task = recipe.evaluation, get_task(recipe.task)
    with progress_of(console, "evaluation" if is_adapted else "evaluation of the base") as progress:
        found = evaluate(
            reft_model,
            tokenizer,
            task,
            rows,
            by=wanted.by,
            batch_size=wanted.batch_size,
            template=recipe.data.template,
            max_new_tokens=wanted.max_new_tokens,
            seed=recipe.seed,
            progress=progress,
        )
    entry: Entry = {
        "task": task.name,
        "arguments": {} if isinstance(recipe.task, str) else recipe.task,
        "data": wanted.data,
        "subset": wanted.subset,
        "split": wanted.split,
        "limit": wanted.limit,
        "by": wanted.by,
        "adapter": is_adapted,
        "scores": found.scores,
        "rows": len(found.right),
        "right": "".join("01"[right] for right in found.right),
    }
    return entry, found


def _of_harness(
    recipe: Recipe, reft_model: ReftModel, tokenizer: Any, is_adapted: bool
) -> list[Entry]:
    from ..evaluation.lm_eval import evaluate_with_harness  # an extra

    found = evaluate_with_harness(
        reft_model,
        tokenizer,
        recipe.evaluation.lm_eval,
        limit=recipe.evaluation.limit,
        batch_size=recipe.evaluation.batch_size,
    )
    return [
        {"task": f"lm_eval/{name}", "adapter": is_adapted, "scores": scores}
        for name, scores in found.items()
    ]
