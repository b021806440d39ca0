"""Tables and findings of `dreambooth paper`, from the evaluation.json of every run."""

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any, Literal

from dreambooth.evaluation.bootstrap import Interval
from dreambooth.evaluation.figures import BankId, Figures, column, difference, figures_from, one_bank
from pipelines.apps.paper.rows import COLUMN_TITLES, Claim, Experiment, Row
from pipelines.apps.paper.trials import Trial

Verdict = Literal["came out", "undecided", "did not come out", "not measured"]


@dataclass(frozen=True, kw_only=True)
class Finding:
    """A claim and its measured difference, paired by subject and prompt; None without both rows."""

    claim: Claim
    difference: Interval | None

    @property
    def verdict(self) -> Verdict:
        """The verdict by the interval: undecided if it contains 0, or if there is none."""
        if self.difference is None:
            return "not measured"
        if self.difference.n == 1:
            return "undecided"
        if self.difference.low > 0:
            return "came out"
        return "did not come out" if self.difference.high < 0 else "undecided"

    @property
    def sentence(self) -> str:
        """The claim, the verdict and the figures in words."""
        if self.difference is None:
            return f"{self.claim.sentence}: not measured."
        what = COLUMN_TITLES[self.claim.column].rstrip(" ↑↓")
        mean, low, high = self.difference.mean, self.difference.low, self.difference.high
        ends = f" ({low:+.3f} to {high:+.3f})" if self.difference.n > 1 else ""
        return f"{self.claim.sentence}: {self.verdict}; the difference in {what} is {mean:+.3f}{ends}."


@dataclass(frozen=True, kw_only=True)
class Table:
    """An experiment's figures: `cells` by (slug of the row, column), None where not measured."""

    experiment: Experiment
    cells: Mapping[tuple[str, str], Interval | None]
    subjects: Mapping[str, tuple[str, ...]]  # of each row, by its slug
    findings: tuple[Finding, ...]


def make_tables(
    trials: Sequence[Trial], evaluations: Mapping[str, Mapping[str, Any]]
) -> tuple[tuple[Table, ...], BankId]:
    """Tables of all experiments, and the bank that measured them; `evaluations` by the key of the run's plan.

    Raises InputError for no evaluations, or evaluations by different banks.
    """
    figures = {key: figures_from(evaluation) for key, evaluation in evaluations.items()}
    bank = one_bank([each.bank for each in figures.values()])
    experiments = {trial.experiment.name: trial.experiment for trial in trials}
    return tuple(_table(experiment, trials, figures) for experiment in experiments.values()), bank


def as_records(tables: Sequence[Table]) -> list[dict[str, Any]]:
    """One record per cell (table, row, column, mean, low, high, n), and one per finding with its sentence."""
    return [
        {"table": table.experiment.name, "row": row.title, "column": name} | asdict(interval)
        for table in tables
        for row in table.experiment.rows
        for name in table.experiment.columns
        if (interval := table.cells[row.slug, name]) is not None
    ]


def findings_as_records(tables: Sequence[Table]) -> list[dict[str, Any]]:
    """One record per claim: table, verdict, difference and sentence."""
    return [
        {
            "table": table.experiment.name,
            "claim": finding.claim.sentence,
            "verdict": finding.verdict,
            "difference": None if finding.difference is None else asdict(finding.difference),
            "sentence": finding.sentence,
        }
        for table in tables
        for finding in table.findings
    ]


def _table(experiment: Experiment, trials: Sequence[Trial], figures: Mapping[str, Figures]) -> Table:
    measured: dict[str, dict[str, Figures]] = {row.slug: {} for row in experiment.rows}
    for trial in trials:
        if trial.experiment.name == experiment.name and trial.plan.key in figures:
            measured[trial.row.slug][trial.subject] = figures[trial.plan.key]
    rows = {row.slug: row for row in experiment.rows}
    return Table(
        experiment=experiment,
        cells={
            (row.slug, name): _cell(row, name, list(measured[row.slug].values()))
            for row in experiment.rows
            for name in experiment.columns
        },
        subjects={slug: tuple(of_row) for slug, of_row in measured.items()},
        findings=tuple(
            Finding(claim=claim, difference=_difference(claim, rows, measured)) for claim in experiment.claims
        ),
    )


def _read(row: Row, name: str) -> str | None:
    return row.reads.get(name, name)


def _cell(row: Row, name: str, subjects: Sequence[Figures]) -> Interval | None:
    figure = _read(row, name)
    return column(figure, subjects) if figure is not None and subjects else None


def _difference(
    claim: Claim, rows: Mapping[str, Row], measured: Mapping[str, Mapping[str, Figures]]
) -> Interval | None:
    """The difference of two rows over their common subjects."""
    shared = [subject for subject in measured[claim.higher] if subject in measured[claim.lower]]
    if not shared:
        return None
    first, second = (
        [(str(_read(rows[slug], claim.column)), measured[slug][subject]) for subject in shared]
        for slug in (claim.higher, claim.lower)
    )
    return difference(first, second)
