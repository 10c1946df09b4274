r"""How sure a mean, or a difference of two, is: bootstrap over seeds and items.

Every seed answers the same items, so the two are crossed: an item that is hard is hard for all
seeds. A draw therefore resamples seeds and, independently, items, and takes all answers of the
drawn seeds to the drawn items (the pigeonhole bootstrap of Owen, Annals of Applied Statistics 2007,
whose variance is, if anything, too large). With one seed only items vary, and nothing is said about
other seeds; few seeds (below five) show little of how seeds vary.
"""

from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt

Answers = npt.NDArray[Any]
"""[seeds, items]: whether, or how much, each answer is right."""

BLOCK = 2**22
"""Numbers that are drawn at once."""
LEVEL, SEED = 0.95, 0
"""Share of the draws within an interval, and the seed of the draws."""


class Interval(NamedTuple):
    """A mean with the percentiles between which the share `LEVEL` of its draws lies."""

    mean: float
    low: float
    high: float


class Difference(NamedTuple):
    """A mean difference, its interval, and the bootstrap's two-sided p-value."""

    mean: float
    low: float
    high: float
    p: float


def mean_interval(right: Answers, *, draws: int = 10_000) -> Interval:
    """The mean over seeds and items, with the interval of so many draws of the bootstrap.

    Raises:
        ValueError: `right` is not a matrix with at least one seed and one item, or there are no
            draws.
    """
    means = _draws(right, draws)
    return Interval(float(np.mean(right)), *_percentiles(means))


def paired_difference(a: Answers, b: Answers, *, draws: int = 10_000) -> Difference:
    r"""The mean of a − b, paired over seeds and items, with its bootstrap interval and p-value.

    The p-value belongs to the interval: $p = 2\,(1 + \min(n_{\le 0}, n_{\ge 0})) / (1 + n)$, at
    most 1, where n draws hold $n_{\le 0}$ differences of at most 0. Unlike a permutation of signs,
    which would take a seed's answers for independent of each other, it allows for differences that
    only some seeds have. Rows and columns of a and b are the same seeds and items.

    Raises:
        ValueError: as of `mean_interval`, or the shapes differ.
    """
    a, b = np.asarray(a), np.asarray(b)
    if a.shape != b.shape:
        raise ValueError(f"paired answers: expected equal shapes, got {a.shape} and {b.shape}")
    differences = a.astype(float) - b.astype(float)
    means = _draws(differences, draws)
    extreme = min(int(np.sum(means <= 0)), int(np.sum(means >= 0)))
    p = min(1.0, 2 * (1 + extreme) / (1 + draws))
    return Difference(float(np.mean(differences)), *_percentiles(means), p)


def _draws(right: Answers, draws: int) -> npt.NDArray[np.float64]:
    """Means of resampled answers: for each draw the drawn seeds' mean, then of drawn items."""
    right = np.asarray(right, dtype=float)
    if right.ndim != 2 or 0 in right.shape:
        raise ValueError(f"answers: expected [seeds, items], at least one each, got {right.shape}")
    if draws < 1:
        raise ValueError(f"draws {draws}: expected at least 1")
    generator = np.random.default_rng(SEED)
    seeds, items = right.shape
    means = []
    block = max(1, BLOCK // items)
    for start in range(0, draws, block):
        size = min(block, draws - start)
        times_drawn = generator.multinomial(seeds, np.full(seeds, 1 / seeds), size)
        drawn_items = generator.integers(items, size=(size, items))
        means.append(np.take_along_axis(times_drawn @ right / seeds, drawn_items, 1).mean(1))
    joined: npt.NDArray[np.float64] = np.concatenate(means)
    return np.round(joined, 12)  # so that an exact 0 is one


def _percentiles(means: npt.NDArray[np.float64]) -> tuple[float, float]:
    low, high = np.quantile(means, [(1 - LEVEL) / 2, (1 + LEVEL) / 2])
    return float(low), float(high)
