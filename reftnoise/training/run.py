"""One run: a recipe in, a directory with adapter, log and scores out.

| file | what it holds |
|---|---|
| `recipe.yaml` | the recipe with all its defaults, which gives this run again |
| `adapter/` | the adapter |
| `log.jsonl` | what the Trainer logged: step, loss, learning rate, tokens per second |
| `summary.json` | parameters, seconds, tokens, peak memory, versions |
| `scores.json`, `predictions.jsonl` | evaluations |
| `checkpoints/` | only while the run is not finished |
| `.lock` | held by the process that writes there |
"""

import time
from contextlib import ExitStack
from dataclasses import asdict, fields
from pathlib import Path
from typing import Any

import datasets
import torch
from rich.console import Console
from transformers import (
    AutoModelForSequenceClassification,
    PrinterCallback,
    TrainingArguments,
    set_seed,
)

from .._util.errors import nearest
from .._util.hardware import machine, peak_memory
from ..config.representations import ReftConfig
from ..data.classifiers import make_classifier_data_module
from ..data.collation import make_last_position_supervised_data_module
from ..data.sources import Rows, load_rows, place_of, rename_columns
from ..data.tasks.base import RowError, Task
from ..data.tasks.classifier import ClassifierTask
from ..data.tasks.registry import get_task
from ..data.templates import as_examples
from ..data.tokenization import smallest_limit
from ..engine.base.loading import load_base
from ..model import ReftModel, get_reft_model
from .progress import RichProgressCallback
from .recipe import Recipe
from .run_adapter import adapter_directory
from .run_directory import RunCallback, RunDirectory, is_main_process
from .run_files import ADAPTER, CHECKPOINTS
from .run_scores import Entry, evaluation_rows, save_scores, score
from .trainer import ReftTrainer

_POSITIVE = (
    "learning_rate",
    "num_train_epochs",
    "per_device_train_batch_size",
    "gradient_accumulation_steps",
    "logging_steps",
    "eval_steps",
    "save_steps",
)


def run_recipe(
    recipe: Recipe,
    *,
    resume: bool = False,
    overwrite: bool = False,
    console: Console | None = None,
) -> tuple[dict[str, Any], list[Entry]]:
    """Train what a recipe says and score what it names; the summary, and the evaluations.

    Nothing is written, and nothing of an earlier run removed, before the Trainer's first step. One
    process of several scores; the others return no evaluations.

    Args:
        recipe: of the run.
        resume: go on from the last checkpoint in `output_dir`.
        overwrite: replace a run that is in `output_dir`.
        console: where progress is shown; nowhere, if None.

    Raises:
        ValueError, OSError: what in the recipe cannot be done, and why.
    """
    is_scored = evaluation_rows(recipe) is not None or bool(recipe.evaluation.lm_eval)
    with RunDirectory(recipe, resume=resume, overwrite=overwrite) as directory:
        model, tokenizer, summary = _train(recipe, directory, console)
        if not is_scored or not is_main_process():
            return summary, []
        found = score(recipe, model, tokenizer, console=console)
        save_scores(directory.path, found)
        return summary, [entry for entry, _ in found]


def _train(
    recipe: Recipe, directory: RunDirectory, console: Console | None
) -> tuple[ReftModel, Any, dict[str, Any]]:
    """The adapted model in evaluation mode, its tokenizer, and the summary."""
    config, task, args = reft_config(recipe), get_task(recipe.task), training_arguments(recipe)
    set_seed(recipe.seed)
    base, tokenizer = _base(recipe, task)
    reft_model = get_reft_model(base, config)
    _check_room(recipe, tokenizer, reft_model)
    trainer = ReftTrainer(
        model=reft_model,
        args=args,
        processing_class=tokenizer,
        prefix_cache=recipe.training.prefix_cache,
        **_data_module(recipe, tokenizer, reft_model),
    )
    trainer.remove_callback(PrinterCallback)
    is_main = is_main_process()
    if is_main:
        trainer.add_callback(RunCallback(directory))
    started = time.perf_counter()
    with ExitStack() as stack:
        if console is not None and is_main:
            progress = RichProgressCallback(console, directory.path.name)
            trainer.add_callback(progress)
            stack.callback(progress.stop)
        outcome = trainer.train(resume_from_checkpoint=directory.checkpoint)
    seconds = time.perf_counter() - started
    if is_main:
        reft_model.eval().save_pretrained(directory.path / ADAPTER)
    summary = _summary(reft_model, outcome, trainer, seconds)
    if is_main:
        directory.finish(summary)
    return reft_model.eval(), tokenizer, summary


def _check_room(recipe: Recipe, tokenizer: Any, reft_model: ReftModel) -> None:
    """Say before training what evaluation would say after it."""
    if not any(parameter.requires_grad for parameter in reft_model.parameters()):
        raise ValueError(
            "the recipe trains nothing: noise alone needs modules_to_save, or a unit beside it"
        )
    wanted, limit = recipe.evaluation.max_new_tokens, smallest_limit(tokenizer, reft_model, None)
    if recipe.evaluation.data and wanted and limit and wanted > limit - 2:
        raise ValueError(
            f"evaluation.max_new_tokens {wanted}: expected at most {limit - 2}, for a context of "
            f"{limit}"
        )


def load_trained(recipe: Recipe) -> tuple[ReftModel, Any]:
    """The base of a recipe with the adapter in its output_dir, in evaluation mode; its tokenizer.

    The directory is that of a run, or of an adapter alone.
    """
    directory = adapter_directory(recipe.output_dir)
    base, tokenizer = _base(recipe, get_task(recipe.task))
    return ReftModel.from_pretrained(base, directory), tokenizer


def _base(recipe: Recipe, task: Task) -> tuple[Any, Any]:
    settings: dict[str, Any] = {}
    if isinstance(task, ClassifierTask):
        settings = {
            "auto_class": AutoModelForSequenceClassification,
            "padding_side": "right",  # encoders with absolute positions count from the left
            "num_labels": task.num_labels,
        }
    return load_base(
        recipe.model,
        revision=recipe.revision,
        dtype=recipe.dtype,
        device=recipe.device,
        quantization=recipe.quantization,
        **settings,
    )


def reft_config(recipe: Recipe) -> ReftConfig:
    """The recipe's units, PEFT section and trained modules."""
    if not (recipe.representations or recipe.peft or recipe.modules_to_save):
        raise ValueError(
            "the recipe trains nothing: expected representations, such as "
            "[{layer: all, intervention: loreft, low_rank_dimension: 4, positions: f1+l1}], "
            "peft or modules_to_save"
        )
    return ReftConfig(recipe.representations, recipe.peft, recipe.modules_to_save)


def training_arguments(recipe: Recipe) -> TrainingArguments:
    """The Trainer's settings; what `training.arguments` says comes last."""
    given = asdict(recipe.training)
    for name in _POSITIVE:
        if given[name] is not None and given[name] <= 0:
            raise ValueError(f"training.{name} {given[name]}: expected a positive number")
    further, eval_steps = given.pop("arguments"), given.pop("eval_steps")
    save_steps, by_length = given.pop("save_steps"), given.pop("group_by_length")
    given.pop("prefix_cache")
    evaluates = "steps" if eval_steps else "epoch"
    settings: dict[str, Any] = {
        **given,
        "output_dir": str(Path(recipe.output_dir) / CHECKPOINTS),
        "seed": recipe.seed,
        "eval_strategy": "no" if recipe.data.eval is None else evaluates,
        "eval_steps": eval_steps,
        "save_strategy": "steps" if save_steps else "no",
        "save_steps": save_steps or 500,
        "save_total_limit": 1,
        "train_sampling_strategy": "group_by_length" if by_length else "random",
        "include_num_input_tokens_seen": "non_padding",
        "dataloader_pin_memory": torch.cuda.is_available() and recipe.device != "cpu",
        "use_cpu": recipe.device == "cpu",
        "disable_tqdm": True,
        "report_to": "none",
    }
    known = [each.name for each in fields(TrainingArguments) if each.init]
    for name in further:
        if name not in known:
            raise ValueError(
                f"training.arguments: transformers.TrainingArguments has no {name!r}; "
                + nearest(name, known, "see its documentation")
            )
    try:
        arguments = TrainingArguments(**settings | further)
        if not isinstance(arguments.seed, int):
            raise ValueError(f"seed {arguments.seed!r}: expected an integer")
        return arguments
    except (TypeError, ValueError) as error:
        raise ValueError(f"training: {error}") from None


def _data_module(recipe: Recipe, tokenizer: Any, reft_model: ReftModel) -> dict[str, Any]:
    data = recipe.data
    if data.train is None:
        raise ValueError("data.train: expected a file, the name of a hub dataset, or tiny-chat")
    if data.streaming and recipe.training.max_steps < 1:
        raise ValueError("data.streaming needs training.max_steps: nobody knows how long data is")
    sources = [(data.train, data.train_split)]
    if data.eval is not None:
        sources.append((data.eval, data.eval_split))
    parts: list[Rows] = []
    for source, split in sources:
        is_streamed = data.streaming and source == data.train
        rows = load_rows(source, split=split, subset=data.subset, streaming=is_streamed)
        parts.append(rename_columns(rows, data.columns))
    try:
        return data_module_of(recipe, tokenizer, reft_model, *parts)
    except RowError as error:
        if error.index is None:
            raise
        option = "eval" if error.name == "evaluation" else "train"
        source, split = sources[option == "eval"]
        place = place_of(source, split, error.index)
        raise ValueError(f"data.{option} {place}: {error.reason}") from None


def data_module_of(
    recipe: Recipe,
    tokenizer: Any,
    reft_model: ReftModel,
    rows: Rows,
    eval_rows: Rows | None = None,
) -> dict[str, Any]:
    """Datasets and collator of rows, as the recipe's task and template make examples of them."""
    data, task = recipe.data, get_task(recipe.task)
    if isinstance(task, ClassifierTask):
        if isinstance(rows, datasets.IterableDataset):
            rows = rows.shuffle(seed=recipe.seed, buffer_size=10_000)
        limit = smallest_limit(tokenizer, reft_model, data.max_length or task.max_length)
        return make_classifier_data_module(
            tokenizer, task, rows, eval_rows, max_length=limit or task.max_length
        )
    given = None
    if eval_rows is not None:
        given = as_examples(eval_rows, task, data.template, tokenizer, name="evaluation")
    return make_last_position_supervised_data_module(
        tokenizer,
        reft_model,
        as_examples(rows, task, data.template, tokenizer),
        eval_prompts=given,
        max_length=data.max_length,
        shuffle_seed=recipe.seed,
    )


def _summary(reft_model: ReftModel, outcome: Any, trainer: Any, seconds: float) -> dict[str, Any]:
    units, base, total = reft_model.count_parameters()
    return {
        "parameters": {"units": units, "base": base, "total": total},
        "seconds": round(seconds, 3),
        "steps": outcome.global_step,
        "tokens": int(trainer.state.num_input_tokens_seen),
        "train_loss": outcome.training_loss,
        "peak_memory_bytes": peak_memory(str(reft_model.device)),
        "machine": machine(reft_model.device.type),
    }
