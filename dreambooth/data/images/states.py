"""The state of a file: as long as it is the same, so is the content, which need not be read to know that."""

import os
import time
from contextlib import suppress

import fsspec

SETTLED_SECONDS = 3.0
"""Age from which a file's times differ from the next one's: a disk's clock has ticks, of up to two seconds."""


def state_of(address: str) -> str | None:
    """The state of a file, or None if it can't be known, or will not differ from that after a change this moment.

    A local file's are its size, its inode and the times of its last changes, one of which nobody can set; a store's
    are size and entity tag. Take it before the file is read.
    """
    if not address.startswith("/"):
        return _state_in_store(address)
    try:
        file = os.open(address, os.O_RDONLY)  # opened, as a network's disk is then asked again
    except OSError:
        return None
    try:
        found = os.fstat(file)
    finally:
        os.close(file)
    if max(found.st_mtime, found.st_ctime) > time.time() - SETTLED_SECONDS:
        return None
    return f"{found.st_size} {found.st_ino} {found.st_mtime_ns} {found.st_ctime_ns}"


def _state_in_store(address: str) -> str | None:
    with suppress(Exception):  # each driver raises its own; who reads the file next, says so better
        filesystem, path = fsspec.core.url_to_fs(address)
        info = filesystem.info(path)
        tag = info.get("ETag") or info.get("etag")
        if isinstance(tag, str) and not tag.startswith("W/"):  # a weak one holds for other bytes, too
            return f"{info['size']} {tag}"
    return None
