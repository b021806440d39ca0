"""What lies at an address of photographs: a folder, a glob or a file, local or at any fsspec address."""

import os
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import fsspec
from fsspec.implementations.local import LocalFileSystem

from dreambooth.data.images.access import EXPECTED, accessing
from dreambooth.data.images.names import HEAD_BYTES, caption_names, metadata_names
from dreambooth.errors import InputError
from dreambooth.reach import prove_store


@dataclass(frozen=True, kw_only=True)
class Place:
    """Content of an address: the `files` and `folders` it names, and the files `beside` them."""

    address: str
    filesystem: Any
    files: Sequence[str]
    folders: Sequence[str] = ()
    beside: frozenset[str]

    def full(self, path: str) -> str:
        """An address valid in every process: absolute, with the protocol unless it is local."""
        local = "file" in self.filesystem.protocol
        return path if local else str(self.filesystem.unstrip_protocol(path))

    def head(self, path: str) -> bytes:
        """The first bytes of a file."""
        with accessing(self.full(path)):
            content: bytes = self.filesystem.cat_file(path, start=0, end=HEAD_BYTES)
        return content


def look_at(address: str) -> Place:
    """The place at an address. Raises InputError if there is nothing, or it can't be read."""
    with accessing(address):
        prove_store(address, what=f"can't read {address}")
        filesystem, path = fsspec.core.url_to_fs(address)
        # Some cache listings for the life of the process; pictures may have been added since.
        filesystem.invalidate_cache()
        if filesystem.isdir(path):
            files, folders = listing(filesystem, path)
            if not files and not folders:
                raise InputError(f"the folder {address} holds no files; {EXPECTED}")
            return Place(address=address, filesystem=filesystem, files=files, folders=folders, beside=frozenset(files))
        if filesystem.exists(path):
            files = [path]
        elif any(wildcard in path for wildcard in "*?["):
            files = [entry for entry in filesystem.glob(path) if not filesystem.isdir(entry)]
            if not files:
                raise InputError(f"no file matches {address}; {EXPECTED}")
        else:
            raise FileNotFoundError(address)
        return Place(address=address, filesystem=filesystem, files=files, beside=_beside(filesystem, files))


def listing(filesystem: Any, path: str) -> tuple[list[str], list[str]]:
    """Files and folders directly in a folder."""
    if isinstance(filesystem, LocalFileSystem):  # fsspec looks up the size and the owner of each, too
        with os.scandir(path) as found:
            kinds = {f"{path.rstrip('/')}/{one.name}": one.is_dir(follow_symlinks=False) for one in found}
    else:
        kinds = {one["name"]: one["type"] == "directory" for one in filesystem.ls(path, detail=True)}
    files = [name for name, is_folder in kinds.items() if not is_folder]
    folders = [name.rstrip("/") for name, is_folder in kinds.items() if is_folder]
    return sorted(files), sorted(folders)


def _beside(filesystem: Any, files: Sequence[str]) -> frozenset[str]:
    """Files beside the given ones; where folders can't be listed, only names of captions are tried."""
    try:
        parents = {path.rpartition("/")[0] for path in files}
        return frozenset(name for parent in parents for name in listing(filesystem, parent)[0])
    except Exception:  # noqa: BLE001 - a web server, for one
        names = {name for path in files for name in (*caption_names(path), *metadata_names(path))}
        return frozenset(name for name in names if filesystem.exists(name))
