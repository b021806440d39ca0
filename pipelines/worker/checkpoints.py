"""A subject's checkpoints in its run folder; training resumes from the newest complete one."""

import datetime
import re
import time
from collections.abc import Callable, Sequence
from contextlib import ExitStack, suppress
from pathlib import Path
from typing import TYPE_CHECKING, Any

from dreambooth.errors import InputError
from pipelines.cluster.collectives import from_all_ranks, from_rank_zero
from pipelines.storage.faults import StorageFull, readable_size, room_for
from pipelines.storage.files import FileRecord, exists, filesystem, join, remove
from pipelines.storage.publications import MANIFEST_NAME, Damaged, Manifest, opened, read_manifest, write_manifest
from pipelines.storage.streams import streamed
from pipelines.tasks import TrainTask
from pipelines.worker.history import History

if TYPE_CHECKING:
    from dreambooth.training.checkpoint_files import CheckpointFile

CHECKPOINTS_KEPT = 2
_FORMAT = 2
"""Of a checkpoint's content: a new one whenever names or shapes of what engines and `History` write change."""
_NAME = re.compile(r"step-\d{8}-([0-9a-f]{16})")


def checkpoint_begun_at(name: str) -> datetime.datetime | None:
    """Start time of a checkpoint, from its folder's name; None for other names."""
    found = _NAME.fullmatch(name)
    return None if found is None else datetime.datetime.fromtimestamp(int(found[1], 16) / 1e9, datetime.UTC)


def checkpoints_of(task: TrainTask, warn: Callable[[str], None]) -> "StoredCheckpoints":
    """The checkpoints of a task; `warn` is called about unreadable ones of earlier versions."""
    config = task.config
    earlier = join(config.run_uri, "checkpoints", f"{config.subject.name}-{task.key}")
    if exists(earlier):
        warn(f"{earlier} holds checkpoints of an earlier version, which can't be read; 'dreambooth gc' removes them")
    uri = join(config.run_uri, "checkpoints", task.key)
    return StoredCheckpoints(uri, need_bytes=task.checkpoint_bytes, warn=warn)


class StoredCheckpoints:
    """Checkpoints `<uri>/step-<n>-<attempt>`: every rank writes its part, then rank 0 the manifest.

    A checkpoint without a manifest is an unfinished attempt. One that differs from its manifest, or was written by
    another version, is skipped in favour of the one before, with a call of `warn` on rank 0. `need_bytes` is the size
    of one.
    """

    def __init__(self, uri: str, *, need_bytes: int, warn: Callable[[str], None]) -> None:
        self._uri, self._need_bytes, self._warn = uri, need_bytes, warn
        self._unreadable: set[str] = set()

    def restore(self, engine: Any) -> History:
        """Load the newest checkpoint that is complete on every rank. Collective: call on every rank."""
        names: list[str] = from_rank_zero(engine, self._left_by_others() if engine.rank == 0 else None)
        for name in reversed(names):
            manifest: Manifest | str = from_rank_zero(engine, self._manifest(name) if engine.rank == 0 else None)
            with ExitStack() as stack:
                found = _whole(manifest, stack)
                faults = [one for one in from_all_ranks(engine, found) if isinstance(one, str)]
                if isinstance(found, Path) and not faults:
                    engine.load(found)
                    return History.load(found)
            self._unreadable.add(name)
            if engine.rank == 0:
                self._warn(f"a checkpoint is passed over: {faults[0]}")
        return History()

    def save(self, engine: Any, history: History) -> None:
        """Write a checkpoint. Collective: call on every rank.

        Raises StorageFull, on every rank, if there is no room, after removing what was written.
        """
        attempt = from_rank_zero(engine, f"{time.time_ns():x}")
        uri = join(self._uri, f"step-{history.step:08d}-{attempt}")
        what = f"the checkpoint of step {history.step} (about {readable_size(self._need_bytes)})"
        files = [*engine.checkpoint_files(), *(history.files() if engine.rank == 0 else [])]
        parts = self._on_all(engine, uri, lambda: _write(files, uri, what))
        records = {name: record for part in parts for name, record in part.items()}
        manifest = Manifest(uri=uri, files=records, metadata={"step": history.step, "format": _FORMAT})
        self._on_all(engine, uri, lambda: self._seal(manifest, what) if engine.rank == 0 else None)

    def _on_all(self, engine: Any, uri: str, write: Callable[[], Any]) -> list[Any]:
        """What `write` returns, from every rank. If one has no room, clears up and raises StorageFull on all."""
        answers = from_all_ranks(engine, _unless_full(write))
        full = next((answer for answer in answers if isinstance(answer, StorageFull)), None)
        if full is not None:
            raise StorageFull(from_rank_zero(engine, self._give_up(uri, full) if engine.rank == 0 else None))
        return answers

    def _seal(self, manifest: Manifest, what: str) -> None:
        """Write the manifest, and remove older checkpoints than those kept."""
        with room_for(what, manifest.uri):
            write_manifest(manifest)
        whole = [name for name in _names(self._uri)[0] if name not in self._unreadable]
        for old in {*whole[:-CHECKPOINTS_KEPT], *self._unreadable}:
            remove(join(self._uri, old))
        self._unreadable.clear()

    def _left_by_others(self) -> list[str]:
        """Checkpoints with a manifest, oldest first; removes unfinished ones."""
        whole, partial = _names(self._uri)
        for name in partial:
            self._warn(f"{join(self._uri, name)} has no {MANIFEST_NAME}: it was never finished, and is removed")
            remove(join(self._uri, name))
        return whole

    def _manifest(self, name: str) -> Manifest | str:
        """A checkpoint's manifest, or its fault."""
        try:
            return read_manifest(join(self._uri, name))
        except InputError as error:
            return str(error).partition(";")[0]  # without the advice for publications

    def _give_up(self, uri: str, full: StorageFull) -> str:
        """Clear what was written. Returns the error, with the last whole checkpoint."""
        with suppress(Exception):
            remove(uri)
        whole, _ = _names(self._uri)
        last = f"the checkpoint of step {int(whole[-1].split('-')[1])}" if whole else "the beginning"
        return f"{full}. The same command goes on from {last}"


def _whole(manifest: Manifest | str, stack: ExitStack) -> Path | str:
    """A folder with a checkpoint's files, verified by its manifest, or the fault of one."""
    if isinstance(manifest, str):
        return manifest
    if manifest.metadata.get("format") != _FORMAT:
        return f"{manifest.uri} was written by another version, which this one can't read"
    try:
        return stack.enter_context(opened(manifest, compare=True))
    except Damaged as error:
        return error.what


def _unless_full(write: Callable[[], Any]) -> Any:
    """What `write` returns, or the StorageFull that it raises."""
    try:
        return write()
    except StorageFull as error:
        return error


def _write(files: "Sequence[CheckpointFile]", uri: str, what: str) -> dict[str, FileRecord]:
    """Write this rank's files; returns their manifest entries."""
    written = {}
    with room_for(what, uri):
        for one in files:
            with streamed(join(uri, one.name)) as stream:
                one.write(one.content, stream)
            written[one.name] = stream.record
    return written


def _names(uri: str) -> tuple[list[str], list[str]]:
    """Checkpoints with a manifest and without one, oldest first."""
    fs, path = filesystem(uri)
    try:
        found = sorted(name.rstrip("/").rsplit("/", 1)[-1] for name in fs.ls(path, detail=False))
    except (FileNotFoundError, NotADirectoryError):
        return [], []
    names = [name for name in found if _NAME.fullmatch(name)]
    whole = [name for name in names if exists(join(uri, name, MANIFEST_NAME))]
    return whole, [name for name in names if name not in whole]
