"""Rows of text tables: JSON objects line by line, and cells of spreadsheet exports."""

import csv
import io
import json
from collections.abc import Callable, Iterator, Sequence
from typing import Any

from dreambooth.config.explain import as_given
from dreambooth.errors import InputError

_DELIMITERS = (",", ";", "\t")


def json_rows(text: str, *, example: str) -> Iterator[tuple[int, dict[str, Any]]]:
    """(line, object) of every line except blank ones.

    Raises InputError, with the line, for one that isn't an object such as `example`, or has a key twice.
    """
    lines = text.split("\n")  # JSON strings may contain other line separators
    for number, line in enumerate(lines, start=1):
        if not line.strip():
            continue
        try:
            row = json.loads(line, object_pairs_hook=_once, parse_constant=_refuse_constant)
        except InputError as error:
            raise InputError(f"line {number}: {error}") from None
        except (ValueError, RecursionError) as error:
            cut = "; the file ends there, without a line break: was it cut short?" if number == len(lines) else ""
            raise InputError(f"line {number} is not JSON: {error}{cut}") from None
        if not isinstance(row, dict):
            raise InputError(f"line {number}: expected {example}, got {line.strip()[:40]!r}")
        yield number, row


def _once(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    seen: dict[str, Any] = {}
    for key, value in pairs:
        if key in seen:
            raise InputError(
                f"{key!r} is there twice, as {as_given(seen[key])} and as {as_given(value)}; leave one of them out"
            )
        seen[key] = value
    return seen


def _refuse_constant(name: str) -> Any:
    raise InputError(f"{name} is no number of JSON's; give a finite one, or leave it out")


def cell_rows(text: str, delimiter: str) -> Iterator[tuple[int, list[str]]]:
    """(line, cells) of every line except blank ones and Excel's `sep=;`. Raises InputError for an open quote."""
    reader = csv.reader(io.StringIO(text, newline=""), delimiter=delimiter, skipinitialspace=True, strict=True)
    try:
        for cells in reader:
            excels_own = reader.line_num == 1 and cells and cells[0].lower().startswith("sep=")
            if any(cell.strip() for cell in cells) and not excels_own:
                yield reader.line_num, [cell.strip() for cell in cells]
    except csv.Error as error:
        raise InputError(f"line {reader.line_num} can't be read: {error}; is a quoted cell left open?") from None


def delimiter_of(text: str, known: Callable[[Sequence[str]], int]) -> str:
    """The separator of cells: comma, semicolon (Excel in Europe) or tab, whichever gives most `known` columns."""

    def count(delimiter: str) -> int:
        try:
            _, header = next(cell_rows(text, delimiter), (0, []))
        except InputError:
            return 0
        return known(header)

    return max(_DELIMITERS, key=count)
