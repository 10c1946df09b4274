"""A recipe with what it names: task, config, arguments and rows are each read once.

Mistakes in a recipe are raised before torch is imported, as far as that is possible: heavy imports
are inside the properties.
"""

import re
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, fields, replace
from functools import cache, cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any, get_type_hints

from .._util.errors import brief, nearest, one_line, value_errors
from .._util.files import local_path
from .._util.types import expect_type
from ..config.base_model import expect_base
from ..config.decoding import Way
from ..config.positions import Positions
from ..data.files import expect_file
from ..data.tasks.base import ParsedRow, RowError, Task, parse_rows
from ..data.tasks.classifier import ClassifierTask
from ..data.tasks.registry import get_task
from ..data.templates import check_template
from .recipe import Recipe, TrainingConfig
from .run_files import CHECKPOINTS

if TYPE_CHECKING:
    from transformers import TrainingArguments

    from ..config.representations import ReftConfig
    from ..data.sources import Rows

_POSITIVE = (
    "learning_rate",
    "num_train_epochs",
    "per_device_train_batch_size",
    "gradient_accumulation_steps",
    "logging_steps",
    "eval_steps",
    "save_steps",
)


def with_default_edit(recipe: Recipe) -> Recipe:
    """The recipe; with its task's edit where it names neither units nor PEFT nor modules to train.

    Raises:
        ValueError: there is no such task.
    """
    if recipe.representations or recipe.peft or recipe.modules_to_save:
        return recipe
    return replace(recipe, representations=[dict(get_task(recipe.task).default_edit)])


class ResolvedRun:
    """A recipe with what it trains by default, and what it names.

    Raises:
        ValueError: the task, the base's dtype, the template or a number of the evaluation is wrong.
        FileNotFoundError: there is no such base, or no such file of rows to score.
    """

    def __init__(self, recipe: Recipe) -> None:
        self.recipe = recipe = with_default_edit(recipe)
        self.directory = local_path(recipe.output_dir, "output_dir")
        self.task = get_task(recipe.task)
        expect_base(recipe.model, recipe.dtype)
        check_template(recipe.data.template)
        for name in ("batch_size", "max_new_tokens", "limit"):
            value = getattr(recipe.evaluation, name)
            if value is not None and value < 1:
                raise ValueError(f"evaluation.{name} {value}: expected at least 1")
        if isinstance(self.task, ClassifierTask) and recipe.data.template != "plain":
            raise ValueError(
                f"data.template {recipe.data.template!r}: a classifier reads its texts as they "
                "are; expected plain"
            )
        if recipe.evaluation.data is not None:
            expect_file(recipe.evaluation.data)
        forgetting = recipe.evaluation.forgetting
        if forgetting is not False and isinstance(self.task, ClassifierTask):
            raise ValueError("evaluation.forgetting: a classifier predicts no texts")
        if isinstance(forgetting, str) and not local_path(forgetting).is_file():
            raise FileNotFoundError(f"evaluation.forgetting {forgetting}: no such file")

    def expect_scored(self) -> None:
        """Raise a ValueError for a recipe that names nothing to score."""
        evaluation = self.recipe.evaluation
        if not evaluation.is_wanted:
            raise ValueError(
                "nothing to score: expected evaluation.data, evaluation.lm_eval or "
                "evaluation.forgetting"
            )

    def expect_trainable(self) -> None:
        """Raise a ValueError or OSError for what can be known to be wrong without torch."""
        recipe, data, training = self.recipe, self.recipe.data, self.recipe.training
        for unit in recipe.representations:
            name = unit.get("intervention")
            if isinstance(name, str) and "torch" not in sys.modules and name not in unit_names():
                names = nearest(name, unit_names())
                raise ValueError(f"intervention {name!r} is not registered; {names}")
            if isinstance(unit.get("positions"), str):
                Positions.parse(unit["positions"])
        _expect_positive(training)
        if data.train is None:
            raise ValueError("data.train: expected a file, the name of a hub dataset, or tiny-chat")
        if data.streaming and training.max_steps < 1:
            raise ValueError(
                "data.streaming: expected training.max_steps, since the length of the data is "
                "unknown"
            )
        for source in (data.train, data.eval):
            if source is not None:
                expect_file(source)

    @cached_property
    def config(self) -> "ReftConfig":
        """The recipe's units, PEFT section and trained modules."""
        from ..config.representations import ReftConfig

        recipe = self.recipe
        return ReftConfig(recipe.representations, recipe.peft, recipe.modules_to_save)

    @cached_property
    def arguments(self) -> "TrainingArguments":
        """The Trainer's settings, in which `training.arguments` come last."""
        import torch
        from transformers import TrainingArguments

        recipe, training = self.recipe, asdict(self.recipe.training)
        further, eval_steps = training.pop("arguments"), training.pop("eval_steps")
        save_steps, by_length = training.pop("save_steps"), training.pop("group_by_length")
        training.pop("prefix_cache")
        has_gpu = torch.accelerator.is_available()
        evaluates = "steps" if eval_steps else "epoch"
        settings = {
            **training,
            "output_dir": str(self.directory / CHECKPOINTS),
            "seed": recipe.seed,
            "eval_strategy": "no" if recipe.data.eval is None else evaluates,
            "eval_steps": eval_steps,
            "save_strategy": "steps" if save_steps else "no",
            "save_steps": save_steps or 500,
            "save_total_limit": 1,
            "train_sampling_strategy": "group_by_length" if by_length else "random",
            "include_num_input_tokens_seen": "non_padding",
            "dataloader_pin_memory": torch.cuda.is_available() and recipe.device != "cpu",
            "use_cpu": recipe.device == "cpu" or (recipe.device == "auto" and not has_gpu),
            "disable_tqdm": True,
            "report_to": "none",
        }
        known = {field.name: field for field in fields(TrainingArguments) if field.init}
        hints = get_type_hints(TrainingArguments)
        for name, value in further.items():
            if name not in known:
                raise ValueError(
                    f"training.arguments: transformers.TrainingArguments has no {name!r}; "
                    + nearest(name, known, "see its documentation")
                )
            if name == "output_dir":  # where `resume` would not look for checkpoints
                raise ValueError("training.arguments: output_dir is the recipe's own")
            default = known[name].default  # which may break its own type
            if value is None or value != default or type(value) is not type(default):
                expect_type(f"training.arguments.{name}", value, hints[name])
        try:
            arguments = TrainingArguments(**settings | further)
        except (TypeError, ValueError, AttributeError, KeyError) as error:
            raise ValueError(f"training: {one_line(error)}") from None
        if isinstance(arguments.lr_scheduler_kwargs, str):  # no JSON, which it would have read
            raise ValueError("training.arguments.lr_scheduler_kwargs: expected a mapping")
        _expect_positive(arguments)
        _expect_schedule(arguments)
        _expect_names(arguments)
        return arguments

    @cached_property
    def training_rows(self) -> "dict[str, Rows]":
        """The rows to train on, as `train`, and those whose loss is measured, as `eval`."""
        from ..data.sources import load_rows, rename_columns

        data = self.recipe.data
        sources = {"train": (data.train, data.train_split), "eval": (data.eval, data.eval_split)}
        rows = {}
        for name, (source, split) in sources.items():
            if source is not None:
                is_streamed = data.streaming and source == data.train
                loaded = load_rows(source, split=split, subset=data.subset, streaming=is_streamed)
                rows[name] = rename_columns(loaded, data.columns)
        return rows

    @cached_property
    def scored_rows(self) -> list[ParsedRow]:
        """The rows to score, each with its question; empty where the recipe names none."""
        from ..data.sources import load_rows, rename_columns

        evaluation, task = self.recipe.evaluation, self.task
        if evaluation.data is None:
            return []
        rows = load_rows(evaluation.data, split=evaluation.split, subset=evaluation.subset)
        rows = rename_columns(rows, self.recipe.data.columns)
        if evaluation.limit is not None:
            rows = rows.take(min(evaluation.limit, len(rows)))
        with self.places():
            parsed = parse_rows(task, rows, name="scored")
        needs_choices = scored_by(self.recipe, task) == "likelihood"
        if needs_choices and not all(row.question.choices for row in parsed):
            raise ValueError(
                f"evaluation.by likelihood: the task {task.name!r} has no choices; expected "
                "generation"
            )
        return parsed

    @contextmanager
    def places(self) -> Iterator[None]:
        """Within the block, an error of a row names the option, the file and the line."""
        try:
            yield
        except RowError as error:
            if error.index is None:
                raise
            from ..data.sources import place_of

            data, evaluation = self.recipe.data, self.recipe.evaluation
            option, source, split = {
                "training": ("data.train", data.train, data.train_split),
                "evaluation": ("data.eval", data.eval, data.eval_split),
                "scored": ("evaluation.data", evaluation.data, evaluation.split),
            }[error.name]
            place = place_of(source or "", split, error.index)
            raise ValueError(f"{option} {place}: {error.reason}") from None


def scored_by(recipe: Recipe, task: Task) -> str:
    """The way in which rows are scored: as recipe and task say, or by a classifier's head."""
    return "head" if isinstance(task, ClassifierTask) else way_of(recipe, task)


def way_of(recipe: Recipe, task: Task) -> Way:
    """The way in which rows are scored, as a recipe says, or else its task."""
    return recipe.evaluation.by or task.way


def _expect_positive(training: "TrainingConfig | TrainingArguments") -> None:
    for name in _POSITIVE:
        value = getattr(training, name)
        if value is not None and value <= 0:
            raise ValueError(f"training.{name} {value}: expected a positive number")


def _expect_schedule(arguments: "TrainingArguments") -> None:
    """Build the schedule of the learning rate as the Trainer does once the base is loaded."""
    import torch
    from transformers import get_scheduler

    kind, further = arguments.lr_scheduler_type, arguments.lr_scheduler_kwargs
    with value_errors(f"training.arguments.lr_scheduler_kwargs {brief(further)}"):
        get_scheduler(kind, torch.optim.SGD([torch.zeros(1)]), 0, 1, further)


def _expect_names(arguments: "TrainingArguments") -> None:
    """Look up the names that the Trainer looks up once the base is loaded."""
    from transformers.training_args import trainer_log_levels

    levels = list(trainer_log_levels)
    names = {"log_level": levels, "log_level_replica": levels}
    if arguments.torch_compile_mode is not None and arguments.torch_compile_backend == "inductor":
        from torch._inductor import list_mode_options

        names["torch_compile_mode"] = list(list_mode_options())
    for option, possible in names.items():
        if (name := getattr(arguments, option)) not in possible:
            raise ValueError(f"training.arguments.{option} {name!r}: {nearest(name, possible)}")


@cache
def unit_names() -> tuple[str, ...]:
    """The names in the registry of interventions, read from its source: it would import torch."""
    return tuple(name for name, _ in _registered())


@cache
def noise_names() -> tuple[str, ...]:
    """The names of noises in the registry."""
    return tuple(name for name, module in _registered() if module.endswith("noise"))


def _registered() -> list[tuple[str, str]]:
    """Each name in the registry, and the module of its class."""
    source = (Path(__file__).parents[1] / "interventions" / "registry.py").read_text("utf-8")
    return re.findall(r'^    "(\w+)": (\w+)', source[: source.index("}")], re.MULTILINE)


def load_base_of(run: ResolvedRun) -> tuple[Any, Any]:
    """The base of a recipe, with a new head for a task of classification; its tokenizer."""
    from transformers import AutoModelForSequenceClassification

    from ..engine.base.loading import load_base

    recipe, settings = run.recipe, dict[str, Any]()
    if isinstance(run.task, ClassifierTask):
        settings = {
            "auto_class": AutoModelForSequenceClassification,
            "padding_side": "right",  # encoders with absolute positions count from the left
            "num_labels": run.task.num_labels,
        }
    return load_base(
        recipe.model,
        revision=recipe.revision,
        dtype=recipe.dtype,
        device=recipe.device,
        quantization=recipe.quantization,
        **settings,
    )
