"""Recipes and runs: what `reftnoise train` and `eval` write, and what they say of mistakes."""

import json
import re
import shutil
import signal
import subprocess
import sys
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from hypothesis import example, given
from hypothesis import strategies as st

import reftnoise as rn
from reftnoise._util import yaml
from reftnoise._util.files import remove
from reftnoise._util.options import read, read_file, read_yaml
from reftnoise.cli.main import COMMANDS
from reftnoise.data.sources import load_rows
from reftnoise.data.tasks.registry import get_task
from reftnoise.evaluation.scoring import evaluate
from reftnoise.training.recipe import Recipe
from reftnoise.training.run_directory import RunDirectory
from reftnoise.training.study.grid import Study, cells
from support.command_line import LOREFT, command, quick
from support.waiting import wait_until

ROOT = Path(__file__).parents[2]
RECIPES = sorted((ROOT / "examples" / "recipes").rglob("*.yaml"))
STUDIES = sorted((ROOT / "examples" / "studies").glob("*.yaml"))
SMALL = [path for path in RECIPES if path.parent.name == "small"]
by_name = {"ids": lambda path: path.stem}


def json_of(capsys: pytest.CaptureFixture[str]) -> Any:
    captured = capsys.readouterr()
    assert captured.err == ""
    return json.loads(captured.out)


# -- recipes -------------------------------------------------------------------------------------


@pytest.mark.parametrize("path", RECIPES, **by_name)
def test_recipes_that_are_shipped_are_whole(path: Path) -> None:
    recipe = read_file(Recipe, path)
    rn.ReftConfig(recipe.representations, recipe.peft, recipe.modules_to_save)
    get_task(recipe.task)
    assert read(Recipe, asdict(recipe)) == recipe


@pytest.mark.parametrize("path", STUDIES, **by_name)
def test_studies_that_are_shipped_are_whole(path: Path) -> None:
    for cell in cells(read_file(Study, path)):
        recipe = cell.recipe
        rn.ReftConfig(recipe.representations, recipe.peft, recipe.modules_to_save)
        get_task(recipe.task)


@pytest.mark.parametrize("path", SMALL, **by_name)
def test_small_recipes_run(path: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "examples").symlink_to(ROOT / "examples")
    steps = ("--training.max_steps", 3, "--device", "cpu")
    assert command("train", path, "--output_dir", "run", *steps, "--quiet") == 0
    assert rn.ReftModel.from_pretrained(rn.load_tiny_model()[0], "run/adapter")


def test_a_recipe_is_the_same_as_yaml(tmp_path: Path) -> None:
    recipe = read_file(Recipe, SMALL[0])
    assert read(Recipe, {}) == Recipe()
    path = tmp_path / "recipe.yaml"
    path.write_text(recipe.to_yaml())
    assert read_file(Recipe, path) == recipe


@given(
    st.recursive(
        st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False) | st.text(),
        lambda inner: st.lists(inner) | st.dictionaries(st.text(), inner),
        max_leaves=8,
    )
)
@example(["2e-3", "1.5E5", 2e-3, 1e-5, "null", "on", "3", "a: b", "-1e3", {"a\x85b": "\x85"}])
def test_yaml_reads_what_it_writes(value: Any) -> None:
    assert yaml.load(yaml.dump(value)) == value


def test_yaml_takes_an_anchor_twice_and_refuses_a_list_as_a_bool() -> None:
    assert yaml.load("a: &x 1\nb: &x 2\nc: *x\n") == {"a": 1, "b": 2, "c": 2}
    with pytest.raises(ValueError, match="line 1, column 4: expected a scalar node"):
        yaml.load("k: !!bool [1]")


def test_yaml_reads_exponents_as_numbers() -> None:
    assert yaml.load("{a: 1e-3, b: 2.0E+4, c: e3}") == {"a": 0.001, "b": 2e4, "c": "e3"}


def test_yaml_keeps_labels_of_one_letter() -> None:
    assert yaml.load("[y, n, yes, no]") == ["y", "n", True, False]


def test_yaml_takes_codes_and_times_as_texts() -> None:
    codes = ["012", "08", "-01", "00", "1:30", "1:30.5"]
    assert yaml.load(f"[{', '.join(codes)}]") == codes
    assert yaml.load(yaml.dump(codes)) == codes
    assert yaml.load("[0, 10, -0, 0x1f, 0.5, 00.5]") == [0, 10, 0, 31, 0.5, 0.5]


# -- runs ----------------------------------------------------------------------------------------


def test_a_run_holds_what_it_says(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run = tmp_path / "run"
    assert command(*quick(run), "--json") == 0
    printed = json_of(capsys)
    summary = json.loads((run / "summary.json").read_text())
    assert printed.items() >= summary.items()
    model, tokenizer = rn.load_tiny_model()
    width, layers = model.config.hidden_size, model.config.num_hidden_layers
    assert summary["parameters"]["units"] == layers * (2 * 4 * width + 4)
    assert summary["steps"] == 4
    log = [json.loads(line) for line in (run / "log.jsonl").read_text().splitlines()]
    assert [line["step"] for line in log] == [2, 4]
    assert all(line.keys() >= {"loss", "learning_rate", "tokens_per_second"} for line in log)
    assert read_file(Recipe, run / "recipe.yaml").training.max_steps == 4
    assert not (run / "checkpoints").exists()

    adapted = rn.ReftModel.from_pretrained(model, run / "adapter")
    rows = load_rows("tiny-chat", split="test[:8]")
    found = evaluate(adapted, tokenizer, get_task("text"), rows, template="chat")
    [entry] = json.loads((run / "scores.json").read_text())
    assert entry["scores"] == found.scores
    assert entry["right"] == "".join("01"[right] for right in found.right)
    lines = [json.loads(line) for line in (run / "predictions.jsonl").read_text().splitlines()]
    assert [line["text"] for line in lines] == found.texts


def test_eval_adds_scores_of_base_and_other_rows(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run = tmp_path / "run"
    assert command(*quick(run), "--quiet") == 0
    assert command("eval", run, "--base", "--json") == 0
    of_both = json_of(capsys)
    assert [entry["adapter"] for entry in of_both] == [True, False]
    model, tokenizer = rn.load_tiny_model()
    rows = load_rows("tiny-chat", split="test[:8]")
    base = evaluate(model, tokenizer, get_task("text"), rows, template="chat")
    assert of_both[1]["scores"] == base.scores
    assert command("eval", run, "--evaluation.split", "test[8:12]", "--quiet") == 0
    entries = json.loads((run / "scores.json").read_text())
    assert [(e["split"], e["adapter"]) for e in entries] == [
        ("test[:8]", True),
        ("test[:8]", False),
        ("test[8:12]", True),
    ]


def test_the_same_seed_gives_the_same_weights(tmp_path: Path) -> None:
    for name, seed in (("a", 1), ("b", 1), ("c", 2)):
        assert command(*quick(tmp_path / name, "--seed", seed), "--quiet") == 0
    first, again, other = (
        (tmp_path / name / "adapter" / "reft_model.safetensors").read_bytes() for name in "abc"
    )
    assert first == again
    assert first != other


def test_a_run_that_was_stopped_goes_on(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    more = ("--training.save_steps", 2, "--training.max_steps", 6)
    assert command(*quick(tmp_path / "whole", *more), "--quiet") == 0

    def stop(_: Any, __: Any, state: Any, ___: Any, **____: Any) -> None:
        if state.global_step == 5:
            raise KeyboardInterrupt

    run = tmp_path / "stopped"
    with monkeypatch.context() as patch:
        patch.setattr("reftnoise.training.run._Log.on_step_begin", stop)
        assert command(*quick(run, *more)) == 130
    said = capsys.readouterr().err
    assert re.search(r"^stopped: 5/6, loss \d+\.\d", said, re.MULTILINE)  # the progress
    going_on = f"to go on: reftnoise train --resume --output_dir {run}"
    assert said.endswith(f"reftnoise: interrupted; {going_on}\n")
    assert not (run / "adapter").exists()
    assert command(*quick(run, *more), "--quiet") == 2  # it is not overwritten by the way
    recipe = (run / "recipe.yaml").read_bytes()
    other = ("--training.learning_rate", 0.5)
    assert command(*quick(run, *more), *other, "--resume", "--quiet") == 2
    assert (run / "recipe.yaml").read_bytes() == recipe
    with (run / "log.jsonl").open("a") as file:
        file.write('{"step": 5, "lo')  # a line that was being written
    assert command(*going_on.split()[4:], "--quiet") == 0  # the recipe is the run's own
    for name in ("adapter/reft_model.safetensors",):
        assert (run / name).read_bytes() == (tmp_path / "whole" / name).read_bytes()
    log = [json.loads(line)["step"] for line in (run / "log.jsonl").read_text().splitlines()]
    assert log == [2, 4, 6]


def test_ctrl_c_saves_a_checkpoint(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    more = ("--training.max_steps", 6)  # without save_steps
    assert command(*quick(tmp_path / "whole", *more), "--quiet") == 0

    def ask(_: Any, __: Any, state: Any, ___: Any, **____: Any) -> None:
        if state.global_step == 3:
            signal.raise_signal(signal.SIGINT)

    run, before = tmp_path / "stopped", signal.getsignal(signal.SIGINT)
    with monkeypatch.context() as patch:
        patch.setattr("reftnoise.training.run._Log.on_step_begin", ask)
        assert command(*quick(run, *more), "--quiet") == 130
    assert signal.getsignal(signal.SIGINT) == before
    assert "a checkpoint is saved after this step" in capsys.readouterr().err
    assert [path.name for path in (run / "checkpoints").iterdir()] == ["checkpoint-4"]
    assert command("train", "--resume", f"--output_dir={run}", "--quiet") == 0
    name = "adapter/reft_model.safetensors"
    assert (run / name).read_bytes() == (tmp_path / "whole" / name).read_bytes()


@pytest.mark.parametrize(("step", "every"), [(2, ("--training.eval_steps", 2)), (4, ())])
def test_ctrl_c_within_an_evaluation_loses_nothing(
    step: int,
    every: tuple[Any, ...],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """At step 4, the last, the adapter is trained: only its scores are missing."""
    more = ("--data.eval", "tiny-chat", "--data.eval_split", "test[:8]", *every)
    assert command(*quick(tmp_path / "whole", *more), "--quiet") == 0

    def ask(_: Any, __: Any, state: Any, ___: Any, **____: Any) -> None:
        if state.global_step == step:
            signal.raise_signal(signal.SIGINT)

    run = tmp_path / "stopped"
    with monkeypatch.context() as patch:
        patch.setattr("reftnoise.training.run._Log.on_prediction_step", ask, raising=False)
        assert command(*quick(run, *more), "--quiet") == 130
    is_trained = step == 4
    assert (run / "adapter").exists() == (run / "summary.json").exists() == is_trained
    assert (run / "checkpoints" / f"checkpoint-{step}").exists() != is_trained
    assert not (run / "scores.json").exists()
    capsys.readouterr()
    assert command("train", "--resume", f"--output_dir={run}", "--quiet") == 0
    assert "starts over" not in capsys.readouterr().err
    for name in ("adapter/reft_model.safetensors", "scores.json"):
        assert (run / name).read_bytes() == (tmp_path / "whole" / name).read_bytes()


def test_ctrl_c_in_the_last_step_of_a_run_without_scores(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def ask(_: Any, __: Any, state: Any, ___: Any, **____: Any) -> None:
        if state.global_step == 3:
            signal.raise_signal(signal.SIGINT)

    monkeypatch.setattr("reftnoise.training.run._Log.on_step_begin", ask)
    arguments = quick(tmp_path, "--evaluation.data", "null", "--quiet")
    assert command(*arguments) == 130
    assert (tmp_path / "summary.json").exists()
    assert capsys.readouterr().err.endswith(f"interrupted; {tmp_path} holds a finished run\n")


@pytest.mark.parametrize(
    ("moment", "more"),
    [
        pytest.param("_clear", (), id="before the recipe"),
        pytest.param("log", ("--training.save_steps", 2), id="before a checkpoint"),
        pytest.param("finish", ("--training.save_steps", 2), id="before the summary"),
        pytest.param("save_scores", (), id="before the scores"),
    ],
)
def test_a_run_that_was_killed_anywhere_goes_on(
    moment: str,
    more: tuple[Any, ...],
    finished: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    def killed(*_: Any, **__: Any) -> None:
        raise KeyboardInterrupt

    run = tmp_path / "run"
    place = "run" if moment == "save_scores" else "run_directory.RunDirectory"
    with monkeypatch.context() as patch:
        patch.setattr(f"reftnoise.training.{place}.{moment}", killed)
        assert command(*quick(run, *more), "--quiet") == 130
    assert not (run / "scores.json").exists()
    capsys.readouterr()
    assert command(*quick(run, *more), "--resume", "--quiet") == 0
    starts_over = "the run starts over" in capsys.readouterr().err
    assert starts_over == (moment in ("_clear", "log"))
    for name in ("adapter/reft_model.safetensors", "scores.json", "predictions.jsonl"):
        assert (run / name).read_bytes() == (finished / name).read_bytes()
    names = {"adapter", "log.jsonl", "predictions.jsonl", "recipe.yaml", "scores.json"}
    assert {path.name for path in run.iterdir()} == {*names, "summary.json", ".lock"}
    assert command(*quick(run, *more), "--resume", "--quiet") == 2  # nothing is missing


def test_a_run_killed_before_its_scores_warns_once(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def killed(*_: Any, **__: Any) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr("reftnoise.training.run.one_answer", lambda _: "all answers are 'no'")
    with monkeypatch.context() as patch:
        patch.setattr("reftnoise.training.run.save_scores", killed)
        assert command(*quick(tmp_path), "--quiet") == 130
    assert command(*quick(tmp_path), "--resume", "--quiet") == 0
    summary = json.loads((tmp_path / "summary.json").read_text())
    (warning,) = (text for text in summary["warnings"] if "all answers" in text)
    assert warning.startswith("all answers are 'no'; try")


def test_a_run_that_is_being_replaced_is_never_taken_for_a_finished_one(
    finished: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def killed(path: Path, *_: Any, **__: Any) -> None:
        removed.append(path)
        if len(removed) > count:
            raise KeyboardInterrupt
        remove(path)

    count = 0
    for count in range(6):  # what a kill at each removal leaves
        run, removed = tmp_path / str(count), list[Path]()
        shutil.copytree(finished, run)
        with monkeypatch.context() as patch:
            patch.setattr("reftnoise.training.run_directory.remove", killed)
            recipe = replace(read_file(Recipe, run / "recipe.yaml"), output_dir=str(run))
            directory = RunDirectory(recipe, resume=False, overwrite=True)
            with directory, pytest.raises(KeyboardInterrupt):
                directory.begin(0)
        assert (run / "summary.json").exists() == (count == 0)
        if count:
            assert RunDirectory(recipe, resume=True, overwrite=False).checkpoint is None


@pytest.mark.filterwarnings("ignore:.*checkpoint-4 incomplete, resuming:UserWarning")
def test_a_full_disk_is_one_line_and_the_run_goes_on(
    finished: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    run, saves = tmp_path / "run", []
    save = transformers.PreTrainedTokenizerBase.save_pretrained

    def full(*args: Any, **kwargs: Any) -> Any:
        saves.append(args)
        if len(saves) == 2:  # as tokenizers says it
            raise Exception("No space left on device (os error 28)")
        return save(*args, **kwargs)

    steps = ("--training.save_steps", 2)
    with monkeypatch.context() as patch:
        patch.setattr(transformers.PreTrainedTokenizerBase, "save_pretrained", full)
        assert command(*quick(run, *steps), "--quiet") == 2
    [line] = [line for line in capsys.readouterr().err.splitlines() if "reftnoise" in line]
    assert line.endswith(f"No space left on device: '{run}/checkpoints/checkpoint-4'")
    assert command(*quick(run, *steps), "--quiet", "--resume") == 0
    assert "starts over" not in capsys.readouterr().err
    for name in ("adapter/reft_model.safetensors", "scores.json"):
        assert (run / name).read_bytes() == (finished / name).read_bytes()


def test_a_finished_run_is_replaced_only_if_asked(tmp_path: Path) -> None:
    run = tmp_path / "run"
    assert command(*quick(run), "--quiet") == 0
    (run / "notes.txt").write_text("mine")
    before = (run / "adapter" / "reft_model.safetensors").read_bytes()
    assert command(*quick(run, "--seed", 7), "--quiet") == 2
    assert (run / "adapter" / "reft_model.safetensors").read_bytes() == before
    assert command(*quick(run, "--seed", 7, "--overwrite"), "--quiet") == 0
    assert (run / "adapter" / "reft_model.safetensors").read_bytes() != before
    assert (run / "notes.txt").read_text() == "mine"


def test_a_finished_run_is_not_scored_again_in_place_of_another(finished: Path) -> None:
    recipe = replace(read_file(Recipe, finished / "recipe.yaml"), output_dir=str(finished), seed=7)
    directory = RunDirectory(recipe, resume=True, overwrite=True)
    assert (directory.checkpoint, directory.is_trained) == (None, False)


def test_what_is_not_a_runs_is_left_alone(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for name in ("adapter", "recipe.yaml", "predictions.jsonl"):
        place = tmp_path / name
        place.mkdir()
        (place / name).mkdir() if name == "adapter" else (place / name).write_text("mine")
        assert command(*quick(place)) == 2
        assert f"holds {name} already" in capsys.readouterr().err
        assert [path.name for path in place.iterdir()] == [name]


def test_one_process_writes_in_a_directory(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run, more = tmp_path / "run", ("--training.max_steps", 100_000, "--training.logging_steps", 1)
    arguments = [str(one) for one in quick(run, *more, "--quiet")]
    other = subprocess.Popen([sys.executable, "-m", "reftnoise", *arguments])
    try:
        wait_until((run / "log.jsonl").exists)
        assert command(*quick(run, "--overwrite")) == 2
        [line] = capsys.readouterr().err.splitlines()
        assert line == f"reftnoise: {run}: another process is writing there"
        assert read_file(Recipe, run / "recipe.yaml").training.max_steps == 100_000
    finally:
        other.kill()
        other.wait()
    assert command(*quick(run, "--overwrite", "--quiet")) == 0


def test_a_run_that_another_finished_meanwhile_is_not_replaced(tmp_path: Path) -> None:
    recipe = Recipe(output_dir=str(tmp_path / "run"))
    slow = RunDirectory(recipe, resume=False, overwrite=False)
    with RunDirectory(recipe, resume=False, overwrite=False) as quicker:
        quicker.begin(0)
        quicker.finish({"steps": 1})
    with slow, pytest.raises(ValueError, match="holds a finished run"):
        slow.begin(0)
    assert json.loads((tmp_path / "run" / "summary.json").read_text()) == {"steps": 1}


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> Path:
    run = tmp_path_factory.mktemp("finished") / "run"
    assert command(*quick(run), "--quiet") == 0
    return run


@pytest.mark.parametrize(
    "mistake",
    [
        ("--training.learning_rate", -1),
        ("--training.per_device_train_batch_size", 0),
        ("--training.gradient_accumulation_steps", 0),
        ("--training.arguments", '{"eval_strategy": "steps", "eval_steps": 2}'),
        ("--training.arguments", '{"seed": "abc"}'),
        ("--representations", '[{"intervention": "neftune"}]'),
        ("--evaluation.batch_size", 0),
        ("--evaluation.limit", 0),
        ("--evaluation.max_new_tokens", 1000),
        ("--evaluation.by", "likelihood"),
        ("--data.template", "alpacca"),
    ],
    ids=lambda value: str(value)[-24:],
)
def test_a_mistake_costs_no_finished_run(mistake: tuple[Any, ...], finished: Path) -> None:
    before = {path: path.read_bytes() for path in finished.rglob("*") if path.is_file()}
    assert command(*quick(finished, *mistake), "--overwrite", "--quiet") == 2
    after = {path: path.read_bytes() for path in finished.rglob("*") if path.is_file()}
    assert after == before


def test_the_directory_of_a_run_stands_for_its_adapter(finished: Path) -> None:
    of_run, of_adapter = (
        rn.ReftModel.from_pretrained(rn.load_tiny_model()[0], path).state_dict()
        for path in (finished, finished / "adapter")
    )
    assert all(torch.equal(of_run[name], value) for name, value in of_adapter.items())


def test_the_base_itself_is_trained_where_a_recipe_says_so(tmp_path: Path) -> None:
    run = tmp_path / "full"
    more = ("--representations", "[]", "--modules_to_save", '["model", "lm_head"]')
    more += ("--training.learning_rate", "1e-5")  # weights of half precision diverge at that of R
    assert command(*quick(run, *more), "--quiet") == 0
    summary = json.loads((run / "summary.json").read_text())
    base = rn.load_tiny_model()[0]
    assert summary["parameters"]["base"] == sum(p.numel() for p in base.parameters())
    trained = rn.ReftModel.from_pretrained(rn.load_tiny_model()[0], run / "adapter").model
    pairs = zip(trained.parameters(), base.parameters(), strict=True)
    assert any(not torch.equal(one, other) for one, other in pairs)


# -- mistakes ------------------------------------------------------------------------------------


def mistakes(tmp_path: Path) -> dict[str, tuple[tuple[Any, ...], str]]:
    """Arguments next to those of a good run, and what must be said of them."""
    empty, wrong, labelled = (tmp_path / f"{n}.jsonl" for n in ("empty", "wrong", "labelled"))
    blank, bare = tmp_path / "blank.csv", tmp_path / "bare.jsonl"
    of_one = ("--data.train", labelled, "--data.train_split", "train[:1]")
    unscored = ("--evaluation.data", "null", "--data.template", "plain")
    classes = ("--task", '{"name": "classification", "labels": ["good", "bad"]}')
    return {
        "option": (("--training.learning_rte", 1), "did you mean '--training.learning_rate'?"),
        "part": (("--training.learning_rat", 1), "did you mean '--training.learning_rate'?"),
        "value": (("--training.learning_rate", "high"), "training.learning_rate: expected float"),
        "file": (("--data.train", tmp_path / "none.jsonl"), "none.jsonl: no such file"),
        "empty": (("--data.train", empty), "empty.jsonl"),
        "columns": (("--data.train", wrong, "--data.template", "plain"), "no column 'prompt' in"),
        "mapped": (("--data.columns", '{"prompt": "quest"}'), "the data has prompt"),
        "label": (
            ("--data.train", labelled, *classes, *unscored),
            "labelled.jsonl, line 3: completion ' bed'",
        ),
        "blank": (("--data.train", blank, *unscored), "blank.csv, line 4: the prompt is empty"),
        "bare": (("--data.train", bare, *unscored), "bare.jsonl, line 1: "),
        "evaluated": (
            ("--evaluation.data", labelled, *classes, "--evaluation.split", "test[1:]"),
            "evaluation.data {tmp}/labelled.jsonl, line 3: completion ' bed'",
        ),
        "watched": (
            ("--data.eval", labelled, *classes, *unscored, *of_one),
            "data.eval {tmp}/labelled.jsonl, line 3: completion ' bed'",
        ),
        "unit": (("--representations", '[{"layer": 0, "intervention": "lorft"}]'), "'loreft'"),
        "layer": (
            ("--representations", LOREFT.replace('"all"', "99")),
            "the model has layers 0 to",
        ),
        "nothing": (
            ("--representations", '[{"intervention": "neftune"}]'),
            "the recipe trains nothing: noise has no weights",
        ),
        "task": (("--task", "boolk"), "did you mean 'boolq'?"),
        "template": (("--data.template", "alpacca"), "alpacca"),
        "model": (("--model", tmp_path / "nothing"), "no such directory of a model"),
        "dtype": (("--dtype", "float8"), "expected one of auto, float32"),
        "argument": (
            ("--training.arguments", '{"adam_beta": 0.9}'),
            "did you mean 'adam_beta2'?",
        ),
        "slice": (("--data.train_split", "training"), "training"),
        "long": (("--data.max_length", 2), "max_length 2"),
        "stream": (("--data.streaming", "true", "--training.max_steps", -1), "max_steps"),
        "scored": (("--evaluation.data", tmp_path / "none.jsonl"), "none.jsonl: no such file"),
    }


@pytest.mark.parametrize("name", mistakes(Path()))
def test_a_mistake_is_one_line_and_leaves_nothing(
    name: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "empty.jsonl").write_text("")
    (tmp_path / "wrong.jsonl").write_text('{"question": "Is it?", "completion": "yes"}\n')
    rows = [{"prompt": "a", "completion": " good"}, {"prompt": "b", "completion": " bed"}]
    (tmp_path / "labelled.jsonl").write_text("\n\n".join(map(json.dumps, rows)))
    (tmp_path / "blank.csv").write_text('prompt,completion\n"a\nb",c\n"",d\n')
    (tmp_path / "bare.jsonl").write_text('{"prompt": "", "completion": "a"}\n')
    arguments, said = mistakes(tmp_path)[name]
    run = tmp_path / "run"
    assert command(*quick(run), *arguments) == 2
    captured = capsys.readouterr()
    assert captured.out == ""
    [line] = captured.err.splitlines()
    assert line.startswith("reftnoise: ")
    assert said.replace("{tmp}", str(tmp_path)) in line
    assert not run.exists()


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("traning: {learning_rate: 1}", "unknown key 'traning'; did you mean 'training'?"),
        ("training: {learnin_rate: 1}", "training: unknown key 'learnin_rate'"),
        ("training: 3", "training: expected a mapping, got 3"),
        ("training:", "training: expected a mapping, got null"),
        ("", "expected a mapping, got null"),
        ("- a", "expected a mapping"),
        ("training: [", "no YAML: line 1, column 12: "),
        ("seed: 1\nseed: 2", 'line 2, column 1: found duplicate key "seed"'),
    ],
)
def test_a_file_that_is_no_recipe(
    text: str, said: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / "recipe.yaml"
    path.write_text(text)
    with pytest.raises(ValueError, match=path.name) as raised:
        read_file(Recipe, path)
    assert said in str(raised.value)
    assert command("train", path) == 2
    assert len(capsys.readouterr().err.splitlines()) == 1


# -- the command line ----------------------------------------------------------------------------


@pytest.mark.parametrize("name", COMMANDS)
def test_every_command_has_help(name: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as left:
        command(name, "--help")
    assert left.value.code == 0
    printed = capsys.readouterr().out
    assert f"usage: reftnoise {name}" in printed
    assert "default:" in printed or "required" in printed


def test_the_overview_names_all_commands(capsys: pytest.CaptureFixture[str]) -> None:
    assert command("--help") == command() == 0
    printed = capsys.readouterr().out
    assert all(f"  {name} " in printed for name in COMMANDS)
    assert command("trian") == 2
    assert "did you mean 'train'?" in capsys.readouterr().err
    assert command("--version") == 0
    assert capsys.readouterr().out.strip() == rn.__version__


def test_print_config_is_a_commented_recipe(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit):
        command("train", "--seed", 3, "--print_config")
    printed = capsys.readouterr().out
    assert "# greatest learning rate." in printed
    path = tmp_path / "recipe.yaml"
    path.write_text(printed)
    values = read_yaml(path)
    flags = {"resume", "overwrite", "quiet", "json"}
    assert values.keys() - flags == asdict(Recipe()).keys()
    recipe = read(Recipe, {name: v for name, v in values.items() if name not in flags})
    assert recipe == Recipe(seed=3)
