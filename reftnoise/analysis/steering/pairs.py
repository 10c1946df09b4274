"""Pairs that differ in one thing, as rows of a file and as tokens; nothing heavy is imported."""

import random
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ..._util.errors import brief
from ..._util.files import local_path
from ...data.files import LOADERS, expect_file, placed_rows
from .options import FEWEST_PAIRS

_QUESTION = ("question", "prompt")
_MATCHING = ("matching", "answer_matching_behavior")
_OTHER = ("not_matching", "answer_not_matching_behavior")
_DEALT = ("fit", "choose", "fit", "test")
"""What pairs are used for, in turn: half of them to fit, a quarter to choose and one to test."""


@dataclass(frozen=True)
class PairRow:
    """A row of a file of pairs.

    Args:
        place: where it is in the file, such as `line 3`.
        positive: text that shows the behaviour: an answer, or a prompt where there is no question.
        negative: text that shows the opposite.
        question: question that both answer; None where they are prompts.
        columns: all columns of the row.
    """

    place: str
    positive: str
    negative: str
    question: str | None
    columns: dict[str, Any]


def read_pairs(path: str | Path) -> list[PairRow]:
    """The rows of a file: `positive` and `negative` prompts, or a question with two answers.

    The columns of the latter are `question` (or `prompt`), `matching` (or
    `answer_matching_behavior`) and `not_matching` (or `answer_not_matching_behavior`).

    Raises:
        OSError: there is no such file.
        ValueError: the file is damaged, a row has other columns, or there are too few rows.
    """
    place = local_path(path, "pairs")
    if LOADERS.get(place.suffix) is None:
        readable = ", ".join(suffix for suffix, load in LOADERS.items() if load is not None)
        raise ValueError(f"pairs {str(path)!r}: expected a file that ends in {readable}")
    expect_file(place)
    rows = []
    for where, row in placed_rows(place):
        try:
            rows.append(_row(where, row))
        except ValueError as error:
            raise ValueError(f"{place}, {where}: {error}") from None
    if len(rows) < FEWEST_PAIRS:
        raise ValueError(f"{place}: {len(rows)} pairs: expected at least {FEWEST_PAIRS}")
    return rows


def _row(place: str, row: dict[str, Any]) -> PairRow:
    if "positive" in row and "negative" in row:
        return PairRow(place, _text(row, "positive"), _text(row, "negative"), None, row)
    names = [next((n for n in known if n in row), None) for known in (_MATCHING, _OTHER, _QUESTION)]
    if None in names:
        raise ValueError(
            "expected the columns positive and negative, or question, matching and not_matching; "
            f"got {', '.join(row) or 'none'}"
        )
    matching, other, question = (_text(row, str(name)) for name in names)
    return PairRow(place, matching, other, question, row)


def _text(row: dict[str, Any], name: str) -> str:
    if not isinstance(row[name], str) or not row[name].strip():
        raise ValueError(f"{name} {brief(row[name])}: expected a text")
    return row[name]


@dataclass(frozen=True)
class Contrast:
    """The tokens of a pair: what its halves begin with, and the parts by which they differ."""

    prompt: list[int]
    matching: list[int]
    other: list[int]

    @classmethod
    def of(cls, positive: Sequence[int], negative: Sequence[int]) -> "Contrast":
        """Two sequences as a pair; errors as of `differing`."""
        first, second = differing(positive, negative)
        if not first.start:
            raise ValueError("the halves have no common beginning: expected one to predict from")
        return cls(
            list(positive[: first.start]),
            list(positive[first.start : first.stop]),
            list(negative[second.start : second.stop]),
        )


def split_pairs(
    pairs: Sequence[Contrast], *, limit: int | None, seed: int
) -> dict[str, list[Contrast]]:
    """Pairs to fit, to choose and to test, of which no two are alike.

    Each gets a like share of every matching answer: a vector that makes one answer likelier
    whatever the question would otherwise seem to work.
    """
    by_tokens = {(tuple(p.prompt), tuple(p.matching), tuple(p.other)): p for p in pairs}
    order = list(by_tokens.values())
    random.Random(seed).shuffle(order)
    if limit is not None:
        order = _even(order, limit)
    if len(order) < FEWEST_PAIRS:
        raise ValueError(
            f"{len(order)} different pairs: expected at least {FEWEST_PAIRS}, with other common "
            "beginnings or other differing tokens after them"
        )
    order.sort(key=lambda pair: pair.matching)
    split: dict[str, list[Contrast]] = {name: [] for name in dict.fromkeys(_DEALT)}
    for index, pair in enumerate(order):
        split[_DEALT[index % len(_DEALT)]].append(pair)
    return split


def _even(pairs: Sequence[Contrast], limit: int) -> list[Contrast]:
    """The first pairs, in turn one of each matching answer."""
    groups: dict[tuple[int, ...], list[Contrast]] = {}
    for pair in pairs:
        groups.setdefault(tuple(pair.matching), []).append(pair)

    def in_turn() -> Iterator[Contrast]:
        for number in range(max(map(len, groups.values()))):
            yield from (group[number] for group in groups.values() if number < len(group))

    return [pair for pair, _ in zip(in_turn(), range(limit), strict=False)]


def differing(first: Sequence[int], second: Sequence[int]) -> tuple[range, range]:
    """Where two sequences differ: what follows their common beginning and precedes their end.

    Raises:
        ValueError: the two are equal, or one begins with the other, which then has no such part.
    """
    shortest = min(len(first), len(second))
    matches = (a == b for a, b in zip(first, second, strict=False))
    start = next((index for index, match in enumerate(matches) if not match), shortest)
    if start == shortest:
        same = "the two are equal" if len(first) == len(second) else "one begins with the other"
        raise ValueError(f"{same}: expected halves that differ in a part of each")
    most = shortest - start - 1  # the differing part has a token at least
    ends = (first[-1 - n] == second[-1 - n] for n in range(most))
    common = next((n for n, match in enumerate(ends) if not match), most)
    return range(start, len(first) - common), range(start, len(second) - common)
