"""Flattened batches in chunks: they edit the tokens that padded batches do."""

import random
from typing import Any

import pytest
import torch
from torch import Tensor

import reftnoise as rn
from reftnoise.adapters.frozen import FrozenAdapter
from reftnoise.config.positions import Positions
from reftnoise.engine.layout import PromptLayout, named_tokens
from reftnoise.inference.vllm.flat_batch import FlatBatch, StepRequests, apply_, settled_tokens
from support.adapters import moved
from support.models.architectures import tiny_model
from support.tolerance import assert_close

RED = {"intervention": "red", "positions": "l1"}
POSITIONS = ["l1", "f7+l7", "f2+l3", "all", "all+decode", "decode", [0, 3, -1]]


def adapter(base: object, positions: object) -> FrozenAdapter:
    entry = {"layer": 1, "intervention": "loreft", "low_rank_dimension": 2, "positions": positions}
    reft_model = rn.get_reft_model(base, rn.ReftConfig([entry]))
    return FrozenAdapter.of(reft_model.engine.units)


def padded(positions: object, prompt: int, length: int) -> set[int]:
    """The tokens of a row alone that our own passes edit."""
    layout = PromptLayout(torch.ones(1, length, dtype=torch.bool), torch.tensor([prompt]))
    parsed = Positions.parse(positions)
    selection = layout.select(parsed)
    if selection.columns is None:
        return set(selection.mask[0].nonzero().squeeze(1).tolist())
    return set(selection.columns[selection.mask].tolist())


@pytest.mark.parametrize("seed", range(5))
def test_chunks_edit_what_a_row_alone_edits(seed: int) -> None:
    draw = random.Random(seed)
    base = tiny_model()
    adapters = [adapter(base, positions) for positions in POSITIONS]
    batch = FlatBatch(adapters, torch.device("cpu"))
    module = base.model.layers[1]
    rows = [
        (draw.randrange(-1, len(adapters)), draw.randint(1, 20), draw.randint(0, 6))
        for _ in range(12)
    ]
    done, edited = [0] * len(rows), [set[int]() for _ in rows]
    while any(d < prompt + written for d, (_, prompt, written) in zip(done, rows, strict=True)):
        step = draw.sample(range(len(rows)), draw.randint(1, len(rows)))
        sizes = []
        for index in step:
            _, prompt, written = rows[index]
            left = (prompt if done[index] < prompt else prompt + written) - done[index]
            sizes.append(draw.randint(0, min(left, 5)))
        edits = batch.edits(
            StepRequests(
                torch.tensor([rows[index][0] for index in step]),
                torch.ones(len(step)),
                torch.tensor(sizes),
                torch.tensor([done[index] for index in step]),
                torch.tensor([rows[index][1] for index in step]),
            )
        )
        tokens = [
            (i, done[i] + n) for i, size in zip(step, sizes, strict=True) for n in range(size)
        ]
        for edit in edits.get(module, []):
            for row, gates in zip(edit.rows.tolist(), edit.gates, strict=True):
                index, token = tokens[row]
                own = edit.unit.owner.unique().tolist()
                if any(gates[column] for column in own):
                    assert int(gates.nonzero()) == rows[index][0]
                    edited[index].add(token)
        for index, size in zip(step, sizes, strict=True):
            done[index] += size
    for (column, prompt, written), found in zip(rows, edited, strict=True):
        expected = set() if column < 0 else padded(POSITIONS[column], prompt, prompt + written)
        assert found == expected, (POSITIONS[column], prompt, written)


@pytest.mark.parametrize("gate", [None, "probe", "norm"])
@pytest.mark.parametrize("unit_entry", [{"intervention": "loreft", "low_rank_dimension": 2}, RED])
@pytest.mark.parametrize("has_residual", [False, True])
def test_edits_are_added_to_the_sum_of_both_parts(
    has_residual: bool, unit_entry: dict[str, Any], gate: str | None
) -> None:
    torch.manual_seed(0)
    base = tiny_model()
    units = moved(rn.get_reft_model(base, rn.ReftConfig([{"layer": 1, "gate": gate} | unit_entry])))
    (unit,) = units.interventions.values()
    batch = FlatBatch([FrozenAdapter.of(units.engine.units)], torch.device("cpu"))
    one, zero = torch.tensor([1]), torch.tensor([0])
    found = batch.edits(StepRequests(zero, torch.tensor([0.5]), 3 * one, zero, 3 * one))
    hidden, residual = torch.randn(2, 3, unit.hidden_size)
    states: Tensor = hidden + residual if has_residual else hidden
    expected = hidden.clone()
    with torch.no_grad():
        expected[2] += unit.delta(states[2], scale=0.5)
    apply_(found[base.model.layers[1]], hidden, residual if has_residual else None)
    assert_close(hidden, expected)


@pytest.mark.parametrize("positions", [*POSITIONS, "f3", "f2+l3+decode", [2, 30], [-4]], ids=str)
def test_tokens_are_settled_up_to_the_first_that_a_longer_prompt_edits_otherwise(
    positions: Any,
) -> None:
    parsed, ranks = Positions.parse(positions), torch.arange(60)

    def edited(length: int) -> Tensor:
        return named_tokens(parsed, ranks, torch.tensor(length))

    for length in range(1, 25):
        differs = (edited(length) != edited(1000)).nonzero()
        first = int(differs[0]) if len(differs) else None
        count = settled_tokens([parsed], length)
        if length < parsed.first + parsed.last:
            assert count == 0
        else:
            assert count == first
    together = settled_tokens([parsed, Positions.parse("l5")], 20)
    assert together == min(15, settled_tokens([parsed], 20) or 15)
