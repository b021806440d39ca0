"""Read files, local or at any fsspec address, with readable errors."""

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import fsspec

from dreambooth.errors import InputError

EXPECTED = "expected a folder, a glob or a list of .jpg, .png, .webp, .heic, .avif, .tif or other pictures"


@contextmanager
def accessing(address: str) -> Iterator[None]:
    """Turn any file system's error into an InputError with the address and the cause."""
    try:
        yield
    except InputError:
        raise
    except FileNotFoundError:
        raise InputError(f"there is nothing at {address}; {EXPECTED}") from None
    except Exception as error:  # noqa: BLE001 - every fsspec backend has exceptions of its own
        raise InputError(f"can't read {address}: {error}; {EXPECTED} that this machine can read") from None


def read_file(address: str) -> bytes:
    """Read a file. Raises InputError with its name and the cause if it can't be read."""
    with accessing(address):
        if address.startswith("/"):  # thousands of subjects have many files, and a disk's need no detour
            return Path(address).read_bytes()
        filesystem, path = fsspec.core.url_to_fs(address)
        content: bytes = filesystem.cat_file(path)
    return content
