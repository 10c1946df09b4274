"""Search a recipe's settings by Optuna: trials on one base, in any number of processes.

| file | what it holds |
|---|---|
| `tuning.yaml` | the search with all its defaults, which continues it |
| `trials.journal` | the trials, in Optuna's storage |
| `best.yaml` | the recipe of the best trial, to be trained on all rows |
| `.trial-*.lock` | held by the process that runs the trial |

A process that was killed loses its trial, whose values are then tried again: what a trial tries
depends on the finished ones and on the seed. With one process, a search that was interrupted thus
ends as one that was not.
"""

import itertools
import math
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
from filelock import FileLock, Timeout

from ..._util.errors import first_difference, one_line
from ..._util.files import local_path, replace_all
from ..._util.options import read_file
from ..recipe import Recipe
from ..run_files import BEST, TRIALS, TUNING
from .held_out import Measurement
from .shared_base import SharedBase
from .space import NONE, Dimensions, Tuning, Value, check_tuning

try:
    import optuna
    from optuna.storages.journal import JournalFileBackend, JournalFileOpenLock
    from optuna.trial import TrialState
except ModuleNotFoundError:
    raise ValueError("tuning needs optuna: pip install 'reftnoise[tune]'") from None

OnTrial = Callable[["Sequence[TunedTrial]"], None]


@dataclass(frozen=True)
class TunedTrial:
    """A finished trial: its values, and what the held-out rows say of it."""

    number: int
    values: dict[str, Value]
    """Value by setting."""
    recipe: Recipe
    losses: list[float]
    """Of the held-out rows, at its last measurement."""
    right: str
    """0 and 1 for the held-out rows; empty where they are not right or wrong."""
    part: float
    """Share of its steps that it was trained."""
    seconds: float
    problem: str | None
    """Why it has no result, such as that it diverged."""
    by_right: bool
    """Whether right answers make a trial the best."""
    is_own: bool
    """Whether its values are those of the recipe that is tuned."""

    @property
    def loss(self) -> float:
        """The mean loss of the held-out rows."""
        return float(np.mean(self.losses)) if self.losses else math.inf

    @property
    def value(self) -> float:
        """What is to be greatest; see `value_of`."""
        return value_of(self.losses, self.right, self.by_right) if self.losses else -math.inf

    @property
    def is_complete(self) -> bool:
        """Whether it was trained to its end."""
        return self.part == 1 and self.problem is None


def value_of(losses: Sequence[float], right: str, by_right: bool) -> float:
    r"""The number that is to be greatest.

    With losses alone it is their mean's negative. With right answers it is
    $(n_\text{right} + e^{-\bar\ell}) / n$: the second term is worth at most one answer, so that of
    two trials with equally many right answers the one of lower loss is better.
    """
    loss = float(np.mean(losses))
    if not by_right:
        return -loss
    return (right.count("1") + math.exp(-loss)) / len(right)


class TrialStorage:
    """The trials of a search in its directory, which any number of processes may write.

    Args:
        tuning: the search.

    Raises:
        ValueError: the directory holds another search.
    """

    def __init__(self, tuning: Tuning) -> None:
        self.directory = local_path(tuning.output_dir, "output_dir")
        self.tuning = tuning
        if self.directory.exists() and not self.directory.is_dir():
            raise ValueError(f"output_dir {self.directory}: expected a directory, found a file")
        self.directory.mkdir(parents=True, exist_ok=True)
        optuna.logging.set_verbosity(optuna.logging.WARNING)
        path = str(self.directory / TRIALS)
        backend = JournalFileBackend(path, lock_obj=JournalFileOpenLock(path))
        with self._locked():
            _expect_same(tuning, self.directory / TUNING)
            replace_all(self.directory, {TUNING: tuning.to_yaml().encode()})
            self._study = optuna.create_study(
                storage=optuna.storages.JournalStorage(backend),
                study_name="reftnoise",
                direction="maximize",
                load_if_exists=True,
                pruner=_pruner(tuning),
            )

    @contextmanager
    def _locked(self) -> Iterator[None]:
        with FileLock(self.directory / ".trials.lock"):
            yield

    def _lock_of(self, number: int) -> FileLock:
        return FileLock(self.directory / f".trial-{number}.lock")

    def finished(self) -> list[TunedTrial]:
        """The trials that are finished, by number."""
        states = (TrialState.COMPLETE, TrialState.PRUNED)
        trials = self._study.get_trials(deepcopy=False, states=states)
        base = self.tuning.searched_recipe()
        return [_tuned(trial, base) for trial in trials]

    @contextmanager
    def next(self, dimensions: Dimensions) -> Iterator[tuple[Any, dict[str, Value]] | None]:
        """A new trial and its values, which is this process's within the block; None at the end.

        The first has the recipe's own values; where that one is lost, the next has them. A block
        that ends by an exception loses the trial.
        """
        with self._locked():
            self._drop_lost()
            trials = self._study.get_trials(deepcopy=False)
            begun = [t for t in trials if t.state not in (TrialState.FAIL, TrialState.WAITING)]
            if len(begun) >= self.tuning.trials:
                trial, held = None, None
            else:
                is_queued = any(t.state == TrialState.WAITING for t in trials)
                if not is_queued and all(t.params != dimensions.own for t in begun):
                    self._study.enqueue_trial(dict(dimensions.own))
                taken = {t.user_attrs["place"] for t in begun}
                place = next(n for n in itertools.count() if n not in taken)
                seeds = np.random.SeedSequence([self.tuning.seed, place]).generate_state(1)
                self._study.sampler = optuna.samplers.TPESampler(seed=int(seeds[0]))
                trial = self._study.ask()
                held = self._lock_of(trial.number)
                held.acquire()
                trial.set_user_attr("place", place)  # of a lost trial, the next one takes it
                values = _suggested(trial, dimensions)
        if trial is None or held is None:
            yield None
            return
        try:
            yield trial, values
        except BaseException:
            self._study.tell(trial, state=TrialState.FAIL, skip_if_finished=True)
            raise
        finally:
            held.release()
            Path(held.lock_file).unlink(missing_ok=True)

    def report(self, trial: Any, number: int, measurement: Measurement, value: float) -> bool:
        """Store a measurement; whether the trial should end there."""
        trial.set_user_attr("measurement", [number, measurement.losses, measurement.right])
        trial.report(value, number)
        return number < self.tuning.measurements and trial.should_prune()

    def tell(self, trial: Any, value: float | None) -> None:
        """End a trial, with its value or early."""
        if value is None:
            self._study.tell(trial, state=TrialState.PRUNED)
        else:
            self._study.tell(trial, value)

    def _drop_lost(self) -> None:
        """End trials whose processes have ended."""
        for trial in self._study.get_trials(deepcopy=False, states=(TrialState.RUNNING,)):
            lock = self._lock_of(trial.number)
            try:
                lock.acquire(timeout=0)
            except Timeout:
                continue
            self._study.tell(trial.number, state=TrialState.FAIL, skip_if_finished=True)
            lock.release()
            Path(lock.lock_file).unlink(missing_ok=True)

    def write_best(self) -> TunedTrial:
        """Write the recipe of the best trial, and return the trial.

        Raises:
            ValueError: no trial was trained to its end.
        """
        best = best_of(self.finished())
        recipe = replace(best.recipe, output_dir=str(self.directory / "best"))
        replace_all(self.directory, {BEST: recipe.to_yaml().encode()})
        return best


def best_of(trials: Sequence[TunedTrial]) -> TunedTrial:
    """The best of the trials that were trained to their end.

    Raises:
        ValueError: there is none.
    """
    complete = [trial for trial in trials if trial.is_complete]
    if not complete:
        problem = next((trial.problem for trial in trials if trial.problem), None)
        raise ValueError(
            "minutes: over before a trial was trained to its end; expected more, or more trials"
            if problem is None
            else f"trials: none was trained to its end; the first: {problem}"
        )
    return max(complete, key=lambda trial: trial.value)


def run_trials(storage: TrialStorage, on_trial: OnTrial) -> None:
    """Run trials until there are enough, or time is over; the base is loaded once.

    A trial that diverges, or does not fit the base, ends without a result, unless it is the recipe
    itself.

    Args:
        storage: trials of the search.
        on_trial: called with the finished trials before the first and after each.

    Raises:
        ValueError: the recipe itself cannot be trained.
    """
    tuning = storage.tuning
    ends = math.inf if tuning.minutes is None else time.monotonic() + 60 * tuning.minutes
    run = check_tuning(tuning)
    _ = run.arguments  # which raises before the base is loaded
    on_trial(storage.finished())
    if len(storage.finished()) >= tuning.trials:
        return
    dimensions = Dimensions(run, tuning.space)
    shared = SharedBase(
        run,
        held_out=tuning.held_out,
        seed=tuning.seed,
        prefix_cache=tuning.prefix_cache,
        prefix_cache_bytes=tuning.prefix_cache_bytes // tuning.jobs,
    )
    while time.monotonic() < ends:
        with storage.next(dimensions) as begun:
            if begun is None:
                return
            _run_trial(storage, shared, dimensions, *begun)
        on_trial(storage.finished())


def _run_trial(
    storage: TrialStorage,
    shared: SharedBase,
    dimensions: Dimensions,
    trial: Any,
    values: dict[str, Value],
) -> None:
    tuning, started = storage.tuning, time.perf_counter()
    recipe = dimensions.recipe(values, shared.layers)
    is_own = values == dimensions.own
    trial.set_user_attr("values", values)
    trial.set_user_attr("is_own", is_own)
    trial.set_user_attr("representations", recipe.representations)
    trial.set_user_attr("learning_rate", recipe.training.learning_rate)
    trial.set_user_attr("measurements", tuning.measurements)
    value: float | None = None
    is_pruned = False

    def on_measurement(number: int, measurement: Measurement) -> bool:
        nonlocal value, is_pruned
        by_right = tuning.objective != "loss" and bool(measurement.right)
        if tuning.objective == "right" and not by_right:
            raise ValueError("objective 'right': the task has neither choices nor classes")
        if not np.isfinite(measurement.losses).all():
            raise ValueError("training diverged: losses of held-out rows are not finite")
        value = value_of(measurement.losses, measurement.right, by_right)
        trial.set_user_attr("by_right", by_right)
        is_pruned = storage.report(trial, number, measurement, value) and not is_own
        return is_pruned

    try:
        shared.train(recipe, measurements=tuning.measurements, on_measurement=on_measurement)
    except (ValueError, RuntimeError) as error:
        if is_own:
            raise
        trial.set_user_attr("problem", one_line(error))
        value = None
    trial.set_user_attr("seconds", round(time.perf_counter() - started, 3))
    storage.tell(trial, None if is_pruned else value)


def _suggested(trial: Any, dimensions: Dimensions) -> dict[str, Value]:
    values: dict[str, Value] = {}
    if dimensions.rates is not None:
        values["learning_rate"] = trial.suggest_float("learning_rate", *dimensions.rates, log=True)
    for name, choices in dimensions.choices.items():
        if name == "alpha" and values.get("noise", "") == NONE:
            continue
        values[name] = trial.suggest_categorical(name, choices)
    return values


def _pruner(tuning: Tuning) -> Any:
    if tuning.pruning == "none":
        return optuna.pruners.NopPruner()
    if tuning.pruning == "median":
        return optuna.pruners.MedianPruner()
    return optuna.pruners.HyperbandPruner(max_resource=tuning.measurements)


def _tuned(trial: Any, base: Recipe) -> TunedTrial:
    stored = trial.user_attrs
    number, losses, right = stored.get("measurement", (0, [], ""))
    training = replace(base.training, learning_rate=stored["learning_rate"])
    return TunedTrial(
        number=trial.number,
        values=stored["values"],
        recipe=replace(base, representations=stored["representations"], training=training),
        losses=losses,
        right=right,
        part=number / stored["measurements"],
        seconds=stored["seconds"],
        problem=stored.get("problem"),
        by_right=stored.get("by_right", False),
        is_own=stored["is_own"],
    )


def _expect_same(tuning: Tuning, path: Path) -> None:
    if not path.exists():
        return
    before = read_file(Tuning, path).deciding()
    if difference := first_difference(before, tuning.deciding()):
        where, old, new = difference
        raise ValueError(
            f"{where} {new!r}: the search in {path.parent} has {old!r}; leave it, or choose "
            "another --output_dir"
        )
