"""The queue as an actor, which Ray makes again wherever it died.

A module of its own, because every process that holds the actor's handle imports it: what the driver needs besides
(MLflow above all) would take each worker seconds.
"""

import pickle
import zlib
from collections.abc import Iterator, Sequence
from typing import Any

from pipelines.queue.subject_queue import QueuedSubject, SubjectQueue

_PACKED_AT_ONCE = 100


def start_queue(uri: str, driver: str, subjects: Sequence[QueuedSubject], *, retries: int) -> Any:
    """The handle of a new queue; see `SubjectQueue` for what is passed."""
    import ray

    actor = ray.remote(SubjectQueueActor).options(num_cpus=0, max_restarts=-1, max_task_retries=-1)
    handle: Any = actor.remote(uri, driver, retries, *_packed(subjects))
    return handle


class SubjectQueueActor(SubjectQueue):
    """The queue, from arguments that Ray can keep."""

    def __init__(self, uri: str, driver: str, retries: int, *packed: bytes) -> None:
        subjects = [subject for part in packed for subject in pickle.loads(zlib.decompress(part))]
        super().__init__(uri, driver, subjects, retries=retries)


def _packed(subjects: Sequence[QueuedSubject]) -> Iterator[bytes]:
    """Parts of some 10 KB: arguments of that size Ray keeps with the call, and needs no object store to repeat it."""
    for start in range(0, len(subjects), _PACKED_AT_ONCE):
        yield zlib.compress(pickle.dumps(subjects[start : start + _PACKED_AT_ONCE]))
