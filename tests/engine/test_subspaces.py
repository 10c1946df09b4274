"""Parts of a subspace, chosen per row: against the formula, and in training."""

from typing import Any

import pytest
import torch
from torch import Tensor

import reftnoise as rn
from support.adapters import moved
from support.models.architectures import tiny_model
from support.tolerance import assert_close

IDS = torch.tensor([[5, 6, 7, 8], [9, 10, 11, 12], [13, 14, 15, 16]])
ROWS = [[0, 2], None, []]


def wrapped(intervention: str, **arguments: Any) -> rn.ReftModel:
    entry = {"layer": 1, "intervention": intervention, "low_rank_dimension": 3, "positions": "all"}
    reft_model = rn.get_reft_model(tiny_model(), rn.ReftConfig([entry | arguments])).eval()
    return moved(reft_model)


def by_hand(reft_model: rn.ReftModel, rows: list[list[int]]) -> Tensor:
    """LoReFT's formula with the rows of R and W that each example has."""
    unit: Any = next(iter(reft_model.interventions.values()))
    base = tiny_model().eval()
    act = unit.act_fn or torch.nn.Identity()

    def edit(_: Any, __: Any, output: Any) -> Any:
        hidden = (output[0] if isinstance(output, tuple) else output).clone()
        with torch.no_grad():
            for row, chosen in enumerate(rows):
                basis = unit.rotate_layer()[chosen]
                source = act(unit.learned_source(hidden[row]))[:, chosen]
                hidden[row] += (source - hidden[row] @ basis.T) @ basis
        return (hidden, *output[1:]) if isinstance(output, tuple) else hidden

    base.model.layers[1].register_forward_hook(edit)
    with torch.no_grad():
        return base(input_ids=IDS).logits


@pytest.mark.parametrize("act_fn", [None, "gelu"])
def test_rows_have_the_dimensions_that_they_choose(act_fn: str | None) -> None:
    reft_model = wrapped("loreft", act_fn=act_fn)
    expected = by_hand(reft_model, [[0, 2], [0, 1, 2], []])
    padded = torch.tensor([[0, 2, -1], [0, 1, 2], [-1, -1, -1]])
    for subspaces in (ROWS, [ROWS], padded):
        with torch.no_grad():
            logits = reft_model(input_ids=IDS, subspaces=subspaces).logits
        assert_close(logits, expected)


def test_generation_has_them_too() -> None:
    reft_model = wrapped("direft")
    settings = {"max_new_tokens": 5, "do_sample": False, "pad_token_id": 0, "eos_token_id": None}
    mask = torch.ones_like(IDS)
    tokens = reft_model.generate(input_ids=IDS, attention_mask=mask, subspaces=ROWS, **settings)
    bare = tiny_model().eval().generate(input_ids=IDS, attention_mask=mask, **settings)
    whole = reft_model.generate(input_ids=IDS, attention_mask=mask, **settings)
    unit: Any = next(iter(reft_model.interventions.values()))
    with torch.no_grad():  # a dimension whose source is zero adds nothing
        unit.learned_source.weight[1] = unit.learned_source.bias[1] = 0.0
    without_second = reft_model.generate(input_ids=IDS, attention_mask=mask, **settings)
    expected = [without_second[0], whole[1], bare[2]]
    assert torch.equal(tokens, torch.stack(expected))
    assert len({tuple(run[0].tolist()) for run in (without_second, whole, bare)}) == 3
    assert not torch.equal(whole[2], bare[2])


@pytest.mark.parametrize("noise", [[], [{"component": "embeddings", "intervention": "symnoise"}]])
def test_training_moves_the_chosen_dimensions_alone(noise: list[Any]) -> None:
    entry = {"layer": 1, "intervention": "noreft", "low_rank_dimension": 3, "positions": "all"}
    noise = [one | {"alpha": 1.0} for one in noise]
    reft_model = rn.get_reft_model(tiny_model(), rn.ReftConfig([entry, *noise])).train()
    labels = IDS.clone()
    labels[:, :2] = -100
    reft_model(input_ids=IDS, labels=labels, subspaces=[[1]] * 3).loss.backward()
    unit: Any = next(iter(reft_model.interventions.values()))
    moved = unit.learned_source.weight.grad.abs().sum(1) > 0
    assert moved.tolist() == [False, True, False]


def test_a_batch_may_have_them_as_a_column() -> None:
    """In pyreft's form, as the collator makes it of rows with such a column."""
    reft_model = wrapped("loreft").eval()
    rows = torch.tensor([[0, 1], [2, -1], [-1, -1]])
    batch = {"input_ids": IDS, "subspaces": rows}
    with torch.no_grad():
        expected = reft_model(input_ids=IDS, subspaces=rows).logits
        assert torch.equal(reft_model(batch)[1].logits, expected)
    settings: Any = {"max_new_tokens": 3, "do_sample": False}
    tokens = reft_model.generate(input_ids=IDS, subspaces=rows, **settings)
    assert torch.equal(reft_model.generate(batch, **settings)[1], tokens)


@pytest.mark.parametrize(
    ("subspaces", "message"),
    [
        ([[0], [1]], "expected the dimensions of each of 3 rows"),
        ([[0], [1], [3]], "has dimensions 0 to 2"),
        ([0, 1, 2], "expected the dimensions of each of 3 rows"),
        (["ab"] * 3, "expected the dimensions of each of 3 rows"),
        (3, "expected the dimensions of each of 3 rows"),
        ([[[0]] * 3, [[0]] * 3], "or a list of such for each of 1 units"),
        ([0, 1, 2], "subspaces .* expected the dimensions of each of 3 rows"),
        (["0", "1", "2"], "expected the dimensions of each of 3 rows"),
        (2, "subspaces 2: expected the dimensions of each of 3 rows"),
    ],
)
def test_mistakes_are_told(subspaces: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        wrapped("loreft")(input_ids=IDS, subspaces=subspaces)


def test_a_bottleneck_has_no_subspace() -> None:
    with pytest.raises(ValueError, match="AdapterIntervention has no subspace"):
        wrapped("adapter")(input_ids=IDS, subspaces=ROWS)
