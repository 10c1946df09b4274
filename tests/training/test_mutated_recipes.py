"""Recipes and studies that are wrong in any way: each runs, or ends in one line and exit code 2.

python tests/training/test_mutated_recipes.py 4000   # the campaign
"""

import contextlib
import copy
import io
import itertools
import json
import os
import random
import resource
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any
from unittest import mock

import pytest
import transformers
import transformers.trainer

from reftnoise._util import yaml
from reftnoise.cli.main import main
from reftnoise.training.recipe import Recipe
from reftnoise.training.study.grid import Study

SECONDS = 60
"""Limit of a file, in seconds of processor time."""
RECIPE: dict[str, Any] = {
    "representations": [
        {"layer": "all", "intervention": "loreft", "low_rank_dimension": 2, "positions": "f1+l1"},
        {"component": "embeddings", "intervention": "neftune", "alpha": 5.0},
    ],
    "peft": None,
    "data": {"train": "tiny-chat", "train_split": "train[:4]", "template": "chat", "columns": {}},
    "training": {
        "max_steps": 1,
        "per_device_train_batch_size": 2,
        "arguments": {"optim": "adamw_torch", "lr_scheduler_kwargs": {}, "label_names": None},
    },
    "task": {"name": "text"},
    "evaluation": {"data": "tiny-chat", "split": "test[:1]", "max_new_tokens": 1},
    "device": "cpu",
}
STUDY: dict[str, Any] = {
    "recipe": RECIPE,
    "axes": {"noise": {"none": {}, "more": {"training": {"learning_rate": 1e-2}}}},
    "rules": [{"when": {"noise": "more"}, "then": {"data": {"max_length": 64}}}],
    "baseline": {"noise": "none"},
    "grids": [{"noise": ["none", "more"]}],
}
WRONG: list[Any] = [
    *(None, True, False, 0, 1, -1, 3, 2**31, 10**40, 0.5, -0.5, 1e300, float("inf"), float("nan")),
    *("", " ", "x", "all", "null", "~", "../x", "a/b/c", "0-300000000", "f1+l1", "x\n y"),
    *("{prompt}", "{prompt[0].x}", "\u0000", "\ud7ff\x85", "é" * 300, "1e-3", "train[:0]", "test"),
    *("cuda:99", [], [None], [1], ["x"], [[]], {}, {"x": None}, {"name": None}, {"name": []}),
    *({1: 2}, {"": ""}),
]
TEXTS = ["&a [*a]", "{a: &b {c: *b}}", "[" * 300 + "]" * 300, "!!set {a}", "!!python/object:x {}"]
TEXTS += ["{<<: 3}", ": :", "\t", "59" + ":59" * 5000, "9" * 9000, "&a x *a", "%", "'", "? [a]"]


def places(value: Any, path: tuple[Any, ...] = ()) -> Iterator[tuple[Any, ...]]:
    """The path of every value in a nested value."""
    if path:
        yield path
    if isinstance(value, dict | list):
        for key in value if isinstance(value, dict) else range(len(value)):
            yield from places(value[key], (*path, key))


def keys_of(config: type) -> list[tuple[str, ...]]:
    defaults = yaml.load(config().to_yaml())
    return [place for place in places(defaults) if all(isinstance(key, str) for key in place)]


def put(values: Any, path: tuple[Any, ...], value: Any) -> None:
    for key in path[:-1]:
        if isinstance(values, dict):
            values.setdefault(key, {})
        values = values[key]
    values[path[-1]] = value


def mutated(draw: random.Random) -> tuple[str, str]:
    """A command, and the text of its file with one to three mistakes, or none."""
    command, good, config = ("train", RECIPE, Recipe)
    if draw.random() < 0.25:
        command, good, config = ("study", STUDY, Study)
    values = copy.deepcopy(good)
    text = ""
    for _ in range(draw.choice((1, 1, 1, 2, 3))):
        known = draw.random() < 0.5
        path = draw.choice(keys_of(config) if known else list(places(values)))
        kind = draw.random()
        with contextlib.suppress(KeyError, IndexError, TypeError):
            if kind < 0.75:
                put(values, path, copy.deepcopy(draw.choice(WRONG)))
            elif kind < 0.85:
                put(values, (*path[:-1], draw.choice(("x", "", "learning_rte", 3))), 1)
            else:
                put(values, path, "RAW")
                text = draw.choice(TEXTS)
    return command, yaml.dump(values).replace("RAW", text)


def outcome(command: str, text: str, directory: Path) -> tuple[int, list[str]]:
    """Exit code, and lines on stderr that are not warnings of libraries."""
    file, run = directory / "file.yaml", directory / "run"
    file.write_bytes(text.encode(errors="surrogatepass"))
    options = ["--quiet", "--output_dir", str(run)]
    options += ["--overwrite"] if command == "train" else []
    stderr = io.StringIO()
    with contextlib.redirect_stderr(stderr), contextlib.redirect_stdout(io.StringIO()):
        code = main([command, str(file), *options])
    return code, [line for line in stderr.getvalue().splitlines() if line.startswith("reftnoise: ")]


class StopSoon(transformers.TrainerCallback):
    """Ends a run whose file asks for 10**40 steps."""

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        control.should_training_stop |= state.global_step >= 3


def check(command: str, text: str, directory: Path) -> str | None:
    """What is wrong with the answer to a file; None if nothing is."""
    callbacks = [*transformers.trainer.DEFAULT_CALLBACKS, StopSoon]
    started = time.process_time()
    # What a study's cells do is what `train` does; their processes would take most of the time.
    with (
        mock.patch("reftnoise.training.study.runner._run", return_value=[]),
        mock.patch("transformers.trainer.DEFAULT_CALLBACKS", callbacks),
    ):
        try:
            code, lines = outcome(command, text, directory)
        except KeyError as error:  # of the results that the cells would have written
            code, lines = (0, []) if command == "study" else (1, [repr(error)])
        except BaseException as error:  # whatever else a user would see
            code, lines = 1, [f"{type(error).__name__}: {error}"]
    if code == 0 or (code == 2 and len(lines) == 1):
        took = time.process_time() - started
        return None if took < SECONDS else f"{command}: {took:.0f} s\n{text}"
    return f"{command}: exit code {code}, {lines}\n{text}"


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("seed", [*range(8), 13, 67, 123])  # which failed once
def test_a_mutated_file_runs_or_is_one_line(
    seed: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    assert check(*mutated(random.Random(seed)), tmp_path) is None


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("config", [Recipe, Study])
def test_every_key_with_every_wrong_value(
    config: type, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    command, good = ("train", RECIPE) if config is Recipe else ("study", STUDY)
    problems = []
    for path, value in itertools.product(keys_of(config), WRONG):
        values = copy.deepcopy(good)
        put(values, path, value)
        problems.append(check(command, yaml.dump(values), tmp_path))
    assert list(filter(None, problems)) == []


NULLS = [path for path in keys_of(Recipe) if path != ("peft",)]


@pytest.mark.parametrize("path", NULLS, ids=".".join)
def test_null_is_one_line_or_the_default(path: tuple[str, ...], tmp_path: Path) -> None:
    values = copy.deepcopy(RECIPE) | {"data": {}}  # so that nothing runs
    put(values, path, None)
    code, lines = outcome("train", yaml.dump(values), tmp_path)
    assert (code, len(lines)) == (2, 1)
    assert f"{'.'.join(path)}: expected" in lines[0] or "data.train" in lines[0]


@pytest.mark.parametrize(
    ("command", "path", "value", "message"),
    [
        ("train", ("training", "warmup_steps"), float("inf"), "expected finite float32, got inf"),
        ("train", ("training", "learning_rate"), float("nan"), "expected finite float32, got nan"),
        ("train", ("training", "learning_rate"), 1e300, "expected finite float32, got 1e+300"),
        ("train", ("training", "arguments", "log_level"), "warn", "did you mean 'warning'?"),
        ("train", ("training", "arguments", "torch_compile_mode"), "x", "possible: default, "),
        ("train", ("training", "arguments", "use_cache"), 0, "use_cache: expected bool, got 0"),
        (
            "train",
            ("training", "arguments", "lr_scheduler_kwargs"),
            {"name": 1},
            "training.arguments.lr_scheduler_kwargs {'name': 1}: cannot be used (TypeError",
        ),
        ("study", ("recipe", "representations", 0, 3), 1, "unknown key 3 for LoreftIntervention"),
    ],
)
def test_wrong_values_that_ended_otherwise_once(
    command: str, path: tuple[Any, ...], value: Any, message: str, tmp_path: Path
) -> None:
    values = copy.deepcopy(RECIPE if command == "train" else STUDY)
    put(values, path, value)
    code, lines = outcome(command, yaml.dump(values), tmp_path)
    assert (code, len(lines)) == (2, 1)
    assert message in lines[0]


@pytest.mark.parametrize("text", TEXTS)
def test_hostile_yaml_is_one_line(text: str, tmp_path: Path) -> None:
    for line in (f"quantization: {text}", text):
        code, lines = outcome("train", line, tmp_path)
        assert (code, len(lines)) == (2, 1)


def test_aliases_that_multiply_are_one_line(tmp_path: Path) -> None:
    lists, merges = ["a: &a [x, x, x]"], ["a: &a {x: 1}"]
    for before, name in itertools.pairwise("abcdefghijklmnop"):
        copies = ", ".join([f"*{before}"] * 9)
        lists.append(f"{name}: &{name} [{copies}]")
        merges.append(f"{name}: &{name} {{<<: [{copies}]}}")
    for lines in (lists, merges):
        code, answer = outcome("train", "\n".join(lines), tmp_path)
        assert code == 2
        assert "its aliases stand for more than 100,000 values" in answer[0]
    assert yaml.load("a: &a [1]\nb: *a") == {"a": [1], "b": [1]}


def campaign(count: int, processes: int = 2) -> None:
    """Check so many seeds, in processes that are forked once everything is imported."""
    import reftnoise.training.run  # noqa: F401  # before the fork

    children = []
    for first in range(processes):
        if (child := os.fork()) == 0:
            bad, slowest = 0, 0.0
            with tempfile.TemporaryDirectory() as directory:
                os.chdir(directory)
                for seed in range(first, count, processes):
                    started = time.monotonic()
                    problem = check(*mutated(random.Random(seed)), Path(directory))
                    slowest = max(slowest, time.monotonic() - started)
                    if problem is not None:
                        bad += 1
                        print(f"seed {seed}, {problem}", flush=True)
            peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss // 1024
            numbers = {"process": first, "bad": bad, "slowest s": slowest, "peak MiB": peak}
            print(json.dumps(numbers), flush=True)
            os._exit(0)
        children.append(child)
    for child in children:
        os.waitpid(child, 0)


if __name__ == "__main__":
    os.environ["HF_HUB_OFFLINE"] = "1"
    campaign(int(sys.argv[1]))
