"""Intervals and p-values against enumerated bootstraps and closed forms."""

from itertools import product

import numpy as np
import pytest

from reftnoise.training.study.statistics import mean_interval, paired_difference

RNG = np.random.default_rng(3)


def enumerated(right: np.ndarray) -> np.ndarray:
    """The mean of every equally probable resample of seeds and items."""
    seeds, items = right.shape
    return np.array(
        [
            right[np.ix_(s, i)].mean()
            for s in product(range(seeds), repeat=seeds)
            for i in product(range(items), repeat=items)
        ]
    )


@pytest.mark.parametrize("shape", [(2, 4), (3, 4), (1, 5)])
def test_percentiles_are_those_of_all_resamples(shape: tuple[int, int]) -> None:
    right = RNG.random(shape)
    low, high = np.quantile(enumerated(right), [0.025, 0.975])
    found = mean_interval(right, draws=40_000)
    assert found.mean == pytest.approx(right.mean())
    assert found.low == pytest.approx(low, abs=0.015)
    assert found.high == pytest.approx(high, abs=0.015)


def test_one_seed_gives_the_binomial_interval() -> None:
    right = np.arange(400) < 100
    found = mean_interval(right[None], draws=20_000)
    half = 1.96 * np.sqrt(0.25 * 0.75 / 400)
    assert found.low == pytest.approx(0.25 - half, abs=0.004)
    assert found.high == pytest.approx(0.25 + half, abs=0.004)


def test_seeds_that_differ_widen_the_interval() -> None:
    """All items alike: the draws are those of the seeds alone, a binomial of 4."""
    right = np.repeat([[1.0], [1.0], [0.0], [0.0]], 50, axis=1)
    found = mean_interval(right, draws=20_000)
    assert (found.mean, found.low, found.high) == (0.5, 0.0, 1.0)  # each end has p = 1/16


def test_the_same_items_being_hard_for_all_seeds_is_no_further_evidence() -> None:
    one = RNG.random((1, 60)) < 0.5
    many = mean_interval(np.repeat(one, 8, axis=0), draws=20_000)
    single = mean_interval(one, draws=20_000)
    assert many.low == pytest.approx(single.low, abs=0.01)
    assert many.high == pytest.approx(single.high, abs=0.01)


def test_the_p_value_is_that_of_all_resamples() -> None:
    a, b = RNG.random((3, 4)) + 0.2, RNG.random((3, 4))
    means = enumerated(a - b)
    found = paired_difference(a, b, draws=40_000)
    assert found.mean == pytest.approx((a - b).mean())
    expected = 2 * min(np.mean(means <= 0), np.mean(means >= 0))
    assert found.p == pytest.approx(expected, abs=0.01)


def test_p_and_interval_agree_and_pairing_matters() -> None:
    hard = RNG.random(300)
    b = (RNG.random((5, 300)) < hard).astype(int)
    a = b.copy()
    a[:, :30] = 1  # never worse than b, item by item
    assert paired_difference(a, a).p == 1
    assert paired_difference(a, a)[:3] == (0, 0, 0)
    found = paired_difference(a, b)
    assert found.low > 0
    assert found.p == pytest.approx(2 / 10_001)
    turned = paired_difference(b, a)
    assert (turned.mean, turned.p) == (-found.mean, found.p)
    shuffled = paired_difference(a, b[:, RNG.permutation(300)])
    assert shuffled.high - shuffled.low > 2 * (found.high - found.low)


def test_draws_do_not_depend_on_blocks(monkeypatch: pytest.MonkeyPatch) -> None:
    right = RNG.random((3, 50))
    whole = mean_interval(right, draws=2000)
    monkeypatch.setattr("reftnoise.training.study.statistics.BLOCK", 50 * 7)
    parts = mean_interval(right, draws=2000)
    assert whole.low == pytest.approx(parts.low, abs=0.02)
    assert mean_interval(right, draws=2000) == parts


@pytest.mark.parametrize(
    ("right", "message"),
    [(np.ones(3), r"expected \[seeds, items\].*got \(3,\)"), (np.ones((0, 3)), "at least one")],
)
def test_what_is_no_matrix_of_answers(right: np.ndarray, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        mean_interval(right)


def test_what_cannot_be_paired() -> None:
    with pytest.raises(ValueError, match=r"equal shapes, got \(2, 3\) and \(2, 4\)"):
        paired_difference(np.ones((2, 3)), np.ones((2, 4)))
    with pytest.raises(ValueError, match=r"draws 0: expected at least 1"):
        mean_interval(np.ones((2, 3)), draws=0)
