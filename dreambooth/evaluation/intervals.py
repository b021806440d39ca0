"""95 % intervals of what isn't a plain mean of independent values: one subject's figures, and shares of any number.

Each takes the values that an evaluation keeps, so that the interval can be made again from them. Where a value can't be
varied there is no interval: both ends are the figure, and n is 1.

>>> print(share_interval([[0.0] * 25]))   # none of 25 prompts
0.000 (0.000 to 0.133, n = 25)
>>> print(pairs_interval([0.90, 0.89, 0.91, 0.88]))
0.895 (0.813 to 0.942, n = 4)
"""

import math
from collections.abc import Sequence

import numpy as np
from scipy.special import ndtri, stdtrit

from dreambooth.evaluation.bootstrap import LEVEL, Interval, none_for

_UPPER = (1 + LEVEL) / 2
_NEARLY_ONE = 1 - 1e-7


def t_interval(values: Sequence[float], *, lowest: float = -1.0, highest: float = 1.0) -> Interval:
    """Mean of independent values, by Student's t (1908), within what the figure can be."""
    mean, count = float(np.mean(values)), len(values)
    if count < 2:
        return none_for(mean)
    half = _t(count - 1) * float(np.std(values, ddof=1)) / math.sqrt(count)
    return Interval(mean=mean, low=max(lowest, mean - half), high=min(highest, mean + half), n=count)


def pairs_interval(values: Sequence[float]) -> Interval:
    """Mean similarity over pairs of M images, from each one's mean similarity to the others.

    Those values share pairs, so they vary far less than independent ones would. A jackknife leaves out one image with
    all its pairs (Arvesen 1969, for U-statistics), on Fisher's scale, where the spread doesn't depend on the mean, with
    Student's t of M - 1 degrees of freedom. Two images are one pair.
    """
    mean, count = float(np.mean(values)), len(values)
    if count < 3:
        return none_for(mean)
    # With S_i the sum over i's pairs and T over all: without image i they are T - S_i in (M-1)(M-2)/2 pairs.
    sums = np.asarray(values) * (count - 1)
    without = (sums.sum() / 2 - sums) * 2 / ((count - 1) * (count - 2))
    centre, others = (np.arctanh(np.clip(each, -_NEARLY_ONE, _NEARLY_ONE)) for each in (mean, without))
    half = _t(count - 1) * _jackknife_error(others)
    return Interval(
        mean=mean, low=min(mean, math.tanh(centre - half)), high=max(mean, math.tanh(centre + half)), n=count
    )


def variance_interval(values: Sequence[float]) -> Interval:
    """Unbiased variance of n similarities, from values whose mean it is: squared deviations times n / (n - 1).

    A jackknife of its logarithm with Student's t (Miller 1974, section 3): it holds for other than normal values too,
    where the chi-squared interval does not. No variance of similarities is over 1.
    """
    variance, count = float(np.mean(values)), len(values)
    if count < 3:
        return none_for(variance)
    if variance <= 0:
        return Interval(mean=variance, low=variance, high=variance, n=count)
    squares = np.asarray(values) * (count - 1) / count
    without = (squares.sum() - squares * count / (count - 1)) / (count - 2)
    half = _t(count - 1) * _jackknife_error(np.log(np.maximum(without, 1e-6 * variance)))
    low, high = (variance * math.exp(min(sign * half, 700.0)) for sign in (-1, 1))
    return Interval(mean=variance, low=low, high=max(variance, min(1.0, high)), n=count)


def share_interval(values: Sequence[Sequence[float]]) -> Interval:
    """Mean over subjects of shares of their prompts, by Wilson's score interval (1927).

    For one subject n are its prompts; where a value is itself a share, of a prompt's images, that is on the safe side.
    Of several subjects the prompts are no independent answers: n becomes the effective number, by how much the
    subjects differ, corrected for their small number (Korn and Graubard 1998), and never fewer than they are.
    """
    count = sum(len(of_subject) for of_subject in values)
    means = [float(np.mean(of_subject)) for of_subject in values]
    share, subjects = float(np.mean(means)), len(means)
    effective = float(count)
    if 1 < subjects < count:
        variance = float(np.var(means, ddof=1)) / subjects
        if variance > 0:
            effective = min(effective, share * (1 - share) / variance)
        effective = max(effective * (_t(count - 1) / _t(subjects - 1)) ** 2, subjects)
    if count == 1:
        return none_for(share)
    low, high = _wilson(share, effective)
    return Interval(mean=share, low=low, high=high, n=count)


def _wilson(share: float, n: float) -> tuple[float, float]:
    """Ends of Wilson's score interval of a share of n answers.

    scipy's (`binomtest(...).proportion_ci`) takes whole counts alone; an effective n is none, nor is a sum of shares.
    """
    z = float(ndtri(_UPPER))
    centre = (share + z * z / (2 * n)) / (1 + z * z / n)
    half = z / (1 + z * z / n) * math.sqrt(share * (1 - share) / n + z * z / (4 * n * n))
    return max(0.0, min(share, centre - half)), min(1.0, max(share, centre + half))


def _t(degrees: int) -> float:
    return float(stdtrit(degrees, _UPPER))


def _jackknife_error(without: np.ndarray) -> float:
    """Standard error of an estimate, from the estimates with one observation left out each (Tukey 1958)."""
    return math.sqrt((len(without) - 1) * float(np.var(without)))
