"""Evaluations of a run: what its recipe names, scored with the adapter and, if asked, without."""

import contextlib
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, TypedDict

import numpy as np
from rich import box
from rich.console import Console
from rich.table import Table
from typing_extensions import NotRequired

from .._util.files import json_lines, json_text, replace_all
from .._util.numbers import significant
from .._util.progress import progress_of
from ..evaluation.forgetting import forgetting, holds_trained_base, neutral_texts
from ..evaluation.scoring import evaluate
from ..model import ReftModel
from .recipe import Recipe
from .resolved_run import ResolvedRun, load_base_of, scored_by, way_of
from .run_directory import alone
from .run_files import PREDICTIONS, SCORES
from .study.statistics import mean_interval

FORGETTING = "forgetting"
"""The task of evaluations on texts that have nothing to do with the training."""


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
    """generation, likelihood or head."""
    rows: NotRequired[int]
    intervals: NotRequired[dict[str, tuple[float, float]]]
    """Ends of the 95 % intervals of scores."""
    right: NotRequired[str]
    """0 and 1 for the rows in their order."""
    losses: NotRequired[list[float]]
    """By loss, that of each row, in their order, in nats per token."""


def score(
    run: ResolvedRun,
    reft_model: ReftModel,
    tokenizer: Any,
    *,
    base: bool = False,
    console: Console | None = None,
) -> tuple[list[Entry], list[dict[str, Any]]]:
    """Score a model on what its recipe names: its task's rows, and tasks of the harness.

    With `base`, the base without its units is scored, too. Returns the evaluations, and the
    answers to each of the task's rows.

    Raises:
        ValueError: the recipe names nothing to score, or rows that its task cannot read.
    """
    run.expect_scored()
    entries, predictions = list[Entry](), list[dict[str, Any]]()
    for is_adapted in (True, False) if base else (True,):
        with contextlib.nullcontext() if is_adapted else reft_model.disabled():
            if run.scored_rows:
                entry, rows = _of_task(run, reft_model, tokenizer, is_adapted, console)
                entries.append(entry)
                way = {"by": entry["by"], "adapter": is_adapted}
                predictions += [way | row for row in rows]
            if is_adapted and run.recipe.evaluation.forgetting is not False:
                entries += _of_forgetting(run, reft_model, tokenizer, console)
            if run.recipe.evaluation.lm_eval:
                entries += _of_harness(run.recipe, reft_model, tokenizer, is_adapted)
    return entries, predictions


def save_scores(
    directory: Path, entries: Sequence[Entry], predictions: Sequence[Mapping[str, Any]]
) -> None:
    """Write evaluations to a run's directory; they replace earlier ones of the same rows."""
    files = {PREDICTIONS: json_lines(predictions)} if predictions else {}
    path = directory / SCORES
    with alone(directory, seconds=60):
        earlier = json.loads(path.read_text(encoding="utf-8")) if path.exists() else []
        latest = {_of_what(entry): entry for entry in [*earlier, *entries]}
        files[SCORES] = json_text(list(latest.values()), indent=2).encode() + b"\n"
        replace_all(directory, files)


def one_answer(predictions: Sequence[Mapping[str, Any]]) -> str | None:
    """What is wrong where the adapted model answers all rows alike; None if it does not.

    Of fewer than ten rows, or of rows that do have one right answer, nothing is said.
    """
    rows = [row for row in predictions if row["adapter"] and "prediction" in row]
    answers = {row["prediction"] for row in rows}
    if len(rows) < 10 or len(answers) > 1 or len({row["answer"] for row in rows}) == 1:
        return None
    right = sum(bool(row["right"]) for row in rows)
    return f"all {len(rows)} answers are {answers.pop()!r}, of which {right} are right"


def _of_what(entry: Entry) -> tuple[Any, ...]:
    names = ("task", "arguments", "data", "subset", "split", "limit", "by", "adapter")
    return tuple(json.dumps(entry.get(name)) for name in names)


def _of_task(
    run: ResolvedRun,
    reft_model: ReftModel,
    tokenizer: Any,
    is_adapted: bool,
    console: Console | None,
) -> tuple[Entry, list[dict[str, Any]]]:
    recipe, settings = run.recipe, run.recipe.evaluation
    what = "evaluation" if is_adapted else "evaluation of the base"
    with progress_of(console, what, len(run.scored_rows)) as progress:
        evaluation = evaluate(
            reft_model,
            tokenizer,
            run.task,
            run.scored_rows,
            by=way_of(recipe, run.task),
            batch_size=settings.batch_size,
            template=recipe.data.template,
            max_length=recipe.data.max_length,
            max_new_tokens=settings.max_new_tokens,
            seed=recipe.seed,
            progress=progress,
        )
    entry: Entry = {
        "task": run.task.name,
        "arguments": {} if isinstance(recipe.task, str) else recipe.task,
        "data": settings.data,
        "subset": settings.subset,
        "split": settings.split,
        "limit": settings.limit,
        "by": scored_by(recipe, run.task),
        "adapter": is_adapted,
        "scores": evaluation.scores,
        "rows": len(evaluation.prompts),
    }
    if evaluation.losses is None:
        entry["right"] = "".join("01"[right] for right in evaluation.right)
    else:
        entry["losses"] = [round(loss, 5) for loss in evaluation.losses]
    return entry, evaluation.rows()


def _of_forgetting(
    run: ResolvedRun, reft_model: ReftModel, tokenizer: Any, console: Console | None
) -> list[Entry]:
    """Loss and KL to the base on unrelated prompts and texts, of the adapted model and the base.

    Each is the mean over texts of a text's mean over tokens, with its interval over texts. A base
    whose own modules were trained is loaded again.
    """
    settings, entries = run.recipe.evaluation, list[Entry]()
    base = load_base_of(run)[0] if holds_trained_base(reft_model) else None
    path = settings.forgetting if isinstance(settings.forgetting, str) else None
    for kind, texts in neutral_texts(tokenizer, path).items():
        with progress_of(console, f"forgetting, {kind}", len(texts)) as progress:
            measured = forgetting(
                reft_model,
                tokenizer,
                texts,
                base=base,
                batch_size=settings.batch_size,
                progress=progress,
            )
        data = f"{path or 'neutral'} {kind}"
        adapted = {"kl": measured.kl, "loss": measured.adapted_loss, "change": measured.loss_change}
        for is_adapted, columns in ((True, adapted), (False, {"loss": measured.base_loss})):
            means = {name: mean_interval(np.array([values])) for name, values in columns.items()}
            entries.append(
                {
                    "task": FORGETTING,
                    "data": data,
                    "by": "loss",
                    "adapter": is_adapted,
                    "scores": {name: interval.mean for name, interval in means.items()},
                    "intervals": {n: (i.low, i.high) for n, i in means.items() if n != "loss"},
                    "rows": len(measured.tokens),
                }
            )
    return entries


def _of_harness(
    recipe: Recipe, reft_model: ReftModel, tokenizer: Any, is_adapted: bool
) -> list[Entry]:
    from ..evaluation.lm_eval import evaluate_with_harness  # an extra

    scores_by_task = evaluate_with_harness(
        reft_model,
        tokenizer,
        recipe.evaluation.lm_eval,
        limit=recipe.evaluation.limit,
        batch_size=recipe.evaluation.batch_size,
    )
    return [
        {"task": f"lm_eval/{name}", "adapter": is_adapted, "scores": scores}
        for name, scores in scores_by_task.items()
    ]


def scores_table(entries: Sequence[Mapping[str, Any]]) -> tuple[list[str], list[list[str]]]:
    """Headings and rows, one for each evaluation; headings from `rows` on are of numbers."""
    names = list(dict.fromkeys(name for entry in entries for name in entry["scores"]))
    rows = [
        [
            str(entry["task"]),
            " ".join(_short(str(entry[name])) for name in ("data", "split") if entry.get(name)),
            str(entry.get("by") or ""),
            "adapted" if entry.get("adapter", True) else "base",
            str(entry.get("rows") or ""),
            *(_score(entry, name) for name in names),
        ]
        for entry in entries
    ]
    return ["task", "data", "by", "model", "rows", *names], rows


def _score(entry: Mapping[str, Any], name: str) -> str:
    if (value := entry["scores"].get(name)) is None:
        return ""
    if (interval := entry.get("intervals", {}).get(name)) is None:
        return significant(value)
    low, high = (significant(end, 2) for end in interval)
    return f"{significant(value, 3)} ({low} to {high})"


def _short(data: str) -> str:
    """A file without its folders; a data set of the hub as it is named."""
    path = Path(data)
    return path.name if path.is_absolute() or path.suffix else data


def print_scores(entries: Sequence[Mapping[str, Any]], console: Console | None = None) -> None:
    """Print the table of evaluations, and that of what is forgotten, without empty columns."""
    console = console or Console(highlight=False)
    of_tasks = [entry for entry in entries if entry["task"] != FORGETTING]
    others = [entry for entry in entries if entry["task"] == FORGETTING]
    if of_tasks:
        console.print(_printed("Scores", of_tasks))
    if others:
        console.print(_printed("Forgetting, in nats per token", others, ("task", "by")))


def _printed(
    title: str, entries: Sequence[Mapping[str, Any]], left_out: Sequence[str] = ()
) -> Table:
    headings, rows = scores_table(entries)
    columns = range(len(headings))
    filled = [i for i in columns if headings[i] not in left_out and any(row[i] for row in rows)]
    table = Table(title=title, title_justify="left", box=box.SIMPLE_HEAD, padding=(0, 1, 0, 0))
    first_number = headings.index("rows")
    for i in filled:
        words = headings[i].split("_")  # which stand below one another in a narrow terminal
        is_folded = headings[i] in ("task", "data")  # the others are never cut
        cells = [*words, *(row[i] for row in rows)]
        table.add_column(
            " ".join(words),
            justify="right" if i >= first_number else "left",
            overflow="fold",
            min_width=None if is_folded else max(map(len, cells)),
        )
    for row in rows:
        table.add_row(*(row[i] for i in filled))
    return table
