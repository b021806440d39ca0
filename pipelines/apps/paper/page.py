"""The page of `dreambooth paper`: self-contained tables in the paper's layout, beside the paper's figures."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from dreambooth.amounts import counted
from dreambooth.data.images import png_bytes
from dreambooth.evaluation.bootstrap import Interval
from pipelines.apps.paper.rows import COLUMN_TITLES, Experiment
from pipelines.apps.paper.sheets import Sheet
from pipelines.apps.paper.tables import Table
from pipelines.report.pages import picture, render

_SHEET_WIDTH = 1100
_NARROW = 3
"""Most columns of a table beside the paper's; wider ones stand above it."""
_SHORT = 24
"""Most letters of a row's title there: beside longer ones the last column would be cut off."""
_ACROSS = "table5"
"""The paper's table whose columns are the rows of the others."""


@dataclass(frozen=True, kw_only=True)
class _Shown:
    """A table for the page: `rows` are (title, cells)."""

    caption: str
    columns: Sequence[str]
    rows: Sequence[tuple[str, Sequence[Interval | float | None]]]
    published: bool = False


def render_page(tables: Sequence[Table], facts: Sequence[tuple[str, str]], sheets: Mapping[str, Sheet]) -> str:
    """The page as HTML; `sheets` are contact sheets by the experiment's name."""
    return render(
        "paper.html",
        title="The paper's tables on the miniatures",
        facts=facts,
        findings=[finding for table in tables for finding in table.findings],
        sections=[_section(table, sheets.get(table.experiment.name)) for table in tables],
    )


def heading(experiment: Experiment) -> str:
    """A table's title, with the number of the paper's table, if any."""
    return f"{experiment.source.partition(' (')[0]}: {experiment.title}" if experiment.source else experiment.title


def _section(table: Table, sheet: Sheet | None) -> dict[str, Any]:
    experiment = table.experiment
    across = experiment.name == _ACROSS
    return {
        "heading": heading(experiment),
        "note": experiment.note,
        "wide": across or _is_wide(experiment),
        "tables": [_across(table) if across else _down(table), *_published(experiment)],
        "sheet": sheet and picture(png_bytes(sheet.image), side=_SHEET_WIDTH, alt=f"contact sheet: {experiment.title}"),
        "prompts": "; ".join(sheet.prompts) if sheet else "",
    }


def _is_wide(experiment: Experiment) -> bool:
    """Whether a table fills the page's width."""
    return len(experiment.columns) > _NARROW or max(len(row.title) for row in experiment.rows) > _SHORT


def _down(table: Table) -> _Shown:
    columns = table.experiment.columns
    return _Shown(
        caption=_caption(table),
        columns=[COLUMN_TITLES[name] for name in columns],
        rows=[(row.title, [table.cells[row.slug, name] for name in columns]) for row in table.experiment.rows],
    )


def _across(table: Table) -> _Shown:
    rows = table.experiment.rows
    return _Shown(
        caption=_caption(table),
        columns=[row.title for row in rows],
        rows=[
            (COLUMN_TITLES[name], [table.cells[row.slug, name] for row in rows]) for name in table.experiment.columns
        ],
    )


def _caption(table: Table) -> str:
    *fewer, most = sorted({len(subjects) for subjects in table.subjects.values()}) or [0]
    return f"Measured here, {' to '.join([*map(str, fewer), counted(most, 'subject')])}"


def _published(experiment: Experiment) -> list[_Shown]:
    if not experiment.published:
        return []
    return [
        _Shown(
            caption=(f"The paper's own {experiment.source}: other models, other data, other encoders. Not comparable."),
            columns=[COLUMN_TITLES.get(name, name) for name in experiment.published_columns],
            rows=[(row.title, row.figures) for row in experiment.published],
            published=True,
        )
    ]
