"""Write a file to any address as a stream: hashed on the way, sent in parts, whole in no memory."""

import errno
import hashlib
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from fsspec.implementations.local import LocalFileSystem
from fsspec.spec import AbstractBufferedFile

from pipelines.storage.files import FileRecord, filesystem, make_parent

_PIECE_BYTES = 1 << 22
"""What is handed on at a time: drivers keep it until there is enough for a part (s3fs: 50 MiB)."""


class Stream:
    """A file to write to. `record` is of what has been written."""

    def __init__(self, file: Any) -> None:
        self._file, self._hash, self._size = file, hashlib.sha256(), 0

    def write(self, content: bytes | memoryview, /) -> int:
        """Append bytes, however many; returns their number."""
        view = memoryview(content).cast("B")
        for start in range(0, len(view), _PIECE_BYTES):
            piece = view[start : start + _PIECE_BYTES]
            self._hash.update(piece)
            self._file.write(piece)
            self._size += len(piece)
        return len(view)

    def flush(self) -> None:
        """Nothing: parts are sent when they are full."""

    @property
    def record(self) -> FileRecord:
        """Size and sha256."""
        return FileRecord(size=self._size, sha256=self._hash.hexdigest())


@contextmanager
def streamed(uri: str) -> Iterator[Stream]:
    """A new file at an address, complete when this context ends; after an error there is none.

    Raises OSError when not as many bytes arrived.
    """
    fs, target = filesystem(uri)
    make_parent(fs, target)
    file = fs.open(target, "wb")
    stream = Stream(file)
    try:
        yield stream
        file.close()
    except BaseException:
        _abandon(file)
        if isinstance(fs, LocalFileSystem):
            Path(target).unlink(missing_ok=True)  # so that what is free is what was before
        raise
    if (size := fs.info(target)["size"]) != stream.record.size:
        raise OSError(errno.EIO, f"{stream.record.size} bytes were written, but {size} arrived at {uri}")


def _abandon(file: Any) -> None:
    """Close a file without completing it."""
    with suppress(Exception):
        file.discard()  # the parts sent so far
    with suppress(Exception):
        if isinstance(file, AbstractBufferedFile):
            file.closed = True  # its close would complete it
        else:
            file.close()
