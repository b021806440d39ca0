"""The queue as an actor, restarted by Ray.

A separate module, because every holder of the actor's handle imports it: the driver's imports (MLflow above all) would
cost each worker seconds.
"""

import pickle
import zlib
from collections.abc import Iterator, Sequence
from typing import Any

from pipelines.queue.subject_queue import QueuedSubject, SubjectQueue

_PACKED_AT_ONCE = 100


def start_queue(uri: str, driver: str, subjects: Sequence[QueuedSubject], *, retries: int) -> Any:
    """Start a queue and return its handle; arguments as for `SubjectQueue`."""
    import ray

    actor = ray.remote(SubjectQueueActor).options(num_cpus=0, max_restarts=-1, max_task_retries=-1)
    handle: Any = actor.remote(uri, driver, retries, *_packed(subjects))
    return handle


class SubjectQueueActor(SubjectQueue):
    """The queue, from arguments small enough for Ray to keep."""

    def __init__(self, uri: str, driver: str, retries: int, *packed: bytes) -> None:
        subjects = [subject for part in packed for subject in pickle.loads(zlib.decompress(part))]
        super().__init__(uri, driver, subjects, retries=retries)


def _packed(subjects: Sequence[QueuedSubject]) -> Iterator[bytes]:
    """Parts of about 10 KB: Ray keeps such arguments with the call and can repeat it without an object store."""
    for start in range(0, len(subjects), _PACKED_AT_ONCE):
        yield zlib.compress(pickle.dumps(subjects[start : start + _PACKED_AT_ONCE]))
