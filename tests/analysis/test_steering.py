"""Steering vectors against transformers' own hidden states and numpy's algebra."""

import shutil
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch

import reftnoise as rn
from reftnoise.analysis.steering.directions import steering_vector
from reftnoise.analysis.steering.pairs import differing
from support.tolerance import assert_close

POSITIVE = ["I love this", "What a good and happy day it was", "Yes please"]
NEGATIVE = ["I hate this", "What a bad day", "No"]
LAST = slice(-1, None)


def wrapped(**entry: Any) -> tuple[rn.ReftModel, Any]:
    base, tokenizer = rn.load_tiny_model()
    entries = [{"layer": 1, "intervention": "addition"} | entry]
    return rn.get_reft_model(base, rn.ReftConfig(entries)), tokenizer


def differences(tokenizer: Any, layer: int, tokens: slice = LAST) -> np.ndarray:
    base, _ = rn.load_tiny_model()
    rows = []
    for prompts in (POSITIVE, NEGATIVE):
        states = []
        for prompt in prompts:
            ids = torch.tensor([tokenizer(prompt)["input_ids"]])
            with torch.no_grad():
                outputs = base(input_ids=ids, output_hidden_states=True)
            states.append(outputs.hidden_states[layer + 1][0, tokens].mean(0).numpy())
        rows.append(np.stack(states))
    return np.asarray(rows[0] - rows[1], dtype=np.float64)


@pytest.mark.parametrize("batch_size", [1, 2, 16])
def test_the_mean_of_differences(batch_size: int) -> None:
    reft_model, tokenizer = wrapped()
    rn.fit_steering_vectors(reft_model, tokenizer, POSITIVE, NEGATIVE, batch_size=batch_size)
    (unit,) = reft_model.interventions.values()
    assert_close(unit.vector, torch.tensor(differences(tokenizer, 1).mean(0)).float())


@pytest.mark.parametrize(
    ("positions", "tokens"), [("all", slice(None)), ("f1", slice(1)), ([-1], LAST)]
)
def test_states_are_averaged_over_positions(positions: Any, tokens: slice) -> None:
    reft_model, tokenizer = wrapped()
    rn.fit_steering_vectors(reft_model, tokenizer, POSITIVE, NEGATIVE, positions=positions)
    (unit,) = reft_model.interventions.values()
    assert_close(unit.vector, torch.tensor(differences(tokenizer, 1, tokens).mean(0)).float())


def test_ablation_removes_the_fitted_direction() -> None:
    base, tokenizer = rn.load_tiny_model()
    reft_model = rn.get_reft_model(base, rn.ReftConfig({"intervention": "ablate"}))
    rn.fit_steering_vectors(reft_model, tokenizer, POSITIVE, NEGATIVE)
    assert len(reft_model.interventions) == base.config.num_hidden_layers
    inputs = tokenizer(POSITIVE[1], return_tensors="pt")
    with torch.no_grad():
        states = reft_model.eval()(**inputs, output_hidden_states=True).hidden_states[1:-1]
    for layer, hidden in enumerate(states):  # the last one has gone through the final norm
        unit = reft_model.interventions[f"layer_{layer}_comp_block_output_unit_pos_nunit_1#0"]
        direction = torch.tensor(differences(tokenizer, layer).mean(0)).float()
        direction /= direction.norm()
        assert (hidden @ direction).abs().max() <= 1e-5 * hidden.norm(dim=-1).max()
        torch.testing.assert_close(unit.vector / unit.vector.norm(), direction)


def test_the_first_principal_component() -> None:
    reft_model, tokenizer = wrapped()
    rn.fit_steering_vectors(reft_model, tokenizer, POSITIVE, NEGATIVE, method="pca")
    (unit,) = reft_model.interventions.values()
    rows = differences(tokenizer, 1)
    _, vectors = np.linalg.eigh(rows.T @ rows)
    expected = vectors[:, -1] * (vectors[:, -1] @ rows.mean(0))
    np.testing.assert_allclose(unit.vector, expected, atol=1e-4)


@pytest.mark.parametrize("scale", [1.0, 1000.0])
def test_the_direction_of_a_probe_is_that_of_logistic_regression(scale: float) -> None:
    """Against Newton's method; the direction does not depend on the unit of the states."""
    generator = np.random.default_rng(0)
    shift = generator.normal(size=6)
    positive, negative = generator.normal(size=(2, 20, 6)) + np.array([[shift], [-shift]])
    states = np.concatenate([positive, negative])
    inputs = states - states.mean(0)
    inputs = np.column_stack([inputs / np.sqrt((inputs**2).mean()), np.ones(40)])
    labels = np.repeat([1.0, 0.0], 20)
    penalty, weights = np.diag([1.0] * 6 + [0.0]), np.zeros(7)
    for _ in range(50):
        chances = 1 / (1 + np.exp(-inputs @ weights))
        gradient = inputs.T @ (chances - labels) + penalty @ weights
        hessian = (inputs.T * (chances * (1 - chances))) @ inputs + penalty
        weights -= np.linalg.solve(hessian, gradient)
    direction = weights[:-1] / np.linalg.norm(weights[:-1])
    expected = (positive - negative).mean(0) @ direction * direction
    halves = torch.from_numpy(scale * positive), torch.from_numpy(scale * negative)
    np.testing.assert_allclose(steering_vector("probe", *halves) / scale, expected, atol=1e-6)


@pytest.mark.parametrize("method", ["mean", "pca", "probe"])
def test_the_size_of_a_vector_is_told_next_to_that_of_the_states(method: Any) -> None:
    reft_model, tokenizer = wrapped()
    ratios = rn.fit_steering_vectors(reft_model, tokenizer, POSITIVE, NEGATIVE, method=method)
    base, _ = rn.load_tiny_model()
    norms = []
    for prompt in POSITIVE + NEGATIVE:
        ids = torch.tensor([tokenizer(prompt)["input_ids"]])
        with torch.no_grad():
            states = base(input_ids=ids, output_hidden_states=True).hidden_states[2]
        norms.append(float(states[0, -1].norm()))
    (unit,) = reft_model.interventions.values()
    expected = float(unit.vector.norm()) / np.mean(norms)
    assert ratios == {unit_key(reft_model): pytest.approx(expected, rel=1e-5)}


def unit_key(reft_model: rn.ReftModel) -> str:
    (key,) = reft_model.interventions
    return key


def test_states_are_read_where_the_halves_of_a_pair_differ() -> None:
    """Tokens after the common beginning and before the common end, averaged."""
    reft_model, tokenizer = wrapped()
    positive, negative = ["I love the big cat very much."], ["I hate a dog very much."]
    rn.fit_steering_vectors(reft_model, tokenizer, positive, negative, positions="differing")
    base, _ = rn.load_tiny_model()
    rows = [tokenizer(text)["input_ids"] for text in positive + negative]
    start = next(i for i in range(9) if rows[0][i] != rows[1][i])
    end = next(i for i in range(1, 9) if rows[0][-i] != rows[1][-i])
    means = []
    for row in rows:
        with torch.no_grad():
            outputs = base(input_ids=torch.tensor([row]), output_hidden_states=True)
        means.append(outputs.hidden_states[2][0, start : len(row) - end + 1].mean(0))
    (unit,) = reft_model.interventions.values()
    np.testing.assert_allclose(unit.vector, means[0] - means[1], rtol=1e-5, atol=1e-4)


def test_a_conversation_is_read_to_the_end_of_its_answer() -> None:
    reft_model, tokenizer = wrapped()

    def conversation(answer: str) -> list[dict[str, str]]:
        question = {"role": "user", "content": "Can a bee fly?"}
        return [question, {"role": "assistant", "content": answer}]

    halves = [conversation("Yes")], [conversation("No")]
    rn.fit_steering_vectors(reft_model, tokenizer, *halves, positions="differing")
    base, _ = rn.load_tiny_model()
    ids = [
        tokenizer.apply_chat_template(half, return_tensors="pt", return_dict=True)["input_ids"]
        for (half,) in halves
    ]
    (column,) = (ids[0] != ids[1])[0].nonzero()[0].tolist()
    with torch.no_grad():
        states = [base(row, output_hidden_states=True).hidden_states[2][0, column] for row in ids]
    (unit,) = reft_model.interventions.values()
    np.testing.assert_allclose(unit.vector, states[0] - states[1], rtol=1e-5, atol=1e-4)


@pytest.mark.parametrize(
    ("first", "second", "expected"),
    [
        ("abcd", "axyd", (range(1, 3), range(1, 3))),
        ("ab", "xb", (range(1), range(1))),
        ("aab", "ab", (range(1, 3), range(1, 2))),
        ("axb", "ayyyb", (range(1, 2), range(1, 4))),
        ("ab", "ac", (range(1, 2), range(1, 2))),
    ],
)
def test_the_differing_part_of_two_sequences(first: str, second: str, expected: Any) -> None:
    assert differing([*map(ord, first)], [*map(ord, second)]) == expected


@pytest.mark.parametrize(("half", "reason"), [("I hate it", "equal"), ("I hate it so", "begins")])
def test_halves_without_a_differing_part_are_told(half: str, reason: str) -> None:
    reft_model, tokenizer = wrapped()
    pairs = ["I love it", half], ["I hate it", "I hate it"]
    with pytest.raises(ValueError, match=f"pair 1, .*: .*{reason}.*expected halves that differ"):
        rn.fit_steering_vectors(reft_model, tokenizer, *pairs, positions="differing")


@pytest.mark.parametrize("way", ["save_pretrained", "push_to_hub", "save", "without its base"])
def test_the_scale_of_a_steering_vector_is_saved_in_it(
    way: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    class Hub:
        """What an upload asks of huggingface_hub."""

        def __init__(self, **_: Any) -> None: ...

        def create_repo(self, name: str, **_: Any) -> Any:
            return SimpleNamespace(repo_id=name)

        def upload_folder(self, *, folder_path: str, **_: Any) -> str:
            shutil.copytree(folder_path, tmp_path, dirs_exist_ok=True)
            return "address"

    monkeypatch.setattr("reftnoise.adapters.mixin.HfApi", Hub)
    reft_model, tokenizer = wrapped()
    rn.fit_steering_vectors(reft_model, tokenizer, POSITIVE, NEGATIVE)
    reft_model.eval().scale = 2.5
    match way:
        case "save_pretrained":
            reft_model.save_pretrained(tmp_path)
        case "push_to_hub":
            reft_model.push_to_hub("me/adapter")
        case "save":
            reft_model.save(tmp_path)
        case _:
            reft_model.save(tmp_path, include_model=False)
    loaded = rn.ReftModel.from_pretrained(rn.load_tiny_model()[0], tmp_path)
    assert loaded.scale == 1.0
    ids = torch.tensor([tokenizer("The cat")["input_ids"]])
    with torch.no_grad():
        assert_close(loaded(input_ids=ids).logits, reft_model(input_ids=ids).logits)
    (own,), (saved,) = (m.interventions.values() for m in (reft_model, loaded))
    torch.testing.assert_close(saved.vector, 2.5 * own.vector, rtol=0, atol=0)


def test_a_scale_that_other_units_cannot_hold_is_said(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    other, _ = wrapped(intervention="red")
    other.eval().scale = 0.5
    other.save_pretrained(tmp_path)
    assert "scale 0.5 is not saved" in caplog.text


def test_a_vector_is_added_everywhere_saved_and_never_trained(tmp_path: Path) -> None:
    reft_model, tokenizer = wrapped(positions="all")
    rn.fit_steering_vectors(reft_model, tokenizer, POSITIVE, NEGATIVE)
    (unit,) = reft_model.interventions.values()
    base, _ = rn.load_tiny_model()
    ids = torch.tensor([tokenizer("The cat")["input_ids"]])
    base.get_decoder().layers[1].register_forward_hook(
        lambda _, __, out: (
            (out[0] + unit.vector, *out[1:]) if isinstance(out, tuple) else out + unit.vector
        )
    )
    with torch.no_grad():
        expected = base(input_ids=ids).logits
        assert_close(reft_model.eval()(input_ids=ids).logits, expected)
    reft_model.save_pretrained(tmp_path)
    loaded = rn.ReftModel.from_pretrained(rn.load_tiny_model()[0], tmp_path)
    with torch.no_grad():
        assert torch.equal(loaded(input_ids=ids).logits, reft_model(input_ids=ids).logits)
    assert not [p for p in reft_model.parameters() if p.requires_grad]


def test_mistakes_are_told() -> None:
    reft_model, tokenizer = wrapped()
    with pytest.raises(ValueError, match="3 positive and 2 negative prompts: expected pairs"):
        rn.fit_steering_vectors(reft_model, tokenizer, POSITIVE, NEGATIVE[:2])
    with pytest.raises(ValueError, match="method 'median': did you mean 'mean'"):
        rn.fit_steering_vectors(reft_model, tokenizer, POSITIVE, NEGATIVE, method="median")
    for positions in ("decode", [5]):
        with pytest.raises(ValueError, match=r"positions .*: prompt '.*' has no such token"):
            rn.fit_steering_vectors(reft_model, tokenizer, POSITIVE, NEGATIVE, positions=positions)
    other, _ = wrapped(intervention="red")
    with pytest.raises(ValueError, match="no unit whose intervention is 'addition' or"):
        rn.fit_steering_vectors(other, tokenizer, POSITIVE, NEGATIVE)
    with pytest.raises(ValueError, match="expected lists of prompts, got a single text"):
        rn.fit_steering_vectors(reft_model, tokenizer, "I love it", "I hate it")
    with pytest.raises(ValueError, match="batch_size 0: expected at least 1"):
        rn.fit_steering_vectors(reft_model, tokenizer, POSITIVE, NEGATIVE, batch_size=0)


@pytest.mark.parametrize("positions", ["decode", [20]])
def test_a_prompt_without_the_position_is_told(positions: Any) -> None:
    """Its state would count as zero."""
    reft_model, tokenizer = wrapped()
    long, short = "I love it " * 20, "I hate it"
    with pytest.raises(ValueError, match=r"positions .*: prompt 'I.*' has no such token"):
        rn.fit_steering_vectors(reft_model, tokenizer, [long], [short], positions=positions)


@pytest.mark.parametrize("method", ["mean", "pca", "probe"])
def test_states_that_are_not_finite_are_told_and_set_nothing(method: Any) -> None:
    reft_model, tokenizer = wrapped()
    with torch.no_grad():
        reft_model.model.get_input_embeddings().weight.fill_(torch.nan)
    with pytest.raises(ValueError, match="states there are not finite"):
        rn.fit_steering_vectors(reft_model, tokenizer, POSITIVE, NEGATIVE, method=method)
    assert all(value.isfinite().all() for value in reft_model.state_dict().values())
