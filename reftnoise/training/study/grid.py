"""A study: recipes that differ along named axes, each run with several seeds."""

import hashlib
import itertools
import json
import re
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field, replace
from typing import Any

from ..._util import yaml
from ..._util.errors import nearest
from ..._util.options import read
from ...data.tasks.registry import get_task
from ..recipe import Recipe
from ..resolved_run import ResolvedRun, way_of, with_default_edit

SEED = "seed"


@dataclass(kw_only=True)
class Rule:
    """What changes where levels go together.

    Args:
        when: level, or list of levels, by axis.
        then: changes of the recipe.
    """

    when: dict[str, str | list[str]]
    then: dict[str, Any]


@dataclass(kw_only=True)
class TunedAxis:
    """An axis that is tuned, such as the learning rate, whatever the others are.

    Args:
        axis: axis of which the report keeps the level that is best, for each combination of others.
        rows: number of scored rows, from the first on, on which it is best; the report shows the
            others, which no choice has seen.
    """

    axis: str = ""
    rows: int = 0


@dataclass(kw_only=True)
class Study:
    """A grid of recipes × seeds.

    A cell is one level of each axis, and a seed. Its recipe is the common one with the changes of
    its levels: mappings are merged, `representations` are joined, all else is replaced.

    Args:
        recipe: recipe that all cells share.
        axes: changes of the recipe by axis and level, such as {noise: {none: {}, neftune:
            {representations: [{intervention: neftune}]}}}.
        grids: levels by axis that are combined, where an axis that is left out has all its levels;
            by default all levels of all axes.
        rules: changes for combinations of levels: {when: {axis: level, or a list}, then: {…}}.
        seeds: seeds of the cells.
        baseline: level by axis that the report compares other levels with.
        select: axis that is tuned on the first of the scored rows, and reported on the others.
        jobs: number of cells that run at a time.
        threads: number of threads of a cell; by default the cores are divided among the jobs.
        gpus: indices of the GPUs that jobs take in turn; empty for none.
        keep_adapters: whether cells keep their adapters, and not only log and scores.
        output_dir: directory of results and cells.
    """

    recipe: Recipe = field(default_factory=Recipe)
    axes: dict[str, dict[str, dict[str, Any]]] = field(default_factory=dict)
    grids: list[dict[str, list[str]]] = field(default_factory=list)
    rules: list[Rule] = field(default_factory=list)
    seeds: list[int] = field(default_factory=lambda: [0])
    baseline: dict[str, str] = field(default_factory=dict)
    select: TunedAxis | None = None
    jobs: int = 1
    threads: int | None = None
    gpus: list[int] = field(default_factory=list)
    keep_adapters: bool = False
    output_dir: str = "reftnoise-study"

    def to_yaml(self) -> str:
        """The text of a file that gives this study again."""
        return yaml.dump(asdict(self))


@dataclass(frozen=True)
class Cell:
    """One run of a study: its level by axis, its seed, and its recipe."""

    levels: dict[str, str | int]
    recipe: Recipe

    @property
    def name(self) -> str:
        """The name of its directory: the levels for people, the key since levels may look alike."""
        levels = "-".join(str(level) for level in self.levels.values())
        return re.sub(r"[^\w .,+=-]", "_", levels)[:100] + f"-{self.key[:8]}"

    @property
    def key(self) -> str:
        """A digest of all that decides its result."""
        decides = asdict(self.recipe) | {"output_dir": "", "device": ""}
        if self.recipe.evaluation.forgetting is False:  # so that older results keep their keys
            decides["evaluation"] = {
                name: value
                for name, value in asdict(self.recipe.evaluation).items()
                if name != "forgetting"
            }
        decides["evaluation"]["by"] = way_of(self.recipe, get_task(self.recipe.task))
        decides = json.loads(json.dumps(decides))  # keys that are numbers cannot be sorted
        text = json.dumps(decides, sort_keys=True)
        return hashlib.sha256(text.encode()).hexdigest()[:16]

    @contextmanager
    def named(self) -> Iterator[None]:
        """Within the block, errors name the cell."""
        try:
            yield
        except (ValueError, OSError) as error:
            raise ValueError(f"cell {self.name}: {error}") from None


def cells(study: Study) -> list[Cell]:
    """Every cell once, seed by seed, so that an early stop leaves whole grids.

    Raises:
        ValueError: a grid, rule or baseline names an unknown axis or level, or the changes of a
            level make no recipe.
    """
    _check(study)
    unseeded = {tuple(c.items()): _recipe(study, c) for c in _combinations(study)}
    return [
        Cell({**dict(levels), SEED: seed}, replace(recipe, seed=seed))
        for seed in study.seeds
        for levels, recipe in unseeded.items()
    ]


def checked_cells(study: Study) -> list[Cell]:
    """The same cells, with their recipes checked as far as that needs no torch.

    Raises:
        ValueError: as in `cells`, or a recipe is wrong; the message names its cell.
    """
    grid = cells(study)
    for cell in grid:
        if cell.levels[SEED] == study.seeds[0]:
            with cell.named():
                if cell.recipe.evaluation.data is None:
                    raise ValueError("evaluation.data: a study needs rows to score")
                ResolvedRun(cell.recipe).expect_trainable()
    return grid


def _combinations(study: Study) -> Iterator[dict[str, str]]:
    for grid in study.grids or [{}]:
        chosen = [grid.get(axis, list(levels)) for axis, levels in study.axes.items()]
        for combination in itertools.product(*chosen):
            yield dict(zip(study.axes, combination, strict=True))


def _recipe(study: Study, combination: Mapping[str, str]) -> Recipe:
    values = asdict(study.recipe)
    for axis, level in combination.items():
        values = merged(values, study.axes[axis][level])
    for rule in study.rules:
        if all(combination[axis] in _levels(chosen) for axis, chosen in rule.when.items()):
            values = merged(values, rule.then)
    where = ", ".join(f"{axis} {level}" for axis, level in combination.items())
    return with_default_edit(read(Recipe, values, f"cell {where}: "))


def merged(values: Mapping[str, Any], changes: Mapping[str, Any]) -> dict[str, Any]:
    """Mappings merged, `representations` joined, anything else replaced."""
    result = dict(values)
    for name, change in changes.items():
        before = result.get(name)
        if isinstance(before, Mapping) and isinstance(change, Mapping):
            result[name] = merged(before, change)
        elif name == "representations":
            result[name] = [*(before or ()), *(change or ())]
        else:
            result[name] = change
    return result


def _levels(chosen: str | list[str]) -> list[str]:
    return [chosen] if isinstance(chosen, str) else chosen


def _check(study: Study) -> None:
    if not study.axes:
        raise ValueError("axes: expected at least one, such as {noise: {none: {}, …}}")
    if not study.seeds or len(set(study.seeds)) < len(study.seeds):
        raise ValueError(f"seeds {study.seeds}: expected at least one, and each once")
    if study.jobs < 1 or (study.threads is not None and study.threads < 1):
        raise ValueError(f"jobs {study.jobs}, threads {study.threads}: expected at least 1")
    for axis, levels in study.axes.items():
        if axis == SEED:
            raise ValueError(f"axes: {SEED!r} is always an axis; see seeds")
        if not levels:
            raise ValueError(f"axes.{axis}: expected at least one level")
        for level, changes in levels.items():
            _check_level(f"axes.{axis}", level, changes)
    if study.select is not None:
        _check_selection(study.select, study)
    for index, rule in enumerate(study.rules):
        _check_level(f"rules[{index}]", "then", rule.then)
    _check_names(study)


def _check_selection(select: TunedAxis, study: Study) -> None:
    if select.axis not in study.axes:
        raise ValueError(f"select: no axis {select.axis!r}; {nearest(select.axis, study.axes)}")
    if select.axis in study.baseline:
        raise ValueError(f"baseline: {select.axis} is selected; leave it out")
    if select.rows < 1:
        raise ValueError(f"select.rows {select.rows}: expected at least 1")
    if len(study.axes) == 1:
        raise ValueError(f"select: {select.axis} is the only axis; expected another to report")


def _check_names(study: Study) -> None:
    """Grids, rules and baseline name axes and levels that there are."""
    named: list[tuple[str, Mapping[str, str | list[str]]]] = [("baseline", study.baseline)]
    named += [(f"grids[{i}]", grid) for i, grid in enumerate(study.grids)]
    named += [(f"rules[{i}].when", rule.when) for i, rule in enumerate(study.rules)]
    for where, choice in named:
        for axis, chosen in choice.items():
            if axis not in study.axes:
                raise ValueError(f"{where}: no axis {axis!r}; {nearest(axis, study.axes)}")
            if not _levels(chosen):
                raise ValueError(f"{where}: {axis} has no level; expected at least one")
            for level in _levels(chosen):
                if level not in study.axes[axis]:
                    known = nearest(level, study.axes[axis])
                    raise ValueError(f"{where}: {axis} has no level {level!r}; {known}")


def _check_level(where: str, level: Any, changes: Any) -> None:
    if not isinstance(level, str):
        raise ValueError(f"{where}: the level {level!r} is no text; put it in quotes")
    if not isinstance(changes, Mapping):
        raise ValueError(f"{where}.{level}: expected what it changes, got {changes!r}")
    for name in ("seed", "output_dir"):
        if name in changes:
            raise ValueError(f"{where}.{level}: {name} is the study's; see seeds and output_dir")
    units = changes.get("representations", [])
    if not isinstance(units, list):
        raise ValueError(f"{where}.{level}: representations {units!r}: expected a list")
