"""Publish results so that readers only see complete ones.

Results live at any fsspec address: a local path, `file://`, `memory://` in tests, `s3://` with the usual AWS variables
or profile. They are uploaded under a fresh prefix `<parent>/<utc time>-<random>/`, each file's size and
sha256 in `manifest.json`, which is written last. A prefix without a manifest is a failed attempt, which
readers ignore.

    manifest = publish(Path("model"), "s3://bucket/rex/model", metadata={"identifier": "sks"})
    published("s3://bucket/rex/model") == manifest
    fetch(manifest, Path("copy"))                       # downloads, and compares sizes and sha256
    with opened(manifest) as directory: ...             # to read: in place where it is local, else a copy
"""

import dataclasses
import datetime
import errno
import hashlib
import json
import re
import secrets
import shutil
import tempfile
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path, PurePosixPath
from typing import Any

import fsspec
from fsspec import AbstractFileSystem
from fsspec.asyn import AsyncFileSystem
from fsspec.implementations.local import LocalFileSystem

from dreambooth.config.addresses import check_address, shown
from dreambooth.errors import InputError
from dreambooth.reach import prove_store
from pipelines.storage.faults import explain

MANIFEST_NAME = "manifest.json"
_FORMAT = 1
_PREFIX = re.compile(r"\d{8}T\d{12}Z-[0-9a-f]{8}")
_OBJECT_STORES = {"s3", "s3a", "gs", "gcs", "abfs", "abfss", "az"}
_PROBE_SECONDS = 15


@dataclasses.dataclass(frozen=True, kw_only=True)
class FileRecord:
    """A file's entry in a manifest."""

    size: int
    sha256: str


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


def filesystem(uri: str, *, patient: bool = True) -> tuple[AbstractFileSystem, str]:
    """The file system of an address, and the path in it.

    `patient` S3 rides out a store that is away for half a minute; otherwise it gives up after seconds.
    Raises InputError for a scheme that fsspec doesn't know, or whose package isn't installed.
    """
    check_address(uri, what="the address")
    options: dict[str, Any] = {}
    if uri.startswith(("s3://", "s3a://")):
        retries = {"mode": "standard", "max_attempts": 8 if patient else 1}
        config = {"connect_timeout": 5, "read_timeout": 60 if patient else 10, "retries": retries}
        # Another process may publish at any time, so a listing is never remembered.
        options = {"config_kwargs": config, "use_listings_cache": False}
    try:
        fs, path = fsspec.core.url_to_fs(uri, **options)
    except (ValueError, ImportError) as error:
        raise InputError(f"the address {shown(uri)!r} can't be used: {error}") from error
    if options and not patient:
        fs.retries = 1  # s3fs's own, around botocore's
    return fs, path


def is_local(uri: str) -> bool:
    """Whether an address is a path on this machine."""
    return isinstance(filesystem(uri)[0], LocalFileSystem)


def absolute(uri: str) -> str:
    """An address independent of the working folder; a local one becomes an absolute path."""
    fs, path = filesystem(uri)
    return path if isinstance(fs, LocalFileSystem) else uri


def full_address(fs: AbstractFileSystem, path: str) -> str:
    """The address of a path in a file system; a local one is its path."""
    return path if isinstance(fs, LocalFileSystem) else str(fs.unstrip_protocol(path))


def join(uri: str, *parts: str) -> str:
    """An address below another one."""
    scheme, separator, rest = uri.rpartition("://")
    return scheme + separator + "/".join([rest.rstrip("/"), *parts] if rest else parts)


def exists(uri: str) -> bool:
    """Whether a file or folder exists."""
    fs, path = filesystem(uri)
    return bool(fs.exists(path))


def read_bytes(uri: str) -> bytes:
    """A whole file; raises FileNotFoundError when there is none."""
    fs, path = filesystem(uri)
    content: bytes = fs.cat_file(path)
    return content


def write_bytes(uri: str, content: bytes) -> None:
    """Write a whole file, making its folder; a reader sees the old content or the new, never a part."""
    _write(*filesystem(uri), content)


def read_json(uri: str) -> Any:
    """A JSON file's value; raises FileNotFoundError, and InputError when it isn't JSON."""
    try:
        return json.loads(read_bytes(uri))
    except ValueError as error:
        raise InputError(f"{uri} isn't JSON ({error}); remove it and run again") from error


def write_json(uri: str, value: Any) -> None:
    """Write a value as JSON."""
    write_bytes(uri, (json.dumps(value, indent=2, sort_keys=True, ensure_ascii=False) + "\n").encode())


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


def upload(path: Path, uri: str) -> FileRecord:
    """Copy a file to an address, however large it is; returns its size and sha256 here.

    Raises OSError when not as many bytes arrived.
    """
    fs, target = filesystem(uri)
    record = FileRecord(size=path.stat().st_size, sha256=sha256(path))
    _make_parent(fs, target)
    _within(_seconds(record.size), fs, "put_file", str(path), target)
    if (size := fs.info(target)["size"]) != record.size:
        raise OSError(errno.EIO, f"{path.name} has {record.size} bytes, but {size} arrived at {uri}")
    return record


def remove(uri: str) -> None:
    """Remove a file, or a folder with its content, if it exists."""
    fs, path = filesystem(uri)
    if fs.exists(path):
        fs.rm(path, recursive=True)


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
        raise InputError(f"{uri} holds no {MANIFEST_NAME}: it isn't a publication, or one that never ended") from None
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


def fetch(publication: Manifest | str, directory: Path) -> Path:
    """Download a publication to a directory, checking each file's size and sha256. Returns the directory.

    Complete files already there aren't fetched again. Raises Damaged.
    """
    manifest = read_manifest(publication) if isinstance(publication, str) else publication
    fs, root = filesystem(manifest.uri)
    for name, record in manifest.files.items():
        target = directory / _check_name(name)
        if target.is_file() and target.stat().st_size == record.size and sha256(target) == record.sha256:
            continue
        target.parent.mkdir(parents=True, exist_ok=True)
        partial = target.with_name(f".{target.name}.{secrets.token_hex(4)}.part")
        try:
            try:
                fs.get_file(f"{root}/{name}", str(partial))
            except FileNotFoundError:
                raise Damaged(f"{name} is in the manifest at {manifest.uri}, but the file is missing there") from None
            _compare(manifest, name, partial)
            partial.replace(target)
        finally:
            partial.unlink(missing_ok=True)
    return directory


@contextmanager
def opened(publication: Manifest | str, *, compare: bool = False) -> Iterator[Path]:
    """A folder with a publication's files within this context: its own if local, else a copy.

    Sizes are checked first, and for a copy, or with `compare`, the sha256 too. Raises Damaged.
    """
    manifest = read_manifest(publication) if isinstance(publication, str) else publication
    directory = _local_directory(manifest, compare=compare)
    if directory is not None:
        yield directory
        return
    with tempfile.TemporaryDirectory(prefix="dreambooth-copy-") as folder:
        yield fetch(manifest, Path(folder))


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


def check_writable(uri: str, *, need_bytes: int = 0) -> None:
    """Write, read back and delete a small file, within seconds; nothing remains, and no folder is made.

    `need_bytes` is compared with the free space, if known. Raises InputError with the fault of the address and a cure.
    """
    prove_store(uri, what=f"can't write to {shown(uri)!r}: it can't be reached")
    fs, root = filesystem(uri, patient=False)
    content = secrets.token_bytes(1 << 16)
    try:
        place = _existing_folder(fs, root.rstrip("/"))
        probe = f"{place}/.probe-{secrets.token_hex(8)}"
        _within(_PROBE_SECONDS, fs, "pipe_file", probe, content)
        try:
            got = fs.cat_file(probe)
        finally:
            fs.rm_file(probe)
    except Exception as error:  # each driver raises its own
        raise InputError(f"can't write to {shown(uri)!r}: {explain(error)}") from error
    if got != content:
        raise InputError(f"{uri!r} gives back other bytes than were written ({len(got)} of {len(content)})")
    if isinstance(fs, LocalFileSystem) and (free := shutil.disk_usage(place or "/").free) < need_bytes:
        raise InputError(f"{uri!r} has {free / 1e9:.1f} GB free, and {need_bytes / 1e9:.1f} GB will be written there")


def _existing_folder(fs: AbstractFileSystem, path: str) -> str:
    """The folder or its nearest existing parent, in which the others will be made."""
    if _has_no_folders(fs):
        return path
    if isinstance(fs, LocalFileSystem):
        with suppress(FileNotFoundError):
            Path(path).stat()  # a name that is too long, or below a file
    while path and not fs.exists(path):
        path = path.rpartition("/")[0]
    if path and not fs.isdir(path):
        raise NotADirectoryError(errno.ENOTDIR, "not a folder", path)
    return path


def pyarrow_filesystem(uri: str) -> tuple[Any, str]:
    """The pyarrow file system and schemeless path of Ray Train's storage.

    Remote ones go through fsspec, so that the same variables, endpoints and retries apply as elsewhere.
    """
    import pyarrow.fs

    fs, path = filesystem(uri)
    if isinstance(fs, LocalFileSystem):
        return pyarrow.fs.LocalFileSystem(), path
    return pyarrow.fs.PyFileSystem(pyarrow.fs.FSSpecHandler(fs)), path


def _write(fs: AbstractFileSystem, path: str, content: bytes) -> None:
    _make_parent(fs, path)
    if not isinstance(fs, LocalFileSystem):
        _within(_seconds(len(content)), fs, "pipe_file", path, content)
        return
    partial = Path(path).with_name(f".{Path(path).name}.{secrets.token_hex(4)}.part")
    try:
        partial.write_bytes(content)
        partial.replace(path)
    finally:
        partial.unlink(missing_ok=True)


def _within(seconds: float, fs: AbstractFileSystem, method: str, *arguments: Any) -> None:
    """Call a sending method, with a TimeoutError after a while.

    S3's drivers ask the store before sending, with no timeout for the answer: they would wait without end for a store
    that accepts the connection and stays silent.
    """
    if isinstance(fs, AsyncFileSystem):
        fsspec.asyn.sync(fs.loop, getattr(fs, f"_{method}"), *arguments, timeout=seconds)
    else:
        getattr(fs, method)(*arguments)


def _seconds(size: int) -> float:
    return 600 + size / 100_000  # bytes in a second over a line that is still worth waiting for


def _make_parent(fs: AbstractFileSystem, path: str) -> None:
    if not _has_no_folders(fs):
        fs.makedirs(fs._parent(path), exist_ok=True)


def _has_no_folders(fs: AbstractFileSystem) -> bool:
    """Whether it is an object store; some drivers would create a missing bucket for a "folder"."""
    protocols = {fs.protocol} if isinstance(fs.protocol, str) else set(fs.protocol)
    return bool(protocols & _OBJECT_STORES)


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


def sha256(path: Path) -> str:
    """sha256 of a file, read piece by piece."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
