"""Files at any address that fsspec knows: a local path, `file://`, `memory://` in tests, `s3://` with the usual AWS
variables or profile.
"""

import dataclasses
import errno
import hashlib
import json
import os
import secrets
import shutil
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any

import fsspec
from fsspec import AbstractFileSystem
from fsspec.asyn import AsyncFileSystem
from fsspec.implementations.local import LocalFileSystem

from dreambooth.config.addresses import check_address, shown
from dreambooth.errors import InputError
from dreambooth.reach import prove_store
from pipelines.storage.faults import explain

_OBJECT_STORES = {"s3", "s3a", "gs", "gcs", "abfs", "abfss", "az"}
_PROBE_SECONDS = 15
_LOCAL = LocalFileSystem()
OnBytes = Callable[[int], None]
"""Called with a number of bytes that were read, sent or received."""


class Transfer(fsspec.Callback):  # type: ignore[misc]  # fsspec has no types
    """Tells of a file's bytes on their way, each once; what a driver doesn't tell of, at the end."""

    def __init__(self, size: int, on_bytes: OnBytes) -> None:
        super().__init__()
        self._size, self._on_bytes, self._told = size, on_bytes, 0

    def call(self, hook_name: str | None = None, **kwargs: Any) -> None:
        """Called by drivers after every piece."""
        self._tell(min(self.value, self._size))

    def __exit__(self, *raised: Any) -> None:
        if raised[0] is None:
            self._tell(self._size)

    def _tell(self, done: int) -> None:
        if done > self._told:
            told, self._told = self._told, done
            self._on_bytes(done - told)


@dataclasses.dataclass(frozen=True, kw_only=True)
class FileRecord:
    """Size in bytes and sha256 of one file."""

    size: int
    sha256: str


def filesystem(uri: str, *, patient: bool = True) -> tuple[AbstractFileSystem, str]:
    """The file system of an address, and the path in it.

    `patient` S3 rides out a store that is away for a minute, see `PatientS3`; otherwise it gives up after seconds.
    Raises InputError for a scheme that fsspec doesn't know, or whose package isn't installed.
    """
    check_address(uri, what="the address")
    if uri.startswith("/") and "::" not in uri:  # most are, and thousands of subjects have many each
        return _LOCAL, _LOCAL._strip_protocol(uri)
    options: dict[str, Any] = {}
    if uri.startswith(("s3://", "s3a://")):
        if patient:
            from pipelines.storage.patient_s3 import PatientS3

            return PatientS3(), PatientS3._strip_protocol(uri)
        config = {"connect_timeout": 5, "read_timeout": 10, "retries": {"mode": "standard", "max_attempts": 1}}
        # Another process may publish at any time, so a listing is never remembered.
        options = {"config_kwargs": config, "use_listings_cache": False}
    try:
        fs, path = fsspec.core.url_to_fs(uri, **options)
    except (ValueError, ImportError) as error:
        raise InputError(f"the address {shown(uri)!r} can't be used: {error}") from error
    if options:
        fs.retries = 1  # s3fs's own, around botocore's
    return fs, path


def is_local(uri: str) -> bool:
    """Whether an address is a path on this machine."""
    return isinstance(filesystem(uri)[0], LocalFileSystem)


def absolute(uri: str) -> str:
    """An address that means the same in another working folder; a local one becomes an absolute path."""
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
    """Whether there is a file or folder."""
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


def upload(path: Path, uri: str, *, on_bytes: OnBytes = lambda count: None) -> FileRecord:
    """Copy a file to an address, however large it is; returns its size and sha256 here.

    `on_bytes` counts each byte twice: read for the sha256, and sent. Raises OSError when not as many bytes arrived.
    """
    fs, target = filesystem(uri)
    record = FileRecord(size=path.stat().st_size, sha256=sha256(path, on_bytes=on_bytes))
    make_parent(fs, target)
    with Transfer(record.size, on_bytes) as transfer:
        _within(_seconds(record.size), fs, "put_file", str(path), target, callback=transfer)
    if (size := fs.info(target)["size"]) != record.size:
        raise OSError(errno.EIO, f"{path.name} has {record.size} bytes, but {size} arrived at {uri}")
    return record


def move(path: Path, uri: str, *, on_bytes: OnBytes = lambda count: None) -> FileRecord:
    """Move a file to an address, on a local disk by renaming it; returns its size and sha256.

    `on_bytes` counts as `upload` does, on a local disk the bytes read for the sha256 alone.
    """
    if not is_local(uri):
        record = upload(path, uri, on_bytes=on_bytes)
        path.unlink()  # some temporary folders have little room
        return record
    target = Path(filesystem(uri)[1])
    record = FileRecord(size=path.stat().st_size, sha256=sha256(path, on_bytes=on_bytes))
    target.parent.mkdir(parents=True, exist_ok=True)
    path.replace(target)
    return record


def remove(uri: str) -> None:
    """Remove a file, or a folder with all that is in it; nothing where there is none."""
    fs, path = filesystem(uri)
    if fs.exists(path):
        fs.rm(path, recursive=True)


def check_writable(uri: str, *, need_bytes: int = 0) -> None:
    """Write, read back and delete a small file, within seconds; nothing stays, and no folder is made.

    `need_bytes` is what the work will write, compared with the free space where that can be known. Raises InputError
    that says what is wrong with the address and what to do.
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
    """The folder itself, or the nearest above it that is there: in it the others will be made."""
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
    """The pyarrow file system and the path without a scheme that Ray Train takes for its storage.

    Remote ones go through fsspec, so that the same variables, endpoints and retries hold as everywhere else.
    """
    import pyarrow.fs

    fs, path = filesystem(uri)
    if isinstance(fs, LocalFileSystem):
        return pyarrow.fs.LocalFileSystem(), path
    return pyarrow.fs.PyFileSystem(pyarrow.fs.FSSpecHandler(fs)), path


def _write(fs: AbstractFileSystem, path: str, content: bytes) -> None:
    make_parent(fs, path)
    if not isinstance(fs, LocalFileSystem):
        _within(_seconds(len(content)), fs, "pipe_file", path, content)
        return
    _write_locally(path, content)


def _write_locally(path: str, content: bytes) -> None:
    """Write a file by calls of the system alone: a batch's queue waits for three such writes a subject."""
    folder, _, name = path.rpartition("/")
    partial = f"{folder}/.{name}.{secrets.token_hex(4)}.part"
    try:
        file = os.open(partial, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o666)
        try:
            left = memoryview(content)
            while left:  # a disk that becomes full takes a part first
                left = left[os.write(file, left) :]
        finally:
            os.close(file)
        os.replace(partial, path)  # noqa: PTH105 - a Path would cost half as much again
    except BaseException:
        with suppress(OSError):
            os.unlink(partial)  # noqa: PTH108
        raise


def _within(seconds: float, fs: AbstractFileSystem, method: str, *arguments: Any, **named: Any) -> None:
    """Call a method that sends, and give it up with a TimeoutError after a while.

    Before S3's drivers send, they ask the store whether they may, and no timeout of theirs is for the answer: a store
    that takes the connection and then says nothing would be waited for without end.
    """
    if isinstance(fs, AsyncFileSystem):
        fsspec.asyn.sync(fs.loop, getattr(fs, f"_{method}"), *arguments, timeout=seconds, **named)
    else:
        getattr(fs, method)(*arguments, **named)


def _seconds(size: int) -> float:
    return 600 + size / 100_000  # bytes in a second over a line that is still worth waiting for


def make_parent(fs: AbstractFileSystem, path: str) -> None:
    """Make a file's folder, where there are any."""
    if not _has_no_folders(fs):
        fs.makedirs(fs._parent(path), exist_ok=True)


def _has_no_folders(fs: AbstractFileSystem) -> bool:
    """Whether it is an object store; some drivers would make a missing bucket of its "folder"."""
    protocols = {fs.protocol} if isinstance(fs.protocol, str) else set(fs.protocol)
    return bool(protocols & _OBJECT_STORES)


def sha256(path: Path, *, on_bytes: OnBytes = lambda count: None) -> str:
    """sha256 of a file's content, which is read piece by piece; `on_bytes` is called with each piece's size."""
    total, piece = hashlib.sha256(), memoryview(bytearray(1 << 20))
    with path.open("rb", buffering=0) as file:
        while count := file.readinto(piece):
            total.update(piece[:count])
            on_bytes(count)
    return total.hexdigest()
