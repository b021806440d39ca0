"""What workers tell the driver while they work: a queue on the cluster, and a thread that empties it here.

Only the driver writes to MLflow and to the terminal; workers put small plain messages on the queue.
"""

import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

POLL_SECONDS = 0.3

Message = dict[str, Any]


@contextmanager
def event_queue(handle: Callable[[Message], None]) -> Iterator[Any]:
    """A queue for workers; every message put on it is passed to `handle`, in order, from one thread.

    An exception of `handle` is raised when the context ends; the messages after it are dropped.
    """
    from ray.util.queue import Queue

    queue = Queue(actor_options={"num_cpus": 0})
    done = threading.Event()
    failures: list[BaseException] = []

    def drain() -> None:
        for message in queue.get_nowait_batch(queue.qsize()):
            if not failures:
                handle(message)

    def pump() -> None:
        while not done.wait(POLL_SECONDS):
            try:
                drain()
            except Exception as error:  # noqa: BLE001 - told at the end of the context, see above
                failures.append(error)

    thread = threading.Thread(target=pump, name="events", daemon=True)
    thread.start()
    try:
        yield queue
    finally:
        done.set()
        thread.join()
        if not failures:
            drain()
        queue.shutdown()
    if failures:
        raise failures[0]
