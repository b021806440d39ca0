"""The page of `dreambooth paper`: self-contained, tables in the paper's layout with its own figures beside."""

import base64
import io
from collections.abc import Mapping, Sequence
from html import escape
from pathlib import Path
from string import Template

from PIL import Image

from dreambooth.evaluation.bootstrap import Interval
from pipelines.paper_experiments import COLUMN_TITLES, Experiment
from pipelines.paper_sheets import Sheet
from pipelines.paper_tables import Finding, Table

_PAGE = Path(__file__).with_name("paper_page.html")
_SHEET_WIDTH = 1100
_NARROW = 3
"""Tables of as many columns stand beside the paper's, wider ones above it."""
_ACROSS = "table5"
"""The paper prints this one with the rows of the others as its columns."""


def render_page(tables: Sequence[Table], facts: Sequence[tuple[str, str]], sheets: Mapping[str, Sheet]) -> str:
    """The page as HTML; `sheets` are contact sheets by the experiment's name."""
    return Template(_PAGE.read_text()).substitute(
        facts="".join(f"<dt>{escape(what)}</dt><dd>{escape(value)}</dd>" for what, value in facts),
        findings="".join(_finding(finding) for table in tables for finding in table.findings),
        tables="".join(_section(table, sheets.get(table.experiment.name)) for table in tables),
    )


def heading(experiment: Experiment) -> str:
    """What a table is called, with the number of the paper's where it has one."""
    return f"{experiment.source.partition(' (')[0]}: {experiment.title}" if experiment.source else experiment.title


def _finding(finding: Finding) -> str:
    kind = finding.verdict.replace(" ", "-")
    return f'<li><span class="verdict {kind}">{finding.verdict}</span><span>{escape(finding.sentence)}</span></li>'


def _section(table: Table, sheet: Sheet | None) -> str:
    experiment = table.experiment
    note = f"<p class=soft>{escape(experiment.note)}</p>" if experiment.note else ""
    pictures = ""
    if sheet is not None:
        alt = escape(f"contact sheet: {experiment.title}")
        image = f'<img loading="lazy" alt="{alt}" src="{_webp(sheet.image)}">'
        prompts = escape("; ".join(sheet.prompts))
        caption = f"<p class=soft>Columns, for every row that was sampled: {prompts}.</p>"
        pictures = f"<details open><summary>Samples</summary>{image}{caption}</details>"
    tables = (_across(table) if experiment.name == _ACROSS else _down(table)) + _published(experiment)
    kind = "pair wide" if len(experiment.columns) > _NARROW or experiment.name == _ACROSS else "pair"
    return (
        f'<section><h2>{escape(heading(experiment))}</h2>{note}<div class="{kind}">{tables}</div>{pictures}</section>'
    )


def _down(table: Table) -> str:
    columns = table.experiment.columns
    rows = [[row.title, *(_cell(table.cells[row.slug, name]) for name in columns)] for row in table.experiment.rows]
    return _table(_caption(table), ["", *(COLUMN_TITLES[name] for name in columns)], rows)


def _across(table: Table) -> str:
    rows = [
        [COLUMN_TITLES[name], *(_cell(table.cells[row.slug, name]) for row in table.experiment.rows)]
        for name in table.experiment.columns
    ]
    return _table(_caption(table), ["", *(row.title for row in table.experiment.rows)], rows)


def _caption(table: Table) -> str:
    counts = sorted({len(subjects) for subjects in table.subjects.values()})
    return f"The miniature, {' to '.join(str(count) for count in counts)} subject{'s' * (counts != [1])}"


def _published(experiment: Experiment) -> str:
    if not experiment.published:
        return ""
    rows = [
        [
            row.title,
            *("<td class=n>–</td>" if figure is None else f"<td class=n>{figure:.3f}</td>" for figure in row.figures),
        ]
        for row in experiment.published
    ]
    caption = f"The paper's own {experiment.source}: other models, other data, other encoders. Not comparable."
    titles = [COLUMN_TITLES.get(name, name) for name in experiment.published_columns]
    return _table(caption, ["", *titles], rows, kind="scroll paper")


def _table(caption: str, head: Sequence[str], rows: Sequence[Sequence[str]], kind: str = "scroll") -> str:
    """`rows` hold a title and cells that are HTML already."""
    body = "".join(f"<tr><th>{escape(title)}</th>{''.join(cells)}</tr>" for title, *cells in rows)
    titles = "".join(f"<th class={'n' if name else 't'}>{escape(name)}</th>" for name in head)
    return (
        f'<div class="{kind}"><table><caption>{escape(caption)}</caption>'
        f"<thead><tr>{titles}</tr></thead><tbody>{body}</tbody></table></div>"
    )


def _cell(interval: Interval | None) -> str:
    if interval is None:
        return "<td class=n>–</td>"
    return f"<td class=n>{interval.mean:.3f}<small>{interval.ends}</small></td>"


def _webp(image: Image.Image) -> str:
    shown = image.convert("RGB")
    shown.thumbnail((_SHEET_WIDTH, 10 * _SHEET_WIDTH))
    buffer = io.BytesIO()
    shown.save(buffer, format="WEBP", quality=80)
    return f"data:image/webp;base64,{base64.b64encode(buffer.getvalue()).decode()}"
