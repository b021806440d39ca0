"""Intervals: known answers, coverage, and what cannot be resampled."""

import math

import numpy as np
import pytest

from dreambooth.evaluation.bootstrap import Interval, bootstrap_difference, bootstrap_mean


def test_every_subject_counts_alike() -> None:
    interval = bootstrap_mean([[1.0], [0.0, 0.0, 0.0]])
    assert interval.mean == pytest.approx(0.5)
    assert interval.n == 4
    # Both drawn values are the lone subject's, none are, or one of each: means 1, 0 and 0.5.
    assert (interval.low, interval.high) == (0, 1)


def test_values_that_do_not_differ_have_no_width() -> None:
    assert bootstrap_mean([[0.25] * 3, [0.25] * 5]) == Interval(mean=0.25, low=0.25, high=0.25, n=8)


def test_one_subject_is_resampled_over_its_prompts() -> None:
    values = np.random.default_rng(1).normal(0.7, 0.1, 25)
    interval = bootstrap_mean([values.tolist()])
    # The bootstrap of a mean is known: its spread is that of the values (ddof 0) over the root of their number.
    spread = values.std() / 5
    assert interval.high - interval.low == pytest.approx(2 * 1.96 * spread, rel=0.1)
    assert interval.low < interval.mean < interval.high


def test_the_spread_of_two_levels_is_of_both() -> None:
    """Subjects that differ by 1 and prompts that differ by 1: the variance of the mean is known for the bootstrap."""
    rng = np.random.default_rng(2)
    values = rng.normal(0, 1, (20, 1)) + rng.normal(0, 1, (20, 10))
    interval = bootstrap_mean(values.tolist(), resamples=8000)
    variance = values.mean(axis=1).var() / 20 + values.var(axis=1).mean() / (20 * 10)
    # Percentiles as far out as Student's t for 20 subjects, times the root of 20 / 19: 2.093 * 1.026 = 2.147.
    assert interval.high - interval.low == pytest.approx(2 * 2.147 * math.sqrt(variance), rel=0.05)


def test_intervals_cover_the_mean_about_as_often_as_they_say() -> None:
    rng = np.random.default_rng(3)
    covered = 0
    for _ in range(200):
        values = rng.normal(0, 0.2, (20, 1)) + rng.normal(0.5, 0.1, (20, 8))
        interval = bootstrap_mean(values.tolist(), resamples=500)
        covered += interval.low <= 0.5 <= interval.high
    assert 0.88 <= covered / 200 <= 0.99


def test_the_same_seed_gives_the_same_interval() -> None:
    values = np.random.default_rng(4).random((3, 7)).tolist()
    assert bootstrap_mean(values, seed=5) == bootstrap_mean(values, seed=5)
    assert bootstrap_mean(values, seed=5) != bootstrap_mean(values, seed=6)


def test_one_value_has_no_interval_to_print() -> None:
    assert bootstrap_mean([[0.5]]) == Interval(mean=0.5, low=0.5, high=0.5, n=1)
    assert str(bootstrap_mean([[0.5]])) == "0.500 (n = 1)"


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ([], "at least one value"),
        ([[0.5], []], "at least one value for every subject"),
        ([[math.nan]], "isn't finite"),
        ([[0.5, math.inf]], "isn't finite"),
    ],
)
def test_what_cannot_be_resampled(values: list[list[float]], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        bootstrap_mean(values)


def test_pairs_tell_a_difference_that_intervals_side_by_side_hide() -> None:
    rng = np.random.default_rng(6)
    second = rng.normal(0.5, 0.3, (5, 10))
    first = second + 0.05 + rng.normal(0, 0.01, (5, 10))
    difference = bootstrap_difference(first.tolist(), second.tolist())
    assert difference.mean == pytest.approx(0.05, abs=0.01)
    assert difference.low > 0
    assert bootstrap_mean(first.tolist()).low < bootstrap_mean(second.tolist()).high


def test_other_prompts_cannot_be_paired() -> None:
    with pytest.raises(ValueError, match=r"got \[2\] and \[1\] values"):
        bootstrap_difference([[0.1, 0.2]], [[0.1]])
