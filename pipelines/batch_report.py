"""One page for a batch: how its subjects stand, their figures, and their pictures beside each other."""

from collections import Counter
from collections.abc import Sequence
from html import escape

from pipelines.batch_result import BatchResult, SubjectResult
from pipelines.evaluated import Evaluated, read_pictures
from pipelines.report_evaluation import (
    MOST_CELLS,
    addresses_of_grid,
    copies,
    figures_of_batch,
    grid_of_batch,
    nearest,
    sample_address,
    warnings_of,
)
from pipelines.report_page import cell, facts, loss_curve, note, number, picture, render_page, section, table
from pipelines.tasks import STATES

SHOWN = 200
"""Of how many subjects pictures and curves are shown: a page of thousands would not open."""

_SHEET_WIDTH = 900
_COPIES = 24
_SIMILARITIES = {
    "identifier": "similarity",
    "class_before": "class before",
    "class_after": "class after",
    "instance": "instance",
}


def render_report(result: BatchResult) -> str:
    """The page as HTML; everything that comes from data is escaped."""
    counts = Counter(subject.record.state for subject in result.subjects)
    states = "".join(f'<li class="{state}"><b>{counts[state]}</b> {state}</li>' for state in STATES if counts[state])
    shown = result.subjects[:SHOWN]
    more = len(result.subjects) - len(shown)
    evaluated = [subject.evaluated for subject in result.subjects if subject.evaluated is not None]
    figures = "".join(_figure(subject) for subject in shown if subject.contact_sheet or subject.history)
    return render_page(
        result.name,
        f'<ul class="states">{states}</ul>',
        facts(result.facts),
        warnings_of(evaluated),
        section("Subjects", _subjects(result.subjects)),
        _failures([subject for subject in result.subjects if subject.record.state == "failed"]),
        figures_of_batch(evaluated),
        _pictures(evaluated),
        section(
            "Contact sheets and curves",
            f'<div class="grid">{figures}</div>',
            note(f"Pictures and curves of {more} more subjects are in their own folders.") if more else "",
        ),
    )


def _pictures(evaluated: Sequence[Evaluated]) -> str:
    """The grid of as many subjects as a page can hold, and of those the samples that are most like a photograph."""
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
    more = len(evaluated) - len(shown)
    left_out = note(f"{more} more subjects have pages of their own, in their folders.") if more else ""
    return grid_of_batch(shown, pictures) + left_out + copies(shown, pictures, most=_COPIES)


def _subjects(subjects: Sequence[SubjectResult]) -> str:
    """A row for each; no columns of similarities where nothing was measured."""
    measured = _SIMILARITIES if any(subject.similarity for subject in subjects) else {}
    columns = (
        "subject",
        "class noun",
        "[V]",
        "state",
        *measured.values(),
        "steps/s",
        "seconds",
        "attempts",
        "registered",
    )
    return table(columns, [_row(subject, list(measured)) for subject in subjects])


def _row(subject: SubjectResult, similarities: Sequence[str]) -> list[str]:
    record, similarity = subject.record, subject.similarity or {}
    seconds = record.ended - record.began if record.ended and record.began else None
    return [
        cell(record.name),
        cell(record.class_noun),
        cell(record.identifier),
        cell(record.state, kind=record.state),
        *(number(similarity.get(name), 2) for name in similarities),
        number(subject.steps_per_second, 1),
        number(seconds, 0),
        number(record.attempts, 0),
        cell(subject.registered or "–"),
    ]


def _failures(failed: Sequence[SubjectResult]) -> str:
    parts = []
    for subject in failed:
        record = subject.record
        trace = f"<details><summary>traceback</summary><pre>{escape(record.traceback or '')}</pre></details>"
        parts.append(
            f"<article><h3>{escape(record.name)}</h3><p>{escape(record.reason or 'no reason is known')}</p>"
            f"{trace if record.traceback else ''}</article>"
        )
    return section("Failures", *parts)


def _figure(subject: SubjectResult) -> str:
    name = escape(subject.record.name)
    sheet = ""
    if subject.contact_sheet is not None:
        image = picture(subject.contact_sheet, side=_SHEET_WIDTH, alt=f"contact sheet of {subject.record.name}")
        sheet = f'<a id="{name}" href="#{name}">{image}</a>'
    return f"<figure><figcaption>{name}</figcaption>{sheet}{loss_curve(subject.history)}</figure>"
