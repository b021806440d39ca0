"""Confidence of a mean over subjects: bootstrap intervals (Efron and Tibshirani 1993, chapter 13), at two levels.

Subjects are drawn with replacement, and for each drawn subject its prompts. Images of one prompt are not
drawn: they enter as their prompt's mean, because images of one prompt are more alike than prompts of one subject. The
percentiles are wider than the level's own, as few subjects need (Hesterberg 2015, "expanded percentile interval").

>>> print(bootstrap_mean([[0.6, 0.8], [0.7, 0.9]]))
0.750 (0.600 to 0.900, n = 4)
>>> print(bootstrap_mean([[0.5]]))
0.500 (n = 1)
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from scipy.special import ndtr, stdtrit

RESAMPLES = 2000
LEVEL = 0.95
SEED = 0


@dataclass(frozen=True, kw_only=True)
class Interval:
    """A figure of `n` values and the ends of its interval. For n = 1 there is none: both ends are the figure."""

    mean: float
    low: float
    high: float
    n: int

    @property
    def ends(self) -> str:
        """Both ends with three decimals; empty where there is no interval."""
        return f"{self.low:.3f} to {self.high:.3f}" if self.n > 1 else ""

    def __str__(self) -> str:
        """The mean with three decimals, and the interval where there is one."""
        return f"{self.mean:.3f} ({self.ends}{', ' if self.ends else ''}n = {self.n})"


def none_for(figure: float) -> Interval:
    """The interval of a single value: the value itself, with n = 1."""
    return Interval(mean=figure, low=figure, high=figure, n=1)


def bootstrap_mean(
    values: Sequence[Sequence[float]], *, resamples: int = RESAMPLES, level: float = LEVEL, seed: int = SEED
) -> Interval:
    """Mean over subjects of the mean over each one's prompts, and its interval.

    `values` holds a sequence of figures for each subject, one for each prompt; lengths may differ, and each subject
    counts alike. One subject alone is resampled over its prompts (for those `intervals.t_interval` is better). The
    same values and seed give the same interval. Raises ValueError for no subject, a subject without values and values
    that aren't finite.
    """
    subjects = [np.asarray(of_subject, dtype=np.float64) for of_subject in values]
    if not subjects or not all(len(of_subject) for of_subject in subjects):
        raise ValueError("expected at least one value for every subject, got none")
    if not all(np.isfinite(of_subject).all() for of_subject in subjects):
        raise ValueError("a value isn't finite; a mean of it would say nothing")
    mean = float(np.mean([of_subject.mean() for of_subject in subjects]))
    count = sum(len(of_subject) for of_subject in subjects)
    if count == 1:
        return none_for(mean)
    drawn = len(subjects) if len(subjects) > 1 else count
    # The bootstrap's spread is too small by the root of (n - 1) / n, and few values have Student's tails.
    tail = ndtr(-np.sqrt(drawn / (drawn - 1)) * stdtrit(drawn - 1, (1 + level) / 2))
    means = _resampled_means(subjects, resamples, np.random.default_rng(seed))
    low, high = np.quantile(means, [tail, 1 - tail])
    return Interval(mean=mean, low=float(low), high=float(high), n=count)


def bootstrap_difference(
    first: Sequence[Sequence[float]], second: Sequence[Sequence[float]], *, level: float = LEVEL, seed: int = SEED
) -> Interval:
    """Mean of first - second, paired value by value: the same subjects and the same prompts in the same order.

    An interval that leaves out 0 is a difference. Pairs are more precise than two intervals side by side, most of
    whose width comes from differences between subjects and prompts. Raises ValueError for sets that can't be paired.
    """
    lengths = [[len(of_subject) for of_subject in values] for values in (first, second)]
    if lengths[0] != lengths[1]:
        raise ValueError(f"expected the same subjects and prompts in both, got {lengths[0]} and {lengths[1]} values")
    pairs = [[a - b for a, b in zip(*of_subject, strict=True)] for of_subject in zip(first, second, strict=True)]
    return bootstrap_mean(pairs, level=level, seed=seed)


def _resampled_means(subjects: Sequence[np.ndarray], resamples: int, rng: np.random.Generator) -> np.ndarray:
    """Means of resampled sets: (R,)."""
    counts = np.array([len(of_subject) for of_subject in subjects])  # (S,)
    table = np.zeros((len(subjects), counts.max()))  # (S, P), short rows padded
    for row, of_subject in zip(table, subjects, strict=True):
        row[: len(of_subject)] = of_subject
    drawn = rng.integers(len(subjects), size=(resamples, len(subjects)))  # (R, S)
    lengths = counts[drawn][..., None]  # (R, S, 1)
    prompts = (rng.random((*drawn.shape, counts.max())) * lengths).astype(np.int64)  # (R, S, P)
    kept = np.arange(counts.max()) < lengths  # as many draws as the subject has prompts
    figures = np.where(kept, table[drawn[..., None], prompts], 0)
    means: np.ndarray = (figures.sum(axis=2) / lengths[..., 0]).mean(axis=1)
    return means
