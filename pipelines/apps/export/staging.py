"""Make files aside, and give them their final names when they are whole.

Nothing is under a final name before: local files are renamed there, others sent whole, the one that a reader opens
first goes last.
"""

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
from pipelines.storage.files import absolute, check_writable, exists, is_local, join, move, remove, sha256

WEIGHTS = ".safetensors"


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
    if exists(to):
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
    aside = parent / f".export-{secrets.token_hex(4)}"  # on the same disk, for the renaming
    aside.mkdir()
    try:
        yield aside
    finally:
        shutil.rmtree(aside, ignore_errors=True)


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


def place_folder(folder: Path, to: str, *, last: str, console: RunConsole) -> tuple[Written, ...]:
    """Move a folder to its address, the file `last` at the end; after an error nothing is left there."""
    paths = sorted((path for path in folder.rglob("*") if path.is_file()), key=lambda path: (path.name == last, path))
    named = [(path, join(to, path.relative_to(folder).as_posix())) for path in paths]
    if not is_local(to):
        return place_files(named, console=console)
    with counted_bytes(console, "checksum", _size(paths)) as counted:
        written = tuple(
            Written(address=name, size=path.stat().st_size, sha256=sha256(path, on_bytes=counted.add))
            for path, name in named
        )
    folder.rename(to)
    return written


def _size(paths: Iterable[Path]) -> int:
    return sum(path.stat().st_size for path in paths)


def _parent(address: str) -> str:
    return address.rpartition("/")[0] or "/"
