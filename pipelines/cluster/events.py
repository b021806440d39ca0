"""What workers tell the driver while they work: a mailbox on the cluster, and a thread that empties it here.

Only the driver writes to MLflow and to the terminal; workers post small plain messages. Posting waits for nothing and
raises nothing: a mailbox that is full drops its oldest messages, one that has died is made again, empty. What is lost
on the way is in the training's record, and `complete_curves` makes up for it.
"""

import contextlib
import threading
from collections import deque
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

POLL_SECONDS = 0.3
_MOST_MESSAGES = 1000
_MOST_ON_THE_WAY = 1000
_ANSWER_SECONDS = 10.0
_ENDING_SECONDS = 20.0

Message = dict[str, Any]


class Mailbox:
    """The workers' side; it can be sent to other processes."""

    def __init__(self, actor: Any) -> None:
        self._actor = actor

    def put(self, message: Message) -> None:
        """Post a message, and don't wait."""
        with contextlib.suppress(Exception):  # too many on the way, or the actor is gone: training goes on
            self._actor.put.remote(message)


class _Messages:
    """The actor."""

    def __init__(self) -> None:
        self._messages: deque[Message] = deque(maxlen=_MOST_MESSAGES)

    def put(self, message: Message) -> None:
        self._messages.append(message)

    def take(self) -> list[Message]:
        taken = list(self._messages)
        self._messages.clear()
        return taken


@contextmanager
def event_queue(handle: Callable[[Message], None], on_error: Callable[[Exception], None]) -> Iterator[Mailbox]:
    """A mailbox for workers; every message put into it is passed to `handle`, in order, from one thread.

    What `handle` raises goes to `on_error`, and the next message is handled: training does not stop, and is not judged,
    by who listens.
    """
    import ray

    options = {"num_cpus": 0, "max_restarts": -1, "max_pending_calls": _MOST_ON_THE_WAY}
    actor: Any = ray.remote(_Messages).options(**options).remote()
    done = threading.Event()

    def drain() -> None:
        try:
            messages = ray.get(actor.take.remote(), timeout=_ANSWER_SECONDS)
        except Exception as error:  # noqa: BLE001 - the mailbox's node is gone, say
            on_error(error)
            return
        for message in messages:
            _attempt(handle, message, on_error)

    def pump() -> None:
        while not done.wait(POLL_SECONDS):
            drain()

    thread = threading.Thread(target=pump, name="events", daemon=True)
    thread.start()
    try:
        yield Mailbox(actor)
    finally:
        done.set()
        thread.join(_ENDING_SECONDS)
        if not thread.is_alive():
            drain()
        ray.kill(actor)


def _attempt(handle: Callable[[Message], None], message: Message, on_error: Callable[[Exception], None]) -> None:
    try:
        handle(message)
    except Exception as error:  # noqa: BLE001 - whatever a listener trips over
        on_error(error)
