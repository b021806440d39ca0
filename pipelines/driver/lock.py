"""One command at a time in a folder: a second one would train the same subjects and delete what the first still needs.

The lock is a small file that its command writes anew every few seconds, so a command that was killed holds none.
"""

import os
import secrets
import socket
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Self

from dreambooth.amounts import duration
from dreambooth.errors import InputError
from pipelines.storage.faults import explain
from pipelines.storage.files import join, read_json, remove, write_json

BEAT_SECONDS = 5.0
"""Seconds between two writes of a lock that is held."""
PATIENCE_SECONDS = 3 * BEAT_SECONDS
"""Seconds without a write after which another machine's lock counts as left behind."""
_LOOK_SECONDS = 0.5
_ENDING_SECONDS = 2.0
"""Seconds that a write on its way is waited for: a store that is away keeps it for a minute."""


@dataclass(frozen=True, kw_only=True)
class _Holder:
    """The command that holds a lock: its `machine` and process, when that was created, and the number of its write.

    `created` and `since` are seconds since the epoch.
    """

    token: str
    host: str
    machine: str
    process: int
    created: float
    since: float
    beat: int = 0

    @classmethod
    def here(cls) -> Self:
        """This process."""
        import psutil

        return cls(
            token=secrets.token_hex(8),
            host=socket.gethostname(),
            machine=_machine(),
            process=os.getpid(),
            created=psutil.Process().create_time(),
            since=time.time(),
        )

    def __str__(self) -> str:
        """The holder in a sentence."""
        return f"process {self.process} on {self.host}, since {datetime.fromtimestamp(self.since, UTC):%H:%M:%S} UTC"


@contextmanager
def locked(uri: str, *, say: Callable[[str], None]) -> Iterator[Callable[[], None]]:
    """Hold the lock of a folder.

    Yields a function that raises InputError if another command took the lock at the same moment: call it when some
    seconds have passed, before work starts. Raises InputError at once if another command holds it. A lock of another
    machine is watched for fifteen seconds, which `say` says.
    """
    own, over = _Holder.here(), threading.Event()
    _wait_until_free(uri, say)
    write_json(_address(uri), asdict(own))

    def beat() -> None:
        number = 0
        while not over.wait(BEAT_SECONDS):
            number += 1
            with suppress(Exception):  # a store that is away has other ways to stop a command
                if _holds(own, uri):
                    write_json(_address(uri), asdict(own) | {"beat": number})

    def confirm() -> None:
        holder = _holder(uri)
        if holder is not None and holder.token != own.token:
            raise InputError(_refusal(holder, uri))

    thread = threading.Thread(target=beat, name="lock", daemon=True)
    thread.start()
    try:
        yield confirm
    finally:
        over.set()
        thread.join(_ENDING_SECONDS)
        with suppress(Exception):  # one that is left holds nobody up
            if _holds(own, uri):
                remove(_address(uri))


def _address(uri: str) -> str:
    return join(uri, "lock.json")


def _wait_until_free(uri: str, say: Callable[[str], None]) -> None:
    """Raises InputError if a command that is at work holds the lock."""
    holder = _holder(uri)
    if holder is None or (holder.machine == _machine() and not _is_alive(holder)):
        return
    if holder.machine != _machine():
        say(f"{holder} may still be at work in {uri}; waiting up to {duration(PATIENCE_SECONDS)} to find out")
        deadline = time.monotonic() + PATIENCE_SECONDS
        while (now := _holder(uri)) == holder:
            if time.monotonic() > deadline:
                return
            time.sleep(_LOOK_SECONDS)
        if now is None:
            return
        holder = now
    raise InputError(_refusal(holder, uri))


def _refusal(holder: _Holder, uri: str) -> str:
    return (
        f"another command is at work in {uri}: {holder}; wait until it has finished, or stop it with Ctrl-C, and run "
        f"this one again"
    )


def _holder(uri: str) -> _Holder | None:
    """Who holds a lock; None without one, or where the file says nothing of use."""
    try:
        return _Holder(**read_json(_address(uri)))
    except (FileNotFoundError, NotADirectoryError, InputError, TypeError):
        return None
    except Exception as error:  # each driver raises its own
        raise InputError(f"can't read {_address(uri)!r}: {explain(error)}") from error


def _holds(own: _Holder, uri: str) -> bool:
    holder = _holder(uri)
    return holder is not None and holder.token == own.token


def _machine() -> str:
    """What processes are numbered in: a machine since it was started, or a container of it."""
    parts = [socket.gethostname()]
    with suppress(OSError):  # Linux has these
        parts.append(Path("/proc/sys/kernel/random/boot_id").read_text(encoding="ascii").strip())
        parts.append(str(Path("/proc/self/ns/pid").readlink()))
    return " ".join(parts)


def _is_alive(holder: _Holder) -> bool:
    """Whether a process of this machine is the one that took the lock, and not a later one of its number."""
    import psutil

    try:
        return bool(abs(psutil.Process(holder.process).create_time() - holder.created) < 1.0)
    except psutil.Error:
        return False
