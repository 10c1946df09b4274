"""Steering vectors against transformers' own hidden states and numpy's algebra."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

import reftnoise as rn
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
    np.testing.assert_allclose(unit.vector, differences(tokenizer, 1).mean(0), atol=1e-5)


@pytest.mark.parametrize(
    ("positions", "tokens"), [("all", slice(None)), ("f1", slice(1)), ([-1], LAST)]
)
def test_states_are_averaged_over_positions(positions: Any, tokens: slice) -> None:
    reft_model, tokenizer = wrapped()
    rn.fit_steering_vectors(reft_model, tokenizer, POSITIVE, NEGATIVE, positions=positions)
    (unit,) = reft_model.interventions.values()
    np.testing.assert_allclose(unit.vector, differences(tokenizer, 1, tokens).mean(0), atol=1e-5)


def test_the_first_principal_component() -> None:
    reft_model, tokenizer = wrapped()
    rn.fit_steering_vectors(reft_model, tokenizer, POSITIVE, NEGATIVE, method="pca")
    (unit,) = reft_model.interventions.values()
    rows = differences(tokenizer, 1)
    _, vectors = np.linalg.eigh(rows.T @ rows)
    expected = vectors[:, -1] * (vectors[:, -1] @ rows.mean(0))
    np.testing.assert_allclose(unit.vector, expected, atol=1e-4)


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
    with pytest.raises(ValueError, match="method 'median': expected 'mean' or 'pca'"):
        rn.fit_steering_vectors(reft_model, tokenizer, POSITIVE, NEGATIVE, method="median")
    for positions in ("decode", [5]):
        with pytest.raises(ValueError, match=r"positions .*: prompt '.*' has no such token"):
            rn.fit_steering_vectors(reft_model, tokenizer, POSITIVE, NEGATIVE, positions=positions)
    other, _ = wrapped(intervention="bias")
    with pytest.raises(ValueError, match="no unit whose intervention is 'addition'"):
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


@pytest.mark.parametrize("method", ["mean", "pca"])
def test_states_that_are_not_finite_are_told_and_set_nothing(method: Any) -> None:
    reft_model, tokenizer = wrapped()
    with torch.no_grad():
        reft_model.model.get_input_embeddings().weight.fill_(torch.nan)
    with pytest.raises(ValueError, match="states there are not finite"):
        rn.fit_steering_vectors(reft_model, tokenizer, POSITIVE, NEGATIVE, method=method)
    assert all(value.isfinite().all() for value in reft_model.state_dict().values())
