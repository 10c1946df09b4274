"""Tokens that were added to a base, on which an adapter depends."""

import json
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import TrainingArguments

import reftnoise as rn
from support.models.architectures import tiny_model

pytestmark = pytest.mark.filterwarnings("ignore:.*gradient_checkpointing.*:FutureWarning")

LOREFT: dict[str, Any] = {"layer": "all", "intervention": "loreft", "low_rank_dimension": 2}
SIZE = 101
ADDED = [101, 102, 103]
IDS = torch.tensor([[5, 101, 7, 103]])


def resized(seed: int, count: int = 3, *, tie: bool = False) -> Any:
    """A base with tokens that were added; all of them but for these rows are equal."""
    base = tiny_model()
    base.config.tie_word_embeddings = tie
    base.config.name_or_path = "someone/a-model"
    if tie:
        base.tie_weights()
    torch.manual_seed(seed)
    base.resize_token_embeddings(SIZE + count, mean_resizing=False)
    return base


def wrapped(base: Any, **sections: Any) -> rn.ReftModel:
    return rn.get_reft_model(base, rn.ReftConfig(LOREFT, **sections)).eval()


@torch.no_grad()
def logits(model: Any, ids: Tensor = IDS) -> Tensor:
    return model(input_ids=ids).logits


@pytest.fixture
def adapter(tmp_path: Path) -> Path:
    wrapped(resized(1)).save_pretrained(tmp_path / "adapter")
    return tmp_path / "adapter"


def description(adapter: Path) -> Any:
    return json.loads((adapter / "reft_config.json").read_text(encoding="utf-8"))


def rewrite(adapter: Path, vocabulary: Any) -> None:
    content = description(adapter)
    content["base_model"]["vocabulary"] = vocabulary
    (adapter / "reft_config.json").write_text(json.dumps(content), encoding="utf-8")


def test_a_base_that_lacks_rows_is_an_error_that_says_what_to_call(adapter: Path) -> None:
    message = (
        r"the adapter's base \(someone/a-model\) has 104 embeddings, the given model \(.*\) 101: "
        r"call model.resize_token_embeddings\(104\)"
    )
    with pytest.raises(ValueError, match=message):
        rn.ReftModel.from_pretrained(tiny_model(), adapter)
    with pytest.raises(ValueError, match=message):
        rn.get_reft_model(tiny_model()).load_adapter(adapter, "added")


@pytest.mark.parametrize("tie", [False, True])
def test_rows_of_other_values_are_named(tie: bool, tmp_path: Path) -> None:
    wrapped(resized(1, tie=tie)).save_pretrained(tmp_path)
    rn.ReftModel.from_pretrained(resized(1, tie=tie), tmp_path)
    rn.ReftModel.from_pretrained(resized(1, tie=tie).to(torch.bfloat16), tmp_path)
    message = r"have different embeddings of the tokens \[101, 102, 103\]: .*token_rows=\["
    with pytest.warns(UserWarning, match=message):
        rn.ReftModel.from_pretrained(resized(2, tie=tie), tmp_path)
    with torch.no_grad():
        (other := resized(1, tie=tie)).get_output_embeddings().weight[103] += 1
    with pytest.warns(UserWarning, match=r"embeddings of the tokens \[103\]"):
        rn.ReftModel.from_pretrained(other, tmp_path)


def test_rows_added_later_make_no_difference(tmp_path: Path) -> None:
    wrapped(tiny_model()).save_pretrained(tmp_path)
    rn.ReftModel.from_pretrained(resized(1), tmp_path)


def test_adapters_of_before_are_loaded(adapter: Path) -> None:
    content = description(adapter)
    del content["base_model"]["vocabulary"]
    (adapter / "reft_config.json").write_text(json.dumps(content), encoding="utf-8")
    rn.ReftModel.from_pretrained(tiny_model(), adapter)


@pytest.mark.parametrize(
    "vocabulary",
    [3, [], {}, {"size": "many"}, {"size": -1}, {"size": 104, "input": "x"}, {"size": 1e300}]
    + [{"size": 104, "input": text} for text in (3, "", "1 2 3")],
)
def test_a_damaged_vocabulary(vocabulary: Any, adapter: Path) -> None:
    rewrite(adapter, vocabulary)
    with pytest.raises(ValueError, match=r"reft_config.json: damaged vocabulary$"):
        rn.ReftModel.from_pretrained(resized(1), adapter)


def test_a_vocabulary_of_any_size_costs_nothing(adapter: Path) -> None:
    rewrite(adapter, {"size": 10**12, "input": "0"})
    with pytest.raises(ValueError, match="has 1000000000000 embeddings"):
        rn.ReftModel.from_pretrained(resized(1), adapter)


def test_trained_embeddings_are_not_compared(tmp_path: Path) -> None:
    config = rn.ReftConfig([LOREFT], modules_to_save=["embed_tokens", "lm_head"])
    rn.get_reft_model(resized(1), config).save_pretrained(tmp_path)
    assert set(description(tmp_path)["base_model"]["vocabulary"]) == {"size"}
    rn.ReftModel.from_pretrained(resized(2), tmp_path)


@pytest.mark.parametrize(
    "section",
    [
        {"peft_type": "trainable_tokens", "token_indices": ADDED},
        {"peft_type": "lora", "target_modules": ["q_proj"], "trainable_token_indices": ADDED},
        {"peft_type": "lora", "target_modules": ["q_proj"], "modules_to_save": ["embed_tokens"]},
        {"peft_type": "lora", "target_modules": ["q_proj", "embed_tokens"]},
    ],
    ids=["trainable tokens", "LoRA with tokens", "LoRA with embeddings", "LoRA of embeddings"],
)
def test_rows_that_peft_trains_come_with_the_adapter(
    section: dict[str, Any], tmp_path: Path
) -> None:
    of_input = section.get("target_modules") != ["q_proj", "embed_tokens"]
    model = wrapped(resized(1), peft=section)
    model.save_pretrained(tmp_path)
    other = resized(1)
    if of_input:
        other.get_input_embeddings().weight.data[ADDED] = 7.0
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        warnings.filterwarnings("ignore", message=".*gradient_checkpointing")
        loaded = rn.ReftModel.from_pretrained(other, tmp_path)
    assert torch.equal(logits(loaded), logits(model))


def test_other_rotary_positions_are_mentioned(adapter: Path) -> None:
    other = resized(1)
    other.config.rope_parameters = other.config.rope_parameters | {"rope_theta": 7.0}
    with pytest.warns(UserWarning, match=r"different rope_parameters: \{.*10000.0.*7.0"):
        rn.ReftModel.from_pretrained(other, adapter)


# -- rows that are saved -------------------------------------------------------------------------


@pytest.fixture(params=[False, True], ids=["untied", "tied"])
def tie(request: pytest.FixtureRequest) -> bool:
    return bool(request.param)


def test_saved_rows_are_put_back(tie: bool, tmp_path: Path) -> None:
    model = wrapped(resized(1, tie=tie), token_rows=ADDED)
    model.save_pretrained(tmp_path)
    expected = logits(model)
    for base in (resized(2, tie=tie), resized(2, 0, tie=tie), resized(2, 9, tie=tie)):
        loaded = rn.ReftModel.from_pretrained(base, tmp_path)
        assert loaded.reft_config.token_rows == ADDED
        assert torch.equal(logits(loaded)[..., :104], expected)
    half = rn.ReftModel.from_pretrained(resized(2, tie=tie).to(torch.bfloat16), tmp_path)
    assert half.model.get_input_embeddings().weight.dtype == torch.bfloat16


def test_a_base_grows_to_twice_its_size_at_most(tmp_path: Path) -> None:
    wrapped(resized(1), token_rows=ADDED).save_pretrained(tmp_path)
    rewrite(tmp_path, {"size": 10**12})
    with pytest.raises(ValueError, match=r"call model.resize_token_embeddings\(1000000000000\)"):
        rn.ReftModel.from_pretrained(tiny_model(), tmp_path)


def test_rows_that_are_not_saved_are_still_compared(tmp_path: Path) -> None:
    wrapped(resized(1), token_rows=[101, 103]).save_pretrained(tmp_path)
    with pytest.warns(UserWarning, match=r"embeddings of the tokens \[102\]"):
        rn.ReftModel.from_pretrained(resized(2), tmp_path)


def test_adapters_by_name_share_the_bases_rows(tmp_path: Path) -> None:
    wrapped(resized(1), token_rows=ADDED).save_pretrained(tmp_path)
    rn.get_reft_model(resized(1)).load_adapter(tmp_path, "added")
    with pytest.raises(
        ValueError, match=r"has token_rows \[101, 102, 103\], which the base has not"
    ):
        rn.get_reft_model(resized(2)).load_adapter(tmp_path, "added")
    with pytest.raises(ValueError, match=r"token_rows \[101, 102, 103\]: the model has 101"):
        rn.get_reft_model(tiny_model()).load_adapter(tmp_path, "added")


def test_a_resumed_run_gets_the_rows_of_its_checkpoint(tmp_path: Path) -> None:
    def trained(base: Any, *steps: int) -> rn.ReftModel:
        model = wrapped(base, token_rows=ADDED)
        arguments = {"learning_rate": 0.01, "report_to": "none", "save_steps": 1, "use_cpu": True}
        rows = [{"input_ids": IDS[0], "labels": IDS[0]}] * 4
        for step in steps:
            args = TrainingArguments(str(tmp_path / "run"), max_steps=step, **arguments)
            trainer = rn.ReftTrainer(model, args, train_dataset=rows)
            trainer.train(resume_from_checkpoint=step == 2)
        return model.eval()

    trained(resized(1), 1)
    resumed = trained(resized(2), 2)
    assert torch.equal(
        resumed.model.get_input_embeddings().weight, resized(1).get_input_embeddings().weight
    )


@pytest.mark.parametrize(
    ("tokens", "problem"),
    [
        ([], "expected a list of ids"),
        ("ab", "expected a list of ids"),
        ([-1], "expected a list of ids"),
        ([1.5], "expected a list of ids"),
        ([3, 3], "every token may occur once"),
        ([104, 105], r"\[104, 105\]: the model has 104 embeddings; call"),
    ],
)
def test_tokens_that_are_none(tokens: Any, problem: str) -> None:
    with pytest.raises(ValueError, match=f"^token_rows .*{problem}"):
        wrapped(resized(1), token_rows=tokens)


def test_a_file_that_lacks_rows(tmp_path: Path) -> None:
    wrapped(resized(1)).save_pretrained(tmp_path)
    content = description(tmp_path) | {"token_rows": ADDED}
    (tmp_path / "reft_config.json").write_text(json.dumps(content), encoding="utf-8")
    with pytest.raises(ValueError, match=r"token_rows.input is not in it, expected \(3, 32\)"):
        rn.ReftModel.from_pretrained(resized(1), tmp_path)


def test_an_adapter_that_is_refused_leaves_the_base_as_it_was(tmp_path: Path) -> None:
    wrapped(resized(1), token_rows=ADDED).save_pretrained(tmp_path)
    content = description(tmp_path)
    content["representations"][0]["low_rank_dimension"] += 1
    (tmp_path / "reft_config.json").write_text(json.dumps(content), encoding="utf-8")
    base = tiny_model()
    embeddings = base.get_input_embeddings().weight.clone()
    with pytest.raises(ValueError, match="has shape"):
        rn.ReftModel.from_pretrained(base, tmp_path)
    assert torch.equal(base.get_input_embeddings().weight, embeddings)
    assert base.config.vocab_size == SIZE


def test_rows_that_are_not_finite_are_refused(tmp_path: Path) -> None:
    model = wrapped(resized(1), token_rows=ADDED)
    with torch.no_grad():
        model.model.get_input_embeddings().weight[ADDED[1], 3] = torch.nan
    with pytest.warns(UserWarning, match=r"not finite.*token_rows\.input"):
        model.save_pretrained(tmp_path)
    base = tiny_model()
    with pytest.raises(ValueError, match=r"token_rows\.input holds numbers that are not finite"):
        rn.ReftModel.from_pretrained(base, tmp_path)
    assert len(base.get_input_embeddings().weight) == SIZE
    rn.ReftModel.from_pretrained(resized(1), tmp_path, allow_nan=True)
    with pytest.raises(ValueError, match="which the base has not"):
        rn.get_reft_model(resized(1)).load_adapter(tmp_path, "spoilt")
