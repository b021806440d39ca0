"""One page for a batch: self-contained, readable on a phone, and without a script but for sorting the table."""

import base64
import io
from collections import Counter
from collections.abc import Mapping, Sequence
from html import escape
from pathlib import Path
from string import Template

from PIL import Image

from pipelines.batch_result import BatchResult, SubjectResult
from pipelines.subject_record import STATES

SHOWN = 200
"""Of how many subjects pictures and curves are shown: a page of thousands would not open."""

_PAGE = Path(__file__).with_name("batch_report.html")
_SHEET_WIDTH = 900
_POINTS = 160
_CURVES = (("loss", "total"), ("instance_loss", "instance"), ("prior_loss", "prior"))
_COLUMNS = (
    "subject",
    "class noun",
    "[V]",
    "state",
    "similarity",
    "class before",
    "class after",
    "instance",
    "steps/s",
    "seconds",
    "attempts",
    "registered",
)


def render_report(result: BatchResult) -> str:
    """The page as HTML; everything that comes from data is escaped."""
    counts = Counter(subject.record.state for subject in result.subjects)
    shown = result.subjects[:SHOWN]
    more = len(result.subjects) - len(shown)
    return Template(_PAGE.read_text()).substitute(
        name=escape(result.name),
        states="".join(f'<li class="{state}"><b>{counts[state]}</b> {state}</li>' for state in STATES if counts[state]),
        facts="".join(f"<dt>{escape(what)}</dt><dd>{escape(value)}</dd>" for what, value in result.facts),
        head="".join(f"<th tabindex=0>{column}</th>" for column in _COLUMNS),
        rows="".join(_row(subject) for subject in result.subjects),
        failures=_failures([subject for subject in result.subjects if subject.record.state == "failed"]),
        subjects="".join(_figure(subject) for subject in shown if subject.contact_sheet or subject.history),
        more=f"<p>Pictures and curves of {more} more subjects are in their own folders.</p>" if more else "",
    )


def _row(subject: SubjectResult) -> str:
    record, similarity = subject.record, subject.similarity or {}
    seconds = record.ended - record.began if record.ended and record.began else None
    figures = [similarity.get(name) for name in ("identifier", "class_before", "class_after", "instance")]
    cells = [
        _cell(record.name),
        _cell(record.class_noun),
        _cell(record.identifier),
        f'<td class="{record.state}">{record.state}</td>',
        *(_number(figure, 2) for figure in figures),
        _number(subject.steps_per_second, 1),
        _number(seconds, 0),
        _number(record.attempts, 0),
        _cell(subject.registered or "–"),
    ]
    return f"<tr>{''.join(cells)}</tr>"


def _cell(text: str) -> str:
    return f"<td>{escape(text)}</td>"


def _number(value: float | None, digits: int) -> str:
    return "<td class=n>–</td>" if value is None else f'<td class=n data-v="{value}">{value:.{digits}f}</td>'


def _failures(failed: Sequence[SubjectResult]) -> str:
    parts = []
    for subject in failed:
        record = subject.record
        trace = f"<details><summary>traceback</summary><pre>{escape(record.traceback or '')}</pre></details>"
        parts.append(
            f"<article><h3>{escape(record.name)}</h3><p>{escape(record.reason or 'no reason is known')}</p>"
            f"{trace if record.traceback else ''}</article>"
        )
    return f"<section><h2>Failures</h2>{''.join(parts)}</section>" if parts else ""


def _figure(subject: SubjectResult) -> str:
    name = escape(subject.record.name)
    sheet = ""
    if subject.contact_sheet is not None:
        source = _picture(subject.contact_sheet)
        sheet = f'<a href="#{name}"><img id="{name}" loading="lazy" alt="contact sheet of {name}" src="{source}"></a>'
    return f"<figure><figcaption>{name}</figcaption>{sheet}{_curve(subject.history)}</figure>"


def _picture(png: bytes) -> str:
    image = Image.open(io.BytesIO(png)).convert("RGB")
    image.thumbnail((_SHEET_WIDTH, 10 * _SHEET_WIDTH))
    buffer = io.BytesIO()
    image.save(buffer, format="WEBP", quality=80)
    return f"data:image/webp;base64,{base64.b64encode(buffer.getvalue()).decode()}"


def _curve(history: Sequence[Mapping[str, float]]) -> str:
    """Losses over steps, every point the mean of its share of the steps, since single steps are mostly noise."""
    if len(history) < 2:
        return ""
    width, height = 320, 90
    size = max(1, -(-len(history) // _POINTS))
    chunks = [history[start : start + size] for start in range(0, len(history), size)]
    series = {key: [sum(step[key] for step in chunk) / len(chunk) for chunk in chunks] for key, _ in _CURVES}
    highest = max(max(values) for values in series.values()) or 1.0
    lines = []
    for key, title in _CURVES:
        points = " ".join(
            f"{width * index / max(1, len(chunks) - 1):.1f},{height * (1 - value / highest):.1f}"
            for index, value in enumerate(series[key])
        )
        lines.append(f'<polyline class="{title}" points="{points}"><title>{title} loss</title></polyline>')
    legend = " ".join(f'<span class="{title}">{title}</span>' for _, title in _CURVES)
    return (
        f'<svg viewBox="0 -4 {width} {height + 8}" role="img" aria-label="loss curve">{"".join(lines)}</svg>'
        f'<p class="legend">{legend} loss over {len(history)} steps, up to {highest:.2f}</p>'
    )
