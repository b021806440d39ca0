"""Which subjects does a batch have? Read from a table or a folder, wherever fsspec reaches.

A table is YAML (a list, or settings of all with the list under `subjects`), JSONL or CSV; a folder holds one folder of
images per subject, with a small subject.yaml in it or not. Every subject has a name, a class noun, instance images, an
identifier if it wants a certain one, and settings of its own, nested or dotted:

    subjects:
      - {name: rex, class_noun: dog, instance_images: photos/rex}
      - {name: mug, class_noun: cup, instance_images: [a.jpg, b.jpg, c.jpg], train.max_train_steps: 800}
"""

import csv
import io
import json
from collections import defaultdict
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import yaml

from dreambooth.config import DreamBoothConfig, load_config, merge
from dreambooth.errors import InputError
from dreambooth.reach import prove_store
from dreambooth.subject import name_from
from pipelines.storage import absolute, filesystem, is_local, join
from pipelines.storage_faults import explain

_SUBJECT = ("name", "class_noun", "identifier", "instance_images")
_REQUIRED = ("name", "class_noun", "instance_images")

Row = dict[str, Any]


@dataclass(frozen=True, kw_only=True)
class ListedSubject:
    """A subject as it was read; with `faults` it can't be trained, and without a configuration they say why."""

    name: str
    config: DreamBoothConfig | None
    faults: tuple[str, ...] = ()


def read_batch(address: str, overrides: Sequence[str] = ()) -> tuple[ListedSubject, ...]:
    """The subjects of a batch; `overrides` (a.b=value) go over everything.

    What is wrong with one subject is among its faults: an unknown setting, a name or identifier that is taken twice, a
    folder it would share. Raises InputError for what is wrong with all: an address that can't be read, no subject, a
    missing column.
    """
    common, rows, place = _read(absolute(address))
    if not rows:
        raise InputError(f"{address} holds no subject; expected a row, or a folder of images, for each")
    subjects = []
    for number, row in enumerate(rows, start=1):
        name = str(row.get("name") or f"subject {number}")
        try:
            config = load_config(merge(common, _settings(row, place)), tuple(overrides))
            subjects.append(ListedSubject(name=name, config=config))
        except InputError as error:
            subjects.append(ListedSubject(name=name, config=None, faults=tuple(str(error).splitlines())))
    return _without_clashes(subjects)


def _read(address: str) -> tuple[Row, list[Row], str]:
    """(settings of all, rows, the folder that relative addresses start from)."""
    readers: dict[str, Callable[[str], tuple[Row, list[Row]]]] = {
        "yaml": _from_yaml,
        "yml": _from_yaml,
        "jsonl": _from_jsonl,
        "csv": _from_csv,
    }
    try:
        prove_store(address, what=f"can't read {address!r}")
        fs, path = filesystem(address, patient=False)
        if fs.isdir(path):
            return {}, _from_folder(address), address
        content = fs.cat_file(path).decode("utf-8-sig")  # as spreadsheets write it
    except InputError:
        raise
    except FileNotFoundError:
        raise InputError(
            f"there is nothing at {address!r}; expected a table of subjects or a folder of folders"
        ) from None
    except UnicodeDecodeError:
        raise InputError(f"{address!r} is not text; expected YAML, JSONL or CSV") from None
    except Exception as error:  # each driver raises its own
        raise InputError(f"can't read {address!r}: {explain(error)}") from error
    reader = readers.get(address.rsplit(".", 1)[-1].lower())
    if reader is None:
        raise InputError(f"{address!r}: expected a folder, or a table that ends in .yaml, .jsonl or .csv")
    try:
        common, rows = reader(content)
    except InputError as error:
        raise InputError(f"{address}: {error}") from None
    return common, rows, address.rpartition("/")[0] or "."


def _from_yaml(content: str) -> tuple[Row, list[Row]]:
    try:
        value = yaml.safe_load(content)
    except yaml.YAMLError as error:
        raise InputError(f"not valid YAML: {error}") from None
    common = {key: part for key, part in value.items() if key != "subjects"} if isinstance(value, dict) else {}
    rows = value.get("subjects") if isinstance(value, dict) else value
    if not isinstance(rows, list) or not all(isinstance(row, dict) for row in rows):
        raise InputError("expected a list of subjects such as '- {name: rex, class_noun: dog, instance_images: rex}'")
    return common, rows


def _from_jsonl(content: str) -> tuple[Row, list[Row]]:
    rows = []
    for number, line in enumerate(content.splitlines(), start=1):
        if not line.strip():
            continue
        try:
            row = json.loads(line)
        except ValueError as error:
            raise InputError(f"line {number} is not JSON: {error}") from None
        if not isinstance(row, dict):
            raise InputError(f'line {number}: expected {{"name": …}}, got {line.strip()[:40]!r}')
        rows.append(row)
    return {}, rows


def _from_csv(content: str) -> tuple[Row, list[Row]]:
    reader = csv.DictReader(io.StringIO(content), skipinitialspace=True)
    columns = [column.strip() for column in reader.fieldnames or []]
    missing = [column for column in _REQUIRED if column not in columns]
    if missing:
        raise InputError(f"the column {missing[0]!r} is missing; it has {', '.join(columns) or 'none'}")
    reader.fieldnames = columns
    rows = []
    for row in reader:
        if None in row:
            raise InputError(f"line {reader.line_num} has more cells than there are columns; quote cells with commas")
        cells = {column: (cell or "").strip() for column, cell in row.items()}
        values = {column: _value(column, cell, reader.line_num) for column, cell in cells.items() if cell}
        if isinstance(images := values.get("instance_images"), str) and ";" in images:
            values["instance_images"] = [image.strip() for image in images.split(";") if image.strip()]
        rows.append(values)
    return {}, rows


def _value(column: str, cell: str, line: int) -> Any:
    if column in _SUBJECT:
        return cell
    try:
        return yaml.safe_load(cell)
    except yaml.YAMLError:
        raise InputError(f"line {line}: {column} is {cell!r}, which is no value; quote it as YAML wants it") from None


def _from_folder(address: str) -> list[Row]:
    fs, path = filesystem(address)
    rows = []
    for folder in sorted(entry["name"] for entry in fs.ls(path, detail=True) if entry["type"] == "directory"):
        name = folder.rstrip("/").rsplit("/", 1)[-1]
        if name.startswith("."):
            continue
        row: Row = {"name": name_from(name) or name, "instance_images": name}
        if fs.isfile(f"{folder}/subject.yaml"):
            row |= _said(f"{folder}/subject.yaml", fs.cat_file(f"{folder}/subject.yaml"))
        rows.append(row)
    return rows


def _said(path: str, content: bytes) -> Row:
    try:
        said = yaml.safe_load(content)
    except yaml.YAMLError as error:
        raise InputError(f"{path} is not valid YAML: {error}") from None
    if not isinstance(said, dict):
        raise InputError(f"{path} should hold settings such as 'class_noun: dog', got {said!r}")
    return said


def _settings(row: Mapping[str, Any], place: str) -> Row:
    """A row as nested settings, its images' addresses relative to the table."""
    settings: Row = {}
    for key, value in row.items():
        nested: Any = value
        for part in reversed(f"subject.{key}".split(".") if key in _SUBJECT else str(key).split(".")):
            nested = {part: nested}
        settings = merge(settings, nested)
    images = settings.get("subject", {}).get("instance_images")
    if isinstance(images, str):
        settings["subject"]["instance_images"] = _from_place(images, place)
    elif isinstance(images, list):
        settings["subject"]["instance_images"] = [_from_place(str(image), place) for image in images]
    return settings


def _from_place(address: str, place: str) -> str:
    if "://" in address or address.startswith(("/", "~")):
        return address
    return absolute(join(place, address)) if is_local(place) else join(place, address)


def _without_clashes(subjects: Sequence[ListedSubject]) -> tuple[ListedSubject, ...]:
    """The subjects, with a fault each where two would share what has to be a subject's own."""
    owners: dict[tuple[str, str], list[tuple[int, str]]] = defaultdict(list)
    for place, subject in enumerate(subjects):
        for what, value in _own(subject):
            # Names become folders and models, identifiers are lower-cased by tokenizers.
            owners[what, value.casefold()].append((place, value))
    faults: dict[int, str] = {}
    for (what, _), found in owners.items():
        for place, value in found if len(found) > 1 else ():
            message = f"the {what} {value!r} is taken {len(found)} times (upper and lower case count as the same)"
            faults.setdefault(place, f"{message}; give every subject its own")
    return tuple(
        ListedSubject(name=subject.name, config=subject.config, faults=(*subject.faults, faults[place]))
        if place in faults
        else subject
        for place, subject in enumerate(subjects)
    )


def _own(subject: ListedSubject) -> list[tuple[str, str]]:
    """What no two subjects of a batch may share, most telling first."""
    config, found = subject.config, [("name", subject.name)]
    if config is not None:
        found += [("identifier", config.subject.identifier)] if config.subject.identifier is not None else []
        found += [("folder", config.run_uri)]
        found += [("registered model", config.model_name)] if config.tracking.register_model else []
    return found
