"""The tables of `dreambooth paper` as Markdown, for the documentation."""

from collections.abc import Sequence

from dreambooth.evaluation.bootstrap import Interval
from pipelines.apps.paper.page import heading
from pipelines.apps.paper.rows import COLUMN_TITLES
from pipelines.apps.paper.tables import Table


def render_markdown(tables: Sequence[Table], facts: Sequence[tuple[str, str]]) -> str:
    """Render facts, findings and tables, the paper's below ours."""
    lines = [f"- {what}: {value}" for what, value in facts]
    lines += ["", "### What came out", ""]
    lines += [f"- {finding.sentence}" for table in tables for finding in table.findings]
    for table in tables:
        lines += ["", f"### {heading(table.experiment)}", ""]
        lines += [table.experiment.note, ""] if table.experiment.note else []
        lines += _grid(
            [COLUMN_TITLES[name] for name in table.experiment.columns],
            [
                [row.title, *(_cell(table.cells[row.slug, name]) for name in table.experiment.columns)]
                for row in table.experiment.rows
            ],
        )
        lines += _published(table)
    return "\n".join(lines) + "\n"


def _published(table: Table) -> list[str]:
    experiment = table.experiment
    if not experiment.published:
        return []
    rows = [
        [row.title, *("–" if figure is None else f"{figure:.3f}" for figure in row.figures)]
        for row in experiment.published
    ]
    titles = [COLUMN_TITLES.get(name, name) for name in experiment.published_columns]
    mark = f"The paper's own {experiment.source}, of other models, other data and other encoders, not comparable:"
    return ["", mark, "", *_grid(titles, rows)]


def _grid(titles: Sequence[str], rows: Sequence[Sequence[str]]) -> list[str]:
    head = f"| | {' | '.join(titles)} |"
    return [head, f"|---|{'---:|' * len(titles)}", *(f"| {' | '.join(row)} |" for row in rows)]


def _cell(interval: Interval | None) -> str:
    if interval is None:
        return "–"
    return f"{interval.mean:.3f} ({interval.ends})" if interval.ends else f"{interval.mean:.3f}"
