"""A queue in a store of its own."""

from collections.abc import Callable, Iterator

import pytest

from pipelines.queue.subject_queue import QueuedSubject, SubjectQueue


@pytest.fixture
def uri() -> Iterator[str]:
    import fsspec

    yield "memory://batch"
    fs = fsspec.filesystem("memory")
    if fs.exists("/batch"):
        fs.rm("/batch", recursive=True)


@pytest.fixture
def make(uri: str) -> Callable[..., SubjectQueue]:
    def make(*subjects: QueuedSubject, driver: str = "driver", retries: int = 1) -> SubjectQueue:
        return SubjectQueue(uri, driver, subjects, retries=retries)

    return make
