"""A folder and a store in memory for photographs of a subject."""

from collections.abc import Iterator
from pathlib import Path

import fsspec
import pytest


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    folder = tmp_path / "rex"
    folder.mkdir()
    return folder


@pytest.fixture
def memory() -> Iterator[fsspec.AbstractFileSystem]:
    filesystem = fsspec.filesystem("memory")
    yield filesystem
    filesystem.store.clear()
    filesystem.pseudo_dirs[:] = [""]
