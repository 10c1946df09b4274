"""pyreft's names and modules, and its datasets beside what pyreft makes of the same texts."""

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import datasets
import pytest
import torch
import transformers

import reftnoise as rn
import reftnoise.pyreft as facade
from support import pyreft_rows

RECORDED = Path(pyreft_rows.__file__).with_suffix(".json")
# What pyreft's `__init__` and its modules define.
NAMES = {
    "": (
        *("TaskType", "get_reft_model", "ReftConfig", "ReftModel", "ReftTrainer"),
        *("ReftTrainerForCausalLM", "ReftTrainerForCausalLMDistributed"),
        *("ReftTrainerForSequenceClassification", "NoreftIntervention", "LoreftIntervention"),
        *("ConsreftIntervention", "LobireftIntervention", "DireftIntervention"),
        *("NodireftIntervention", "ReftDataCollator", "ReftDataset", "ReftRawDataset"),
        *("ReftSupervisedDataset", "ReftGenerationDataset", "ReftPreferenceDataset"),
        *("ReftRewardDataset", "ReftRewardCollator"),
        *("make_last_position_supervised_data_module", "get_intervention_locations"),
        *("make_multiple_position_supervised_data_module", "parse_positions"),
    ),
    "dataset": (
        *("IGNORE_INDEX", "prompt_input", "prompt_no_input", "no_header_prompt_template"),
        *("ReftClassificationDataset", "make_last_position_supervised_chat_data_module"),
        *("ReftDataCollator", "ReftSupervisedDataset", "get_intervention_locations"),
    ),
    "reft_model": ("ReftModel", "count_parameters"),
    "reft_trainer": ("ReftDataCollator", "make_data_collator", "make_dataloader", "ReftTrainer"),
    "utils": ("ReftType", "TaskType", "get_reft_model"),
    "config": ("ReftConfig",),
    "interventions": ("LoreftIntervention", "LowRankRotateLayer", "NodireftIntervention"),
}


@pytest.fixture(scope="module")
def tokenizer() -> Any:
    return pyreft_rows.tokenizer()


@pytest.mark.parametrize("module", NAMES)
def test_pyrefts_names_are_in_pyrefts_modules(module: str) -> None:
    home = getattr(facade, module) if module else facade
    assert all(hasattr(home, name) for name in NAMES[module])
    if module in ("dataset", "reft_model", "reft_trainer", "utils"):
        assert getattr(rn, module) is home
    if not module:
        assert all(hasattr(rn, name) for name in NAMES[""])
        assert facade.ReftDataCollator is rn.ReftDataCollator
        assert facade.ReftModel is rn.ReftModel


def test_the_modules_import_as_pyrefts() -> None:
    code = (
        "import sys, reftnoise as rn\n"
        "rn.ReftModel, rn.ReftTrainer\n"
        "assert 'reftnoise.pyreft' not in sys.modules\n"
        "from reftnoise.pyreft.reft_trainer import make_dataloader\n"
        "from reftnoise.pyreft.dataset import ReftSupervisedDataset\n"
        "assert rn.ReftSupervisedDataset is ReftSupervisedDataset\n"
    )
    subprocess.run([sys.executable, "-c", code], check=True)


# transformers' collator is slow with labels that are tensors, as pyreft's are.
@pytest.mark.filterwarnings("ignore:Creating a tensor from a list of numpy:UserWarning")
@pytest.mark.parametrize("name", json.loads(RECORDED.read_text(encoding="utf-8")))
def test_data_functions_make_what_pyreft_makes(name: str, made: dict[str, Any]) -> None:
    expected = json.loads(RECORDED.read_text(encoding="utf-8"))[name]
    if name.startswith(("losses", "reward of")):
        expected = pytest.approx(expected, abs=2e-4)  # pyreft's Trainer logs four digits
    assert made[name] == expected


@pytest.fixture(scope="module")
def made() -> dict[str, Any]:
    result: dict[str, Any] = json.loads(json.dumps(pyreft_rows.rows(facade)))
    return result


def test_rows_come_from_a_file(tokenizer: Any, tmp_path: Path) -> None:
    path = tmp_path / "rows.json"
    path.write_text(json.dumps(pyreft_rows.INSTRUCTIONS), encoding="utf-8")
    settings: dict[str, Any] = {"position": "f1+l1", "num_interventions": 2}
    settings |= {**pyreft_rows.FIELDS, "output_field": "output"}
    whole = rn.ReftSupervisedDataset(
        "alpaca", None, tokenizer, dataset=pyreft_rows.INSTRUCTIONS, **settings
    )
    read = rn.ReftSupervisedDataset("alpaca", str(path), tokenizer, **settings)
    assert [pyreft_rows.plain(row) for row in read] == [pyreft_rows.plain(row) for row in whole]
    one = rn.ReftSupervisedDataset("alpaca", str(path), tokenizer, max_n_example=1, **settings)
    assert len(one) == 1
    raw = rn.ReftRawDataset("alpaca", None, tokenizer, dataset=pyreft_rows.INSTRUCTIONS, **settings)
    assert raw.intervention_locations == [row["intervention_locations"] for row in raw]
    assert raw.subspaces is None


@pytest.mark.parametrize("positions", ["all", "", "3", "l3+f3", "f3+", "f-1"])
def test_positions_that_pyreft_does_not_have(positions: str) -> None:
    with pytest.raises(ValueError, match=r"expected 'f3', 'l3' or 'f3\+l3'"):
        rn.parse_positions(positions)


def test_what_is_missing_is_named(tokenizer: Any) -> None:
    with pytest.raises(ValueError, match="positions is missing"):
        rn.get_intervention_locations(last_position=3, num_interventions=1)
    with pytest.raises(ValueError, match="num_interventions 3: expected an even number"):
        rn.get_intervention_locations(last_position=4, num_interventions=3, positions="f1+l1")
    with pytest.raises(ValueError, match="position is missing: expected one such as"):
        rn.ReftGenerationDataset("task", None, tokenizer, dataset=[])
    with pytest.raises(ValueError, match="1 inputs but 2 outputs"):
        rn.make_multiple_position_supervised_data_module(tokenizer, None, ["a"], ["b", "c"])
    bare = pyreft_rows.tokenizer()
    bare.pad_token = None
    with pytest.raises(ValueError, match="no pad_token"):
        rn.ReftGenerationDataset("task", None, bare, dataset=[], position="l1")
    with pytest.raises(NotImplementedError, match="ReftDataset has no tokenize"):
        rn.ReftDataset("task", None, tokenizer, dataset=[{}], position="l1")


# -- collators -------------------------------------------------------------------------------------

FEATURES = [
    {"input_ids": [1, 5, 6], "labels": [-100, 5, 6], "intervention_locations": [[1, 3], [0, 3]]},
    {"input_ids": [1], "labels": [1], "intervention_locations": [[0, 1], [0, 1]]},
]


@pytest.mark.parametrize("by_name", [True, False])
def test_a_collator_in_the_collator(tokenizer: Any, by_name: bool) -> None:
    padding = transformers.DataCollatorForSeq2Seq(tokenizer, label_pad_token_id=-100)
    named = {"data_collator": padding}
    collator = rn.ReftDataCollator(**named) if by_name else rn.ReftDataCollator(padding)
    batch = collator(FEATURES)
    assert batch["intervention_locations"].tolist() == [
        f["intervention_locations"] for f in FEATURES
    ]
    assert batch["labels"].tolist() == [[-100, 5, 6], [1, -100, -100]]
    assert collator.data_collator is padding
    assert collator.tokenizer is tokenizer


def test_a_function_in_the_collator_has_no_more_locations_than_columns() -> None:
    def collate(_: Any) -> dict[str, Any]:
        return {"input_ids": torch.tensor([[1, 2]]), "intervention_locations": [[[0, 1, 2]]]}

    batch = rn.ReftDataCollator(collate)(FEATURES)
    assert batch["intervention_locations"].tolist() == [[[0, 1]]]
    without = rn.ReftDataCollator(lambda _: {"input_ids": torch.ones(1, 2)})
    assert list(without(FEATURES)) == ["input_ids"]


def test_neither_a_tokenizer_nor_a_collator() -> None:
    for arguments in ((), (3,)):
        with pytest.raises(TypeError, match=r"tokenizer (None|3): expected a tokenizer, or"):
            rn.ReftDataCollator(*arguments)


def test_left_padding_moves_tokens_away() -> None:
    tokenizer = pyreft_rows.tokenizer()
    tokenizer.padding_side = "left"
    collator = facade.reft_trainer.make_data_collator(tokenizer, None)
    with pytest.warns(UserWarning, match="padding_side 'left' moves tokens"):
        collator(FEATURES)
    collator(FEATURES[:1])


@pytest.mark.parametrize("side", ["left", "right"])
def test_locations_count_the_columns_of_the_batch(side: str) -> None:
    tokenizer = pyreft_rows.tokenizer()
    tokenizer.padding_side = side
    batch = rn.ReftDataCollator(tokenizer)(FEATURES)
    shift = 2 if side == "left" else 0
    short = [[shift, 1 + shift]] * 2
    assert batch["intervention_locations"].tolist() == [[[1, 3], [0, 3]], short]
    assert "prompt_lengths" not in batch
    rows = [f | {"subspaces": [[0, 1], [2, 3]]} for f in FEATURES]
    assert rn.ReftDataCollator(tokenizer)(rows)["subspaces"].shape == (2, 2, 2)


# -- our own data module in pyreft's words ---------------------------------------------------------


@pytest.mark.parametrize("streams", [False, True])
def test_a_number_of_interventions_makes_pyrefts_column(tokenizer: Any, streams: bool) -> None:
    prompts, answers = ["Where does a bear live?", "b"], [" in a forest", " c"]
    rows: Any = datasets.Dataset.from_dict({"prompt": prompts, "completion": answers})
    rows = rows.to_iterable_dataset() if streams else rows
    module = rn.make_last_position_supervised_data_module(
        tokenizer, None, rows, num_interventions=3
    )
    examples = module["train_dataset"]
    made = [next(iter(examples))] if streams else list(examples)
    for example in made:
        last = example["prompt_lengths"] - 1
        assert example["intervention_locations"] == [[last]] * 3
    batch = module["data_collator"](made)
    assert batch["intervention_locations"].shape == (len(made), 3, 1)
    plain = rn.make_last_position_supervised_data_module(tokenizer, None, rows)
    assert "intervention_locations" not in next(iter(plain["train_dataset"]))


def test_pyrefts_names_of_prompts_and_completions(tokenizer: Any) -> None:
    make = rn.make_last_position_supervised_data_module
    ours = make(tokenizer, None, ["a"], ["b"])["train_dataset"]
    assert list(make(tokenizer, None, inputs=["a"], outputs=["b"])["train_dataset"]) == list(ours)
    for arguments in ({"prompts": ["a"], "inputs": ["a"], "outputs": ["b"]}, {"outputs": ["b"]}):
        with pytest.raises(ValueError, match="prompts and inputs are the same argument"):
            make(tokenizer, None, **arguments)
    with pytest.raises(ValueError, match="completions and outputs are the same argument"):
        make(tokenizer, None, ["a"], ["b"], outputs=["b"])


# -- the trainer's functions -----------------------------------------------------------------------


def test_a_loader_of_a_module(tokenizer: Any) -> None:
    module = facade.make_last_position_supervised_data_module(
        tokenizer, None, ["a b", "c"], ["d", "e"]
    )
    collate = facade.reft_trainer.make_data_collator(tokenizer, None)
    loader = facade.reft_trainer.make_dataloader(module["train_dataset"], 2, collate, shuffle=False)
    (batch,) = loader
    assert batch["intervention_locations"].shape == (2, 1, 1)
    assert facade.reft_model.count_parameters(torch.nn.Linear(2, 3)) == 9
