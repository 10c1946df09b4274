"""Searches of settings: what is tried, trials on one base, and searches that are interrupted."""

import json
import weakref
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import numpy as np
import optuna
import pytest
import torch
import yaml
from safetensors.torch import load_file

import reftnoise as rn
from reftnoise._util.files import json_lines
from reftnoise._util.options import read, read_file
from reftnoise.analysis.report.tuning import write_tuning_report
from reftnoise.cli.main import main
from reftnoise.data.sources import load_rows
from reftnoise.engine.training_pass.runner import ForwardPasses
from reftnoise.evaluation import evaluate
from reftnoise.training.recipe import Recipe
from reftnoise.training.resolved_run import ResolvedRun
from reftnoise.training.run import run_recipe
from reftnoise.training.study import shared_base
from reftnoise.training.study.held_out import Measurement
from reftnoise.training.study.shared_base import SharedBase, split_rows
from reftnoise.training.study.space import Dimensions, Space, Tuning, check_tuning, layers_of
from reftnoise.training.study.tuning import (
    TrialStorage,
    TunedTrial,
    best_of,
    run_trials,
    value_of,
)
from reftnoise.training.study.tuning_run import run_tuning

LOREFT = {"layer": "all", "intervention": "loreft", "low_rank_dimension": 4, "positions": "l1"}
LABELS = ["yes", "no"]
RECIPES = sorted((Path(__file__).parents[2] / "examples" / "recipes").rglob("*.yaml"))


def recipe(**changes: Any) -> dict[str, Any]:
    values: dict[str, Any] = {
        "device": "cpu",
        "representations": [LOREFT],
        "data": {"train": "tiny-chat", "template": "chat"},
        "training": {"max_steps": 4, "learning_rate": 4e-3},
    }
    return values | changes


def tuning(directory: Path, **changes: Any) -> Tuning:
    values = {"recipe": recipe(), "measurements": 2, "output_dir": str(directory / "out")}
    return read(Tuning, values | changes)


# -- what is tried ---------------------------------------------------------------------------------


def dimensions(space: dict[str, Any] | None = None, **changes: Any) -> Dimensions:
    run = ResolvedRun(read(Recipe, recipe(**changes)))
    return Dimensions(run, read(Space, space or {}))


def test_the_recipes_own_values_come_first() -> None:
    tried = dimensions(
        {"positions": ["f4+l4", "l1"], "ranks": [2], "layers": [], "learning_rate": [1e-5, 1e-3]}
    )
    assert tried.choices["positions"] == ["l1", "f4+l4"]
    assert tried.choices["rank"] == [4, 2]
    assert "layers" not in tried.choices
    assert tried.rates == (1e-5, 4e-3)
    assert tried.choices["noise"] == ["none", "neftune", "symnoise"]
    assert tried.own == {
        "positions": "l1", "rank": 4, "dropout": 0.0, "noise": "none", "learning_rate": 4e-3
    }  # fmt: skip
    assert tried.recipe(tried.own, 3).representations[0].items() >= LOREFT.items()


def test_values_make_a_recipe() -> None:
    noise = {"intervention": "neftune", "alpha": 7.0, "where": "completion"}
    tried = dimensions(representations=[LOREFT, noise])
    assert tried.choices["alpha"] == [7.0, 1.0, 5.0, 10.0, 15.0]
    values = tried.own | {"layers": "upper", "positions": "all", "rank": 2, "dropout": 0.1}
    made = tried.recipe(values | {"alpha": 5.0, "learning_rate": 1e-3}, 3)
    edit = {"layer": "1-2", "positions": "all", "low_rank_dimension": 2, "dropout": 0.1}
    assert made.representations == [LOREFT | edit, noise | {"alpha": 5.0}]
    assert made.training.learning_rate == 1e-3
    other = tried.recipe(tried.own | {"noise": "symnoise", "alpha": 1.0}, 3)
    assert other.representations[1] == {"intervention": "symnoise", "alpha": 1.0}
    assert len(tried.recipe(tried.own | {"noise": "none"}, 3).representations) == 1


def test_layers_by_words() -> None:
    words = {word: layers_of(word, 5) for word in ("all", "even", "lower", "upper", "2", "1-3")}
    assert words == {
        "all": "all", "even": [0, 2, 4], "lower": "0-1", "upper": "2-4", "2": 2, "1-3": "1-3"
    }  # fmt: skip
    assert (layers_of("lower", 1), layers_of("upper", 1)) == ("0-0", "0-0")
    assert dimensions(representations=[LOREFT | {"layer": [0, 2]}]).own["layers"] == "[0, 2]"


def test_several_edits_stay_where_they_are() -> None:
    second = LOREFT | {"positions": "f1", "low_rank_dimension": 8}
    tried = dimensions(representations=[LOREFT, second])
    assert not {"layers", "positions"} & tried.choices.keys()
    made = tried.recipe({"rank": 2}, 3).representations
    assert [(e["positions"], e["low_rank_dimension"]) for e in made] == [("l1", 2), ("f1", 2)]


def test_a_recipe_without_units_gets_an_edit_and_one_of_peft_none(tmp_path: Path) -> None:
    search = tuning(tmp_path, recipe=recipe(representations=[]))
    assert check_tuning(search).recipe.representations[0]["intervention"] == "loreft"
    peft = dimensions(representations=[], peft={"peft_type": "LORA", "r": 2})
    assert peft.choices.keys() == {"noise", "alpha"}


@pytest.mark.parametrize("path", RECIPES, ids=lambda path: f"{path.parent.name}/{path.stem}")
def test_trials_of_shipped_recipes_can_be_trained(path: Path) -> None:
    own = read_file(Recipe, path)
    own.model, own.device = "tiny-chat", "cpu"  # some name bases that packages carry
    own.data.train, own.evaluation.data = "tiny-chat", None  # or files that users make
    run = check_tuning(Tuning(recipe=own))
    assert run.arguments.eval_strategy == run.arguments.save_strategy == "no"
    assert run.arguments.learning_rate == own.training.learning_rate


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"trials": 0}, "trials 0: expected at least 1"),
        ({"prefix_cache_bytes": 1, "jobs": 2}, "prefix_cache_bytes 1: expected a number of bytes"),
        ({"held_out": 1.5}, "held_out 1.5: expected a share of the rows"),
        ({"held_out": 40}, "held_out 40: expected fewer than the 40 rows"),
        ({"minutes": 0}, "minutes 0"),
        ({"space": {"learning_rate": [1e-3]}}, "space.learning_rate [0.001]: expected the least"),
        ({"space": {"layers": ["uper"]}}, "did you mean 'upper'?"),
        ({"space": {"positions": ["q1"]}}, "positions 'q1'"),
        ({"space": {"noises": ["neftun"]}}, "did you mean 'neftune'?"),
        ({"space": {"noises": ["loreft"]}}, "space.noises 'loreft'"),
        ({"space": {"dropouts": [1.0]}}, "space.dropouts 1.0: expected at least 0 and below 1"),
        ({"space": {"rnks": [1]}}, "did you mean 'ranks'?"),
        ({"objective": "right"}, "objective 'right': the task has neither choices nor classes"),
        ({"recipe": recipe(training={"learning_rate": 1e30, "max_steps": 8})}, "diverged"),
    ],
)
def test_a_search_that_cannot_be(
    changes: dict[str, Any], said: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    values = {"recipe": recipe(), "output_dir": str(tmp_path / "out")} | changes
    (tmp_path / "tuning.yaml").write_text(yaml.safe_dump(values))
    assert main(["tune", str(tmp_path / "tuning.yaml"), "--quiet"]) == 2
    assert said in capsys.readouterr().err


# -- trials on one base ----------------------------------------------------------------------------


def trained_alone(directory: Path, own: Recipe, rows: list[int]) -> dict[str, torch.Tensor]:
    """The weights of a run of the recipe on these rows of its data."""
    lines = [dict(row) for row in load_rows(str(own.data.train)).select(rows)]
    (directory / "rows.jsonl").write_bytes(json_lines(lines))
    data = replace(own.data, train=str(directory / "rows.jsonl"))
    run = replace(own, data=data, output_dir=str(directory / "run"))
    run_recipe(ResolvedRun(run), overwrite=True)
    return load_file(directory / "run" / "adapter" / "reft_model.safetensors")


def test_trials_on_one_base_are_trainings_alone(tmp_path: Path) -> None:
    entries: list[list[dict[str, Any]]] = [
        [LOREFT],
        [LOREFT | {"layer": [1], "low_rank_dimension": 2}],
        [LOREFT | {"positions": "f1+l1", "dropout": 0.1}],
        [LOREFT, {"intervention": "symnoise", "alpha": 5.0}],
        [LOREFT | {"positions": "l2"}],
        [LOREFT],
    ]
    kept = {"prefix_cache": "memory", "max_steps": 6, "learning_rate": 4e-3}
    recipes = [read(Recipe, recipe(representations=e, training=kept)) for e in entries]
    # Its first steps multiply no rounding, as those of AdamW do.
    recipes[4].training.arguments = {"optim": "sgd"}
    shared = SharedBase(ResolvedRun(recipes[0]), held_out=0.2, seed=3)
    train, _ = split_rows(40, 0.2, 3)
    measured = []
    for number, own in enumerate(recipes):
        misses = shared.prefix_cache.misses
        seen: list[Measurement] = []
        model = shared.train(
            own, measurements=2, on_measurement=lambda _, m, seen=seen: bool(seen.append(m))
        )
        measured.append(seen)
        if number in (1, 5):
            assert shared.prefix_cache.misses == misses  # nothing is prefilled again
        alone = trained_alone(tmp_path, own, train)
        together = {n: t for n, t in model.state_dict().items() if n in alone}
        assert together.keys() == alone.keys()
        for name, tensor in alone.items():
            if number == 4:  # keys of the first trial's batches, which were one token wider
                torch.testing.assert_close(together[name], tensor, rtol=1e-5, atol=1e-6)
            else:
                assert torch.equal(together[name], tensor)
        fresh = rn.ReftModel.from_pretrained(model.model, tmp_path / "run" / "adapter")
        of_alone = shared.measured(fresh)
        np.testing.assert_allclose(of_alone.losses, seen[-1].losses, rtol=1e-4, atol=1e-6)
    assert len(measured[0]) == 2
    assert measured[0] == measured[5]


SENTENCES = [
    {"sentence": f"a {adjective} {noun} .", "label": label}
    for label, adjective in enumerate(["dull", "witty"])
    for noun in ["film", "plot", "cast", "song", "book", "play", "joke", "show", "tale", "idea"]
]
HEAD = {"task": {"name": "glue", "subset": "sst2"}}
LORA = {"peft_type": "LORA", "r": 2, "target_modules": ["q_proj"]}


@pytest.mark.filterwarnings("ignore:.*gradient_checkpointing.*deprecated:FutureWarning")
@pytest.mark.parametrize(
    "changes",
    [
        HEAD,
        HEAD | {"representations": [], "modules_to_save": ["score", "norm"]},
        HEAD | {"peft": LORA},
        {"representations": [], "peft": LORA},
    ],
    ids=["head", "modules_to_save", "head and peft", "peft"],
)
def test_what_is_trained_of_a_base_begins_as_it_was_loaded(
    changes: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    if "task" in changes:
        (tmp_path / "sentences.jsonl").write_bytes(json_lines(SENTENCES))
        changes = changes | {"data": {"train": str(tmp_path / "sentences.jsonl")}}
    own = read(Recipe, recipe(**changes))
    bases: list[weakref.ref[Any]] = []
    load = shared_base.load_base_of

    def loaded(run: ResolvedRun) -> Any:
        assert all(base() is None for base in bases)  # memory may hold only one
        base, tokenizer = load(run)
        bases.append(weakref.ref(base))
        return base, tokenizer

    monkeypatch.setattr(shared_base, "load_base_of", loaded)
    shared = SharedBase(ResolvedRun(own), held_out=8, seed=0, prefix_cache="none")
    count = len(load_rows(str(own.data.train)))
    alone = trained_alone(tmp_path, own, split_rows(count, 8, 0)[0])
    for _ in range(2):
        model = shared.train(own, measurements=1, on_measurement=lambda *_: False)
        together = model.state_dict()
        assert all(torch.equal(together[name], tensor) for name, tensor in alone.items())
        del model
    assert len(bases) == (2 if "peft" in changes else 1)


def test_a_training_ends_where_a_measurement_says_so() -> None:
    own = read(Recipe, recipe())
    shared = SharedBase(ResolvedRun(own), held_out=0.2, seed=0)
    seen: list[int] = []

    def stop(number: int, _: Measurement) -> bool:
        seen.append(number)
        return number == 2

    shared.train(own, measurements=4, on_measurement=stop)
    assert seen == [1, 2]


# -- held-out rows ---------------------------------------------------------------------------------


def test_rows_are_held_out_once() -> None:
    train, held = split_rows(40, 0.2, 5)
    assert (len(train), len(held)) == (32, 8)
    assert sorted(train + held) == list(range(40))
    assert train == sorted(train)
    assert split_rows(40, 8, 5) == (train, held)
    assert split_rows(40, 0.2, 6)[1] != held


def test_right_answers_are_those_of_an_evaluation(tmp_path: Path) -> None:
    rows = [
        {"prompt": f"Can a {animal} fly?", "completion": f" {LABELS[number % 2]}"}
        for number, animal in enumerate(["bee", "bear", "cat", "owl", "dog", "cow", "fly", "eel"])
    ]
    path = tmp_path / "rows.jsonl"
    path.write_bytes(json_lines(rows))
    task = {"name": "classification", "labels": LABELS}
    own = read(Recipe, recipe(task=task, data={"train": str(path)}))
    run = ResolvedRun(own)
    shared = SharedBase(run, held_out=5, seed=0)
    base, tokenizer = rn.load_tiny_model()
    model = rn.get_reft_model(base, run.config).eval()
    for unit in model.interventions.values():
        torch.nn.init.normal_(unit.learned_source.weight, std=0.1)
    held = [rows[index] for index in split_rows(8, 5, 0)[1]]
    expected = evaluate(model, tokenizer, run.task, held, by="likelihood")
    measured = shared.measured(model)
    assert [letter == "1" for letter in measured.right] == expected.right
    with torch.no_grad():
        for row, loss in zip(held, measured.losses, strict=True):
            prompt = tokenizer(row["prompt"]).input_ids
            whole = torch.tensor([tokenizer(row["prompt"] + row["completion"]).input_ids])
            logits = model(whole, prompt_lengths=torch.tensor([len(prompt)])).logits[0]
            log_probs = logits.log_softmax(-1)[len(prompt) - 1 : -1]
            nll = -log_probs.gather(1, whole[0, len(prompt) :, None]).sum()
            assert loss == pytest.approx(float(nll), rel=1e-4)


def test_losses_of_answers_are_those_of_an_evaluation(tmp_path: Path) -> None:
    rows = [
        {"instruction": f"Say {word}.", "input": "", "output": f"{word} {word}"}
        for word in ["bee", "bear", "cat", "owl", "dog", "cow", "fly", "eel"]
    ]
    (tmp_path / "rows.jsonl").write_bytes(json_lines(rows))
    own = recipe(task="instruct", data={"train": str(tmp_path / "rows.jsonl"), "max_length": 9})
    run = ResolvedRun(read(Recipe, own))
    shared = SharedBase(run, held_out=5, seed=0)
    base, tokenizer = rn.load_tiny_model()
    model = rn.get_reft_model(base, run.config).eval()
    held = [rows[index] for index in split_rows(8, 5, 0)[1]]
    expected = evaluate(model, tokenizer, run.task, held, by="loss", max_length=9)
    measured = shared.measured(model)
    assert measured.losses == pytest.approx(expected.losses, rel=1e-4)
    assert measured.right == ""
    misses = shared.prefix_cache.misses
    assert misses == 5
    shared.measured(model)
    assert shared.prefix_cache.misses == misses  # prompts are kept


def test_jobs_divide_the_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def trained(self: SharedBase, *_: Any, **__: Any) -> None:
        assert self.prefix_cache.max_bytes == 5000
        raise KeyboardInterrupt

    monkeypatch.setattr(SharedBase, "train", trained)
    with pytest.raises(KeyboardInterrupt):
        run_trials(
            TrialStorage(tuning(tmp_path, jobs=2, prefix_cache_bytes=10_001)), lambda _: None
        )


def test_losses_of_texts_are_those_of_training() -> None:
    run = ResolvedRun(read(Recipe, recipe()))
    shared = SharedBase(run, held_out=6, seed=0)
    base, tokenizer = rn.load_tiny_model()
    model = rn.get_reft_model(base, run.config).eval()
    measured = shared.measured(model)
    assert measured.right == ""
    held = load_rows("tiny-chat").select(split_rows(40, 6, 0)[1])
    data = rn.make_last_position_supervised_data_module(
        tokenizer, model, held["prompt"], held["completion"], chat_template=True
    )
    with torch.no_grad():
        for row, loss in zip(data["train_dataset"], measured.losses, strict=True):
            batch = data["data_collator"]([row])
            assert loss == pytest.approx(float(model(**batch).loss), rel=1e-4, abs=1e-6)


def test_more_right_answers_come_before_a_lower_loss() -> None:
    assert value_of([9.0, 9.0], "10", True) > value_of([0.1, 0.1], "00", True)
    assert value_of([0.1, 0.3], "10", True) > value_of([0.2, 0.3], "01", True)
    assert value_of([1.0, 3.0], "", False) == -2.0


# -- searches --------------------------------------------------------------------------------------


def outcomes(storage: TrialStorage) -> list[Any]:
    return [(t.values, t.losses, t.part, t.problem) for t in storage.finished()]


def test_an_interrupted_search_ends_as_one_that_was_not(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole = TrialStorage(tuning(tmp_path / "whole", trials=7))
    shown: list[int] = []
    run_trials(whole, lambda trials: shown.append(len(trials)))
    assert shown == list(range(8))
    trials = whole.finished()
    assert trials[0].recipe.representations[0].items() >= LOREFT.items()
    assert len({json.dumps(trial.values) for trial in trials}) == 7
    assert {trial.part for trial in trials} > {1.0}  # some ended early
    assert all(trial.is_complete == (trial.part == 1) for trial in trials)

    stopped, train = tuning(tmp_path / "stopped", trials=7), SharedBase.train
    count = 0

    def interrupted(self: SharedBase, *args: Any, **kwargs: Any) -> rn.ReftModel:
        nonlocal count
        count += 1
        model = train(self, *args, **kwargs)
        if count in (1, 4):
            raise KeyboardInterrupt
        return model

    monkeypatch.setattr(SharedBase, "train", interrupted)
    for _ in range(2):
        with pytest.raises(KeyboardInterrupt):
            run_trials(TrialStorage(stopped), lambda _: None)
    # A process that was killed leaves a trial that nobody runs.
    lost = TrialStorage(stopped)
    lost._study.ask()
    monkeypatch.setattr(SharedBase, "train", train)
    run_trials(TrialStorage(stopped), lambda _: None)
    assert outcomes(lost) == outcomes(whole)
    assert not list(lost.directory.glob(".trial-*"))


def test_two_processes_run_different_trials(tmp_path: Path) -> None:
    one, other = (TrialStorage(tuning(tmp_path, trials=2)) for _ in range(2))
    tried = dimensions()
    with one.next(tried) as first, other.next(tried) as second:
        assert first is not None
        assert second is not None
        assert first[1] != second[1]
        with one.next(tried) as third:
            assert third is None  # there are enough, if the two are finished
        states = [trial.state for trial in one._study.get_trials()]
        assert states == [optuna.trial.TrialState.RUNNING] * 2


@pytest.mark.parametrize("lost", [0, 1])
def test_a_lost_trial_is_tried_again_while_others_run(lost: int, tmp_path: Path) -> None:
    storage, tried = TrialStorage(tuning(tmp_path, trials=4)), dimensions()

    def begin(running: ExitStack) -> dict[str, Any]:
        begun = running.enter_context(storage.next(tried))
        assert begun is not None
        return begun[1]

    with ExitStack() as ended:
        stacks = [ended.enter_context(ExitStack()) for _ in range(3)]
        values = [begin(stack) for stack in stacks]
        assert values[0] == tried.own
        assert len({json.dumps(v) for v in values}) == 3
        stacks[lost].__exit__(KeyboardInterrupt, KeyboardInterrupt(), None)
        assert begin(ended) == values[lost]
        assert begin(ended) not in values


def test_a_trial_that_diverges_before_the_recipe_is_measured(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def diverging(*_: Any, **__: Any) -> None:
        raise ValueError("training diverged")

    monkeypatch.setattr(SharedBase, "train", diverging)
    storage, other = (TrialStorage(tuning(tmp_path, trials=2)) for _ in range(2))
    with storage.next(dimensions()) as own:
        assert own is not None
        run_trials(other, lambda _: None)
        (trial,) = other.finished()
        assert trial.problem == "training diverged"
        with pytest.raises(ValueError, match=r"trials: none was .*; the first: training diverged"):
            other.write_best()
        storage.tell(own[0], None)  # ends without having been the recipe's training
    with pytest.raises(ValueError, match=r"^training diverged"):
        run_trials(TrialStorage(tuning(tmp_path / "first", trials=2)), lambda _: None)


def trial(number: int, losses: list[float], **changes: Any) -> TunedTrial:
    values: dict[str, Any] = {
        "number": number, "values": {"rank": 2 + number}, "recipe": Recipe(), "losses": losses,
        "right": "", "part": 1.0, "seconds": 1.0, "problem": None, "by_right": False,
        "is_own": False,
    }  # fmt: skip
    return TunedTrial(**values | changes)


def test_the_report_compares_with_the_recipe_whatever_its_number(tmp_path: Path) -> None:
    lost = [trial(1, [1.0, 2.0]), trial(2, [], problem="diverged", part=0.0)]
    _, table = write_tuning_report(tmp_path, lost)
    assert "to the recipe" not in table.columns
    assert all(len(row) == len(table.columns) for row in table.rows)
    page, table = write_tuning_report(tmp_path, [*lost, trial(3, [2.5, 3.5], is_own=True)])
    column = table.columns.index("to the recipe")
    assert [row[column].text for row in table.rows] == ["−1.50", "–", "–"]
    assert "the recipe itself, trial 3, are paired" in page.read_text()


def test_small_losses_are_told_apart(tmp_path: Path) -> None:
    trials = [trial(1, [0.0004, 0.0006]), trial(2, [0.0006, 0.0007], is_own=True)]
    _, table = write_tuning_report(tmp_path, trials)
    column = table.columns.index("loss")
    shown = [[cell.text for cell in row[column : column + 3]] for row in table.rows]
    assert [(loss, change) for loss, _, change in shown] == [
        ("0.0005000", "−0.000150"),
        ("0.0006500", "–"),
    ]
    assert all(interval.count("0.000") == 2 for _, interval, _ in shown)


def test_a_trial_that_diverges_is_one_without_a_result(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    train = SharedBase.train

    def diverging(self: SharedBase, own: Recipe, **kwargs: Any) -> rn.ReftModel:
        if own.training.learning_rate != 4e-3:
            own = replace(own, training=replace(own.training, learning_rate=1e30))
        return train(self, own, **kwargs)

    monkeypatch.setattr(SharedBase, "train", diverging)
    storage = TrialStorage(tuning(tmp_path, trials=3, pruning="none"))
    run_trials(storage, lambda _: None)
    first, *others = storage.finished()
    assert first.is_complete
    assert all("diverged" in str(trial.problem) and not trial.is_complete for trial in others)
    assert storage.write_best() == first == best_of([first, *others])


def test_another_search_is_refused_and_more_trials_are_not(tmp_path: Path) -> None:
    TrialStorage(tuning(tmp_path, trials=2))
    TrialStorage(tuning(tmp_path, trials=9, jobs=2, minutes=3))
    with pytest.raises(ValueError, match=r"space.ranks\[0\] 3: the search in .* has 1; leave it"):
        TrialStorage(tuning(tmp_path, space={"ranks": [3, 2, 4, 8, 16]}))


def test_a_search_that_another_began_meanwhile_is_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    locked = TrialStorage._locked

    @contextmanager
    def late(self: TrialStorage) -> Iterator[None]:
        monkeypatch.setattr(TrialStorage, "_locked", locked)
        TrialStorage(tuning(tmp_path, seed=1))
        with locked(self):
            yield

    monkeypatch.setattr(TrialStorage, "_locked", late)
    with pytest.raises(ValueError, match=r"seed 0: the search in .* has 1"):
        TrialStorage(tuning(tmp_path))


def test_no_trial_begins_when_time_is_over(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="minutes: over before a trial was trained to its end"):
        run_tuning(tuning(tmp_path, minutes=1e-9))
    assert not TrialStorage(tuning(tmp_path)).finished()


# -- the command -----------------------------------------------------------------------------------


def test_tune_ends_in_a_recipe_that_can_be_trained(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    path, out = tmp_path / "recipe.yaml", tmp_path / "out"
    own = recipe()
    own["data"] |= {"eval": "tiny-chat"}
    own["training"] |= {"eval_steps": 3, "save_steps": 3}
    own["training"]["arguments"] = {"load_best_model_at_end": True}
    path.write_text(yaml.safe_dump(own))
    command = ["tune", str(path), "--trials", "3", "--output_dir", str(out)]
    assert main([*command, "--trials", "1"]) == 0  # with one trial, no setting has two values
    assert "1/1" in capsys.readouterr().err
    assert main(command) == 0
    printed = capsys.readouterr()
    assert f"reftnoise train {out / 'best.yaml'}" in printed.out
    assert "3/3" in printed.err
    best = read_file(Recipe, out / "best.yaml")
    assert best.data == read(Recipe, own).data  # all rows, and those that are only measured
    rate = {"learning_rate": best.training.learning_rate}
    assert best.training == read(Recipe, own | {"training": own["training"] | rate}).training
    assert best.output_dir == str(out / "best")
    ResolvedRun(best).expect_trainable()
    assert (out / "trials.png").read_bytes().startswith(b"\x89PNG")
    table = (out / "results.md").read_text()
    assert "| trial | loss | 95 % interval | to the recipe |" in table
    assert table.count("\n| ") == 4 - 1
    assert "best.yaml" in (out / "report.html").read_text()

    def unloaded(*_: Any, **__: Any) -> Any:
        raise AssertionError("a base is loaded for a search that is finished")

    monkeypatch.setattr(shared_base, "load_base_of", unloaded)
    assert main([*command, "--json"]) == 0
    trials = json.loads(capsys.readouterr().out)
    assert [trial["number"] for trial in trials] == [0, 1, 2]


def test_an_interrupted_command_says_what_continues_it(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    def interrupted(*_: Any, **__: Any) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(ForwardPasses, "run", interrupted)
    path = tmp_path / "recipe.yaml"
    path.write_text(yaml.safe_dump(recipe()))
    assert main(["tune", str(path), "--output_dir", str(tmp_path / "out")]) == 130
    command = f"reftnoise tune {tmp_path / 'out' / 'tuning.yaml'}"
    assert f"to go on: {command}" in capsys.readouterr().err
    continued = read_file(Tuning, tmp_path / "out" / "tuning.yaml")
    assert asdict(continued.recipe) == asdict(read(Recipe, recipe()))


@pytest.mark.slow
def test_jobs_share_the_trials(tmp_path: Path) -> None:
    # Of the rates between 4e-3 and 1e30, nearly all diverge.
    space = {"learning_rate": [4e-3, 1e30], "layers": [], "positions": [], "noises": []}
    trials = run_tuning(tuning(tmp_path, trials=5, jobs=2, threads=1, space=space))
    assert len(trials) == 5
    assert len({json.dumps(trial.values) for trial in trials}) == 5
    assert any("diverged" in str(trial.problem) for trial in trials)
    (own,) = [trial for trial in trials if trial.is_own]
    assert own.is_complete
    assert (tmp_path / "out" / "best.yaml").is_file()
