"""The grammar of positions, and their resolution against a slow per-row reference."""

import random
import re
from itertools import pairwise
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from reftnoise.config.positions import Positions
from reftnoise.engine.layout import (
    PromptLayout,
    Selection,
    explicit_selection,
    prompt_lengths_from_labels,
)
from reftnoise.engine.locations import parse_unit_locations

quickly = settings(deadline=None, max_examples=150)  # the first call of torch misses any deadline

Edits = set[tuple[int, int]]
"""(row, column) pairs."""


def exactly(text: str) -> str:
    return f"^{re.escape(text)}$"


# -- the grammar -------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("spec", "positions"),
    [
        ("f7", Positions(first=7)),
        ("l1", Positions(last=1)),
        ("f7+l7", Positions(first=7, last=7)),
        ("l3+f2", Positions(first=2, last=3)),
        ("f12+l10", Positions(first=12, last=10)),
        ("all", Positions(all=True)),
        ("decode", Positions(decode=True)),
        ("all+decode", Positions(all=True, decode=True)),
        ("decode+all", Positions(all=True, decode=True)),
        ("f1+decode", Positions(first=1, decode=True)),
        ("f1+l2+decode", Positions(first=1, last=2, decode=True)),
        ([0, 3, -1], Positions(indices=(0, 3, -1))),
        ((2,), Positions(indices=(2,))),
        (Positions(first=1), Positions(first=1)),
    ],
)
def test_good_positions(spec: Any, positions: Positions) -> None:
    assert Positions.parse(spec) == positions


TERMS = "expected terms like 'f7', 'l7', 'all' or 'decode'"
JOINED = "expected terms like 'f7' or 'l7' joined by '+'"
KIND = "expected a string such as 'f7+l7' or a list of integers"


@pytest.mark.parametrize(
    ("spec", "problem"),
    [
        ("f7-l7", f"{JOINED}, got '-' at column 3"),
        ("f7 + l7", f"{JOINED}, got ' ' at column 3"),
        ("f7l7", f"{JOINED}, got 'l' at column 3"),
        ("f1.5", f"{JOINED}, got '.' at column 3"),
        ("alldecode", f"{JOINED}, got 'd' at column 4"),
        ("", f"{TERMS}, got the end at column 1"),
        ("f7+", f"{TERMS}, got the end at column 4"),
        ("+f7", f"{TERMS}, got '+' at column 1"),
        ("f7++l7", f"{TERMS}, got '+' at column 4"),
        ("f", f"{TERMS}, got 'f' at column 1"),
        ("f-1", f"{TERMS}, got 'f' at column 1"),
        ("F7", f"{TERMS}, got 'F' at column 1"),
        ("x3", f"{TERMS}, got 'x' at column 1"),
        ("7", f"{TERMS}, got '7' at column 1"),
        (" f7", f"{TERMS}, got ' ' at column 1"),
        ("l1+x3", f"{TERMS}, got 'x' at column 4"),
        ("f0", "expected a count of at least 1, got '0' at column 2"),
        ("f1+l00", "expected a count of at least 1, got '0' at column 5"),
        ("f7+f8", "expected f once, got 'f' at column 4"),
        ("l1+f2+l1", "expected l once, got 'l' at column 7"),
        ("all+all", "expected all once, got 'a' at column 5"),
        ("decode+decode", "expected decode once, got 'd' at column 8"),
        ("all+f1", "'all' includes the first and last tokens"),
        ("l2+all", "'all' includes the first and last tokens"),
        ([], KIND),
        ([1.0], KIND),
        ([True], KIND),
        (["f1"], KIND),
        (7, KIND),
        (None, KIND),
        ({0, 1}, KIND),
        ([1, -2, 1], "every index may occur once"),
    ],
)
def test_bad_positions(spec: Any, problem: str) -> None:
    with pytest.raises(ValueError, match=exactly(f"positions {spec!r}: {problem}")):
        Positions.parse(spec)


counts = st.integers(0, 6)
indices = st.lists(st.integers(-7, 7), min_size=1, max_size=5, unique=True).map(tuple)
explicit = st.builds(Positions, indices=indices)
prompt_terms = st.builds(Positions, first=counts, last=counts, decode=st.booleans())
dense = st.builds(Positions, all=st.just(True), decode=st.booleans())
any_positions = st.one_of(explicit, prompt_terms.filter(lambda p: p != Positions()), dense)


@quickly
@given(any_positions)
def test_spec_is_what_parse_reads(positions: Positions) -> None:
    assert Positions.parse(positions.spec()) == positions


@pytest.mark.parametrize(
    ("spec", "parts"),
    [
        ("f5+l4", ["f5", "l4"]),
        ("f5+l4+decode", ["f5", "l4+decode"]),
        ("f5", ["f5"]),
        ("l4+decode", ["l4+decode"]),
        ("all", ["all"]),
        ([0, -1], [[0, -1]]),
    ],
)
def test_split_gives_prefix_and_suffix(spec: Any, parts: list[Any]) -> None:
    assert [part.spec() for part in Positions.parse(spec).split()] == parts


@pytest.mark.parametrize(
    ("one", "other", "overlap"),
    [
        ("f3", "l3", False),
        ("f1", "f9", True),
        ("l1", "l9", True),
        ("f3+l3", "l1", True),
        ("all", "l1", True),
        ("all", "f1", True),
        ("all", "all", True),
        ("all", "decode", False),
        ("f1", "decode", False),
        ("f1+decode", "l1+decode", True),
        ("f1+decode", "l1", False),
        ([0, 1], [2, 3], False),
        ([0, 1], [1, 2], True),
        ([-1], [-2], False),
        ([-1], [-2, -1], True),
        ([0], [-1], True),  # in a prompt of one token
        ([0, -1], [3], True),
        ([0], "f1", True),
        ([5], "l1", True),
        ([5], "all", True),
        ([5], "decode", False),
    ],
)
def test_overlaps(one: Any, other: Any, overlap: bool) -> None:
    one, other = Positions.parse(one), Positions.parse(other)
    assert one.overlaps(other) is overlap
    assert other.overlaps(one) is overlap


# -- resolution --------------------------------------------------------------------------------


def reference(
    attended: list[bool], length: int, positions: Positions, first: int = 0, last: int = 0
) -> set[int]:
    """The columns that `positions` mean in one row, by the paper's rule, one token at a time."""
    columns = [column for column, is_token in enumerate(attended) if is_token]
    prompt, generated = columns[:length], columns[length:]
    n = len(prompt)
    prefix, suffix = positions.first, positions.last
    if n < max(prefix, first) + max(suffix, last):
        prefix, suffix = min(prefix, n // 2), min(suffix, n - n // 2)
    chosen = set(prompt[:prefix]) | set(prompt[n - suffix :])
    for index in positions.indices:
        if -n <= index < n:
            chosen.add(prompt[index])
    if positions.all:
        chosen |= set(prompt)
    if positions.decode:
        chosen |= set(generated)
    return chosen


def edits(selection: Selection, offset: int, length: int) -> Edits:
    """(row, column) of what a selection edits in a slab of columns; each may occur once."""
    rows, mask = selection.within(offset, length)
    batch = selection.mask.shape[0]
    if rows is None:
        assert mask.shape == (batch * length,)
        rows = torch.arange(batch * length)
    owners = torch.arange(batch).repeat_interleave(len(rows) // batch)
    assert torch.equal(rows // length, owners)  # unused slots too stay in their own sequence
    flat = rows[mask].tolist()
    assert len(set(flat)) == len(flat)
    return {(row // length, offset + row % length) for row in flat}


@st.composite
def layouts(draw: st.DrawFn) -> tuple[list[list[bool]], list[int]]:
    """Attended tokens of a batch, padded left, right or anywhere, and its prompts' lengths."""
    width = draw(st.integers(1, 12))
    masks, lengths = [], []
    for _ in range(draw(st.integers(1, 4))):
        tokens = draw(st.integers(1, width))
        kind = draw(st.sampled_from(["left", "right", "holes"]))
        mask = [True] * tokens + [False] * (width - tokens)
        if kind == "left":
            mask.reverse()
        elif kind == "holes":
            mask = draw(st.permutations(mask))
        masks.append(list(mask))
        lengths.append(draw(st.integers(1, tokens)))
    return masks, lengths


def layout_of(batch: tuple[list[list[bool]], list[int]]) -> PromptLayout:
    return PromptLayout(torch.tensor(batch[0]), torch.tensor(batch[1]))


@quickly
@given(layouts(), any_positions)
def test_select_agrees_with_the_reference(
    batch: tuple[list[list[bool]], list[int]], positions: Positions
) -> None:
    selection = layout_of(batch).select(positions)
    expected = {
        (row, column)
        for row, (mask, length) in enumerate(zip(*batch, strict=True))
        for column in reference(mask, length, positions)
    }
    assert edits(selection, 0, len(batch[0][0])) == expected


@quickly
@given(layouts(), any_positions)
def test_without_lengths_every_token_is_prompt(
    batch: tuple[list[list[bool]], list[int]], positions: Positions
) -> None:
    masks = batch[0]
    selection = PromptLayout(torch.tensor(masks)).select(positions)
    expected = {
        (row, column)
        for row, mask in enumerate(masks)
        for column in reference(mask, sum(mask), positions)
    }
    assert edits(selection, 0, len(masks[0])) == expected


@quickly
@given(layouts(), st.one_of(explicit, st.builds(Positions, first=counts, last=counts)))
def test_unused_slots_point_at_prompt_tokens(
    batch: tuple[list[list[bool]], list[int]], positions: Positions
) -> None:
    layout = layout_of(batch)
    selection = layout.select(positions)
    assert selection.columns is not None
    assert layout.prompt.gather(1, selection.columns).all()


@quickly
@given(layouts(), st.integers(1, 8), st.integers(1, 8))
def test_prefix_and_suffix_units_at_one_site_are_disjoint(
    batch: tuple[list[list[bool]], list[int]], p: int, s: int
) -> None:
    layout, width = layout_of(batch), len(batch[0][0])
    prefix = edits(layout.select(Positions(first=p), first=p, last=s), 0, width)
    suffix = edits(layout.select(Positions(last=s), first=p, last=s), 0, width)
    assert not prefix & suffix
    assert prefix | suffix == edits(layout.select(Positions(first=p, last=s)), 0, width)
    for row, (mask, length) in enumerate(zip(*batch, strict=True)):
        expected = reference(mask, length, Positions(first=p), p, s)
        assert {column for owner, column in prefix if owner == row} == expected


@pytest.mark.parametrize(
    ("n", "p", "s", "expected"),
    [
        (14, 7, 7, {*range(7), *range(7, 14)}),  # exactly long enough
        (13, 7, 7, {*range(6), *range(6, 13)}),  # floor(13/2) = 6 first, ceil(13/2) = 7 last
        (5, 7, 7, {0, 1, 2, 3, 4}),  # 2 first, 3 last
        (5, 1, 7, {0, 2, 3, 4}),  # min(1, 2) first, min(7, 3) last
        (1, 7, 7, {0}),  # none first, one last
        (5, 7, 0, {0, 1}),  # the rule as it stands, without a suffix
        (2, 0, 3, {1}),
        (3, 0, 3, {0, 1, 2}),
    ],
)
def test_the_papers_rule_for_short_prompts(n: int, p: int, s: int, expected: set[int]) -> None:
    layout = PromptLayout(torch.ones(1, n, dtype=torch.bool))
    found = edits(layout.select(Positions(first=p, last=s)), 0, n)
    assert found == {(0, column) for column in expected}


@pytest.mark.parametrize("padding_side", ["left", "right"])
def test_positions_count_attended_tokens(padding_side: str) -> None:
    # Prompts of 5 and 3 tokens, completions of 2 and 1, in 8 columns.
    masks = torch.tensor([[1, 1, 1, 1, 1, 1, 1, 0], [1, 1, 1, 1, 0, 0, 0, 0]], dtype=torch.bool)
    starts = [0, 0]
    if padding_side == "left":
        masks, starts = masks.flip(1), [1, 4]
    selection = PromptLayout(masks, torch.tensor([5, 3])).select(Positions.parse("f1+l1"))
    expected = {(0, starts[0]), (0, starts[0] + 4), (1, starts[1]), (1, starts[1] + 2)}
    assert edits(selection, 0, 8) == expected


def test_an_index_that_two_ways_of_counting_reach_is_edited_once() -> None:
    selection = PromptLayout(torch.ones(1, 1, dtype=torch.bool)).select(Positions.parse([0, -1, 4]))
    rows, mask = selection.within(0, 1)
    assert rows is not None
    assert rows[mask].tolist() == [0]


def test_a_row_without_tokens_is_not_edited() -> None:
    masks = torch.tensor([[False, False], [True, True]])
    for spec in ("f1+l1", "all+decode", [0, -1]):
        found = edits(PromptLayout(masks).select(Positions.parse(spec)), 0, 2)
        assert found == {(1, 0), (1, 1)}


# -- chunks and beams --------------------------------------------------------------------------


@quickly
@given(layouts(), any_positions, st.data())
def test_chunks_cover_what_one_slab_covers(
    batch: tuple[list[list[bool]], list[int]], positions: Positions, data: st.DataObject
) -> None:
    selection, width = layout_of(batch).select(positions), len(batch[0][0])
    cuts = data.draw(st.lists(st.integers(1, width), max_size=4, unique=True).map(sorted))
    bounds = [0, *cuts] + ([width] if width not in cuts else [])
    found: list[tuple[int, int]] = []
    for start, end in pairwise(bounds):
        found += edits(selection, start, end - start)
    assert sorted(found) == sorted(edits(selection, 0, width))


@quickly
@given(layouts(), any_positions, st.integers(1, 4))
def test_generated_columns_are_edited_by_decode_alone(
    batch: tuple[list[list[bool]], list[int]], positions: Positions, length: int
) -> None:
    selection, width = layout_of(batch).select(positions), len(batch[0][0])
    new = {(row, width + column) for row in range(len(batch[0])) for column in range(length)}
    expected = new if positions.decode else set()
    assert edits(selection, width, length) == expected
    assert edits(selection, 0, width + length) == edits(selection, 0, width) | expected


@quickly
@given(layouts(), any_positions, st.integers(1, 3))
def test_beams_repeat_each_row_in_succession(
    batch: tuple[list[list[bool]], list[int]], positions: Positions, beams: int
) -> None:
    selection, width = layout_of(batch).select(positions), len(batch[0][0])
    expected = {
        (row * beams + beam, column)
        for row, column in edits(selection, 0, width)
        for beam in range(beams)
    }
    repeated = selection.repeat(beams)
    assert repeated.decode == selection.decode
    assert edits(repeated, 0, width) == expected


def test_explicit_columns_count_once() -> None:
    selection = explicit_selection(torch.tensor([[4, 0, 4], [1, 1, 1]]), 5)
    assert edits(selection, 0, 5) == {(0, 4), (0, 0), (1, 1)}


# -- where the prompt ends ---------------------------------------------------------------------


@pytest.mark.parametrize(
    ("attended", "labels", "length"),
    [
        ([1, 1, 1, 1], [-100, -100, 7, 8], 2),
        ([1, 1, 1, 1], [7, 8, 9, 9], 1),  # labels from column 0: the first token stays prompt
        ([1, 1, 1, 1], [-100, -100, -100, -100], 4),  # no labels: all of it is prompt
        ([1, 1, 1, 0], [-100, -100, -100, -100], 3),
        ([1, 1, 1, 0], [-100, -100, 7, -100], 2),
        ([0, 0, 1, 1], [-100, -100, -100, 7], 1),
        ([0, 1, 1, 1], [-100, 7, 8, 9], 1),  # left padding, all tokens labelled
        ([1, 0, 1, 1], [-100, -100, -100, 7], 2),
        ([1, 1, 1, 1], [-100, 7, -100, 9], 1),  # the first label counts
        ([1, 1, 1, 1], [-100, 0, 0, 0], 1),  # label 0 is a label
    ],
)
def test_prompt_lengths_from_labels(attended: list[int], labels: list[int], length: int) -> None:
    found = prompt_lengths_from_labels(torch.tensor([labels]), torch.tensor([attended]).bool())
    assert found.tolist() == [length]


@quickly
@given(layouts())
def test_prompt_lengths_survive_the_way_through_labels(
    batch: tuple[list[list[bool]], list[int]],
) -> None:
    labels = []
    for mask, length in zip(*batch, strict=True):
        completion = [column for column, is_token in enumerate(mask) if is_token][length:]
        labels.append([5 if column in completion else -100 for column in range(len(mask))])
    found = prompt_lengths_from_labels(torch.tensor(labels), torch.tensor(batch[0]))
    assert found.tolist() == batch[1]


# -- pyvene's unit_locations -------------------------------------------------------------------

LOCATIONS = [[[1], [2]], [[0, 4], [3, 1]]]  # 2 interventions × 2 rows × positions


def located(locations: Any) -> list[Tensor | None]:
    """Columns of two interventions in a batch of two rows and five columns."""
    return parse_unit_locations({"sources->base": (None, locations)}, 2, 2, 5)


@pytest.mark.parametrize(
    ("given_locations", "expected"),
    [
        (3, [[[3], [3]], [[3], [3]]]),
        (LOCATIONS, LOCATIONS),
        (tuple(tuple(part) for part in LOCATIONS), LOCATIONS),
        ([torch.tensor(part) for part in LOCATIONS], LOCATIONS),
        (torch.tensor([[[1], [2]], [[0], [4]]]), [[[1], [2]], [[0], [4]]]),
        ([None, LOCATIONS[1]], [None, LOCATIONS[1]]),
        ([None, None], [None, None]),
    ],
    ids=["int", "lists", "tuples", "list of tensors", "tensor", "one None", "all None"],
)
def test_unit_locations(given_locations: Any, expected: list[Any]) -> None:
    found = located(given_locations)
    assert [None if part is None else part.tolist() for part in found] == expected


SHAPE = (
    "expected {'sources->base': (None, locations)} with locations nested as 2 interventions × "
    "2 rows × positions"
)


@pytest.mark.parametrize(
    ("given_locations", "start"),
    [
        (None, "unit_locations None"),
        ([[1]], "unit_locations [[1]]"),  # one intervention of two
        ([[1, 2], [1, 2]], "unit_locations of intervention 0, [1, 2]"),  # positions not nested
        ([None, [[1]]], "unit_locations of intervention 1, [[1]]"),  # one row of two
        ([None, [[1], [2, 3]]], "unit_locations of intervention 1, [[1], [2, 3]]"),  # ragged
        ([None, [[[1]], [[2]]]], "unit_locations of intervention 1, [[[1]], [[2]]]"),  # too deep
        ([None, [["a"], ["b"]]], "unit_locations of intervention 1, [['a'], ['b']]"),
        ([[[1.0], [2.0]], None], "unit_locations of intervention 0, [[1.0], [2.0]]"),
        ("f1", "unit_locations 'f1'"),
        pytest.param(torch.tensor(3), "unit_locations tensor(3)"),
    ],
)
def test_wrong_nesting_shows_the_expected_shape(given_locations: Any, start: str) -> None:
    with pytest.raises(ValueError, match=exactly(f"{start}: {SHAPE}")):
        located(given_locations)


@pytest.mark.parametrize(
    "unit_locations", [{}, {"base": 1}, {"sources->base": 1}, {"sources->base": (None,)}, None, 3]
)
def test_wrong_mapping_shows_the_expected_shape(unit_locations: Any) -> None:
    with pytest.raises(ValueError, match=exactly(f"unit_locations {unit_locations!r}: {SHAPE}")):
        parse_unit_locations(unit_locations, 2, 2, 5)


@pytest.mark.parametrize(
    ("locations", "index", "part"),
    [
        ([[[4], [0]], [[0], [5]]], 1, [[0], [5]]),
        ([[[-1], [0]], None], 0, [[-1], [0]]),
        (5, 0, [[5], [5]]),
    ],
)
def test_columns_outside_the_input(locations: Any, index: int, part: Any) -> None:
    message = (
        f"unit_locations of intervention {index}, {part!r}: expected columns from 0 to 4, the "
        "input's last"
    )
    with pytest.raises(ValueError, match=exactly(message)):
        located(locations)


@pytest.mark.parametrize("seed", range(8))
def test_what_is_known_to_count_all_counts_all(seed: int) -> None:
    torch.manual_seed(seed)
    draw = random.Random(seed)
    covered = 0
    for _ in range(120):
        batch, width = draw.randint(1, 3), draw.randint(1, 6)
        attended = torch.ones(batch, width, dtype=torch.bool)
        for row in attended if draw.random() < 0.4 else ():
            row[: draw.randint(0, width - 1)] = False
            if draw.random() < 0.5:
                row.copy_(row.flip(0).clone())
        lengths = None if draw.random() < 0.5 else torch.randint(0, width + 1, (batch,))
        layout = PromptLayout(attended, lengths)
        places = ["f1", "l1", "f2+l2", "all", "all+decode", "f1+decode", "decode", "f9"]
        with torch.set_grad_enabled(draw.random() < 0.5):
            selection = layout.select(Positions.parse(draw.choice(places)))
        if draw.random() < 0.1:
            selection = explicit_selection(torch.randint(0, width, (batch, 2)), width)
        selection = selection.repeat(draw.choice((1, 2)))
        offset, length = draw.randint(-3, width + 2), draw.randint(1, width + 3)
        if offset + length > 0 and selection.covers(offset, length):
            covered += 1
            assert selection.within(offset, length)[1].all()
    assert covered > 5
