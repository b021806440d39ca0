"""Put what was measured last into docs/benchmarks.md: `make benchmarks-page`.

Every file of output/bench/ that `stamped` wrote becomes a table below its stamp: version, commit, day, machine. One
without a stamp, or of a version whose figures mean something else by semantic versioning, is refused.
"""

import argparse
import datetime
import json
import re
import sys
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from dreambooth import __version__

PAGE = Path("docs/benchmarks.md")
BEGIN, END = "<!-- made by `make benchmarks-page` -->", "<!-- until here -->"
TITLES = {
    "main": "`make bench`",
    "batch": "`make bench-batch`",
    "gpu": "`make bench-gpu`",
    "subjects": "`python tests/bench/subjects.py`",
}


class Refused(Exception):
    """A measurement that can't be put on the page, and what to do."""


def stamped(figures: Mapping[str, Any]) -> dict[str, Any]:
    """Figures with the code, the day and the machine that they were measured on."""
    from pipelines.plan.here import describe_here

    return {"stamp": {"day": datetime.datetime.now(datetime.UTC).date().isoformat(), **describe_here()}, **figures}


def section(files: Sequence[Path]) -> str:
    """The page's section of these files. Raises Refused for one that is not of this version."""
    parts = [f"{BEGIN}\n## Measured last\n"]
    for path in files:
        figures = json.loads(path.read_text())
        stamp = figures.pop("stamp", None)
        command = TITLES[path.stem]
        if stamp is None:
            raise Refused(f"{path} doesn't say what it was measured on; measure it again: {command}")
        version = stamp["dreambooth"].partition(",")[0]
        if _epoch(version) != _epoch(__version__):
            raise Refused(f"{path} is of version {version}, and this is {__version__}; measure it again: {command}")
        machine = stamp["processor"] if stamp["GPUs"] == "none" else stamp["GPUs"]
        parts.append(
            f"{command}: dreambooth {stamp['dreambooth']}, {stamp['day']}, {machine}, torch {stamp['torch']}\n"
        )
        parts.append("| figure | |\n|---|---|")
        parts += [f"| {name} | {value} |" for name, value in _flat(figures)]
        parts.append("")
    return "\n".join([*parts, END])


def replaced(page: str, made: str) -> str:
    """The page with its section, which stands before the first other one."""
    older = re.compile(rf"{re.escape(BEGIN)}.*?{re.escape(END)}\n\n", re.DOTALL)
    head, title, rest = older.sub("", page).partition("\n## ")
    return f"{head}\n{made}\n{title}{rest}"


def _epoch(version: str) -> tuple[str, ...]:
    """What has to be equal: the major version, and before 1.0 the minor one, too."""
    major, minor, _ = version.split(".", 2)
    return (major, minor) if major == "0" else (major,)


def _flat(figures: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, str]]:
    for name, value in figures.items():
        if isinstance(value, Mapping):
            yield from _flat(value, f"{prefix}{name}, ")
        elif isinstance(value, float):
            yield prefix + name, f"{value:#.3g}" if abs(value) < 100 else f"{value:.0f}"
        else:
            yield prefix + name, str(value)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--folder", type=Path, default=Path("output/bench"))
    parser.add_argument("--page", type=Path, default=PAGE)
    options = parser.parse_args()
    files = [path for stem in TITLES if (path := options.folder / f"{stem}.json").is_file()]
    if not files:
        sys.exit(
            f"nothing was measured yet: {options.folder} has none of {', '.join(f'{stem}.json' for stem in TITLES)}"
        )
    try:
        made = section(files)
    except Refused as error:
        sys.exit(str(error))
    options.page.write_text(replaced(options.page.read_text(), made))
    print(f"wrote {options.page}")


if __name__ == "__main__":
    main()
