"""A worker whose machine will be taken away, or that is told to end, writes a checkpoint before it goes.

Whoever takes a machine away tells Ray to drain the node (`ray drain-node`); Ray Train hears of it, tells the workers,
and moves them in its own time. A single worker is told by SIGTERM, and goes by itself.
"""

import os
import signal
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import FrameType
from typing import Any

from pipelines.cluster.logs import log

WATCHER_SWITCH = "RAY_TRAIN_ENABLE_PREEMPTION_WATCHER"
_ASK_EVERY = 10
"""Steps between two questions whether someone has to go: each is a barrier, and a notice is minutes long."""
_COUNTED_SECONDS = 2
"""A checkpoint counts from the next look of Ray Train's controller, every half second."""

_training, _told = threading.Event(), threading.Event()


def answer_sigterm() -> None:
    """In a worker's main thread: SIGTERM waits for a checkpoint while it trains, and ends it at once otherwise."""
    before = signal.getsignal(signal.SIGTERM)

    def answer(number: int, frame: FrameType | None) -> None:
        if _training.is_set() and not _told.is_set():
            _told.set()
        elif callable(before):
            before(number, frame)
        else:
            sys.exit(128 + number)

    signal.signal(signal.SIGTERM, answer)


def answering_workers() -> Any:
    """What Ray Train calls in every worker's main thread, where alone a signal's handler can be set."""
    from ray.train.v2._internal.execution.callback import WorkerCallback

    class AnswerSigterm(WorkerCallback):
        def after_init_train_context(self) -> None:
            answer_sigterm()

    return AnswerSigterm()


def notice() -> Callable[[], bool] | None:
    """Says whether a node of this worker group will go; every rank has to ask as often. None: nobody would tell."""
    import ray.train

    if os.environ.get(WATCHER_SWITCH) == "0":
        return None
    return lambda: ray.train.get_preemption_info() is not None


class Leaving:
    """Asks now and then whether a worker has to go: because of its machine, which is said once, or because of SIGTERM.

    `any_rank` says on all ranks whether something is so on one.
    """

    def __init__(self, machine_goes: Callable[[], bool] | None, any_rank: Callable[[bool], bool]) -> None:
        self._machine_goes, self._any_rank = machine_goes, any_rank

    @contextmanager
    def while_training(self) -> Iterator[None]:
        """SIGTERM waits for a checkpoint as long as this lasts."""
        _training.set()
        try:
            yield
        finally:
            _training.clear()

    def noticed(self, step: int) -> bool:
        """Whether a checkpoint is wanted for it; every rank has to ask at every step."""
        if step % _ASK_EVERY:
            return False
        told = self._any_rank(_told.is_set())
        announced = self._machine_goes is not None and self._machine_goes()
        if announced:
            self._machine_goes = None
        if told or announced:
            log("leaving", step=step)
        return told or announced

    def go(self) -> None:
        """End this process if it was told to; its checkpoint is written."""
        if _told.is_set():
            time.sleep(_COUNTED_SECONDS)
            os._exit(128 + signal.SIGTERM)
