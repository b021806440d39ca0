"""Make files aside, and give them their final names when they are whole.

Nothing is under a final name before: local files are renamed there, others sent whole, the one that a reader opens
first goes last. What a killed process leaves, the next export removes: a local folder aside that nobody holds, or the
files of a remote folder that says it was begun and has no index.
"""

import fcntl
import os
import secrets
import shutil
import tempfile
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path

from dreambooth.config.addresses import shown
from dreambooth.errors import InputError
from pipelines.apps.export.progress import Bytes, counted_bytes
from pipelines.driver.console import RunConsole
from pipelines.storage.files import (
    absolute,
    check_writable,
    exists,
    is_local,
    join,
    move,
    read_json,
    remove,
    sha256,
    write_json,
)

WEIGHTS, INDEX = ".safetensors", "model_index.json"
_ASIDE, _BEGUN = ".export-", ".export-begun.json"


@dataclass(frozen=True, kw_only=True)
class Written:
    """A file at its final address."""

    address: str
    size: int
    sha256: str


def check_target(to: str, *, file: bool, need_bytes: int) -> str:
    """The absolute address of what will be written: a `.safetensors` file, or a folder.

    Raises InputError if it is no such address, is taken, or can't be written.
    """
    if file and not to.endswith(WEIGHTS):
        raise InputError(f"--to is {shown(to)!r}; expected the name of a file that ends in {WEIGHTS}")
    if not file and to.endswith(WEIGHTS):
        raise InputError(f"--to is {shown(to)!r}; expected a folder, as a pipeline in diffusers' format is one")
    to = absolute(to.rstrip("/"))
    if exists(to) and (file or not _unfinished(to)):
        raise InputError(f"there is something at {shown(to)!r} already; remove it, or give another address with --to")
    check_writable(_parent(to), need_bytes=need_bytes)
    return to


def beside(to: str, ending: str) -> str:
    """The address of a file that belongs to another: `rex.safetensors`, `.curve.png` -> `rex.curve.png`."""
    return to.removesuffix(WEIGHTS) + ending


@contextmanager
def staged(to: str) -> Iterator[Path]:
    """A folder for files on their way to addresses beside `to`; gone afterwards, with what is left in it."""
    if not is_local(to):
        with tempfile.TemporaryDirectory(prefix="dreambooth-export-") as folder:
            yield Path(folder)
        return
    parent = Path(_parent(to))
    parent.mkdir(parents=True, exist_ok=True)
    _remove_abandoned(parent)
    aside, held = _held_folder(parent)
    try:
        yield aside
    finally:
        shutil.rmtree(aside, ignore_errors=True)
        os.close(held)


def _held_folder(parent: Path) -> tuple[Path, int]:
    """A new folder, on the same disk for the renaming, and the descriptor that holds it until it is closed."""
    while True:
        aside = parent / f"{_ASIDE}{secrets.token_hex(4)}"
        aside.mkdir()
        held = os.open(aside, os.O_RDONLY)
        fcntl.flock(held, fcntl.LOCK_EX)
        if aside.is_dir():
            return aside, held
        os.close(held)  # another export took it for abandoned


def _remove_abandoned(parent: Path) -> None:
    """Remove folders aside of exports that were killed: those that no process holds."""
    for aside in parent.glob(f"{_ASIDE}*"):
        with suppress(OSError):  # held, or of a disk that can't tell
            held = os.open(aside, os.O_RDONLY)
            try:
                fcntl.flock(held, fcntl.LOCK_EX | fcntl.LOCK_NB)
                shutil.rmtree(aside, ignore_errors=True)
            finally:
                os.close(held)


def place_files(files: Sequence[tuple[Path, str]], *, console: RunConsole) -> tuple[Written, ...]:
    """Move files to their addresses, in order; after an error none is left there."""
    title, times = ("checksum", 1) if all(is_local(address) for _, address in files) else ("checksum and upload", 2)
    with counted_bytes(console, title, times * _size(path for path, _ in files)) as counted:
        return _place_files(files, counted)


def _place_files(files: Sequence[tuple[Path, str]], counted: Bytes) -> tuple[Written, ...]:
    begun: list[str] = []
    placed: list[Written] = []
    try:
        for path, address in files:
            begun.append(address)
            record = move(path, address, on_bytes=counted.add)
            placed.append(Written(address=address, size=record.size, sha256=record.sha256))
    except BaseException:
        for address in begun:
            with suppress(Exception):
                remove(address)
        raise
    return tuple(placed)


def place_folder(folder: Path, to: str, *, console: RunConsole) -> tuple[Written, ...]:
    """Move a pipeline's folder to its address, its index at the end; after an error nothing is left there."""
    paths = sorted(
        (path for path in folder.rglob("*") if path.is_file()), key=lambda path: (path == folder / INDEX, path)
    )
    named = [(path, join(to, path.relative_to(folder).as_posix())) for path in paths]
    if not is_local(to):
        return _send_folder(named, to, console)
    with counted_bytes(console, "checksum", _size(paths)) as counted:
        written = tuple(
            Written(address=name, size=path.stat().st_size, sha256=sha256(path, on_bytes=counted.add))
            for path, name in named
        )
    folder.rename(to)
    return written


def _send_folder(named: Sequence[tuple[Path, str]], to: str, console: RunConsole) -> tuple[Written, ...]:
    """Send a folder's files between a note that says which, and its removal."""
    note = join(to, _BEGUN)
    if exists(note):
        for address in read_json(note)["files"]:
            remove(address)
    write_json(note, {"files": [address for _, address in named]})
    try:
        return place_files(named, console=console)
    finally:
        with suppress(Exception):
            remove(note)


def _unfinished(to: str) -> bool:
    """Whether a remote folder was begun by an export, and isn't whole."""
    return not is_local(to) and exists(join(to, _BEGUN)) and not exists(join(to, INDEX))


def _size(paths: Iterable[Path]) -> int:
    return sum(path.stat().st_size for path in paths)


def _parent(address: str) -> str:
    return address.rpartition("/")[0] or "/"
