"""Pairs of token sequences that differ in one part; nothing heavy is imported here."""

from collections.abc import Sequence


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
