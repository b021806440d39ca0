"""What attempts that died have left behind, found and removed: `dreambooth gc`.

A publication without a manifest is what an upload left that never ended, and so is a checkpoint without one; no
reader looks at them, but they take room. An upload that is still going on looks the same, so only old ones are taken.
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
    """A publication or checkpoint without a manifest: its address, size in bytes and when it was begun."""

    uri: str
    size: int
    begun: datetime.datetime


def find_leftovers(uri: str, *, older_than: datetime.timedelta) -> tuple[Leftover, ...]:
    """All publications and checkpoints anywhere below an address that have no manifest and are older than this.

    Raises InputError when there is nothing at the address.
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
    """Delete what `find_leftovers` found."""
    for leftover in leftovers:
        fs, path = filesystem(leftover.uri)
        fs.rm(path, recursive=True)


def _prefix_of(path: str, root: str) -> str | None:
    """The outermost publication or checkpoint that a file below `root` lies in, if any."""
    parts = path.split("/")
    for depth in range(len(root.rstrip("/").split("/")), len(parts) - 1):
        if _begun(parts[depth]) is not None:
            return "/".join(parts[: depth + 1])
    return None


def _begun(name: str) -> datetime.datetime | None:
    """A folder's name says when it was begun, if it is one of a publication or a checkpoint."""
    return begun_at(name) or checkpoint_begun_at(name)
