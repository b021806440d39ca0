"""A subject's checkpoints in its run folder; training resumes from the newest complete one."""

import datetime
import re
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack, suppress
from pathlib import Path
from typing import TYPE_CHECKING, Any

from dreambooth.errors import Diverged, InputError
from pipelines.cluster.collectives import from_all_ranks, from_rank_zero, group_behind
from pipelines.storage.faults import StorageFull, StoreAway, first_line, readable_size, room_for
from pipelines.storage.files import FileRecord, exists, filesystem, join, remove
from pipelines.storage.publications import MANIFEST_NAME, Damaged, Manifest, opened, read_manifest, write_manifest
from pipelines.storage.streams import streamed
from pipelines.tasks import TrainTask
from pipelines.worker.behind import Behind
from pipelines.worker.history import History

if TYPE_CHECKING:
    from dreambooth.training.checkpoint_files import CheckpointFile

CHECKPOINTS_KEPT = 2
_FORMAT = 2
"""Version of a checkpoint's content, raised whenever names or shapes of what engines and `History` write change."""
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
    """Checkpoints `<uri>/step-<n>-<attempt>`: every rank writes its part, then rank 0 the manifest, in threads.

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

    def begin(self, engine: Any, history: History) -> Behind:
        """Begin a checkpoint; the one before has ended. Collective: call on every rank.

        On every rank it ends with an error if it does on one, after removing what was written: StorageFull if there is
        no room, Diverged if a tensor isn't finite. Raises Diverged if a gradient wasn't.
        """
        attempt = from_rank_zero(engine, f"{time.time_ns():x}")
        uri = join(self._uri, f"step-{history.step:08d}-{attempt}")
        what = f"the checkpoint of step {history.step} (about {readable_size(self._need_bytes)})"
        metadata, group = {"step": history.step, "format": _FORMAT}, group_behind(engine)
        files = history.files() if engine.rank == 0 else []
        snapshot = engine.snapshot()  # from here on the engine waits for the thread

        def write() -> None:
            written = _outcome(lambda: _write([*snapshot.make(), *files], uri, what), engine)
            everyone = from_all_ranks(engine, written, group)
            end = _outcome(lambda: self._seal(uri, everyone, metadata, what), engine) if engine.rank == 0 else None
            if isinstance(error := from_rank_zero(engine, end, group), Exception):
                raise error

        return Behind(write)

    def _seal(self, uri: str, parts: Sequence[Any], metadata: Mapping[str, Any], what: str) -> None:
        """Write the manifest of all ranks' parts, and remove older checkpoints than those kept.

        If one of them is an error, or there is another, remove what was written and raise it.
        """
        try:
            for error in (part for part in parts if isinstance(part, Exception)):
                raise error
            files = {name: record for part in parts for name, record in part.items()}
            with room_for(what, uri):
                write_manifest(Manifest(uri=uri, files=files, metadata=metadata))
        except Exception as error:
            with suppress(Exception):
                remove(uri)
            if isinstance(error, StorageFull):
                raise StorageFull(f"{error}. The same command continues from {self._last()}") from error
            raise
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

    def _last(self) -> str:
        """The last whole checkpoint, in words."""
        whole, _ = _names(self._uri)
        return f"the checkpoint of step {int(whole[-1].split('-')[1])}" if whole else "the beginning"


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


def _outcome(call: Callable[[], Any], engine: Any) -> Any:
    """What a function returns, or the exception that it raises, in a form that can be sent to other ranks."""
    try:
        return call()
    except Exception as error:  # noqa: BLE001 - raised on every rank
        if engine.world_size == 1 or isinstance(error, StorageFull | StoreAway | Diverged):
            return error
        return RuntimeError(f"rank {engine.rank}: {type(error).__name__}: {first_line(error)}")


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
