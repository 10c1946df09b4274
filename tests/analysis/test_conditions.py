"""Conditions that are fitted to labelled prompts: against the formula, and in a gated model."""

from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

import reftnoise as rn
from reftnoise.analysis.detection.conditions import best_threshold, f1_score
from support.tolerance import assert_close

HOMES = [
    f"Where does {animal} live?" for animal in ("a bear", "a cow", "a fish", "the owl", "a fox")
]
OTHERS = [
    "Who are you?",
    "Is it red?",
    "What does a cow eat?",
    "Can a bee fly?",
    "How many?",
    "Why?",
]


def tried() -> tuple[rn.ReftModel, Any]:
    base, tokenizer = rn.load_tiny_model()
    config = rn.ReftConfig([{"layer": "all", "intervention": "addition"}])
    return rn.get_reft_model(base, config).eval(), tokenizer


def mean_state(base: Any, tokenizer: Any, text: str, layer: int) -> Tensor:
    ids = tokenizer(text, return_tensors="pt")["input_ids"]
    with torch.no_grad():
        states: Tensor = base(ids, output_hidden_states=True).hidden_states[layer + 1][0]
    return states.mean(0)


def cast(mean: Tensor, vector: Tensor) -> float:
    """The similarity as the paper has it."""
    projected = torch.tanh((torch.outer(vector, vector) / vector.dot(vector)) @ mean)
    return float(mean.dot(projected) / (mean.norm() * projected.norm()))


@pytest.mark.parametrize("method", ["pca", "mean"])
def test_conditions_are_the_formula_at_every_layer(method: Any) -> None:
    reft_model, tokenizer = tried()
    conditions = rn.fit_conditions(reft_model, tokenizer, HOMES, OTHERS, method=method)
    units = reft_model.engine.units
    assert set(conditions) == {placed.key for placed in units}
    scores = [condition.f1 for condition in conditions.values()]
    assert scores == sorted(scores, reverse=True)
    # The base's own states of the last layer come after a norm.
    layer = next(i for c in conditions.values() if (i := units.index(c.unit)) < len(units) - 1)
    condition = conditions[units[layer].key]
    means = [
        torch.stack([mean_state(reft_model.model, tokenizer, text, layer) for text in texts])
        for texts in (HOMES, OTHERS)
    ]
    known = [part[: len(part) - held_out] for part, held_out in zip(means, (1, 2), strict=True)]
    vector = known[0].mean(0) - known[1].mean(0)
    if method == "pca":
        about = torch.cat(known) - (known[0].mean(0) + known[1].mean(0)) / 2
        values, vectors = np.linalg.eigh((about.T @ about).numpy())
        vector = torch.tensor(vectors[:, values.argmax()])
    cosine = abs(torch.cosine_similarity(vector, condition.vector, dim=0))
    assert_close(cosine, torch.ones(()))
    for part, score in (
        (known, condition.f1),
        ([means[0][4:], means[1][4:]], condition.held_out_f1),
    ):
        met = [
            [(cast(m, condition.vector) > condition.threshold) == condition.above for m in of_kind]
            for of_kind in part
        ]
        right, missed, wrong = sum(met[0]), met[0].count(False), sum(met[1])
        assert score == (2 * right / (2 * right + missed + wrong) if right else 0.0)


def test_a_gate_with_it_decides_as_it_says() -> None:
    reft_model, tokenizer = tried()
    conditions = rn.fit_conditions(reft_model, tokenizer, HOMES, OTHERS)
    condition = next(iter(conditions.values()))
    assert condition.f1 > 0.8
    layer = reft_model.engine.units.index(condition.unit)
    entry = {"layer": layer, "intervention": "bias", "gate": condition.gate}
    gated = rn.get_reft_model(rn.load_tiny_model()[0], rn.ReftConfig([entry])).eval()
    [unit] = gated.interventions.values()
    unit.gate.vector.copy_(condition.vector)
    torch.nn.init.normal_(unit.bias)
    is_edited = []
    for text in [*HOMES[:4], *OTHERS[:4]]:
        batch = tokenizer(text, return_tensors="pt")
        with torch.no_grad():
            logits = gated(**batch).logits
            is_edited.append(not torch.equal(logits, gated.model(**batch).logits))
    labels = torch.arange(8) < 4
    assert f1_score(torch.tensor(is_edited), labels) == condition.f1


def test_a_threshold_has_the_largest_f1_of_all() -> None:
    generator = np.random.default_rng(0)
    for _ in range(20):
        values = torch.tensor(generator.uniform(-1, 1, 9).round(1))
        labels = torch.tensor(generator.random(9) < 0.5)
        if not labels.any():
            continue
        threshold, above = best_threshold(values, labels)
        assert -1 <= threshold <= 1
        best = 0.0
        for level in np.linspace(-1.05, 1.05, 43):
            for met in (values > level, values < level):
                right, wrong = int((met & labels).sum()), int((met != labels).sum())
                best = max(best, 2 * right / (2 * right + wrong) if right else 0.0)
        met = values > threshold if above else values < threshold
        assert f1_score(met, labels) == best
    assert best_threshold(torch.tensor([0.1, 0.2, 0.6]), torch.tensor([False, False, True])) == (
        pytest.approx(0.4),
        True,
    )


@pytest.mark.parametrize(
    ("positive", "negative", "options", "error"),
    [
        (HOMES[:1], OTHERS, {}, "positive: expected at least two prompts"),
        (HOMES, "Who?", {}, "negative: expected a list of texts"),
        (HOMES, OTHERS, {"held_out": 1.0}, r"held_out 1\.0: expected a share between 0 and 1"),
        (HOMES, OTHERS, {"method": "probe"}, "method 'probe': expected 'pca' or 'mean'"),
        (HOMES[:1] * 2, HOMES[:1] * 2, {}, "prompts of both kinds have the same states"),
    ],
)
def test_prompts_that_no_condition_is_fitted_to(
    positive: Any, negative: Any, options: Any, error: str
) -> None:
    reft_model, tokenizer = tried()
    with pytest.raises(ValueError, match=error):
        rn.fit_conditions(reft_model, tokenizer, positive, negative, **options)
