"""The columns that pyreft's positions have in a prompt."""

import re
from typing import Any, TypeAlias

Locations: TypeAlias = list[list[int]]
"""For each intervention, the columns that it edits."""


def parse_positions(positions: str) -> tuple[int, int]:
    """The numbers of first and last tokens that pyreft's `"f3+l3"`, `"f3"` or `"l3"` names."""
    match = re.fullmatch(r"f?(\d+)\+l?(\d+)|f(\d+)|l(\d+)", positions)
    if match is None:
        raise ValueError(f"positions {positions!r}: expected 'f3', 'l3' or 'f3+l3'")
    both_first, both_last, first, last = match.groups(default="0")
    return int(both_first) + int(first), int(both_last) + int(last)


def get_intervention_locations(
    *,
    last_position: int,
    num_interventions: int,
    positions: str | None = None,
    first_n: int | None = None,
    last_n: int | None = None,
    pad_mode: str = "first",
    share_weights: bool = False,
    **_others: Any,
) -> Locations:
    """The columns of a prompt's first and last tokens, for each intervention.

    With `share_weights`, or where a side is empty, every intervention has both sides. Otherwise the
    first half of the interventions has the first tokens, the second half the last.

    Args:
        last_position: number of the prompt's tokens.
        num_interventions: number of interventions.
        positions: positions such as `"f3+l3"`.
        first_n: number of first tokens, without `positions`.
        last_n: number of last tokens, without `positions`.
        pad_mode: `"first"` to fill up short prompts with column -1, else with `last_position`.
        share_weights: whether the interventions edit both sides.
        _others: further settings of a dataset, which are not read.

    Raises:
        ValueError: no positions; an odd number of interventions that share two sides.
    """
    if positions is not None:
        first_n, last_n = parse_positions(positions)
    if first_n is None or last_n is None:
        raise ValueError("positions is missing: expected such as 'f3+l3', or first_n and last_n")
    half = last_position // 2
    first, last = min(half, first_n), min(half, last_n)
    padding = [-1 if pad_mode == "first" else last_position]
    prefix = list(range(first))
    suffix = list(range(last_position - last, last_position))
    if share_weights or first == 0 or last == 0:
        both = prefix + suffix + padding * (first_n - first + last_n - last)
        return [both] * num_interventions
    prefix += padding * (first_n - first)
    suffix += padding * (last_n - last)
    if num_interventions % 2:
        raise ValueError(
            f"num_interventions {num_interventions}: expected an even number, one half for the "
            "first tokens and one for the last, or share_weights=True"
        )
    width = max(len(prefix), len(suffix))
    prefix += padding * (width - len(prefix))
    suffix += padding * (width - len(suffix))
    return [prefix] * (num_interventions // 2) + [suffix] * (num_interventions // 2)
