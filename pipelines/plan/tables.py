"""Read tables of subjects: YAML, JSONL, or spreadsheet exports.

    {"name": "rex", "class_noun": "dog", "instance_images": "photos/rex", "train.max_train_steps": 800, "note": "ours"}

`note` is for people and ignored.
"""

import re
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from typing import Any

from dreambooth.config.explain import list_settings, nearest_setting
from dreambooth.config.overrides import nest
from dreambooth.config.rows import cell_rows, delimiter_of, json_rows
from dreambooth.config.settings import DreamBoothConfig
from dreambooth.config.strict_yaml import NotYaml, parse_yaml
from dreambooth.config.text_files import decode_text
from dreambooth.errors import InputError

SUBJECT = ("name", "class_noun", "identifier", "instance_images")
"""Settings of a subject that may omit the prefix `subject.`."""
NOTE = "note"
_REQUIRED = ("name", "class_noun", "instance_images")
_NOTHING = ("null", "~")
_GROUPED = re.compile(r"[1-9]\d{0,2}(\.\d{3})+")

Settings = dict[str, Any]


@dataclass(frozen=True, kw_only=True)
class Row:
    """A subject as written, its place ("line 3"), and its unreadable parts."""

    settings: Settings
    where: str
    faults: tuple[str, ...] = ()


def read_table(content: bytes, address: str) -> tuple[Settings, list[Row]]:
    """(common settings, rows) of a table, by its name's ending. Raises InputError, with the line, if unreadable."""
    kind = ending(address)
    if kind not in (*_YAML, *_LINES):
        raise InputError(f"{address!r}: expected a folder, or a table that ends in .yaml, .jsonl or .csv")
    text = decode_text(content, address)
    if kind in _YAML:
        return _from_yaml(text, address)
    try:
        return {}, _LINES[kind](text)
    except InputError as error:
        raise InputError(f"{address}: {error}") from None


def ending(address: str) -> str:
    """Ending of a table's name: `yaml`, `csv`, …; others mean it is no table."""
    return address.rsplit("/", 1)[-1].rpartition(".")[2].lower()


@cache
def known_names() -> tuple[str, ...]:
    """All names allowed in a row."""
    return (*SUBJECT, *(name for name, _, _ in list_settings(DreamBoothConfig)))


def _from_yaml(text: str, address: str) -> tuple[Settings, list[Row]]:
    value = parse_yaml(text, address)
    common = {key: part for key, part in value.items() if key != "subjects"} if isinstance(value, dict) else {}
    rows = value.get("subjects") if isinstance(value, dict) else value
    if not isinstance(rows, list) or not all(isinstance(row, dict) for row in rows):
        raise InputError(
            f"{address}: expected a list of subjects such as '- {{name: rex, class_noun: dog, instance_images: rex}}'"
        )
    try:
        settings = nest(common.items())
    except InputError as error:
        raise InputError(f"{address}: {error}") from None
    return settings, [Row(settings=row, where=f"line {row.line}") for row in rows]


def _from_jsonl(text: str) -> list[Row]:
    return [Row(settings=row, where=f"line {line}") for line, row in json_rows(text, example='{"name": …}')]


def _from_csv(text: str) -> list[Row]:
    delimiter = delimiter_of(text, lambda header: len({_spelled(column) for column in header} & set(SUBJECT)))
    lines = cell_rows(text, delimiter)
    _, header = next(lines, (0, []))
    columns = _columns(header)
    return [Row(settings=_row(columns, cells, line, delimiter), where=f"line {line}") for line, cells in lines]


def _columns(header: list[str]) -> list[str]:
    columns = [_spelled(column) for column in header]
    given, known = [column for column in columns if column], {*known_names(), NOTE}
    shown = ", ".join(given) or "none"
    faults = [f"the column {name!r} is missing; it has {shown}" for name in _REQUIRED if name not in given]
    for column in dict.fromkeys(given):
        if given.count(column) > 1:
            faults.append(f"the column {column!r} is there {given.count(column)} times; leave one of them")
        if column not in known:
            near = nearest_setting(column, known_names())
            hint = f"did you mean {near}?" if near else f"'dreambooth settings' lists all; {NOTE!r} may hold anything"
            faults.append(f"the column {column!r} is no setting; {hint}")
    if faults:
        raise InputError("\n".join(faults))
    return columns


def _spelled(column: str) -> str:
    """A column's name spelled as a setting: `Class Noun` gives class_noun."""
    column = column.strip("\ufeff \t\xa0")
    plain = re.sub(r"[\s-]+", "_", column.lower())
    return plain if plain in {*known_names(), NOTE} else column


def _row(columns: list[str], cells: list[str], line: int, delimiter: str) -> Settings:
    extra = [cell for cell in cells[len(columns) :] if cell]
    extra += [cell for column, cell in zip(columns, cells, strict=False) if cell and not column]
    if extra:
        raise InputError(
            f"line {line} has more cells than there are columns ({extra[0]!r}); quote cells that hold {delimiter!r}"
        )
    values = {
        column: _value(column, cell, line, delimiter) for column, cell in zip(columns, cells, strict=False) if cell
    }
    images = re.split(r"[;\n]", values.get("instance_images", ""))
    if len(images) > 1:
        values["instance_images"] = [image.strip() for image in images if image.strip()]
    return values


def _value(column: str, cell: str, line: int, delimiter: str) -> Any:
    if column in (*SUBJECT, NOTE):
        return cell
    if delimiter == ";" and _GROUPED.fullmatch(cell):  # where it separates cells, a point groups thousands
        meant = " or ".join(dict.fromkeys((cell.replace(".", ""), cell.rstrip("0").rstrip("."))))
        raise InputError(f"line {line}: {column} is {cell}, which people read differently; write {meant}")
    try:
        value = parse_yaml(cell, f"line {line}: {column}")
    except NotYaml:
        value = None
    if value is None and cell.lower() not in _NOTHING:
        raise InputError(f"line {line}: {column} is {cell!r}, which is no value; quote it as YAML wants it")
    return value


_YAML = ("yaml", "yml")
_LINES: dict[str, Callable[[str], list[Row]]] = {"jsonl": _from_jsonl, "csv": _from_csv, "tsv": _from_csv}
TABLES = tuple(f".{kind}" for kind in (*_YAML, *_LINES))
"""Endings of tables' names."""
