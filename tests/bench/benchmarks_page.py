"""Put what was measured into docs/benchmarks.md: `make benchmarks-page`.

Every file of output/bench/ that `tests/bench/measured.py` knows is taken over into docs/measured/, part by part, and
the page's generated section is made from that folder: a table a file, each row with its commit, day, machine and
versions. A figure without a stamp, or of a version whose figures mean something else by semantic versioning, is
refused; one that was taken over under an earlier version stays, and says so.
"""

import argparse
import json
import re
import sys
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from measured import FILES, File
from stamps import VERSIONS, Figures, Stamp, together

from dreambooth import __version__

PAGE = Path("docs/benchmarks.md")
KEPT = Path("docs/measured")
BEGIN, END = "<!-- made by `make benchmarks-page` -->", "<!-- until here -->"
STAMP_COLUMNS = ("commit", "day", "machine", "versions")


class Refused(Exception):
    """A measurement that can't be put on the page, and what to do."""


def taken(path: Path, kept: Path) -> None:
    """Take a file's figures over into a kept one. Raises Refused for those that are not of this version."""
    measured, command = json.loads(path.read_text()), FILES[path.stem].command
    stamps = measured.get("stamps", {})
    if unstamped := [name for name in measured if name not in stamps and name != "stamps"]:
        names = ", ".join(unstamped)
        raise Refused(f"{path} doesn't say what this was measured on: {names}; measure it again: {command}")
    for name, stamp in stamps.items():
        if _epoch(version := _version(stamp)) != _epoch(__version__):
            raise Refused(
                f"{path}: {name} is of version {version}, and this is {__version__}; measure it again: {command}"
            )
    earlier = json.loads(kept.read_text()) if kept.is_file() else {"stamps": {}}
    kept.parent.mkdir(parents=True, exist_ok=True)
    kept.write_text(json.dumps(together(earlier, measured), indent=2) + "\n")


def section(files: Sequence[Path]) -> str:
    """The page's section of these files."""
    parts = [f"{BEGIN}\n## Measured\n"]
    for path in files:
        parts += [f"### {FILES[path.stem].title}\n", f"{FILES[path.stem].command}\n"]
        parts += _tables(FILES[path.stem], json.loads(path.read_text()))
    return "\n".join([*parts, END])


def replaced(page: str, made: str) -> str:
    """The page with its section, which stands before the first other one."""
    older = re.compile(rf"{re.escape(BEGIN)}.*?{re.escape(END)}\n\n", re.DOTALL)
    head, title, rest = older.sub("", page).partition("\n## ")
    return f"{head}\n{made}\n{title}{rest}"


def _tables(file: File, measured: Figures) -> Iterator[str]:
    """Lines of the single figures' table, and of one with a row a name where the file has such."""
    stamps = measured["stamps"]
    rows = {name: measured[name] for name in stamps if _is_row(file, measured[name])}
    single = {name: measured[name] for name in stamps if name not in rows and measured[name] is not None}
    if single:
        flat = [(path, value, stamps[name]) for name, figure in single.items() for path, value in _flat(name, figure)]
        order = [*file.names, *(path for path, _, _ in flat)]
        lines = [
            [file.names.get(path, path), _said(value), *_cells(stamp)]
            for path, value, stamp in sorted(flat, key=lambda one: order.index(one[0]))
        ]
        yield from _table(["", "", *STAMP_COLUMNS], lines)
    if rows:
        lines = [
            [name, *(_said(row.get(column, "")) for column in file.columns), *_cells(stamps[name])]
            for name, row in rows.items()
        ]
        yield from _table([file.row, *file.columns.values(), *STAMP_COLUMNS], lines)


def _is_row(file: File, figure: Any) -> bool:
    return bool(file.columns) and isinstance(figure, Mapping) and file.columns.keys() <= figure.keys()


def _table(heads: Sequence[str], lines: Sequence[Sequence[str]]) -> Iterator[str]:
    yield f"| {' | '.join(heads)} |"
    yield "|---" * len(heads) + "|"
    yield from (f"| {' | '.join(line)} |" for line in lines)
    yield ""


def _cells(stamp: Stamp) -> list[str]:
    """A row's commit, day, machine and versions."""
    commit = stamp["dreambooth"].partition("commit ")[2] or f"version {_version(stamp)}"
    if _epoch(_version(stamp)) != _epoch(__version__):
        commit += f" (version {_version(stamp)}: not to be compared)"
    machine = stamp["processor"] if stamp["GPUs"] == "none" else stamp["GPUs"]
    for noise in ("(R)", "(TM)", " Processor", " to use"):
        machine = machine.replace(noise, "")
    return [commit, stamp["day"], machine, ", ".join(f"{name} {stamp[name]}" for name in VERSIONS if name in stamp)]


def _version(stamp: Stamp) -> str:
    return stamp["dreambooth"].partition(",")[0]


def _epoch(version: str) -> tuple[str, ...]:
    """What has to be equal: the major version, and before 1.0 the minor one, too."""
    major, minor, _ = version.split(".", 2)
    return (major, minor) if major == "0" else (major,)


def _flat(name: str, figure: Any) -> Iterator[tuple[str, Any]]:
    if isinstance(figure, Mapping):
        for below, value in figure.items():
            yield from _flat(f"{name}, {below}", value)
    else:
        yield name, figure


def _said(value: Any) -> str:
    if isinstance(value, float):
        return f"{value:.2f}" if abs(value) < 10 else f"{value:.1f}" if abs(value) < 100 else f"{value:,.0f}"
    if isinstance(value, Sequence) and not isinstance(value, str):
        return ", ".join(map(_said, value))
    return "–" if value is None else f"{value:,}" if isinstance(value, int) else str(value)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--folder", type=Path, default=Path("output/bench"))
    parser.add_argument("--kept", type=Path, default=KEPT)
    parser.add_argument("--page", type=Path, default=PAGE)
    options = parser.parse_args()
    try:
        for stem in FILES:
            if (path := options.folder / f"{stem}.json").is_file():
                taken(path, options.kept / path.name)
    except Refused as error:
        sys.exit(str(error))
    files = kept_files(options.kept)
    if not files:
        names = ", ".join(f"{stem}.json" for stem in FILES)
        sys.exit(f"nothing was measured yet: {options.folder} has none of {names}")
    options.page.write_text(replaced(options.page.read_text(), section(files)))
    print(f"wrote {options.page}")


def kept_files(folder: Path) -> list[Path]:
    """Files of measurements that were taken over, in the page's order."""
    return [path for stem in FILES if (path := folder / f"{stem}.json").is_file()]


if __name__ == "__main__":
    main()
