"""Work behind the sampling: pictures are converted, encoded and written while the next ones are sampled."""

import contextvars
import os
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from typing import TypeVar

T = TypeVar("T")
_MOST_THREADS = 4


def behind(groups: Iterable[Sequence[Callable[[], T]]], device: str) -> Iterator[list[T]]:
    """Results of the calls of each group, in order; they run in threads while the next group is being produced.

    No more than one group waits meanwhile. What a call raises is raised here; calls that have been started always end,
    whoever stops early. Threads are those that `device` leaves to them: a CPU that samples is busy, so there is one.
    """
    threads = min(_MOST_THREADS, os.cpu_count() or 1) if device.startswith("cuda") else 1
    with ThreadPoolExecutor(threads, thread_name_prefix="behind") as pool:
        before: list[Future[T]] = []
        for group in groups:
            # Logs name the subject and the lane.
            started = [pool.submit(contextvars.copy_context().run, call) for call in group]
            if before:
                yield [each.result() for each in before]
            before = started
        if before:
            yield [each.result() for each in before]
