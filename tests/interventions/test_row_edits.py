"""Edits of rows, in one function: each row by the formula, and the gradient in closed form."""

from collections.abc import Sequence
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.autograd import gradcheck, gradgradcheck

from reftnoise.interventions import EditedRows, Factors, RowEdit, edit_rows
from reftnoise.interventions.row_edits import ALL_ROWS
from support.tolerance import assert_close

HIDDEN = 6
ROWS = 9


def factors(rank: int, width: int = HIDDEN, diagonals: int = 0) -> Factors:
    shapes = [(rank, width), (rank,), (rank, width), *[(diagonals, width)] * bool(diagonals)]
    down, bias, up, *diagonal = (torch.randn(s, dtype=torch.float64) for s in shapes)
    return Factors(down, bias, up, ((None, rank),), False, *diagonal)


def states(*shape: int) -> Tensor:
    return torch.randn(*(shape or (ROWS, HIDDEN)), dtype=torch.float64)


def by_row(hidden: Tensor, edits: Sequence[RowEdit], rows: EditedRows) -> Tensor:
    """The formula, a row at a time."""
    indices = range(len(hidden)) if rows.indices is None else rows.indices.tolist()
    owners = [i for i, count in enumerate(rows.counts or (len(indices),)) for _ in range(count)]
    starts = [owners.index(owner) for owner in owners]
    out = hidden.clone()
    for slot, (row, owner, start) in enumerate(zip(indices, owners, starts, strict=True)):
        if rows.skipped is not None and rows.skipped[slot]:
            continue
        (down, bias, up), gates = edits[owner].factors[:3], edits[owner].gates
        every = 0 if edits[owner].factors.diagonal is None else len(edits[owner].factors.diagonal)
        gate = torch.ones(len(up) + every).double() if gates is None else gates[slot - start]
        out[row] += up.T @ (gate[: len(up)] * (down @ hidden[row] + bias))
        if every:
            out[row] += torch.diag(gate[len(up) :] @ edits[owner].factors.diagonal) @ hidden[row]
    return out


FEW, BOTH = torch.tensor([1, 4, 8]), torch.tensor([1, 4, 8, 4, 0])
PLACES = {
    "all": ALL_ROWS,
    "all but padding": EditedRows(None, (torch.arange(ROWS) < 3)[:, None]),
    "all, with gates": ALL_ROWS,
    "few": EditedRows(FEW),
    "some skipped": EditedRows(FEW, torch.tensor([[False], [True], [False]])),
    "twice the same": EditedRows(torch.tensor([4, 4, 1])),
    "none": EditedRows(FEW[:0]),
    "two that meet": EditedRows(BOTH, None, (3, 2)),
    "two, some skipped": EditedRows(BOTH, torch.tensor([0, 1, 0, 1, 0]).bool()[:, None], (3, 2)),
}
WITH_DIAGONAL = ("all but padding", "all, with gates", "few", "some skipped", "two, some skipped")
PLACES |= {f"{name}, diagonal": PLACES[name] for name in WITH_DIAGONAL}
CASES = list(PLACES)


def case(name: str) -> tuple[list[RowEdit], EditedRows]:
    torch.manual_seed(0)
    rows, diagonals = PLACES[name], 2 * ("diagonal" in name)
    if rows.counts:
        gates = torch.rand(2, 3 + diagonals, dtype=torch.float64)
        return [RowEdit(factors(2)), RowEdit(factors(3, diagonals=diagonals), gates)], rows
    gated = torch.rand(ROWS, 2 + diagonals, dtype=torch.float64) if "gates" in name else None
    return [RowEdit(factors(2, diagonals=diagonals), gated)], rows


@pytest.mark.parametrize("name", CASES)
@pytest.mark.parametrize("grad", [True, False], ids=["closed form", "without gradients"])
def test_each_row_by_the_formula(name: str, grad: bool) -> None:
    edits, rows = case(name)
    hidden = states()
    before, expected = hidden.clone(), by_row(hidden, edits, rows)
    with torch.set_grad_enabled(grad):
        edited = edit_rows(hidden, edits, rows)
    assert_close(edited, expected)
    assert torch.equal(hidden, before)
    assert edited._base is None  # no view


@pytest.mark.parametrize("name", [name for name in CASES if not name.startswith("all")])
def test_in_place_and_the_sum_of_two_states(name: str) -> None:
    edits, rows = case(name)
    hidden, residual = states(), states()
    expected = by_row(hidden + residual, edits, rows) - residual
    edit_rows(hidden, edits, rows, states=(hidden, residual), in_place=True)
    assert_close(hidden, expected)


@pytest.mark.parametrize("rank", [1, 3, 8, 64])
@pytest.mark.parametrize("shape", [(1, 1), (2, 5), (3, 1)])
def test_any_rank_and_batch(rank: int, shape: tuple[int, int]) -> None:
    torch.manual_seed(0)
    hidden, edit = states(*shape, 70), RowEdit(factors(rank, width=70))
    expected = by_row(hidden.flatten(0, 1), [edit], ALL_ROWS)
    assert_close(edit_rows(hidden.flatten(0, 1), [edit]), expected)
    with torch.no_grad():
        assert_close(edit.of_all(hidden), expected.view(hidden.shape))


def tensors_of(edits: Sequence[RowEdit]) -> list[Tensor]:
    return [t.requires_grad_() for edit in edits for t in edit.factors.tensors]


def function_of(edits: Sequence[RowEdit], rows: EditedRows, **options: Any) -> Any:
    """`edit_rows` of hidden states and the factors' tensors."""

    def run(hidden: Tensor, *tensors: Tensor) -> Tensor:
        values = iter(tensors)
        again = [
            RowEdit(edit.factors.of(*(next(values) for _ in edit.factors.tensors)), edit.gates)
            for edit in edits
        ]
        return edit_rows(hidden, again, rows, **options)

    return run


@pytest.mark.parametrize("name", CASES)
def test_gradients_and_those_of_gradients(name: str) -> None:
    edits, rows = case(name)
    inputs = (states().requires_grad_(), *tensors_of(edits))
    run = function_of(edits, rows)
    assert gradcheck(run, inputs)
    assert gradgradcheck(run, inputs)


@pytest.mark.parametrize("name", CASES)
def test_the_closed_form_is_the_gradient_of_the_operations(name: str) -> None:
    edits, rows = case(name)
    inputs = (states().requires_grad_(), *tensors_of(edits))
    weight = states()
    gradients = [
        torch.autograd.grad(
            (function_of(edits, rows, is_transformed=way)(*inputs) * weight).sum(), inputs
        )
        for way in (False, True)
    ]
    for closed, recorded in zip(*gradients, strict=True):
        assert_close(closed, recorded)


@pytest.mark.parametrize("frozen", range(5))
def test_what_is_frozen_gets_no_gradient(frozen: int) -> None:
    edits, rows = case("few, diagonal")
    inputs = [states().requires_grad_(), *tensors_of(edits)]
    whole = torch.autograd.grad(function_of(edits, rows)(*inputs).square().sum(), inputs)
    inputs[frozen].requires_grad_(False)
    function_of(edits, rows)(*inputs).square().sum().backward()
    for tensor, expected in zip(inputs, whole, strict=True):
        if tensor.requires_grad:
            assert_close(tensor.grad, expected)
        else:
            assert tensor.grad is None


@pytest.mark.parametrize(
    "name", [name for name in CASES if name.startswith(("all but padding", "some skipped"))]
)
@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
@pytest.mark.parametrize("act", [None, "relu"])
def test_skipped_rows_reach_nothing(name: str, bad: float, act: str | None) -> None:
    edits, rows = case(name)
    tensors = tensors_of(edits)
    edits = [RowEdit(edits[0].factors._replace(acts=((act, 2),)))]
    clean, out = states(), []
    off = range(3) if rows.indices is None else [4]
    for spoiled in (False, True):
        hidden = clean.clone()
        if spoiled:
            hidden[off] = bad
        hidden.requires_grad_()
        edited = edit_rows(hidden, edits, rows)
        on = torch.ones(ROWS, dtype=torch.bool).index_fill(0, torch.tensor(off), False)
        assert torch.equal(edited[~on], hidden[~on]) or edited[~on].isnan().all()
        gradient = torch.where(on[:, None], edited.detach(), bad if spoiled else 0.0)
        gradients = torch.autograd.grad(edited, tensors, gradient)
        out.append([edited[on], *gradients])
    for clean_part, spoiled_part in zip(*out, strict=True):
        assert_close(spoiled_part, clean_part)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("name", ["all", "few"])
def test_narrow_states_are_edited_in_the_factors_dtype(name: str, dtype: torch.dtype) -> None:
    edits, rows = case(name)
    single = [RowEdit(edits[0].factors.ready(torch.float32, torch.device("cpu")))]
    hidden = states().to(dtype)
    exact = by_row(hidden.double(), edits, rows)
    edited = edit_rows(hidden, single, rows)
    assert edited.dtype is dtype
    # The change is rounded, and so is the sum.
    bound = torch.finfo(dtype).eps * (exact.abs() + (exact - hidden.double()).abs())
    assert ((edited.double() - exact).abs() <= bound).all()


def test_no_autocast_within() -> None:
    edits, rows = case("few")
    edits = [RowEdit(edits[0].factors.ready(torch.float32, torch.device("cpu")))]
    hidden = states().float().requires_grad_()
    outputs = []
    for enabled in (False, True):
        with torch.autocast("cpu", dtype=torch.bfloat16, enabled=enabled):
            edited = edit_rows(hidden, edits, rows)
            outputs.append((edited, *torch.autograd.grad(edited.sum(), hidden)))
    for without, within in zip(*outputs, strict=True):
        assert torch.equal(without, within)
