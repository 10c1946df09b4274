"""Trials that train on one base: it is loaded, rows are tokenised and prompts prefilled once."""

import gc
import math
from collections.abc import Callable
from dataclasses import replace
from tempfile import TemporaryDirectory
from typing import Any

import torch
from transformers import TrainerCallback, set_seed

from ...data.sources import Rows
from ...data.tasks.base import RowError
from ...engine.base.sites import num_layers
from ...engine.training_pass.prefix_cache import Place, PrefixCache
from ...evaluation.scoring import evaluating
from ...model import ReftModel, get_reft_model
from ..recipe import Recipe
from ..resolved_run import ResolvedRun, load_base_of
from ..run import data_module_of, trainer_of
from .held_out import Measurement, measure_of

OnMeasurement = Callable[[int, Measurement], bool]
"""Called with the number of a measurement and its result; whether the training ends there."""


class SharedBase:
    """A base, its rows, and the prompts that trainings on it share.

    What a training ends with is what its recipe alone gives on the rows that are not held out, up
    to rounding where a prompt was first computed in a batch of another width. A prompt's keys and
    values before the first edit depend on the frozen base and on tokens alone, so units at other
    layers, of other ranks or rates find them in the cache. Positions that edit a prompt's start,
    and noise on prompts, compute them in each epoch. Modules of the base that are trained, such as
    a classifier's head, begin each training as they were loaded. A recipe with `peft`, whose layers
    stay in the base, loads it for each training.

    Args:
        run: recipe whose base, rows and task all trainings have.
        held_out: share of the training rows that is held out; from 1 on, their number.
        seed: seed of the choice of these rows.
        prefix_cache: place for keys and values of prompts.
        prefix_cache_bytes: greatest size of the kept prompts.

    Raises:
        ValueError: too few rows, or a row that the task cannot read.
    """

    def __init__(
        self,
        run: ResolvedRun,
        *,
        held_out: float,
        seed: int,
        prefix_cache: Place = "memory",
        prefix_cache_bytes: int = 2**32,
    ) -> None:
        self._run = run
        self._has_layers_of_peft = False
        rows = run.training_rows["train"]
        train, held = split_rows(len(rows), held_out, seed)
        self._base, self._tokenizer = self._loaded()
        self.layers = num_layers(self._base)

        def placed(make: Callable[..., Any], indices: list[int]) -> Any:
            part: Rows = rows.select(indices)
            with run.places():
                try:
                    return make(run, self._tokenizer, self._base, part)
                except RowError as error:
                    if error.index is None:
                        raise
                    index = indices[error.index]
                    raise RowError(error.reason, name="training", index=index) from None

        self._data = placed(data_module_of, train)
        self._measure = placed(measure_of, held)
        self.prefix_cache = (
            None if prefix_cache == "none" else PrefixCache(prefix_cache, prefix_cache_bytes)
        )

    def train(
        self, recipe: Recipe, *, measurements: int, on_measurement: OnMeasurement
    ) -> ReftModel:
        """Train a recipe's units, measured at equal distances; the model in evaluation mode.

        Args:
            recipe: recipe that differs from the shared one in its units and settings of training.
            measurements: number of measurements, the last at the end.
            on_measurement: what is done with each.

        Raises:
            ValueError: the units do not fit the base, or training diverged.
        """
        if self._has_layers_of_peft:
            self._reload()
        with TemporaryDirectory(prefix="reftnoise-trial-") as directory:
            run = ResolvedRun(replace(recipe, output_dir=directory))
            set_seed(recipe.seed)
            torch.set_rng_state(self._random_state)
            self._has_layers_of_peft = run.recipe.peft is not None
            reft_model = get_reft_model(self._base.eval(), run.config)
            self._restore()
            trainer = trainer_of(run, reft_model, self._tokenizer, self._data, self.prefix_cache)
            measure = _Measuring(
                lambda: self.measured(reft_model, recipe.seed), measurements, on_measurement
            )
            trainer.add_callback(measure)
            trainer.train()
        return reft_model.eval()

    def measured(self, reft_model: ReftModel, seed: int = 0) -> Measurement:
        """The model's losses and right answers on the held-out rows."""
        before = reft_model.prefix_cache
        reft_model.prefix_cache = self.prefix_cache
        try:
            with evaluating(reft_model, seed):
                return self._measure(reft_model)
        finally:
            reft_model.prefix_cache = before

    def _restore(self) -> None:
        """Give the trained parameters of the base the values that they were loaded with."""
        trained = {n: p.detach() for n, p in self._base.named_parameters() if p.requires_grad}
        for name, parameter in trained.items():
            if name in self._as_loaded:
                parameter.copy_(self._as_loaded[name])
            else:
                self._as_loaded[name] = parameter.clone()

    def _reload(self) -> None:
        """Load the base once the one of the training before is gone: memory may hold only one."""
        self._base = None
        gc.collect()  # of the Trainer's circles
        self._base, self._tokenizer = self._loaded()

    def _loaded(self) -> tuple[Any, Any]:
        """The base and its tokenizer; trainings draw the numbers that would come after these."""
        set_seed(self._run.recipe.seed)
        loaded = load_base_of(self._run)
        self._as_loaded: dict[str, torch.Tensor] = {}
        self._random_state = torch.get_rng_state()
        return loaded


def split_rows(count: int, held_out: float, seed: int) -> tuple[list[int], list[int]]:
    """Indices of the rows that are trained on and of those that are held out, each in order.

    Raises:
        ValueError: no row is left to train on.
    """
    size = math.ceil(count * held_out) if held_out < 1 else int(held_out)
    if not 0 < size < count:
        raise ValueError(
            f"held_out {held_out:g}: expected fewer than the {count} rows of data.train"
        )
    order = torch.randperm(count, generator=torch.Generator().manual_seed(seed)).tolist()
    return sorted(order[size:]), sorted(order[:size])


class _Measuring(TrainerCallback):
    """Measures after equal parts of the steps, and ends the training where that is wanted."""

    def __init__(
        self, measure: Callable[[], Measurement], count: int, on_measurement: OnMeasurement
    ) -> None:
        self._measure, self._count, self._on_measurement = measure, count, on_measurement
        self._numbers: dict[int, int] = {}

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        parts = range(1, self._count + 1)  # where steps are few, the last of them holds
        self._numbers = {math.ceil(state.max_steps * n / self._count): n for n in parts}

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        number = self._numbers.get(state.global_step)
        if number is not None and self._on_measurement(number, self._measure()):
            control.should_training_stop = True
