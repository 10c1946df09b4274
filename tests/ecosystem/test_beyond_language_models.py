"""Beyond causal language models: classifiers, taggers, masked models, images and sounds."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from transformers import (
    AutoModelForAudioClassification,
    AutoModelForCausalLM,
    AutoModelForImageClassification,
    AutoModelForMaskedLM,
    AutoModelForQuestionAnswering,
    AutoModelForSequenceClassification,
    AutoModelForTokenClassification,
    Trainer,
    TrainingArguments,
)

import reftnoise as rn
from reftnoise.engine.base.sites import find_layers
from support.models.tiny_models import LAYERS, Example, examples_of, new_model, padded
from support.tolerance import assert_close

READ_LAST = ["llama", "gpt2"]  # the others read their first column, which may be padding
CLASSIFIERS = ["bert", "roberta", "deberta-v2", "distilbert", *READ_LAST]


def wrapped(
    base: Any, positions: Any = "f2", modules_to_save: list[str] | None = None, **entry: Any
) -> rn.ReftModel:
    torch.manual_seed(1)
    units = LAYERS | {"positions": positions} | entry
    return rn.get_reft_model(base, rn.ReftConfig(units, modules_to_save=modules_to_save))


def classifier(architecture: str = "bert", **changes: Any) -> Any:
    return new_model(AutoModelForSequenceClassification, architecture, **changes)


def batch(side: str = "right") -> Example:
    """Three rows of 9, 3 and 6 tokens, with a class each."""
    return padded(examples_of("bert"), side)


def trained(model: rn.ReftModel) -> set[str]:
    """The modules of the base that have parameters to train."""
    names = [name for name, p in model.model.named_parameters() if p.requires_grad]
    return {name.rpartition(".")[0] for name in names}


# -- what is trained beside the units --------------------------------------------------------------


@pytest.mark.parametrize(
    ("auto", "architecture", "head"),
    [
        (AutoModelForSequenceClassification, "bert", {"classifier"}),
        (
            AutoModelForSequenceClassification,
            "roberta",
            {"classifier.dense", "classifier.out_proj"},
        ),
        (AutoModelForSequenceClassification, "llama", {"score"}),
        (AutoModelForSequenceClassification, "gpt2", {"score"}),
        (AutoModelForTokenClassification, "bert", {"classifier"}),
        (AutoModelForImageClassification, "vit", {"classifier"}),
        (AutoModelForAudioClassification, "wav2vec2", {"projector", "classifier"}),
        (AutoModelForMaskedLM, "bert", set()),
        (AutoModelForCausalLM, "llama", set()),
    ],
)
def test_a_head_is_trained_and_a_language_models_is_not(
    auto: Any, architecture: str, head: set[str]
) -> None:
    base = new_model(auto, architecture)
    assert trained(wrapped(base)) == head
    assert trained(wrapped(base, modules_to_save=[])) == set()


def test_names_choose_what_is_trained() -> None:
    names = ["pooler", "encoder.layer.1.output.dense"]
    model = wrapped(classifier(), modules_to_save=names)
    assert trained(model) == {"bert.pooler.dense", "bert.encoder.layer.1.output.dense"}
    message = "modules_to_save 'clasifier': the model has no such module; did you mean 'classifier'"
    with pytest.raises(ValueError, match=rf"^{message}\? its named_modules"):
        wrapped(classifier(), modules_to_save=["clasifier"])


@pytest.mark.parametrize("names", [None, [], ["pooler", "classifier"]])
def test_what_is_trained_is_saved_and_loaded(tmp_path: Path, names: list[str] | None) -> None:
    model, inputs = wrapped(classifier(), modules_to_save=names).train(), batch()
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=0.05)
    for _ in range(3):
        optimizer.zero_grad()
        model(**inputs).loss.backward()
        optimizer.step()
    model.save_pretrained(tmp_path)
    base = classifier()
    changed = trained(model)
    with torch.no_grad():  # another head than the one that was trained
        for name in changed:
            base.get_submodule(name).weight.zero_()
    loaded = rn.ReftModel.from_pretrained(base, tmp_path)
    assert torch.equal(loaded(**inputs).logits, model.eval()(**inputs).logits)
    assert trained(loaded) == changed


# -- positions -------------------------------------------------------------------------------------


def edited_columns(model: rn.ReftModel, layer: nn.Module, inputs: Example) -> list[list[int]]:
    """Each row's columns whose hidden states the units change at the output of a layer.

    They are also compared with the unit's own formula.
    """
    seen: list[Tensor] = []

    def note(_: nn.Module, __: Any, output: Any) -> None:
        seen.append(output[0] if isinstance(output, tuple) else output)

    handle = layer.register_forward_hook(note)
    with torch.no_grad():
        for one in (model.model, model):
            one(**inputs)
    handle.remove()
    plain, edited = seen
    (unit,) = model.interventions.values()
    changed = (edited != plain).any(-1)
    assert_close(edited[changed], unit(plain)[changed])
    return [row.nonzero().flatten().tolist() for row in changed]


@pytest.mark.parametrize("side", ["left", "right"])
@pytest.mark.parametrize(
    ("positions", "expected"),
    [
        ("f1", [[0], [0], [0]]),
        ("f3", [[0, 1, 2], [0, 1, 2], [0, 1, 2]]),
        ("l1", [[8], [2], [5]]),
        ("f1+l2", [[0, 7, 8], [0, 1, 2], [0, 4, 5]]),
        ("all", [list(range(9)), [0, 1, 2], list(range(6))]),
    ],
)
def test_positions_of_an_encoder(side: str, positions: str, expected: list[list[int]]) -> None:
    base, inputs = classifier(), batch(side)
    model = wrapped(base, positions, layer=0)
    starts = inputs["attention_mask"].argmax(1).tolist()
    columns = [[start + n for n in row] for start, row in zip(starts, expected, strict=True)]
    assert edited_columns(model, base.bert.encoder.layer[0], inputs) == columns


def test_positions_of_an_image_are_its_patches_after_the_class_token() -> None:
    base = new_model(AutoModelForImageClassification, "vit")
    inputs = padded(examples_of("vit"))
    for positions, columns in {"f1": [0], "l1": [4], "f2+l1": [0, 1, 4]}.items():
        model = wrapped(base, positions, layer=0)
        assert edited_columns(model, find_layers(base)[0], inputs) == [columns] * 3


def test_positions_of_a_sound_end_where_its_padding_begins() -> None:
    base = new_model(AutoModelForAudioClassification, "wav2vec2")
    inputs = padded(examples_of("wav2vec2"))
    model = wrapped(base, "f1+l1", layer=0)
    lengths = base._get_feat_extract_output_lengths(inputs["attention_mask"].sum(1)).tolist()
    assert len(set(lengths)) == 3
    layer = base.wav2vec2.encoder.layers[0]
    assert edited_columns(model, layer, inputs) == [[0, length - 1] for length in lengths]


@pytest.mark.parametrize(
    ("architecture", "side"),
    [(name, "right") for name in CLASSIFIERS] + [(name, "left") for name in READ_LAST],
)
@torch.no_grad()
def test_a_padded_batch_of_a_classifier_equals_its_rows(architecture: str, side: str) -> None:
    model = wrapped(classifier(architecture), "f2+l2")
    rows = examples_of("bert")
    found = model(**padded(rows, side)).logits
    expected = torch.cat([model(**row).logits for row in rows])
    assert_close(found, expected)
    with model.disabled():
        assert not torch.allclose(model(**padded(rows, side)).logits, expected, atol=1e-3)


# -- labels that are no completion -----------------------------------------------------------------


@pytest.mark.parametrize("auto", [AutoModelForTokenClassification, AutoModelForMaskedLM])
def test_the_prompt_is_the_whole_input_although_labels_are_per_token(
    auto: Any, tmp_path: Path
) -> None:
    model, inputs = wrapped(new_model(auto, "bert"), "l1"), batch()
    labels = torch.full_like(inputs["input_ids"], -100)
    labels[:, 1] = 1
    with torch.no_grad():
        whole = model(**inputs | {"labels": None}).logits
        assert torch.equal(model(**inputs | {"labels": labels}).logits, whole)
        short = model(**inputs | {"labels": labels}, prompt_lengths=torch.tensor([1, 1, 1]))
    assert not torch.allclose(short.logits, whole, atol=1e-3)
    expected = nn.functional.cross_entropy(whole.flatten(0, 1), labels.flatten())
    args = TrainingArguments(output_dir=str(tmp_path), report_to="none", use_cpu=True)
    trainer = rn.ReftTrainer(model, args)
    loss = trainer.compute_loss(model, inputs | {"labels": labels})
    assert_close(loss, expected)


# -- trainers --------------------------------------------------------------------------------------


def dataset(count: int = 32) -> list[dict[str, Tensor]]:
    """Is the first of eight tokens an even number?"""
    torch.manual_seed(4)
    ids = torch.randint(3, 101, (count, 8))
    rows = zip(ids, ids[:, 0] % 2, strict=True)
    return [{"input_ids": row, "labels": label} for row, label in rows]


def accuracy(prediction: Any) -> dict[str, float]:
    return {"accuracy": float(np.mean(prediction.predictions.argmax(1) == prediction.label_ids))}


@pytest.mark.parametrize("trainer_class", [Trainer, rn.ReftTrainerForSequenceClassification])
def test_a_classifier_trains_with_metrics(trainer_class: Any, tmp_path: Path) -> None:
    rows = dataset()
    model = wrapped(classifier(), "f1", intervention="loreft", low_rank_dimension=4)
    args = TrainingArguments(
        output_dir=str(tmp_path),
        num_train_epochs=4,
        per_device_train_batch_size=8,
        learning_rate=2e-2,
        eval_strategy="epoch",
        save_strategy="epoch",
        load_best_model_at_end=True,
        metric_for_best_model="accuracy",
        report_to="none",
        use_cpu=True,
        disable_tqdm=True,
    )
    trainer = trainer_class(
        model, args, train_dataset=rows, eval_dataset=rows, compute_metrics=accuracy
    )
    trainer.train()
    history = [e["eval_accuracy"] for e in trainer.state.log_history if "eval_accuracy" in e]
    assert max(history) > 0.7
    ids = torch.stack([row["input_ids"] for row in rows])
    with torch.no_grad():
        chosen = model.eval()(input_ids=ids).logits.argmax(1)
    right = (chosen == torch.stack([row["labels"] for row in rows])).float().mean()
    assert float(right) == pytest.approx(max(history))


@pytest.mark.parametrize("trainer_class", [Trainer, rn.ReftTrainer])
def test_a_base_gets_the_columns_that_it_reads(trainer_class: Any, tmp_path: Path) -> None:
    is_ours = trainer_class is rn.ReftTrainer
    seen: list[set[str]] = []
    args = TrainingArguments(
        output_dir=str(tmp_path),
        max_steps=1,
        save_strategy="no",
        report_to="none",
        use_cpu=True,
        remove_unused_columns=is_ours,
    )
    cases = [
        (classifier(), examples_of("bert")[0] | {"token_type_ids": torch.ones(1, 9).long()}),
        (classifier("distilbert"), examples_of("distilbert")[0]),
        (new_model(AutoModelForImageClassification, "vit"), examples_of("vit")[0]),
        (new_model(AutoModelForAudioClassification, "wav2vec2"), examples_of("wav2vec2")[0]),
    ]
    for base, inputs in cases:
        base.register_forward_pre_hook(
            lambda _, __, kwargs: seen.append({n for n, v in kwargs.items() if v is not None}),
            with_kwargs=True,
        )
        row = {name: value[0] for name, value in inputs.items()}
        if is_ours:
            row["source"] = torch.tensor(0)
        trainer_class(wrapped(base, "f1"), args, train_dataset=[row]).train()
        assert set(inputs) <= seen[-1]
        assert "source" not in seen[-1]


def test_answers_in_a_text_are_labels(tmp_path: Path) -> None:
    base = new_model(AutoModelForQuestionAnswering, "bert")
    rows = [
        {"input_ids": row["input_ids"], "start_positions": n % 3, "end_positions": n % 3 + 1}
        for n, row in enumerate(dataset(6))
    ]
    args = TrainingArguments(output_dir=str(tmp_path), report_to="none", use_cpu=True)
    model = wrapped(base, "f1")
    found = rn.ReftTrainer(model, args).predict(rows)
    assert [part.tolist() for part in found.label_ids] == [[0, 1, 2] * 2, [1, 2, 3] * 2]
    ids = torch.stack([row["input_ids"] for row in rows])
    starts, ends = (torch.tensor(part) for part in found.label_ids)
    with torch.no_grad():
        loss = model(input_ids=ids, start_positions=starts, end_positions=ends).loss
    assert found.metrics["test_loss"] == pytest.approx(float(loss))
