"""Hash encoders by their files and transforms, so that figures identify what measured them."""

import functools
import hashlib
from collections.abc import Sequence
from pathlib import Path

from dreambooth.evaluation.encoders import Transform

_SUFFIXES = (".safetensors", ".bin", ".pth", ".json", ".txt")


def fingerprint(*encoders: tuple[Path, Transform | None], definition: str) -> str:
    """First 16 hex digits of the sha256 over the encoders' files, their transforms and how they are used.

    `definition` names what no file records, such as the features compared; change it when that changes.
    """
    total = hashlib.sha256(definition.encode())
    for directory, transform in encoders:
        for path in sorted(path for path in directory.iterdir() if path.suffix in _SUFFIXES):
            state = path.stat()
            total.update(f"{path.name} {_digest(path, state.st_size, state.st_mtime_ns)}\n".encode())
        total.update(repr(transform).encode())
    return total.hexdigest()[:16]


def fingerprint_of_files(directory: Path, files: Sequence[Path], *, definition: str) -> str:
    """Fingerprint of an encoder that reads these files of a folder and makes its own transform."""
    total = hashlib.sha256(definition.encode())
    for path in sorted(files):
        state = path.stat()
        name = path.relative_to(directory).as_posix()
        total.update(f"{name} {_digest(path, state.st_size, state.st_mtime_ns)}\n".encode())
    return total.hexdigest()[:16]


@functools.cache
def _digest(path: Path, size: int, modified: int) -> str:
    """The file's sha256, computed once in a process for as long as size and time stay what they are."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
