"""Read the subjects of a batch from a table or folder at any fsspec address.

A table (`plan.tables`) is YAML (a list, or common settings with the list under `subjects`), JSONL or CSV; a folder
holds one folder of images per subject, each with an optional subject.yaml. A subject has a name, a class noun, instance
images, optionally an identifier, and its own settings, nested or dotted:

    subjects:
      - {name: rex, class_noun: dog, instance_images: photos/rex}
      - {name: mug, class_noun: cup, instance_images: [a.jpg, b.jpg, c.jpg], train.max_train_steps: 800}
"""

import re
import shlex
from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any

from fsspec import AbstractFileSystem

from dreambooth.amounts import counted
from dreambooth.config.addresses import named_place
from dreambooth.config.explain import nearest_setting
from dreambooth.config.overrides import merge, nest
from dreambooth.config.settings import DreamBoothConfig, load_config
from dreambooth.config.strict_yaml import parse_yaml
from dreambooth.config.subject import name_from
from dreambooth.config.text_files import decode_text
from dreambooth.data.images.names import has_picture_name
from dreambooth.errors import InputError
from dreambooth.reach import prove_store
from pipelines.plan.tables import NOTE, SUBJECT, Row, Settings, known_names, read_table
from pipelines.storage.faults import explain
from pipelines.storage.files import absolute, filesystem, is_local, join

_SUBJECT_FILE = "subject.yaml"
_SHOWN = 5


@dataclass(frozen=True, kw_only=True)
class ListedSubject:
    """A subject and its place in the list; one with `faults` can't be trained, and may have no config."""

    name: str
    config: DreamBoothConfig | None
    where: str = ""
    faults: tuple[str, ...] = ()


def read_batch(address: str, overrides: Sequence[str] = ()) -> tuple[ListedSubject, ...]:
    """The subjects of a batch; `overrides` (a.b=value) take precedence.

    A subject's own faults are in `faults`: an unknown setting, a duplicate name, identifier or folder. Raises
    InputError for faults of the whole: an unreadable address, no subject, a missing column, a fault that all share.
    """
    common, rows, place = _read(absolute(address))
    if not rows:
        raise InputError(_nobody(address))
    listed = [_listed(row, f"subject {number}", common, place, overrides) for number, row in enumerate(rows, start=1)]
    _raise_fault_of_all(listed)
    return _without_clashes(listed)


def _raise_fault_of_all(subjects: Sequence[ListedSubject]) -> None:
    """What is wrong with every subject alike is one mistake, in the settings of all; say it once."""
    faults = {subject.faults for subject in subjects}
    if len(subjects) > 1 and len(faults) == 1 and all(subject.config is None for subject in subjects):
        raise InputError("\n".join(f"in all {len(subjects)} subjects: {fault}" for fault in faults.pop()))


def _nobody(address: str) -> str:
    """The fault of a batch without subjects, which may be one subject's folder of pictures."""
    with _reading(address):
        fs, path = filesystem(absolute(address), patient=False)
        pictures = sum(map(has_picture_name, fs.ls(path, detail=False))) if fs.isdir(path) else 0
        if not pictures:
            return f"{address} holds no subject; expected a row, or a folder of images, for each"
        noun = "" if "class_noun" in _subject_file(fs, path) else " --class-noun NOUN"
    return (
        f"{address} holds {counted(pictures, 'picture')} and no folder: it is one subject, so run "
        f"'dreambooth run --images {shlex.quote(address)}{noun}'; a batch takes a folder of such folders, or a table"
    )


def _listed(row: Row, name: str, common: Settings, place: str, overrides: Sequence[str]) -> ListedSubject:
    name = str(row.settings.get("name") or name)
    try:
        settings = subject_settings(row.settings, place)
        name = str(settings.get("subject", {}).get("name") or name)
        if row.faults:
            raise InputError("\n".join(row.faults))
    except InputError as error:
        faults = tuple(f"{row.where}: {line}" for line in str(error).splitlines())
        return ListedSubject(name=name, config=None, where=row.where, faults=faults)
    try:
        config = load_config(merge(common, settings), tuple(overrides))
    except InputError as error:
        faults = tuple(_with_cure(line) for line in str(error).splitlines())
        return ListedSubject(name=name, config=None, where=row.where, faults=faults)
    return ListedSubject(name=name, config=config, where=row.where)


def _with_cure(fault: str) -> str:
    if fault != "subject.class_noun is missing":
        return fault
    return f"{fault}; give it as in class_noun: dog, in the subject's row or in its folder's {_SUBJECT_FILE}"


def _read(address: str) -> tuple[Settings, list[Row], str]:
    """(common settings, rows, base folder of relative addresses)."""
    with _reading(address):
        prove_store(address, what=f"can't read {address!r}")
        fs, path = filesystem(address, patient=False)
        try:
            if fs.isdir(path):
                return {}, list(_from_folder(fs, path)), address
            content = fs.cat_file(path)
        except FileNotFoundError:
            raise InputError(
                f"there is nothing at {address!r}; expected a table of subjects or a folder of folders"
            ) from None
    common, rows = read_table(content, address)
    return common, rows, address.rpartition("/")[0] or "."


@contextmanager
def _reading(address: str) -> Iterator[None]:
    try:
        yield
    except InputError:
        raise
    except Exception as error:  # each driver raises its own
        raise InputError(f"can't read {address!r}: {explain(error)}") from error


def _from_folder(fs: AbstractFileSystem, path: str) -> Iterator[Row]:
    for folder in sorted(entry["name"] for entry in fs.ls(path, detail=True) if entry["type"] == "directory"):
        name = folder.rstrip("/").rsplit("/", 1)[-1]
        if name.startswith("."):
            continue
        row: Settings = {"name": name_from(name) or name, "instance_images": name}
        try:
            said = _subject_file(fs, folder)
        except InputError as error:
            yield Row(settings=row, where=name, faults=tuple(str(error).splitlines()))
        else:
            yield Row(settings=row | said, where=name)


def settings_beside(images: Sequence[str]) -> Settings:
    """Settings of a subject from its images' folder: its name and subject.yaml.

    `images` are folders, globs and files at any address; images in several folders give no settings. Raises
    InputError for an unreadable subject.yaml.
    """
    folders = {_folder_of(address) for address in images}
    if len(folders) != 1:
        return {}
    folder = folders.pop()
    with _reading(folder):
        fs, path = filesystem(folder, patient=False)
        said = _subject_file(fs, path)
    row = {"name": name_after(folder)} | said
    return subject_settings(row, folder)


def name_after(folder: str) -> str:
    """A subject's name from its folder's address: `photos/My Dog/` gives my-dog."""
    return name_from(named_place(folder).rstrip("/").rsplit("/", 1)[-1])


def _folder_of(address: str) -> str:
    """The folder of a folder, a glob or a file."""
    address = absolute(address).rstrip("/")
    if wildcard := re.search(r"[*?\[]", address):
        return address[: wildcard.start()].rpartition("/")[0]
    with _reading(address):
        fs, path = filesystem(address, patient=False)
        is_file = "." in address.rsplit("/", 1)[-1] and not fs.isdir(path)
    return address.rpartition("/")[0] if is_file else address


def _subject_file(fs: AbstractFileSystem, folder: str) -> Settings:
    """Settings of the subject.yaml in a folder, if any."""
    path = f"{folder.rstrip('/')}/{_SUBJECT_FILE}"
    if not fs.isfile(path):
        return {}
    said = parse_yaml(decode_text(fs.cat_file(path), path), path)
    if not isinstance(said, dict):
        raise InputError(f"{path} should hold settings such as 'class_noun: dog', got {said!r}")
    groups = {name.partition(".")[0] for name in known_names()} | {NOTE}
    for key in said:
        if key.partition(".")[0] not in groups:
            nearest = nearest_setting(key, known_names())
            hint = f"did you mean {nearest}?" if nearest else "'dreambooth settings' lists all"
            raise InputError(f"{path}: unknown setting {key}; {hint}")
    return dict(said)


def subject_settings(row: Mapping[str, Any], place: str) -> Settings:
    """A row as nested settings, with images relative to `place`. Raises InputError for a setting given twice."""
    settings = nest((f"subject.{key}" if key in SUBJECT else key, value) for key, value in row.items() if key != NOTE)
    subject = settings.get("subject")
    images = subject.get("instance_images") if isinstance(subject, dict) else None
    if type(images) is str:
        settings["subject"]["instance_images"] = _from_place(images, place)
    elif isinstance(images, list):
        settings["subject"]["instance_images"] = [
            _from_place(image, place) if type(image) is str else image for image in images
        ]
    return settings


def _from_place(address: str, place: str) -> str:
    if "://" in address or address.startswith(("/", "~")):
        return address
    return absolute(join(place, address)) if is_local(place) else join(place, address)


def _without_clashes(subjects: Sequence[ListedSubject]) -> tuple[ListedSubject, ...]:
    """The subjects, with faults added for values shared by two that must be unique."""
    owners: dict[tuple[str, str], list[tuple[int, str]]] = defaultdict(list)
    for place, subject in enumerate(subjects):
        for what, value in _own(subject):
            # Names become folders and models, identifiers are lower-cased by tokenizers.
            owners[what, value.casefold()].append((place, value))
    faults: dict[int, str] = {}
    for (what, _), found in owners.items():
        places = ", ".join(subjects[place].where for place, _ in found[:_SHOWN]) + ("…" if len(found) > _SHOWN else "")
        for place, value in found if len(found) > 1 else ():
            message = (
                f"the {what} {value!r} is taken {len(found)} times (upper and lower case count as the same): {places}"
            )
            faults.setdefault(place, f"{message}; give every subject its own")
    return tuple(
        replace(subject, faults=(*subject.faults, faults[place])) if place in faults else subject
        for place, subject in enumerate(subjects)
    )


def _own(subject: ListedSubject) -> list[tuple[str, str]]:
    """Values that must be unique in a batch, most specific first."""
    config, found = subject.config, [("name", subject.name)]
    if config is not None:
        found += [("identifier", config.subject.identifier)] if config.subject.identifier is not None else []
        found += [("folder", config.run_uri)]
        found += [("registered model", config.model_name)] if config.tracking.register_model else []
    return found
