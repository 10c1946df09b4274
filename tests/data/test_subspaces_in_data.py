"""A column `subspaces`: tasks that are trained in dimensions of their own, from rows to answers."""

import json
from itertools import islice
from pathlib import Path
from typing import Any

import datasets
import pytest
import torch
import transformers
from torch import Tensor
from transformers import TrainingArguments

import reftnoise as rn
from reftnoise.data import token_cache
from reftnoise.data.classifiers import make_classifier_data_module
from reftnoise.data.tasks.classifier import ClassifierTask
from reftnoise.data.tasks.examples import as_examples
from reftnoise.data.tasks.registry import get_task
from reftnoise.data.tasks.text import TextTask
from support.tolerance import assert_close

QUESTIONS = ["Where does a bear live?", "What does a cow eat?", "Who are you?", "Can a bee fly?"]
A, B = [0, 1], [2, 3]
ROWS_A = [{"prompt": q, "completion": " yes, indeed", "subspaces": A} for q in QUESTIONS]
ROWS_B = [{"prompt": q[:-4], "completion": " no", "subspaces": B} for q in QUESTIONS]
MIXED = [row for pair in zip(ROWS_A, ROWS_B, strict=True) for row in pair]
UNIT = {"layer": [1, 2], "intervention": "noreft", "low_rank_dimension": 4, "positions": "l1"}


@pytest.fixture(scope="module")
def tiny() -> tuple[Any, Any]:
    return rn.load_tiny_model()


@pytest.fixture
def tokenizer(tiny: tuple[Any, Any]) -> Any:
    return tiny[1]


@pytest.fixture(autouse=True)
def _own_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", str(tmp_path / "cache"))


def wrapped(tiny: tuple[Any, Any], unit: dict[str, Any], *noise: dict[str, Any]) -> rn.ReftModel:
    torch.manual_seed(0)
    return rn.get_reft_model(tiny[0], rn.ReftConfig([unit, *noise]))


def module(tokenizer: Any, rows: Any, **options: Any) -> dict[str, Any]:
    source = datasets.Dataset.from_list(rows) if isinstance(rows, list) else rows
    return rn.make_last_position_supervised_data_module(tokenizer, None, source, **options)


def collated(tokenizer: Any, rows: list[Any]) -> dict[str, Tensor]:
    made = module(tokenizer, rows)
    batch: dict[str, Tensor] = made["data_collator"](list(made["train_dataset"]))
    return batch


def train(
    reft_model: rn.ReftModel,
    directory: Path,
    made: dict[str, Any],
    trainer: Any = rn.ReftTrainer,
    **options: Any,
) -> None:
    args = TrainingArguments(
        output_dir=str(directory),
        max_steps=6,
        per_device_train_batch_size=4,
        learning_rate=1e-2,
        save_strategy="no",
        report_to="none",
        disable_tqdm=True,
        use_cpu=True,
    )
    trainer(reft_model, args, **made, **options).train()
    reft_model.eval()


def by_dimension(reft_model: rn.ReftModel) -> dict[str, Tensor]:
    """Copies of the parameters, of which the first axis is the subspace's dimensions."""
    return {n: p.detach().clone() for n, p in reft_model.interventions.named_parameters()}


# -- training --------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("trainer", "options", "noise"),
    [
        (rn.ReftTrainer, {}, ()),
        (rn.ReftTrainer, {"prefix_cache": "memory"}, ()),
        (rn.ReftTrainer, {"split": "never"}, ({"intervention": "symnoise", "alpha": 1.0},)),
        (transformers.Trainer, {}, ()),
    ],
    ids=["split", "kept prompts", "symnoise", "transformers"],
)
def test_a_task_changes_its_own_dimensions_alone(
    tiny: tuple[Any, Any], tmp_path: Path, trainer: Any, options: Any, noise: Any
) -> None:
    reft_model = wrapped(tiny, UNIT, *noise)
    started = by_dimension(reft_model)
    train(reft_model, tmp_path / "a", module(tiny[1], ROWS_A), trainer, **options)
    between = by_dimension(reft_model)
    batch = {n: v for n, v in collated(tiny[1], MIXED).items() if n != "subspaces"}
    with torch.no_grad():
        logits = reft_model(**batch, subspaces=[A] * 8).logits
    train(reft_model, tmp_path / "b", module(tiny[1], ROWS_B), trainer, **options)
    for name, after in by_dimension(reft_model).items():
        assert torch.equal(between[name][B], started[name][B])
        assert not torch.equal(between[name][A], started[name][A])
        assert torch.equal(after[A], between[name][A])
        assert not torch.equal(after[B], between[name][B])
    with torch.no_grad():
        assert torch.equal(reft_model(**batch, subspaces=[A] * 8).logits, logits)


@pytest.mark.parametrize("intervention", ["noreft", "loreft", "direft"])
def test_gradients_of_a_mixed_batch_are_those_of_each_task_alone(
    tiny: tuple[Any, Any], intervention: str
) -> None:
    reft_model = wrapped(tiny, UNIT | {"intervention": intervention}).train()

    def gradients(rows: list[Any]) -> tuple[dict[str, Tensor], int]:
        batch = collated(tiny[1], rows)
        reft_model.zero_grad()
        reft_model(**batch).loss.backward()
        labels = int((batch["labels"] != -100).sum())
        named = reft_model.interventions.named_parameters()
        return {n: labels * p.grad for n, p in named if p.grad is not None}, labels

    mixed, of_all = gradients(MIXED)
    of_a, labels_a = gradients(ROWS_A)
    of_b, labels_b = gradients(ROWS_B)
    assert of_all == labels_a + labels_b
    for name, gradient in mixed.items():
        torch.testing.assert_close(gradient, of_a[name] + of_b[name], rtol=1e-4, atol=1e-4)
        if "rotate_layer" not in name:  # R's rows stay orthogonal to each other: they move as one
            assert not of_a[name][B].any()
            assert not of_b[name][A].any()


def test_each_task_or_both_in_generation(tiny: tuple[Any, Any], tmp_path: Path) -> None:
    model, tokenizer = tiny
    reft_model = wrapped(tiny, UNIT | {"intervention": "loreft"})
    train(reft_model, tmp_path, module(tokenizer, MIXED))
    batch = collated(tokenizer, MIXED)
    rest = {name: batch[name] for name in batch if name != "subspaces"}
    with torch.no_grad():
        own = float(reft_model(**batch).loss)
        swapped = float(reft_model(**rest, subspaces=[B, A] * 4).loss)
        assert own < min(swapped, float(model(**rest).loss))
    prompt = tokenizer(QUESTIONS[0], return_tensors="pt")
    settings = {"max_new_tokens": 6, "do_sample": False}
    four = {name: values.repeat(4, 1) for name, values in prompt.items()}
    rows = [A, B, [*A, *B], []]
    tokens = reft_model.generate(**four, subspaces=rows, **settings)
    alone = [reft_model.generate(**prompt, subspaces=[row], **settings) for row in rows[:2]]
    alone += [reft_model.generate(**prompt, **settings), model.generate(**prompt, **settings)]
    texts = tokenizer.batch_decode(tokens, skip_special_tokens=True)
    assert texts == [tokenizer.decode(one[0], skip_special_tokens=True) for one in alone]


# -- rows ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("is_kept", [False, True])
def test_tables_files_and_streams_carry_the_column(
    tokenizer: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, is_kept: bool
) -> None:
    if is_kept:
        monkeypatch.setattr(token_cache, "KEPT_BYTES", 0)
    path = tmp_path / "rows.jsonl"
    path.write_text("\n".join(map(json.dumps, MIXED)))
    other = [{**row, "dimensions": row["subspaces"], "subspaces": "not read"} for row in MIXED]
    expected = [row["subspaces"] for row in MIXED]
    stream = datasets.Dataset.from_list(MIXED).to_iterable_dataset()
    for made in (
        module(tokenizer, MIXED),
        module(tokenizer, path),
        module(tokenizer, stream),
        module(tokenizer, other, subspaces_column="dimensions"),
        module(tokenizer, ROWS_A[:1], eval_prompts=datasets.Dataset.from_list(MIXED)),
    ):
        examples = list(islice(made["eval_dataset"] or made["train_dataset"], 8))
        assert [example["subspaces"] for example in examples] == expected
    all_b = [row | {"subspaces": B} for row in MIXED]
    assert [row["subspaces"] for row in module(tokenizer, all_b)["train_dataset"]] == [B] * 8
    without = module(tokenizer, [{n: row[n] for n in ("prompt", "completion")} for row in MIXED])
    assert "subspaces" not in without["train_dataset"].column_names
    assert "subspaces" not in without["data_collator"](list(without["train_dataset"]))


def test_every_turn_has_its_conversations_dimensions(tokenizer: Any) -> None:
    turns = [("user", "Hi"), ("assistant", "Yes?"), ("user", "Who?"), ("assistant", "Me.")]
    messages = [{"role": role, "content": content} for role, content in turns]
    made = module(tokenizer, [{"messages": messages, "subspaces": [3]}])
    assert [example["subspaces"] for example in made["train_dataset"]] == [[3], [3]]


def test_the_collator_pads_dimensions(tokenizer: Any) -> None:
    rows = [ROWS_A[n] | {"subspaces": given} for n, given in enumerate([[0, 2], [], [1]])]
    assert collated(tokenizer, rows)["subspaces"].tolist() == [[0, 2], [-1, -1], [1, -1]]
    none = collated(tokenizer, [row | {"subspaces": []} for row in ROWS_A])["subspaces"]
    assert none.shape == (4, 0)
    assert none.dtype == torch.long


def test_no_dimension_is_the_base(tiny: tuple[Any, Any]) -> None:
    batch = collated(tiny[1], [row | {"subspaces": []} for row in ROWS_A])
    reft_model = wrapped(tiny, UNIT).eval()
    with torch.no_grad():
        logits = reft_model(**batch).logits
        del batch["subspaces"]
        assert_close(logits, tiny[0](**batch).logits)


# -- mistakes --------------------------------------------------------------------------------------


@pytest.mark.parametrize("given", [None, [-1], [0.5], [[0]], "[0, 1]"])
def test_what_is_no_list_of_dimensions(tokenizer: Any, given: Any) -> None:
    row = ROWS_A[1] | {"subspaces": given}
    with pytest.raises(ValueError, match=r"training example 0: subspaces .*: expected a list of"):
        module(tokenizer, [row])


def test_batches_of_rows_with_and_without(tokenizer: Any) -> None:
    [first] = module(tokenizer, ROWS_A[:1])["train_dataset"]
    made = module(tokenizer, [{n: ROWS_B[0][n] for n in ("prompt", "completion")}])
    with pytest.raises(ValueError, match="1 of 2 examples of a batch have none"):
        made["data_collator"]([first, *made["train_dataset"]])


def test_dimensions_that_units_do_not_have(tiny: tuple[Any, Any], tmp_path: Path) -> None:
    made = module(tiny[1], [row | {"subspaces": [4]} for row in ROWS_A])
    with pytest.raises(ValueError, match=r"has dimensions 0 to 3"):
        train(wrapped(tiny, UNIT), tmp_path, made)


def test_recipes_refuse_the_column(tokenizer: Any) -> None:
    rows = datasets.Dataset.from_list(MIXED)
    with pytest.raises(ValueError, match="column 'subspaces': recipes train and score all"):
        as_examples(rows, TextTask(), "plain", tokenizer)
    task = get_task({"name": "glue", "subset": "rte"})
    assert isinstance(task, ClassifierTask)
    with pytest.raises(ValueError, match="column 'subspaces': recipes train and score all"):
        make_classifier_data_module(tokenizer, task, rows, max_length=16)
