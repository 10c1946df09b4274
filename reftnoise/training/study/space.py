"""A search of settings: what is tried, for how long, and the recipe that values make."""

import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, replace
from typing import Any, Literal

from ..._util import yaml
from ..._util.errors import is_finite_number, nearest
from ...config.positions import Positions
from ..recipe import Recipe
from ..resolved_run import ResolvedRun, noise_names, with_default_edit

Value = str | int | float
NONE = "none"
LAYERS = ("all", "even", "lower", "upper")
"""Words for layers: all, every second one, and the lower or upper half."""
_NOT_DECIDING = (
    "trials",
    "minutes",
    "jobs",
    "threads",
    "gpus",
    "prefix_cache",
    "prefix_cache_bytes",
    "output_dir",
)
_NOT_IN_TRIALS = (
    "do_eval",
    "eval_on_start",
    "eval_steps",
    "eval_strategy",
    "greater_is_better",
    "load_best_model_at_end",
    "metric_for_best_model",
    "push_to_hub",
    "save_steps",
    "save_strategy",
)
"""Arguments of the Trainer about rows that are only measured, and about checkpoints."""


@dataclass(kw_only=True)
class Space:
    """Values that are tried, besides the recipe's own. An empty list leaves a setting as it is.

    Args:
        learning_rate: least and greatest learning rate, between which trials draw on a logarithmic
            scale.
        layers: edited layers: all, even (every second one), lower or upper (a half), a number, or
            a range such as 8-15.
        positions: edited positions.
        ranks: ranks of the edits.
        dropouts: dropout rates of the edits.
        noises: noise on the embeddings: none, or names of noises.
        alphas: α of the noise.
    """

    learning_rate: list[float] = field(default_factory=lambda: [1e-4, 1e-2])
    layers: list[str] = field(default_factory=lambda: list(LAYERS))
    positions: list[str] = field(default_factory=lambda: ["l1", "f1+l1", "f4+l4", "all"])
    ranks: list[int] = field(default_factory=lambda: [1, 2, 4, 8, 16])
    dropouts: list[float] = field(default_factory=lambda: [0.0, 0.05, 0.1])
    noises: list[str] = field(default_factory=lambda: [NONE, "neftune", "symnoise"])
    alphas: list[float] = field(default_factory=lambda: [1.0, 5.0, 10.0, 15.0])


@dataclass(kw_only=True)
class Tuning:
    """A search of a recipe's settings: trials train on a part of its rows and are scored on others.

    Args:
        recipe: recipe whose settings are searched; the first trial is the recipe itself.
        space: values that are tried.
        trials: number of trials at which the search ends, with those of earlier commands.
        minutes: time after which a command begins no trial; by default there is no limit.
        held_out: share of the training rows that trials are scored on and not trained on; from 1
            on, their number.
        objective: what makes a trial the best: right (most right answers, then the lowest loss),
            loss, or auto, which is right where rows have choices or classes.
        pruning: way to end trials early that do worse than others, by the pruner of Optuna: median,
            hyperband or none.
        measurements: number of times that a trial is scored while it trains, the last at its end.
        jobs: number of processes, each with a base of its own.
        threads: number of threads of a process; by default the cores are divided among the jobs.
        gpus: indices of the GPUs that jobs take in turn; empty for none.
        prefix_cache: place for the keys and values of prompts, which trials share: none, memory or
            disk.
        prefix_cache_bytes: greatest size of the kept prompts, which the jobs divide among them.
        seed: seed of the search, and of the choice of held-out rows; trainings have the recipe's.
        output_dir: directory of the trials, the best recipe and the report.
    """

    recipe: Recipe = field(default_factory=Recipe)
    space: Space = field(default_factory=Space)
    trials: int = 30
    minutes: float | None = None
    held_out: float = 0.2
    objective: Literal["auto", "right", "loss"] = "auto"
    pruning: Literal["median", "hyperband", "none"] = "median"
    measurements: int = 4
    jobs: int = 1
    threads: int | None = None
    gpus: list[int] = field(default_factory=list)
    prefix_cache: Literal["none", "memory", "disk"] = "memory"
    prefix_cache_bytes: int = 2**32
    seed: int = 0
    output_dir: str = "reftnoise-tuning"

    def to_yaml(self) -> str:
        """The text of a file that gives this search again."""
        return yaml.dump(asdict(self))

    def deciding(self) -> dict[str, Any]:
        """What decides the results of trials: all but how many there are, and where they run."""
        values = asdict(self)
        for name in _NOT_DECIDING:
            del values[name]
        for name in ("output_dir", "device", "evaluation"):
            del values["recipe"][name]
        return values

    def searched_recipe(self) -> Recipe:
        """The recipe that takes a trial's values."""
        return with_default_edit(self.recipe)

    def trial_recipe(self) -> Recipe:
        """The recipe that trials train: without rows that are only measured, and without files."""
        recipe = self.searched_recipe()
        arguments = recipe.training.arguments
        kept = {name: arguments[name] for name in arguments if name not in _NOT_IN_TRIALS}
        return replace(
            recipe,
            data=replace(recipe.data, eval=None),
            training=replace(recipe.training, save_steps=None, eval_steps=None, arguments=kept),
        )


def check_tuning(tuning: Tuning) -> ResolvedRun:
    """The recipe of trials, with what can be known to be wrong without torch.

    Raises:
        ValueError, OSError: what is wrong in the recipe or the search.
    """
    for name in ("trials", "measurements", "jobs"):
        if getattr(tuning, name) < 1:
            raise ValueError(f"{name} {getattr(tuning, name)}: expected at least 1")
    if tuning.prefix_cache_bytes < tuning.jobs:
        raise ValueError(
            f"prefix_cache_bytes {tuning.prefix_cache_bytes}: expected a number of bytes, such as "
            "4294967296"
        )
    if tuning.threads is not None and tuning.threads < 1:
        raise ValueError(f"threads {tuning.threads}: expected at least 1")
    if tuning.minutes is not None and not tuning.minutes > 0:
        raise ValueError(f"minutes {tuning.minutes}: expected a positive number")
    is_share = 0 < tuning.held_out < 1
    if not (is_share or (tuning.held_out >= 1 and float(tuning.held_out).is_integer())):
        raise ValueError(
            f"held_out {tuning.held_out}: expected a share of the rows, such as 0.2, or their "
            "number, such as 200"
        )
    if tuning.recipe.data.streaming:
        raise ValueError("data.streaming: rows of a stream cannot be held out; leave it out")
    _check_space(tuning.space)
    run = ResolvedRun(tuning.trial_recipe())
    run.expect_trainable()
    return run


def _check_space(space: Space) -> None:
    rates = space.learning_rate
    is_range = len(rates) == 2 and all(map(is_finite_number, rates)) and 0 < rates[0] < rates[1]
    if rates and not is_range:
        raise ValueError(
            f"space.learning_rate {rates}: expected the least and the greatest, such as "
            "[0.0001, 0.01], or []"
        )
    for layers in space.layers:
        numbers = layers.split("-")
        is_numbers = len(numbers) <= 2 and all(number.isdecimal() for number in numbers)
        if layers not in LAYERS and not is_numbers:
            known = nearest(layers, LAYERS)
            raise ValueError(f"space.layers {layers!r}: {known}, a number or a range such as 8-15")
    for positions in space.positions:
        Positions.parse(positions)
    for noise in space.noises:
        if noise not in (NONE, *noise_names()):
            names = nearest(noise, (NONE, *noise_names()))
            raise ValueError(f"space.noises {noise!r}: no noise of that name; {names}")
    for name, values, least in (
        ("ranks", space.ranks, 1),
        ("dropouts", space.dropouts, 0),
        ("alphas", space.alphas, 0),
    ):
        for value in values:
            if not is_finite_number(value) or value < least or (name == "dropouts" and value >= 1):
                below = " and below 1" if name == "dropouts" else ""
                raise ValueError(f"space.{name} {value}: expected at least {least}{below}")


class Dimensions:
    """What is searched of a recipe: for each setting its choices, the recipe's own value first.

    Layers and positions are searched where the recipe has one edit, since several must not meet.
    Noise is searched where it has one, or none.

    Args:
        run: recipe of the trials, with its config.
        space: values that are tried.
    """

    def __init__(self, run: ResolvedRun, space: Space) -> None:
        self._recipe = recipe = run.recipe
        entries = run.config.representations
        self._edits = [i for i, entry in enumerate(entries) if not entry.is_noise]
        self._noises = [i for i, entry in enumerate(entries) if entry.is_noise]
        self.choices: dict[str, list[Value]] = {}
        edit = entries[self._edits[0]] if self._edits else None
        if edit is not None and len(self._edits) == 1:
            if edit.is_per_layer:
                self._add("layers", _as_value(edit.layer), space.layers)
            if type(edit.positions) is str:
                self._add("positions", edit.positions, space.positions)
        for name, key, values in (
            ("rank", "low_rank_dimension", space.ranks),
            ("dropout", "dropout", space.dropouts),
        ):
            if edit is not None and key in edit.arguments:
                self._add(name, edit.arguments[key], values)
        self._add_noise(run, space)
        self.rates: tuple[float, float] | None = None
        """The least and greatest learning rate, with the recipe's between them."""
        if space.learning_rate:
            rates = [*space.learning_rate, recipe.training.learning_rate]
            self.rates = min(rates), max(rates)

    def _add(self, name: str, own: Value, values: Any) -> None:
        choices = [own, *(value for value in values if value != own)]
        if len(choices) > 1:
            self.choices[name] = choices

    def _add_noise(self, run: ResolvedRun, space: Space) -> None:
        entries = [run.config.representations[i] for i in self._noises]
        is_known = [e.component == "embeddings" and "alpha" in e.arguments for e in entries]
        if len(entries) > 1 or not all(is_known):
            return
        own, alpha = NONE, None
        if entries:
            own, alpha = str(entries[0].intervention), entries[0].arguments["alpha"]
        self._add("noise", own, space.noises)
        if own != NONE or "noise" in self.choices:
            others: list[Value] = [value for value in space.alphas if value != alpha]
            self.choices["alpha"] = [*([] if alpha is None else [alpha]), *others] or [5.0]

    @property
    def own(self) -> dict[str, Value]:
        """The recipe's own values, as a trial suggests them."""
        own = {name: choices[0] for name, choices in self.choices.items()}
        if own.get("noise") == NONE:
            del own["alpha"]
        if self.rates is not None:
            own["learning_rate"] = self._recipe.training.learning_rate
        return own

    def recipe(self, values: Mapping[str, Value], layers: int) -> Recipe:
        """The recipe with values instead of its own.

        Args:
            values: value by setting; what is left out is the recipe's own.
            layers: number of the base's layers.
        """
        entries = [dict(entry) for entry in self._recipe.representations]
        for index in self._edits:
            for name, key in (("rank", "low_rank_dimension"), ("dropout", "dropout")):
                if name in values:
                    entries[index][key] = values[name]
            if "positions" in values:
                entries[index]["positions"] = values["positions"]
            if "layers" in values:
                entries[index]["layer"] = layers_of(str(values["layers"]), layers)
        if "noise" in values or "alpha" in values:
            own: dict[str, Any] = entries.pop(self._noises[0]) if self._noises else {}
            name = str(values.get("noise", own.get("intervention", NONE)))
            if name != NONE:
                same = own if name == own.get("intervention") else {"intervention": name}
                entries.append(same | {"alpha": values["alpha"]})
        training = self._recipe.training
        if "learning_rate" in values:
            training = replace(training, learning_rate=float(values["learning_rate"]))
        return replace(self._recipe, representations=entries, training=training)


def layers_of(text: str, count: int) -> Any:
    """What `layer` of an entry is for a word or a text, in a base that has so many layers."""
    half = count // 2
    words: dict[str, Any] = {
        "all": "all",
        "even": list(range(0, count, 2)),
        "lower": f"0-{max(half, 1) - 1}",
        "upper": f"{half}-{count - 1}",
    }
    if text in words:
        return words[text]
    return text if "-" in text else json.loads(text)


def _as_value(layer: Any) -> str:
    return layer if isinstance(layer, str) else json.dumps(layer)
