"""Figures of one subject's evaluation with their bank, and columns over many subjects.

Figures of two banks are never combined: `column` raises for them.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

from dreambooth.errors import InputError
from dreambooth.evaluation.bootstrap import SEED, Interval, bootstrap_difference, bootstrap_mean
from dreambooth.evaluation.intervals import pairs_interval, share_interval, t_interval, variance_interval

FIGURE_NAMES = (
    "dino",
    "clip_i",
    "dino_subject",
    "dino_subject_patches",
    "clip_t",
    "clip_t_no_identifier",
    "clip_t_base",
    "pres",
    "pres_base",
    "div",
    "real_dino",
    "real_clip_i",
    "context_variance",
    "prompts_followed",
    "prompts_apart",
    "near_copies",
    "nearest_dino",
    "background_leak",
    "dinov2",
    "dinov2_subject_patches",
    "real_dinov2",
    "dreamsim",
    "real_dreamsim",
)
"""All figures; docs/metrics.md explains each. The last five are of encoders beside a bank's."""

PAIRS = frozenset(("real_dino", "real_clip_i", "real_dinov2", "real_dreamsim"))
VARIANCES = frozenset(("context_variance",))
SHARES = frozenset(("prompts_followed", "prompts_apart", "near_copies"))
"""Figures that aren't means of independent values, by kind."""
_RANGES = {"div": (0.0, math.inf), "background_leak": (-math.inf, math.inf)}
"""Ranges of figures that aren't similarities from -1 to 1."""


def interval_of(name: str, subjects: Sequence[Sequence[float]], *, seed: int = SEED) -> Interval:
    """A figure's interval over subjects, each counting alike, from the values of each; over one subject's alone.

    docs/metrics.md says how each is made, and how often it holds what it should.
    """
    if name in SHARES:
        return share_interval(subjects)
    if name in PAIRS | VARIANCES:
        if len(subjects) == 1:
            return pairs_interval(subjects[0]) if name in PAIRS else variance_interval(subjects[0])
        return bootstrap_mean([[sum(values) / len(values)] for values in subjects], seed=seed)
    if len(subjects) == 1:
        lowest, highest = _RANGES.get(name, (-1.0, 1.0))
        return t_interval(subjects[0], lowest=lowest, highest=highest)
    return bootstrap_mean(subjects, seed=seed)


@dataclass(frozen=True, kw_only=True)
class BankId:
    """Identity of a bank, or of an encoder beside it: its name, and the hash of its weights and transforms."""

    name: str
    hash: str

    def __str__(self) -> str:
        """Name and hash in one word."""
        return f"{self.name}@{self.hash}"


@dataclass(frozen=True, kw_only=True)
class Figure:
    """One figure: its bank, its interval and the values that is over (of prompts, or of images where docs say so)."""

    bank: BankId
    interval: Interval
    values: tuple[float, ...]


@dataclass(frozen=True, kw_only=True)
class PromptRow:
    """The figures of one prompt, each a mean over its samples; None where it wasn't measured."""

    prompt: str
    application: str
    dino: float
    clip_i: float | None
    clip_t: float | None
    clip_t_no_identifier: float | None
    clip_t_base: float | None
    followed: bool | None  # at least half as closely as by the base model
    div: float | None
    background_leak: float | None
    near_copies: float


@dataclass(frozen=True, kw_only=True)
class NearestInstance:
    """The instance image most like a sample, by DINO. `sample` counts all samples, prompt after prompt."""

    sample: int
    prompt: str
    instance: int
    similarity: float
    near_copy: bool


@dataclass(frozen=True, kw_only=True)
class Figures:
    """Everything measured of one subject's model, by `bank` and by encoders beside it."""

    bank: BankId
    figures: Mapping[str, Figure]
    per_prompt: tuple[PromptRow, ...]
    nearest: tuple[NearestInstance, ...]
    warnings: tuple[str, ...]
    unmeasured: Mapping[str, str]  # by the figure's name: why it is missing

    @property
    def means(self) -> dict[str, float]:
        """Every figure's mean."""
        return {name: figure.interval.mean for name, figure in self.figures.items()}

    @property
    def banks(self) -> tuple[BankId, ...]:
        """The bank, and the encoders beside it that measured any of the figures."""
        return tuple(dict.fromkeys((self.bank, *(figure.bank for figure in self.figures.values()))))

    def as_dict(self) -> dict[str, Any]:
        """Plain data for JSON; `figures_from` is the inverse. Figures of encoders beside the bank name theirs."""
        return {
            "bank": asdict(self.bank),
            "figures": {
                name: {**asdict(figure.interval), "values": list(figure.values)}
                | ({} if figure.bank == self.bank else {"bank": asdict(figure.bank)})
                for name, figure in self.figures.items()
            },
            "per_prompt": [asdict(row) for row in self.per_prompt],
            "nearest": [asdict(pair) for pair in self.nearest],
            "warnings": list(self.warnings),
            "unmeasured": dict(self.unmeasured),
        }


def figures_from(content: Mapping[str, Any]) -> Figures:
    """Figures as `as_dict` wrote them; keys of others, such as the subject's name, are passed over.

    Intervals of figures that aren't plain means are made again: earlier versions took their values for independent.
    """
    bank = BankId(**content["bank"])
    return Figures(
        bank=bank,
        figures={
            name: Figure(
                bank=BankId(**figure["bank"]) if "bank" in figure else bank,
                interval=interval_of(name, [figure["values"]])
                if name in PAIRS | VARIANCES | SHARES
                else Interval(**{end: figure[end] for end in ("mean", "low", "high", "n")}),
                values=tuple(figure["values"]),
            )
            for name, figure in content["figures"].items()
        },
        per_prompt=tuple(PromptRow(**row) for row in content["per_prompt"]),
        nearest=tuple(NearestInstance(**pair) for pair in content["nearest"]),
        warnings=tuple(content["warnings"]),
        unmeasured=dict(content["unmeasured"]),
    )


def by_bank(content: Mapping[str, Any]) -> list[tuple[BankId, dict[str, Any]]]:
    """Figures of plain data as `as_dict` wrote it, apart by what measured them, those of the bank first."""
    own = BankId(**content["bank"])
    found: dict[BankId, dict[str, Any]] = {own: {}}
    for name, figure in content["figures"].items():
        found.setdefault(BankId(**figure["bank"]) if "bank" in figure else own, {})[name] = figure
    return list(found.items())


def column(name: str, subjects: Sequence[Figures], *, seed: int = SEED) -> Interval:
    """One figure over several subjects, each counting alike (`interval_of`).

    Raises InputError for figures of different banks, for no subjects, and where a subject lacks the figure.
    """
    for position, figures in enumerate(subjects):
        if name not in figures.figures:
            why = figures.unmeasured.get(name, "there is no such figure")
            raise InputError(f"subject {position} of {len(subjects)} has no figure {name!r}: {why}")
    one_bank([figures.figures[name].bank for figures in subjects])
    return interval_of(name, [figures.figures[name].values for figures in subjects], seed=seed)


def difference(first: Sequence[tuple[str, Figures]], second: Sequence[tuple[str, Figures]]) -> Interval:
    """Mean of first - second, paired by subject, and by prompt where both are the same figure of as many prompts.

    Each is (name of a figure, the subject's figures). Where shares of prompts never differ, the ends are Newcombe's
    (1998, method 10) from those of both shares: a bootstrap of zeros would be sure.
    """
    one, other = ([list(figures.figures[name].values) for name, figures in side] for side in (first, second))
    names = {name for name, _ in (*first, *second)}
    by_prompt = len(names) == 1 and not names <= PAIRS | VARIANCES and [len(a) for a in one] == [len(b) for b in other]
    if not by_prompt:
        one, other = ([[sum(values) / len(values)] for values in side] for side in (one, other))
    if len(one) == 1:
        found = t_interval([a - b for a, b in zip(one[0], other[0], strict=True)], lowest=-2.0, highest=2.0)
    else:
        found = bootstrap_difference(one, other)
    if not (names <= SHARES and found.low == found.high and found.n > 1):
        return found
    a, b = share_interval(one), share_interval(other)
    return Interval(
        mean=found.mean,
        low=found.mean - math.hypot(a.mean - a.low, b.high - b.mean),
        high=found.mean + math.hypot(a.high - a.mean, b.mean - b.low),
        n=found.n,
    )


def one_bank(banks: Sequence[BankId]) -> BankId:
    """The bank of all of them. Raises InputError for more than one: their figures can't stand in one column."""
    different = sorted({str(bank) for bank in banks})
    if len(different) != 1:
        raise InputError(
            f"figures of one bank can stand in a column, got {' and '.join(different) or 'none'}; "
            f"measure all of them with one bank"
        )
    return banks[0]
