"""A table of measured figures names the commit and the day of its measuring: README, docs/ and model cards."""

import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
PAGES = [
    ROOT / "README.md",
    *sorted((ROOT / "docs").rglob("*.md")),
    *sorted((ROOT / "dreambooth" / "miniature" / "weights").rglob("README.md")),
]
FIGURE = re.compile(r"(?<![\w.-])-?\d[\d,]*(\.\d+)?( ?(s|ms|GiB|MiB|GB|%|times|steps/s|dB))?(?![\w.-])")
COMMIT = re.compile(r"\b(?=[0-9a-f]*\d)[0-9a-f]{7}\b")
DAY = re.compile(r"\b(\d{1,2} (November|December)|20\d\d-\d\d-\d\d)\b")
NOT_MEASURED = {
    ("docs/families.md", "| model |"): "counted from configurations without weights",
    ("docs/families.md", "| family |"): "defaults of settings",
    ("docs/cluster.md", "| | fp32 weights |"): "bytes that follow from DeepSpeed's code",
    ("docs/metrics.md", "| figure | what it is |"): "sections of the paper",
    ("dreambooth/miniature/weights/README.md", "| folder |"): "sizes of the shipped weights",
    ("dreambooth/miniature/weights/cascade/README.md", "| part |"): "sizes of the shipped weights",
    ("dreambooth/miniature/weights/flow/README.md", "| part of"): "sizes of the shipped weights",
}
"""Tables by page and how they begin, and why their numbers have no commit."""


@dataclass(frozen=True, kw_only=True)
class Table:
    """A table's lines, and the text around it: its section's, and what stands below headings above, but the title."""

    page: str
    lines: tuple[str, ...]
    around: str

    @property
    def name(self) -> str:
        return f"{self.page}: {self.lines[0]}"


def tables(page: Path) -> Iterator[Table]:
    """All tables of a page."""
    text = re.sub(r"(?ms)^ *```.*?^ *```", "", page.read_text())
    above: list[tuple[int, str]] = []
    for part in re.split(r"(?m)^(?=#+ )", text):
        level = len(part) - len(part.lstrip("#"))
        above = [one for one in above if one[0] < level]
        around = "\n".join([*(below for _, below in above), part])
        for found in re.finditer(r"(?m)(^\|.*\n?)+", part):
            yield Table(page=str(page.relative_to(ROOT)), lines=tuple(found[0].splitlines()), around=around)
        above += [(level, part)] if level > 1 else []


def has_figures(table: Table) -> bool:
    """Whether some column behind the first is half numbers, or more."""
    rows = [re.split(r"(?<!\\)\|", line)[2:-1] for line in table.lines[2:]]
    columns = zip(*rows, strict=True) if len({len(row) for row in rows}) == 1 else []
    return any(2 * sum(bool(FIGURE.match(cell.strip(" *"))) for cell in column) >= len(column) for column in columns)


def excepted(table: Table) -> tuple[str, str] | None:
    return next((key for key in NOT_MEASURED if table.page == key[0] and table.lines[0].startswith(key[1])), None)


WITH_FIGURES = [table for page in PAGES for table in tables(page) if has_figures(table)]


@pytest.mark.parametrize("table", [t for t in WITH_FIGURES if not excepted(t)], ids=lambda table: table.name)
def test_a_table_of_figures_names_commit_and_day(table: Table) -> None:
    assert COMMIT.search(table.around), "no commit"
    assert DAY.search(table.around), "no day"


def test_tables_are_found() -> None:
    pages = {table.page for table in WITH_FIGURES}
    assert {"README.md", "docs/benchmarks.md", "docs/faults.md", "docs/metrics.md", "docs/paper.md"} <= pages
    assert len(WITH_FIGURES) > 40
    assert {excepted(table) for table in WITH_FIGURES} - {None} == set(NOT_MEASURED)


def test_every_row_of_the_benchmarks_names_commit_and_day() -> None:
    for table in WITH_FIGURES:
        if table.page == "docs/benchmarks.md":
            for line in table.lines[2:]:
                text = line if COMMIT.search(line) else table.lines[0]
                assert COMMIT.search(text), line
                assert DAY.search(text), line


def test_an_undated_table_is_noticed() -> None:
    lines = ("| | seconds |", "|---|---|", "| a run | 12.5 |", "| a batch | 8 s |")
    assert has_figures(Table(page="docs/x.md", lines=lines, around=""))
    assert not COMMIT.search("the defaced facade of 1234567890 words, 81db3b5f9 and effaced")
    assert COMMIT.search("commit 81db3b5, 30 November 2026")
