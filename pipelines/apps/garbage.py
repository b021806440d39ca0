"""`dreambooth gc`: find and remove leftovers of failed attempts.

A publication or checkpoint without a manifest is an unfinished upload: unused, but it takes room. An upload in progress
looks the same, so only old ones are removed.
"""

import datetime
import posixpath
from dataclasses import dataclass

from dreambooth.config.addresses import shown
from dreambooth.errors import InputError
from dreambooth.reach import prove_store
from pipelines.storage.files import absolute, filesystem, full_address
from pipelines.storage.publications import MANIFEST_NAME, begun_at
from pipelines.worker.checkpoints import checkpoint_begun_at


@dataclass(frozen=True, kw_only=True)
class Leftover:
    """A publication or checkpoint without a manifest: its address, size in bytes and start time."""

    uri: str
    size: int
    begun: datetime.datetime


def find_leftovers(uri: str, *, older_than: datetime.timedelta) -> tuple[Leftover, ...]:
    """All publications and checkpoints below an address that have no manifest and are older than `older_than`.

    Raises InputError if there is nothing at the address.
    """
    if uri.startswith("models:"):
        raise InputError(f"{uri!r} is a registered model; expected a folder that holds runs, such as output")
    prove_store(uri, what=f"can't read {shown(uri)!r}")
    fs, root = filesystem(absolute(uri))
    if not fs.exists(root):
        raise InputError(f"there is nothing at {shown(uri)!r}; expected a folder that holds runs, such as output")
    sizes: dict[str, int] = {}
    files = fs.find(root, detail=True)
    for path, info in files.items():
        if (prefix := _prefix_of(path, root)) is not None:
            sizes[prefix] = sizes.get(prefix, 0) + int(info["size"])
    now = datetime.datetime.now(datetime.UTC)
    return tuple(
        Leftover(uri=full_address(fs, prefix), size=size, begun=begun)
        for prefix, size in sizes.items()
        if f"{prefix}/{MANIFEST_NAME}" not in files
        and (begun := _begun(posixpath.basename(prefix))) is not None
        and now - begun > older_than
    )


def remove_leftovers(leftovers: tuple[Leftover, ...]) -> None:
    """Delete leftovers."""
    for leftover in leftovers:
        fs, path = filesystem(leftover.uri)
        fs.rm(path, recursive=True)


def _prefix_of(path: str, root: str) -> str | None:
    """The outermost publication or checkpoint around a file below `root`, if any."""
    parts = path.split("/")
    for depth in range(len(root.rstrip("/").split("/")), len(parts) - 1):
        if _begun(parts[depth]) is not None:
            return "/".join(parts[: depth + 1])
    return None


def _begun(name: str) -> datetime.datetime | None:
    """Start time in the folder name of a publication or checkpoint; None for other names."""
    return begun_at(name) or checkpoint_begun_at(name)
