"""How often does each kind of interval hold the truth? As often as docs/metrics.md says, in the same simulations.

And known answers: Wilson's against SciPy's, the jackknives against leaving one out by hand.
"""

import re
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from scipy.stats import binomtest, ttest_1samp

import dreambooth
from dreambooth.evaluation.bootstrap import Interval, bootstrap_mean
from dreambooth.evaluation.figures import FIGURE_NAMES, PAIRS, SHARES, VARIANCES, interval_of
from dreambooth.evaluation.intervals import pairs_interval, share_interval, t_interval, variance_interval
from dreambooth.evaluation.measure import _among_themselves, _squared_deviations

DOCS = Path(dreambooth.__file__).parents[1] / "docs" / "metrics.md"
MANY, SOME = 1000, 250
RESAMPLES = 500

Simulation = Iterator[tuple[Interval, float]]


def documented() -> dict[str, float]:
    """Coverage in percent by simulation, from the table in the documentation."""
    rows = re.findall(r"^\|[^|\n]*\| ([^|\n]+) \| (\d+) \|$", DOCS.read_text(), re.MULTILINE)
    return {simulation.strip(): int(percent) / 100 for simulation, percent in rows}


def spread(rng: np.random.Generator, shape: tuple[int, ...], *, skewed: bool = False) -> np.ndarray:
    """Values with mean 0 and standard deviation 1."""
    return rng.exponential(size=shape) - 1 if skewed else rng.normal(size=shape)


def prompts(rng: np.random.Generator, count: int, *, skewed: bool = False) -> Simulation:
    for values in 0.5 + 0.1 * spread(rng, (MANY, count), skewed=skewed):
        yield interval_of("clip_t", [values.tolist()]), 0.5


def subjects(rng: np.random.Generator, count: int, *, skewed: bool = False) -> Simulation:
    """Subjects differ as much as prompts do, 25 prompts each; differences of two rows are the same, around 0."""
    for _ in range(SOME):
        own = spread(rng, (count, 1), skewed=skewed)
        values = 0.1 * (own + spread(rng, (count, 25), skewed=skewed))
        yield bootstrap_mean(values.tolist(), resamples=RESAMPLES), 0.0


def photographs(rng: np.random.Generator, count: int, *, unequal: bool = False, of_subjects: int = 1) -> Simulation:
    """Embeddings around the subject's; with `unequal` some photographs lie much further off than others."""

    def drawn(*shape: int) -> torch.Tensor:
        size = 0.5 * np.exp(0.7 * rng.normal(size=(*shape, 1))) if unequal else 0.5
        around = size * rng.normal(size=(*shape, 16)) / 4
        return torch.from_numpy(np.concatenate([np.ones((*shape, 1)), around], axis=-1))

    many = torch.nn.functional.normalize(drawn(200, 100), dim=-1)
    truth = float(((many @ many.mT).sum() / 200 - 100) / (100 * 99))
    for sets in drawn(MANY if of_subjects == 1 else SOME, of_subjects, count):
        yield interval_of("real_dino", [_values(_among_themselves(real)) for real in sets]), truth


def variances(rng: np.random.Generator, count: int, *, skewed: bool = False) -> Simulation:
    for values in 0.7 + 0.1 * spread(rng, (MANY, count), skewed=skewed):
        yield interval_of("context_variance", [_values(_squared_deviations(values.tolist()))]), 0.01


def shares(
    rng: np.random.Generator,
    share: float,
    *,
    count: int = 25,
    alike: float = 0.0,
    of_subjects: int = 1,
    images: int = 1,
) -> Simulation:
    """Prompts that count or don't, `alike` by the correlation within a subject (of one: within a prompt's images)."""
    shape = (MANY, of_subjects, 1 if of_subjects > 1 else count)
    each: Any = share
    if alike:
        each = rng.beta(share * (1 - alike) / alike, (1 - share) * (1 - alike) / alike, shape)
    counted = rng.binomial(images, np.broadcast_to(each, (MANY, of_subjects, count))) / images
    for values in counted:
        yield interval_of("near_copies", values.tolist()), share


SIMULATIONS: dict[str, Callable[[np.random.Generator], Simulation]] = {
    "25 prompts": lambda rng: prompts(rng, 25),
    "5 prompts": lambda rng: prompts(rng, 5),
    "25 prompts, skewed": lambda rng: prompts(rng, 25, skewed=True),
    "5 prompts, skewed": lambda rng: prompts(rng, 5, skewed=True),
    "2 subjects": lambda rng: subjects(rng, 2),
    "3 subjects": lambda rng: subjects(rng, 3),
    "5 subjects": lambda rng: subjects(rng, 5),
    "10 subjects": lambda rng: subjects(rng, 10),
    "10 subjects, skewed": lambda rng: subjects(rng, 10, skewed=True),
    "3 photographs": lambda rng: photographs(rng, 3),
    "5 photographs": lambda rng: photographs(rng, 5),
    "10 photographs": lambda rng: photographs(rng, 10),
    "3 unequal photographs": lambda rng: photographs(rng, 3, unequal=True),
    "5 unequal photographs": lambda rng: photographs(rng, 5, unequal=True),
    "10 subjects of 5 unequal photographs": lambda rng: photographs(rng, 5, unequal=True, of_subjects=10),
    "variance over 25 prompts": lambda rng: variances(rng, 25),
    "variance over 5 prompts": lambda rng: variances(rng, 5),
    "variance over 25 prompts, skewed": lambda rng: variances(rng, 25, skewed=True),
    "2 % of 25 prompts": lambda rng: shares(rng, 0.02),
    "20 % of 25 prompts": lambda rng: shares(rng, 0.2),
    "50 % of 5 prompts": lambda rng: shares(rng, 0.5, count=5),
    "20 % of 25 prompts, 4 images each": lambda rng: shares(rng, 0.2, alike=0.5, images=4),
    "5 % of 25 prompts, 3 subjects": lambda rng: shares(rng, 0.05, alike=0.05, of_subjects=3),
    "20 % of 25 prompts, 10 subjects": lambda rng: shares(rng, 0.2, alike=0.05, of_subjects=10),
    "20 % of 25 prompts, 10 subjects that differ much": lambda rng: shares(rng, 0.2, alike=0.3, of_subjects=10),
    "5 % of 25 prompts, 10 subjects that differ much": lambda rng: shares(rng, 0.05, alike=0.3, of_subjects=10),
}


def _values(values: list[float] | str) -> list[float]:
    assert not isinstance(values, str)
    return values


def coverage(name: str) -> float:
    held = [interval.low <= truth <= interval.high for interval, truth in SIMULATIONS[name](np.random.default_rng(1))]
    return sum(held) / len(held)


@pytest.mark.parametrize("name", SIMULATIONS)
def test_it_holds_the_truth_as_often_as_the_documentation_says(name: str) -> None:
    assert coverage(name) == pytest.approx(documented()[name], abs=0.025)


def test_every_simulation_of_the_documentation_is_run() -> None:
    assert documented().keys() == SIMULATIONS.keys()


@pytest.mark.parametrize("name", FIGURE_NAMES)
def test_every_figure_has_an_interval_around_it(name: str) -> None:
    values = [0.25, 0.5, 0.5, 0.75, 0.0, 0.25]
    for of_subjects in ([values], [values, values[:5]]):
        interval = interval_of(name, of_subjects)
        mean = np.mean([np.mean(of_subject) for of_subject in of_subjects])
        assert interval.mean == pytest.approx(mean)
        assert interval.low < interval.mean < interval.high
    one = interval_of(name, [[0.5]])
    assert (one.low, one.mean, one.high, one.n) == (0.5, 0.5, 0.5, 1)
    assert set(FIGURE_NAMES) > PAIRS | SHARES | VARIANCES


class TestKnownAnswers:
    @pytest.mark.parametrize(("count", "n"), [(0, 25), (25, 25), (1, 25), (12, 25), (0, 1), (1, 2), (3, 10)])
    def test_shares_of_one_subject_are_wilsons(self, count: int, n: int) -> None:
        ends = binomtest(count, n).proportion_ci(method="wilson")
        interval = share_interval([[1.0] * count + [0.0] * (n - count)])
        if n == 1:
            assert interval.ends == ""
        else:
            assert (interval.low, interval.high) == pytest.approx((ends.low, ends.high), abs=1e-9)

    @pytest.mark.parametrize("subjects", [1, 2, 3, 10])
    @pytest.mark.parametrize("value", [0.0, 1.0])
    def test_none_or_all_is_not_certain(self, subjects: int, value: float) -> None:
        interval = share_interval([[value] * 25] * subjects)
        assert interval.mean == value
        assert 0.0 < interval.high - interval.low < 1.0

    def test_means_of_one_subject_are_students(self) -> None:
        values = np.random.default_rng(0).normal(0.5, 0.1, 7).tolist()
        ends = ttest_1samp(values, 0).confidence_interval(0.95)
        interval = t_interval(values)
        assert (interval.low, interval.high) == pytest.approx((ends.low, ends.high))

    def test_no_similarity_is_over_one(self) -> None:
        assert t_interval([0.99, 0.7, 0.98]).high == 1.0
        assert pairs_interval([0.9, 0.99, 0.5]).high <= 1.0

    @pytest.mark.parametrize("count", [3, 4, 7])
    def test_the_jackknife_of_pairs_leaves_out_an_image_with_all_its_pairs(self, count: int) -> None:
        real = torch.from_numpy(np.random.default_rng(0).normal(1, 0.7, (count, 5)))

        def mean(images: torch.Tensor) -> float:
            unit = torch.nn.functional.normalize(images, dim=1)
            return float((unit @ unit.T).sum() - len(images)) / (len(images) * (len(images) - 1))

        without = [np.arctanh(mean(torch.cat([real[:i], real[i + 1 :]]))) for i in range(count)]
        error = ((count - 1) / count * np.sum((without - np.mean(without)) ** 2)) ** 0.5
        interval = pairs_interval(_values(_among_themselves(real)))
        width = np.arctanh(interval.high) - np.arctanh(interval.mean)
        assert interval.mean == pytest.approx(mean(real))
        assert width / error == pytest.approx({3: 4.3027, 4: 3.1824, 7: 2.4469}[count], rel=1e-4)

    def test_the_jackknife_of_a_variance_leaves_out_a_value(self) -> None:
        values = [0.5, 0.7, 0.65, 0.9]
        without = np.log([np.var(values[:i] + values[i + 1 :], ddof=1) for i in range(4)])
        error = (3 / 4 * np.sum((without - np.mean(without)) ** 2)) ** 0.5
        interval = variance_interval(_values(_squared_deviations(values)))
        assert interval.mean == pytest.approx(np.var(values, ddof=1))
        assert np.log(interval.mean / interval.low) / error == pytest.approx(3.1824, rel=1e-4)
        assert interval.high == pytest.approx(min(1.0, interval.mean**2 / interval.low))

    @pytest.mark.parametrize("interval", [pairs_interval, variance_interval])
    def test_two_are_too_few(self, interval: Callable[[list[float]], Interval]) -> None:
        assert interval([0.5, 0.5]) == Interval(mean=0.5, low=0.5, high=0.5, n=1)
