"""Captions in a folder's metadata.jsonl or metadata.csv, as `datasets`' imagefolder has them.

`file_name` names the photograph, `text` or `caption` holds its caption, and other columns are for others.
"""

import posixpath
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

from dreambooth.amounts import counted
from dreambooth.config.explain import as_given
from dreambooth.config.rows import cell_rows, delimiter_of, json_rows
from dreambooth.config.text_files import decode_text
from dreambooth.data.images.access import accessing, read_file
from dreambooth.data.images.captions import Caption, caption_words
from dreambooth.data.images.names import is_metadata_name, nearest_name
from dreambooth.data.images.place import Place
from dreambooth.errors import InputError

FILE_NAME, TEXTS = "file_name", ("text", "caption")
_MOST_FAULTS = 10


@dataclass(frozen=True, kw_only=True)
class Metadata:
    """Captions by path of their picture, remarks on the files they are of, and those that aren't used, with reasons."""

    captions: dict[str, Caption] = field(default_factory=dict)
    unused: dict[str, str] = field(default_factory=dict)
    remarks: tuple[str, ...] = ()


def read_metadata(place: Place) -> Metadata:
    """All captions of the metadata files beside a place's photographs.

    Raises one InputError for all faults: a file that can't be read, a row without file name or caption, a picture that
    isn't there or has two rows.
    """
    captions: dict[str, Caption] = {}
    unused: dict[str, str] = {}
    faults: list[str] = []
    remarks: list[str] = []
    for path in sorted(path for path in place.beside if is_metadata_name(path)):
        address, folder = place.full(path), posixpath.dirname(path)
        table = _read(path, address)
        if (reason := table.not_captions) is not None:
            unused[path] = reason
            continue
        for line, row in table.rows:
            where = f"line {line} of {address}"
            try:
                picture, words = _caption(place, folder, table.text_column, row)
                if picture in captions:
                    raise InputError(f"{row[FILE_NAME]} has a row already, {captions[picture].where}; leave one out")
                captions[picture] = Caption(text=words, where=where)
            except InputError as error:
                faults.append(f"{where}: {error}")
        if table.open_end is not None:
            remarks.append(
                f"{address} doesn't end with a line break; if it was cut short, so is its last row, {table.open_end!r}"
            )
    if faults:
        more = len(faults) - _MOST_FAULTS
        raise InputError(
            "\n".join([*faults[:_MOST_FAULTS], *([f"and {counted(more, 'more row')}"] if more > 0 else [])])
        )
    return Metadata(captions=captions, unused=unused, remarks=tuple(remarks))


def _read(path: str, address: str) -> "_Table":
    text = decode_text(read_file(address), address)
    try:
        table = _TABLES[path.rpartition(".")[2]](text)
        if set(TEXTS) <= set(table.columns):
            raise InputError(f"either of its columns {' and '.join(TEXTS)} may be the caption; rename one of them")
    except InputError as error:
        raise InputError(f"{address}: {error}") from None
    return table


@dataclass(frozen=True, kw_only=True)
class _Table:
    """(line, row) of a metadata file, its columns, and the last row if it has no line break to prove it whole."""

    rows: Sequence[tuple[int, dict[str, object]]]
    columns: Sequence[str]
    open_end: str | None = None

    @property
    def not_captions(self) -> str | None:
        """Why it holds no captions, or None."""
        listed = ", ".join(self.columns) or "none"
        if FILE_NAME not in self.columns:
            return f"it has no column {FILE_NAME}, which names the pictures of its captions, but {listed}"
        if not set(TEXTS) & set(self.columns):
            return f"it has no captions, which are in a column {' or '.join(TEXTS)}, but {listed}"
        return None

    @property
    def text_column(self) -> str:
        """The column of captions."""
        return next(name for name in TEXTS if name in self.columns)


def _from_jsonl(text: str) -> _Table:
    rows = list(json_rows(text, example='{"file_name": "photo.jpg", "text": "a photo of [V] dog"}'))
    return _Table(rows=rows, columns=list(dict.fromkeys(name for _, row in rows for name in row)))


def _from_csv(text: str) -> _Table:
    delimiter = delimiter_of(text, lambda header: len({FILE_NAME, *TEXTS} & set(header)))
    lines = list(cell_rows(text, delimiter))
    columns = lines[0][1] if lines else []
    for column in dict.fromkeys(columns):
        if columns.count(column) > 1:
            raise InputError(f"the column {column!r} is there {columns.count(column)} times; leave one of them")
    for line, cells in lines[1:]:
        if len(cells) != len(columns):
            cure = "was it cut short?" if len(cells) < len(columns) else f"quote captions that hold {delimiter!r}"
            raise InputError(
                f"line {line} has {counted(len(cells), 'cell')}, but there are {len(columns)} columns; {cure}"
            )
    whole = text.endswith("\n") or len(lines) < 2
    return _Table(
        rows=[(line, dict(zip(columns, cells, strict=True))) for line, cells in lines[1:]],
        columns=columns,
        open_end=None if whole else delimiter.join(lines[-1][1]),
    )


_TABLES: dict[str, Callable[[str], _Table]] = {"jsonl": _from_jsonl, "csv": _from_csv}


def _caption(place: Place, folder: str, column: str, row: dict[str, object]) -> tuple[str, str]:
    """(path of the picture, caption) of a row."""
    name, text = row.get(FILE_NAME), row.get(column)
    if not isinstance(name, str) or not name.strip():
        raise InputError(f"expected the name of a picture as {FILE_NAME}, got {as_given(name)}")
    path = posixpath.join(folder, posixpath.normpath(name.strip()))
    if path not in place.beside and not _exists(place, path):
        near = nearest_name(name, map(posixpath.basename, place.beside))
        hint = f"; did you mean {near}?" if near else ""
        raise InputError(f"it is about {name}, which isn't in {place.full(folder)}{hint}")
    if text is not None and not isinstance(text, str):
        raise InputError(f"expected text as the {column} of {name}, got {as_given(text)}")
    cure = "write one, or leave the row out for the instance prompt"
    return path, caption_words(text or "", f"the {column} of {name}", cure)


def _exists(place: Place, path: str) -> bool:
    with accessing(place.full(path)):
        return bool(place.filesystem.exists(path))
