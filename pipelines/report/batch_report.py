"""One page for a batch: a verdict on every subject, worst first, with figures, samples and curves."""

from collections import Counter
from collections.abc import Mapping, Sequence

from dreambooth.amounts import counted, duration
from pipelines.report.batch_result import BatchResult, SubjectResult
from pipelines.report.charts import losses_of_batch, scores_of_batch
from pipelines.report.evaluated import Evaluated
from pipelines.report.pages import Cell, Table, cell, number, picture, render
from pipelines.report.report_evaluation import (
    MOST_CELLS,
    addresses_of_grid,
    copies,
    figures_of_batch,
    grids_of_batch,
    nearest,
    sample_address,
)
from pipelines.report.retrieval import part_of
from pipelines.report.verdicts import Verdict, verdict_of_result, verdict_of_state
from pipelines.storage.pictures import read_pictures

SHOWN = 200
"""Most subjects whose pictures and curves are read for the page."""

_THUMBNAIL = 80  # pixels, shown at half of that for sharp screens
_PICTURED = 1000
"""Most subjects shown with a picture in their row."""
_CURVES = 40
"""Most curves in one chart, of the worst subjects."""
_COPIES = 24
_SIMILARITIES = {
    "identifier": "similarity",
    "class_before": "class before",
    "class_after": "class after",
    "instance": "instance",
}
_SHARES = {"near_copies": "near-copies", "prompts_followed": "prompts followed"}

_Judged = tuple[SubjectResult, Verdict]


def render_report(result: BatchResult) -> str:
    """The page as HTML; data is escaped."""
    judged = sorted(((subject, judge(subject)) for subject in result.subjects), key=_worst_first)
    evaluated = [subject.evaluated for subject, _ in judged if subject.evaluated is not None]
    histories = {subject.record.name: subject.history for subject, _ in judged if subject.history}
    scores = {subject.record.name: subject.scores for subject, _ in judged if subject.scores}
    pictures = read_pictures(_wanted(judged, shown := _shown(evaluated)))
    return render(
        "batch.html",
        title=result.name,
        lede=result.lede,
        verdicts=_counted([verdict for _, verdict in judged]),
        cures=_cures(judged),
        subjects=_subjects(judged, pictures),
        names=[verdict.name for _, verdict in judged],
        grids=grids_of_batch(shown, pictures),
        grids_left_out=_more(len(evaluated) - len(shown)),
        losses=losses_of_batch(dict(list(histories.items())[:_CURVES])),
        similarities=scores_of_batch(dict(list(scores.items())[:_CURVES])),
        losses_left_out=_more(len(histories) - _CURVES),
        figures=figures_of_batch(evaluated),
        retrieval=[part_of(bank) for bank in result.retrieved],
        copies=copies(shown, pictures, most=_COPIES),
        failed=[subject.record for subject, _ in judged if subject.record.state == "failed"],
        facts=result.facts,
        commands=result.commands,
    )


def _more(subjects: int) -> str:
    return counted(subjects, "more subject") if subjects > 0 else ""


def judge(subject: SubjectResult) -> Verdict:
    """The verdict on a subject of a batch."""
    if subject.record.state != "done":
        return verdict_of_state(subject.record.state, subject.record.reason)
    measured = subject.verdict is not None or bool(subject.figures) or bool(subject.warnings)
    return verdict_of_result(subject.warnings, similarity=subject.similarity, shares=subject.verdict, measured=measured)


def _worst_first(judged: _Judged) -> tuple[int, float, str]:
    subject, verdict = judged
    similarity = (subject.similarity or {}).get("identifier", 0.0)
    return verdict.rank, similarity, subject.record.name


def _counted(verdicts: Sequence[Verdict]) -> list[tuple[Verdict, int]]:
    """One verdict of each name, with how many there are, worst first."""
    counts = Counter(verdict.name for verdict in verdicts)
    return [(verdict, counts[verdict.name]) for verdict in {one.name: one for one in verdicts}.values()]


def _cures(judged: Sequence[_Judged]) -> list[tuple[Verdict, str]]:
    """What helps against each fault, once."""
    found = {verdict.name: (verdict, verdict.cure) for _, verdict in judged if verdict.cure}
    return list(found.values())


def _shown(evaluated: Sequence[Evaluated]) -> list[Evaluated]:
    """As many subjects as the grid of a page can hold."""
    cells = 0
    shown: list[Evaluated] = []
    for each in evaluated:
        cells += len(each.prompts)
        if cells > MOST_CELLS and shown:
            break
        shown.append(each)
    return shown


def _wanted(judged: Sequence[_Judged], shown: Sequence[Evaluated]) -> list[str]:
    """Addresses of the page's pictures: one sample of all, the grid, and the samples most like a photograph."""
    wanted = [subject.sample for subject, _ in judged[:_PICTURED] if subject.sample is not None]
    wanted += [address for each in shown for address in addresses_of_grid(each, images=1)]
    for each, pair in nearest(shown, most=_COPIES):
        wanted += [sample_address(each, pair), each.instance[pair.instance]]
    return wanted


def _subjects(judged: Sequence[_Judged], pictures: Mapping[str, bytes]) -> Table:
    """A row per subject; columns of similarities and shares only if measured."""
    similarities = list(_SIMILARITIES.items()) if any(subject.similarity for subject, _ in judged) else []
    shares = list(_SHARES.items()) if any(subject.verdict for subject, _ in judged) else []
    first, others = dict([*similarities[:1], *shares]), dict(similarities[1:])
    columns = ("subject", "verdict", *first.values(), "why", *others.values())
    return Table(
        title="Subjects",
        columns=(*columns, "class noun", "[V]", "steps/s", "time", "attempts", "registered"),
        rows=[
            _row(subject, verdict, list(first), list(others), pictures if place < _PICTURED else {})
            for place, (subject, verdict) in enumerate(judged)
        ],
    )


def _row(
    subject: SubjectResult,
    verdict: Verdict,
    first: Sequence[str],
    others: Sequence[str],
    pictures: Mapping[str, bytes],
) -> list[Cell]:
    record, values = subject.record, {**(subject.similarity or {}), **(subject.verdict or {})}
    content = pictures.get(subject.sample or "")
    seconds = record.ended - record.began if record.ended and record.began else None
    return [
        Cell(
            text=record.name,
            link=subject.page,
            picture=picture(content, side=_THUMBNAIL, alt="") if content is not None else None,
        ),
        cell(verdict.name, kind=f"word {verdict.kind}", value=verdict.rank),
        *(_share(values.get(name)) if name in _SHARES else number(values.get(name), 2) for name in first),
        cell(verdict.why, kind="why"),
        *(number(values.get(name), 2) for name in others),
        cell(record.class_noun),
        cell(record.identifier),
        number(subject.steps_per_second, 1),
        number(None, 0) if seconds is None else cell(duration(seconds), kind="n", value=seconds),
        number(record.attempts, 0),
        cell(subject.registered or "–"),
    ]


def _share(value: float | None) -> Cell:
    return number(None, 0) if value is None else cell(f"{value:.0%}", kind="n", value=value)
