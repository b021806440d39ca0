"""What attempts that died have left behind, found and removed: `dreambooth gc`.

A publication without a manifest is what an upload left that never ended; no reader looks at it, but it takes room. An
upload that is still going on looks the same, so only old prefixes are taken.
"""

import datetime
from dataclasses import dataclass

from dreambooth.errors import InputError
from pipelines.storage import MANIFEST_NAME, absolute, filesystem, is_prefix


@dataclass(frozen=True, kw_only=True)
class Leftover:
    """A prefix without a manifest: its address, size in bytes and when it was begun."""

    uri: str
    size: int
    begun: datetime.datetime


def find_leftovers(uri: str, *, older_than: datetime.timedelta) -> tuple[Leftover, ...]:
    """All publications anywhere below an address that have no manifest and were begun longer ago than `older_than`.

    Raises InputError when there is nothing at the address.
    """
    fs, root = filesystem(absolute(uri))
    if not fs.exists(root):
        raise InputError(f"there is nothing at {uri!r}; expected a folder that holds runs, such as output")
    sizes: dict[str, int] = {}
    whole = set()
    for path, info in fs.find(root, detail=True).items():
        prefix = _prefix_of(path, root)
        if prefix is not None:
            sizes[prefix] = sizes.get(prefix, 0) + int(info["size"])
            if path == f"{prefix}/{MANIFEST_NAME}":
                whole.add(prefix)
    now = datetime.datetime.now(datetime.UTC)
    found = [Leftover(uri=prefix, size=size, begun=_begun(prefix)) for prefix, size in sizes.items()]
    return tuple(one for one in found if one.uri not in whole and now - one.begun > older_than)


def remove_leftovers(uri: str, leftovers: tuple[Leftover, ...]) -> None:
    """Delete what `find_leftovers` found below the same address."""
    fs, _ = filesystem(absolute(uri))
    for leftover in leftovers:
        fs.rm(leftover.uri, recursive=True)


def _prefix_of(path: str, root: str) -> str | None:
    """The outermost published prefix that a file below `root` lies in, if any."""
    parts = path.split("/")
    for depth in range(len(root.rstrip("/").split("/")), len(parts) - 1):
        if is_prefix(parts[depth]):
            return "/".join(parts[: depth + 1])
    return None


def _begun(prefix: str) -> datetime.datetime:
    """A prefix says in its name when it was begun."""
    stamp = prefix.rsplit("/", 1)[-1].partition("-")[0]
    return datetime.datetime.strptime(stamp, "%Y%m%dT%H%M%S%fZ").replace(tzinfo=datetime.UTC)
