"""Exports that were broken off without a chance to tidy up: the next one takes their place."""

import fcntl
import os
import shutil
from collections.abc import Iterator
from pathlib import Path

import fsspec
import pytest
from changed_models import publish_changed
from click.testing import CliRunner, Result
from fsspec.implementations.memory import MemoryFileSystem

from pipelines.cli import main

TO = "memory://exports/rex"


@pytest.fixture
def store() -> Iterator[MemoryFileSystem]:
    filesystem = fsspec.filesystem("memory")
    yield filesystem
    if filesystem.exists("/exports"):
        filesystem.rm("/exports", recursive=True)


@pytest.fixture
def model(tiny_pipeline: Path, tmp_path: Path) -> str:
    return publish_changed(tiny_pipeline, tmp_path, lambda name, tensor: tensor)


def export(model: str, to: str = TO) -> Result:
    return CliRunner().invoke(main, ["export", model, "--format", "diffusers", "--to", to, "--quiet"])


def break_off(store: MemoryFileSystem, model: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """An export whose store is gone with the third upload, so that nothing can be removed from it either."""
    sent: list[str] = []
    put, rm = store.put_file, store.rm

    def put_file(path: str, target: str, **named: object) -> None:
        sent.append(target)
        if len(sent) >= 3:
            raise ConnectionError("the store is gone")
        put(path, target, **named)

    def remove(path: str, **named: object) -> None:
        if len(sent) >= 3:
            raise ConnectionError("the store is gone")
        rm(path, **named)

    with monkeypatch.context() as patch:
        patch.setattr(MemoryFileSystem, "put_file", lambda self, *given, **named: put_file(*given, **named))
        patch.setattr(MemoryFileSystem, "rm", lambda self, *given, **named: remove(*given, **named))
        assert export(model).exit_code == 1
    assert 2 < len(store.find("/exports/rex")) < 5
    assert not store.exists("/exports/rex/model_index.json")


def test_an_unfinished_folder_is_replaced(store: MemoryFileSystem, model: str, monkeypatch: pytest.MonkeyPatch) -> None:
    break_off(store, model, monkeypatch)
    result = export(model)
    assert result.exit_code == 0, result.output
    named = {line.split()[1].removeprefix("memory:/") for line in result.stdout.splitlines()}
    assert set(store.find("/exports/rex")) == named  # and no note of its beginning
    assert "there is something at" in export(model).stderr  # now it is whole


def test_what_is_not_of_an_export_is_not_touched(
    store: MemoryFileSystem, model: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    store.pipe_file("/exports/other/notes.txt", b"mine")
    assert "there is something at" in export(model, "memory://exports/other").stderr
    break_off(store, model, monkeypatch)
    store.pipe_file("/exports/rex/notes.txt", b"mine")
    assert export(model).exit_code == 0
    assert store.cat_file("/exports/rex/notes.txt") == b"mine"


def test_a_local_folder_aside_goes_with_the_next_export_unless_somebody_holds_it(model: str, tmp_path: Path) -> None:
    abandoned, running = tmp_path / ".export-0123abcd", tmp_path / ".export-4567abcd"
    for folder in (abandoned, running):
        shutil.copytree(model, folder / "model")
    held = os.open(running, os.O_RDONLY)
    fcntl.flock(held, fcntl.LOCK_EX)
    try:
        assert export(model, str(tmp_path / "out")).exit_code == 0
    finally:
        os.close(held)
    assert not abandoned.exists()
    assert (running / "model" / "model_index.json").is_file()
    assert export(model, str(tmp_path / "again")).exit_code == 0
    assert list(tmp_path.glob(".export-*")) == []
