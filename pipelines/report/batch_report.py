"""One page for a batch: states, figures and pictures of its subjects."""

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from pipelines.report.batch_result import BatchResult, SubjectResult
from pipelines.report.evaluated import Evaluated, read_pictures
from pipelines.report.pages import Cell, Chart, Picture, Table, cell, loss_chart, number, picture, render
from pipelines.report.report_evaluation import (
    MOST_CELLS,
    addresses_of_grid,
    copies,
    figures_of_batch,
    grids_of_batch,
    nearest,
    sample_address,
    warnings_of,
)
from pipelines.tasks import STATES

SHOWN = 200
"""Most subjects shown with pictures and curves: a page of thousands would not open."""

_SHEET_WIDTH = 900
_COPIES = 24
_SIMILARITIES = {
    "identifier": "similarity",
    "class_before": "class before",
    "class_after": "class after",
    "instance": "instance",
}
_SHARES = {"near_copies": "near-copies", "prompts_followed": "prompts followed"}


def render_report(result: BatchResult) -> str:
    """The page as HTML; data is escaped."""
    counts = Counter(subject.record.state for subject in result.subjects)
    shown = result.subjects[:SHOWN]
    evaluated = [subject.evaluated for subject in result.subjects if subject.evaluated is not None]
    return render(
        "batch.html",
        title=result.name,
        states=[(state, counts[state]) for state in STATES if counts[state]],
        facts=result.facts,
        warnings=warnings_of(evaluated),
        subjects=_subjects(result.subjects),
        failed=[subject.record for subject in result.subjects if subject.record.state == "failed"],
        figures=figures_of_batch(evaluated),
        **_pictures(evaluated),
        sheets=[_sheet(subject) for subject in shown if subject.contact_sheet or subject.history],
        sheets_left_out=len(result.subjects) - len(shown),
    )


def _pictures(evaluated: Sequence[Evaluated]) -> dict[str, Any]:
    """Grids of as many subjects as a page can hold, and their samples most like a photograph."""
    cells = 0
    shown: list[Evaluated] = []
    for each in evaluated:
        cells += len(each.prompts)
        if cells > MOST_CELLS and shown:
            break
        shown.append(each)
    wanted = [address for each in shown for address in addresses_of_grid(each, images=1)]
    for each, pair in nearest(shown, most=_COPIES):
        wanted += [sample_address(each, pair), each.instance[pair.instance]]
    pictures = read_pictures(wanted)
    return {
        "grids": grids_of_batch(shown, pictures),
        "grids_left_out": len(evaluated) - len(shown),
        "copies": copies(shown, pictures, most=_COPIES),
    }


def _subjects(subjects: Sequence[SubjectResult]) -> Table:
    """A row per subject; columns of similarities and shares only if measured."""
    measured = _SIMILARITIES if any(subject.similarity for subject in subjects) else {}
    judged = _SHARES if any(subject.verdict for subject in subjects) else {}
    columns = (
        "subject",
        "class noun",
        "[V]",
        "state",
        *measured.values(),
        *judged.values(),
        "steps/s",
        "seconds",
        "attempts",
        "registered",
    )
    return Table(columns=columns, rows=[_row(subject, [*measured, *judged]) for subject in subjects])


def _row(subject: SubjectResult, measured: Sequence[str]) -> list[Cell]:
    record, values = subject.record, {**(subject.similarity or {}), **(subject.verdict or {})}
    seconds = record.ended - record.began if record.ended and record.began else None
    return [
        cell(record.name),
        cell(record.class_noun),
        cell(record.identifier),
        cell(record.state, kind=record.state),
        *(number(values.get(name), 2) for name in measured),
        number(subject.steps_per_second, 1),
        number(seconds, 0),
        number(record.attempts, 0),
        cell(subject.registered or "–"),
    ]


@dataclass(frozen=True, kw_only=True)
class _Sheet:
    name: str
    sheet: Picture | None
    curve: Chart | None


def _sheet(subject: SubjectResult) -> _Sheet:
    name, content = subject.record.name, subject.contact_sheet
    return _Sheet(
        name=name,
        sheet=picture(content, side=_SHEET_WIDTH, alt=f"contact sheet of {name}") if content is not None else None,
        curve=loss_chart(subject.history),
    )
