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

import logging
import signal
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from functools import partial
from typing import Any

import datasets
from rich.console import Console
from transformers import PrinterCallback, Trainer, TrainerCallback, set_seed

from .._util.hardware import machine, peak_memory
from .._util.numbers import significant
from .._util.progress import progress_of
from ..adapters.location import ADAPTER
from ..data.classifiers import make_classifier_data_module
from ..data.collation import make_last_position_supervised_data_module
from ..data.sources import Rows
from ..data.tasks.classifier import ClassifierTask
from ..data.tasks.examples import as_examples
from ..data.tasks.preference import PreferenceTask
from ..data.tokenization import smallest_limit
from ..engine.training_pass.prefix_cache import PrefixCache
from ..evaluation.forgetting import expect_causal
from ..model import ReftModel, get_reft_model
from .preference.data import make_preference_data_module
from .preference.trainer import ReftPreferenceTrainer
from .resolved_run import ResolvedRun, load_base_of
from .run_adapter import adapter_directory
from .run_directory import RunDirectory, is_main_process
from .run_scores import Entry, one_answer, save_scores, score
from .steps.watching import unfallen
from .trainer import ReftTrainer

logger = logging.getLogger(__name__)


def run_recipe(
    run: ResolvedRun,
    *,
    resume: bool = False,
    overwrite: bool = False,
    console: Console | None = None,
) -> tuple[dict[str, Any], list[Entry]]:
    """Train what a recipe says and score what it names; the summary, and the evaluations.

    Nothing is written, and nothing of an earlier run removed, before the Trainer's first step. One
    process of several scores; the others return no evaluations. Progress is shown on the console,
    if there is one. A run in `output_dir` is continued by `resume`, and replaced by `overwrite`.

    Raises:
        ValueError, OSError: what in the recipe cannot be done, and why.
    """
    run.expect_trainable()
    is_scored = bool(run.scored_rows) or run.recipe.evaluation.is_wanted
    with RunDirectory(run.recipe, resume=resume, overwrite=overwrite) as directory:
        if not directory.is_trained:
            model, tokenizer, summary = _train(run, directory, console)
            if not is_scored or not is_main_process():
                return summary, []
        elif is_main_process():  # killed before its scores were written
            summary = {"warnings": []} | directory.reopen()
            model, tokenizer = load_trained(run)
        else:
            return {}, []
        entries, predictions = score(run, model, tokenizer, console=console)
        if problem := one_answer(predictions):
            _warn(run, summary, problem)
            directory.finish(summary)
        save_scores(directory.path, entries, predictions)
        return summary, entries


def _warn(run: ResolvedRun, summary: dict[str, Any], problem: str) -> None:
    """Log what is wrong with a run that has ended, and keep it in the summary."""
    rate = run.recipe.training.learning_rate
    advice = f"try a smaller training.learning_rate than {rate:g}, or more steps"
    warning = f"{problem}; {advice}"
    if warning not in summary["warnings"]:  # of a run that was killed between summary and scores
        summary["warnings"].append(warning)
    logger.warning("%s: %s", run.recipe.output_dir, warning)


def _train(
    run: ResolvedRun, directory: RunDirectory, console: Console | None
) -> tuple[ReftModel, Any, dict[str, Any]]:
    """The adapted model in evaluation mode, its tokenizer, and the summary."""
    config, _ = run.config, run.arguments  # which raise before the base is loaded
    set_seed(run.recipe.seed)
    base, tokenizer = load_base_of(run)
    reft_model = get_reft_model(base, config)
    _check_room(run, tokenizer, reft_model)
    rows = run.training_rows
    with run.places():
        data = data_module_of(run, tokenizer, reft_model, rows["train"], rows.get("eval"))
    trainer = trainer_of(run, reft_model, tokenizer, data)
    is_main = is_main_process()
    with _saved_at_interrupt(trainer) as stop:
        started = time.perf_counter()
        with progress_of(console if is_main else None, directory.path.name) as progress:
            if is_main:
                trainer.add_callback(_Log(directory, progress))
            output = trainer.train(resume_from_checkpoint=directory.checkpoint)
            if trainer.state.global_step < trainer.state.max_steps:
                stop.expect_not_asked()
        seconds = time.perf_counter() - started
        if is_main:
            reft_model.eval().save_pretrained(directory.path / ADAPTER)
        summary = _summary(reft_model, output, trainer, seconds)
        losses = [line["loss"] for line in trainer.state.log_history if "loss" in line]
        if is_main and (problem := unfallen(losses)):
            _warn(run, summary, problem)
        if is_main:
            directory.finish(summary)
    return reft_model.eval(), tokenizer, summary


def trainer_of(
    run: ResolvedRun,
    reft_model: ReftModel,
    tokenizer: Any,
    data: Mapping[str, Any],
    prefix_cache: PrefixCache | None = None,
) -> ReftTrainer:
    """What trains a recipe's units on the datasets of `data_module_of`.

    Args:
        run: recipe of the training.
        reft_model: base with the recipe's units.
        tokenizer: tokenizer of the base.
        data: datasets and collator.
        prefix_cache: prompts that several trainings on one base share; by default the recipe's.
    """
    own, task = run.recipe.training.prefix_cache, run.task
    kind: Callable[..., ReftTrainer] = ReftTrainer
    if isinstance(task, PreferenceTask):
        kind = partial(ReftPreferenceTrainer, objective=task.objective)
    trainer = kind(
        model=reft_model,
        args=run.arguments,
        processing_class=tokenizer,
        prefix_cache=own if prefix_cache is None else prefix_cache,
        **data,
    )
    trainer.remove_callback(PrinterCallback)
    return trainer


class _Stop(TrainerCallback):
    """Saves a checkpoint and stops, once it is asked to."""

    def __init__(self) -> None:
        self.is_asked = False

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if self.is_asked:
            control.should_save = control.should_training_stop = True

    on_evaluate = on_step_end  # which comes after the step, and may take longer

    def expect_not_asked(self) -> None:
        """Raise a KeyboardInterrupt if it is asked to stop."""
        if self.is_asked:
            raise KeyboardInterrupt


@contextmanager
def _saved_at_interrupt(trainer: Trainer) -> Iterator[_Stop]:
    """Within the block, which trains, the first Ctrl-C lets a step end and saves a checkpoint.

    At the block's end it is a KeyboardInterrupt; the second is one at once. Where processes train
    together, whose signals come at different steps, and where Ctrl-C is ignored, nothing changes.
    """
    stop, before = _Stop(), signal.getsignal(signal.SIGINT)
    is_main_thread = threading.current_thread() is threading.main_thread()
    if trainer.args.world_size > 1 or not is_main_thread or not callable(before):
        yield stop
        return
    trainer.add_callback(stop)

    def ask(*_: Any) -> None:
        stop.is_asked = True
        signal.signal(signal.SIGINT, before)
        logger.warning("a checkpoint is saved after this step; a second Ctrl-C ends at once")

    signal.signal(signal.SIGINT, ask)
    try:
        yield stop
        stop.expect_not_asked()
    finally:
        signal.signal(signal.SIGINT, before)
        trainer.remove_callback(stop)


def _check_room(run: ResolvedRun, tokenizer: Any, reft_model: ReftModel) -> None:
    """Raise before training what evaluation would raise after it."""
    if not any(parameter.requires_grad for parameter in reft_model.parameters()):
        raise ValueError(
            "the recipe trains nothing: noise has no weights; add another unit, or modules_to_save"
        )
    if run.recipe.evaluation.forgetting is not False:
        expect_causal(reft_model)
    evaluation, limit = run.recipe.evaluation, smallest_limit(tokenizer, reft_model, None)
    count = evaluation.max_new_tokens
    if evaluation.data and count and limit and count > limit - 2:
        raise ValueError(
            f"evaluation.max_new_tokens {count}: expected at most {limit - 2}, for a context of "
            f"{limit}"
        )


def load_trained(run: ResolvedRun) -> tuple[ReftModel, Any]:
    """The base of a recipe with the adapter in its output_dir, in evaluation mode; its tokenizer.

    The directory is that of a run, or of an adapter alone.
    """
    directory = adapter_directory(run.directory)
    base, tokenizer = load_base_of(run)
    return ReftModel.from_pretrained(base, directory), tokenizer


def data_module_of(
    run: ResolvedRun,
    tokenizer: Any,
    reft_model: ReftModel,
    rows: Rows,
    eval_rows: Rows | None = None,
) -> dict[str, Any]:
    """Datasets and collator of rows, as the recipe's task and template make examples of them."""
    data, task, seed = run.recipe.data, run.task, run.recipe.seed
    if isinstance(task, ClassifierTask):
        if isinstance(rows, datasets.IterableDataset):
            rows = rows.shuffle(seed=seed, buffer_size=10_000)
        limit = smallest_limit(tokenizer, reft_model, data.max_length or task.max_length)
        return make_classifier_data_module(
            tokenizer, task, rows, eval_rows, max_length=limit or task.max_length
        )
    if isinstance(task, PreferenceTask):
        return make_preference_data_module(
            tokenizer,
            reft_model,
            rows,
            eval_rows=eval_rows,
            template=data.template,
            max_length=data.max_length,
            shuffle_seed=seed,
        )
    eval_examples = None
    if eval_rows is not None:
        eval_examples = as_examples(eval_rows, task, data.template, tokenizer, name="evaluation")
    return make_last_position_supervised_data_module(
        tokenizer,
        reft_model,
        as_examples(rows, task, data.template, tokenizer),
        eval_prompts=eval_examples,
        max_length=data.max_length,
        shuffle_seed=seed,
    )


def _summary(reft_model: ReftModel, output: Any, trainer: Any, seconds: float) -> dict[str, Any]:
    units, base, total = reft_model.parameter_counts()
    return {
        "parameters": {"units": units, "base": base, "total": total},
        "seconds": round(seconds, 3),
        "steps": output.global_step,
        "tokens": int(trainer.state.num_input_tokens_seen),
        "train_loss": output.training_loss,
        "warnings": [],
        "peak_memory_bytes": peak_memory(str(reft_model.device)),
        "machine": machine(reft_model.device.type),
    }


class _Log(TrainerCallback):
    """Begins a run's directory when training begins, writes its log, and moves a bar by steps."""

    def __init__(self, directory: RunDirectory, progress: Callable[..., None] | None) -> None:
        self._directory, self._progress = directory, progress
        self._text, self._tokens = "loss …", 0
        self._started = self._seconds = 0.0  # of steps alone, without evaluations between them

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self._directory.begin(state.global_step)
        self._tokens = state.num_input_tokens_seen
        self._show(state)  # the number of steps is known now

    def on_step_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self._started = time.perf_counter()

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self._seconds += time.perf_counter() - self._started
        self._show(state)

    def on_log(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        logs = kwargs.get("logs") or {}
        if not logs.keys() & {"loss", "eval_loss"}:
            return  # the totals of the run, which the summary has
        line = {"step": state.global_step, **logs}
        if "loss" in logs:
            tokens = state.num_input_tokens_seen
            speed = line["tokens_per_second"] = round((tokens - self._tokens) / self._seconds, 1)
            self._tokens, self._seconds = tokens, 0.0
            self._text = f"loss {significant(logs['loss'], 3)}"
            if speed:  # the recipe's arguments may leave tokens uncounted
                self._text += f", {speed:,.0f} tokens/s"
            self._show(state)
        self._directory.log(line)

    def _show(self, state: Any) -> None:
        if self._progress is not None:
            self._progress(state.global_step, state.max_steps, self._text)
