"""A subject's checkpoints in its own run folder: whichever lane takes the subject up next goes on from them."""

import datetime
import hashlib
import re
import tempfile
import time
from pathlib import Path
from typing import Any

from pipelines.cluster.collectives import from_all_ranks, from_rank_zero
from pipelines.storage.publications import (
    FileRecord,
    Manifest,
    fetch,
    filesystem,
    join,
    read_manifest,
    write_bytes,
    write_manifest,
)
from pipelines.worker.fine_tune import History

CHECKPOINTS_KEPT = 2
_NAME = re.compile(r"step-\d{8}-([0-9a-f]{16})")


def checkpoint_begun_at(name: str) -> datetime.datetime | None:
    """When a checkpoint was begun, from its folder's name; None for a name that isn't one's."""
    found = _NAME.fullmatch(name)
    return None if found is None else datetime.datetime.fromtimestamp(int(found[1], 16) / 1e9, datetime.UTC)


class StoredCheckpoints:
    """Checkpoints `<uri>/step-<n>-<attempt>`: every rank writes its part, then rank 0 the manifest.

    A checkpoint without a manifest is an attempt that died and is passed over.
    """

    def __init__(self, uri: str) -> None:
        self._uri = uri

    def restore(self, engine: Any) -> History:
        """Load the newest whole checkpoint; every rank has to call it."""
        manifest = _newest(self._uri)
        if manifest is None:
            return History()
        with tempfile.TemporaryDirectory(prefix="dreambooth-checkpoint-") as folder:
            fetch(manifest, Path(folder))
            engine.load(Path(folder))
            return History.load(Path(folder))

    def save(self, engine: Any, history: History) -> None:
        """Write a checkpoint; every rank has to call it."""
        attempt = from_rank_zero(engine, f"{time.time_ns():x}")
        uri = join(self._uri, f"step-{history.step:08d}-{attempt}")
        with tempfile.TemporaryDirectory(prefix="dreambooth-checkpoint-") as folder:
            engine.save(Path(folder))
            if engine.rank == 0:
                history.save(Path(folder))
            written = {}
            for path in sorted(path for path in Path(folder).rglob("*") if path.is_file()):
                content, name = path.read_bytes(), path.relative_to(folder).as_posix()
                write_bytes(join(uri, name), content)
                written[name] = FileRecord(size=len(content), sha256=hashlib.sha256(content).hexdigest())
        files = {name: record for part in from_all_ranks(engine, written) for name, record in part.items()}
        if engine.rank == 0:
            write_manifest(Manifest(uri=uri, files=files, metadata={"step": history.step}))
            for old in _whole(self._uri)[:-CHECKPOINTS_KEPT]:
                _remove(join(self._uri, old))

    def remove(self) -> None:
        """Remove all: the model is published."""
        _remove(self._uri)


def _newest(uri: str) -> Manifest | None:
    whole = _whole(uri)
    return read_manifest(join(uri, whole[-1])) if whole else None


def _whole(uri: str) -> list[str]:
    """Names of the checkpoints that have a manifest, oldest first."""
    fs, path = filesystem(uri)
    try:
        names = sorted(name.rstrip("/").rsplit("/", 1)[-1] for name in fs.ls(path, detail=False))
    except (FileNotFoundError, NotADirectoryError):
        return []
    return [name for name in names if fs.exists(f"{path}/{name}/manifest.json")]


def _remove(uri: str) -> None:
    fs, path = filesystem(uri)
    if fs.exists(path):
        fs.rm(path, recursive=True)
