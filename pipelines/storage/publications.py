"""How does a reader know that a result is whole?

Results are published: uploaded under a fresh prefix `<parent>/<utc time>-<random>/`, each file's size and sha256 in
`manifest.json`, which is written last. A prefix without a manifest is the leftover of an attempt that died, and no
reader looks at it.

    manifest = publish(Path("model"), "s3://bucket/rex/model", metadata={"identifier": "sks"})
    published("s3://bucket/rex/model") == manifest
    fetch(manifest, Path("copy"))                       # downloads, and compares sizes and sha256
    with opened(manifest) as directory: ...             # to read: in place where it is local, else a copy
"""

import dataclasses
import datetime
import hashlib
import json
import re
import secrets
import tempfile
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path, PurePosixPath
from typing import Any

from fsspec.implementations.local import LocalFileSystem

from dreambooth.errors import InputError
from pipelines.storage.files import (
    FileRecord,
    OnBytes,
    Transfer,
    absolute,
    exists,
    filesystem,
    join,
    read_bytes,
    read_json,
    remove,
    sha256,
    upload,
    write_json,
)

MANIFEST_NAME = "manifest.json"
_FORMAT = 1
_PREFIX = re.compile(r"\d{8}T\d{12}Z-[0-9a-f]{8}")


class Damaged(InputError):
    """A file differs from its manifest; `what` names the file, what was expected and what was got."""

    def __init__(self, what: str) -> None:
        super().__init__(f"{what}; publish it again")
        self.what = what


@dataclasses.dataclass(frozen=True, kw_only=True)
class Manifest:
    """A published set of files: `files` by relative posix name, `uri` the prefix they lie under."""

    uri: str
    files: Mapping[str, FileRecord]
    metadata: Mapping[str, Any]


def publish(
    directory: Path,
    parent_uri: str,
    *,
    metadata: Mapping[str, Any],
    verify: Callable[[Manifest], None] = lambda manifest: None,
) -> Manifest:
    """Upload all files below a directory under a fresh prefix of `parent_uri`, the manifest last.

    `verify` is called with the manifest before it is written, when all files have arrived. After an error the prefix is
    empty. Raises ValueError for a directory without files, with a file named manifest.json,
    or metadata that isn't JSON.
    """
    names = sorted(path.relative_to(directory).as_posix() for path in directory.rglob("*") if path.is_file())
    if not names:
        raise ValueError(f"there is nothing to publish in {directory}")
    if MANIFEST_NAME in names:
        raise ValueError(f"{directory / MANIFEST_NAME} would be hidden by the manifest of the publication")
    metadata = json.loads(json.dumps(metadata))
    now = datetime.datetime.now(datetime.UTC)
    uri = join(absolute(parent_uri), f"{now:%Y%m%dT%H%M%S%fZ}-{secrets.token_hex(4)}")
    try:
        files = {name: upload(directory / name, join(uri, name)) for name in names}
        manifest = Manifest(uri=uri, files=files, metadata=metadata)
        verify(manifest)
        return write_manifest(manifest)
    except BaseException:
        with suppress(Exception):
            remove(uri)
        raise


def write_manifest(manifest: Manifest) -> Manifest:
    """Write the manifest, which makes its files trusted. Call when all of them are written."""
    files = {name: dataclasses.asdict(record) for name, record in manifest.files.items()}
    content = {"format": _FORMAT, "files": files, "metadata": manifest.metadata}
    write_json(join(manifest.uri, MANIFEST_NAME), content)
    return manifest


def published(parent_uri: str) -> Manifest | None:
    """The newest publication below an address, or None; prefixes without a manifest are skipped."""
    fs, root = filesystem(absolute(parent_uri))
    try:
        names = {PurePosixPath(path).name for path in fs.ls(root, detail=False)}
    except (FileNotFoundError, NotADirectoryError):
        return None
    for name in sorted(filter(_PREFIX.fullmatch, names), reverse=True):
        uri = join(absolute(parent_uri), name)
        if exists(join(uri, MANIFEST_NAME)):
            return read_manifest(uri)
    return None


def begun_at(name: str) -> datetime.datetime | None:
    """Start time of a publication by its folder's name; None for other names."""
    if _PREFIX.fullmatch(name) is None:
        return None
    return datetime.datetime.strptime(name.partition("-")[0], "%Y%m%dT%H%M%S%fZ").replace(tzinfo=datetime.UTC)


def read_manifest(uri: str) -> Manifest:
    """The manifest of a published prefix (or its own address); raises InputError if it is missing or damaged."""
    uri = absolute(uri).removesuffix(f"/{MANIFEST_NAME}").rstrip("/")
    address = join(uri, MANIFEST_NAME)
    try:
        content = read_json(address)
    except (FileNotFoundError, NotADirectoryError):
        raise InputError(f"{uri} holds no {MANIFEST_NAME}: it isn't a publication, or an unfinished one") from None
    try:
        if content["format"] != _FORMAT:
            raise ValueError(f"its format is {content['format']!r}, and this version reads {_FORMAT}")
        files = {
            _check_name(name): FileRecord(size=int(record["size"]), sha256=str(record["sha256"]))
            for name, record in content["files"].items()
        }
        return Manifest(uri=uri, files=files, metadata=dict(content["metadata"]))
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        raise InputError(f"{address} isn't a manifest that can be trusted: {error!r}") from error


def manifest_sha256(uri: str) -> str:
    """sha256 of a published prefix's manifest as it is stored, which pins every file of the publication."""
    return hashlib.sha256(read_bytes(join(uri, MANIFEST_NAME))).hexdigest()


def fetch(publication: Manifest | str, directory: Path, *, on_bytes: OnBytes = lambda count: None) -> Path:
    """Download a publication to a directory, checking each file's size and sha256. Returns the directory.

    Complete files already there aren't fetched again; `on_bytes` counts theirs, too. Raises Damaged.
    """
    manifest = read_manifest(publication) if isinstance(publication, str) else publication
    fs, root = filesystem(manifest.uri)
    for name, record in manifest.files.items():
        target = directory / _check_name(name)
        if target.is_file() and target.stat().st_size == record.size and sha256(target) == record.sha256:
            on_bytes(record.size)
            continue
        target.parent.mkdir(parents=True, exist_ok=True)
        partial = target.with_name(f".{target.name}.{secrets.token_hex(4)}.part")
        try:
            try:
                with Transfer(record.size, on_bytes) as transfer:
                    fs.get_file(f"{root}/{name}", str(partial), callback=transfer)
            except FileNotFoundError:
                raise Damaged(f"{name} is in the manifest at {manifest.uri}, but the file is missing there") from None
            _compare(manifest, name, partial)
            partial.replace(target)
        finally:
            partial.unlink(missing_ok=True)
    return directory


@contextmanager
def opened(
    publication: Manifest | str, *, compare: bool = False, on_bytes: OnBytes = lambda count: None
) -> Iterator[Path]:
    """A folder with a publication's files within this context: its own if local, else a copy.

    Sizes are checked first, and for a copy, or with `compare`, the sha256 too. `on_bytes` counts what is downloaded.
    Raises Damaged.
    """
    manifest = read_manifest(publication) if isinstance(publication, str) else publication
    directory = _local_directory(manifest, compare=compare)
    if directory is not None:
        yield directory
        return
    with tempfile.TemporaryDirectory(prefix="dreambooth-copy-") as folder:
        yield fetch(manifest, Path(folder), on_bytes=on_bytes)


def _local_directory(manifest: Manifest, *, compare: bool) -> Path | None:
    fs, root = filesystem(manifest.uri)
    if not isinstance(fs, LocalFileSystem):
        return None
    for name, record in manifest.files.items():
        path = Path(root) / _check_name(name)
        size = path.stat().st_size if path.is_file() else None
        if size != record.size:
            got = "is missing" if size is None else f"has {size} bytes"
            raise Damaged(f"{name} at {manifest.uri} {got}, and its manifest says {record.size} bytes")
        if compare:
            _compare(manifest, name, path)
    return Path(root)


def _check_name(name: str) -> str:
    """Refuse a name outside the folder it is fetched into."""
    path = PurePosixPath(name)
    if not name or path.is_absolute() or ".." in path.parts or "\\" in name or ":" in name or path.as_posix() != name:
        raise InputError(f"the manifest names a file {name!r}; expected a plain relative path")
    return name


def _compare(manifest: Manifest, name: str, path: Path) -> None:
    expected = manifest.files[name]
    size = path.stat().st_size
    if size != expected.size:
        raise Damaged(f"{name} at {manifest.uri}: expected {expected.size} bytes, got {size}")
    if (got := sha256(path)) != expected.sha256:
        raise Damaged(f"{name} at {manifest.uri}: expected sha256 {expected.sha256}, got {got}")
