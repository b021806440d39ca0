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
def event_queue(handle: Callable[[Message], None], on_error: Callable[[Exception], None]) -> Iterator[Any]:
    """A queue for workers; every message put on it is passed to `handle`, in order, from one thread.

    What `handle` raises goes to `on_error`, and the next message is handled: training does not stop, and is not judged,
    by who listens.
    """
    from ray.util.queue import Queue

    queue = Queue(actor_options={"num_cpus": 0})
    done = threading.Event()

    def drain() -> None:
        try:
            for message in queue.get_nowait_batch(queue.qsize()):
                _attempt(handle, message, on_error)
        except Exception as error:  # noqa: BLE001 - the queue's node is gone, say
            on_error(error)

    def pump() -> None:
        while not done.wait(POLL_SECONDS):
            drain()

    thread = threading.Thread(target=pump, name="events", daemon=True)
    thread.start()
    try:
        yield queue
    finally:
        done.set()
        thread.join()
        drain()
        queue.shutdown()


def _attempt(handle: Callable[[Message], None], message: Message, on_error: Callable[[Exception], None]) -> None:
    try:
        handle(message)
    except Exception as error:  # noqa: BLE001 - whatever a listener trips over
        on_error(error)
